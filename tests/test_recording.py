"""Bound runs as CUDA graphs: launched where they would do the same, and nowhere else."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from fake_cuda import LaunchingCuda
from fake_machine import STREAM, K, Machine, N, make_machine

import slidesparse_rt as ss
from slidesparse_rt.bound import BoundRun
from slidesparse_rt.kernels.recording import Recording


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return make_machine(monkeypatch)


def arrays(m: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(m, K, dtype=torch.bfloat16), torch.zeros(m, N, dtype=torch.bfloat16)


def recorded(machine: Machine, m: int = 5) -> tuple[Any, BoundRun, list[Any]]:
    """A runner, a bound run that was recorded, and what each of its calls launches."""
    runner = machine.runner()
    x, y = arrays(m)
    runner.run(x, None, y, None)
    ran = machine.taken()
    bound = runner.bind(x, None, y, None, graph=True)
    bound()
    assert machine.taken() == ran
    assert len(machine.driver.graphs) == 1
    return runner, bound, ran


def one_by_one(machine: Machine, bound: BoundRun) -> list[Any]:
    """The launches of a call, each a call of the driver: no graph is launched."""
    with pytest.MonkeyPatch.context() as patch:

        def refuses() -> int:
            raise AssertionError("a graph was launched")

        patch.setattr(bound, "_replay", refuses)
        bound()
    return machine.taken()


def test_calls_launch_the_same_as_a_run(machine: Machine) -> None:
    runner = machine.runner()
    x, y = arrays()
    runner.run(x, None, y, None)
    ran = machine.taken()
    bound = runner.bind(x, None, y, None, graph=True)
    for _ in range(4):
        assert bound() is y
        assert machine.taken() == ran
        assert len(machine.driver.graphs) == 1
    assert machine.driver.alive == set()
    assert machine.driver.mode == 0


def test_a_call_is_one_call_of_the_driver(machine: Machine) -> None:
    _, bound, ran = recorded(machine)

    def refuses(entry: str) -> None:
        raise AssertionError("a launch of its own")

    patched: Any = machine.driver
    patched._launch = patched._launch_with_settings = refuses
    bound()
    assert machine.taken() == ran


def test_who_wants_no_graph_gets_none(machine: Machine) -> None:
    bound = machine.runner().bind(arrays()[0], None, None, None)
    for _ in range(6):
        bound()
    assert machine.driver.graphs == {}
    empty = machine.runner().bind(arrays(0)[0], None, None, None, graph=True)
    for _ in range(6):
        empty()
    assert machine.driver.graphs == {}


def test_other_streams_launch_each_kernel(machine: Machine) -> None:
    _, bound, ran = recorded(machine)
    machine.current_stream = 8
    found = one_by_one(machine, bound)
    assert {launch["stream"] for launch in found} == {8}
    assert found[0]["values"][2] != ran[0]["values"][2]  # workspace of that stream
    machine.current_stream = STREAM
    bound()
    assert machine.taken() == ran
    assert len(machine.driver.graphs) == 1


def test_a_capture_gets_the_kernels(machine: Machine) -> None:
    """A graph cannot be launched on a stream that is captured."""
    _, bound, ran = recorded(machine)
    machine.capturing = {STREAM}
    assert one_by_one(machine, bound) == ran
    machine.capturing = set()
    bound()
    assert machine.taken() == ran


def test_calls_that_are_captured_record_nothing(machine: Machine) -> None:
    bound = machine.runner().bind(arrays()[0], None, None, None, graph=True)
    machine.capturing = {STREAM}
    for _ in range(3):
        bound()
    assert machine.driver.graphs == {}
    machine.capturing = set()
    bound()
    assert len(machine.driver.graphs) == 1


def test_a_workspace_that_moved_is_recorded_again(machine: Machine) -> None:
    runner, bound, ran = recorded(machine)
    (first,) = machine.driver.graphs
    # More streams move nothing.
    machine.current_stream = 8
    runner.run(arrays()[0], None, None, None)
    machine.current_stream = STREAM
    bound()
    assert list(machine.driver.graphs) == [first]
    # Nor does it matter here that another stream's block moves.
    machine.current_stream = 8
    runner.run(torch.zeros(5000, K), None, None, None)
    assert runner.workspace.moves == 1
    machine.current_stream = STREAM
    machine.taken()
    for _ in range(2):
        bound()
        assert machine.taken() == ran
    assert list(machine.driver.graphs) == [first]
    runner.run(torch.zeros(5000, K), None, None, None)
    machine.taken()
    for _ in range(2):
        bound()
        quantize, multiply = machine.taken()
        assert quantize["values"][2] != ran[0]["values"][2]
        assert multiply["values"][7] != ran[1]["values"][7]
        assert {quantize["stream"], multiply["stream"]} == {STREAM}
    (second,) = machine.driver.graphs
    assert second != first
    # What moved while it is captured is recorded after that.
    runner.run(torch.zeros(9000, K), None, None, None)
    machine.taken()
    machine.capturing = {STREAM}
    captured = one_by_one(machine, bound)
    machine.capturing = set()
    bound()
    assert machine.taken() == captured
    assert second not in machine.driver.graphs


def test_a_part_of_the_multiprocessors(machine: Machine) -> None:
    """A graph's kernels would run on all of them."""
    machine.kernels.green = {STREAM}
    bound = machine.runner().bind(arrays()[0], None, None, None, graph=True)
    for _ in range(6):
        bound()
    assert machine.driver.graphs == {}
    assert len(machine.taken()) == 12


