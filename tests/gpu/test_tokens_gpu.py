"""Numbers of tokens, leading dimensions, strides and alignments, through plans, to the bit."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slidesparse_rt as ss

from .common import (
    BACKENDS,
    FLOATS,
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

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "8:10", "30:32", "dense"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_every_number_of_tokens_for_other_patterns(backend, pattern):
    """6:8 and 70,000 tokens are in test_plans.py."""
    n, k = 112, 250
    w, bias = weight(0, n, k, pattern), data(1, (n,))
    with ss.SparseGemmPlan(w, pattern, bias=bias, backend=backend, device="cuda") as plan:
        for m in (0, 1, 15, 16, 17, 255, 4096):
            x = data(m, (m, k), "float16")
            y = to_host(plan.run(to_torch(x)))
            assert_same(y, reference(w, pattern, x, "int8", bias=bias))


@pytest.mark.parametrize(("backend", "dtype"), FORMATS)
def test_a_result_does_not_depend_on_how_many_tokens_come_with_it(backend, dtype):
    """A token alone, and among others; int8 to the bit, the others within their bound."""
    w, x = weight(2, 96, 256, "6:8"), data(3, (255, 256), "bfloat16")
    with ss.SparseGemmPlan(w, "6:8", dtype=dtype, backend=backend, device="cuda") as plan:
        whole = to_host(plan.run(to_torch(x)))
        for m in (1, 15, 16, 17):
            part = to_host(plan.run(to_torch(x[:m])))
            if dtype == "int8":
                assert_same(part, whole[:m])
            assert_near(part, w, x[:m], dtype, sums=sums_of(backend, dtype))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("shape", [(0,), (1,), (3, 0), (2, 3), (1, 1, 5), ()])
def test_leading_dimensions(backend, shape):
    import cupy
    import jax
    import jax.numpy as jnp
    import torch

    w, x = weight(4, 64, 96, "6:8"), data(5, (*shape, 96))
    rows = reference(w, "6:8", x.reshape(-1, 96), "int8")
    expected = rows.reshape(*shape, 64)
    with ss.SparseGemmPlan(w, "6:8", backend=backend, device="cuda") as plan:
        for array, kind in (
            (to_torch(x), torch.Tensor),
            (cupy.asarray(x), cupy.ndarray),
            (jnp.asarray(x), jax.Array),
        ):
            y = plan.run(array)
            assert isinstance(y, kind)
            assert_same(to_host(y), expected)
        out = torch.full((*shape, 64), 7.0, device="cuda")
        assert plan.run(to_torch(x), out=out) is out
        assert_same(to_host(out), expected)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    m=st.integers(1, 40),
    k=st.integers(1, 300),
    n=st.integers(1, 100),
    x_type=st.sampled_from(FLOATS),
    out_type=st.sampled_from(FLOATS),
    x_place=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    out_place=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    seed=st.integers(0, 2**31),
)
def test_any_stride_and_address(backend, m, k, n, x_type, out_type, x_place, out_place, seed):
    """Columns before and after x and out; what is around out stays."""
    import torch

    w, x = weight(seed, n, k, "6:8"), data(seed + 1, (m, k), x_type)
    expected = reference(w, "6:8", x, "int8", out_dtype=out_type)
    (before, after), (left, right) = x_place, out_place
    held = torch.full((m, before + k + after), 3.0, dtype=getattr(torch, x_type), device="cuda")
    view = held[:, before : before + k]
    view.copy_(to_torch(x))
    wide = torch.full((m, left + n + right), 7.0, dtype=getattr(torch, out_type), device="cuda")
    out = wide[:, left : left + n]
    with ss.SparseGemmPlan(w, "6:8", out_dtype=out_type, backend=backend, device="cuda") as plan:
        assert plan.run(view, out=out) is out
        assert_same(to_host(plan.run(view)), expected)
    assert_same(to_host(out.contiguous()), expected)
    assert bool((wide[:, :left] == 7).all())
    assert bool((wide[:, left + n :] == 7).all())


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_in_reverse(backend):
    """Evenly apart, backwards: CuPy has negative strides."""
    import cupy

    w, x = weight(6, 64, 96, "6:8"), data(7, (9000, 96))
    expected = reference(w, "6:8", x, "int8")
    small = ss.PlanOptions(workspace_limit=1 << 20)  # splits the run
    for options in (ss.PlanOptions(), small):
        with ss.SparseGemmPlan(w, "6:8", backend=backend, device="cuda", options=options) as plan:
            assert (plan._runner._forms[""].most < 9000) == (options is small)
            y = plan.run(cupy.asarray(x)[::-1])
            assert_same(cupy.asnumpy(y), expected[::-1])
            out = cupy.zeros((9000, 64), np.float32)
            plan.run(cupy.asarray(x), out=out[::-1])
            assert_same(cupy.asnumpy(out), expected[::-1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_streams_by_protocol(backend):
    """Any object with ``__cuda_stream__``, as a method or as a value."""
    import torch

    side = torch.cuda.Stream()

    class Method:
        def __cuda_stream__(self):
            return 0, side.cuda_stream

    class Value:
        __cuda_stream__ = (0, side.cuda_stream)

    w, x = weight(8, 64, 96, "6:8"), data(9, (40, 96))
    held = to_torch(x)
    with ss.SparseGemmPlan(w, "6:8", backend=backend, device="cuda") as plan:
        for stream in (Method(), Value()):
            plan.prepare([40], x_dtype="float32", stream=stream)
            y = plan.run(held, stream=stream)
            side.synchronize()
            assert_same(to_host(y), reference(w, "6:8", x, "int8"))
