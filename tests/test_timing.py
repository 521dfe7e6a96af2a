"""How launches are timed against each other while clocks change; a stand-in for CuPy's events."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
from fake_gpu import RuntimeFault
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_rt.backends import timing
from slidesparse_rt.backends.timing import balanced, fastest, launch_times
from slidesparse_rt.errors import DeviceMemoryError, LibraryError

TIMES = st.floats(1e-3, 1e4)
#: Streams: the caller's, and the one that is timed on.
STREAM, OWN = 3, 4


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
    """A GPU whose clock falls under load, and a host that takes time to give it work.

    Milliseconds are those at full clock.
    """

    #: Of the host, for a launch, for replaying a graph and for an event.
    LAUNCH, REPLAY, EVENT = 0.02, 0.005, 0.002

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.host, self.now, self.busy, self.synchronized = 0.0, 0.0, 0.0, 0
        self.launched: list[int] = []
        self.flushes = 0
        self.recording: list[Callable[[], None]] | None = None
        #: The status with which graphs fail, if not 0.
        self.full = 0
        machine = self

        class Event:
            def record(self, stream: Any) -> None:
                assert machine.recording is None
                machine.host += machine.EVENT
                self.at = machine.now = max(machine.now, machine.host)
                self.due = machine.synchronized + 1

        class Graph:
            def __init__(self, works: list[Callable[[], None]]) -> None:
                self.works = works

            def upload(self, stream: Any) -> None:
                if machine.full:
                    raise RuntimeFault(machine.full)

            def launch(self, stream: Any) -> None:
                assert machine.recording is None
                assert machine.synchronized, "operands may not be there yet"
                machine.host += machine.REPLAY
                for work in self.works:
                    work()

        class Stream:
            ptr = OWN

            def __init__(self, *, non_blocking: bool = False) -> None:
                assert non_blocking  # the default stream would wait for others

            def __enter__(self) -> None:
                pass

            def __exit__(self, *_: Any) -> None:
                pass

            def synchronize(self) -> None:
                machine.synchronize()

            def begin_capture(self) -> None:
                machine.recording = []

            def end_capture(self) -> Graph:
                recorded, machine.recording = machine.recording, None
                assert recorded is not None
                return Graph(recorded)

        def elapsed(begin: Event, end: Event) -> float:
            assert machine.synchronized >= end.due, "the GPU is not there yet"
            return float(end.at - begin.at)

        runtime = SimpleNamespace(CUDARuntimeError=RuntimeFault)
        cuda = SimpleNamespace(
            Event=Event, Stream=Stream, get_elapsed_time=elapsed, runtime=runtime
        )
        monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=cuda))
        monkeypatch.setattr(timing, "cupy_stream", lambda stream: machine)

    def synchronize(self) -> None:
        self.synchronized += 1
        self.host = max(self.host, self.now)

    def launch(self, name: int, milliseconds: float) -> Callable[[int], None]:
        def work() -> None:
            self.launched.append(name)
            # Over 100 ms of work down to two thirds of the clock.
            slow = 1 + 0.5 * min(1.0, self.busy / 100)
            self.now = max(self.now, self.host) + milliseconds * slow
            self.busy += milliseconds

        def run(stream: int) -> None:
            self.host += self.LAUNCH
            if self.recording is None:
                assert stream == STREAM
                work()
            else:
                assert stream == OWN
                self.recording.append(work)

        return run

    def flush(self, stream: int) -> None:
        assert stream == OWN
        assert self.recording is None
        self.flushes += 1
        self.host += self.LAUNCH
        self.now = max(self.now, self.host) + 0.04


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(monkeypatch)


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("scale", [0.004, 0.01, 0.3, 3.0])
def test_the_fastest_is_found_while_the_clock_falls(
    machine: Machine, scale: float, cold: bool
) -> None:
    """Also of launches that take the GPU less time than the host."""
    times = [1.02, 1.05, 1.0, 1.04, 1.3]
    runs = [machine.launch(i, scale * time) for i, time in enumerate(times)]
    before = machine.flush if cold else None
    found = launch_times(runs, STREAM, before=before)
    for i, time in enumerate(times):
        assert found[i] / found[2] == pytest.approx(time, rel=0.03 if scale == 3.0 else 0.01)
    assert scale * 0.99 < found[2] < 1.6 * scale
    assert fastest(runs, STREAM, before=before) == 2


@pytest.mark.parametrize(
    ("milliseconds", "ahead", "rounds"), [(0.2, 5, 15), (2.0, 5, 12), (10.0, 1, 5), (50.0, 0, 5)]
)
def test_shorter_launches_are_timed_more_often(
    machine: Machine, milliseconds: float, ahead: int, rounds: int
) -> None:
    halves = [machine.launch(0, milliseconds / 2), machine.launch(1, milliseconds / 2)]
    launch_times(halves, STREAM)
    # Once to see whether it runs, once to see how many make a unit, twice to see what is hopeless.
    assert machine.launched.count(0) == machine.launched.count(1) == 4 + ahead + rounds


@pytest.mark.parametrize(
    ("milliseconds", "together"), [(0.001, 15), (0.02, 4), (0.03, 3), (0.2, 1)]
)
def test_short_launches_follow_each_other_where_the_cache_stays_warm(
    machine: Machine, milliseconds: float, together: int
) -> None:
    launch_times([machine.launch(0, milliseconds)], STREAM)
    # The first time that it is timed the host's part is in it.
    assert machine.launched.count(0) == 2 + together * (2 + 5 + 15)
    machine.launched.clear()
    launch_times([machine.launch(0, milliseconds)], STREAM, before=machine.flush)
    assert machine.launched.count(0) == machine.flushes + 1 == 1 + 2 + 5 + 15


def test_the_order_changes_from_round_to_round(machine: Machine) -> None:
    launch_times([machine.launch(i, 1.0) for i in range(5)], STREAM)
    rounds = [tuple(machine.launched[i : i + 5]) for i in range(0, len(machine.launched), 5)]
    assert all(sorted(order) == [0, 1, 2, 3, 4] for order in rounds)
    assert len(set(rounds)) > len(rounds) // 2


def test_the_hopeless_are_left_after_two_rounds(machine: Machine) -> None:
    runs = [machine.launch(i, time) for i, time in enumerate([1.5, 1.0, 1.3, 3.0])]
    assert set(launch_times(runs, STREAM, within=1.4)) == {1, 2}
    counts = [machine.launched.count(i) for i in range(4)]
    assert counts[0] == counts[3] == 4 < counts[1] == counts[2]
    assert set(launch_times(runs, STREAM)) == {0, 1, 2, 3}
    machine.launched.clear()
    assert fastest(runs, STREAM) == 1
    assert machine.launched.count(0) == 4 < machine.launched.count(2)


def test_a_disturbance_makes_nothing_hopeless(machine: Machine) -> None:
    seen: list[int] = []

    class Launched(list[int]):
        def append(self, name: int) -> None:
            if name == 0:
                seen.append(name)
                # The first of the two rounds that tell.
                machine.now += 20.0 if len(seen) == 3 else 0.0

    machine.launched = Launched()
    assert fastest([machine.launch(0, 1.0), machine.launch(1, 1.2)], STREAM) == 0
    assert len(seen) > 10


def test_what_is_refused_is_left_out(machine: Machine) -> None:
    def refused(stream: int) -> None:
        raise LibraryError("no such algorithm")

    runs = [refused, machine.launch(1, 2.0), refused]
    found = launch_times(runs, STREAM, before=machine.flush)
    # What comes before is not timed.
    assert found == {1: pytest.approx(2.0, rel=0.2)}
    assert machine.flushes == len(machine.launched) - 1
    with pytest.raises(LibraryError, match="no such algorithm"):
        launch_times([refused], STREAM)

    def never_captured(stream: int) -> None:
        if stream == OWN:
            raise LibraryError("not in a graph")

    assert set(launch_times([never_captured, machine.launch(1, 2.0)], STREAM)) == {1}
    assert machine.recording is None  # the capture has ended
    with pytest.raises(LibraryError, match="not in a graph"):
        launch_times([never_captured], STREAM)
    with pytest.raises(LibraryError, match="nothing to time"):
        launch_times([], STREAM)


def test_graphs_for_which_there_is_no_memory(machine: Machine) -> None:
    """The backends then go on without a choice; other faults of CUDA refuse a launch."""
    runs = [machine.launch(0, 1.0)]
    machine.full = 2  # cudaErrorMemoryAllocation
    with pytest.raises(
        DeviceMemoryError, match="capturing a CUDA graph failed: status 2"
    ) as raised:
        launch_times(runs, STREAM)
    assert raised.value.status == 2
    machine.full = 900
    with pytest.raises(LibraryError, match="status 900") as other:
        launch_times(runs, STREAM)
    assert not isinstance(other.value, DeviceMemoryError)
    machine.full = 0
    assert set(launch_times(runs, STREAM)) == {0}
