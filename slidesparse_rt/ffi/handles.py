"""One cuSPARSELt and one cuBLASLt handle per device and thread at work.

Library handles bind to the device that is current when they are made, and cuSPARSELt's may be used
by one call at a time; with a handle per (device, thread) no thread ever waits for another::

    handle = cusparselt_handle(0)  # device 0 is current
"""

from __future__ import annotations

import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from ..errors import OptionError, PlanClosed
from . import cublaslt, cusparselt
from .objects import Around, Resource

__all__ = ["SHARED", "HandlePool", "cublaslt_handle", "cusparselt_handle"]

_HandleT = TypeVar("_HandleT", bound=Resource)


#: Kind of handle, device, process: a forked child cannot use what its parent made.
_Key = tuple[type[Resource], int, int]


class _Idle:
    """Handles of threads that have ended, for threads to come.

    Destroying a handle waits for the whole device, which would spoil a CUDA graph that another
    thread is capturing, and threads end at any time.
    """

    def __init__(self) -> None:
        self._handles: dict[_Key, deque[Resource]] = {}
        self._open = True

    def put(self, handles: dict[_Key, Resource]) -> None:
        for key, handle in handles.items():
            if self._open:
                self._handles.setdefault(key, deque()).append(handle)

    def take(self, key: _Key) -> Resource | None:
        try:
            return self._handles[key].pop()
        except (KeyError, IndexError):
            return None

    def close(self) -> None:
        self._open = False
        self._handles.clear()


class _End:
    """Goes when the thread goes that made it."""


class _Mine(threading.local):
    """The handles of the calling thread; Python drops this when the thread ends."""

    def __init__(self, idle: _Idle) -> None:
        self.handles: dict[_Key, Resource] = {}
        self.end = _End()
        # At exit handles are destroyed, not passed on.
        weakref.finalize(self.end, idle.put, self.handles).atexit = False


class HandlePool:
    """Gives a thread that first asks for a device a handle, and the same one from then on.

    A thread that ends leaves its handles to the next one that asks: there are as many as threads
    used at a time.  A handle is destroyed when the pool was closed and nothing that was made from
    it lives any more; at the latest when the interpreter exits.  No two threads have the same
    handle at a time, so the pool needs no lock.

    Parameters
    ----------
    sparse:
        The cuSPARSELt to make handles of; ``None`` is this process's, loaded on first use.
    dense:
        The same for cuBLASLt.
    """

    def __init__(
        self, *, sparse: cusparselt.CuSparseLt | None = None, dense: cublaslt.CublasLt | None = None
    ) -> None:
        self._sparse = sparse
        self._dense = dense
        self._idle = _Idle()
        self._mine = _Mine(self._idle)
        self._closed = False

    def cusparselt(self, device: int, *, around: Around = nullcontext) -> cusparselt.Handle:
        """Return the calling thread's cuSPARSELt handle for ``device``.

        Parameters
        ----------
        device:
            CUDA's index of the device, which must be current now unless ``around`` makes it so.
        around:
            Makes a context manager inside which ``device`` is current.  It is used when the handle
            is made and when it and what was made from it are destroyed, from whichever thread.

        Raises
        ------
        BackendUnavailable
            The library is missing or too old, or there is no GPU that it can use.
        LibraryError
            The library refused for another reason.
        PlanClosed
            The pool was closed.
        """
        return self._get(
            cusparselt.Handle,
            device,
            lambda: cusparselt.Handle(device, lib=self._sparse, around=around),
        )

    def cublaslt(self, device: int, *, around: Around = nullcontext) -> cublaslt.Handle:
        """Return the calling thread's cuBLASLt handle for ``device``; as :meth:`cusparselt`."""
        return self._get(
            cublaslt.Handle,
            device,
            lambda: cublaslt.Handle(device, lib=self._dense, around=around),
        )

    def _get(self, kind: type[_HandleT], device: int, make: Callable[[], _HandleT]) -> _HandleT:
        if self._closed:
            raise PlanClosed("this pool of handles was used after close(); make a new one")
        if isinstance(device, bool) or not isinstance(device, int) or device < 0:
            raise OptionError(
                f"device is {device!r}; allowed is CUDA's index of a device: 0, 1, ..."
            )
        handles, key = self._mine.handles, (kind, device, os.getpid())
        handle = handles.get(key)
        if not isinstance(handle, kind) or handle.closed:
            handle = self._idle.take(key)
            if not isinstance(handle, kind) or handle.closed:
                handle = make()
            handles[key] = handle
        return handle

    def close(self) -> None:
        """Give up the handles of all threads; closing twice is fine.

        A handle that something was made from lives as long as that does.
        """
        self._closed = True
        self._idle.close()
        # Dropping a threading.local drops what every thread keeps in it.
        self._mine = _Mine(self._idle)


#: The pool that plans take their handles from; nothing is loaded before it is asked for a handle.
SHARED = HandlePool()


def cusparselt_handle(device: int, *, around: Around = nullcontext) -> cusparselt.Handle:
    """Return the calling thread's cuSPARSELt handle; :meth:`HandlePool.cusparselt` of SHARED."""
    return SHARED.cusparselt(device, around=around)


def cublaslt_handle(device: int, *, around: Around = nullcontext) -> cublaslt.Handle:
    """Return the calling thread's cuBLASLt handle; :meth:`HandlePool.cublaslt` of SHARED."""
    return SHARED.cublaslt(device, around=around)
