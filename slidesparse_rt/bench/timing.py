"""Measuring on a GPU: memory with realistic data, captured graphs, and two ways to time them.

What is timed is a CUDA graph: everything that one unit of work launches is captured once and
replayed, so that the host's speed plays no part.  Times come from CUDA events around replays on one
stream.  The host runs ahead of the GPU: replays are queued behind each other, so the GPU does not
idle between an event and the work after it.

burst
    Short and warm.  All sides take turns in shuffled order, round after round; a side's figure is
    the median of its rounds.  Units shorter than 200 us are replayed several times per event pair.
sustained
    Each side alone for at least a second, of which the last half counts; rounds alternate, and a
    side's figure is the median of its rounds.  It is what a busy server sees: the GPU is at its
    power limit and its clocks have settled.  The figure to quote.

Data is normally distributed, never zeros: zeros need less power and run faster.
"""

from __future__ import annotations

import contextlib
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..arrays import Device, NDArray
from ..backends.machine import gpu_refusal
from ..backends.timing import captured
from ..device_arrays import on_device
from ..dtypes import ARRAY_TYPES, array_type
from ..errors import BackendUnavailable
from .clocks import Clocks, mean

__all__ = ["Gpu", "Graph", "Memory", "Times", "burst", "require_gpu", "sustained", "warm"]

#: Elements of one pool of random data: 8 times a prime, so that no row length divides it, and a
#: multiple of 16 bytes for every type.
POOL = 8 * 1_048_573
#: Least microseconds between two events of a burst.
_UNIT_US = 200.0
#: Most replays between two events.
_MOST_REPLAYS = 64
#: Microseconds of warming up before a burst: clocks rise from idle within this time.
_WARM_US = 50_000.0
_MOST_WARM = 20_000
#: Microseconds of work between two events of a sustained run.
_CHUNK_US = 20_000.0
#: Bytes of an array of all bits set.
POISON = 0xFF


class Memory(Protocol):
    """Device memory."""

    @property
    def pointer(self) -> int:
        """Its address."""
        ...

    @property
    def nbytes(self) -> int:
        """Its size."""
        ...

    def close(self) -> None:
        """Give it back."""
        ...


class Graph(Protocol):
    """Captured work."""

    def launch(self) -> None:
        """Queue it once; returns at once."""
        ...


def require_gpu(libraries: tuple[str, ...], index: int = 0) -> None:
    """Raise BackendUnavailable, naming everything that is missing, unless the GPU can be used."""
    missing = gpu_refusal(libraries, Device("cuda", index))
    if missing:
        raise BackendUnavailable(missing)


