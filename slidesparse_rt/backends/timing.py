"""Timing launches on a stream, to choose among algorithms."""

from __future__ import annotations

import contextlib
import math
import random
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from ..device_arrays import cupy_stream
from ..errors import LibraryError

__all__ = ["balanced", "captured", "fastest", "launch_times"]

_Key = TypeVar("_Key")

#: Milliseconds of running ahead of what is timed, and most rounds of it: short launches need little
#: power.
_AHEAD_MS, _MOST_AHEAD = 20.0, 5
#: Milliseconds that the rounds take together, without what comes before each launch, within these
#: bounds.
_ROUNDS_MS, _FEWEST_ROUNDS, _MOST_ROUNDS = 25.0, 5, 15
#: Less than events tell apart, in any unit.
_LEAST_TIME = 1e-6


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
    """Index of the launch with the lowest of :func:`launch_times`."""
    times = launch_times(runs, stream)
    return min(times, key=lambda index: times[index])


def launch_times(
    runs: Sequence[Callable[[], None]],
    stream: int,
    *,
    before: Callable[[], None] | None = None,
) -> dict[int, float]:
    """Milliseconds of launches, by index: :func:`balanced` over shuffled rounds of all of them.

    A launch that the library refuses is left out.  ``before`` is called ahead of each and not
    timed.  Raises LibraryError if all are refused, or if one that ran does not run again.
    """
    import cupy

    external = cupy_stream(stream)
    order: list[int] = []
    refusal: LibraryError | None = None
    for index, run in enumerate(runs):
        try:
            run()
        except LibraryError as error:
            refusal = error
        else:
            order.append(index)
    if not order:
        raise refusal if refusal is not None else LibraryError("there is nothing to time")
    shuffle = random.Random(0).shuffle

    def timed(rounds: int) -> list[dict[int, float]]:
        marks = []
        for _ in range(rounds):
            shuffle(order)
            of_round = {}
            for index in order:
                if before is not None:
                    before()
                begin, end = cupy.cuda.Event(), cupy.cuda.Event()
                begin.record(external)
                runs[index]()
                end.record(external)
                of_round[index] = (begin, end)
            marks.append(of_round)
        external.synchronize()
        return [
            {index: cupy.cuda.get_elapsed_time(*pair) for index, pair in of_round.items()}
            for of_round in marks
        ]

    once = max(_LEAST_TIME, sum(timed(1)[0].values()))
    # Under a load that lasts clocks fall to what power allows, over some tens of milliseconds.
    timed(min(_MOST_AHEAD, int(_AHEAD_MS / once)))
    return balanced(timed(min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, int(_ROUNDS_MS / once)))))


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
