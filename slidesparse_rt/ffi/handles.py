"""One cuSPARSELt and one cuBLASLt handle per device and thread.

Library handles bind to the device that is current when they are made, and cuSPARSELt's may be used
by one call at a time; with a handle per (device, thread) no thread ever waits for another::

    handle = cusparselt_handle(0)  # device 0 is current
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from contextlib import nullcontext
from typing import TypeVar

from ..errors import OptionError, PlanClosed
from . import cublaslt, cusparselt
from .checked import Around, Resource

__all__ = ["SHARED", "HandlePool", "cublaslt_handle", "cusparselt_handle"]

_HandleT = TypeVar("_HandleT", bound=Resource)


class _Mine(threading.local):
    """The handles of the calling thread; Python drops them when the thread ends."""

    def __init__(self) -> None:
        self.handles: dict[tuple[type[Resource], int, int], Resource] = {}


class HandlePool:
    """Makes a handle when a thread first asks for a device, and gives the same one from then on.

    A handle is destroyed when its thread has ended or the pool was closed, and nothing that was
    made from it lives any more; at the latest when the interpreter exits.  A thread never sees
    another's handles, so the pool needs no lock.

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
        self._mine = _Mine()
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
        # A forked child cannot use what its parent made.
        handles, key = self._mine.handles, (kind, device, os.getpid())
        handle = handles.get(key)
        if not isinstance(handle, kind) or handle.closed:
            handle = handles[key] = make()
        return handle

    def close(self) -> None:
        """Give up the handles of all threads; closing twice is fine.

        A handle that something was made from lives as long as that does.
        """
        self._closed = True
        # Dropping a threading.local drops what every thread keeps in it.
        self._mine = _Mine()


#: The pool that plans take their handles from; nothing is loaded before it is asked for a handle.
SHARED = HandlePool()


def cusparselt_handle(device: int, *, around: Around = nullcontext) -> cusparselt.Handle:
    """Return the calling thread's cuSPARSELt handle; :meth:`HandlePool.cusparselt` of SHARED."""
    return SHARED.cusparselt(device, around=around)


def cublaslt_handle(device: int, *, around: Around = nullcontext) -> cublaslt.Handle:
    """Return the calling thread's cuBLASLt handle; :meth:`HandlePool.cublaslt` of SHARED."""
    return SHARED.cublaslt(device, around=around)
