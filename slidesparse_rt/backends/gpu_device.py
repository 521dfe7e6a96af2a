"""One CUDA device: its properties, its memory, and what is shared by all plans on it."""

from __future__ import annotations

import contextlib
import functools
import sys
import threading
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import numpy as np

from ..device_arrays import cuda_runtime, on_device
from ..dtypes import Operand
from ..errors import DeviceMemoryError, LibraryError
from ..ffi.driver import driver_release
from ..kernels.loader import relaxed_capture
from ..packing.quantize import quantize_tokens

__all__ = ["Buffer", "GpuDevice", "cuda_errors", "gpu_device", "is_capturing", "working_on"]

#: cudaErrorMemoryAllocation
_OUT_OF_MEMORY = 2


@contextlib.contextmanager
def working_on(index: int) -> Iterator[None]:
    """Make a device current for what allocates, frees, searches, loads or waits.

    Whatever of this package does one of these outside a launch does it in here, so that it leaves
    the CUDA graphs that other threads are capturing alone.
    """
    with on_device(index), relaxed_capture():
        yield


@contextlib.contextmanager
def cuda_errors(what: str, function: str = "") -> Iterator[None]:
    """Raise CuPy's errors as LibraryError, or DeviceMemoryError; ``what`` is what failed."""
    import cupy

    try:
        yield
    except cupy.cuda.runtime.CUDARuntimeError as error:
        kind = DeviceMemoryError if error.status == _OUT_OF_MEMORY else LibraryError
        raise kind(
            f"{what} failed: {error}", function=function, status=int(error.status)
        ) from error


