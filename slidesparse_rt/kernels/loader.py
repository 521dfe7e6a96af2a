"""Compiled kernels on a device: the CUDA driver's part.

A :class:`KernelCache` belongs to whoever owns a device's state.  It keeps the device's primary
context, loads each compiled kernel once, and unloads all of them when it is closed.

Launching goes straight to ``cuLaunchKernel`` (see :mod:`slidesparse_rt.kernels.launch`): CuPy's
RawKernel adds several microseconds to each launch, and compiles other code than the tests check.

Source: cuda.h, sections Primary Context Management, Module Management and Occupancy.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from enum import IntEnum
from types import TracebackType
from typing import Any, ClassVar

from ..errors import DeviceMemoryError, LibraryError, PlanClosed
from ..ffi.checked import CLibrary, Function, declare, functions
from ..ffi.libraries import load
from .catalog import KernelSpec
from .compiler import Compiler, Resources, default_directory

__all__ = ["Cuda", "DeviceLimits", "Kernel", "KernelCache", "kernels_of", "relaxed_capture"]

# CUdevice_attribute
_SM_COUNT = 16
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
_SHARED_OPTIN = 97
# CUfunction_attribute
_MAX_DYNAMIC_SHARED = 8
# CUstreamCaptureMode
_RELAXED = 2
#: Addresses that stand for the null stream and the two default streams of the current device.
_DEFAULT_STREAMS = (0, 1, 2)


class CudaStatus(IntEnum):
    """``CUresult``: those that are acted on; the driver names the others."""

    SUCCESS = 0
    ERROR_OUT_OF_MEMORY = 2


class Cuda(CLibrary):
    """The driver functions that loading and launching kernels need."""

    FUNCTIONS: ClassVar[Mapping[str, Function]] = functions(
        declare("cuInit", "flags:u32"),
        declare("cuDriverGetVersion", "version"),
        declare("cuDeviceGet", "device ordinal:int"),
        declare("cuDeviceGetAttribute", "value attribute:int device:int"),
        declare("cuDevicePrimaryCtxRetain", "context device:int"),
        declare("cuDevicePrimaryCtxRelease_v2", "device:int"),
        declare("cuCtxPushCurrent_v2", "context"),
        declare("cuCtxPopCurrent_v2", "context"),
        declare("cuCtxGetDevice", "device"),
        declare("cuStreamGetCtx", "stream context"),
        declare("cuThreadExchangeStreamCaptureMode", "mode"),
        declare("cuModuleLoadData", "module image"),
        declare("cuModuleUnload", "module"),
        declare("cuModuleGetFunction", "function module name"),
        declare("cuFuncSetAttribute", "function attribute:int value:int"),
        declare(
            "cuOccupancyMaxActiveBlocksPerMultiprocessor",
            "blocks function threads:int shared:size",
        ),
        declare(
            "cuLaunchKernel",
            "function grid_x:u32 grid_y:u32 grid_z:u32 block_x:u32 block_y:u32 block_z:u32 "
            "shared:u32 stream arguments extra",
        ),
        declare("cuLaunchKernelEx", "settings function arguments extra"),
        declare("cuStreamCreate", "stream flags:u32"),
        declare("cuStreamDestroy_v2", "stream"),
        declare("cuStreamBeginCapture_v2", "stream mode:int"),
        declare("cuStreamEndCapture", "stream graph"),
        declare("cuGraphInstantiateWithFlags", "executable graph flags:u64"),
        declare("cuGraphLaunch", "executable stream"),
        declare("cuGraphDestroy", "graph"),
        declare("cuGraphExecDestroy", "executable"),
        declare("cuMemsetD8Async", "address value:u32 bytes:size stream"),
        declare(
            "cuTensorMapEncodeTiled",
            "map type:int rank:u32 address sizes strides box steps interleave:int swizzle:int "
            "promotion:int fill:int",
        ),
        declare("cuGetErrorName", "status:int text"),
    )
    STATUS: ClassVar[type[IntEnum]] = CudaStatus
    OUT_OF_MEMORY: ClassVar[int] = CudaStatus.ERROR_OUT_OF_MEMORY

    def error(self, name: str, status: int, arguments: tuple[Any, ...]) -> LibraryError:
        """Return the error for ``status``, with the driver's own name for it."""
        del arguments  # addresses, which say nothing to a reader
        text = ctypes.c_char_p(None)
        self.raw("cuGetErrorName")(status, ctypes.byref(text))
        status_name = (text.value or b"unknown status").decode("ascii", "replace")
        kind = DeviceMemoryError if status == self.OUT_OF_MEMORY else LibraryError
        return kind(
            f"{name} returned {status} ({status_name}) [{self.title}]",
            function=name,
            status=status,
            status_name=status_name,
        )


