"""Scratch memory that launches share, one block per stream.

Launches on one stream run one after the other, so they can share a block; launches on different
streams get blocks of their own.  A block grows when a larger launch comes.  The old one is given
back then, unless a CUDA graph was captured with it: a graph keeps using the addresses it saw.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import Protocol

from ..errors import CaptureError, PlanClosed
from ..kernels.hopper_tiles import HOPPER_COUNTERS
from .gpu_device import Buffer, GpuDevice, is_capturing

__all__ = ["COUNTER_BYTES", "Block", "Memory", "Workspace"]

#: What lies before every address that :meth:`Workspace.address` returns: 32-bit counters that are
#: zero while no launch runs.  A launch that counts with them leaves them so.
COUNTER_BYTES = 4 * HOPPER_COUNTERS


class Memory(Protocol):
    """What a launch asks for its place in memory."""

    def address(self, nbytes: int, stream: int, tokens: int) -> int:
        """See :meth:`Workspace.address`."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """The same place in memory for every launch, whatever the stream."""

    pointer: int

    def address(self, nbytes: int, stream: int, tokens: int) -> int:
        """The place."""
        del nbytes, stream, tokens
        return self.pointer


class Workspace:
    """Scratch memory of one plan on one device.

    Parameters
    ----------
    device:
        Where the memory lies.

    Notes
    -----
    Hold :attr:`lock` from the call of :meth:`address` until everything that uses the block is
    launched: two threads that launch on one stream must not interleave.
    """

    def __init__(self, device: GpuDevice) -> None:
        self.device = device
        self.lock = threading.Lock()
        self._blocks: dict[int, Buffer] = {}
        self._captured: set[int] = set()
        self._retired: list[Buffer] = []
        #: Whether :meth:`close` was called; hold :attr:`lock` to act on it.
        self.closed = False
        #: How often a block was exchanged for a larger one: addresses seen before may have gone.
        self.moves = 0

    @property
    def nbytes(self) -> int:
        """Bytes held for all streams."""
        held = [*self._blocks.values(), *self._retired]
        return sum(block.nbytes for block in held)

    def check_open(self) -> None:
        """Raise PlanClosed after :meth:`close`; hold :attr:`lock`."""
        if self.closed:
            raise PlanClosed("this workspace is closed; make a new one")

    def address(self, nbytes: int, stream: int, tokens: int) -> int:
        """Address of at least ``nbytes`` for launches on ``stream``, 256-byte aligned.

        :data:`COUNTER_BYTES` bytes of counters lie before it.

        Raises
        ------
        CaptureError
            If it would have to allocate while ``stream`` is captured; ``tokens`` is for the words.
        DeviceMemoryError
            If the device is out of memory; what was held before is still held.
        PlanClosed
            After :meth:`close`.
        """
        block = self._blocks.get(stream)
        if block is not None and block.nbytes >= nbytes + COUNTER_BYTES:
            # The default stream (0) is never captured.
            if stream and stream not in self._captured and is_capturing(stream):
                self._captured.add(stream)
            return block.pointer + COUNTER_BYTES
        if self.closed:
            raise PlanClosed("this workspace is closed; make a new one")
        if is_capturing(stream):
            raise CaptureError(
                f"a CUDA graph is being captured, and {tokens} tokens need {nbytes:,} bytes of "
                f"workspace on this stream, which has {0 if block is None else block.nbytes:,}; "
                f"call plan.prepare(tokens=[{tokens}], stream=...) with the same stream first"
            )
        larger = self.device.allocate(nbytes + COUNTER_BYTES)
        self.device.clear(larger.pointer, COUNTER_BYTES, stream)
        # A graph that is captured on this stream may be replayed on another.
        self.device.synchronize(stream)
        self._blocks[stream] = larger
        if block is not None:
            self.moves += 1
            if stream in self._captured:
                self._captured.discard(stream)
                self._retired.append(block)
            else:
                block.close()
        return larger.pointer + COUNTER_BYTES

    def close(self) -> None:
        """Give all blocks back.  No launch may be using them, and no graph may run again."""
        with self.lock:
            self.closed = True
            for block in (*self._blocks.values(), *self._retired):
                block.close()
            self._blocks.clear()
            self._retired.clear()