class Buffer:
    """Device memory from cudaMalloc, 256-byte aligned; freed by :meth:`close` or when collected.

    cudaFree waits for the device, so work that still uses the memory finishes first.

    Parameters
    ----------
    memory:
        What frees the memory when it is dropped; nobody else refers to it.
    nbytes:
        Its size.
    device:
        CUDA's number of the device it is on.
    """

    __slots__ = ("_device", "_memory", "nbytes", "pointer")

    def __init__(self, memory: Any, nbytes: int, device: int) -> None:
        self._memory = memory
        self._device = device
        self.pointer = int(memory.ptr)
        self.nbytes = nbytes

    def close(self) -> None:
        """Free the memory; closing twice is allowed."""
        if self._memory is not None:
            with working_on(self._device):
                self._memory = None
        self.pointer = 0
        self.nbytes = 0

    def __del__(self, is_finalizing: Callable[[], bool] = sys.is_finalizing) -> None:
        # The garbage collector comes at any time, also while a graph is being captured.  At the end
        # of the process the driver frees everything.
        if not is_finalizing():
            self.close()

    def __enter__(self) -> Buffer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class GpuDevice:
    """A CUDA device and what its plans share; get it from :func:`gpu_device`.

    Attributes
    ----------
    index:
        CUDA's device number.
    name:
        The product's name.
    capability:
        Compute capability, such as (9, 0).
    lock:
        Guards :attr:`choices`.
    choices:
        What a search or measurement chose, by problem: shared, so that equal layers of a model are
        searched once.
    measuring:
        Held by whoever measures backends against each other: two would disturb each other.
    """

    def __init__(self, index: int) -> None:
        import cupy

        self.index = index
        self._cupy = cupy
        with working_on(index):
            properties = cupy.cuda.runtime.getDeviceProperties(index)
            self._stream = cupy.cuda.Stream(non_blocking=True)
        self.name: str = properties["name"].decode()
        self.capability: tuple[int, int] = (properties["major"], properties["minor"])
        version, release = str(cupy.cuda.runtime.driverGetVersion()), driver_release()
        #: The newest CUDA that the driver runs, and its release where the system tells it.
        self.driver_version = version if release is None else f"{version}, {release}"
        self.sm_count: int = properties["multiProcessorCount"]
        self.memory_bytes: int = properties["totalGlobalMem"]
        #: Bytes of the level-2 cache.
        self.l2_bytes: int = properties["l2CacheSize"]
        self.lock, self.measuring = threading.Lock(), threading.Lock()
        self.choices: dict[tuple[object, ...], Any] = {}

    @property
    def packing_stream(self) -> int:
        """The stream on which weights are prepared."""
        return int(self._stream.ptr)

    def allocate(self, nbytes: int) -> Buffer:
        """Allocate ``nbytes`` (at least 16); DeviceMemoryError where the device has not so much."""
        nbytes = max(16, nbytes)
        with working_on(self.index):
            try:
                with cuda_errors(f"cudaMalloc({nbytes}) on cuda:{self.index}", "cudaMalloc"):
                    return Buffer(self._cupy.cuda.Memory(nbytes), nbytes, self.index)
            except DeviceMemoryError as error:
                free, total = self._cupy.cuda.runtime.memGetInfo()
                raise DeviceMemoryError(
                    f"cuda:{self.index} has no {nbytes:,} bytes left ({free:,} of {total:,} free); "
                    f"free memory (other libraries' caches too: torch.cuda.empty_cache(), "
                    f"cupy.get_default_memory_pool().free_all_blocks()) or lower "
                    f"PlanOptions(workspace_limit=...)",
                    function="cudaMalloc",
                    status=_OUT_OF_MEMORY,
                    status_name="cudaErrorMemoryAllocation",
                ) from error

    def upload(self, values: Any, stream: int) -> Buffer:
        """Copy a contiguous NumPy array to new device memory; waits until it is there."""
        buffer = self.allocate(values.nbytes)
        runtime = self._cupy.cuda.runtime
        with working_on(self.index):
            # 1 is cudaMemcpyHostToDevice.
            runtime.memcpyAsync(buffer.pointer, values.ctypes.data, values.nbytes, 1, stream)
            runtime.streamSynchronize(stream)
        return buffer

    def download(self, pointer: int, values: Any, stream: int) -> None:
        """Copy device memory into a contiguous NumPy array; waits until it is there."""
        runtime = self._cupy.cuda.runtime
        with working_on(self.index):
            # 2 is cudaMemcpyDeviceToHost.
            runtime.memcpyAsync(values.ctypes.data, pointer, values.nbytes, 2, stream)
            runtime.streamSynchronize(stream)

    def clear(self, pointer: int, nbytes: int, stream: int) -> None:
        """Set device memory to zero, in stream order."""
        self._cupy.cuda.runtime.memsetAsync(pointer, 0, nbytes, stream)

    def copy_rows(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        rows: int,
        stream: int,
    ) -> None:
        """Copy ``rows`` rows of ``width`` bytes between matrices on this device."""
        # 3 is cudaMemcpyDeviceToDevice.
        self._cupy.cuda.runtime.memcpy2DAsync(
            target, target_pitch, source, source_pitch, width, rows, 3, stream
        )

    def filled(self, nbytes: int, row: Operand, stream: int) -> Buffer:
        """New memory that holds normally distributed operands: timing zeros would flatter."""
        values = np.random.default_rng(0).standard_normal((64, 4096)).astype(np.float32)
        tile, _ = quantize_tokens(values, row)
        buffer = self.allocate(nbytes)
        runtime = self._cupy.cuda.runtime
        first = min(nbytes, tile.nbytes)
        runtime.memcpyAsync(buffer.pointer, tile.ctypes.data, first, 1, stream)
        runtime.streamSynchronize(stream)
        done = first
        while done < nbytes:
            size = min(done, nbytes - done)
            runtime.memcpyAsync(buffer.pointer + done, buffer.pointer, size, 3, stream)
            done += size
        return buffer

    def synchronize(self, stream: int) -> None:
        """Wait for ``stream``."""
        self._cupy.cuda.runtime.streamSynchronize(stream)


_LOCK = threading.Lock()


def gpu_device(index: int) -> GpuDevice:
    """The device ``index``, the same object for every caller in the process."""
    with _LOCK:
        return _shared(index)


@functools.cache
def _shared(index: int) -> GpuDevice:
    return GpuDevice(index)


def is_capturing(stream: int) -> bool:
    """Whether a CUDA graph is being captured from ``stream``."""
    # The legacy default stream cannot be captured, and asking about it during a capture fails.
    return stream not in (0, 1) and bool(cuda_runtime().streamIsCapturing(stream))
