"""Launches that the driver repeats by itself: a CUDA graph of them, and one call for all.

A launch costs the host several times what the Python around it does, and the call that launches a
graph costs less than one of its kernels would: about a third of two launches.  The GPU does the
same work, an early start (programmatic dependent launch) included.

Source: cuda.h, sections Stream Management and Graph Management.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import weakref
from collections.abc import Callable

from ..errors import LibraryError
from .loader import Cuda, relaxed_capture

__all__ = ["Recording"]

#: CU_STREAM_NON_BLOCKING
_NON_BLOCKING = 1
#: CU_STREAM_CAPTURE_MODE_RELAXED: other threads may do what they want meanwhile.
_RELAXED = 2


class Recording:
    """The launches that a function makes, as a CUDA graph; destroyed when it is dropped.

    The device must be current.  A graph that is dropped while it runs is freed once it has run.

    Parameters
    ----------
    cuda:
        The driver.
    launches:
        Launches on the stream that it is given, with all addresses as they will be: they are
        recorded, not run.

    Raises
    ------
    DeviceMemoryError, LibraryError
        If the driver refuses it; besides, whatever ``launches`` raises.
    """

    __slots__ = ("__weakref__", "_cuda", "_graph")

    def __init__(self, cuda: Cuda, launches: Callable[[int], None]) -> None:
        self._cuda = cuda
        with relaxed_capture(cuda):
            self._graph = _instantiated(cuda, launches)
        # At the end of the process the driver frees everything.
        weakref.finalize(self, _destroy, cuda, self._graph, os.getpid()).atexit = False

    def on(self, stream: int) -> Callable[[], int]:
        """Return what launches all of it on ``stream``, and returns the driver's status.

        Give what is not zero to :meth:`error`.  The caller keeps the recording alive.
        """
        return self._cuda.repeated("cuGraphLaunch", self._graph, stream)

    def error(self, status: int) -> LibraryError:
        """Return the error for what :meth:`on` led to."""
        return self._cuda.error("cuGraphLaunch", status, ())


def _instantiated(cuda: Cuda, launches: Callable[[int], None]) -> int:
    """The executable graph of ``launches``."""
    # A stream of its own: work of others never gets in.
    stream = ctypes.c_void_p(None)
    cuda.cuStreamCreate(ctypes.byref(stream), _NON_BLOCKING)
    try:
        graph = _captured(cuda, stream.value or 0, launches)
    finally:
        cuda.cuStreamDestroy_v2(stream.value)
    made = ctypes.c_void_p(None)
    try:
        cuda.cuGraphInstantiateWithFlags(ctypes.byref(made), graph, 0)
    finally:
        cuda.cuGraphDestroy(graph)
    return made.value or 0


def _captured(cuda: Cuda, stream: int, launches: Callable[[int], None]) -> int:
    graph = ctypes.c_void_p(None)
    cuda.cuStreamBeginCapture_v2(stream, _RELAXED)
    try:
        launches(stream)
    except BaseException:
        with contextlib.suppress(LibraryError):  # the first error is the one to tell
            cuda.cuStreamEndCapture(stream, ctypes.byref(graph))
        if graph.value:
            cuda.cuGraphDestroy(graph.value)
        raise
    cuda.cuStreamEndCapture(stream, ctypes.byref(graph))
    return graph.value or 0


def _destroy(cuda: Cuda, graph: int, process: int) -> None:
    """Give the graph back; errors at this point help no one.  A forked child has no part in it."""
    if os.getpid() != process:
        return
    with contextlib.suppress(LibraryError), relaxed_capture(cuda):
        cuda.cuGraphExecDestroy(graph)