class Gpu:
    """The GPU of a benchmark: one stream, memory, random data, graphs and events.

    Parameters
    ----------
    index:
        CUDA's device number.
    """

    def __init__(self, index: int = 0) -> None:
        import cupy

        from ..backends.gpu_device import gpu_device

        self.index = index
        self._cupy = cupy
        self.device: Any = gpu_device(index)
        self.name: str = self.device.name
        with on_device(index):
            self._stream: Any = cupy.cuda.Stream(non_blocking=True)
        #: Address of the stream on which everything runs.
        self.stream = int(self._stream.ptr)
        runtime = cupy.cuda.runtime
        #: Bytes of the level-2 cache.
        self.l2_bytes = int(runtime.deviceGetAttribute(runtime.cudaDevAttrL2CacheSize, index))
        self._pools: dict[str, Memory] = {}
        self._fills = 0

    def facts(self) -> dict[str, Any]:
        """What a result file says about the GPU."""
        major, minor = self.device.capability
        return {
            "name": self.name,
            "architecture": f"sm_{major}{minor}",
            "sm_count": self.device.sm_count,
            "memory_bytes": self.device.memory_bytes,
            "l2_bytes": self.l2_bytes,
            **Clocks.facts(self.bus_id()),
        }

    def bus_id(self) -> str:
        """The PCI address, by which NVML knows the GPU."""
        return str(self._cupy.cuda.runtime.deviceGetPCIBusId(self.index))

    @contextlib.contextmanager
    def active(self) -> Iterator[None]:
        """Make device and stream current, for a with statement."""
        with on_device(self.index), self._stream:
            yield

    # Memory.

    def allocate(self, nbytes: int) -> Memory:
        """New memory; DeviceMemoryError where there is not so much."""
        memory: Memory = self.device.allocate(nbytes)
        return memory

    def upload(self, values: NDArray) -> Memory:
        """A NumPy array in new memory."""
        memory: Memory = self.device.upload(np.ascontiguousarray(values), self.stream)
        return memory

    def read(self, pointer: int, dtype: Any, count: int) -> NDArray:
        """Copy ``count`` elements to the host, once the stream has come there."""
        values = np.empty(count, dtype)
        self.device.download(pointer, values, self.stream)
        return values

    def copy(self, target: int, source: int, nbytes: int) -> None:
        """Copy within the device, in stream order."""
        # 3 is cudaMemcpyDeviceToDevice.
        self._cupy.cuda.runtime.memcpyAsync(target, source, nbytes, 3, self.stream)

    def set_bytes(self, pointer: int, value: int, nbytes: int) -> None:
        """Set every byte, in stream order."""
        self._cupy.cuda.runtime.memsetAsync(pointer, value, nbytes, self.stream)

    def array(self, pointer: int, shape: tuple[int, ...], kind: str) -> Any:
        """Memory of this class as a contiguous CuPy array; the memory has to outlive it."""
        dtype = array_type(kind).dtype
        nbytes = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
        memory = self._cupy.cuda.UnownedMemory(pointer, nbytes, None, self.index)
        start = self._cupy.cuda.MemoryPointer(memory, 0)
        return self._cupy.ndarray(shape, dtype=dtype, memptr=start)

    def poison(self, pointer: int, nbytes: int) -> None:
        """Set all bits: NaN in every floating-point type, -1 in every integer."""
        self.set_bytes(pointer, POISON, nbytes)

    def fill(self, pointer: int, nbytes: int, kind: str) -> None:
        """Fill memory with random data, in stream order.

        Parameters
        ----------
        pointer, nbytes:
            The memory; a multiple of 16 bytes.
        kind:
            An array type: normally distributed numbers.  "int32 sums", "float32 sums": such as
            accumulators hold.  "scales": positive float32.
        """
        pool = self._pools.get(kind)
        if pool is None:
            pool = self._pools[kind] = self.upload(_random(kind))
        # No two buffers begin alike, and no two rows of one are equal: the pool's length is no
        # multiple of a row's.
        self._fills += 1
        begin = self._fills * 16 * 49_999 % pool.nbytes
        done = 0
        while done < nbytes:
            size = min(pool.nbytes - begin, nbytes - done)
            self.copy(pointer + done, pool.pointer + begin, size)
            done += size
            begin = 0

    def random(self, nbytes: int, kind: str) -> Memory:
        """New memory, rounded up to 16 bytes, filled by :meth:`fill`."""
        rounded = -(-nbytes // 16) * 16
        memory = self.allocate(rounded)
        try:
            self.fill(memory.pointer, rounded, kind)
        except BaseException:
            memory.close()
            raise
        return memory

    # Time.

    def capture(self, work: Callable[[], None]) -> Graph:
        """What ``work`` launches on the stream, as a graph."""
        with on_device(self.index):
            return _Captured(captured(self._stream, work), self._stream)

    def event(self) -> Any:
        """Mark the stream's present end."""
        event = self._cupy.cuda.Event()
        event.record(self._stream)
        return event

    def elapsed_us(self, begin: Any, end: Any) -> float:
        """Microseconds between two marks; waits for the later one."""
        end.synchronize()
        return float(self._cupy.cuda.get_elapsed_time(begin, end)) * 1e3

    def synchronize(self) -> None:
        """Wait for the stream."""
        self._stream.synchronize()

    def close(self) -> None:
        """Give the pools back."""
        self.synchronize()
        for pool in self._pools.values():
            pool.close()
        self._pools.clear()


class _Captured:
    """A CuPy graph and the stream it is replayed on."""

    __slots__ = ("_graph", "_stream")

    def __init__(self, graph: Any, stream: Any) -> None:
        self._graph = graph
        self._stream = stream

    def launch(self) -> None:
        self._graph.launch(self._stream)


def _random(kind: str) -> NDArray:
    rng = np.random.default_rng(len(kind))
    normal = rng.standard_normal(POOL, dtype=np.float32)
    if kind == "int32 sums":
        return (normal * 1e5).astype(np.int32)
    if kind == "float32 sums":
        return normal * np.float32(1e3)
    if kind == "scales":
        return np.abs(normal) * np.float32(0.01) + np.float32(1e-4)
    if kind not in {row.name for row in ARRAY_TYPES}:
        raise ValueError(f"there is no random data of kind {kind!r}")
    return normal.astype(array_type(kind).dtype)


# --- burst and sustained --------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Times:
    """Times of one side.

    Attributes
    ----------
    us:
        Median over rounds, in microseconds, of one unit of work.
    low, high:
        Fastest and slowest round.
    rounds:
        Rounds.
    replays:
        Replays timed together (burst), or counted in all (sustained).
    clocks:
        What :class:`Clocks` saw meanwhile; values are ``None`` without NVML.
    """

    us: float
    low: float
    high: float
    rounds: int
    replays: int
    clocks: dict[str, float | None]

    def to_json(self) -> dict[str, Any]:
        """Everything but the median, which stands elsewhere."""
        return {
            "low_us": self.low,
            "high_us": self.high,
            "rounds": self.rounds,
            "replays": self.replays,
            "clocks": self.clocks,
        }


def warm(gpu: Gpu, graphs: Mapping[str, Graph], *, least_us: float = _WARM_US) -> dict[str, float]:
    """Replay all graphs for a while; returns a first estimate of each one's microseconds."""
    estimates: dict[str, float] = {}
    for name, graph in graphs.items():
        graph.launch()  # the first replay may load code
        count, total, replays = 2, 0.0, 0
        while True:
            begin = gpu.event()
            for _ in range(count):
                graph.launch()
            spent = gpu.elapsed_us(begin, gpu.event())
            total += spent
            replays += count
            estimates[name] = max(spent / count, 0.1)
            if total >= least_us / len(graphs) or replays >= _MOST_WARM:
                break
            count = int(min(1000, max(2, least_us / len(graphs) / estimates[name])))
    return estimates


def burst(
    gpu: Gpu,
    graphs: Mapping[str, Graph],
    *,
    rounds: int = 20,
    clocks: Clocks | None = None,
    least_warm_us: float = _WARM_US,
) -> dict[str, Times]:
    """Time graphs against each other: warm, in shuffled rounds."""
    estimates = warm(gpu, graphs, least_us=least_warm_us)
    replays = {
        name: int(min(_MOST_REPLAYS, max(1, -(-_UNIT_US // us)))) for name, us in estimates.items()
    }
    shuffle = random.Random(0).shuffle
    order = list(graphs)
    marks: list[tuple[str, Any, Any]] = []
    started = time.monotonic()
    for _ in range(rounds):
        shuffle(order)
        for name in order:
            graph = graphs[name]
            begin = gpu.event()
            for _ in range(replays[name]):
                graph.launch()
            marks.append((name, begin, gpu.event()))
    gpu.synchronize()
    seen = clocks.since(started) if clocks is not None else Clocks.nothing()
    found: dict[str, list[float]] = {name: [] for name in graphs}
    for name, begin, end in marks:
        found[name].append(gpu.elapsed_us(begin, end) / replays[name])
    return {
        name: Times(statistics.median(us), min(us), max(us), rounds, replays[name], seen)
        for name, us in found.items()
    }


def sustained(
    gpu: Gpu,
    graphs: Mapping[str, Graph],
    *,
    seconds: float = 1.0,
    rounds: int = 2,
    clocks: Clocks | None = None,
) -> dict[str, Times]:
    """Time each graph alone for ``seconds``, counting the last half; rounds alternate."""
    estimates = warm(gpu, graphs)
    found: dict[str, list[float]] = {name: [] for name in graphs}
    counted = dict.fromkeys(graphs, 0)
    seen: dict[str, list[dict[str, float | None]]] = {name: [] for name in graphs}
    for number in range(rounds):
        names = list(graphs)[:: 1 if number % 2 == 0 else -1]
        for name in names:
            chunk = int(max(1, _CHUNK_US // estimates[name]))
            us, replays, middle = _alone(gpu, graphs[name], chunk, seconds * 1e6)
            found[name].append(us)
            counted[name] += replays
            seen[name].append(clocks.since(middle) if clocks is not None else Clocks.nothing())
    return {
        name: Times(
            statistics.median(us),
            min(us),
            max(us),
            rounds,
            counted[name],
            {key: mean([entry[key] for entry in seen[name]]) for key in Clocks.nothing()},
        )
        for name, us in found.items()
    }


def _alone(gpu: Gpu, graph: Graph, chunk: int, least_us: float) -> tuple[float, int, float]:
    """Replay for ``least_us``; (microseconds of a replay, replays counted, when the half began)."""
    marks = [gpu.event()]
    heard: list[float] = []  # host time at which each mark was seen to be reached
    while True:
        for _ in range(chunk):
            graph.launch()
        marks.append(gpu.event())
        # Two chunks stay queued, so that the GPU never waits for the host.
        if len(marks) > 2:
            spent = gpu.elapsed_us(marks[0], marks[-3])
            heard.append(time.monotonic())
            if spent >= least_us:
                break
    ends = [gpu.elapsed_us(marks[0], mark) for mark in marks]
    half = next(index for index, end in enumerate(ends) if end >= ends[-1] / 2)
    half = min(half, len(ends) - 2)
    replays = chunk * (len(ends) - 1 - half)
    return (ends[-1] - ends[half]) / replays, replays, heard[min(half, len(heard) - 1)]
