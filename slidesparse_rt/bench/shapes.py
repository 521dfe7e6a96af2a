"""Linear layers of well-known models, as (N, K): output channels and inputs.

Source: each model's published config.json (hidden_size, num_attention_heads, num_key_value_heads,
head_dim, intermediate_size).  Query, key and value are one product, gate and up another, as
inference servers run them.
"""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import OptionError

__all__ = ["MODELS", "Layer", "Model", "model"]


@dataclass(frozen=True, slots=True)
class Layer:
    """One linear layer: ``y (M, n) = x (M, k) @ weight (n, k).T``."""

    name: str
    n: int
    k: int

    def flops(self, tokens: int) -> int:
        """Operations of the dense product: a multiply and an add for each weight and token."""
        return 2 * tokens * self.n * self.k


@dataclass(frozen=True, slots=True)
class Model:
    """The sizes of a decoder from which its linear layers follow."""

    name: str
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The four linear layers of one block, in the order in which it runs them."""
        rows = (self.heads + 2 * self.kv_heads) * self.head_size
        return (
            Layer("qkv", rows, self.hidden),
            Layer("o", self.hidden, self.heads * self.head_size),
            Layer("gate_up", 2 * self.intermediate, self.hidden),
            Layer("down", self.hidden, self.intermediate),
        )


MODELS: dict[str, Model] = {
    row.name: row
    for row in (
        Model("qwen2.5-7b", 3584, 28, 4, 128, 18944),
        Model("qwen2.5-14b", 5120, 40, 8, 128, 13824),
        Model("llama-3.2-1b", 2048, 32, 8, 64, 8192),
        Model("llama-3.2-3b", 3072, 24, 8, 128, 8192),
    )
}


def model(name: str) -> Model:
    """Return the model that ``name`` names; OptionError for any other."""
    found = MODELS.get(name.strip().lower())
    if found is None:
        raise OptionError(f"model {name!r} is unknown; allowed are {', '.join(map(repr, MODELS))}")
    return found
