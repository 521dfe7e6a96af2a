"""The reference arithmetic of quantization; every backend reproduces it bit for bit.

Per row (an output channel of a weight, a token of an activation), all in float32 and in this order:

1. ``a`` = largest magnitude of the row.  ``a == 0``: scale 1, values 0.  ``a`` not finite: scale
   NaN, values 0, so that the row's result is NaN whatever the weights are.
2. ``a' = max(a, q_max * 2**-126)``; ``scale = a' / q_max``; ``r = q_max / a'``.
3. ``q = round_half_even(x * r)`` limited to ``+-q_max``: integers for int8, the nearest E4M3 number
   for fp8.

Activations may come with a scale ``s`` for all tokens.  Then ``scale = s`` and ``r = 1 / s`` for
every row that is finite, a row of zeros included; step 3 is the same.

Source: docs/numerics.md, which has the error bounds.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from ..arrays import NDArray, as_matrix, wrap_numpy
from ..dtypes import SCALE_FLOOR, Operand, operand
from ..errors import NonFiniteError
from ..options import checked_x_scale
from ._rows import over_rows

__all__ = ["dequantize", "quantize", "quantize_rows", "quantize_tokens"]


def quantize(weight: Any, dtype: str | Operand, *, threads: int | None = None) -> tuple[Any, Any]:
    """Quantize a weight per output channel.

    Parameters
    ----------
    weight:
        Shape (N, K), float32, float16 or bfloat16, any library's host array, any strides.
    dtype:
        "int8" or "fp8_e4m3"; "bf16" and "fp16" only convert (round to nearest even).
    threads:
        CPU threads; ``None`` takes every core.

    Returns
    -------
    values, scales:
        (N, K) in the operand's type, and (N,) float32 with ``weight ~= values * scales[:, None]``
        (``None`` for "bf16" and "fp16"); the same kind of array as ``weight``.  Zeros are +0.

    Raises
    ------
    NonFiniteError
        If the weight holds a NaN or an infinity, or a value that overflows "fp16" or "bf16".
    ShapeError, DTypeError, ArrayError, DeviceError, OptionError
        For other inputs that are not as described.
    """
    row = operand(dtype)
    view = as_matrix(weight, "weight", "(N, K)")
    values, scales = quantize_rows(view, row, threads=threads)
    bad: NDArray = np.asarray(
        ~np.isfinite(values).all(axis=1) if scales is None else ~np.isfinite(scales)
    )
    if bad.any():
        n = int(np.argmax(bad))
        peak = np.abs(view[n].astype(np.float32)).max()
        others = "'int8' or 'fp8_e4m3'" if row.name == "bf16" else "'bf16' or 'int8'"
        raise NonFiniteError(
            f"weight row {n} holds {peak:g}, too large for {row.name}; use {others}"
            if np.isfinite(peak)
            else f"weight has a NaN or an infinity in row {n}; weights must be finite"
        )
    positive_zeros(values)
    return wrap_numpy(values, weight), None if scales is None else wrap_numpy(scales, weight)


def quantize_tokens(
    x: NDArray, dtype: str | Operand, *, x_scale: float | np.float32 | None = None
) -> tuple[NDArray, NDArray | None]:
    """Quantize activations per token: (M, K) to values (M, K) and scales (M,) float32 or None.

    ``x_scale`` is the scale of all tokens, rounded to float32; ``None`` measures each token's own.

    A token that holds a NaN or an infinity gets scale NaN and values 0; for "bf16" and "fp16" all
    its values become NaN (also where a finite number overflows float16).  No other token changes.

    Raises OptionError for an ``x_scale`` that :func:`~slidesparse_rt.options.checked_x_scale`
    refuses.
    """
    row = operand(dtype)
    given = None if x_scale is None else checked_x_scale(x_scale, row)
    values, scales = quantize_rows(x, row, threads=1, given=given)
    if scales is None:
        values[~np.isfinite(values).all(axis=1)] = np.nan
    return values, scales


def dequantize(values: NDArray, scales: NDArray | None) -> NDArray:
    """``values * scales[:, None]`` in float32; plain conversion where there are no scales.

    Infinite only where rounding the scale carries a product past float32's largest number.
    """
    wide = values.astype(np.float32)
    if scales is not None:
        with np.errstate(over="ignore"):
            wide *= scales[:, None]
    return wide


def quantize_rows(
    x: NDArray, row: Operand, *, threads: int | None, given: np.float32 | None = None
) -> tuple[NDArray, NDArray | None]:
    """Quantize each row of ``x`` (rows, columns) by the module's definition; nothing is refused.

    ``given`` is the scale of all rows, in range; ``None`` measures each row's own.
    """
    rows, columns = x.shape
    values = np.empty((rows, columns), row.dtype)
    if row.q_max is None:

        def convert(start: int, stop: int) -> None:
            # Through float32, so that float16 <-> bfloat16 rounds once; overflow gives infinity.
            with np.errstate(over="ignore", invalid="ignore"):
                values[start:stop] = x[start:stop].astype(np.float32).astype(row.dtype)

        over_rows(rows, columns, convert, threads)
        return values, None

    scales = np.empty(rows, np.float32)
    q_max = np.float32(row.q_max)
    scale = np.float32(0) if given is None else given
    from . import _kernels

    if row.name == "int8":
        kernel, out = _kernels.quantize_int8, values
    else:
        kernel, out = _kernels.quantize_fp8, values.view(np.uint8)

    def quantized(start: int, stop: int) -> None:
        wide = np.ascontiguousarray(x[start:stop], dtype=np.float32)
        kernel(wide, q_max, SCALE_FLOOR, scale, out[start:stop], scales[start:stop])

    over_rows(rows, columns, quantized, threads)
    return values, scales


def has_negative_zeros(values: NDArray) -> bool:
    """Whether a -0.0 is among the numbers."""
    return any(bool(found.any()) for _, found in _negative_zeros(values))


def positive_zeros(values: NDArray) -> None:
    """Turn every -0.0 into +0.0, in place."""
    for block, found in _negative_zeros(values):
        block[found] = 0


def _negative_zeros(values: NDArray) -> Iterator[tuple[NDArray, NDArray]]:
    """Blocks of rows of the numbers' bits, and where they are -0.0; small, to need little memory
    beside them.
    """
    if values.dtype.kind == "i":
        return
    bits = values.view(f"u{values.itemsize}")
    step = max(1, (1 << 18) // max(1, values[:1].size))
    for start in range(0, len(bits), step):
        block = bits[start : start + step]
        yield block, block == 1 << (8 * values.itemsize - 1)
