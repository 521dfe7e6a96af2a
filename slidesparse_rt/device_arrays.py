"""Arrays in GPU memory: how each library's are read, made, and ordered on streams.

One adapter per library.  Reading an array costs a few attribute look-ups; nothing is copied, and
arrays that would need a copy are refused.  CuPy is the one GPU package that is always there.

Ordering follows the DLPack protocol: before ``stream`` reads an array, it waits for the work that
the array's library has under way on its own current stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from .arrays import Device, NDArray, device_of, library_of, library_of_type, overlaps_itself
from .dtypes import ARRAY_TYPES, ArrayType, array_type
from .errors import ArrayError, DeviceError, DTypeError, OptionError, ShapeError

__all__ = [
    "PER_THREAD_STREAM",
    "Adapter",
    "DeviceArray",
    "adapter_of",
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
    "to_cupy",
    "to_host",
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


@dataclass(frozen=True, slots=True)
class Adapter:
    """What one library does with GPU arrays.

    Attributes
    ----------
    view:
        (array, what it is called, stream) -> DeviceArray; makes ``stream`` wait as the protocol
        asks, where the library itself has to do that.
    maker:
        (shape, type, device, stream) -> what makes such arrays, a new one at each call, its content
        undefined, from the library's own allocator.  With a :attr:`signature`: for any stream.
    current_stream:
        CUDA's number of a device -> address of the library's current stream there.
    share:
        (array, stream): tells the library's allocator that ``stream`` uses the array too.
    finish:
        What :attr:`maker` made -> what the caller gets, once the work on it is launched; ``None``
        where that is the same.
    writable:
        Whether the library's arrays may be written.
    signature:
        Array, or two -> everything about them but their addresses, hashable and cheap: equal
        signatures are read alike.  ``None`` where reading an array is more than looking (it may
        order streams).
    pointer:
        Array -> its address; goes with :attr:`signature`.
    """

    view: Callable[[Any, str, int], DeviceArray]
    maker: Callable[[tuple[int, ...], ArrayType, Device, int], Callable[[], Any]]
    current_stream: Callable[[int], int]
    share: Callable[[Any, int, Device], None]
    finish: Callable[[Any, int], Any] | None = None
    writable: bool = True
    signature: Callable[..., Hashable] | None = None
    pointer: Callable[[Any], int] | None = None


def adapter_of(array: Any) -> Adapter:
    """The adapter for ``array``'s library; ArrayError for an object that is no array."""
    found = _adapter_for(type(array))  # type: ignore[arg-type]  # types are hashable
    return found or _adapter(library_of(array))


@functools.lru_cache(maxsize=256)
def _adapter_for(kind: type) -> Adapter | None:
    """The adapter for all arrays of a type, where the type alone decides."""
    library = library_of_type(kind)
    return None if library is None else _adapter(library)


@functools.cache
def _adapter(library: str) -> Adapter:
    makers = {"torch": _torch_adapter, "jax": _jax_adapter, "numba": _numba_adapter}
    return makers.get(library, _cupy_adapter)()


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


def _unknown_type(dtype: object, what: str) -> DTypeError:
    allowed = ", ".join(row.name for row in ARRAY_TYPES)
    return DTypeError(f"{what} has dtype {dtype}; allowed are {allowed}; convert it first")


def _torch_adapter() -> Adapter:
    import torch

    types = {getattr(torch, row.name): row for row in ARRAY_TYPES}
    dtypes = {row.name: getattr(torch, row.name) for row in ARRAY_TYPES}
    devices = functools.cache(lambda index: torch.device("cuda", index))

    def view(tensor: Any, what: str, stream: int) -> DeviceArray:
        del stream
        kind = types.get(tensor.dtype)
        if kind is None:
            raise _unknown_type(tensor.dtype, what)
        if tensor.layout is not torch.strided or tensor.is_neg():
            raise ArrayError(
                f"{what} is no plain dense tensor; call {what}.to_dense().resolve_neg()"
            )
        return DeviceArray(tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), kind)

    def maker(
        shape: tuple[int, ...], kind: ArrayType, device: Device, stream: int
    ) -> Callable[[], Any]:
        del stream
        # With strides: what torch.empty() looks up besides takes it half as long again.
        return functools.partial(
            torch.empty_strided,
            shape,
            _contiguous(shape),
            dtype=dtypes[kind.name],
            device=devices(device.index),
        )

    def current_stream(index: int) -> int:
        return int(torch.cuda.current_stream(index).cuda_stream)

    # The same address without making a Stream object, where PyTorch has it.
    raw: Any = getattr(torch._C, "_cuda_getCurrentRawStream", None)

    def share(tensor: Any, stream: int, device: Device) -> None:
        tensor.record_stream(torch.cuda.ExternalStream(stream, device=devices(device.index)))

    strided = torch.strided

    def signature(x: Any, y: Any = None) -> Hashable:
        if x.layout is not strided or (y is not None and y.layout is not strided):
            layout = y.layout if x.layout is strided else x.layout
            raise ArrayError(
                f"a torch tensor of layout {layout} is no plain dense one; call .to_dense()"
            )
        # Numbers where there are some: a torch.device takes longer to compare.
        if y is None:
            return x.dtype, x.shape, x.stride(), x.is_cuda, x.get_device(), x.is_neg()
        return (
            x.dtype,
            x.shape,
            x.stride(),
            x.is_cuda,
            x.get_device(),
            x.is_neg(),
            y.dtype,
            y.shape,
            y.stride(),
            y.is_cuda,
            y.get_device(),
            y.is_neg(),
        )

    return Adapter(
        view,
        maker,
        raw or current_stream,
        share,
        signature=signature,
        pointer=torch.Tensor.data_ptr,
    )


