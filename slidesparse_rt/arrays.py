"""Array intake and return: any library's array in, the same library's array out.

Host arrays are viewed as NumPy without a copy wherever their library allows it.  No framework is
imported here unless the caller already holds one of its arrays.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any, NoReturn

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .dtypes import OPERANDS, ArrayType, array_type
from .errors import ArrayError, DeviceError, DTypeError, ShapeError

__all__ = [
    "CPU",
    "Device",
    "NDArray",
    "as_matrix",
    "device_of",
    "library_of",
    "library_of_type",
    "refuse_autograd",
    "refuse_shape",
    "to_numpy",
    "wrap_numpy",
    "writable_numpy",
]

NDArray = npt.NDArray[Any]

#: Libraries whose arrays come back as their own kind: (top-level module, class) -> name.
_LIBRARIES = {
    ("numpy", "ndarray"): "numpy",
    ("numpy", "generic"): "numpy",
    ("torch", "Tensor"): "torch",
    ("jax", "Array"): "jax",
    ("jax", "Tracer"): "jax",
    ("jaxlib", "ArrayImpl"): "jax",
    ("cupy", "ndarray"): "cupy",
    ("numba", "DeviceNDArrayBase"): "numba",
    ("numba_cuda", "DeviceNDArrayBase"): "numba",
}
#: Steps after which the exact search for a common element gives up.
_OVERLAP_WORK = 100_000
# DLPack device types (dlpack.h): plain, pinned and managed memory.
_DLPACK_CPU = (1, 3)
_DLPACK_CUDA = (2, 13)


@dataclass(frozen=True, slots=True)
class Device:
    """A place where arrays live: ``Device("cpu", 0)`` or ``Device("cuda", index)``."""

    kind: str
    index: int = 0

    @classmethod
    def parse(cls, spec: object) -> Device:
        """Return the device for ``"cpu"``, ``"cuda"``, ``"cuda:1"``, an index, or ``torch.device``.

        Raises DeviceError for anything else.
        """
        if isinstance(spec, Device):
            return spec
        if isinstance(spec, int) and not isinstance(spec, bool) and spec >= 0:
            return cls("cuda", spec)
        found = re.fullmatch(r"(cpu|cuda)(?::(\d{1,4}))?", str(spec))
        if found is None:
            raise DeviceError(
                f"device {spec!r} is unknown; allowed are 'cpu', 'cuda', 'cuda:<index>'"
            )
        return cls(found[1], int(found[2] or 0) if found[1] == "cuda" else 0)

    def __str__(self) -> str:
        return "cpu" if self.kind == "cpu" else f"cuda:{self.index}"


CPU = Device("cpu")


def library_of(array: object) -> str:
    """Name of the library that ``array`` belongs to: "numpy", "torch", "jax", "cupy", "numba",
    or "dlpack" for any other object with ``__dlpack__``.

    Raises ArrayError for an object that is no array.
    """
    library = library_of_type(type(array))  # type: ignore[arg-type]  # types are hashable
    if library is not None:
        return library
    if hasattr(array, "__dlpack__"):
        return "dlpack"
    raise ArrayError(
        f"{type(array).__name__} is no array; pass a NumPy, PyTorch, JAX or CuPy array (or any "
        f"object with __dlpack__), for example numpy.asarray(..., dtype=numpy.float32)"
    )


@functools.lru_cache(maxsize=256)
def library_of_type(kind: type) -> str | None:
    """Name of the library that a type of array belongs to, or ``None``."""
    for base in kind.__mro__:
        library = _LIBRARIES.get((base.__module__.partition(".")[0], base.__name__))
        if library is not None:
            return library
    return None


def device_of(array: Any, what: str = "array") -> Device:
    """The device that holds ``array``; DeviceError for devices other than CPU and CUDA."""
    library = library_of(array)
    if library == "numpy":
        return CPU
    if library == "torch":
        kind = array.device.type
        if kind not in ("cpu", "cuda"):
            raise DeviceError(f"{what} is on torch device {kind!r}; allowed are cpu and cuda")
        return Device(kind, array.device.index or 0)
    if library == "jax":
        _refuse_tracer(array, what)
        if getattr(array, "is_deleted", bool)():
            raise ArrayError(f"{what} is a deleted (or donated) JAX array; pass one that is alive")
        devices = array.devices()
        if len(devices) != 1:
            raise DeviceError(
                f"{what} is spread over {len(devices)} JAX devices; gather it on one first"
            )
        (device,) = devices
        if device.platform == "cpu":
            return CPU
        if device.platform in ("gpu", "cuda"):
            return Device("cuda", int(device.local_hardware_id or 0))
        raise DeviceError(f"{what} is on JAX platform {device.platform!r}; allowed are cpu and gpu")
    if library == "cupy":
        return Device("cuda", int(array.device.id))
    if library == "numba":
        # Numba has device arrays only; its CPU arrays are NumPy's.
        return Device("cuda", int(array.gpu_data.context.device.id))
    kind_code, index = array.__dlpack_device__()
    if kind_code in _DLPACK_CPU:
        return CPU
    if kind_code in _DLPACK_CUDA:
        return Device("cuda", int(index))
    raise DeviceError(f"{what} is on DLPack device type {int(kind_code)}; allowed are CPU and CUDA")


def to_numpy(array: Any, what: str = "array", *, quantized: bool = False) -> NDArray:
    """View a host array as NumPy, sharing memory wherever its library allows.

    Parameters
    ----------
    array:
        A NumPy, PyTorch or JAX array on the CPU, or any CPU object with ``__dlpack__``; float32,
        float16 or bfloat16; any strides.
    what:
        The name by which error messages call it.
    quantized:
        Whether int8 and float8_e4m3fn are taken as well.

    Raises
    ------
    ArrayError
        For objects that are no plain arrays (lists, masked arrays, sparse tensors, tracers).
    DTypeError
        For other data types.
    DeviceError
        For arrays that are not on the CPU.
    """
    library = library_of(array)
    device = device_of(array, what)
    if device.kind != "cpu":
        raise DeviceError(
            f"{what} is on {device}, but a CPU array is needed; move it to the CPU first"
        )
    if library == "numpy":
        view = _numpy_view(array, what)
    elif library == "torch":
        view = _torch_view(array, what, quantized)
    elif library == "jax":
        _check_type(array.dtype, what, quantized)
        view = np.asarray(array)
    else:
        try:
            view = np.from_dlpack(array)
        except (BufferError, RuntimeError, ValueError, TypeError) as error:
            raise ArrayError(
                f"{what} of type {type(array).__name__} could not be read through DLPack: {error}"
            ) from error
    _check_type(view.dtype, what, quantized)
    return view


def as_matrix(array: Any, what: str, axes: str, *, quantized: bool = False) -> NDArray:
    """:func:`to_numpy` for a two-dimensional, non-empty array; ``axes`` names them in errors."""
    view = to_numpy(array, what, quantized=quantized)
    refuse_shape(view.shape, what, axes)
    return view


def refuse_shape(shape: tuple[int, ...], what: str, axes: str) -> None:
    """Raise ShapeError unless ``shape`` is that of a matrix that is not empty."""
    if len(shape) != 2:
        raise ShapeError(f"{what} has {len(shape)} dimensions, shape {shape}; allowed is 2, {axes}")
    if 0 in shape:
        raise ShapeError(f"{what} is empty, shape {shape}; each extent of {axes} is at least 1")


def wrap_numpy(values: NDArray, like: Any) -> Any:
    """Return ``values`` as the kind of array that ``like`` is, sharing memory where possible.

    ``values`` must not be written afterwards.  Objects known only through DLPack get NumPy back.
    """
    library = library_of(like)
    if library == "torch":
        import torch

        if values.dtype == ml_dtypes.bfloat16:
            return torch.from_numpy(values.view(np.int16)).view(torch.bfloat16)
        if values.dtype == ml_dtypes.float8_e4m3fn:
            return torch.from_numpy(values.view(np.uint8)).view(torch.float8_e4m3fn)
        return torch.from_numpy(values)
    if library == "jax":
        import jax

        (device,) = like.devices()
        return jax.device_put(values, device)
    return values


def writable_numpy(out: Any, shape: tuple[int, ...], dtype: ArrayType, x: NDArray) -> NDArray:
    """View the caller's ``out`` as a NumPy array to write into, after checking that it can be one.

    Raises
    ------
    ArrayError
        If ``out`` is immutable, read-only, overlaps itself, or shares memory with ``x``.
    ShapeError, DTypeError, DeviceError
        If it has another shape, type or device than the result.
    """
    if library_of(out) == "jax":
        raise ArrayError("out is a JAX array, which is immutable; omit out= and take the result")
    view = to_numpy(out, "out")
    _refuse_copy(out)
    if view.shape != shape:
        raise ShapeError(f"out has shape {view.shape}; the result has shape {shape}")
    if view.dtype != dtype.dtype:
        raise DTypeError(f"out is {view.dtype.name}; the result is {dtype.name}")
    if not view.flags.writeable:
        raise ArrayError("out is read-only; pass a writable array")
    if overlaps_itself(view.shape, view.strides, view.itemsize):
        raise ArrayError(
            f"out has strides {view.strides} (bytes) for shape {view.shape}, so that elements "
            f"share memory; pass an array whose elements are distinct"
        )
    if _share_memory(view, x):
        raise ArrayError("out shares memory with x; pass an out of its own")
    return view


def refuse_out_gradient() -> NoReturn:
    """Raise ArrayError for an ``out`` that requires a gradient."""
    raise ArrayError("out requires a gradient, and this product has none; pass out.detach()")


def _refuse_copy(out: Any) -> None:
    """Raise where NumPy's view is not the caller's memory, or where autograd would not notice."""
    library = library_of(out)
    if library == "numpy" and not np.asarray(out).dtype.isnative:
        raise DTypeError(
            f"out has byte order {out.dtype.byteorder!r}; allowed is this machine's own"
        )
    if library == "torch":
        if out.requires_grad:
            refuse_out_gradient()
        if out.is_neg():
            raise ArrayError("out is a lazily negated view; pass out.resolve_neg()")


def _share_memory(left: NDArray, right: NDArray) -> bool:
    """Whether two arrays have an element in common; when that is hard to tell, "yes"."""
    try:
        return bool(np.shares_memory(left, right, max_work=_OVERLAP_WORK))  # type: ignore[arg-type]
    except np.exceptions.TooHardError:
        return True


def refuse_autograd(x: Any) -> None:
    """Raise ArrayError for a torch tensor whose gradient somebody waits for."""
    if library_of(x) == "torch" and x.requires_grad:
        import torch

        if torch.is_grad_enabled():
            raise ArrayError(
                "x requires a gradient, and this product has none; call it under torch.no_grad() "
                "or pass x.detach()"
            )


def overlaps_itself(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether two elements of a strided array may share memory (sufficient test, in bytes)."""
    if 0 in shape:
        return False
    reach = itemsize
    for stride, extent in sorted(
        (abs(stride), extent) for stride, extent in zip(strides, shape, strict=True) if extent > 1
    ):
        if stride < reach:
            return True
        reach = stride * (extent - 1) + reach
    return False


