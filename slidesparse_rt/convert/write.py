"""Writing one converted file: blocks are made on several threads and written in their order.

Only a few blocks exist at a time, so memory does not grow with tensors or shards.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np

from ..arrays import NDArray
from ..errors import NonFiniteError
from ..packing import TensorFile
from .blocks import (
    NUMPY_TYPES,
    Block,
    Recipe,
    Tally,
    block_starts,
    convert_block,
    read_bytes,
)
from .checkpoint import Tensor
from .files import CHUNK, Output
from .layers import Layer, Settings
from .layout import Shard, Slot

__all__ = ["Written", "write_shard"]

#: Called as work proceeds: name of the tensor, bytes of the file written since the last call.
Advance = Callable[[str, int], None]


@dataclass(frozen=True, slots=True)
class Written:
    """What :func:`write_shard` left on the disk, under its temporary name."""

    nbytes: int
    sha256: str
    tallies: dict[str, Tally]


@dataclass(frozen=True, slots=True)
class _Job:
    """A piece of one slot; ``work`` makes it on any thread, ``last`` says that the slot ends."""

    slot: Slot
    work: Callable[[], NDArray | Block | None]
    last: bool


def write_shard(
    shard: Shard,
    target: Path,
    settings: Settings,
    norms: Path | None,
    pool: ThreadPoolExecutor,
    ahead: int,
    advance: Advance,
) -> Written:
    """Write a shard into the folder ``target``, under a temporary name, to the disk.

    ``ahead`` is how many pieces may be begun before the first of them is written.

    Raises
    ------
    NonFiniteError
        For a weight or a scale that cannot be converted.
    FormatError, OSError
        If a file cannot be read or written.  The temporary file is then removed.
    """
    tallies: dict[str, Tally] = {}
    scales: dict[str, list[NDArray]] = {}
    waiting: deque[tuple[_Job, Future[NDArray | Block | None]]] = deque()
    with Output(target / shard.name) as out, ExitStack() as stack:

        def write_next() -> None:
            job, future = waiting.popleft()
            slot, made, before = job.slot, future.result(), out.nbytes
            layer = slot.layer
            if not isinstance(made, Block):
                if made is not None:
                    out.write(made)
            elif layer is not None:
                if made.scales is not None:
                    scales.setdefault(layer.module, []).append(made.scales)
                if slot.role == "values":
                    out.write(made.values.view(np.uint8))
                    tallies.setdefault(layer.module, Tally()).add(made.tally)
            if slot.role == "scales" and layer is not None and layer.scale is None and job.last:
                out.write(np.concatenate(scales[layer.module]))
            advance(slot.name, out.nbytes - before)

        out.write(shard.header)
        try:
            for job in _jobs(shard, settings, norms, _Handles(stack)):
                waiting.append((job, pool.submit(job.work)))
                if len(waiting) > ahead:
                    write_next()
            while waiting:
                write_next()
        finally:
            # Nothing may read from a handle that is closed.
            for _, future in waiting:
                future.cancel()
            wait([future for _, future in waiting])
    return Written(out.nbytes, out.sha256, tallies)


class _Handles:
    """Open files by path, closed with the stack."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._open: dict[Path, int] = {}

    def __call__(self, path: Path) -> int:
        if path not in self._open:
            handle = os.open(path, os.O_RDONLY)
            self._stack.callback(os.close, handle)
            if hasattr(os, "posix_fadvise"):
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_SEQUENTIAL)
            self._open[path] = handle
        return self._open[path]


def _jobs(
    shard: Shard, settings: Settings, norms: Path | None, handles: _Handles
) -> Iterator[_Job]:
    """The pieces of a file in the order of their bytes."""
    converted: set[str] = set()
    for slot in shard.slots:
        handle = handles(slot.source.path)
        layer = slot.layer
        if layer is None:
            size = slot.nbytes
            starts = range(0, size, CHUNK)
            for start in starts:
                count = min(CHUNK, size - start)
                work = partial(read_bytes, handle, slot.source, start, count)
                yield _Job(slot, work, start + count == size)
        elif slot.role == "scales" and layer.scale is not None:
            yield _Job(slot, partial(_kept_scale_bytes, layer, handle), True)
        elif slot.role == "scales" and layer.module in converted:
            # Its blocks are before this job in the queue; their scales are there when it is next.
            yield _Job(slot, _nothing, True)
        else:
            # Scales that come first, because their weight's size is odd, take a pass of their own.
            converted.add(layer.module)
            recipe = _recipe(layer, settings, norms, handles)
            for start, stop in block_starts(layer.n, layer.k):
                block = partial(convert_block, handle, layer.weight, recipe, start, stop)
                yield _Job(slot, block, stop == layer.n)


def _nothing() -> None:
    return None


def _recipe(layer: Layer, settings: Settings, norms: Path | None, handles: _Handles) -> Recipe:
    weights = scales = None
    if norms is not None:
        with TensorFile(norms) as file:
            weights = np.array(file.read(layer.weight.name))
    if layer.scale is not None:
        scales = _kept_scales(layer, layer.scale, handles(layer.scale.path))
    return Recipe(settings.pattern, settings.dtype, settings.method, weights, scales)


def _kept_scales(layer: Layer, scale: Tensor, handle: int) -> NDArray:
    """Scales of a weight that is quantized already: (N,) float32, exactly those of the file."""
    raw = read_bytes(handle, scale, 0, scale.nbytes)
    found = raw.view(NUMPY_TYPES[scale.dtype]).astype(np.float32).reshape(-1)
    bad = ~(np.isfinite(found) & (found > 0))
    if bad.any():
        index = int(np.argmax(bad))
        raise NonFiniteError(
            f"tensor {scale.name!r} in {scale.path.name} holds {found[index]} at index {index}; "
            f"scales are finite and positive; get an intact checkpoint"
        )
    return np.ascontiguousarray(np.broadcast_to(found, (layer.n,)))


def _kept_scale_bytes(layer: Layer, handle: int) -> NDArray:
    assert layer.scale is not None
    return _kept_scales(layer, layer.scale, handle).view(np.uint8)