def _cupy_adapter() -> Adapter:
    """CuPy's own arrays, and any other object with ``__dlpack__``, which comes back as CuPy's."""
    import cupy

    def view(array: Any, what: str, stream: int) -> DeviceArray:
        if isinstance(array, cupy.ndarray):
            return _cupy_view(array, what)
        # The exporter may reuse the memory as soon as this import of it is gone.
        imported = _through_dlpack(array, what, stream)
        return _cupy_view(imported, what)._replace(owner=imported)

    def maker(
        shape: tuple[int, ...], kind: ArrayType, device: Device, stream: int
    ) -> Callable[[], Any]:
        del device  # the plan has made it current

        def make() -> Any:
            with cupy_stream(stream):
                return cupy.empty(shape, kind.dtype)

        return make

    def current_stream(index: int) -> int:
        return int(cupy.cuda.get_current_stream(index).ptr)

    def share(array: Any, stream: int, device: Device) -> None:
        """CuPy's pools are per stream; the caller keeps the array until its stream is done."""

    return Adapter(view, maker, current_stream, share)


def _jax_adapter() -> Adapter:
    """JAX arrays come in and go out through DLPack: JAX has no public way to write its buffers."""
    import jax

    base = _cupy_adapter()

    def finish(array: Any, stream: int) -> Any:
        # JAX asks CuPy to order its own stream after CuPy's current one.
        with cupy_stream(stream):
            return jax.dlpack.from_dlpack(array)

    return Adapter(base.view, base.maker, base.current_stream, base.share, finish, writable=False)


def _numba_adapter() -> Adapter:
    from numba import cuda

    base = _cupy_adapter()

    def view(array: Any, what: str, stream: int) -> DeviceArray:
        interface = array.__cuda_array_interface__
        kind = _checked(np.dtype(interface["typestr"]), what)
        shape = tuple(interface["shape"])
        size = kind.bits // 8
        steps = interface.get("strides")
        strides = (
            _contiguous(shape) if steps is None else tuple(int(step) // size for step in steps)
        )
        producer = interface.get("stream")
        if producer is not None:
            order_streams(int(producer), stream)
        return DeviceArray(int(interface["data"][0]), shape, strides, kind)

    def maker(
        shape: tuple[int, ...], kind: ArrayType, device: Device, stream: int
    ) -> Callable[[], Any]:
        del device, stream
        return functools.partial(cuda.device_array, shape, kind.dtype)

    return Adapter(view, maker, base.current_stream, base.share)


@functools.lru_cache(maxsize=256)
def _contiguous(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides, in elements, of a row-major array."""
    strides = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        strides[axis - 1] = strides[axis] * max(1, shape[axis])
    return tuple(strides)


def _cupy_view(array: Any, what: str) -> DeviceArray:
    kind = _checked(array.dtype, what)
    size = kind.bits // 8
    return DeviceArray(
        int(array.data.ptr),
        tuple(array.shape),
        tuple(step // size for step in array.strides),
        kind,
    )


def _checked(dtype: Any, what: str) -> ArrayType:
    try:
        return array_type(dtype)
    except DTypeError:
        raise _unknown_type(dtype, what) from None


def to_cupy(array: Any, what: str) -> Any:
    """CuPy's view of a GPU array that is known only through DLPack."""
    index = device_of(array, what).index
    with on_device(index):
        return _through_dlpack(array, what, _adapter("cupy").current_stream(index))


def _through_dlpack(array: Any, what: str, stream: int) -> Any:
    import cupy

    try:
        with cupy_stream(stream):
            return cupy.from_dlpack(array)
    except (BufferError, RuntimeError, ValueError, TypeError) as error:
        raise ArrayError(
            f"{what} of type {type(array).__name__} could not be read through DLPack: {error}"
        ) from error


def to_host(array: Any, what: str) -> NDArray:
    """Copy a small GPU array (a bias, norms) to the host; waits until it is there.

    Raises ArrayError unless it is one contiguous vector, and the adapter's errors.
    """
    import cupy

    adapter, device = adapter_of(array), device_of(array, what)
    with on_device(device.index):
        stream = adapter.current_stream(device.index)
        view = adapter.view(array, what, stream)
        if len(view.shape) != 1 or (view.shape[0] > 1 and view.strides[0] != 1):
            raise ArrayError(
                f"{what} has shape {view.shape} and strides {view.strides} (elements); allowed on "
                f"a GPU is one contiguous vector"
            )
        values = np.empty(view.shape, view.kind.dtype)
        runtime = cupy.cuda.runtime
        runtime.memcpyAsync(values.ctypes.data, view.pointer, values.nbytes, 2, stream)
        runtime.streamSynchronize(stream)
    return values


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
