"""How launches are timed against each other while clocks change; a stand-in for CuPy's events."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_rt.backends import timing
from slidesparse_rt.backends.timing import balanced, fastest, launch_times
from slidesparse_rt.errors import LibraryError

TIMES = st.floats(1e-3, 1e4)


@given(
    st.lists(TIMES, min_size=1, max_size=6),
    st.lists(st.floats(0.25, 4.0), min_size=1, max_size=9),
)
def test_what_slows_whole_rounds_changes_no_ratio(times: list[float], clocks: list[float]) -> None:
    found = balanced([{i: time * slow for i, time in enumerate(times)} for slow in clocks])
    for i, time in enumerate(times):
        assert found[i] / found[0] == pytest.approx(time / times[0], rel=1e-9)
    # And in absolute terms it is a round in the middle.
    assert min(clocks) * 0.999 <= found[0] / times[0] <= max(clocks) * 1.001


@given(st.lists(TIMES, min_size=1, max_size=5), st.integers(0, 6), st.floats(1.0, 100.0))
def test_one_disturbed_round_changes_nothing(times: list[float], which: int, by: float) -> None:
    rounds = [dict(enumerate(times)) for _ in range(7)]
    rounds[which][0] *= by
    assert balanced(rounds) == pytest.approx(dict(enumerate(times)))


def test_a_disturbance_while_the_clock_falls() -> None:
    """In the round of a plain median the wrong one would win."""
    clocks = (1.0, 1.05, 1.1, 1.15, 1.2, 1.25, 1.3)
    rounds = [{"a": clock, "b": 1.02 * clock} for clock in clocks]
    rounds[3]["a"] *= 1.03
    found = balanced(rounds)
    assert found["b"] / found["a"] == pytest.approx(1.02)


def test_events_that_are_too_close_count_as_short() -> None:
    assert balanced([{"a": 0.0, "b": 1.0}])["a"] == pytest.approx(1e-6)


class Machine:
    """A GPU whose clock falls under load; launches take milliseconds at full clock."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.busy, self.launched, self.flushes = 0.0, 0.0, [], 0
        self.synchronized = 0
        machine = self

        class Event:
            def record(self, stream: Any) -> None:
                assert stream is machine
                self.at, self.due = machine.now, machine.synchronized + 1

        def elapsed(begin: Event, end: Event) -> float:
            assert machine.synchronized >= end.due, "the GPU is not there yet"
            return float(end.at - begin.at)

        cuda = SimpleNamespace(Event=Event, get_elapsed_time=elapsed)
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(timing, "cupy_stream", lambda stream: machine)

    def synchronize(self) -> None:
        self.synchronized += 1

    def launch(self, name: int, milliseconds: float) -> Callable[[], None]:
        def run() -> None:
            self.launched.append(name)
            # Over 100 ms of work down to two thirds of the clock.
            slow = 1 + 0.5 * min(1.0, self.busy / 100)
            self.now += milliseconds * slow
            self.busy += milliseconds

        return run

    def flush(self) -> None:
        self.flushes += 1
        self.now += 50.0


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("scale", [0.01, 0.3, 3.0])
def test_the_fastest_is_found_while_the_clock_falls(machine: Machine, scale: float) -> None:
    times = [1.02, 1.05, 1.0, 1.04, 1.3]
    runs = [machine.launch(i, scale * time) for i, time in enumerate(times)]
    found = launch_times(runs, 0)
    for i, time in enumerate(times):
        assert found[i] / found[2] == pytest.approx(time, rel=0.03 if scale == 3.0 else 0.01)
    assert fastest(runs, 0) == 2


@pytest.mark.parametrize(
    ("milliseconds", "ahead", "rounds"), [(0.01, 5, 15), (2.0, 5, 12), (10.0, 1, 5), (50.0, 0, 5)]
)
def test_short_launches_are_timed_more_often(
    machine: Machine, milliseconds: float, ahead: int, rounds: int
) -> None:
    launch_times([machine.launch(0, milliseconds / 2), machine.launch(1, milliseconds / 2)], 0)
    # Once to see whether it runs, once to see how long it takes.
    assert machine.launched.count(0) == machine.launched.count(1) == 2 + ahead + rounds


def test_the_order_changes_from_round_to_round(machine: Machine) -> None:
    launch_times([machine.launch(i, 1.0) for i in range(5)], 0)
    rounds = [tuple(machine.launched[i : i + 5]) for i in range(0, len(machine.launched), 5)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in rounds)
    assert len(set(rounds)) > len(rounds) // 2


def test_what_is_refused_is_left_out(machine: Machine) -> None:
    def refused() -> None:
        raise LibraryError("no such algorithm")

    found = launch_times([refused, machine.launch(1, 2.0), refused], 0, before=machine.flush)
    # What comes before is not timed.
    assert found == {1: pytest.approx(2.0, rel=0.2)}
    assert machine.flushes == len(machine.launched) - 1
    with pytest.raises(LibraryError, match="no such algorithm"):
        launch_times([refused], 0)
    calls: list[None] = []

    def once() -> None:
        calls.append(None)
        if len(calls) > 1:
            raise LibraryError("not again")

    with pytest.raises(LibraryError, match="not again"):
        launch_times([once], 0)
    with pytest.raises(LibraryError, match="nothing to time"):
        launch_times([], 0)
