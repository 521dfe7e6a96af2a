"""int8 products of cuSPARSELt that apply the channel scales, held to their bound."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tolerances import fused

import slidesparse_rt as ss
from slidesparse_rt.packing import quantize, quantize_tokens
from slidesparse_rt.pattern import PATTERNS

from .common import (
    FLOATS,
    Array,
    assert_same,
    data,
    reference,
    to_host,
    to_torch,
    weight,
)

pytestmark = pytest.mark.gpu

FUSED = ss.PlanOptions(fuse_channel_scales=True)
SETTINGS = {"backend": "cusparselt", "device": "cuda", "options": FUSED}


def assert_within(
    found: Array, w: Array, x: Array, bias: Array | None = None, x_scale: float | None = None
) -> None:
    """Within the bound of docs/numerics.md#fused-channel-scales."""
    (qw, sw), (qx, sx) = quantize(w, "int8"), quantize_tokens(x, "int8", x_scale=x_scale)
    # Scaled after they are summed: sums are exact in float64, also where they are 0.
    sums = qx.astype(np.float64) @ qw.astype(np.float64).T
    exact = sums * sx.astype(np.float64)[:, None] * sw.astype(np.float64)
    wide = None if bias is None else bias.astype(np.float64)
    error = np.abs(found.astype(np.float64) - (exact if wide is None else exact + wide))
    worst = float((error / fused(exact, wide, found.dtype.name)).max(initial=0.0))
    assert worst <= 1.0, f"error is {worst:.3g} of the bound"


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pattern=st.sampled_from([pattern.name for pattern in PATTERNS]),
    n=st.integers(1, 200),
    k=st.integers(1, 600),
    m=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 255, 256, 257])),
    x_type=st.sampled_from(FLOATS),
    out_type=st.sampled_from([*FLOATS, None]),
    with_bias=st.booleans(),
    x_scale=st.sampled_from([None, 0.02]),
    seed=st.integers(0, 2**31),
)
def test_every_shape_stays_within_the_bound(
    pattern, n, k, m, x_type, out_type, with_bias, x_scale, seed
):
    w, x = weight(seed, n, k, pattern), data(seed + 1, (m, k), x_type)
    w *= np.exp2(np.random.default_rng(seed).uniform(-8, 8, (n, 1))).astype(np.float32)
    bias = data(seed + 2, (n,)) if with_bias else None
    with ss.SparseGemmPlan(
        w, pattern, bias=bias, out_dtype=out_type, x_scale=x_scale, **SETTINGS
    ) as plan:
        assert plan.backend == "cusparselt"
        assert_within(to_host(plan.run(to_torch(x))), w, x, bias, x_scale)


@pytest.mark.parametrize("m", [1, 16, 17, 300, 4096])
@pytest.mark.parametrize(("n", "k"), [(256, 16384), (1000, 4096), (96, 133_144)])
def test_long_sums_stay_within_the_bound(n, k, m):
    """Sums above 2**24; with few tokens and long rows the search may split K."""
    w, x = weight(1, n, k, "6:8"), data(2, (m, k), "bfloat16")
    x[0] = np.abs(x[0])
    w[0] = np.abs(w[0])
    with ss.SparseGemmPlan(w, "6:8", out_dtype="float32", **SETTINGS) as plan:
        assert_within(to_host(plan.run(to_torch(x))), w, x)


def test_it_is_another_search_and_another_result():
    w, x = weight(3, 320, 512, "6:8"), data(4, (200, 512), "bfloat16")
    expected = reference(w, "6:8", x, "int8", out_dtype="float32")
    for _ in range(2):
        with ss.SparseGemmPlan(
            w, "6:8", backend="cusparselt", device="cuda", out_dtype="float32"
        ) as plan:
            assert "channel scales" not in plan.explain()
            assert_same(to_host(plan.run(to_torch(x))), expected)
        with ss.SparseGemmPlan(w, "6:8", out_dtype="float32", **SETTINGS) as plan:
            assert "channel scales: fused into the product" in plan.explain()
            found = to_host(plan.run(to_torch(x)))
            assert_within(found, w, x)
            assert not np.array_equal(found, expected)  # it rounds to bfloat16 in between


def test_a_token_that_is_not_finite_spoils_only_its_own_row():
    w, x = weight(5, 70, 128, "6:8"), data(6, (40, 128))
    x[3, 7], x[11, 0], x[12, 127] = np.nan, np.inf, -np.inf
    with ss.SparseGemmPlan(w, "6:8", **SETTINGS) as plan:
        y = to_host(plan.run(to_torch(x)))
        clean = to_host(plan.run(to_torch(np.nan_to_num(x, nan=0, posinf=0, neginf=0))))
    spoiled = np.zeros(40, bool)
    spoiled[[3, 11, 12]] = True
    assert np.isnan(y[spoiled]).all()
    np.testing.assert_array_equal(y[~spoiled], clean[~spoiled])


def test_channels_of_every_size():
    """Scales from 2**-126 on, and a channel of zeros, whose scale is 1."""
    w, x = weight(7, 64, 100, "4:6"), data(8, (33, 100))
    w *= (2.0 ** np.linspace(-140, 100, 64)[:, None]).astype(np.float32)
    w[5] = 0
    with ss.SparseGemmPlan(w, "4:6", **SETTINGS) as plan:
        y = to_host(plan.run(to_torch(x)))
    assert_within(y, w, x)
    assert (y[:, 5] == 0).all()


def test_graphs_and_split_runs():
    import torch

    w = weight(9, 96, 256, "6:8")
    small = ss.PlanOptions(fuse_channel_scales=True, workspace_limit=1 << 20)
    with (
        ss.SparseGemmPlan(w, "6:8", **SETTINGS) as plan,
        ss.SparseGemmPlan(w, "6:8", backend="cusparselt", options=small) as split,
    ):
        x = torch.zeros((48, 256), dtype=torch.bfloat16, device="cuda")
        out = torch.empty((48, 96), dtype=torch.bfloat16, device="cuda")
        stream = torch.cuda.Stream()
        plan.prepare([48], stream=stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            plan.run(x, out=out)
        for seed in range(3):
            values = data(seed, (48, 256), "bfloat16")
            x.copy_(to_torch(values))
            out.fill_(7)
            graph.replay()
            torch.cuda.synchronize()
            assert_within(to_host(out), w, values)
        values = data(10, (5000, 256), "bfloat16")
        assert_within(to_host(split.run(to_torch(values))), w, values)


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [
        ("dense", "int8"),
        ("dense", "fp8_e4m3"),
        ("cusparselt", "fp8_e4m3"),
        ("hopper", "int8"),
    ],
)
def test_other_backends_and_formats_refuse_it(backend, dtype):
    with pytest.raises(ss.OptionError, match="allowed is int8 on cusparselt"):
        ss.SparseGemmPlan(
            weight(0, 64, 96, "6:8"), "6:8", dtype=dtype, backend=backend, options=FUSED
        )
