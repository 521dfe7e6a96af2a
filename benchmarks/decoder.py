"""A decoder of the Qwen2 and Llama kind in plain PyTorch, whose linear layers are given.

Everything but the linear layers is the same for every side of a comparison: RMSNorm, rotary
positions, grouped-query attention through ``scaled_dot_product_attention``, SiLU gates, residuals
in the activations' type.  Query, key and value are one linear layer, gate and up another, as
inference servers run them.

Shapes: B sequences of S tokens, hidden size C, H heads and G key heads of D.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812

__all__ = ["LAYERS", "Cache", "Decoder", "Sizes"]

#: The linear layers of a block, in the order in which it runs them.
LAYERS = ("qkv", "o", "gate_up", "down")
#: Takes (tokens, inputs), gives (tokens, channels).
Linear = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Sizes:
    """What a decoder's shapes follow from."""

    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    blocks: int
    vocabulary: int
    rope_theta: float = 1e6
    epsilon: float = 1e-6

    def layer(self, name: str) -> tuple[int, int]:
        """(output channels, inputs) of a linear layer of :data:`LAYERS`."""
        across = self.heads * self.head_size
        return {
            "qkv": (across + 2 * self.kv_heads * self.head_size, self.hidden),
            "o": (self.hidden, across),
            "gate_up": (2 * self.intermediate, self.hidden),
            "down": (self.hidden, self.intermediate),
        }[name]

    @property
    def linear_weights(self) -> int:
        """Weights of all linear layers of all blocks."""
        return self.blocks * sum(n * k for n, k in map(self.layer, LAYERS))


class Cache:
    """Keys and values of B sequences, room for ``length`` tokens each."""

    def __init__(self, sizes: Sizes, batch: int, length: int, like: torch.Tensor) -> None:
        shape = (sizes.blocks, 2, batch, sizes.kv_heads, length, sizes.head_size)
        self.memory = torch.zeros(shape, dtype=like.dtype, device=like.device)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return self.memory.numel() * self.memory.element_size()


def add_norm(
    x: torch.Tensor, more: torch.Tensor, weight: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The residual stream with ``more`` added, and its RMSNorm."""
    x = x + more
    return x, F.rms_norm(x, weight.shape, weight, epsilon)


def gated(gate_up: torch.Tensor) -> torch.Tensor:
    """``silu(gate) * up`` of a fused (tokens, 2 I)."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def rotated(x: torch.Tensor, cosines: torch.Tensor, sines: torch.Tensor) -> torch.Tensor:
    """Rotary positions of (..., S, heads, D); cosines and sines are (S, 1, D / 2)."""
    first, second = x.float().chunk(2, dim=-1)
    turned = (first * cosines - second * sines, second * cosines + first * sines)
    return torch.cat(turned, dim=-1).to(x.dtype)


class Decoder:
    """A decoder that runs prefill and single steps.

    Parameters
    ----------
    sizes:
        Its shapes.
    linears:
        For each block the layers of :data:`LAYERS`, by name.
    embedding, head:
        (vocabulary, C) tables, in the activations' type.
    longest:
        Positions that are tabulated.
    compiled:
        Whether the steps between linear layers go through ``torch.compile``.
    """

    def __init__(
        self,
        sizes: Sizes,
        linears: Sequence[dict[str, Linear]],
        embedding: torch.Tensor,
        head: torch.Tensor,
        *,
        longest: int,
        compiled: bool = False,
    ) -> None:
        self.sizes, self.linears = sizes, linears
        self.embedding, self.head = embedding, head
        place: dict[str, Any] = {"device": embedding.device}
        self.norm = torch.ones(sizes.hidden, dtype=embedding.dtype, **place)
        half = torch.arange(sizes.head_size // 2, dtype=torch.float64, **place)
        angles = torch.outer(
            torch.arange(longest, dtype=torch.float64, **place),
            sizes.rope_theta ** (-2 * half / sizes.head_size),
        )
        self.cosines, self.sines = angles.cos().float()[:, None], angles.sin().float()[:, None]
        wrap: Any = (lambda f: torch.compile(f, dynamic=True)) if compiled else (lambda f: f)
        self._add_norm, self._gated, self._rotated = wrap(add_norm), wrap(gated), wrap(rotated)

    def prefill(self, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """Logits (B, vocabulary) of the last of ids (B, S); keys and values go to ``cache``."""
        return F.linear(self.hidden(ids, cache)[:, -1], self.head)

    def hidden(self, ids: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """What :meth:`prefill` has before the head, of every token: (B, S, C)."""
        batch, length = ids.shape
        tables = self.cosines[:length], self.sines[:length]

        def attention(block: int, q: Any, k: Any, v: Any) -> torch.Tensor:
            if cache is not None:
                cache.memory[block, 0, :, :, :length] = k.transpose(1, 2)
                cache.memory[block, 1, :, :, :length] = v.transpose(1, 2)
            parts = (part.transpose(1, 2) for part in (q, k, v))
            found = F.scaled_dot_product_attention(*parts, is_causal=True, enable_gqa=True)
            return found.transpose(1, 2)

        return self._run(ids, tables, attention).view(batch, length, -1)

    def step(self, ids: torch.Tensor, cache: Cache, past: int) -> torch.Tensor:
        """Logits (B, vocabulary) of one more token each, ids (B,), after ``past`` tokens."""
        sizes = self.sizes
        tables = self.cosines[past : past + 1], self.sines[past : past + 1]
        together = sizes.heads // sizes.kv_heads

        def attention(block: int, q: Any, k: Any, v: Any) -> torch.Tensor:
            cache.memory[block, 0, :, :, past : past + 1] = k.transpose(1, 2)
            cache.memory[block, 1, :, :, past : past + 1] = v.transpose(1, 2)
            keys, values = cache.memory[block, :, :, :, : past + 1]
            # The queries that share a key head are rows of one product.
            rows = q.reshape(ids.shape[0], sizes.kv_heads, together, sizes.head_size)
            return F.scaled_dot_product_attention(rows, keys, values)

        return F.linear(self._run(ids[:, None], tables, attention), self.head)

    def _run(self, ids: torch.Tensor, tables: Any, attention: Any) -> torch.Tensor:
        sizes = self.sizes
        batch, length = ids.shape
        heads = (sizes.heads, sizes.kv_heads, sizes.kv_heads)
        more: torch.Tensor = F.embedding(ids, self.embedding).view(batch * length, sizes.hidden)
        x = torch.zeros_like(more)
        for block, linear in enumerate(self.linears):
            x, normed = self._add_norm(x, more, self.norm, sizes.epsilon)
            qkv = linear["qkv"](normed).view(batch, length, sum(heads), sizes.head_size)
            q, k, v = qkv.split(heads, dim=2)
            q, k = self._rotated(q, *tables), self._rotated(k, *tables)
            found = attention(block, q, k, v)
            more = linear["o"](found.reshape(batch * length, -1))
            x, normed = self._add_norm(x, more, self.norm, sizes.epsilon)
            more = linear["down"](self._gated(linear["gate_up"](normed)))
        return self._add_norm(x, more, self.norm, sizes.epsilon)[1]
