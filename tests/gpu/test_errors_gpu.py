"""Bad input on a GPU: a named error each time, and a plan that still works afterwards."""

from __future__ import annotations

import gc

import numpy as np
import pytest

import slidesparse_rt as ss

from .common import (
    BACKENDS,
    BACKENDS_HERE,
    assert_same,
    data,
    reference,
    to_host,
    to_torch,
    weight,
)

pytestmark = pytest.mark.gpu

N, K = 64, 96


@pytest.fixture(params=BACKENDS)
def plan(request):
    with ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", backend=request.param) as made:
        yield made
        x = data(1, (10, K))
        assert_same(
            to_host(made.run(to_torch(x))), reference(weight(0, N, K, "6:8"), "6:8", x, "int8")
        )


def test_bad_x(plan):
    import torch

    good = torch.zeros((4, K), device="cuda")
    with pytest.raises(ss.DeviceError, match="x is on cpu, but the plan is on cuda:0"):
        plan.run(torch.zeros((4, K)))
    with pytest.raises(ss.DeviceError, match="x is on cpu"):
        plan.run(np.zeros((4, K), np.float32))
    with pytest.raises(ss.ShapeError, match=r"\(\.\.\., 96\)"):
        plan.run(torch.zeros((4, K + 1), device="cuda"))
    with pytest.raises(ss.ShapeError):
        plan.run(torch.zeros((), device="cuda"))
    with pytest.raises(ss.DTypeError, match="float64"):
        plan.run(good.double())
    with pytest.raises(ss.ArrayError, match="contiguous"):
        plan.run(torch.zeros((K, 4), device="cuda").T)
    with pytest.raises(ss.ArrayError, match="evenly"):
        plan.run(torch.zeros((3, 4, 2, K), device="cuda")[:, :, 0].transpose(0, 1)[:, :2])
    with pytest.raises(ss.ArrayError):
        plan.run(good.to_sparse())
    with pytest.raises(ss.ArrayError, match="gradient"):
        plan.run(good.clone().requires_grad_())
    with pytest.raises(ss.ArrayError):
        plan.run([[0.0] * K])
    with pytest.raises(ss.OptionError, match="stream"):
        plan.run(good, stream="main")


def test_bad_out(plan):
    import torch

    x = torch.zeros((4, K), device="cuda")
    for out, error in (
        (torch.empty((4, N + 1), device="cuda"), ss.ShapeError),
        (torch.empty((4, N), dtype=torch.float16, device="cuda"), ss.DTypeError),
        (torch.empty((4, N)), ss.DeviceError),
        (torch.empty((1, N), device="cuda").expand(4, N), ss.ArrayError),
        (torch.empty((N, 4), device="cuda").T, ss.ArrayError),
        (x[:, :N], ss.ArrayError),
    ):
        with pytest.raises(error):
            plan.run(x, out=out)


def test_bad_weights():
    w = data(0, (N, K))
    for source in (w, to_torch(w)):
        for backend in BACKENDS_HERE:
            with pytest.raises(ss.PatternError) as caught:
                ss.SparseGemmPlan(source, "6:8", backend=backend, device="cuda")
            with pytest.raises(ss.PatternError) as expected:
                ss.check_pattern(w, "6:8")
            assert str(caught.value) == str(expected.value)
            assert caught.value.violations == N * K // 8
    bad = weight(0, N, K, "6:8")
    bad[5, 17] = np.inf
    for source in (bad, to_torch(bad)):
        with pytest.raises(ss.NonFiniteError, match="row 5, column 17"):
            ss.SparseGemmPlan(source, "6:8", backend="dense", device="cuda")
    huge = weight(0, N, K, "6:8")
    huge[huge != 0] = 1e6
    with pytest.raises(ss.NonFiniteError, match="too large for fp16"):
        ss.SparseGemmPlan(to_torch(huge), "6:8", dtype="fp16", backend="dense")
    with pytest.raises(ss.DeviceError):
        ss.SparseGemmPlan(to_torch(bad), "6:8", device="cpu")
    with pytest.raises(ss.BackendUnavailable, match="cuda:99"):
        ss.SparseGemmPlan(bad, "6:8", backend="dense", device="cuda:99")


