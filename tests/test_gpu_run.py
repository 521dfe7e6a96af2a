"""What a plan on a GPU does around its launches, on stand-ins: no GPU is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections import OrderedDict
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch

import slidesparse_rt as ss
from slidesparse_rt import device_adapters, gpu_run, workspace
from slidesparse_rt.arrays import Device
from slidesparse_rt.backends import Problem, gpu_gemm, gpu_step
from slidesparse_rt.backends.buckets import TOKEN_BUCKETS, token_bucket
from slidesparse_rt.backends.workspace import COUNTER_BYTES, Workspace
from slidesparse_rt.device_arrays import refuse_per_thread_stream, stream_pointer
from slidesparse_rt.dtypes import array_type, operand

K, N = 16, 8


class Prepared:
    """Counts what would be launched."""

    weight = SimpleNamespace(operand=operand("int8"))
    row_length, padded_n = 32, 32
    always_direct = False

    def __init__(self) -> None:
        self.launches: list[tuple[int, ...]] = []
        self.pinned: set[int] = set()
        #: Whether captures of other threads were left alone now, and at each launch.
        self.relaxed = False
        self.relaxed_at: list[bool] = []

    def can_write(self, *arguments: Any) -> bool:
        return False

    def most_tokens(self, limit: int) -> int:
        return 1 << 20

    def step(self, rows: int, *arguments: Any) -> Any:
        def launch(x: int, stride: int, out: int, out_stride: int, *rest: Any) -> None:
            self.launches.append((rows, stride, out_stride))
            self.relaxed_at.append(self.relaxed)

        return SimpleNamespace(launch=launch)


class Kernels:
    """Knows of the streams of another GPU."""

    foreign: ClassVar[dict[int, int]] = {0x700: 1}

    @classmethod
    def device_of_stream(cls, stream: int) -> int:
        return cls.foreign.get(stream, 0)


@pytest.fixture
def runner(monkeypatch: pytest.MonkeyPatch) -> gpu_run.GpuRunner:
    """A runner that takes torch's CPU tensors for tensors on cuda:0."""
    adapter = dataclasses.replace(
        device_adapters._torch_adapter(),
        maker=lambda shape, *rest: partial(torch.empty, shape, dtype=torch.float32),
        current_stream=lambda device: 0,
    )
    monkeypatch.setattr(gpu_run, "adapter_of", lambda array: adapter)
    monkeypatch.setattr(gpu_run, "device_of", lambda array, what: Device("cuda"))
    monkeypatch.setattr(gpu_run, "gpu_device", lambda index: None)
    monkeypatch.setattr(gpu_run, "cuda_runtime", lambda: SimpleNamespace(getDevice=lambda: 0))
    monkeypatch.setattr(gpu_run, "kernels_of", lambda index: Kernels)
    problem = Problem(N, K, ss.Pattern.parse("6:8"), operand("int8"))
    prepared = Prepared()

    @contextlib.contextmanager
    def relaxed() -> Iterator[None]:
        prepared.relaxed = True
        try:
            yield
        finally:
            prepared.relaxed = False

    monkeypatch.setattr(gpu_run, "relaxed_capture", relaxed)
    return gpu_run.GpuRunner(prepared, problem, Device("cuda"), ss.PlanOptions())


def only(runner: gpu_run.GpuRunner) -> Any:
    """The one form of a runner without dispatch."""
    (form,) = runner._forms.values()
    return form


def run(runner: gpu_run.GpuRunner, x: Any, out: Any = None, stream: Any = None) -> Any:
    return runner.run(x, None, out, stream)


def test_runs_read_shapes_and_strides(runner: gpu_run.GpuRunner) -> None:
    wide = torch.zeros(6, 2 * K)
    assert run(runner, wide[:, :K]).shape == (6, N)
    assert run(runner, torch.zeros(2, 3, K)).shape == (2, 3, N)
    assert run(runner, torch.zeros(0, K)).shape == (0, N)
    out = torch.zeros(6, 20)
    view = out[:, :N]
    for _ in range(2):  # the second time from what was remembered
        assert run(runner, wide[:, :K], view) is view
    assert only(runner).prepared.launches == [(6, 32, 8), (6, 16, 8), (6, 32, 20), (6, 32, 20)]


