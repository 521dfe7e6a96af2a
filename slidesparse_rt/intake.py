"""Weights and biases as users hand them in: whose they are, what they hold, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np

from .arrays import CPU, Device, NDArray, device_of, library_of, refuse_shape, to_numpy
from .backends import Problem
from .backends.base import RawWeight
from .backends.machine import gpu_refusal
from .dtypes import Operand, operand
from .errors import BackendUnavailable, NonFiniteError, OptionError, PatternError, ShapeError
from .packing.weight import SparseWeight
from .pattern import Pattern

__all__ = ["checked_bias", "intake", "problem_of", "readable"]

_DEFAULT_DTYPE = "int8"


def intake(
    weight: Any, pattern: str | Pattern | None, dtype: str | Operand | None
) -> tuple[Device, SparseWeight | RawWeight]:
    """The weight's device, and the weight with its pattern and operand format."""
    if isinstance(weight, SparseWeight):
        if pattern is not None and Pattern.parse(pattern) != weight.pattern:
            raise PatternError(
                f"pattern={str(pattern)!r} contradicts the weight's own {weight.pattern.name!r}; "
                f"omit pattern="
            )
        if dtype is not None and operand(dtype) != weight.dtype:
            raise OptionError(
                f"dtype={dtype!r} contradicts the weight's own {weight.dtype.name!r}; omit dtype="
            )
        return CPU, weight
    if pattern is None:
        raise OptionError('pattern is missing; type for example pattern="6:8"')
    row = operand(_DEFAULT_DTYPE if dtype is None else dtype)
    return device_of(weight, "weight"), RawWeight(weight, Pattern.parse(pattern), row)


def readable(source: SparseWeight | RawWeight, home: Device) -> SparseWeight | RawWeight:
    """The source; one known only through DLPack as an array that has a shape."""
    if isinstance(source, SparseWeight) or library_of(source.array) != "dlpack":
        return source
    if home == CPU:
        return RawWeight(to_numpy(source.array, "weight"), source.pattern, source.operand)
    missing = gpu_refusal((), home)
    if missing:
        raise BackendUnavailable(f"no backend can run a weight on {home}: {missing}")
    from .device_adapters import to_cupy

    return RawWeight(to_cupy(source.array, "weight"), source.pattern, source.operand)


def problem_of(source: SparseWeight | RawWeight) -> Problem:
    """The problem that a weight (N, K) poses; ShapeError for any other shape."""
    if isinstance(source, SparseWeight):
        return Problem(source.n, source.k, source.pattern, source.dtype)
    shape = tuple(source.array.shape)
    refuse_shape(shape, "weight", "(N, K)")
    return Problem(int(shape[0]), int(shape[1]), source.pattern, source.operand)


def checked_bias(bias: Any, n: int) -> NDArray | None:
    """A bias (N,) of any library as float32 on the host; ShapeError or NonFiniteError otherwise."""
    if bias is None:
        return None
    if device_of(bias, "bias").kind == "cuda":
        from .device_adapters import to_host
        from .kernels.loader import relaxed_capture

        with relaxed_capture():
            view = to_host(bias, "bias")
    else:
        view = to_numpy(bias, "bias")
    if view.shape != (n,):
        raise ShapeError(f"bias has shape {view.shape}; allowed is ({n},), one for each output")
    wide = np.array(view, dtype=np.float32)
    if not np.isfinite(wide).all():
        raise NonFiniteError(
            f"bias holds a NaN or an infinity at index {int(np.argmax(~np.isfinite(wide)))}; "
            f"it must be finite"
        )
    return wide