@dataclass(frozen=True, slots=True)
class DeviceLimits:
    """What launch rules need to know of a GPU.

    Attributes
    ----------
    capability:
        Compute capability, such as ``(9, 0)``.
    sm_count:
        Multiprocessors.
    shared_bytes:
        Most shared memory of one block, in bytes.
    """

    capability: tuple[int, int]
    sm_count: int
    shared_bytes: int


@dataclass(frozen=True, slots=True)
class Kernel:
    """A loaded kernel.

    Attributes
    ----------
    spec:
        What it was compiled from.
    function:
        The driver's handle of it (``CUfunction``); valid until its cache is closed.
    resources:
        Registers and spills.
    """

    spec: KernelSpec
    function: int
    resources: Resources


class KernelCache:
    """The kernels of one device, each compiled and loaded once; safe to share between threads.

    Parameters
    ----------
    device:
        CUDA's number of the device.
    compiler:
        Compiles the kernels; share one between the caches of several devices.
    library:
        The driver; ``None`` is this process's.

    Raises
    ------
    BackendUnavailable
        If there is no driver.
    LibraryError
        If the driver refuses the device.
    """

    def __init__(self, device: int, compiler: Compiler, *, library: Cuda | None = None) -> None:
        self.cuda = Cuda(load("cuda")) if library is None else library
        self.device = device
        self._compiler = compiler
        self._lock = threading.Lock()
        self._modules: dict[str, int] = {}
        self._kernels: dict[tuple[KernelSpec, int], Kernel] = {}
        self.cuda.cuInit(0)
        handle = ctypes.c_int(0)
        self.cuda.cuDeviceGet(ctypes.byref(handle), device)

        def attribute(code: int) -> int:
            value = ctypes.c_int(0)
            self.cuda.cuDeviceGetAttribute(ctypes.byref(value), code, handle.value)
            return value.value

        #: The device's :class:`DeviceLimits`.
        self.limits = DeviceLimits(
            capability=(attribute(_CAPABILITY_MAJOR), attribute(_CAPABILITY_MINOR)),
            sm_count=attribute(_SM_COUNT),
            shared_bytes=attribute(_SHARED_OPTIN),
        )
        context = ctypes.c_void_p(None)
        with relaxed_capture(self.cuda):
            self.cuda.cuDevicePrimaryCtxRetain(ctypes.byref(context), handle.value)
        self._context = context.value
        self._close = weakref.finalize(
            self, _unload, self.cuda, context.value, handle.value, self._modules
        )

    @contextlib.contextmanager
    def current(self) -> Iterator[None]:
        """Make the device current in the calling thread for the duration of a ``with`` block."""
        self._check_open()
        with _pushed(self.cuda, self._context):
            yield

    def load(self, spec: KernelSpec, *, shared_bytes: int = 0) -> Kernel:
        """Return the kernel, compiled and loaded on first use.

        Parameters
        ----------
        spec:
            The kernel.
        shared_bytes:
            Dynamic shared memory, in bytes, that it will be launched with at most.

        Raises
        ------
        CompileError, LibraryError
            If the compiler or the driver refuses it.
        PlanClosed
            After :meth:`close`.
        """
        with self._lock:
            self._check_open()
            found = self._kernels.get((spec, shared_bytes))
            if found is not None:
                return found
            architecture = self._compiler.architecture(self.limits.capability, exact=spec.exact)
            compiled = self._compiler.compile(spec, architecture)
            with relaxed_capture(self.cuda), _pushed(self.cuda, self._context):
                module = self._modules.get(compiled.key)
                if module is None:
                    module = self._handle("cuModuleLoadData", compiled.cubin)
                    self._modules[compiled.key] = module
                function = self._handle("cuModuleGetFunction", module, spec.entry.encode())
                if shared_bytes:
                    # Never lowered: another caller of the same kernel may need more.
                    most = max(
                        shared_bytes,
                        *(held for known, held in self._kernels if known == spec),
                        0,
                    )
                    self.cuda.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, most)
            kernel = Kernel(spec, function, compiled.entries[spec.entry])
            self._kernels[spec, shared_bytes] = kernel
            return kernel

    def compile_ahead(self, specs: Iterable[KernelSpec]) -> None:
        """Compile kernels that :meth:`load` will be asked for side by side.

        Raises BackendUnavailable, CompileError where there is no NVRTC, or none for this GPU.
        """
        capability, compiler = self.limits.capability, self._compiler
        compiler.compile_ahead(
            (spec, compiler.architecture(capability, exact=spec.exact)) for spec in specs
        )

    def occupancy(self, kernel: Kernel, threads: int, shared_bytes: int) -> int:
        """Return how many blocks of ``threads`` run on a multiprocessor at a time."""
        blocks = ctypes.c_int(0)
        with self.current():
            self.cuda.cuOccupancyMaxActiveBlocksPerMultiprocessor(
                ctypes.byref(blocks), kernel.function, threads, shared_bytes
            )
        return blocks.value

    def owns(self, stream: int) -> bool:
        """Whether launches on ``stream`` run in this device's primary context, on all of it.

        False for a stream of a green context, which has a part of the multiprocessors.
        """
        return self._context_of(stream) == self._context

    def device_of_stream(self, stream: int) -> int:
        """Return CUDA's number of the device that a stream belongs to.

        The default streams have no device of their own and count as this one's.
        """
        context = self._context_of(stream)
        if context == self._context:
            return self.device
        # Another device's, or a context that shares this device.
        number = ctypes.c_int(-1)
        with _pushed(self.cuda, context):
            self.cuda.cuCtxGetDevice(ctypes.byref(number))
        return number.value

    def _context_of(self, stream: int) -> int | None:
        """The context of a stream; this device's for the default streams, which have none."""
        if stream in _DEFAULT_STREAMS:
            return self._context
        context = ctypes.c_void_p(None)
        self.cuda.cuStreamGetCtx(stream, ctypes.byref(context))
        return context.value

    def close(self) -> None:
        """Unload the kernels; closing twice is fine.  Nothing may be running any more."""
        with self._lock:
            self._close()

    @property
    def closed(self) -> bool:
        """Whether :meth:`close` was called."""
        return not self._close.alive

    def __enter__(self) -> KernelCache:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _check_open(self) -> None:
        if self.closed:
            raise PlanClosed("the device's kernels were used after close(); make a new KernelCache")

    def _handle(self, function: str, *arguments: Any) -> int:
        handle = ctypes.c_void_p(None)
        call: Callable[..., Any] = getattr(self.cuda, function)
        call(ctypes.byref(handle), *arguments)
        return handle.value or 0


