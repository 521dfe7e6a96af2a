"""Runs with fixed buffers: launches are those of run(), and nothing that protects users is lost."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from fake_machine import STREAM, K, Machine, N, make_machine
from plans import fitted, tokens

import slidesparse_rt as ss
from slidesparse_rt import device_arrays, gpu_run
from slidesparse_rt.backends.workspace import COUNTER_BYTES
from slidesparse_rt.bound import BoundRun


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    return make_machine(monkeypatch)


def arrays(m: int = 5) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.zeros(m, K, dtype=torch.bfloat16), torch.zeros(m, N, dtype=torch.bfloat16)


def entries(launches: list[dict[str, Any]]) -> list[str]:
    return [launch["entry"] for launch in launches]


BOTH = ["quantize_lift", "hopper_gemm"]


def test_a_call_launches_what_a_run_launches(machine: Machine) -> None:
    runner = machine.runner()
    x, y = arrays()
    assert runner.run(x, None, y, None) is y
    ran = machine.taken()
    bound = runner.bind(x, None, y, None)
    assert isinstance(bound, BoundRun)
    assert machine.taken() == []
    for _ in range(3):
        assert bound() is y
        assert machine.taken() == ran
    assert entries(ran) == BOTH
    quantize, multiply = ran
    base = next(iter(runner.workspace._blocks.values())).pointer + COUNTER_BYTES
    assert quantize["values"][:3] == [x.data_ptr(), 2 * K, base]
    assert multiply["values"][4:8] == [y.data_ptr(), N, multiply["values"][6], base - COUNTER_BYTES]
    assert {launch["stream"] for launch in ran} == {STREAM}
    assert repr(bound) == f"BoundOnGpu(5x{K} -> 5x{N})"
    assert (bound.x is x, bound.out is y) == (True, True)


def test_strides_and_shapes(machine: Machine) -> None:
    runner = machine.runner()
    wide_x = torch.zeros(3, 4, 2 * K, dtype=torch.float16)
    wide_y = torch.zeros(3, 4, 3 * N, dtype=torch.float16)
    x, y = wide_x[..., :K], wide_y[..., :N]
    assert runner.bind(x, None, y, None)() is y
    quantize, multiply = machine.taken()
    assert quantize["values"][1] == 2 * 2 * K
    assert multiply["values"][5] == 3 * N
    assert multiply["values"][8] == 12  # tokens


def test_a_result_of_its_own(machine: Machine) -> None:
    bound = machine.runner().bind(arrays(3)[0], ss.dtypes.array_type("float32"), None, None)
    assert (bound.out.shape, bound.out.dtype) == ((3, N), torch.float32)
    assert bound() is bound() is bound.out
    assert machine.taken()[1]["values"][4] == bound.out.data_ptr()


def test_no_tokens_launch_nothing(machine: Machine) -> None:
    x, y = arrays(0)
    assert machine.runner().bind(x, None, y, None)() is y
    assert machine.taken() == []


def test_a_closed_plan_launches_nothing(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = machine.runner()
    bound = runner.bind(arrays()[0], None, None, None)
    runner.close()
    with pytest.raises(ss.PlanClosed, match="this plan is closed"):
        bound()
    with pytest.raises(ss.PlanClosed):
        runner.bind(arrays()[0], None, None, None)
    assert machine.taken() == []
    # A workspace that plans share may be closed before them.
    runner = machine.runner()
    bound = runner.bind(arrays()[0], None, None, None)
    runner.workspace.close()
    with pytest.raises(ss.PlanClosed, match="this workspace is closed"):
        bound()
    assert machine.taken() == []


def test_wrong_arguments(machine: Machine) -> None:
    bind = machine.runner().bind
    x, y = arrays()
    grad = torch.zeros(5, K, requires_grad=True)
    for error, says, arguments in [
        (ss.ShapeError, r"\(\.\.\., 128\)", (x[:, 1:], None, y, None)),
        (ss.ShapeError, "out has shape", (x, None, y[1:], None)),
        (ss.DTypeError, "out is float32", (x, None, y.float(), None)),
        (ss.ArrayError, "address range", (x, None, x[:, :N], None)),
        (ss.ArrayError, "share memory", (x, None, y[:1].expand(5, N), None)),
        (ss.ArrayError, "x requires a gradient", (grad, None, None, None)),
        (
            ss.ArrayError,
            "out requires a gradient",
            (x, None, grad[:, :N].detach().clone().requires_grad_(), None),
        ),
        (ss.ArrayError, "is no array", ([1], None, y, None)),
        (ss.ArrayError, "is no array", (x, None, [1], None)),
        (ss.OptionError, "stream is 'x'", (x, None, y, "x")),
        (ss.OptionError, "per-thread default stream", (x, None, y, 2)),
        (ss.DeviceError, "stream is one of cuda:1", (x, None, y, 0x700)),
        (ss.ArrayError, "no memory", (x.to("meta"), None, y, None)),
    ]:
        with pytest.raises(error, match=says):
            bind(*arguments)
    assert machine.taken() == []


def test_a_result_that_is_immutable_is_refused(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen: Any = SimpleNamespace(writable=False)
    runner = machine.runner()
    monkeypatch.setattr(gpu_run, "adapter_of", lambda array: frozen)
    with pytest.raises(ss.ArrayError, match="pass an out= of another library, or call run"):
        runner.bind(arrays()[0], None, None, None)


def test_memory_that_was_exchanged_is_not_used(machine: Machine) -> None:
    x, y = arrays()
    bound = machine.runner().bind(x, None, y, None)
    kept = x.data
    x.data = torch.zeros_like(x)
    with pytest.raises(ss.ArrayError, match="x lies elsewhere in memory than when it was bound"):
        bound()
    x.data = kept
    bound()
    assert entries(machine.taken()) == BOTH
    y.untyped_storage().resize_(0)
    with pytest.raises(ss.ArrayError, match="out lies elsewhere"):
        bound()
    assert machine.taken() == []


def test_the_current_stream_is_followed(machine: Machine) -> None:
    runner = machine.runner()
    bound = runner.bind(arrays()[0], None, None, None)
    seen = []
    for stream in (STREAM, 8, 9, 8, STREAM):
        machine.current_stream = stream
        bound()
        quantize, multiply = machine.taken()
        assert {quantize["stream"], multiply["stream"]} == {stream}
        seen.append(quantize["values"][2])
    # Each stream has its own workspace.
    assert seen[0] == seen[4] != seen[1] == seen[3] != seen[2] != seen[0]
    assert machine.ordered == machine.shared == []


def test_a_stream_that_is_given_waits_for_the_current_one(machine: Machine) -> None:
    bound = machine.runner().bind(arrays()[0], None, None, 50)
    machine.ordered.clear()
    bound()
    assert machine.ordered == [(STREAM, 50)]
    assert {launch["stream"] for launch in machine.taken()} == {50}
    assert machine.shared == [50, 50]  # x and out
    machine.current_stream = 50
    bound()
    assert machine.ordered == [(STREAM, 50)]
    runner = machine.runner()
    x, y = arrays()
    follows = runner.bind(x, None, y, None)
    runner.run(x, None, y, None)
    machine.taken()
    machine.current_stream = 2
    calls: list[Any] = [bound, follows, lambda: runner.run(x, None, y, None)]
    for call in calls:
        with pytest.raises(ss.OptionError, match="per-thread default stream"):
            call()
    assert machine.taken() == []


def test_capture(machine: Machine) -> None:
    runner = machine.runner()
    x, y = arrays()
    machine.capturing = {STREAM}
    with pytest.raises(ss.CaptureError, match="bind\\(\\) cannot be called while"):
        runner.bind(x, None, y, None)
    machine.capturing = set()
    bound = runner.bind(x, None, y, None)
    machine.capturing = {STREAM, 8}
    bound()
    captured = machine.taken()
    assert entries(captured) == BOTH
    machine.current_stream = 8
    with pytest.raises(ss.CaptureError, match=r"prepare\(tokens=\[5\], stream"):
        bound()
    machine.capturing = {8}
    machine.current_stream = STREAM
    with pytest.raises(ss.CaptureError, match="one is being captured"):
        runner.bind(x, None, y, 8)
    assert machine.taken() == []
    # What the graph reads stays, though a larger run moves the stream's workspace.
    machine.capturing = set()
    held = captured[0]["values"][2]
    runner.run(torch.zeros(5000, K), None, None, None)
    assert held - COUNTER_BYTES in {block.pointer for block in runner.workspace._retired}
    machine.taken()
    bound()
    quantize, multiply = machine.taken()
    assert quantize["values"][2] != held
    assert multiply["values"][7] == quantize["values"][2] - COUNTER_BYTES


def test_only_the_first_call_is_exempt_from_captures(machine: Machine) -> None:
    bound = machine.runner().bind(arrays()[0], None, None, None)
    relaxed: list[int] = []
    machine.driver.before = lambda entry: relaxed.append(machine.relaxed)
    for _ in range(3):
        bound()
    assert relaxed == [1, 1, 0, 0, 0, 0]


def test_long_runs_are_split(machine: Machine) -> None:
    runner = machine.runner()
    (form,) = runner._forms.values()
    form.most = 256
    x, y = arrays(600)
    runner.run(x, None, y, None)
    ran = machine.taken()
    bound = runner.bind(x, None, y, None)
    bound()
    assert machine.taken() == ran
    assert [launch["values"][8] for launch in ran[1::2]] == [256, 256, 88]
    assert [launch["values"][0] for launch in ran[::2]] == [
        x.data_ptr() + 2 * K * start for start in (0, 256, 512)
    ]


def test_several_forms(machine: Machine) -> None:
    """The form for the number of tokens is chosen when it is bound."""
    forms = {"few": machine.prepared(), "many": machine.prepared("fp8_e4m3")}
    dispatch = SimpleNamespace(
        backends=tuple(forms), at=lambda tokens: "few" if tokens < 16 else "many"
    )
    runner = machine.runner(forms, dispatch=dispatch)
    for m, name in ((5, "few"), (40, "many")):
        runner.bind(arrays(m)[0], None, None, None)()
        assert machine.taken()[1]["values"][0] == forms[name].packed.pointer


def test_a_thread_without_a_context_gets_one(machine: Machine) -> None:
    """A launch before any call of the CUDA runtime is refused; nothing was launched by then."""
    runner = machine.runner()
    x, y = arrays()
    bound = runner.bind(x, None, y, None)
    calls = [lambda: runner.run(x, None, y, None), bound]
    for call in calls:
        call()
        machine.taken()
        with machine.without_context() as asked:
            call()
        assert asked == [0]
        assert entries(machine.taken()) == BOTH
        for status in (201, 700):  # it does not help; it is something else
            machine.driver.status = status
            with pytest.raises(ss.LibraryError, match=f"cuLaunchKernelEx returned {status}"):
                call()
        machine.driver.status = 0
        call()
        machine.taken()


def test_the_device_is_current_for_the_call_only(machine: Machine) -> None:
    bound = machine.runner().bind(arrays()[0], None, None, None)
    seen: list[int] = []
    machine.driver.before = lambda entry: seen.append(machine.device)
    machine.device = 3
    bound()
    assert seen == [0, 0]
    assert (machine.device, machine.devices) == (3, [0, 3])
    machine.driver.status = 700
    with pytest.raises(ss.LibraryError):
        bound()
    assert machine.device == 3


def test_threads_do_not_interleave(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = machine.runner()
    mine = threading.local()
    monkeypatch.setattr(
        Machine, "current_stream", property(lambda self: getattr(mine, "stream", STREAM)), False
    )
    bounds = [runner.bind(arrays(4)[0], None, None, None) for _ in range(2)]
    x, y = arrays(4)

    def work(stream: int) -> None:
        mine.stream = stream
        for _ in range(30):
            for bound in bounds:
                bound()
            runner.run(x, None, y, None)

    threads = [threading.Thread(target=work, args=(stream,)) for stream in (11, 12, 13)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    launches = machine.taken()
    assert len(launches) == 2 * 3 * 3 * 30
    pairs = set()
    for quantize, multiply in zip(launches[::2], launches[1::2], strict=True):
        assert entries([quantize, multiply]) == BOTH
        assert quantize["stream"] == multiply["stream"]
        base = quantize["values"][2]
        assert multiply["values"][7] == base - COUNTER_BYTES
        pairs.add((quantize["stream"], base, quantize["values"][0], multiply["values"][4]))
    # Each stream one workspace, each x its own result.
    assert len({pair[:2] for pair in pairs}) == 3
    assert len({pair[2:] for pair in pairs}) == 3


def test_arrays_that_order_streams_when_they_are_read(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only the stream of then was made to wait for them: so the host waits once."""
    runner = machine.runner()
    x, y = arrays()
    view = device_arrays.DeviceArray(x.data_ptr(), (5, K), (K, 1), ss.dtypes.array_type("bfloat16"))
    owner = object()
    real = gpu_run.adapter_of(y)
    other: Any = SimpleNamespace(
        view=lambda array, what, stream: view._replace(owner=owner),
        current_stream=lambda device: STREAM,
        signature=None,
        pointer=None,
        writable=False,
    )
    stranger = SimpleNamespace()
    monkeypatch.setattr(gpu_run, "adapter_of", lambda array: other if array is stranger else real)
    runner.bind(x, None, y, None)  # makes the workspace, and waits for that
    machine.gpu.done.clear()
    runner.bind(x, None, y, None)
    assert machine.gpu.done == []
    bound = runner.bind(stranger, None, y, None)
    assert machine.gpu.done == [("synchronize", STREAM)]
    bound()
    assert machine.taken()[0]["values"][0] == x.data_ptr()
    assert bound._kept[1] is owner  # type: ignore[attr-defined]