def _numpy_view(array: Any, what: str) -> NDArray:
    if isinstance(array, np.ma.MaskedArray):
        raise ArrayError(
            f"{what} is a masked array, and its mask would be lost; fill it first: {what}.filled(0)"
        )
    view = np.asarray(array)
    if not view.dtype.isnative:
        view = view.astype(view.dtype.newbyteorder("="))
    return view


def _torch_view(tensor: Any, what: str, quantized: bool) -> NDArray:
    import torch

    if tensor.layout != torch.strided:
        raise ArrayError(
            f"{what} is a torch tensor of layout {tensor.layout}; pass a dense one: "
            f"{what}.to_dense()"
        )
    _check_type(tensor.dtype, what, quantized)
    try:
        plain = tensor.detach().resolve_neg()
        if plain.dtype == torch.bfloat16:
            view: NDArray = plain.view(torch.int16).numpy()
            return view.view(ml_dtypes.bfloat16)
        if plain.dtype == torch.float8_e4m3fn:
            return np.asarray(plain.view(torch.uint8).numpy()).view(ml_dtypes.float8_e4m3fn)
        return np.asarray(plain.numpy())
    except (RuntimeError, TypeError) as error:
        raise ArrayError(
            f"{what} of type {type(tensor).__name__} has no memory that could be read ({error}); "
            f"pass a plain tensor"
        ) from error


def _refuse_tracer(array: Any, what: str) -> None:
    import jax

    if isinstance(array, jax.core.Tracer):
        raise ArrayError(
            f"{what} is a JAX tracer: this function runs eagerly and cannot be traced by jax.jit "
            f"or jax.grad; call it outside the traced function, or through jax.pure_callback"
        )


def _check_type(dtype: object, what: str, quantized: bool) -> None:
    name = str(dtype).rsplit(".", 1)[-1]
    if quantized and any(row.scaled and row.dtype.name == name for row in OPERANDS):
        return
    try:
        array_type(dtype)
    except DTypeError as error:
        raise DTypeError(f"{what} has dtype {error}") from None
