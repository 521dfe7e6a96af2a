"""Several GPUs: plans on each at once, and a current device that nobody changes."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

import slidesparse_rt as ss
from slidesparse_rt.backends.gpu_device import gpu_device
from slidesparse_rt.ffi.driver import probe
from slidesparse_rt.kernels.loader import kernels_of

from .common import (
    BACKENDS,
    BACKENDS_HERE,
    FORMATS,
    assert_near,
    assert_same,
    data,
    reference,
    sums_of,
    to_host,
    to_torch,
    weight,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(len(probe().devices) < 2, reason="fewer than two GPUs here"),
]

N, K = 192, 256
FIRST, SECOND = "cuda:0", "cuda:1"


@pytest.fixture(autouse=True)
def _the_first_gpu_stays_current():
    import cupy
    import torch

    torch.cuda.set_device(0)
    yield
    assert torch.cuda.current_device() == 0
    assert cupy.cuda.runtime.getDevice() == 0


@pytest.fixture(params=BACKENDS)
def plan(request):
    """On the second GPU, from a weight of the host."""
    w = weight(0, N, K, "6:8")
    with ss.SparseGemmPlan(w, "6:8", backend=request.param, device=SECOND) as made:
        assert made.device == SECOND
        yield made


def expected_for(x):
    return reference(weight(0, N, K, "6:8"), "6:8", x, "int8")


def test_bound_runs_are_recorded_on_a_gpu_that_is_not_current(plan):
    import torch

    x = data(2, (30, K), "bfloat16")
    held = to_torch(x).to(SECOND)
    for stream in (None, torch.cuda.Stream(device=SECOND)):
        with torch.cuda.stream(stream):
            torch.cuda.set_device(0)
            bound = plan.bind(held, stream=stream, graph=True)
            for _ in range(6):
                bound.out.fill_(7)
                torch.cuda.synchronize(SECOND)
                bound()
                torch.cuda.synchronize(SECOND)
                assert_same(to_host(bound.out), expected_for(x))
            assert bound._replay_stream >= 0


@pytest.mark.parametrize("kind", ["float32", "bfloat16"])
def test_torch_on_a_gpu_that_is_not_current(plan, kind):
    import torch

    x = data(1, (30, K), kind)
    held = to_torch(x).to(SECOND)
    y = plan.run(held)
    assert str(y.device) == SECOND
    assert_same(to_host(y), expected_for(x))
    out = torch.empty_like(y)
    assert plan.run(held, out=out) is out
    assert torch.equal(out, y)
    side = torch.cuda.Stream(device=SECOND)
    plan.prepare([30], x_dtype=kind, stream=side)
    late = plan.run(held, stream=side)
    side.synchronize()
    assert torch.equal(late, y)


def test_cupy_on_a_gpu_that_is_not_current(plan):
    import cupy

    x = data(2, (30, K))
    with cupy.cuda.Device(1):
        held = cupy.asarray(x)
    y = plan.run(held)
    assert y.device.id == 1
    with cupy.cuda.Device(1):
        assert_same(y.get(), expected_for(x))
        out = cupy.empty_like(y)
        stream = cupy.cuda.Stream(non_blocking=True)
    assert plan.run(held, out=out, stream=stream) is out
    with cupy.cuda.Device(1):
        stream.synchronize()
        assert_same(out.get(), expected_for(x))


def test_jax_on_a_gpu_that_is_not_current(plan):
    import jax

    (home,) = [device for device in jax.devices() if device.local_hardware_id == 1]
    for kind in (np.float32, ml_dtypes.bfloat16):
        x = data(3, (30, K)).astype(kind)
        y = plan.run(jax.device_put(x, home))
        assert y.devices() == {home}
        assert_same(np.asarray(y), expected_for(x))


def test_numba_on_a_gpu_that_is_not_current(plan):
    from numba import cuda

    x = data(4, (30, K))
    with cuda.gpus[1]:
        held = cuda.to_device(x)
    y = plan.run(held)
    assert y.gpu_data.context.device.id == 1
    with cuda.gpus[1]:
        assert_same(y.copy_to_host(), expected_for(x))


@pytest.mark.parametrize(("backend", "dtype"), FORMATS)
def test_every_format_on_both(backend, dtype):
    import torch

    w, x = weight(1, N, K, "8:10"), data(5, (70, K), "bfloat16")
    found = {}
    for device in (FIRST, SECOND):
        with ss.SparseGemmPlan(w, "8:10", dtype=dtype, backend=backend, device=device) as plan:
            found[device] = to_host(plan.run(to_torch(x).to(device)))
    for y in found.values():
        assert_near(y, w, x, dtype, sums=sums_of(backend, dtype))
    if dtype == "int8":
        assert_same(found[FIRST], found[SECOND])
        assert_same(found[FIRST], reference(w, "8:10", x, dtype))
    assert torch.cuda.current_device() == 0


def test_plans_on_both_at_once_from_threads():
    """Half of the threads never make their plan's GPU current."""
    import torch

    w = weight(0, N, K, "6:8")
    plans = {
        (backend, device): ss.SparseGemmPlan(w, "6:8", backend=backend, device=device)
        for backend in BACKENDS_HERE
        for device in (FIRST, SECOND)
    }
    inputs = {m: data(m, (m, K), "bfloat16") for m in (1, 17, 300)}
    wanted = {m: expected_for(x) for m, x in inputs.items()}
    held = {
        (m, device): to_torch(x).to(device) for m, x in inputs.items() for device in (FIRST, SECOND)
    }
    torch.cuda.synchronize(0)
    torch.cuda.synchronize(1)
    faults: list[str] = []

    def work(key: tuple[str, str], current: int) -> None:
        try:
            torch.cuda.set_device(current)
            for _ in range(10):
                for m in inputs:
                    y = plans[key].run(held[m, key[1]])
                    assert str(y.device) == key[1]
                    assert_same(to_host(y), wanted[m])
            assert torch.cuda.current_device() == current
        except BaseException as error:
            faults.append(f"{key}, current {current}: {error!r}")

    threads = [
        threading.Thread(target=work, args=(key, current)) for key in plans for current in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    for plan in plans.values():
        plan.close()


def test_a_weight_stays_on_its_gpu():
    w, x = weight(2, N, K, "6:8"), data(6, (20, K))
    held = to_torch(w).to(SECOND)
    for backend in (*BACKENDS_HERE, "auto"):
        with ss.SparseGemmPlan(held, "6:8", backend=backend) as plan:
            assert plan.device == SECOND
            y = to_host(plan.run(to_torch(x).to(SECOND)))
            assert_same(y, reference(w, "6:8", x, "int8"))
        with pytest.raises(ss.DeviceError, match=r"weight is on cuda:1, .* run on cuda:0"):
            ss.SparseGemmPlan(held, "6:8", backend=backend, device=FIRST)
    y = ss.sparse_matmul(to_torch(x).to(SECOND), w, "6:8", backend="dense")
    assert str(y.device) == SECOND
    assert_same(to_host(y), reference(w, "6:8", x, "int8"))


def test_auto_chooses_for_the_gpu_of_the_plan():
    with ss.SparseGemmPlan(weight(2, N, K, "6:8"), "6:8", device=SECOND) as plan:
        assert plan.backend in BACKENDS_HERE
        assert f"on {SECOND}" in plan.explain()
        x = data(7, (20, K))
        y = plan.run(to_torch(x).to(SECOND))
        assert_same(to_host(y), reference(weight(2, N, K, "6:8"), "6:8", x, "int8"))


def test_a_bias_may_come_from_anywhere():
    w, x, bias = weight(2, N, K, "6:8"), data(8, (20, K)), data(9, (N,))
    expected = reference(w, "6:8", x, "int8", bias=bias)
    for given in (bias, to_torch(bias), to_torch(bias).to(SECOND)):
        with ss.SparseGemmPlan(w, "6:8", bias=given, backend="dense", device=SECOND) as plan:
            assert_same(to_host(plan.run(to_torch(x).to(SECOND))), expected)


def test_arrays_of_the_wrong_gpu_are_refused(plan):
    import cupy
    import torch

    x = data(10, (20, K))
    here, there = to_torch(x).to(SECOND), to_torch(x)
    for _ in range(2):  # the second time with what was remembered of a good call
        with pytest.raises(ss.DeviceError, match="x is on cuda:0, but the plan is on cuda:1"):
            plan.run(there)
        with pytest.raises(ss.DeviceError, match="out is on cuda:0, but the plan is on cuda:1"):
            plan.run(here, out=torch.empty((20, N), device=FIRST))
        with pytest.raises(ss.DeviceError, match="x is on cuda:0, but the plan is on cuda:1"):
            plan.run(cupy.asarray(x))
        with pytest.raises(ss.DeviceError, match="x is on cpu, but the plan is on cuda:1"):
            plan.run(torch.zeros((20, K)))
        assert_same(to_host(plan.run(here)), expected_for(x))


def test_streams_of_the_wrong_gpu_are_refused(plan):
    import torch

    x = to_torch(data(11, (20, K))).to(SECOND)
    wrong = torch.cuda.Stream(device=FIRST)
    for stream in (wrong, wrong.cuda_stream):
        with pytest.raises(ss.DeviceError, match="stream is one of cuda:0, but the plan is on cud"):
            plan.run(x, stream=stream)
        with pytest.raises(ss.DeviceError, match="stream is one of cuda:0, but the plan is on cud"):
            plan.prepare([20], stream=stream)
    assert_same(to_host(plan.run(x)), expected_for(to_host(x)))


def test_memory_is_taken_on_the_gpu_of_the_plan_only():
    import cupy

    def free(index: int) -> int:
        with cupy.cuda.Device(index):
            return int(cupy.cuda.runtime.memGetInfo()[0])

    w = ss.SparseWeight.from_array(weight(3, 8192, 8192, "6:8"), "6:8")
    for backend in BACKENDS_HERE:
        # Once for what stays: handles, kernels, searched algorithms.
        for measured in (False, True):
            before = free(0), free(1)
            with ss.SparseGemmPlan(w, backend=backend, device=SECOND) as plan:
                plan.prepare([64])
                assert plan.nbytes > 50 << 20
                if measured:
                    assert before[1] - free(1) > 50 << 20
                    assert abs(before[0] - free(0)) < 4 << 20
        assert abs(before[1] - free(1)) < 4 << 20


def test_one_plan_shares_nothing_with_that_of_the_other_gpu():
    assert gpu_device(0) is not gpu_device(1)
    assert gpu_device(0).packing_stream != gpu_device(1).packing_stream
    assert kernels_of(0) is not kernels_of(1)
    assert kernels_of(1).device_of_stream(gpu_device(0).packing_stream) == 0
    w, x = weight(4, 224, 352, "6:8"), data(12, (20, 352), "bfloat16")
    for backend in BACKENDS_HERE:
        known = set(gpu_device(0).choices)
        first, second = (
            ss.SparseGemmPlan(w, "6:8", backend=backend, device=device)
            for device in (FIRST, SECOND)
        )
        second.prepare([20])
        assert set(gpu_device(0).choices) == known
        second.close()
        assert_same(to_host(first.run(to_torch(x))), reference(w, "6:8", x, "int8"))
        first.close()


def test_weights_are_pruned_and_checked_where_they_are():
    w = data(13, (130, 300))
    held = to_torch(w).to(SECOND)
    pruned = ss.prune(held, "6:8")
    assert str(pruned.device) == SECOND
    assert_same(to_host(pruned), ss.prune(w, "6:8"))
    ss.check_pattern(pruned, "6:8")
    with pytest.raises(ss.PatternError, match="row 0"):
        ss.check_pattern(held, "6:8")
    norms = np.abs(data(14, (300,)))
    for given in (norms, to_torch(norms), to_torch(norms).to(SECOND)):
        wanda = ss.prune(held, "6:8", method="wanda", norms=given)
        assert_same(to_host(wanda), ss.prune(w, "6:8", method="wanda", norms=norms))


def test_a_graph_on_the_second_gpu(plan):
    import torch

    values = data(15, (48, K), "bfloat16")
    with torch.cuda.device(1):
        stream = torch.cuda.Stream()
        x = to_torch(values)
        out = torch.empty((48, N), dtype=torch.bfloat16, device=SECOND)
        plan.prepare([48], stream=stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            plan.run(x, out=out)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(to_host(out), expected_for(values))
