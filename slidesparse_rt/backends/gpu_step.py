"""What one launch does: quantize and lift, multiply, dequantize.

A launch works in one block of workspace, behind the counters that every block begins with::

    | quantized tokens (Mp, K'p) | token scales (Mp) | accumulators (Mp, Np) | the library's own |

Mp, K'p and Np are M, K' and N rounded up as the library needs.  Where the library can write the
result itself, the accumulators take no space and the last step is left out.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from ..dtypes import ArrayType
from ..kernels.fixed import FixedDequantize, FixedQuantize
from ..kernels.launch import Dequantizer, Quantizer
from .gpu_weight import GpuWeight
from .workspace import COUNTER_BYTES, Memory

__all__ = ["Layout", "Prepared", "Product", "Step"]

#: Places in memory for which a step keeps its launches ready.
_PLACES = 8


@dataclass(frozen=True, slots=True)
class Layout:
    """Where things lie in the workspace of a launch, as byte offsets from its start."""

    padded_tokens: int
    scales: int
    sums: int
    scratch: int
    nbytes: int


class Product(ABC):
    """A matrix product that is ready to launch for one number of tokens.

    Attributes
    ----------
    scratch_bytes:
        Workspace that the library needs.
    direct:
        Whether it writes the result itself, scales and bias included.
    how:
        How the product is done, for people; "" where the library does not say.
    rows_read:
        Rows of tokens that there must be memory for where they are more than the tokens.
    chosen:
        Whether it was chosen among others, if there are any; not where there was no memory for it.
    """

    scratch_bytes: int
    direct: bool
    how: str
    rows_read: int = 0
    chosen: bool = True

    @abstractmethod
    def launch(
        self,
        tokens: int,
        token_scales: int,
        target: int,
        target_stride: int,
        scratch: int,
        counters: int,
        stream: int,
    ) -> None:
        """Multiply the tokens at ``tokens`` into ``target``; all are device addresses.

        ``target_stride`` counts elements from row to row; ``counters`` are
        :data:`~slidesparse_rt.backends.workspace.COUNTER_BYTES` bytes, zero before and after.
        """

    def fixed(
        self, tokens: int, token_scales: int, scratch: int, counters: int
    ) -> Callable[[int, int, int], Callable[[], int | None]]:
        """Return :meth:`launch` with these in place: (target, target stride, stream) -> a call.

        The call launches, and holds until the next one is made; it raises what goes wrong, or
        returns the driver's status.  For one thread at a time.
        """

        def aim(target: int, target_stride: int, stream: int) -> Callable[[], None]:
            places = (tokens, token_scales, target, target_stride, scratch, counters, stream)
            return partial(self.launch, *places)

        return aim


class Prepared(Protocol):
    """What a step needs of its weight, a :class:`~slidesparse_rt.backends.gpu_gemm.GpuPrepared`."""

    weight: GpuWeight
    #: Columns of the accumulators.
    padded_n: int

    @property
    def channel_scales(self) -> int:
        """Device address of the channel scales that the second pass applies; 0: none are left."""
        ...

    def product(self, tokens: int, direct: ArrayType | None, stream: int) -> Product:
        """The product for ``tokens``."""
        ...

    def layout(self, product: Product, tokens: int) -> Layout:
        """Where things lie for ``tokens`` tokens."""
        ...

    def quantizer(self, kind: ArrayType, stream: int) -> Quantizer:
        """The compiled quantize-and-lift for activations of ``kind``."""
        ...

    def dequantizer(self, kind: ArrayType, stream: int) -> Dequantizer:
        """The compiled dequantize into results of ``kind``."""
        ...


class _Placed:
    """The launches of a step at one place in memory, with all that stays there written."""

    __slots__ = ("finish", "multiply", "quantize", "sums")

    def __init__(
        self,
        quantize: FixedQuantize,
        multiply: Callable[[int, int, int], Callable[[], int | None]],
        finish: FixedDequantize | None,
        sums: int,
    ) -> None:
        self.quantize = quantize
        self.multiply = multiply
        self.finish = finish
        self.sums = sums


class Step:
    """Everything that one launch does, with all that can be known ahead worked out.

    For one thread at a time: the launches keep their arguments from call to call.
    """

    __slots__ = (
        "_bias",
        "_channel_scales",
        "_dequantize",
        "_layout",
        "_now",
        "_padded_n",
        "_placed",
        "_product",
        "_quantize",
        "_runs",
        "_scaled",
        "_x_scale",
        "nbytes",
        "tokens",
    )

    def __init__(
        self,
        prepared: Prepared,
        tokens: int,
        x_kind: ArrayType,
        out_kind: ArrayType,
        direct: bool,
        stream: int,
    ) -> None:
        self._product = prepared.product(tokens, out_kind if direct else None, stream)
        self._quantize = prepared.quantizer(x_kind, stream)
        self._dequantize = None if self._product.direct else prepared.dequantizer(out_kind, stream)
        self._layout = prepared.layout(self._product, tokens)
        #: Tokens of a launch.
        self.tokens = tokens
        self._padded_n = prepared.padded_n
        self._x_scale = prepared.weight.x_scale
        self._scaled = prepared.weight.operand.scaled
        self._channel_scales = prepared.channel_scales
        self._bias = prepared.weight.bias
        #: Workspace that it needs.
        self.nbytes = self._layout.nbytes
        # By the address of the workspace: each stream has its own.
        self._placed: dict[int, _Placed] = {}
        # What is launched, and the addresses, strides and stream that it is aimed at.
        self._runs: tuple[Callable[[], int | None], ...] = ()
        self._now: tuple[int, ...] | None = None

    @property
    def chosen(self) -> bool:
        """See :class:`Product`."""
        return self._product.chosen

    def launch(
        self, x: int, x_stride: int, out: int, out_stride: int, workspace: Memory, stream: int
    ) -> None:
        """Launch; arrays are device addresses with strides in elements from row to row."""
        base = workspace.address(self.nbytes, stream, self.tokens)
        now = (x, x_stride, out, out_stride, base, stream)
        if now != self._now:
            self._now = None  # until everything is in place
            self._runs = self._aimed(*now)
            self._now = now
        for run in self._runs:
            status = run()
            if status:
                raise self._placed[base].quantize.error(status)

    def _aimed(
        self, x: int, x_stride: int, out: int, out_stride: int, base: int, stream: int
    ) -> tuple[Callable[[], int | None], ...]:
        """What to call, one after the other."""
        placed = self._placed.get(base)
        if placed is None:
            placed = self._made(base)
            if len(self._placed) >= _PLACES:
                self._placed.clear()
            self._placed[base] = placed
        quantize = placed.quantize.aim(x, x_stride, stream)
        if placed.finish is None:
            return quantize, placed.multiply(out, out_stride, stream)
        multiply = placed.multiply(placed.sums, self._padded_n, stream)
        return quantize, multiply, placed.finish.aim(out, out_stride, stream)

    def _made(self, base: int) -> _Placed:
        layout, tokens = self._layout, self.tokens
        scales, sums = base + layout.scales, base + layout.sums
        finish = None
        if self._dequantize is not None:
            finish = self._dequantize.fixed(
                sums,
                self._padded_n,
                scales if self._scaled else 0,
                self._channel_scales,
                self._bias,
                tokens,
            )
        quantize = self._quantize.fixed(base, scales, tokens, layout.padded_tokens, self._x_scale)
        return _Placed(
            quantize,
            self._product.fixed(base, scales, base + layout.scratch, base - COUNTER_BYTES),
            finish,
            sums,
        )
