"""Plans as a custom call of XLA: a handler of its typed foreign function interface.

Such handlers are C functions.  This one is made by ctypes, so nothing has to be compiled: XLA calls
it with the addresses of its buffers and its stream, and it runs a plan on them in place.

Source: ``xla/ffi/api/c_api.h``, which jaxlib ships under ``jax.ffi.include_dir()``; versions 0.1 to
0.3, which lay out what is read here alike.
"""

from __future__ import annotations

import ctypes
import itertools
import re
import threading
import weakref
from ctypes import POINTER, Structure, c_char_p, c_int, c_int64, c_size_t, c_void_p
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from ..errors import DeviceError, PlanClosed
from ..plan import SparseGemmPlan
from .require import require

jax = require("jax", "jax", (0, 5))

__all__ = ["TARGET", "handle_of", "register", "supported"]

#: The custom call's name.
TARGET = "slidesparse_linear"
#: (major, oldest minor, newest minor) version of the interface that the structures below are of.
#: Newer minor versions only add to them, and XLA refuses at once what it no longer understands.
_VERSIONS = (0, 1, 5)
#: XLA_FFI_DataType -> NumPy.
_TYPES: dict[int, np.dtype[Any]] = {
    10: np.dtype(np.float16),
    11: np.dtype(np.float32),
    16: np.dtype(ml_dtypes.bfloat16),
}
_METADATA, _EXECUTE, _SCALAR = 1, 3, 3
_INTERNAL = 13  # XLA_FFI_Error_Code


class _Extension(Structure):
    _fields_ = (("struct_size", c_size_t), ("type", c_int), ("next", c_void_p))


class _Version(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("major", c_int),
        ("minor", c_int),
    )


class _Metadata(Structure):
    # A type id follows from 0.2 on; zero, as it comes, says that there is no state.
    _fields_ = (("struct_size", c_size_t), ("version", _Version), ("traits", ctypes.c_uint32))


class _MetadataExtension(Structure):
    _fields_ = (("base", _Extension), ("metadata", POINTER(_Metadata)))


class _Api(Structure):
    # Of 18 functions those that are called here have a name.
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("version", _Version),
        ("internal", c_void_p),
        ("error_create", c_void_p),
        ("error_get_message", c_void_p),
        ("error_destroy", c_void_p),
        ("handler_register", c_void_p),
        ("stream_get", c_void_p),
    )


class _Buffer(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("dtype", c_int),
        ("data", c_void_p),
        ("rank", c_int64),
        ("dims", POINTER(c_int64)),
    )


class _Buffers(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("items", POINTER(POINTER(_Buffer))),
    )


class _Scalar(Structure):
    _fields_ = (("dtype", c_int), ("value", POINTER(c_int64)))


class _Attributes(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("size", c_int64),
        ("types", POINTER(c_int)),
        ("names", c_void_p),
        ("items", POINTER(POINTER(_Scalar))),
    )


class _CallFrame(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", POINTER(_Extension)),
        ("api", POINTER(_Api)),
        ("context", c_void_p),
        ("stage", c_int),
        ("arguments", _Buffers),
        ("results", _Buffers),
        ("attributes", _Attributes),
    )


class _ErrorCreate(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("message", c_char_p),
        ("code", c_int),
    )


class _ErrorDestroy(Structure):
    _fields_ = (("struct_size", c_size_t), ("extension", c_void_p), ("error", c_void_p))


class _StreamGet(Structure):
    _fields_ = (
        ("struct_size", c_size_t),
        ("extension", c_void_p),
        ("context", c_void_p),
        ("stream", c_void_p),
    )


#: A function of the interface, and a handler: one pointer in, an error or null out.
_FUNCTION = ctypes.CFUNCTYPE(c_void_p, c_void_p)
# ctypes takes an int for it as well, which is what a handler returns.
_HANDLER = ctypes.CFUNCTYPE(c_void_p, POINTER(_CallFrame))

_LOCK = threading.Lock()
_NUMBERS = itertools.count(1)
#: Plans by the number that stands in the compiled program.  They belong to whoever made them.
_PLANS: weakref.WeakValueDictionary[int, SparseGemmPlan] = weakref.WeakValueDictionary()
_HANDLES: weakref.WeakKeyDictionary[SparseGemmPlan, int] = weakref.WeakKeyDictionary()
#: Whether the handlers are registered; XLA keeps their addresses for the life of the process.
_REGISTERED: list[Any] = []


def handle_of(plan: SparseGemmPlan) -> int:
    """The number by which compiled programs name ``plan``; it does not keep the plan alive."""
    with _LOCK:
        found = _HANDLES.get(plan)
        if found is None:
            found = _HANDLES[plan] = next(_NUMBERS)
            _PLANS[found] = plan
        return found


