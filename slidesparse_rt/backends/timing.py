"""Timing launches on a stream, to choose among algorithms."""

from __future__ import annotations

import contextlib
import random
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from ..device_arrays import cupy_stream
from ..errors import LibraryError

__all__ = ["captured", "fastest", "medians"]


def captured(stream: Any, work: Callable[[], None]) -> Any:
    """What ``work`` launches on CuPy's ``stream``, as a graph that is ready on the device."""
    with stream:
        stream.begin_capture()
        try:
            work()
        except BaseException:
            # The capture has to end, and what went wrong in it matters more.
            with contextlib.suppress(Exception):
                stream.end_capture()
            raise
        graph = stream.end_capture()
        graph.upload(stream)
    return graph


def fastest(runs: Sequence[Callable[[], None]], stream: int) -> int:
    """Index of the launch with the lowest of :func:`medians`."""
    times = medians(runs, stream)
    return min(times, key=lambda index: times[index])


def medians(
    runs: Sequence[Callable[[], None]],
    stream: int,
    *,
    rounds: int = 5,
    before: Callable[[], None] | None = None,
) -> dict[int, float]:
    """Median milliseconds of launches over shuffled rounds, by index.

    A launch that the library refuses is left out.  ``before`` is called ahead of each and not
    timed.  Raises LibraryError if all are refused.
    """
    import cupy

    external = cupy_stream(stream)
    times: dict[int, list[float]] = {}
    refusal: LibraryError | None = None
    for index, run in enumerate(runs):
        try:
            run()
        except LibraryError as error:
            refusal = error
        else:
            times[index] = []
    if not times:
        raise refusal if refusal is not None else LibraryError("there is nothing to time")
    order = list(times)
    shuffle = random.Random(0).shuffle
    pairs = []
    for _ in range(rounds):
        shuffle(order)
        for index in order:
            if before is not None:
                before()
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record(external)
            runs[index]()
            end.record(external)
            pairs.append((index, begin, end))
    external.synchronize()
    for index, begin, end in pairs:
        times[index].append(cupy.cuda.get_elapsed_time(begin, end))
    return {index: statistics.median(found) for index, found in times.items()}