# --- repeated runs ------------------------------------------------------------------------------


def test_runs_follow_what_changes(machine: Machine) -> None:
    """What is kept from the last launch is never that of another array or stream."""
    runner = machine.runner()
    xs, ys = ([arrays()[i] for _ in range(3)] for i in (0, 1))
    odd = torch.zeros(5 * K + 1, dtype=torch.bfloat16)[1:].view(5, K)
    wide = torch.zeros(5, K + 8, dtype=torch.bfloat16)[:, :K]
    kept = {}
    for _ in range(2):
        for stream in (STREAM, 8):
            machine.current_stream = stream
            for x in (*xs, odd, wide):
                for y in (*ys, torch.zeros(5, N + 1, dtype=torch.bfloat16)[:, 1:]):
                    runner.run(x, None, y, None)
                    quantize, multiply = machine.taken()
                    assert quantize["values"][:2] == [x.data_ptr(), 2 * x.stride(0)]
                    assert multiply["values"][4:6] == [y.data_ptr(), y.stride(0)]
                    assert quantize["stream"] == multiply["stream"] == stream
                    # The kernel for any address where the loads would not be aligned.
                    assert (
                        quantize["function"] != kept.setdefault("fast", quantize["function"])
                    ) == (x.data_ptr() % 16 != 0)
                    assert (multiply["values"][-1] == 0) == (
                        y.data_ptr() % 4 != 0 or y.stride(0) % 2 != 0
                    )
    assert len(runner._routes) == 4
    made = len(machine.driver.maps)
    runner.run(xs[0], None, ys[0], None)
    assert len(machine.driver.maps) == made