@functools.cache
def _compiler() -> Compiler:
    return Compiler(default_directory())


_LOCK = threading.Lock()


def kernels_of(device: int) -> KernelCache:
    """Return the kernels of a device that all plans of this process share.

    They stay loaded for the life of the process; compiled code is kept in
    :func:`~slidesparse_rt.kernels.compiler.default_directory`.  Errors as :class:`KernelCache`.
    """
    with _LOCK:
        return _shared(device)


@functools.cache
def _shared(device: int) -> KernelCache:
    return KernelCache(device, _compiler())


@functools.cache
def _driver() -> Cuda:
    cuda = Cuda(load("cuda"))
    cuda.cuInit(0)
    return cuda


@contextlib.contextmanager
def relaxed_capture(cuda: Cuda | None = None) -> Iterator[None]:
    """Let the calling thread allocate, load and wait while other threads capture CUDA graphs.

    PyTorch captures in CUDA's global mode, in which an unsafe call of *any* thread (cudaMalloc,
    cudaFree, an event query, a module load) fails and spoils the capture.  Inside this block the
    calling thread is exempt.  It says nothing about streams: work for a stream that is being
    captured must be refused before (CaptureError).

    Parameters
    ----------
    cuda:
        The driver; ``None`` is this process's.

    Notes
    -----
    Source: cuda.h, ``cuThreadExchangeStreamCaptureMode``.  What waits for a whole device or context
    still conflicts with every capture on it.
    """
    if cuda is None:
        cuda = _driver()
    mode = ctypes.c_int(_RELAXED)
    cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))  # mode is the former one from here
    try:
        yield
    finally:
        cuda.cuThreadExchangeStreamCaptureMode(ctypes.byref(mode))


@contextlib.contextmanager
def _pushed(cuda: Cuda, context: int | None) -> Iterator[None]:
    cuda.cuCtxPushCurrent_v2(context)
    try:
        yield
    finally:
        cuda.cuCtxPopCurrent_v2(ctypes.byref(ctypes.c_void_p(None)))


def _unload(cuda: Cuda, context: int | None, device: int, modules: dict[str, int]) -> None:
    """Give the modules and the context back; errors at this point help no one."""
    with contextlib.suppress(LibraryError), relaxed_capture(cuda):
        with _pushed(cuda, context):
            while modules:
                cuda.cuModuleUnload(modules.popitem()[1])
        cuda.cuDevicePrimaryCtxRelease_v2(device)
