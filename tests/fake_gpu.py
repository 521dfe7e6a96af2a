"""A GPU of which only the book-keeping is there."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar


class RuntimeFault(RuntimeError):
    """CuPy's error of the CUDA runtime."""

    def __init__(self, status: int) -> None:
        super().__init__(f"status {status}")
        self.status = status


class Memory:
    """Device memory that only has an address; ``held`` are those that are open."""

    made = 0
    held: ClassVar[set[int]] = set()

    def __init__(self, nbytes: int) -> None:
        Memory.made += 1
        self.pointer, self.nbytes = Memory.made << 20, nbytes
        Memory.held.add(self.pointer)

    def close(self) -> None:
        Memory.held.discard(self.pointer)
        self.pointer = self.nbytes = 0

    def __enter__(self) -> Memory:
        return self

    def __exit__(self, *arguments: Any) -> None:
        self.close()


class Gpu:
    """A device that notes what is done to its memory."""

    index, name, capability = 0, "a stand-in", (9, 0)
    sm_count, l2_bytes = 132, 50 << 20

    def __init__(self) -> None:
        self.lock = self.measuring = contextlib.nullcontext()
        self.choices: dict[Any, Any] = {}
        self.done: list[tuple[Any, ...]] = []

    def allocate(self, nbytes: int) -> Memory:
        return Memory(nbytes)

    def filled(self, nbytes: int, *arguments: Any) -> Memory:
        return Memory(nbytes)

    def upload(self, values: Any, stream: int) -> Memory:
        memory = Memory(values.nbytes)
        self.done.append(("upload", memory.pointer, values.copy()))
        return memory

    def clear(self, *arguments: Any) -> None:
        self.done.append(("clear", *arguments))

    def copy_rows(self, *arguments: Any) -> None:
        self.done.append(("copy_rows", *arguments))

    def synchronize(self, stream: int) -> None:
        self.done.append(("synchronize", stream))

    def emptied(self, stream: int) -> None:
        """The level-2 cache is."""
        self.done.append(("emptied", stream))


@contextlib.contextmanager
def cold_cache(device: Gpu) -> Iterator[Callable[[int], None]]:
    """What empties the level-2 cache of such a device."""
    with device.allocate(2 * device.l2_bytes):
        yield device.emptied