def test_use_after_close():
    import torch

    for backend in BACKENDS_HERE:
        plan = ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", backend=backend)
        plan.close()
        plan.close()
        with pytest.raises(ss.PlanClosed):
            plan.run(torch.zeros((4, K), device="cuda"))
        with pytest.raises(ss.PlanClosed):
            plan.prepare([4])
        assert "closed" in plan.explain()


def test_out_of_memory_leaves_the_plan_usable(plan):
    import cupy
    import torch

    gc.collect()
    torch.cuda.empty_cache()
    cupy.get_default_memory_pool().free_all_blocks()
    # Enough of them that what every backend needs is more than the odd ends of memory.
    rows = 50_000
    x = torch.zeros((rows, K), device="cuda")
    out = torch.empty((rows, N), device="cuda")
    plan.prepare([rows], x_dtype="float32", stream=torch.cuda.Stream())
    free, _ = cupy.cuda.runtime.memGetInfo()
    hog = []
    for size in (1 << 30, 1 << 24, 1 << 20):
        while True:
            try:
                hog.append(cupy.cuda.Memory(size))
            except cupy.cuda.runtime.CUDARuntimeError:
                break
    try:
        with pytest.raises(ss.DeviceMemoryError, match="bytes left"):
            plan.run(x, out=out)
        with pytest.raises(ss.DeviceMemoryError):
            ss.SparseGemmPlan(weight(0, 4096, 8192, "6:8"), "6:8", backend=plan.backend)
    finally:
        hog.clear()
    after, _ = cupy.cuda.runtime.memGetInfo()
    assert abs(free - after) < 64 << 20
    assert (plan.run(x, out=out) == 0).all()


def test_no_memory_for_a_result_has_a_name(plan):
    """Half a terabyte, from an x that repeats one row; the plan works afterwards."""
    import cupy
    import torch

    rows = 1 << 31
    row = torch.zeros((1, K), device="cuda")
    for x in (row.expand(rows, K), cupy.broadcast_to(cupy.asarray(row), (rows, K))):
        with pytest.raises(ss.DeviceMemoryError, match="no memory on cuda:0 for a result of shape"):
            plan.run(x)


def test_numbers_of_tokens_that_cannot_be_prepared(plan):
    for bad in (0, -1, True, 1.5, "4"):
        with pytest.raises(ss.OptionError, match="whole numbers from 1 on"):
            plan.prepare([bad])
    with pytest.raises(ss.DTypeError, match="float64"):
        plan.prepare([4], x_dtype="float64")
    with pytest.raises(ss.OptionError, match="stream is"):
        plan.prepare([4], stream="main")
    with pytest.raises(ss.OptionError, match="per-thread default stream"):
        plan.prepare([4], stream=2)


@pytest.mark.slow
@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_leak_nothing(backend):
    import cupy
    import psutil

    w = ss.SparseWeight.from_array(weight(0, N, K, "6:8"), "6:8")
    x = to_torch(data(1, (16, K), "bfloat16"))

    def cycle(count: int) -> tuple[int, int]:
        for _ in range(count):
            with ss.SparseGemmPlan(w, backend=backend) as plan:
                plan.run(x)
        cupy.cuda.runtime.deviceSynchronize()
        gc.collect()
        return cupy.cuda.runtime.memGetInfo()[0], psutil.Process().memory_info().rss

    cycle(500)
    free, rss = cycle(500)
    free_after, rss_after = cycle(9_000)
    assert free - free_after < 4 << 20
    # A leak of one kilobyte a plan would be 9 MB.
    assert rss_after - rss < 6 << 20
