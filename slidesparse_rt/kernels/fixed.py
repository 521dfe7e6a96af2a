"""Launches that are repeated: what stays is written once, and a call writes only what changes.

``cuLaunchKernel`` takes eleven arguments, and ctypes converts each of them at every call.
``cuLaunchKernelEx`` takes four addresses, and they stay the same, so they are converted once: grid
and stream are in a structure in host memory, the kernel's arguments in a buffer beside it.

Source: cuda.h, ``CUlaunchConfig`` and ``cuLaunchKernelEx``; the driver copies all arguments before
it returns.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Sequence

from ..errors import LibraryError
from .loader import Cuda, Kernel

__all__ = [
    "AimedLaunch",
    "FixedDequantize",
    "FixedLaunch",
    "FixedQuantize",
    "argument_offsets",
    "starts_early",
]

#: cuda.h: CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION, ..._PROGRAMMATIC_STREAM_SERIALIZATION, and the
#: first driver that keeps the latter in graphs.
_CLUSTER, _EARLY_START = 4, 6
_EARLY_START_IN_GRAPHS = 12030
#: Bytes of the words that :attr:`FixedLaunch.words` counts.
_WORD = 8


class _LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``: a kind, and a value in a union of 64 bytes."""

    _fields_ = (
        ("kind", ctypes.c_int),
        ("_gap", ctypes.c_char * 4),
        ("value", ctypes.c_int * 3),
        ("_rest", ctypes.c_char * 52),
    )


class _LaunchSettings(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("attribute_count", ctypes.c_uint),
    )


def argument_offsets(layout: str) -> list[int]:
    """Where each argument of a kernel lies, in bytes, packed as :mod:`struct` does."""
    return [struct.calcsize(layout[: i + 1]) - struct.calcsize(c) for i, c in enumerate(layout)]


def starts_early(cuda: Cuda) -> bool:
    """Whether the driver keeps an early start (programmatic dependent launch) in CUDA graphs."""
    version = ctypes.c_int(0)
    cuda.cuDriverGetVersion(ctypes.byref(version))
    return version.value >= _EARLY_START_IN_GRAPHS


