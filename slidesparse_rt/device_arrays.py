"""Arrays in GPU memory, whoever owns them: addresses and strides, streams, the current device.

:mod:`slidesparse_rt.device_adapters` reads and makes those of each library.  CuPy is the one GPU
package that is always there.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

from .arrays import Device, overlaps_itself
from .dtypes import ArrayType
from .errors import ArrayError, DeviceError, DTypeError, OptionError, ShapeError

__all__ = [
    "PER_THREAD_STREAM",
    "DeviceArray",
    "byte_range",
    "checked_out",
    "collapse_rows",
    "cuda_runtime",
    "cupy_stream",
    "current_device",
    "on_device",
    "order_streams",
    "refuse_overlap",
    "refuse_per_thread_stream",
    "same_device",
    "set_device",
    "stream_pointer",
]


#: cudaStreamPerThread
PER_THREAD_STREAM = 2


class DeviceArray(NamedTuple):
    """An array in GPU memory, whoever owns it: address, extents and strides in elements.

    ``owner`` is what must be kept until the work on it is done, where the caller does not.
    """

    pointer: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    kind: ArrayType
    owner: object = None


def collapse_rows(array: DeviceArray, what: str) -> tuple[int, int]:
    """(rows, row stride in elements) of an array (..., columns) seen as a matrix.

    Raises ArrayError where the elements of a row are not adjacent, or where the rows are not one
    stride apart; nothing is copied to make them so.
    """
    shape, strides = array.shape, array.strides
    if shape[-1] != 1 and strides[-1] != 1 and 0 not in shape:
        raise ArrayError(
            f"{what} has strides {strides} (elements) for shape {shape}; its last dimension must "
            f"be contiguous on a GPU; make it so first ({what}.contiguous(), or a copy)"
        )
    if len(shape) == 2:
        return shape[0], strides[0] if shape[0] > 1 else shape[1]
    rows, stride = 1, shape[-1]
    for extent, step in zip(reversed(shape[:-1]), reversed(strides[:-1]), strict=True):
        if extent == 0:
            return 0, shape[-1]
        if extent == 1:
            continue
        if rows == 1:
            rows, stride = extent, step
        elif step == stride * rows:
            rows *= extent
        else:
            raise ArrayError(
                f"{what} has strides {strides} (elements) for shape {shape}, so that its rows are "
                f"not evenly apart; make it contiguous first"
            )
    return rows, stride


def refuse_overlap(x_first: int, x_last: int, first: int, last: int) -> None:
    """Raise ArrayError where the address range of ``out`` meets that of ``x``."""
    if x_first < last and first < x_last:
        raise ArrayError("out lies in the address range of x; pass an out of its own")


def byte_range(array: DeviceArray) -> tuple[int, int]:
    """First and one-past-last byte address that the array touches."""
    if 0 in array.shape:
        return array.pointer, array.pointer
    low = high = 0
    for extent, step in zip(array.shape, array.strides, strict=True):
        reach = (extent - 1) * step
        low, high = low + min(0, reach), high + max(0, reach)
    size = array.kind.bits // 8
    return array.pointer + low * size, array.pointer + (high + 1) * size


def stream_pointer(stream: Any) -> int:
    """The address of a CUDA stream.

    Parameters
    ----------
    stream:
        An address, or an object with ``__cuda_stream__`` (cuda.core, Numba, recent PyTorch and
        CuPy), ``cuda_stream`` (PyTorch) or ``ptr`` (CuPy).

    Raises
    ------
    OptionError
        For anything else.
    """
    if isinstance(stream, int) and not isinstance(stream, bool) and stream >= 0:
        return stream
    protocol = getattr(stream, "__cuda_stream__", None)
    if protocol is not None:
        found = protocol() if callable(protocol) else protocol
        return int(found[1])
    for name in ("cuda_stream", "ptr"):
        address = getattr(stream, name, None)
        if isinstance(address, int):
            return address
    raise OptionError(
        f"stream is {stream!r}; allowed is the address of a CUDA stream, or an object with "
        f"__cuda_stream__ (torch.cuda.Stream, cupy.cuda.Stream, cuda.core's Stream)"
    )


def refuse_per_thread_stream(stream: int) -> None:
    """Raise OptionError for CUDA's per-thread default stream.

    Its address is 2 in every thread, yet it is another stream in each, so that workspace could not
    be kept apart by address.
    """
    if stream == PER_THREAD_STREAM:
        raise OptionError(
            "the stream is CUDA's per-thread default stream (address 2); make a stream of your own "
            "current, or pass one as stream="
        )


def order_streams(first: int, then: int) -> None:
    """Make stream ``then`` wait for what stream ``first`` has under way; no host wait."""
    if first == then:
        return
    import cupy

    event = cupy.cuda.Event(disable_timing=True)
    event.record(cupy_stream(first))
    cupy_stream(then).wait_event(event)


class _Foreign:
    """A stream by its address, for libraries that know the CUDA stream protocol."""

    def __init__(self, pointer: int) -> None:
        self._pointer = pointer

    def __cuda_stream__(self) -> tuple[int, int]:
        return (0, self._pointer)


def cupy_stream(pointer: int) -> Any:
    """CuPy's view of the stream at ``pointer``; also a context manager that makes it current."""
    import cupy

    if pointer == 0:
        return cupy.cuda.Stream.null
    from_external = getattr(cupy.cuda.Stream, "from_external", None)
    # CuPy before 14 has the older way only.
    if from_external is None:
        return cupy.cuda.ExternalStream(pointer)
    return from_external(_Foreign(pointer))


class on_device:  # noqa: N801  (used like a function, in a with statement)
    """Make a CUDA device current for the time of a with statement; free where it already is."""

    __slots__ = ("_before", "_index")

    def __init__(self, index: int) -> None:
        self._index = index
        self._before = index

    def __enter__(self) -> None:
        self._before = current_device()
        if self._before != self._index:
            set_device(self._index)

    def __exit__(self, *_: object) -> None:
        if self._before != self._index:
            set_device(self._before)


def current_device() -> int:
    """CUDA's number of the calling thread's current device."""
    index: int = cuda_runtime().getDevice()
    return index


def set_device(index: int) -> None:
    """Make a device current in the calling thread."""
    cuda_runtime().setDevice(index)


@functools.cache
def cuda_runtime() -> Any:
    """CuPy's binding of the CUDA runtime."""
    from cupy.cuda import runtime

    return runtime


def checked_out(view: DeviceArray, shape: tuple[int, ...], kind: ArrayType) -> None:
    """Refuse an ``out`` that is not what the result is, or whose elements share memory."""
    if view.shape != shape:
        raise ShapeError(f"out has shape {view.shape}; the result has shape {shape}")
    if view.kind is not kind:
        raise DTypeError(f"out is {view.kind.name}; the result is {kind.name}")
    size = kind.bits // 8
    if overlaps_itself(view.shape, tuple(step * size for step in view.strides), size):
        raise ArrayError(
            f"out has strides {view.strides} (elements) for shape {view.shape}, so that elements "
            f"share memory; pass an array whose elements are distinct"
        )


def same_device(found: Device, plan: Device, what: str) -> None:
    """Raise DeviceError unless ``what`` lies where the plan runs."""
    if found != plan:
        raise DeviceError(
            f"{what} is on {found}, but the plan is on {plan}; move {what}, or make the plan with "
            f"device={str(found)!r}"
        )
