"""Timing launches on a stream, to choose among algorithms."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar

from ..device_arrays import cupy_stream
from ..errors import DeviceMemoryError, LibraryError
from .gpu_device import cuda_errors

__all__ = ["balanced", "captured", "fastest", "launch_times", "repeats_of", "shuffled_rounds"]

_Key = TypeVar("_Key")

#: Milliseconds of running ahead of what is timed, and most rounds of it: short launches need little
#: power.
_AHEAD_MS, _MOST_AHEAD = 20.0, 5
#: Milliseconds that the rounds take together, without what comes before each launch, within these
#: bounds.
_ROUNDS_MS, _FEWEST_ROUNDS, _MOST_ROUNDS = 25.0, 5, 15
#: Milliseconds between two events at least where nothing comes before a launch, and most launches
#: between them: the host takes longer for one than a GPU does for the shortest.
_UNIT_MS, _MOST_REPEATS = 0.1, 16
#: Rounds after which what takes so many times as long as the fastest is timed no longer.
_TRIALS, _HOPELESS = 2, 1.4
#: Less than events tell apart, in any unit.
_LEAST_TIME = 1e-6


def captured(stream: Any, work: Callable[[], None]) -> Any:
    """What ``work`` launches on CuPy's ``stream``, as a graph that is ready on the device.

    Raises what ``work`` does; LibraryError, DeviceMemoryError if CUDA makes no graph of it.
    """
    with cuda_errors("capturing a CUDA graph"), stream:
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


def fastest(
    runs: Sequence[Callable[[int], None]],
    stream: int,
    *,
    before: Callable[[int], None] | None = None,
) -> int:
    """Index of the launch with the lowest of :func:`launch_times`; the hopeless are left early.

    Raises as that does.
    """
    times = launch_times(runs, stream, before=before, within=_HOPELESS)
    return min(times, key=lambda index: times[index])


def launch_times(
    runs: Sequence[Callable[[int], None]],
    stream: int,
    *,
    before: Callable[[int], None] | None = None,
    within: float = math.inf,
) -> dict[int, float]:
    """Milliseconds of launches, by index: :func:`balanced` over shuffled rounds of all of them.

    They are replayed as graphs, so that the host's speed plays no part; waits for ``stream`` first.

    Parameters
    ----------
    runs:
        Each launches on the stream at the address that it is given.
    stream:
        Address of the stream on which their operands were made.
    before:
        Called with a stream ahead of each, and not timed; ``None``: as many launches follow each
        other as events can tell.
    within:
        What takes more than so many times the fastest in two rounds is left out.

    Returns
    -------
    dict
        A launch that the library refuses, or that cannot be captured, is left out, too.

    Raises
    ------
    LibraryError
        If all are refused.
    DeviceMemoryError
        If there is no memory for graphs.
    """
    import cupy

    with cuda_errors("making a stream"):
        own = cupy.cuda.Stream(non_blocking=True)
    works: dict[int, Callable[[], None]] = {}
    refusal: LibraryError | None = None
    for index, run in enumerate(runs):
        try:
            run(stream)
        except LibraryError as error:
            refusal = error
            continue
        try:
            works[index] = _repeated(run, own, 1)
        except DeviceMemoryError:
            raise
        except LibraryError as error:
            refusal = error
    if not works:
        raise refusal if refusal is not None else LibraryError("there is nothing to time")
    cupy_stream(stream).synchronize()
    empty = None if before is None else partial(before, own.ptr)
    shuffle = random.Random(0).shuffle
    repeats = dict.fromkeys(works, 1)

    def timed(rounds: int) -> list[dict[int, float]]:
        return [
            {index: time / repeats[index] for index, time in times.items()}
            for times in shuffled_rounds(works, own, rounds, shuffle, before=empty)
        ]

    if before is None:
        for index, time in timed(1)[0].items():
            repeats[index] = repeats_of(time)
            if repeats[index] > 1:
                works[index] = _repeated(runs[index], own, repeats[index])
    trials = timed(_TRIALS)
    lows = {index: min(times[index] for times in trials) for index in works}
    bound = within * min(lows.values())
    works = {index: work for index, work in works.items() if lows[index] <= bound}
    once = max(_LEAST_TIME, sum(lows[index] * repeats[index] for index in works))
    # Under a load that lasts clocks fall to what power allows, over some tens of milliseconds.
    timed(min(_MOST_AHEAD, int(_AHEAD_MS / once)))
    return balanced(timed(min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, int(_ROUNDS_MS / once)))))


def repeats_of(milliseconds: float) -> int:
    """How many launches of so long each are timed together where the cache stays warm."""
    return min(_MOST_REPEATS, math.ceil(_UNIT_MS / max(milliseconds, _LEAST_TIME)))


def _repeated(run: Callable[[int], None], stream: Any, count: int) -> Callable[[], None]:
    """So many launches of ``run``, to be replayed on CuPy's ``stream``."""

    def launch() -> None:
        for _ in range(count):
            run(stream.ptr)

    return partial(captured(stream, launch).launch, stream)


def shuffled_rounds(
    works: Mapping[_Key, Callable[[], None]],
    stream: Any,
    rounds: int,
    shuffle: Callable[[list[_Key]], None],
    *,
    before: Callable[[], None] | None = None,
) -> list[dict[_Key, float]]:
    """Milliseconds of each work in each round, by events around it; waits until all is done.

    Parameters
    ----------
    works:
        What puts them on CuPy's ``stream``.
    shuffle:
        Changes the order of a list, before each round.
    before:
        Called ahead of each, and not timed.

    Raises what ``works`` and ``before`` do.
    """
    import cupy

    order, marks = list(works), []
    for _ in range(rounds):
        shuffle(order)
        of_round = {}
        for key in order:
            if before is not None:
                before()
            begin, end = cupy.cuda.Event(), cupy.cuda.Event()
            begin.record(stream)
            works[key]()
            end.record(stream)
            of_round[key] = (begin, end)
        marks.append(of_round)
    stream.synchronize()
    return [
        {key: float(cupy.cuda.get_elapsed_time(*pair)) for key, pair in of_round.items()}
        for of_round in marks
    ]


def balanced(rounds: Sequence[Mapping[_Key, float]]) -> dict[_Key, float]:
    """Median of each time over the rounds, without what makes whole rounds faster or slower.

    Clocks change while one measures, by more than what is compared differs.  So each time counts as
    a part of its round's geometric mean, and the median of these means says how long a part is.

    Parameters
    ----------
    rounds:
        Times of the same things in each.
    """
    logs = [
        {key: math.log(max(time, _LEAST_TIME)) for key, time in times.items()} for times in rounds
    ]
    means = [statistics.fmean(times.values()) for times in logs]
    typical = statistics.median(means)
    return {
        key: math.exp(
            typical
            + statistics.median(times[key] - mean for times, mean in zip(logs, means, strict=True))
        )
        for key in logs[0]
    }