@pytest.mark.parametrize(
    "function",
    [
        "cuStreamCreate",
        "cuStreamBeginCapture_v2",
        "cuStreamEndCapture",
        "cuGraphInstantiateWithFlags",
    ],
)
def test_a_driver_that_makes_no_graph(machine: Machine, function: str) -> None:
    runner = machine.runner()
    x, y = arrays()
    runner.run(x, None, y, None)
    ran = machine.taken()
    machine.driver.refuse[function] = 2
    bound = runner.bind(x, None, y, None, graph=True)
    for _ in range(6):
        bound()
        assert machine.taken() == ran
    machine.driver.refuse.clear()
    bound()
    assert machine.taken() == ran
    assert bound._recording is None  # type: ignore[attr-defined]
    if function != "cuStreamEndCapture":  # which leaves the stand-in's own book open
        assert machine.driver.graphs == {}
        assert machine.driver.alive == set()


@pytest.mark.parametrize("status", [900, 901])
def test_a_recording_that_another_thread_spoils_is_tried_again(
    machine: Machine, status: int
) -> None:
    """By waiting for the device, which CUDA refuses to both."""
    bound = machine.runner().bind(arrays()[0], None, None, None, graph=True)
    machine.driver.refuse["cuStreamEndCapture"] = status
    for _ in range(3):
        bound()
    launched = machine.taken()
    assert len(launched) == 2 * 3
    machine.driver.refuse.clear()
    bound()
    assert machine.taken() == launched[:2]
    assert bound._replay_stream == STREAM  # type: ignore[attr-defined]


def test_no_memory_to_bring_a_graph_to_the_gpu(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    bound = machine.runner().bind(arrays()[0], None, None, None, graph=True)
    monkeypatch.setattr(Recording, "on", lambda self, stream: lambda: 2)
    for _ in range(3):
        bound()
    assert len(machine.taken()) == 2 * 3
    assert machine.driver.graphs == {}


def test_a_forked_child_leaves_the_graph_alone(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, bound, _ = recorded(machine)
    monkeypatch.setattr("os.getpid", lambda: -1)
    del bound
    gc.collect()
    assert len(machine.driver.graphs) == 1


def test_launches_that_fail_while_they_are_recorded(machine: Machine) -> None:
    bound = machine.runner().bind(arrays()[0], None, None, None, graph=True)
    machine.driver.status = 700
    with pytest.raises(ss.LibraryError, match="cuLaunchKernelEx returned 700"):
        bound()
    machine.driver.status = 0
    assert machine.driver.graphs == {}
    assert machine.driver.alive == set()
    bound()
    assert len(machine.taken()) == 2


def test_errors_of_a_launch(machine: Machine) -> None:
    _, bound, ran = recorded(machine)
    machine.driver.status = 700
    with pytest.raises(ss.LibraryError, match="cuGraphLaunch returned 700"):
        bound()
    machine.driver.status = 0
    bound()
    assert machine.taken() == ran
    # A thread without a context gets one, for a launch and for a recording.
    for before in (1, 0):
        bound = machine.runner().bind(*arrays()[:1], None, None, None, graph=True)
        for _ in range(before):
            bound()
        machine.taken()
        with machine.without_context() as asked:
            bound()
        assert asked == [0]
        assert len(machine.taken()) == 2
        assert bound._replay_stream == STREAM  # type: ignore[attr-defined]


def test_what_protects_users_still_does(machine: Machine) -> None:
    runner, bound, _ = recorded(machine)
    kept = bound.x.data
    bound.x.data = torch.zeros_like(bound.x)
    with pytest.raises(ss.ArrayError, match="x lies elsewhere"):
        bound()
    bound.x.data = kept
    machine.device = 3
    bound()
    assert (machine.device, machine.devices) == (3, [0, 3])
    machine.taken()
    machine.current_stream = 2
    with pytest.raises(ss.OptionError, match="per-thread default stream"):
        bound()
    machine.current_stream = STREAM
    runner.close()
    with pytest.raises(ss.PlanClosed):
        bound()
    assert machine.taken() == []


def test_a_stream_that_is_given(machine: Machine) -> None:
    x, y = arrays()
    bound = machine.runner().bind(x, None, y, 50, graph=True)
    machine.ordered.clear()
    for _ in range(6):
        bound()
        assert {launch["stream"] for launch in machine.taken()} == {50}
    assert len(machine.driver.graphs) == 1
    assert machine.ordered == [(STREAM, 50)] * 6
    assert machine.shared == [50, 50] * 6


def test_long_runs_are_one_graph(machine: Machine) -> None:
    runner = machine.runner()
    (form,) = runner._forms.values()
    form.most = 256
    x, y = arrays(600)
    runner.run(x, None, y, None)
    ran = machine.taken()
    bound = runner.bind(x, None, y, None, graph=True)
    for _ in range(6):
        bound()
        assert machine.taken() == ran
    assert [len(launches) for launches in machine.driver.graphs.values()] == [6]


def test_a_graph_goes_with_its_run(machine: Machine) -> None:
    _, bound, _ = recorded(machine)
    del bound
    gc.collect()
    assert machine.driver.graphs == {}


def test_the_first_launch_of_a_graph_is_exempt_from_captures(machine: Machine) -> None:
    """It brings the graph to the GPU, which a capture of another thread might not stand."""
    bound = machine.runner().bind(arrays()[0], None, None, None, graph=True)
    relaxed: list[int] = []
    machine.driver.before = lambda entry: relaxed.append(machine.relaxed)
    bound()
    # Recorded, then launched.
    assert len(relaxed) == 4
    assert all(relaxed)
    relaxed.clear()
    bound()
    assert relaxed == [0, 0]


def test_a_function_that_fails_leaves_no_stream_captured() -> None:
    cuda = LaunchingCuda()

    def fails(stream: int) -> None:
        assert stream in cuda.captured
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Recording(cuda, fails)
    assert (cuda.captured, cuda.graphs, cuda.alive, cuda.mode) == ({}, {}, set(), 0)
