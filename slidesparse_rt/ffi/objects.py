"""C objects with an owner: where they lie, what they were made from, when they are destroyed.

- :class:`Memory` holds one opaque C structure; :class:`Resource` owns one C object, keeps alive
  what it was made from, and destroys it once, after everything that was made from it.
- :class:`Gate` lets one call at a time into a handle that is not thread-safe.

Nothing here knows which library made them.
"""

from __future__ import annotations

import ctypes
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from types import TracebackType
from typing import Any, TypeAlias

from ..errors import PlanClosed

__all__ = ["Anchor", "Around", "Gate", "Memory", "Resource"]

_LOG = logging.getLogger(__name__)

#: Makes a context manager inside which a handle's device is current.
Around: TypeAlias = Callable[[], AbstractContextManager[object]]


class Memory:
    """Host memory for one C object: zeroed, aligned, at one address for life.

    ``open`` is true until the object in it is closed or destroyed.

    Parameters
    ----------
    size, alignment:
        Bytes.
    address:
        Where the object lies, if the library itself holds its memory; nothing is allocated then.
    """

    __slots__ = ("_buffer", "address", "open")

    def __init__(self, size: int = 0, alignment: int = 16, *, address: int = 0) -> None:
        self._buffer = None if address else ctypes.create_string_buffer(size + alignment)
        if self._buffer is not None:
            start = ctypes.addressof(self._buffer)
            address = start + -start % alignment
        self.address = address
        self.open = True


class Gate:
    """Lets one call at a time into a handle that is not thread-safe.

    Use it as a context manager around a call.  An object of the handle can be destroyed from any
    thread, by the garbage collector too, which must neither interrupt a call nor wait for one (two
    threads could then wait for each other): a destruction that finds the gate taken is parked, and
    carried out after the next call through the gate, or when the handle itself goes.

    Parameters
    ----------
    around:
        Makes a context manager inside which the handle's device is current; destructions run in it.
    """

    __slots__ = ("_parked", "around", "lock")

    def __init__(self, around: Around = nullcontext) -> None:
        self.around = around
        self.lock = threading.Lock()
        self._parked: deque[Callable[[], None]] = deque()

    def __enter__(self) -> None:
        self.lock.acquire()

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self._sweep()

    def retire(self, destroy: Callable[[], None]) -> None:
        """Call ``destroy`` as soon as no other call is under way, at once if there is none."""
        self._parked.append(destroy)
        self._sweep()

    def _sweep(self) -> None:
        while self._parked and self.lock.acquire(blocking=False):
            try:
                while self._parked:
                    destroy = self._parked.popleft()
                    destroy()
                    # Frees what the object was made from, which may park the next destruction.
                    del destroy
            finally:
                self.lock.release()


class Anchor:
    """Keeps a C object alive: its Resource holds one, and so does whatever was made from it."""

    __slots__ = ("__weakref__", "memory", "parents")

    def __init__(self, memory: Memory, parents: tuple[Anchor, ...]) -> None:
        self.memory = memory
        self.parents = parents


class Resource:
    """A C object with an owner.

    It is destroyed once: when it is closed (or collected, or at the latest when the interpreter
    exits) and nothing that was made from it lives any more.  A destruction that the library refuses
    is logged, not raised: the object is gone for the caller either way.

    Parameters
    ----------
    memory:
        Where the C object lies.
    destroy:
        Takes the address and destroys the object; ``None`` if there is nothing to call.
    gate:
        The gate of the handle that the object belongs to; ``None`` if it belongs to none.
    parents:
        The anchors of what it was made from.
    """

    def __init__(
        self,
        memory: Memory,
        *,
        destroy: Callable[[int], None] | None,
        gate: Gate | None = None,
        parents: tuple[Anchor, ...] = (),
    ) -> None:
        self._memory = memory
        self._anchor: Anchor | None = Anchor(memory, parents)
        # At exit Python runs these finalizers newest first, while the libraries are still loaded.
        weakref.finalize(self._anchor, _retire, memory, destroy, gate, parents, os.getpid())

    def hold(self) -> Anchor:
        """Return the anchor, which keeps the C object alive; PlanClosed after :meth:`close`."""
        anchor = self._anchor
        if anchor is None or not self._memory.open:
            raise self.gone()
        return anchor

    @property
    def address(self) -> int:
        """Address of the C object; PlanClosed after :meth:`close`."""
        return self.hold().memory.address

    @property
    def closed(self) -> bool:
        """Whether the object can no longer be used."""
        return not self._memory.open

    def gone(self) -> PlanClosed:
        """Return the error for a use after :meth:`close`."""
        kind = type(self)
        return PlanClosed(
            f"{kind.__module__.rsplit('.', 1)[-1]}.{kind.__name__} was used after close() or after "
            "the interpreter began to exit; make a new one"
        )

    def close(self) -> None:
        """Give the object up; closing twice is fine."""
        self._memory.open = False
        self._anchor = None

    def __enter__(self) -> Any:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _retire(
    memory: Memory,
    destroy: Callable[[int], None] | None,
    gate: Gate | None,
    parents: tuple[Anchor, ...],
    pid: int,
) -> None:
    """Destroy the object in ``memory``, now or when its gate is free."""
    if gate is None:
        _destroy(memory, destroy, nullcontext, parents, pid)
    else:
        gate.retire(partial(_destroy, memory, destroy, gate.around, parents, pid))


def _destroy(
    memory: Memory,
    destroy: Callable[[int], None] | None,
    around: Around,
    parents: tuple[Anchor, ...],
    pid: int,
) -> None:
    """Destroy the object in ``memory``; never raises, as it runs in finalizers and at exit."""
    del parents  # the caller's arguments hold them until this returns
    memory.open = False
    # CUDA does not survive a fork: a child process only forgets what its parent made.
    if destroy is None or pid != os.getpid():
        return
    try:
        with around():
            destroy(memory.address)
    except Exception as error:
        # As text: a log record that keeps the exception would keep the parents alive.
        _LOG.warning("could not destroy a C object: %s", str(error))
