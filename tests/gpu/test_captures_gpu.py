"""CUDA graphs: what cannot be captured says so and spoils nothing, and threads do not disturb."""

from __future__ import annotations

import gc
import threading

import numpy as np
import pytest

import slidesparse_rt as ss

from .common import BACKENDS, FORMATS, assert_same, data, reference, to_host, to_torch, weight

pytestmark = pytest.mark.gpu

N, K, M = 192, 256, 48


@pytest.fixture(params=BACKENDS)
def plan(request):
    with ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", backend=request.param) as made:
        yield made


class Capture:
    """A prepared plan with its arrays, captured and replayed in PyTorch's global mode."""

    def __init__(self, plan):
        import torch

        self.plan = plan
        self.values = data(1, (M, K), "bfloat16")
        self.x = to_torch(self.values)
        self.out = torch.empty((M, N), dtype=torch.bfloat16, device="cuda")
        self.stream = torch.cuda.Stream()
        plan.prepare([M], stream=self.stream)
        self.graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()

    def capturing(self):
        import torch

        return torch.cuda.graph(self.graph, stream=self.stream, capture_error_mode="global")

    def run(self):
        assert self.plan.run(self.x, out=self.out) is self.out

    def check(self):
        """The captured run gives the right bits, with the data of now."""
        import torch

        self.out.fill_(7)
        self.graph.replay()
        torch.cuda.synchronize()
        expected = reference(weight(0, N, K, "6:8"), "6:8", self.values, "int8")
        assert_same(to_host(self.out), expected)


def test_refusals_within_a_capture_leave_it_intact(plan):
    """Each names what is missing; the rest of the capture is recorded as if nothing had been."""
    import torch

    captured = Capture(plan)
    w = to_torch(weight(0, N, K, "6:8"))
    other = torch.zeros((M + 1, K), dtype=torch.bfloat16, device="cuda")
    single = torch.zeros((M, K), device="cuda")
    elsewhere = torch.cuda.Stream()
    prepared_elsewhere = torch.zeros((64 * M, K), dtype=torch.bfloat16, device="cuda")
    plan.prepare([64 * M], stream=elsewhere)
    torch.cuda.synchronize()
    with captured.capturing():
        with pytest.raises(ss.CaptureError, match=r"prepare\(tokens=\[49\]"):
            plan.run(other)
        with pytest.raises(ss.CaptureError, match="x_dtype='float32'"):
            plan.run(single)
        with pytest.raises(ss.CaptureError, match=r"workspace on this stream.*stream=\.\.\."):
            plan.run(prepared_elsewhere)
        with pytest.raises(ss.CaptureError, match="one is being captured"):
            plan.run(captured.x, out=captured.out, stream=elsewhere)
        with pytest.raises(ss.CaptureError, match=r"prepare\(\) cannot run while"):
            plan.prepare([7], stream=captured.stream)
        for call in (
            lambda: ss.prune(w, "6:8"),
            lambda: ss.check_pattern(w, "6:8"),
            lambda: ss.SparseGemmPlan(w, "6:8", backend=plan.backend),
        ):
            with pytest.raises(ss.CaptureError, match="do it before the capture"):
                call()
        captured.run()
    captured.check()


def test_no_tokens_within_a_capture(plan):
    import torch

    captured = Capture(plan)
    nothing = torch.zeros((0, K), dtype=torch.bfloat16, device="cuda")
    with captured.capturing():
        captured.run()
        assert plan.run(nothing).shape == (0, N)
    captured.check()


def test_a_prepared_run_allocates_nothing(plan):
    import cupy
    import torch

    captured = Capture(plan)
    with torch.cuda.stream(captured.stream):
        captured.run()
        torch.cuda.synchronize()
        held, free = plan.nbytes, cupy.cuda.runtime.memGetInfo()[0]
        allocated = torch.cuda.memory_stats()["allocation.all.allocated"]
        for _ in range(50):
            captured.run()
        torch.cuda.synchronize()
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == allocated
    assert cupy.cuda.runtime.memGetInfo()[0] == free
    assert plan.nbytes == held


