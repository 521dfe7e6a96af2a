"""The numerics of docs/numerics.md once more: slow, scalar, and written without the package.

Everything is plain Python on exact numbers; ``f32`` is the one rounding to float32.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np

INF = math.inf


def _rounded(value: Fraction, precision: int, least: int, most: int) -> float:
    """``value`` to the nearest binary float, ties to even.

    ``precision`` bits of significand, no bit below ``2**least``, infinity from ``2**most`` on.
    """
    if value == 0:
        return 0.0
    sign, size = (-1, -value) if value < 0 else (1, value)
    exponent = size.numerator.bit_length() - size.denominator.bit_length()
    if Fraction(2) ** exponent > size:
        exponent -= 1
    unit = Fraction(2) ** max(exponent - precision + 1, least)
    nearest = round(size / unit) * unit  # Fraction rounds half to even
    if nearest >= Fraction(2) ** most:
        return sign * INF
    return sign * float(nearest)


def f32(value: Fraction | float) -> float:
    """Round to float32."""
    return _special(value, 24, -149, 128)


def f16(value: Fraction | float) -> float:
    """Round to float16."""
    return _special(value, 11, -24, 16)


def bf16(value: Fraction | float) -> float:
    """Round to bfloat16."""
    return _special(value, 8, -133, 128)


def _special(value: Fraction | float, precision: int, least: int, most: int) -> float:
    if isinstance(value, float):
        if not math.isfinite(value):
            return value
        if value == 0:
            return value
        rounded = _rounded(Fraction(value), precision, least, most)
        return math.copysign(rounded, value)
    return _rounded(value, precision, least, most)


def mul(a: float, b: float) -> float:
    """One float32 multiplication of two float32 numbers."""
    if not (math.isfinite(a) and math.isfinite(b)) or a == 0 or b == 0:
        return a * b
    return math.copysign(f32(Fraction(a) * Fraction(b)), math.copysign(1, a) * math.copysign(1, b))


def add(a: float, b: float) -> float:
    """One float32 addition of two float32 numbers."""
    if not (math.isfinite(a) and math.isfinite(b)) or a + b == 0:
        return a + b
    return f32(Fraction(a) + Fraction(b))


def div(a: float, b: float) -> float:
    """One float32 division of two finite, positive float32 numbers."""
    return f32(Fraction(a) / Fraction(b))


#: The 127 magnitudes of E4M3 in ascending order: index is the code.
E4M3_MAGNITUDES = tuple(
    (code & 7) * 2.0**-9 if code < 8 else (1 + (code & 7) / 8) * 2.0 ** ((code >> 3) - 7)
    for code in range(0x7F)
)


def e4m3_code(value: float) -> int:
    """Code of the E4M3 number nearest to ``value``, ties to the even code, limited to +-448."""
    size = min(abs(value), 448.0)
    above = bisect_left(E4M3_MAGNITUDES, size)
    if above == 0:
        code = 0
    else:
        below = above - 1
        up = Fraction(E4M3_MAGNITUDES[above]) - Fraction(size)
        down = Fraction(size) - Fraction(E4M3_MAGNITUDES[below])
        if up == down:
            code = above if above % 2 == 0 else below
        else:
            code = above if up < down else below
    return code | (0x80 if math.copysign(1, value) < 0 else 0)


def e4m3_value(code: int) -> float:
    """The number that an E4M3 code stands for."""
    return -E4M3_MAGNITUDES[code & 0x7F] if code & 0x80 else E4M3_MAGNITUDES[code]


def row_scales(
    row: Sequence[float], q_max: float, given: float | None = None
) -> tuple[float, float]:
    """(scale, reciprocal) of a row of float32 numbers; ``given``: the scale to use, a float32."""
    peak = max((abs(v) if not math.isnan(v) else INF) for v in row)
    if peak == INF:
        return math.nan, 0.0
    if given is not None:
        return given, div(1.0, given)
    if peak == 0:
        return 1.0, 0.0
    peak = max(peak, q_max * 2.0**-126)
    return div(peak, q_max), div(q_max, peak)


def quantize_int8(row: Sequence[float], given: float | None = None) -> tuple[float, list[int]]:
    """Scale and integers of one row."""
    scale, reciprocal = row_scales(row, 127.0, given)
    if reciprocal == 0:
        return scale, [0] * len(row)
    scaled = [max(-127.0, min(127.0, mul(v, reciprocal))) for v in row]  # may be infinite
    return scale, [round(Fraction(v)) for v in scaled]


def quantize_fp8(row: Sequence[float], given: float | None = None) -> tuple[float, list[int]]:
    """Scale and E4M3 codes of one row; zeros keep the sign that rounding gives them."""
    scale, reciprocal = row_scales(row, 448.0, given)
    if reciprocal == 0:
        return scale, [0] * len(row)
    return scale, [e4m3_code(mul(v, reciprocal)) for v in row]


def gemm(
    x: Any, w: Any, bias: Any, dtype: str, cast: Any, x_scale: float | None = None
) -> list[list[float]]:
    """``cast((f32(sum) * s_m) * s_n + bias)`` for "int8" and "fp8_e4m3", element by element."""

    def quantized(row: Sequence[float], given: float | None) -> tuple[float, list[Fraction]]:
        if dtype == "int8":
            scale, codes = quantize_int8(row, given)
            return scale, [Fraction(code) for code in codes]
        scale, codes = quantize_fp8(row, given)
        return scale, [Fraction(e4m3_value(code)) for code in codes]

    tokens = [quantized(row, x_scale) for row in _rows(x)]
    channels = [quantized(row, None) for row in _rows(w)]
    offsets = [None] * len(channels) if bias is None else _rows(np.atleast_2d(bias))[0]
    result = []
    for s_m, q_m in tokens:
        line = []
        for (s_n, q_n), offset in zip(channels, offsets, strict=True):
            total = sum((a * b for a, b in zip(q_m, q_n, strict=True) if a and b), Fraction(0))
            y = mul(mul(f32(total), s_m), s_n)
            line.append(cast(y if offset is None else add(y, offset)))
        result.append(line)
    return result


def _rows(array: Any) -> list[list[float]]:
    with np.errstate(invalid="ignore"):
        return [[float(v) for v in row] for row in np.asarray(array).astype(np.float64)]
