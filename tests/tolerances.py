"""Every tolerance of the test suite, each with where it comes from.

``u = 2**-p`` is the unit roundoff of a format with ``p`` bits of significand: rounding to nearest
changes a normal number ``v`` by at most ``u * |v|``, and a subnormal one by half a spacing.
"""

from __future__ import annotations

from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]

#: Unit roundoff.
U = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "fp16": 2.0**-11,
    "bf16": 2.0**-8,
    "fp8_e4m3": 2.0**-4,
}
#: Half the spacing of the subnormal numbers.
HALF_STEP = {
    "float32": 2.0**-150,
    "float16": 2.0**-25,
    "bfloat16": 2.0**-134,
    "fp16": 2.0**-25,
    "bf16": 2.0**-134,
    "fp8_e4m3": 2.0**-10,
}
#: The float32 roundings before a value is rounded (Q/a, x*r) and after (a/Q) move it by less than
#: 3.1 u relative to the row's largest magnitude, which is Q steps: 3.1 * 127 u of a step for int8,
#: i.e. 788 u = 4.7e-5 of the half step that rounding to an integer may take.
INT8_SLACK = 2.0**-14
#: The same three roundings relative to the value itself: (1 + 2**-4) * 3.1 u against 2**-4 is
#: 53 u = 3.2e-6.
FP8_SLACK = 2.0**-18


def rounding(size: Array, kind: str) -> Array:
    """Largest change when numbers of magnitude up to ``size`` are rounded to ``kind``."""
    return np.maximum(size * U[kind], HALF_STEP[kind])


def quantization(x: Array, scale: Array | None, dtype: str) -> Array:
    """Largest ``|x - values * scale|`` per element; ``x`` (rows, K) in float64, ``scale`` (rows,).

    int8 rounds to a multiple of the scale: half a scale.  fp8 rounds ``x / scale`` to 4 bits: 2**-4
    of ``x``, or half of its subnormal spacing 2**-9 times the scale.  bf16 and fp16 only round.
    """
    size = np.abs(x)
    if scale is None:
        return rounding(size, dtype)
    step = np.broadcast_to(scale.astype(np.float64)[:, None], x.shape)
    if dtype == "int8":
        return step / 2 * (1 + INT8_SLACK)
    return np.maximum(size * U[dtype], step * HALF_STEP[dtype]) * (1 + FP8_SLACK)


def product(
    x: Array,
    w: Array,
    bias: Array | None,
    x_error: Array,
    w_error: Array,
    out: str,
) -> Array:
    """Largest ``|y - (x @ w.T + bias)|`` of a plan, all arguments in float64.

    With ``x' = x + dx`` and ``w' = w + dw`` the quantized operands,
    ``|x' w' - x w| <= |x| |dw| + |dx| |w| + |dx| |dw|``.  The float32 steps afterwards (sum, two
    scales, bias) round four times, and the cast to the result's type once more.  bf16 and fp16 sums
    are rounded at 2**-53 K times, which the fifth ``u`` covers for every K below 2**29.
    """
    size_x, size_w = np.abs(x), np.abs(w)
    operands = size_x @ w_error.T + x_error @ size_w.T + x_error @ w_error.T
    size = size_x @ size_w.T + operands
    if bias is not None:
        size = size + np.abs(bias)
    steps = 5 * U["float32"] * size * (1 + 2.0**-20)
    return operands + steps + rounding(size + steps, out)


def fused(exact: Array, bias: Array | None, out: str) -> Array:
    """Largest ``|y - (exact + bias)|`` of an int8 plan with ``fuse_channel_scales``.

    ``exact`` is sum * token scale * channel scale, in float64 as the bias.  docs/numerics.md#fused-
    channel-scales derives the bound before the bias; adding the bias rounds to float32 once, and
    the cast to the result's type once more.
    """
    size = np.abs(exact)
    error = size * U["bfloat16"] * (1 + 2.0**-14) + HALF_STEP["float32"]
    total = size + error + (0 if bias is None else np.abs(bias))
    error = error + total * U["float32"]
    return error + rounding(total + error, out)
