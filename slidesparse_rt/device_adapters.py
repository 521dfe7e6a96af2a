"""What each library does with arrays in GPU memory: how they are read, made and shared.

One adapter per library.  Reading an array costs a few attribute look-ups; nothing is copied, and
arrays that would need a copy are refused.

Ordering follows the DLPack protocol: before ``stream`` reads an array, it waits for the work that
the array's library has under way on its own current stream.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arrays import Device, NDArray, device_of, library_of, library_of_type
from .device_arrays import DeviceArray, cupy_stream, on_device, order_streams
from .dtypes import ARRAY_TYPES, ArrayType, array_type
from .errors import ArrayError, DTypeError

__all__ = ["Adapter", "adapter_of", "to_cupy", "to_host"]


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