def test_results_are_of_the_type_that_is_asked_for(machine: Machine) -> None:
    """What is remembered of an array is not taken for a result of another type."""
    runner, (x, _) = machine.runner(), arrays()
    for _ in range(2):
        for name in (None, "float32", "float16", "float32"):
            kind = None if name is None else ss.dtypes.array_type(name)
            assert runner.run(x, kind, None, None).dtype == getattr(torch, name or "bfloat16")
            assert entries(machine.taken()) == BOTH
    assert len(runner._routes) == 1


def test_what_could_not_be_aimed_is_not_launched(machine: Machine) -> None:
    runner, first, second = machine.runner(), arrays(), arrays()

    def ran(x: torch.Tensor, y: torch.Tensor) -> bool:
        runner.run(x, None, y, None)
        quantize, multiply = machine.taken()
        return (quantize["values"][0], multiply["values"][4]) == (x.data_ptr(), y.data_ptr())

    assert ran(*first)
    machine.driver.refuse["cuTensorMapEncodeTiled"] = 1
    for _ in range(2):
        with pytest.raises(ss.LibraryError, match="cuTensorMapEncodeTiled returned 1"):
            ran(*second)
    assert machine.taken() == []
    assert ran(*first)  # although x was changed in the launch of before
    machine.driver.refuse.clear()
    assert ran(*second)
    assert ran(*first)