def supported() -> tuple[bool, str]:
    """Whether this jaxlib's interface can be used; if not, why."""
    path = Path(jax.ffi.include_dir(), "xla", "ffi", "api", "c_api.h")
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        return False, f"jaxlib's description of its interface cannot be read: {error}"
    found = [
        int(match[1]) if (match := re.search(rf"define XLA_FFI_API_{part} (\d+)", text)) else -1
        for part in ("MAJOR", "MINOR")
    ]
    major, oldest, _ = _VERSIONS
    if found[0] == major and found[1] >= oldest:
        return True, ""
    return False, (
        f"jaxlib's foreign function interface has version {found[0]}.{found[1]}; allowed is "
        f"{major}.{oldest} or a later {major}"
    )


def register() -> None:
    """Tell XLA about the handlers, once a process."""
    with _LOCK:
        if not _REGISTERED:
            for platform, run in (("cpu", _run_on_cpu), ("CUDA", _run_on_gpu)):
                handler = _HANDLER(_guarded(run))
                jax.ffi.register_ffi_target(TARGET, jax.ffi.pycapsule(handler), platform=platform)
                _REGISTERED.append(handler)


def _guarded(run: Any) -> Any:
    """A handler: answers what XLA asks about it, and turns exceptions into XLA's errors."""

    def handler(pointer: Any) -> int | None:
        frame = pointer.contents
        try:
            extension = frame.extension
            if extension and extension.contents.type == _METADATA:
                _describe(frame)
            elif frame.stage == _EXECUTE:
                run(frame)
        except BaseException as error:  # nothing may pass into XLA
            return _error(frame, f"{type(error).__name__}: {error}")
        return None

    return handler


def _describe(frame: Any) -> None:
    """The version that these structures are of: XLA refuses ones that it does not know."""
    about = ctypes.cast(frame.extension, POINTER(_MetadataExtension)).contents.metadata.contents
    major, _, newest = _VERSIONS
    running = frame.api.contents.version
    about.version = _Version(
        ctypes.sizeof(_Version),
        None,
        major,
        min(newest, running.minor) if running.major == major else newest,
    )
    # Launches through libraries are not promised to be the same each time: no command buffers.
    about.traits = 0


def _error(frame: Any, message: str) -> int | None:
    request = _ErrorCreate(
        ctypes.sizeof(_ErrorCreate), None, message.encode("utf-8", "replace"), _INTERNAL
    )
    made = _FUNCTION(frame.api.contents.error_create)(ctypes.addressof(request))
    return None if made is None else int(made)


def _call(frame: Any) -> tuple[SparseGemmPlan, Any, Any]:
    """The plan, and the buffers of x and of the result."""
    attributes = frame.attributes
    sizes = (frame.arguments.size, frame.results.size, attributes.size)
    if sizes != (1, 1, 1) or attributes.types[0] != _SCALAR:
        raise TypeError(f"{TARGET} takes one array and a plan, and has one result; found {sizes}")
    plan = _PLANS.get(attributes.items[0].contents.value[0])
    if plan is None:
        raise PlanClosed(
            "the plan that this program was compiled with is gone; keep a reference to it as long "
            "as the program runs"
        )
    return plan, frame.arguments.items[0].contents, frame.results.items[0].contents


def _shape(buffer: Any) -> tuple[int, ...]:
    return tuple(buffer.dims[: buffer.rank])


def _run_on_cpu(frame: Any) -> None:
    plan, x, out = _call(frame)
    _refuse_device(plan, "cpu")
    target = _host_array(out)
    if target.size:
        plan.run(_host_array(x), out=target)


def _host_array(buffer: Any) -> Any:
    shape, dtype = _shape(buffer), _TYPES[buffer.dtype]
    size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if not size:
        return np.empty(shape, dtype)
    memory = (ctypes.c_char * size).from_address(buffer.data)
    return np.frombuffer(memoryview(memory), dtype).reshape(shape)


def _run_on_gpu(frame: Any) -> None:
    import cupy

    from ..device_arrays import cupy_stream, on_device

    plan, x, out = _call(frame)
    _refuse_device(plan, "cuda")
    request = _StreamGet(ctypes.sizeof(_StreamGet), None, frame.context, None)
    failed = _FUNCTION(frame.api.contents.stream_get)(ctypes.addressof(request))
    if failed is not None:
        destroy = _ErrorDestroy(ctypes.sizeof(_ErrorDestroy), None, failed)
        _FUNCTION(frame.api.contents.error_destroy)(ctypes.addressof(destroy))
        raise DeviceError("XLA has no CUDA stream for this call")
    index = int(plan.device.partition(":")[2] or 0)

    def view(buffer: Any) -> Any:
        shape, dtype = _shape(buffer), _TYPES[buffer.dtype]
        size = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        # XLA owns the memory, and keeps it until its stream is past this call.
        memory = cupy.cuda.UnownedMemory(buffer.data, size, frame, index)
        return cupy.ndarray(shape, dtype, cupy.cuda.MemoryPointer(memory, 0))

    if 0 in _shape(out):
        return
    with on_device(index), cupy_stream(int(request.stream or 0)):
        plan.run(view(x), out=view(out))


def _refuse_device(plan: SparseGemmPlan, kind: str) -> None:
    if plan.device.partition(":")[0] != kind:
        raise DeviceError(
            f"the program runs on {kind}, but the plan is on {plan.device}; make the plan with "
            f"device={kind!r}, or put x where the plan is"
        )
