"""Checking and pruning weights wherever they are: NumPy and Numba on the host, kernels on a GPU.

Both give the same results to the bit; :mod:`slidesparse_rt.packing` is the definition.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from . import packing
from .arrays import Device, device_of
from .errors import ArrayError
from .packing.prune import check_method, checked_norms
from .pattern import Pattern

__all__ = ["check_pattern", "prune"]


def check_pattern(weight: Any, pattern: str | Pattern, *, threads: int | None = None) -> None:
    """Raise unless ``weight`` fits ``pattern`` and is finite.

    Parameters
    ----------
    weight:
        Shape (N, K), float32, float16 or bfloat16, any library's array: on the CPU with any
        strides, on a GPU with contiguous rows.  A last group shorter than the pattern's is treated
        as if padded with zeros.
    pattern:
        "2:4", "4:6", "6:8", ..., or "dense".
    threads:
        CPU threads; ``None`` takes every core.

    Raises
    ------
    PatternError
        If a group holds too many nonzeros: names the first one, what it holds, what is allowed,
        and how many groups do not fit.
    NonFiniteError
        If there is a NaN or an infinity; names the first element that is one.
    ShapeError, DTypeError, ArrayError, DeviceError, OptionError
        For inputs that are not as described.
    """
    parsed = Pattern.parse(pattern)
    device = device_of(weight, "weight")
    if device.kind == "cpu":
        packing.check_pattern(weight, parsed, threads=threads)
        return
    from .backends.gpu_device import gpu_device, working_on
    from .backends.gpu_weight import check_on_device, refuse_capture, view_weight
    from .device_adapters import adapter_of

    with working_on(device.index):
        stream = adapter_of(weight).current_stream(device.index)
        refuse_capture(stream)
        view = view_weight(weight, stream)
        check_on_device(view, parsed, gpu_device(device.index), stream)


def prune(
    weight: Any,
    pattern: str | Pattern,
    *,
    method: str = "magnitude",
    norms: Any = None,
    threads: int | None = None,
) -> Any:
    """Return a copy of ``weight`` that keeps the most important ``keep`` weights of every group.

    Parameters
    ----------
    weight:
        Shape (N, K), float32, float16 or bfloat16, any library's array: on the CPU with any
        strides, on a GPU with contiguous rows.
    pattern:
        "2:4", "4:6", "6:8", ...; "dense" prunes nothing.
    method:
        "magnitude" keeps the largest ``|w|``.  "wanda" keeps the largest ``|w| * norm`` of the
        weight's input (Sun et al., arXiv 2306.11695); products are compared exactly.
    norms:
        For "wanda": shape (K,), the l2 norm of each input over calibration tokens; finite, >= 0.
    threads:
        CPU threads; ``None`` takes every core.

    Returns
    -------
    array
        Same shape, dtype, device and kind as ``weight``.  Kept weights are unchanged; the others,
        and every -0.0, are +0.0.  Among equally important weights of a group the lower index is
        kept, so the result is the same on every machine.

    Raises
    ------
    NonFiniteError
        If the weight or the norms hold a NaN or an infinity.
    OptionError
        For an unknown method, "wanda" without norms, or norms that another method would ignore.
    ShapeError, DTypeError, ArrayError, DeviceError, PatternError
        For inputs that are not as described.
    """
    parsed = Pattern.parse(pattern)
    device = device_of(weight, "weight")
    if norms is not None and device_of(norms, "norms").kind != "cpu":
        from .device_adapters import to_host
        from .kernels.loader import relaxed_capture

        with relaxed_capture():
            norms = to_host(norms, "norms")
    if device.kind == "cpu":
        return packing.prune(weight, parsed, method=method, norms=norms, threads=threads)
    check_method(method, norms)
    return _prune_on_gpu(weight, parsed, method, norms, device)


def _prune_on_gpu(weight: Any, pattern: Pattern, method: str, norms: Any, device: Device) -> Any:
    from .backends.gpu_device import gpu_device, working_on
    from .backends.gpu_weight import refuse_capture, refuse_nonfinite_on_device, view_weight
    from .device_adapters import adapter_of
    from .kernels.weight_launch import weight_kernels

    gpu, adapter = gpu_device(device.index), adapter_of(weight)
    with working_on(device.index):
        stream = adapter.current_stream(device.index)
        refuse_capture(stream)
        view = view_weight(weight, stream)
        rows, columns = view.shape
        refuse_nonfinite_on_device(view, pattern, gpu, stream)
        out = adapter.maker(view.shape, view.kind, device, stream)()
        target = adapter.view(out, "the result", stream)
        if columns > 1 and target.strides[1] != 1:
            raise ArrayError("the array library returned a result whose rows are not contiguous")
        size = view.kind.bits // 8
        kernels = weight_kernels(gpu, view.kind.name, pattern)
        source = (view.pointer, view.strides[0] * size, target.pointer, columns * size)
        if method == "magnitude":
            kernels.prune_magnitude(*source, rows, columns, stream)
        else:
            wide = np.ascontiguousarray(checked_norms(norms, columns))
            with gpu.upload(wide, stream) as held:
                kernels.prune_wanda(*source, held.pointer, rows, columns, stream)
                gpu.synchronize(stream)
        if view.owner is not None:
            gpu.synchronize(stream)  # its exporter may reuse the memory from here on
        return out if adapter.finish is None else adapter.finish(out, stream)
