"""What the tests of plans share: weights, activations, and the comparison with float64."""

from __future__ import annotations

from typing import Any

import numpy as np
from strategies import (
    Array,
)
from tolerances import product, quantization

import slidesparse_rt as ss
from slidesparse_rt.packing import quantize_tokens


def fitted(pattern: str, n: int, k: int, seed: int = 0) -> Array:
    rng = np.random.default_rng(seed)
    return ss.prune(rng.standard_normal((n, k)).astype(np.float32), pattern)


def tokens(*shape: int, dtype: Any = np.float32) -> Array:
    return np.random.default_rng(1).standard_normal(shape).astype(dtype)


def assert_close(y: Array, x: Array, weight: Array, bias: Array | None, dtype: str) -> None:
    """``y`` (M, N) is ``x @ weight.T + bias`` in float64, within the derived tolerance."""
    x64, w64 = x.astype(np.float64), weight.astype(np.float64)
    b64 = None if bias is None else bias.astype(np.float64)
    exact = x64 @ w64.T + (0 if b64 is None else b64)
    _, w_scales = ss.quantize(weight, dtype)
    _, x_scales = quantize_tokens(x, dtype)
    x_error = quantization(x64, x_scales, dtype)
    w_error = quantization(w64, w_scales, dtype)
    bound = product(x64, w64, b64, x_error, w_error, y.dtype.name)
    assert (np.abs(y.astype(np.float64) - exact) <= bound).all()
