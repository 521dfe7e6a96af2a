"""Linear layers of well-known models, as (N, K): output channels and inputs; and squares.

Source: each model's published config.json (hidden_size, num_attention_heads, num_key_value_heads,
head_dim, intermediate_size).  Query, key and value are one product, gate and up another, as
inference servers run them.

``squares`` is no model: it stands for products with M = N = K = 64, 128, ... 16384, each of which
is measured alone, under the name ``square-64`` and so on.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import OptionError

__all__ = ["MODELS", "SQUARES", "Layer", "Model", "Square", "expanded", "model"]

#: What :func:`expanded` replaces by every square.
SQUARES = "squares"
_SQUARE_SIZES = tuple(1 << power for power in range(6, 15))


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


@dataclass(frozen=True, slots=True)
class Square:
    """One product with M = N = K = ``size``, measured alone."""

    size: int

    @property
    def name(self) -> str:
        """What result files call it."""
        return f"square-{self.size}"

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The product."""
        return (Layer("square", self.size, self.size),)


MODELS: dict[str, Model] = {
    row.name: row
    for row in (
        Model("qwen2.5-7b", 3584, 28, 4, 128, 18944),
        Model("qwen2.5-14b", 5120, 40, 8, 128, 13824),
        Model("llama-3.2-1b", 2048, 32, 8, 64, 8192),
        Model("llama-3.2-3b", 3072, 24, 8, 128, 8192),
        # BitNet b1.58 2B4T.
        Model("bitnet-2b", 2560, 20, 5, 128, 6912),
    )
}


_SQUARES = {row.name: row for row in map(Square, _SQUARE_SIZES)}


def model(name: str) -> Model | Square:
    """Return the model or the square that ``name`` names; OptionError for any other."""
    key = name.strip().lower()
    found = MODELS.get(key) or _SQUARES.get(key)
    if found is None:
        raise OptionError(
            f"model {name!r} is unknown; allowed are {', '.join(map(repr, MODELS))}, {SQUARES!r} "
            f"(M = N = K), and one of them, such as {next(iter(_SQUARES))!r}"
        )
    return found


def expanded(names: Iterable[str]) -> tuple[str, ...]:
    """The names with ``squares`` replaced by each of them, each name once."""
    found: list[str] = []
    for name in names:
        found += _SQUARES if name.strip().lower() == SQUARES else [name]
    return tuple(dict.fromkeys(found))
