"""What the GPU tests share: data, the exact reference, and the bounds on rounded backends."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

import slidesparse_rt as ss
from slidesparse_rt.dtypes import operand
from slidesparse_rt.ffi.driver import probe
from slidesparse_rt.packing import quantize, quantize_tokens

Array = np.ndarray[Any, Any]

#: What tests are parametrized with.  conftest.py skips those of "hopper" where it cannot run.
BACKENDS = ("cusparselt", "dense", "hopper")
_FOUND = probe().devices
#: Whether the first GPU is of the one compute capability that the backend "hopper" is for.
ON_HOPPER = bool(_FOUND) and _FOUND[0].compute_capability == (9, 0)
#: For loops within a test.
BACKENDS_HERE = BACKENDS if ON_HOPPER else BACKENDS[:2]
#: (backend, operand format).  fp16 of cuSPARSELt, which not every GPU has, has its own test.
FORMATS = [
    (backend, dtype)
    for backend in BACKENDS
    for dtype in ("int8", "fp8_e4m3", "bf16", "fp16")
    if (backend, dtype) != ("cusparselt", "fp16")
]
FLOATS = ("float32", "float16", "bfloat16")

#: Bound on the error of a tensor-core sum relative to the sum of the products' magnitudes.
#: Measured on an H200 (benchmarks/results/gpu-checks-h200.json): fp8 sums, which Hopper keeps in
#: fewer bits than float32's, were off by up to 3.9e-4; bf16 and fp16 sums by up to 3.6e-7.
SUM_ERROR = {"int8": 0.0, "fp8_e4m3": 2.0**-10, "bf16": 2.0**-16, "fp16": 2.0**-16}
#: Unit roundoff of results.
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def numpy_type(name: str) -> np.dtype[Any]:
    return np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)


def data(seed: int, shape: tuple[int, ...], kind: str = "float32") -> Array:
    rng = np.random.default_rng(seed)
    return rng.standard_normal(shape, dtype=np.float32).astype(numpy_type(kind))


def weight(seed: int, n: int, k: int, pattern: str, kind: str = "float32") -> Array:
    pruned: Array = ss.prune(data(seed, (n, k), kind), pattern)
    return pruned


def to_torch(values: Array) -> Any:
    import torch

    values = np.ascontiguousarray(values)
    if values.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16).cuda()
    return torch.from_numpy(values).cuda()


def sums_of(backend: str, dtype: str) -> str:
    """Type in which a backend's library returns sums: cuSPARSELt rounds those of 16-bit formats."""
    if backend == "cusparselt":
        return {"bf16": "bfloat16", "fp16": "float16"}.get(dtype, "float32")
    return "float32"


def to_host(tensor: Any) -> Array:
    """Any library's GPU array as NumPy."""
    if type(tensor).__module__.startswith("torch"):
        import torch

        if tensor.dtype == torch.bfloat16:
            return tensor.cpu().contiguous().view(torch.int16).numpy().view(ml_dtypes.bfloat16)
        return np.asarray(tensor.cpu().numpy())
    if hasattr(tensor, "copy_to_host"):
        return np.asarray(tensor.copy_to_host())
    if hasattr(tensor, "get"):
        return np.asarray(tensor.get())
    return np.asarray(tensor)


def reference(w: Array, pattern: str, x: Array, dtype: str, **options: Any) -> Array:
    with ss.SparseGemmPlan(w, pattern, dtype=dtype, device="cpu", **options) as plan:
        result: Array = plan.run(x)
    return result


def bits_of(values: Array) -> Array:
    return np.ascontiguousarray(values).view(f"u{values.itemsize}")


def assert_same(found: Array, expected: Array) -> None:
    """Equal to the bit; NaN equals NaN whatever its payload."""
    assert found.shape == expected.shape
    assert found.dtype == expected.dtype
    wide, wanted = found.astype(np.float32), expected.astype(np.float32)
    nan = np.isnan(wanted)
    np.testing.assert_array_equal(np.isnan(wide), nan)
    different = (bits_of(found) != bits_of(expected)) & ~nan
    assert not different.any(), (
        f"{different.sum()} of {different.size} differ, first at {np.argwhere(different)[0]}: "
        f"{found[different][:3]} instead of {expected[different][:3]}"
    )


def exact_parts(
    w: Array, x: Array, dtype: str, x_scale: float | None = None
) -> tuple[Array, Array]:
    """(x @ w.T, |x| @ |w|.T) of the quantized operands with their scales, in float64."""
    qw, sw = quantize(w, dtype)
    qx, sx = quantize_tokens(np.ascontiguousarray(x), operand(dtype), x_scale=x_scale)
    left, right = qx.astype(np.float64), qw.astype(np.float64)
    if sx is not None:
        left *= sx.astype(np.float64)[:, None]
        right *= sw.astype(np.float64)[:, None]
    return left @ right.T, np.abs(left) @ np.abs(right).T


def assert_near(
    found: Array,
    w: Array,
    x: Array,
    dtype: str,
    bias: Array | None = None,
    *,
    sums: str = "float32",
    x_scale: float | None = None,
) -> float:
    """Within the documented bound of float64 on the quantized operands; returns error / bound."""
    exact, size = exact_parts(w, x, dtype, x_scale)
    # The sum's own error, and its rounding to the type that the library returns.
    allowed = size * (SUM_ERROR[dtype] + 2.0**-21) + 1.01 * ROUNDING[sums] * np.abs(exact)
    if bias is not None:
        exact = exact + bias.astype(np.float64)
        size = size + np.abs(bias.astype(np.float64))
    # Scales and bias in float32, and the rounding to the type of the result.
    allowed += 2.0**-22 * size + 1.01 * ROUNDING[found.dtype.name] * (np.abs(exact) + allowed)
    allowed += 2.0**-24 if found.dtype.name == "float16" else 1e-37
    error = np.abs(found.astype(np.float64) - exact)
    worst = float((error / allowed).max(initial=0.0))
    assert worst <= 1.0, f"error is {worst:.3g} of the bound"
    return worst
