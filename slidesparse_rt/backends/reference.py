"""The exact CPU backend: the definition that the GPU backends are held against.

int8 and fp8 sums are exact, so their order does not matter:

* int8: products are at most 127**2 in magnitude.  A float32 sum of K of them is exact while
  ``K * 127**2 <= 2**24``, a float64 sum while ``K * 127**2 <= 2**53``; int32, which K is limited to
  by the dtype table, is far below that.
* fp8: products are multiples of 2**-18 up to 2**18, so K <= 2**17 of them fit float64's 53 bits.
* bf16, fp16: products are exact in float64; their sums are rounded at 2**-53.

The weight is widened block by block, so nothing but the SparseWeight itself is held.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..arrays import Device, NDArray
from ..dtypes import ArrayType
from ..options import PlanOptions
from ..packing.quantize import quantize_tokens
from ..packing.weight import SparseWeight
from .base import Config, Problem, RawWeight, Support

__all__ = ["ReferenceBackend"]

#: Elements of one widened block of weights or activations.
_BLOCK = 1 << 22
#: Integers up to this magnitude are exact in float32.
_FLOAT32_EXACT = 1 << 24


@dataclass(frozen=True, slots=True)
class _Prepared:
    weight: SparseWeight
    bias: NDArray | None
    x_scale: np.float32 | None

    @property
    def nbytes(self) -> int:
        return 0 if self.bias is None else self.bias.nbytes

    def close(self) -> None:
        """Nothing is held beyond the arrays themselves."""


class ReferenceBackend:
    """Quantize the tokens, sum exactly, scale and add the bias in float32."""

    name = "reference"

    def supports(self, problem: Problem, device: Device) -> Support:
        """Every pattern and operand format, on the CPU."""
        del problem
        if device.kind != "cpu":
            return Support(False, f"the reference backend runs on the CPU, not on {device}")
        return Support(True)

    def prepare(
        self,
        weight: SparseWeight | RawWeight,
        bias: NDArray | None,
        device: Device,
        options: PlanOptions,
        *,
        x_scale: np.float32 | None = None,
    ) -> _Prepared:
        """Keep the weight as it is."""
        del device
        if isinstance(weight, RawWeight):
            weight = SparseWeight.from_array(
                weight.array, weight.pattern, dtype=weight.operand, threads=options.threads
            )
        return _Prepared(weight, bias, x_scale)

    def candidates(self, problem: Problem) -> Sequence[Config]:
        """The one way."""
        del problem
        return (Config("exact"),)

    def launch(
        self,
        prepared: _Prepared,
        x: NDArray,
        out: NDArray,
        out_type: ArrayType,
        workspace: object,
        stream: int,
        config: Config,
    ) -> None:
        """Compute into ``out`` (M, N), a NumPy array of ``out_type``; ``stream`` is 0 on a CPU."""
        del workspace, stream, config
        weight = prepared.weight
        k = weight.k
        exact32 = weight.dtype.name == "int8" and k * 127**2 <= _FLOAT32_EXACT
        wide = np.float32 if exact32 else np.float64
        rows = max(1, _BLOCK // k)
        for start in range(0, x.shape[0], rows):
            tokens = slice(start, start + rows)
            values, token_scales = quantize_tokens(
                x[tokens], weight.dtype, x_scale=prepared.x_scale
            )
            left: NDArray = values.astype(wide)
            for first in range(0, weight.n, rows):
                channels = slice(first, first + rows)
                with np.errstate(invalid="ignore", over="ignore"):
                    right: NDArray = weight.values[channels].astype(wide)
                    sums = left @ right.T
                    y = _finish(sums, token_scales, prepared, channels)
                    out[tokens, channels] = y.astype(out_type.dtype)


def _finish(
    sums: NDArray, token_scales: NDArray | None, prepared: _Prepared, channels: slice
) -> NDArray:
    """``(float32(sums) * token scale) * channel scale + bias``: each step rounded to float32."""
    y = sums.astype(np.float32)
    if token_scales is not None and prepared.weight.scales is not None:
        y *= token_scales[:, None]
        y *= prepared.weight.scales[None, channels]
    if prepared.bias is not None:
        y += prepared.bias[None, channels]
    return y
