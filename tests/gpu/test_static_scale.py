"""Plans with one activation scale for all tokens, on a GPU against the exact reference."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import F32_MAX

import slidesparse_rt as ss
from slidesparse_rt.dtypes import operand
from slidesparse_rt.pattern import PATTERNS

from .common import (
    BACKENDS,
    BACKENDS_HERE,
    FLOATS,
    assert_near,
    assert_same,
    data,
    reference,
    to_host,
    to_torch,
    weight,
)

pytestmark = pytest.mark.gpu

SCALED = [(backend, dtype) for backend in BACKENDS for dtype in ("int8", "fp8_e4m3")]


def calibrated(x: np.ndarray, dtype: str, part: float) -> float:
    """A scale that covers ``part`` of the largest magnitude, so that some numbers are cut off."""
    return float(np.abs(x.astype(np.float32)).max()) * part / float(operand(dtype).q_max or 1)


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pattern=st.sampled_from([pattern.name for pattern in PATTERNS]),
    n=st.integers(1, 200),
    k=st.integers(1, 600),
    m=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 255, 256, 257])),
    x_type=st.sampled_from(FLOATS),
    out_type=st.sampled_from([*FLOATS, None]),
    with_bias=st.booleans(),
    part=st.sampled_from([0.25, 1.0, 3.0]),
    seed=st.integers(0, 2**31),
)
def test_int8_is_identical_to_the_bit(pattern, n, k, m, x_type, out_type, with_bias, part, seed):
    w, x = weight(seed, n, k, pattern), data(seed + 1, (m, k), x_type)
    x[0] = 0
    options = {
        "bias": data(seed + 2, (n,)) if with_bias else None,
        "out_dtype": out_type,
        "x_scale": calibrated(x, "int8", part) if x.any() else 0.5,
    }
    expected = reference(w, pattern, x, "int8", **options)
    for backend in BACKENDS_HERE:
        with ss.SparseGemmPlan(w, pattern, backend=backend, device="cuda", **options) as plan:
            assert_same(to_host(plan.run(to_torch(x))), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("x_scale", [2.0**-126, 1e-30, 2.0**-7, 3e4, 2.0**126, F32_MAX])
def test_scales_of_every_size(backend, x_scale):
    w, x = weight(5, 48, 100, "4:6"), data(6, (64, 100))
    x *= (2.0 ** np.linspace(-140, 124, 64)[:, None]).astype(np.float32)
    expected = reference(w, "4:6", x, "int8", x_scale=x_scale)
    with ss.SparseGemmPlan(w, "4:6", backend=backend, device="cuda", x_scale=x_scale) as plan:
        assert_same(to_host(plan.run(to_torch(x))), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("out_type", FLOATS)
@pytest.mark.parametrize("n", [96, 97])  # 96: a dense product may scale and write by itself
def test_fp8_stays_within_its_bound(backend, out_type, n):
    for m in (1, 16, 300, 4096):
        w, x = weight(7, n, 512, "6:8"), data(m, (m, 512), "bfloat16")
        x_scale = calibrated(x, "fp8_e4m3", 0.5)
        with ss.SparseGemmPlan(
            w,
            "6:8",
            dtype="fp8_e4m3",
            backend=backend,
            device="cuda",
            out_dtype=out_type,
            x_scale=x_scale,
        ) as plan:
            assert_near(to_host(plan.run(to_torch(x))), w, x, "fp8_e4m3", x_scale=x_scale)


@pytest.mark.parametrize("backend", BACKENDS)
def test_short_and_long_rows_and_odd_strides(backend):
    """Kernels of a warp, of a block and of tiles, and the one for loads of single elements."""
    for k, x_type in ((8, "bfloat16"), (1000, "float16"), (8192, "float32"), (70_000, "bfloat16")):
        w, wide = weight(8, 32, k, "6:8"), data(9, (20, k + 3), x_type)
        x_scale = calibrated(wide, "int8", 0.7)
        with ss.SparseGemmPlan(w, "6:8", backend=backend, device="cuda", x_scale=x_scale) as plan:
            for view in (slice(0, k), slice(1, k + 1)):
                expected = reference(w, "6:8", wide[:, view], "int8", x_scale=x_scale)
                assert_same(to_host(plan.run(to_torch(wide)[:, view])), expected)


@pytest.mark.parametrize(("backend", "dtype"), SCALED)
def test_a_token_that_is_not_finite_spoils_only_its_own_row(backend, dtype):
    w, x = weight(3, 64, 128, "6:8"), data(4, (40, 128))
    x[3, 7], x[11, 0], x[12, 127] = np.nan, np.inf, -np.inf
    with ss.SparseGemmPlan(
        w, "6:8", dtype=dtype, backend=backend, device="cuda", x_scale=0.02
    ) as plan:
        y = to_host(plan.run(to_torch(x)))
        clean = to_host(plan.run(to_torch(np.nan_to_num(x, nan=0, posinf=0, neginf=0))))
        assert "one scale for all tokens, 0.02 (static)" in plan.explain()
    spoiled = np.zeros(40, bool)
    spoiled[[3, 11, 12]] = True
    assert np.isnan(y[spoiled]).all()
    np.testing.assert_array_equal(y[~spoiled], clean[~spoiled])


@pytest.mark.parametrize(("backend", "dtype"), SCALED)
def test_graphs_hold_the_scale(backend, dtype):
    import torch

    w = weight(0, 96, 256, "6:8")
    with ss.SparseGemmPlan(w, "6:8", dtype=dtype, backend=backend, x_scale=0.01) as plan:
        x = torch.zeros((48, 256), dtype=torch.bfloat16, device="cuda")
        out = torch.empty((48, 96), dtype=torch.bfloat16, device="cuda")
        stream = torch.cuda.Stream()
        plan.prepare([48], stream=stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            plan.run(x, out=out)
        for seed in range(3):
            fresh = to_torch(data(seed, (48, 256), "bfloat16"))
            x.copy_(fresh)
            out.fill_(7)
            graph.replay()
            torch.cuda.synchronize()
            assert torch.equal(out, plan.run(fresh))


@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_of_one_weight_keep_their_own_scales(backend):
    """The device's kernels are shared by plans; scales are not."""
    w, x = weight(10, 64, 96, "6:8"), data(11, (17, 96))
    packed = ss.SparseWeight.from_array(w, "6:8")
    scales = (None, 0.01, 0.05)
    plans = [
        ss.SparseGemmPlan(packed, backend=backend, device="cuda", x_scale=scale) for scale in scales
    ]
    results = [to_host(plan.run(to_torch(x))) for plan in plans]
    for plan, scale, found in zip(plans, scales, results, strict=True):
        assert_same(found, reference(w, "6:8", x, "int8", x_scale=scale))
        plan.close()
    assert not np.array_equal(results[1], results[2])