def test_addresses_are_checked_each_time(machine: Machine) -> None:
    """Arrays of kinds that are known already may still be in each other's way, or nowhere."""
    runner = machine.runner()
    x, y = arrays()
    runner.run(x, None, y, None)
    runner.run(x, None, None, None)
    machine.taken()
    whole = torch.zeros(5 * (K + N), dtype=torch.bfloat16)
    first, last = whole[: 5 * K].view(5, K), whole[5 * K :].view(5, N)
    runner.run(first, None, last, None)
    assert entries(machine.taken()) == BOTH
    for start in (0, 8, 5 * K - 8):
        with pytest.raises(ss.ArrayError, match="out lies in the address range of x"):
            runner.run(first, None, whole[start : start + 5 * N].view(5, N), None)
    x.untyped_storage().resize_(0)
    for out in (y, None):
        with pytest.raises(ss.ArrayError, match="x has no memory"):
            runner.run(x, None, out, None)
    assert machine.taken() == []
    assert len(runner._routes) == 2


def test_each_thread_has_steps_of_its_own(machine: Machine) -> None:
    """Library handles belong to threads, and so does what is made with them."""
    runner = machine.runner()
    x, y = arrays()
    for _ in range(2):
        runner.run(x, None, y, None)
        thread = threading.Thread(target=runner.run, args=(x, None, y, None))
        thread.start()
        thread.join()
    (route,) = runner._routes.values()
    assert len(set(route.steps.values())) == len(route.steps) > 1