def test_long_runs_are_split(runner: gpu_run.GpuRunner) -> None:
    only(runner).most = 256
    run(runner, torch.zeros(600, K))
    assert [rows for rows, *_ in only(runner).prepared.launches] == [256, 256, 88]


def test_first_launches_leave_captures_of_other_threads_alone(runner: gpu_run.GpuRunner) -> None:
    """They may load code; later ones do not, and must not pay for it."""
    x = torch.zeros(6, K)
    for _ in range(3):
        run(runner, x)
    assert only(runner).prepared.relaxed_at == [True, False, False]
    only(runner).most = 4
    run(runner, x)
    assert only(runner).prepared.relaxed_at[3:] == [True, True]
    assert not only(runner).prepared.relaxed


def test_bad_arrays(runner: gpu_run.GpuRunner) -> None:
    x = torch.zeros(4, K)
    with pytest.raises(ss.ShapeError, match=r"\(\.\.\., 16\)"):
        run(runner, torch.zeros(4, K + 1))
    with pytest.raises(ss.ArrayError, match="contiguous"):
        run(runner, torch.zeros(K, 4).T)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PyTorch calls the layout a beta feature
        sparse = torch.eye(K).to_sparse_csr()
    with pytest.raises(ss.ArrayError, match="layout"):
        run(runner, sparse)
    with pytest.raises(ss.ArrayError, match="gradient"):
        run(runner, x, torch.zeros(4, N, requires_grad=True))
    with pytest.raises(ss.ArrayError, match="address range"):
        run(runner, x, x[:, :N])
    buffer = torch.zeros(4 * K + 4 * N)
    below, above = buffer[: 4 * K].view(4, K), buffer[4 * K :].view(4, N)
    assert run(runner, below, above) is above


