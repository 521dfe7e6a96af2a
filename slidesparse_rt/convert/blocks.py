"""Converting a block of rows of one layer: read, prune, quantize, and measure what that costs.

Rows are independent of each other, so blocks run on any thread in any order; the result is that of
``quantize(prune(weight))`` on the whole weight, to the bit.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..arrays import NDArray
from ..dtypes import Operand
from ..errors import FormatError, NonFiniteError
from ..packing import prune
from ..packing.quantize import positive_zeros, quantize_rows
from ..pattern import Pattern
from .checkpoint import Tensor

__all__ = ["NUMPY_TYPES", "Block", "Recipe", "Tally", "block_starts", "convert_block", "read_bytes"]

#: How safetensors spells a type -> the NumPy type, for what can be converted.
NUMPY_TYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "I8": np.dtype(np.int8),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
}
#: Elements of a block: its temporaries stay in a core's caches.
_BLOCK = 1 << 18


@dataclass(frozen=True, slots=True)
class Recipe:
    """How the rows of one layer are converted.

    ``norms`` is (K,) for "wanda"; ``scales`` is (N,) float32 where the weight is quantized already.
    """

    pattern: Pattern
    dtype: Operand
    method: str
    norms: NDArray | None
    scales: NDArray | None


@dataclass(slots=True)
class Tally:
    """Sums over a layer: squares of its weights, of those kept, of the error; clamped values."""

    energy: float = 0.0
    kept: float = 0.0
    error: float = 0.0
    clamped: int = 0

    def add(self, other: Tally) -> None:
        """Count another block in."""
        self.energy += other.energy
        self.kept += other.kept
        self.error += other.error
        self.clamped += other.clamped


@dataclass(frozen=True, slots=True)
class Block:
    """Converted rows: ``values`` (rows, K), ``scales`` (rows,) float32 or ``None``."""

    values: NDArray
    scales: NDArray | None
    tally: Tally


def block_starts(rows: int, columns: int) -> Iterator[tuple[int, int]]:
    """(first row, one past the last) of blocks that cover ``range(rows)``."""
    step = max(1, _BLOCK // max(1, columns))
    for start in range(0, rows, step):
        yield start, min(start + step, rows)


def read_bytes(handle: int, tensor: Tensor, start: int, size: int) -> NDArray:
    """``size`` bytes of a tensor from byte ``start`` on, as uint8.

    Read, not mapped: where a mapped file shrinks or its disk fails, the process dies.
    """
    buffer: NDArray = np.empty(size, np.uint8)
    view = memoryview(buffer.data)
    done = 0
    while done < size:
        count = os.preadv(handle, [view[done:]], tensor.start + start + done)
        if count == 0:
            raise FormatError(f"{tensor.path} ended within tensor {tensor.name!r}; it has changed")
        done += count
    return buffer


def convert_block(handle: int, weight: Tensor, recipe: Recipe, start: int, stop: int) -> Block:
    """Read and convert rows ``start`` to ``stop`` of a weight.

    Raises
    ------
    NonFiniteError
        For a NaN or an infinity, and for numbers too large for the operand format.
    FormatError, OSError
        If the file cannot be read.
    """
    from ..packing._kernels import row_losses

    kind = NUMPY_TYPES[weight.dtype]
    columns = weight.shape[1]
    width = columns * kind.itemsize
    raw = read_bytes(handle, weight, start * width, (stop - start) * width)
    rows = raw.view(kind).reshape(stop - start, columns)
    with np.errstate(invalid="ignore"):  # a signalling NaN is refused right below
        wide = _widened(rows)
    _refuse_nonfinite(wide, weight, start)
    clamped = 0
    ones = np.ones(stop - start, np.float32)
    if recipe.scales is None:
        pruned = _pruned(rows, recipe)
        if kind == recipe.dtype.dtype:
            values, scales = pruned, None  # converting would change nothing
        else:
            values, scales = quantize_rows(pruned, recipe.dtype, threads=1)
        if scales is None:
            _refuse_overflow(values, pruned, weight, recipe.dtype, start)
        value_scales = ones if scales is None else scales
        weight_scales = ones
    else:
        # A positive scale keeps the order of magnitudes within its row, and pruning works on
        # float32, which holds every int8 and E4M3 number.
        clamped = int(np.count_nonzero(wide < _least(recipe.dtype)))
        pruned = _pruned(np.maximum(wide, _least(recipe.dtype)) if clamped else wide, recipe)
        values = pruned.astype(kind)
        scales = value_scales = weight_scales = recipe.scales[start:stop]
    positive_zeros(values)
    losses = np.empty((stop - start, 3))
    row_losses(
        wide,
        pruned.astype(np.float32, copy=False),
        _widened(values),
        weight_scales,
        value_scales,
        losses,
    )
    energy, kept, error = (float(part) for part in losses.sum(axis=0))
    return Block(values, scales, Tally(energy, kept, error, clamped))


def _widened(values: NDArray) -> NDArray:
    """The same numbers as float32, which holds them exactly."""
    if values.dtype == ml_dtypes.float8_e4m3fn:
        # Looking 256 numbers up is 20 times as fast as converting.
        return np.take(
            np.arange(256, dtype=np.uint8).view(values.dtype).astype(np.float32),
            values.view(np.uint8),
        )
    return values.astype(np.float32, copy=False)


def _pruned(rows: NDArray, recipe: Recipe) -> NDArray:
    made: NDArray = prune(rows, recipe.pattern, method=recipe.method, norms=recipe.norms, threads=1)
    return made


def _least(dtype: Operand) -> float:
    """The smallest value that this package's weights may have: int8 has no -128 here."""
    return -float(dtype.q_max or np.inf)


def _refuse_nonfinite(rows: NDArray, weight: Tensor, start: int) -> None:
    bad = ~np.isfinite(rows)
    if bad.any():
        row, column = (int(at) for at in np.argwhere(bad)[0])
        raise NonFiniteError(
            f"tensor {weight.name!r} in {weight.path.name} holds {float(rows[row, column])} at row "
            f"{start + row}, column {column}; weights must be finite; leave the layer dense with "
            f"--exclude, or get an intact checkpoint"
        )


def _refuse_overflow(
    values: NDArray, pruned: NDArray, weight: Tensor, dtype: Operand, start: int
) -> None:
    bad = ~np.isfinite(values)
    if bad.any():
        row, column = (int(at) for at in np.argwhere(bad)[0])
        raise NonFiniteError(
            f"tensor {weight.name!r} in {weight.path.name} holds {float(pruned[row, column]):g} at "
            f"row {start + row}, column {column}, too large for {dtype.name}; use dtype 'int8' or "
            f"'fp8_e4m3'"
        )