def test_a_scale_that_is_given_reaches_the_kernel(machine: Machine) -> None:
    runner = machine.runner(machine.prepared(x_scale=0xABC0))
    runner.run(arrays()[0], None, None, None)
    quantize = machine.taken()[0]
    assert quantize["values"][5:7] == [0xABC0, 0]


# --- on the CPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["numpy", "torch"])
def test_on_the_cpu_a_call_reads_what_is_there_then(kind: str) -> None:
    with ss.SparseGemmPlan(fitted("6:8", 24, 32), "6:8") as plan:
        x = np.zeros((3, 32), np.float32)
        given: Any = torch.from_numpy(x) if kind == "torch" else x
        bound = plan.bind(given)
        assert type(bound.out) is type(given)
        for seed in range(2):
            x[:] = np.random.default_rng(seed).standard_normal(x.shape)
            found = bound()
            assert found is bound.out
            np.testing.assert_array_equal(np.asarray(found), plan.run(x))
        y: Any = np.zeros((3, 24), np.float32)
        assert plan.bind(given, y)() is y
        np.testing.assert_array_equal(y, plan.run(x))
    with pytest.raises(ss.PlanClosed):
        bound()
    with pytest.raises(ss.PlanClosed):
        plan.bind(given)


def test_on_the_cpu_wrong_arguments_are_refused_at_once() -> None:
    with ss.SparseGemmPlan(fitted("6:8", 24, 32), "6:8") as plan:
        x = tokens(3, 32)
        for error, says, arguments, options in [
            (ss.ShapeError, r"\(\.\.\., 32\)", (tokens(3, 31),), {}),
            (ss.ShapeError, "the result has shape", (x, np.zeros((2, 24), np.float32)), {}),
            (ss.DTypeError, "the result is float32", (x, np.zeros((3, 24), np.float16)), {}),
            (ss.ArrayError, "shares memory", (x, x[:, :24]), {}),
            (ss.OptionError, "runs on the CPU", (x,), {"stream": 5}),
            (ss.OptionError, "graph is 1; allowed are True and False", (x,), {"graph": 1}),
            (ss.ArrayError, "x is a JAX array", (jnp.asarray(x),), {}),
        ]:
            with pytest.raises(error, match=says):
                plan.bind(*arguments, **options)
        half = plan.bind(x.astype(ml_dtypes.bfloat16))
        assert half().dtype == ml_dtypes.bfloat16
        out = np.zeros((3, 24), np.float32)
        np.testing.assert_array_equal(plan.bind(jnp.asarray(x), out)(), plan.run(x))