def test_the_per_thread_default_stream_is_refused(
    runner: gpu_run.GpuRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its address is the same in every thread, and workspace is kept apart by address."""
    with pytest.raises(ss.OptionError, match="per-thread default stream"):
        run(runner, torch.zeros(4, K), stream=2)
    with pytest.raises(ss.OptionError, match="per-thread default stream"):
        refuse_per_thread_stream(2)
    refuse_per_thread_stream(0)
    for bad in ("main", -1, True, None):
        with pytest.raises(ss.OptionError, match="stream is"):
            stream_pointer(bad)
    assert stream_pointer(SimpleNamespace(cuda_stream=7)) == 7
    assert stream_pointer(SimpleNamespace(__cuda_stream__=lambda: (0, 9))) == 9


def test_streams_of_which_one_is_captured_are_refused(
    runner: gpu_run.GpuRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    ordered: list[tuple[int, int]] = []
    monkeypatch.setattr(gpu_run, "order_streams", lambda *pair: ordered.append(pair))
    for captured in ({5}, {0}):
        monkeypatch.setattr(gpu_run, "is_capturing", captured.__contains__)
        with pytest.raises(ss.CaptureError, match="one is being captured"):
            run(runner, torch.zeros(4, K), stream=5)
    assert ordered == []


def test_streams_of_another_gpu_are_refused(
    runner: gpu_run.GpuRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_run, "is_capturing", lambda stream: pytest.fail("asked of it"))
    says = "stream is one of cuda:1, but the plan is on cuda:0; pass a stream that was made on cuda"
    with pytest.raises(ss.DeviceError, match=says):
        run(runner, torch.zeros(4, K), stream=0x700)
    float32 = array_type("float32")
    with pytest.raises(ss.DeviceError, match=says):
        runner.prepare([4], float32, float32, 0x700)
    assert only(runner).prepared.launches == []


@pytest.mark.parametrize("known", [False, True])
@pytest.mark.parametrize(
    "given",
    [RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError("2.00 GiB")],
)
def test_no_memory_for_the_result_has_a_name(
    runner: gpu_run.GpuRunner, monkeypatch: pytest.MonkeyPatch, known: bool, given: Exception
) -> None:
    """Whether or not such a result was made before; what makes them is kept."""
    x, error = torch.zeros(4, K), [given]
    whole = gpu_run.adapter_of(x)

    def maker(*arguments: Any) -> Any:
        def make() -> torch.Tensor:
            if error:
                raise error[0]
            made: torch.Tensor = whole.maker(*arguments)()
            return made

        return make

    monkeypatch.setattr(gpu_run, "adapter_of", lambda x: dataclasses.replace(whole, maker=maker))
    if known:
        error.clear()
        run(runner, x)
        error.append(given)
    launched = len(only(runner).prepared.launches)
    for call in (runner.run, runner.bind):
        with pytest.raises(ss.DeviceMemoryError) as caught:
            call(x, None, None, None)
        assert str(caught.value) == (
            "there is no memory on cuda:0 for a result of shape (4, 8) and type float32: "
            f"{given}; free memory, or pass out="
        )
        assert caught.value.__cause__ is given
        error[0] = RuntimeError("something else")
        with pytest.raises(RuntimeError, match=r"\Asomething else\Z"):
            call(x, None, None, None)
        error[0] = given
    assert len(only(runner).prepared.launches) == launched
    error.clear()
    assert run(runner, x).shape == (4, N)


def test_results_of_libraries_without_signatures(
    runner: gpu_run.GpuRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CuPy's allocator may have to grow, which must leave captures of other threads alone."""
    made: list[tuple[int, bool]] = []

    def maker(shape: Any, kind: Any, device: Any, stream: int) -> Any:
        def make() -> torch.Tensor:
            made.append((stream, only(runner).prepared.relaxed))
            return torch.empty(shape)

        return make

    other = dataclasses.replace(
        gpu_run.adapter_of(None),
        maker=maker,
        current_stream=lambda index: 10 + index,
        finish=lambda array, stream: (array.shape, stream),
        signature=None,
        pointer=None,
    )
    monkeypatch.setattr(gpu_run, "adapter_of", lambda array: other)
    x, out = torch.zeros(4, K), torch.zeros(4, N)
    for _ in range(2):
        assert run(runner, x) == ((4, N), 10)
        assert run(runner, x, out) is out
    assert made == [(10, True)] * 2
    assert runner._routes == {}


def test_torch_is_asked_for_what_the_result_is() -> None:
    whole = device_adapters._torch_adapter()
    for name in ("float32", "float16", "bfloat16"):
        made = whole.maker((5, 2, N), array_type(name), Device("cuda", 3), 0)
        given = made.keywords  # type: ignore[attr-defined]
        assert given.pop("device") == torch.device("cuda", 3)
        found = made.func(*made.args, device="meta", **given)  # type: ignore[attr-defined]
        assert (found.shape, found.dtype) == ((5, 2, N), getattr(torch, name))
        assert found.is_contiguous()


def test_a_closed_plan_launches_nothing(
    runner: gpu_run.GpuRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also for a run that got past the plan's own check before it was closed."""
    runner.workspace.close()
    with pytest.raises(ss.PlanClosed):
        run(runner, torch.zeros(4, K))
    assert only(runner).prepared.launches == []


def test_prepared_numbers_of_tokens_are_not_forgotten() -> None:
    keeper = SimpleNamespace(pinned={1, 2})
    cache = OrderedDict(((tokens, "x"), None) for tokens in range(1, gpu_gemm._KEPT + 4))
    for _ in range(3):
        gpu_gemm.GpuPrepared._evict(keeper, cache)  # type: ignore[arg-type]
    assert len(cache) == gpu_gemm._KEPT
    assert list(cache)[:3] == [(1, "x"), (2, "x"), (6, "x")]
    only = OrderedDict(((tokens, "x"), None) for tokens in range(200))
    gpu_gemm.GpuPrepared._evict(SimpleNamespace(pinned=set(range(200))), only)  # type: ignore[arg-type]
    assert len(only) == 200


def test_workspace_of_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Grows, is kept for graphs, and refuses to grow while one is captured."""
    from slidesparse_rt.backends import workspace as module

    capturing: set[int] = set()
    monkeypatch.setattr(module, "is_capturing", lambda stream: stream in capturing)

    class Block:
        made = 0

        def __init__(self, nbytes: int) -> None:
            Block.made += 1
            self.nbytes, self.pointer, self.open = nbytes, Block.made << 20, True

        def close(self) -> None:
            self.open = False

    cleared: list[tuple[int, int, int]] = []
    waited: list[int] = []
    device: Any = SimpleNamespace(
        allocate=Block, clear=lambda *call: cleared.append(call), synchronize=waited.append
    )
    held = Workspace(device)
    first = held.address(100, 5, 1)
    # Counters lie before it, inside the block, and are zero once: launches leave them so.
    assert first == (1 << 20) + COUNTER_BYTES
    assert first % 256 == 0
    assert held.address(50, 5, 1) == first
    assert cleared == [(1 << 20, COUNTER_BYTES, 5)]
    assert held.address(50, 6, 1) != first
    assert held.address(200, 5, 2) != first
    assert held.nbytes == 250 + 2 * COUNTER_BYTES
    assert cleared[1:] == [(2 << 20, COUNTER_BYTES, 6), (3 << 20, COUNTER_BYTES, 5)]
    # Before anyone uses them: a graph captured here may be replayed on another stream.
    assert waited == [5, 6, 5]
    capturing.add(5)
    captured = held.address(200, 5, 2)
    with pytest.raises(ss.CaptureError, match=r"prepare\(tokens=\[9\]"):
        held.address(300, 5, 9)
    capturing.clear()
    assert held.address(300, 5, 9) != captured
    # The graph's block is still there, counters and all.
    assert held.nbytes == 200 + 300 + 50 + 3 * COUNTER_BYTES
    assert len(cleared) == 4
    held.close()
    held.close()
    assert held.nbytes == 0
    with pytest.raises(ss.PlanClosed):
        held.address(1, 7, 1)


def test_the_default_stream_is_not_asked_whether_it_is_captured(
    shared: ss.Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It never is, and asking is a good part of finding a block."""
    from slidesparse_rt.backends import workspace as module

    asked: list[int] = []
    monkeypatch.setattr(module, "is_capturing", asked.append)
    held = shared.memory(Device("cuda"))
    for stream in (0, 5):
        held.address(100, stream, 1)
    asked.clear()
    for stream in (0, 5, 0, 5):
        held.address(100, stream, 1)
    assert asked == [5, 5]


def test_a_product_of_a_library_is_repeated() -> None:
    calls: list[tuple[int, ...]] = []

    class Product(gpu_step.Product):
        def launch(self, *arguments: int) -> None:
            calls.append(arguments)

    aim = Product().fixed(1, 2, 3, 4)
    one = aim(50, 60, 70)
    assert calls == []
    two = aim(51, 61, 71)
    for call in (one, two, one):
        assert call() is None
    first, second = (1, 2, 50, 60, 3, 4, 70), (1, 2, 51, 61, 3, 4, 71)
    assert calls == [first, second, first]


def test_buckets() -> None:
    found = [token_bucket(tokens) for tokens in (1, 16, 17, 257, 700, 1000, 16384, 16385, 10**9)]
    assert found == [16, 16, 32, 384, 768, 1024, 16384, 24576, 32768]
    assert list(TOKEN_BUCKETS) == sorted(TOKEN_BUCKETS)
    assert all(token_bucket(bucket) == bucket for bucket in TOKEN_BUCKETS)


def test_formats_that_a_gpu_lacks() -> None:
    problem = Problem(N, K, ss.Pattern.parse("6:8"), operand("fp8_e4m3"))
    gpu: Any = SimpleNamespace(capability=(8, 0), name="A100")
    say = gpu_gemm.refused_format
    assert say("L", None, problem, gpu) == "L has no fp8_e4m3 product"
    assert say("L", (8, 9), problem, gpu) == "fp8_e4m3 needs compute capability 8.9, A100 has 8.0"
    assert say("L", (8, 0), problem, gpu) == ""


# --- a workspace that plans share ---------------------------------------------------------------


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> ss.Workspace:
    class Block:
        def __init__(self, nbytes: int) -> None:
            self.nbytes, self.pointer = nbytes, 1 << 20

        def close(self) -> None:
            self.nbytes = 0

    device: Any = SimpleNamespace(
        index=0, allocate=Block, clear=lambda *_: None, synchronize=lambda _: None
    )
    monkeypatch.setattr(workspace, "gpu_device", lambda index: device)
    for module in (workspace, gpu_run):
        monkeypatch.setattr(module, "working_on", contextlib.nullcontext)
    return ss.Workspace("cuda")


def sharing(like: gpu_run.GpuRunner, shared: Any) -> gpu_run.GpuRunner:
    """Another plan's runner."""
    options = ss.PlanOptions(workspace=shared)
    return gpu_run.GpuRunner(Prepared(), like._problem, Device("cuda"), options)


def test_plans_share_its_blocks_and_its_lock(
    runner: gpu_run.GpuRunner, shared: ss.Workspace
) -> None:
    first, second = (sharing(runner, shared) for _ in range(2))
    assert first.workspace is second.workspace is not runner.workspace
    assert first.nbytes == second.nbytes == 0  # it counts for itself
    with first.workspace.lock:
        address = first.workspace.address(1000, 0, 1)
    assert second.workspace.address(500, 0, 1) == address
    assert shared.nbytes > 1000
    assert repr(shared) == f"Workspace(cuda:0, {shared.nbytes:,} bytes)"


def test_a_plan_that_is_closed_leaves_it_to_the_others(
    runner: gpu_run.GpuRunner, shared: ss.Workspace
) -> None:
    first, second = (sharing(runner, shared) for _ in range(2))
    first.workspace.address(1000, 0, 1)
    first.close()
    assert shared.nbytes > 1000
    with pytest.raises(ss.PlanClosed, match="this plan is closed"):
        run(first, torch.zeros(4, K))
    assert only(first).prepared.launches == []
    run(second, torch.zeros(4, K))
    assert len(only(second).prepared.launches) == 1


def test_once_closed_no_plan_runs_with_it(runner: gpu_run.GpuRunner, shared: ss.Workspace) -> None:
    plan = sharing(runner, shared)
    with shared:
        run(plan, torch.zeros(4, K))
    shared.close()
    assert shared.nbytes == 0
    assert repr(shared) == "Workspace(cuda:0, closed)"
    with pytest.raises(ss.PlanClosed, match="this workspace is closed"):
        run(plan, torch.zeros(4, K))
    with pytest.raises(ss.PlanClosed, match="make a new Workspace"):
        sharing(runner, shared)


def test_a_plan_s_own_goes_with_it(runner: gpu_run.GpuRunner, shared: ss.Workspace) -> None:
    del shared
    runner.close()
    with pytest.raises(ss.PlanClosed):
        runner.workspace.check_open()


def test_wrong_workspaces(runner: gpu_run.GpuRunner) -> None:
    with pytest.raises(ss.DeviceError, match=r"device is 'cpu'; a workspace is memory of a GPU"):
        ss.Workspace("cpu")
    with pytest.raises(ss.DeviceError, match=r"the plan is on cuda:0, its workspace on cuda:1"):
        sharing(runner, ss.Workspace("cuda:1"))
    with pytest.raises(ss.OptionError, match=r"workspace is 7; allowed are None and a slidesparse"):
        sharing(runner, 7)


def test_one_that_no_plan_used_holds_nothing() -> None:
    with ss.Workspace("cuda:3") as unused:
        assert unused.nbytes == 0
        assert str(unused.device) == "cuda:3"