def beside(captured, work):
    """Run ``work`` in another thread while ``captured`` is captured; raise what it raised."""
    started, finished = threading.Event(), threading.Event()
    faults: list[BaseException] = []

    def thread() -> None:
        try:
            assert started.wait(timeout=60)
            work()
        except BaseException as error:
            faults.append(error)
        finally:
            finished.set()

    # What earlier tests left (frames of a failed one hold graphs and arrays) goes before it:
    # collected in the middle of it, other libraries' memory would break it.
    gc.collect()
    worker = threading.Thread(target=thread)
    worker.start()
    try:
        with captured.capturing():
            started.set()
            assert finished.wait(timeout=300)
            captured.run()
    finally:
        started.set()
        worker.join()
    if faults:
        raise faults[0]
    captured.check()


@pytest.mark.parametrize("source", ["host", "gpu"])
@pytest.mark.parametrize(("backend", "dtype"), FORMATS)
def test_a_plan_is_made_and_prepared_beside_a_capture(backend, dtype, source):
    """Packing, module loads, searches and workspace of one thread; another captures meanwhile.

    The shape is this test's own, so that nothing of it was searched or loaded before.
    """
    import torch

    plan = ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", backend=backend)
    captured = Capture(plan)
    n, k = 320 + 32 * FORMATS.index((backend, dtype)), 576 + 64 * (source == "gpu")
    w = weight(3, n, k, "8:10")
    held = to_torch(w) if source == "gpu" else w
    x = to_torch(data(4, (100, k), "bfloat16"))
    out = torch.empty((100, n), dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    made: list[ss.SparseGemmPlan] = []
    torch.cuda.synchronize()

    def work() -> None:
        with torch.cuda.stream(stream):
            fresh = ss.SparseGemmPlan(held, "8:10", dtype=dtype, backend=backend, device="cuda")
            made.append(fresh)
            fresh.prepare([1, 100, 3000], stream=stream)
            fresh.run(x, out=out)

    beside(captured, work)
    with made.pop() as fresh:
        torch.cuda.synchronize()
        assert torch.equal(fresh.run(x), out)
        if dtype == "int8":
            assert_same(to_host(out), reference(w, "8:10", to_host(x), dtype))
    plan.close()


def test_memory_is_given_back_beside_a_capture(plan):
    """By close(), by a workspace that grows, and by the garbage collector."""
    import torch

    captured = Capture(plan)
    w = weight(5, 640, 512, "6:8")
    victims = [ss.SparseGemmPlan(w, "6:8", backend=plan.backend, device="cuda") for _ in range(3)]
    x = torch.zeros((4000, 512), dtype=torch.bfloat16, device="cuda")
    out = torch.empty((4000, 640), dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    for victim in victims:
        victim.prepare([16], stream=stream)
    torch.cuda.synchronize()

    def work() -> None:
        with torch.cuda.stream(stream):
            victims[0].run(x, out=out)  # grows the workspace, and drops the old block
        victims.pop().close()
        dropped = [victims.pop()]
        dropped.append(dropped)
        del dropped
        gc.collect()

    beside(captured, work)
    victims.pop().close()


def test_weights_on_the_gpu_are_checked_and_pruned_beside_a_capture(plan):
    captured = Capture(plan)
    w = data(6, (130, 520))
    held, norms = to_torch(w), np.abs(data(7, (520,)))
    found = []

    def work() -> None:
        for method, given in (("magnitude", None), ("wanda", to_norms)):
            found.append(ss.prune(held, "6:8", method=method, norms=given))
        ss.check_pattern(found[0], "6:8")

    to_norms = to_torch(norms)
    beside(captured, work)
    assert_same(to_host(found[0]), ss.prune(w, "6:8"))
    assert_same(to_host(found[1]), ss.prune(w, "6:8", method="wanda", norms=norms))


class Producer:
    """Only knows DLPack, so that a plan keeps it until the work on it is done."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **options):
        return self.array.__dlpack__(**options)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_runs_whose_results_come_from_cupy_beside_a_capture(plan):
    """CuPy's pool has to grow, this thread's products are made, and kept arrays are let go."""
    import cupy

    captured = Capture(plan)
    values = data(8, (700, K))
    array = cupy.asarray(values)
    cupy.get_default_memory_pool().free_all_blocks()
    cupy.cuda.runtime.deviceSynchronize()
    found = []
    beside(
        captured,
        lambda: found.extend(plan.run(x) for x in (array, Producer(array)) for _ in (0, 1)),
    )
    expected = reference(weight(0, N, K, "6:8"), "6:8", values, "int8")
    for y in found:
        assert_same(cupy.asnumpy(y), expected)