class FixedLaunch:
    """One kernel on one grid, with its arguments in place; for one thread at a time.

    Parameters
    ----------
    cuda:
        The driver.
    kernel:
        The kernel.
    layout:
        Its arguments as :mod:`struct` codes.
    shape:
        (blocks, block width, block height, bytes of dynamic shared memory).
    arguments:
        The values, in the order of ``layout``.
    maps:
        How many tensor maps come before them; :meth:`set_map` gives their addresses.
    early:
        Whether the kernel may begin before the one launched before it on the stream is over, for
        which it waits by itself (programmatic dependent launch).
    cluster:
        Blocks of a cluster, of which there are a whole number; 0: there are none.

    Attributes
    ----------
    words:
        The arguments as unsigned 64-bit words, which may be written: the cheapest way to change an
        address, where only arguments of 8 bytes come before it.
    stream:
        The stream of the next launch; :meth:`set_stream` changes it.
    run:
        Launches, and returns the driver's status.  It is no method, so that a call costs as little
        as ctypes allows; give what is not zero to :meth:`error`.
    """

    __slots__ = (
        "_attributes",
        "_codes",
        "_cuda",
        "_offsets",
        "_pointers",
        "_settings",
        "_values",
        "run",
        "stream",
        "words",
    )

    def __init__(
        self,
        cuda: Cuda,
        kernel: Kernel,
        layout: str,
        shape: tuple[int, int, int, int],
        arguments: Sequence[int],
        *,
        maps: int = 0,
        early: bool = False,
        cluster: int = 0,
    ) -> None:
        self._cuda = cuda
        self._codes, self._offsets = layout, argument_offsets(layout)
        values = bytearray(-(-struct.calcsize(layout) // _WORD) * _WORD)
        struct.pack_into(layout, values, 0, *arguments)
        # As long as it is seen from here the bytearray cannot move.
        self._values = (ctypes.c_char * len(values)).from_buffer(values)
        start = ctypes.addressof(self._values)
        self.words = memoryview(values).cast("Q")
        self._pointers = (ctypes.c_void_p * (maps + len(layout)))(
            *[None] * maps, *(start + offset for offset in self._offsets)
        )
        blocks, width, height, shared = shape
        asked = []
        if early:
            asked.append(_LaunchAttribute(kind=_EARLY_START, value=(1, 0, 0)))
        if cluster:
            asked.append(_LaunchAttribute(kind=_CLUSTER, value=(cluster, 1, 1)))
        self._attributes = (_LaunchAttribute * len(asked))(*asked)
        self._settings = _LaunchSettings(
            grid=(blocks, 1, 1),
            block=(width, height, 1),
            shared=shared,
            attributes=self._attributes,
            attribute_count=len(asked),
        )
        self.stream = 0
        self.run: Callable[[], int] = cuda.repeated(
            "cuLaunchKernelEx",
            ctypes.addressof(self._settings),
            kernel.function,
            self._pointers,
            None,
        )

    def set_argument(self, argument: int, value: int) -> None:
        """Change an argument of any size, by its place in the layout."""
        struct.pack_into(self._codes[argument], self._values, self._offsets[argument], value)

    def set_map(self, index: int, address: int) -> None:
        """Give the host address of a tensor map, which the caller keeps."""
        self._pointers[index] = address

    def set_stream(self, stream: int) -> None:
        """Launch on ``stream`` from now on."""
        self._settings.stream = stream
        self.stream = stream

    def error(self, status: int) -> LibraryError:
        """Return the error for what :attr:`run` returned."""
        return self._cuda.error("cuLaunchKernelEx", status, ())


class AimedLaunch:
    """A launch of which one array, by address and stride, and the stream change from call to call.

    For one thread at a time.

    Parameters
    ----------
    launch:
        The launch, before it is aimed at an array for the first time.
    """

    __slots__ = ("_address", "_launch", "_stride")

    def __init__(self, launch: FixedLaunch) -> None:
        self._launch = launch
        self._address = self._stride = -1  # no address

    def aim(self, address: int, stride: int, stream: int) -> Callable[[], int]:
        """Return what launches for the array at ``address``, until it is aimed at another.

        ``stride`` counts elements from row to row.  What is called returns the driver's status;
        give what is not zero to :meth:`error`.
        """
        if address != self._address or stride != self._stride:
            self._address = -1  # until everything is in place
            self._launch = self._aimed(address, stride)
            self._address, self._stride = address, stride
        launch = self._launch
        if stream != launch.stream:
            launch.set_stream(stream)
        return launch.run

    def error(self, status: int) -> LibraryError:
        """Return the error for a status."""
        return self._launch.error(status)

    def launch(self, address: int, stride: int, stream: int) -> None:
        """Launch; arguments as of :meth:`aim`.  Raises LibraryError if the driver refuses it."""
        status = self.aim(address, stride, stream)()
        if status:
            raise self.error(status)

    def _aimed(self, address: int, stride: int) -> FixedLaunch:
        """The launch, with the array in its arguments."""
        raise NotImplementedError


class FixedQuantize(AimedLaunch):
    """Quantizes rows, its array, to one place.

    :meth:`~slidesparse_rt.kernels.launch.Quantizer.fixed` makes it.
    """

    __slots__ = ("_access", "_any", "_fast", "_size")

    def __init__(self, fast: FixedLaunch, anything: FixedLaunch, access: int, size: int) -> None:
        super().__init__(fast)
        self._fast, self._any = fast, anything
        self._access, self._size = access, size

    def _aimed(self, address: int, stride: int) -> FixedLaunch:
        pitch = stride * self._size
        if stride != self._stride:
            self._stride = -1  # until both have it
            for launch in (self._fast, self._any):
                launch.set_argument(1, pitch)
        launch = self._any if (address | pitch) % self._access else self._fast
        launch.words[0] = address
        return launch


class FixedDequantize(AimedLaunch):
    """Dequantizes from one place into its array.

    :meth:`~slidesparse_rt.kernels.launch.Dequantizer.fixed` makes it.
    """

    __slots__ = ("_align", "_any", "_fast", "_size")

    def __init__(self, fast: FixedLaunch, anything: FixedLaunch, align: int, size: int) -> None:
        super().__init__(fast)
        self._fast, self._any = fast, anything
        self._align, self._size = align, size

    def _aimed(self, address: int, stride: int) -> FixedLaunch:
        odd = (address | stride * self._size) % self._align
        launch = self._any if odd else self._fast
        launch.set_argument(2, address)
        launch.set_argument(3, stride)
        return launch
