"""Plans on a GPU against the exact reference: every backend, format, pattern, shape and type."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slidesparse_rt as ss
from slidesparse_rt.pattern import PATTERNS

from .common import (
    BACKENDS,
    FLOATS,
    FORMATS,
    assert_near,
    assert_same,
    data,
    numpy_type,
    reference,
    sums_of,
    to_host,
    to_torch,
    weight,
)

pytestmark = pytest.mark.gpu

patterns = st.sampled_from([pattern.name for pattern in PATTERNS])


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pattern=patterns,
    n=st.integers(1, 200),
    k=st.integers(1, 600),
    m=st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 255, 256, 257])),
    x_type=st.sampled_from(FLOATS),
    out_type=st.sampled_from([*FLOATS, None]),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_int8_is_identical_to_the_bit(backend, pattern, n, k, m, x_type, out_type, with_bias, seed):
    w, x = weight(seed, n, k, pattern), data(seed + 1, (m, k), x_type)
    bias = data(seed + 2, (n,)) if with_bias else None
    expected = reference(w, pattern, x, "int8", bias=bias, out_dtype=out_type)
    with ss.SparseGemmPlan(
        w, pattern, bias=bias, out_dtype=out_type, backend=backend, device="cuda"
    ) as plan:
        assert plan.backend == backend
        assert_same(to_host(plan.run(to_torch(x))), expected)


@pytest.mark.parametrize(("backend", "dtype"), [row for row in FORMATS if row[1] != "int8"])
@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    pattern=patterns,
    n=st.integers(1, 200),
    k=st.integers(1, 600),
    m=st.one_of(st.integers(1, 70), st.sampled_from([255, 256])),
    x_type=st.sampled_from(FLOATS),
    with_bias=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_rounded_formats_stay_within_their_bound(
    backend, dtype, pattern, n, k, m, x_type, with_bias, seed
):
    w, x = weight(seed, n, k, pattern), data(seed + 1, (m, k), x_type)
    bias = data(seed + 2, (n,)) if with_bias else None
    with ss.SparseGemmPlan(
        w, pattern, dtype=dtype, bias=bias, backend=backend, device="cuda"
    ) as plan:
        near = to_host(plan.run(to_torch(x)))
        assert_near(near, w, x, dtype, bias, sums=sums_of(backend, dtype))


@pytest.mark.parametrize(("backend", "dtype"), FORMATS)
def test_every_number_of_tokens(backend, dtype):
    n, k = 96, 250
    w = weight(0, n, k, "6:8")
    with ss.SparseGemmPlan(w, "6:8", dtype=dtype, backend=backend, device="cuda") as plan:
        for m in (0, 1, 15, 16, 17, 255, 4096, 70000):
            x = data(m, (m, k), "bfloat16")
            y = to_host(plan.run(to_torch(x)))
            assert y.shape == (m, n)
            assert y.dtype == ml_dtypes.bfloat16
            if m == 0:
                continue
            if dtype == "int8":
                assert_same(y, reference(w, "6:8", x, dtype))
            else:
                assert_near(y, w, x, dtype, sums=sums_of(backend, dtype))


@pytest.mark.parametrize(("backend", "dtype"), FORMATS)
def test_a_token_that_is_not_finite_spoils_only_its_own_row(backend, dtype):
    w, x = weight(3, 64, 128, "6:8"), data(4, (40, 128))
    x[3, 7], x[11, 0], x[12, 127] = np.nan, np.inf, -np.inf
    with ss.SparseGemmPlan(w, "6:8", dtype=dtype, backend=backend, device="cuda") as plan:
        y = to_host(plan.run(to_torch(x)))
        clean = to_host(plan.run(to_torch(np.nan_to_num(x, nan=0, posinf=0, neginf=0))))
    spoiled = np.zeros(40, bool)
    spoiled[[3, 11, 12]] = True
    assert np.isnan(y[spoiled]).all()
    np.testing.assert_array_equal(y[~spoiled], clean[~spoiled])


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_every_size(backend):
    w = weight(5, 48, 100, "4:6")
    x = data(6, (64, 100))
    x *= (2.0 ** np.linspace(-140, 100, 64, dtype=np.float64)[:, None]).astype(np.float32)
    x[5] = 0
    expected = reference(w, "4:6", x, "int8")
    with ss.SparseGemmPlan(w, "4:6", backend=backend, device="cuda") as plan:
        assert_same(to_host(plan.run(to_torch(x))), expected)


@pytest.mark.parametrize(("backend", "dtype"), FORMATS)
def test_weights_from_the_host_from_the_gpu_and_from_a_file_agree(backend, dtype, tmp_path):
    x = to_torch(data(1, (33, 300), "bfloat16"))
    for kind in FLOATS:
        w = weight(7, 70, 300, "8:10", kind)
        packed = ss.SparseWeight.from_array(w, "8:10", dtype=dtype)
        packed.save(tmp_path / "w.safetensors")
        found = []
        for source in (w, to_torch(w), ss.SparseWeight.load(tmp_path / "w.safetensors")):
            pattern = None if isinstance(source, ss.SparseWeight) else "8:10"
            options = {} if pattern is None else {"dtype": dtype}
            with ss.SparseGemmPlan(
                source, pattern, backend=backend, device="cuda", **options
            ) as plan:
                found.append(to_host(plan.run(x)))
        assert_same(found[1], found[0])
        assert_same(found[2], found[0])


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_elements_than_32_bits_count(backend):
    import torch

    n, k, m = 32, 18944, 80_000
    assert m * ss.Pattern.parse("6:8").slid_k(k) > 2**31
    w = weight(8, n, k, "6:8")
    x = torch.randn((m, k), dtype=torch.bfloat16, device="cuda")
    options = ss.PlanOptions(workspace_limit=16 << 30)
    with ss.SparseGemmPlan(w, "6:8", backend=backend, device="cuda", options=options) as plan:
        y = plan.run(x)
        split = ss.PlanOptions(workspace_limit=1 << 30)
        with ss.SparseGemmPlan(w, "6:8", backend=backend, device="cuda", options=split) as other:
            assert torch.equal(other.run(x), y)
    rows = [0, 1, 37_799, 37_800, 75_573, 75_574, m - 1]
    assert_same(to_host(y[rows]), reference(w, "6:8", to_host(x[rows]), "int8"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_alignments(backend):
    import torch

    w = weight(9, 40, 72, "6:8")
    base = torch.randn((50, 131), device="cuda")
    views = {
        "a slice of columns": base[:, 5:77],
        "every second row": base[::2, :72],
        "one row for all": base[:1, :72].expand(6, 72),
        "three dimensions": base[:48, :72].view(6, 8, 72)
        if base[:48, :72].is_contiguous()
        else base[:48].as_strided((6, 8, 72), (8 * 131, 131, 1)),
        "one token": base[3, :72],
    }
    with ss.SparseGemmPlan(w, "6:8", backend=backend, device="cuda") as plan:
        for name, x in views.items():
            expected = reference(w, "6:8", to_host(x.contiguous()), "int8")
            assert_same(to_host(plan.run(x)), expected), name
            out = torch.full((*x.shape[:-1], 43), 7.0, device="cuda")
            y = out[..., 1:41]
            assert plan.run(x, out=y) is y
            assert_same(to_host(y.contiguous()), expected)
            assert (out[..., 0] == 7).all()
            assert (out[..., 41:] == 7).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_results_are_the_same_every_time(backend):
    import torch

    for dtype in ("int8", "fp8_e4m3", "bf16"):
        w = weight(10, 512, 1024, "6:8")
        x = to_torch(data(11, (300, 1024), "bfloat16"))
        with ss.SparseGemmPlan(w, "6:8", dtype=dtype, backend=backend, device="cuda") as plan:
            first = plan.run(x)
            for _ in range(20):
                assert torch.equal(plan.run(x), first)


@pytest.mark.parametrize(("backend", "dtype"), FORMATS)
def test_out_types_and_bias(backend, dtype):
    for out_type in FLOATS:
        for exact in (True, False):
            w, x = weight(12, 256, 512, "6:8"), data(13, (64, 512), "bfloat16")
            bias = data(14, (256,), "bfloat16" if exact else "float32")
            with ss.SparseGemmPlan(
                w,
                "6:8",
                dtype=dtype,
                bias=bias,
                out_dtype=out_type,
                backend=backend,
                device="cuda",
            ) as plan:
                y = to_host(plan.run(to_torch(x)))
            assert y.dtype == numpy_type(out_type)
            assert_near(y, w, x, dtype, bias, sums=sums_of(backend, dtype))


def test_fp16_of_cusparselt_runs_only_where_it_is_right():
    """Its probe answers in another process; either way nothing wrong comes out."""
    w, x = weight(15, 256, 512, "6:8"), data(16, (256, 512), "float16")
    try:
        with ss.SparseGemmPlan(w, "6:8", dtype="fp16", backend="cusparselt") as plan:
            assert_near(to_host(plan.run(to_torch(x))), w, x, "fp16", sums="float16")
    except ss.BackendUnavailable as error:
        assert "tried in a process of its own" in str(error)
    with ss.SparseGemmPlan(w, "6:8", dtype="fp16", device="cuda") as plan:
        assert_near(to_host(plan.run(to_torch(x))), w, x, "fp16", sums="float16")


@pytest.mark.parametrize("kind", FLOATS)
def test_pruning_and_checking_on_the_gpu_is_that_on_the_host(kind):
    for pattern in PATTERNS:
        for n, k in ((1, 1), (3, 7), (65, 200), (128, 1024)):
            w = data(n * k, (n, k), kind)
            w[0, 0] = 0
            w[:, k // 2] = -w[:, 0]  # ties
            norms = np.abs(data(1, (k,)))
            pruned = ss.prune(w, pattern)
            found = ss.prune(to_torch(w), pattern)
            assert found.is_cuda
            assert_same(to_host(found), pruned)
            wanda = ss.prune(to_torch(w), pattern, method="wanda", norms=norms)
            assert_same(to_host(wanda), ss.prune(w, pattern, method="wanda", norms=norms))
            ss.check_pattern(found, pattern)
            assert ss.prune(to_torch(w)[:, ::1], pattern, threads=2) is not None
    w[5, 3] = np.nan
    for call in (ss.prune, ss.check_pattern):
        with pytest.raises(ss.NonFiniteError, match="row 5, column 3"):
            call(to_torch(w), "6:8")
