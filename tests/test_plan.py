"""Plans on the CPU: the product against its definition and float64, and the life of a plan."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import definition
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from plans import assert_close, fitted, tokens
from strategies import (
    FLOATS,
    LAYOUTS,
    OPERAND_NAMES,
    extents,
    fitting_mask,
    floats,
    operand_names,
    patterns,
    same_bits,
    seeds,
)

import slidesparse_rt as ss
from slidesparse_rt import backends, gpu_run, plan
from slidesparse_rt.arrays import Device
from slidesparse_rt.dtypes import array_type
from slidesparse_rt.pattern import PATTERNS, Pattern
from slidesparse_rt.tuning import select
from slidesparse_rt.tuning.cache import TableCache

OUT_TYPES = (None, "float32", "float16", "bfloat16")
CASTS = {"float32": definition.f32, "float16": definition.f16, "bfloat16": definition.bf16}


#: These tests are about machines without a GPU, also where there is one.
pytestmark = pytest.mark.usefixtures("no_gpu")

# The product


@given(
    st.data(),
    patterns,
    operand_names,
    floats,
    floats,
    st.sampled_from(OUT_TYPES),
    st.booleans(),
    st.lists(st.integers(1, 3), max_size=3),
)
def test_the_product_is_within_the_derived_tolerance(
    data: st.DataObject,
    pattern: Pattern,
    dtype: str,
    weight_type: np.dtype,
    x_type: np.dtype,
    out_dtype: str | None,
    biased: bool,
    leading: list[int],
) -> None:
    n, k = data.draw(extents(pattern))
    rng = np.random.default_rng(data.draw(seeds))
    mask = fitting_mask(rng, pattern, n, k, "full")
    weight = np.where(mask, rng.standard_normal((n, k)), 0).astype(weight_type)
    x = rng.standard_normal((*leading, k)).astype(x_type)
    bias = rng.standard_normal(n).astype(x_type) if biased else None
    layout = data.draw(st.sampled_from(sorted(LAYOUTS)))
    with ss.SparseGemmPlan(
        LAYOUTS[layout](weight), pattern, dtype=dtype, bias=bias, out_dtype=out_dtype
    ) as made:
        y = made.run(x)
    kind = out_dtype or x_type.name
    assert y.dtype.name == kind
    assert y.shape == (*leading, n)
    assert_close(y.reshape(-1, n), x.reshape(-1, k), weight, bias, dtype)


@given(st.data(), patterns, st.sampled_from(("int8", "fp8_e4m3")), floats, st.booleans())
def test_the_bits_are_those_of_the_definition(
    data: st.DataObject, pattern: Pattern, dtype: str, kind: np.dtype, biased: bool
) -> None:
    n, k = data.draw(extents(pattern, most_rows=3))
    rng = np.random.default_rng(data.draw(seeds))
    mask = fitting_mask(rng, pattern, n, k, "loose")
    weight = np.where(mask, rng.standard_normal((n, k)), 0).astype(kind)
    x = (rng.standard_normal((2, k)) * 10.0 ** rng.integers(-3, 3, (2, 1))).astype(kind)
    bias = rng.standard_normal(n).astype(kind) if biased else None
    y = ss.sparse_matmul(x, weight, pattern, dtype=dtype, bias=bias)
    expected = definition.gemm(x, weight, bias, dtype, CASTS[kind.name])
    np.testing.assert_array_equal(y.astype(np.float64), np.array(expected))


@pytest.mark.parametrize("dtype", OPERAND_NAMES)
@pytest.mark.parametrize("pattern", [pattern.name for pattern in PATTERNS])
def test_every_pattern_and_operand_runs(pattern: str, dtype: str) -> None:
    weight = fitted(pattern, 5, 67)
    with ss.SparseGemmPlan(weight, pattern, dtype=dtype) as made:
        assert (made.pattern.name, made.dtype, made.shape) == (pattern, dtype, (5, 67))
        assert (made.device, made.backend) == ("cpu", "reference")
        assert made.weight is not None
        assert_close(made.run(tokens(3, 67)), tokens(3, 67), weight, None, dtype)


@pytest.mark.parametrize("shape", [(), (1,), (4,), (2, 3), (2, 1, 3), (2, 2, 1, 2)])
def test_leading_extents_are_kept(shape: tuple[int, ...], small: ss.SparseGemmPlan) -> None:
    x = tokens(*shape, 16)
    y = small.run(x)
    assert y.shape == (*shape, 4)
    assert same_bits(y.reshape(-1, 4), small.run(x.reshape(-1, 16)))


@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 2), (0, 0, 5)])
@pytest.mark.parametrize("dtype", OPERAND_NAMES)
def test_no_tokens_give_an_empty_result(shape: tuple[int, ...], dtype: str) -> None:
    import jax.numpy as jnp
    import torch

    with ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8", dtype=dtype) as made:
        x = np.zeros((*shape, 16), np.float32)
        y = made.run(x)
        assert y.shape == (*shape, 4)
        assert y.dtype == np.float32
        out = np.zeros((*shape, 4), np.float32)
        assert made.run(x, out=out) is out
        assert made.run(torch.from_numpy(x)).shape == (*shape, 4)
        assert made.run(jnp.asarray(x)).shape == (*shape, 4)


def test_rows_do_not_depend_on_each_other(small: ss.SparseGemmPlan) -> None:
    x = tokens(20, 16)
    whole = small.run(x)
    for row in range(20):
        assert same_bits(small.run(x[row]), whole[row])


@pytest.mark.parametrize("dtype", OPERAND_NAMES)
@pytest.mark.parametrize("kind", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_token_that_is_not_finite_is_nan_and_alone(
    dtype: str, kind: np.dtype, bad: float
) -> None:
    weight = fitted("6:8", 5, 24)
    weight[2] = 0  # a channel of zeros is NaN there too
    x = tokens(7, 24, dtype=kind)
    with ss.SparseGemmPlan(weight, "6:8", dtype=dtype, bias=np.ones(5, np.float32)) as made:
        clean = made.run(x)
        for column in (0, 13, 23):
            dirty = x.copy()
            dirty[1, column] = dirty[4, column] = bad
            y = made.run(dirty)
            assert np.isnan(y[[1, 4]].astype(np.float32)).all()
            others = [0, 2, 3, 5, 6]
            assert same_bits(y[others], clean[others])
            assert np.isfinite(clean.astype(np.float32)).all()


def test_a_token_beyond_float16_is_nan_for_fp16_only() -> None:
    x = tokens(3, 16)
    x[1, 5] = 1e6
    for dtype in OPERAND_NAMES:
        y = ss.sparse_matmul(x, fitted("6:8", 4, 16), "6:8", dtype=dtype)
        assert np.isnan(y[1]).all() == (dtype == "fp16")
        assert np.isfinite(y[[0, 2]]).all()


def test_results_beyond_float16_are_infinite() -> None:
    weight = np.full((1, 4), 300, np.float32)
    x = np.full((2, 4), 300, np.float16)
    x[1] = 1
    y = ss.sparse_matmul(x, weight, "dense")
    assert y.tolist() == [[np.inf], [1200.0]]


def test_zero_tokens_give_the_bias() -> None:
    bias = tokens(4)
    y = ss.sparse_matmul(np.zeros((2, 16), np.float32), fitted("6:8", 4, 16), "6:8", bias=bias)
    assert same_bits(y, np.stack([bias, bias]))


def test_the_default_is_int8_in_the_type_of_x(small: ss.SparseGemmPlan) -> None:
    assert small.dtype == "int8"
    for kind in FLOATS:
        assert small.run(tokens(2, 16, dtype=kind)).dtype == kind


def test_a_saved_weight_gives_the_same_bits(tmp_path: Any) -> None:
    weight, x = fitted("6:8", 4, 16), tokens(3, 16)
    for dtype in OPERAND_NAMES:
        packed = ss.SparseWeight.from_array(weight, "6:8", dtype=dtype)
        packed.save(tmp_path / dtype)
        made = ss.SparseGemmPlan(ss.SparseWeight.load(tmp_path / dtype))
        assert same_bits(made.run(x), ss.sparse_matmul(x, weight, "6:8", dtype=dtype))
        assert made.weight is not packed
        assert ss.SparseGemmPlan(packed).weight is packed


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", FLOATS, ids=str)
def test_every_layout_of_x(layout: str, kind: np.dtype, small: ss.SparseGemmPlan) -> None:
    x = tokens(5, 16, dtype=kind)
    assert same_bits(small.run(LAYOUTS[layout](x)), small.run(x))


def test_broadcast_and_big_endian_x(small: ss.SparseGemmPlan) -> None:
    row = tokens(1, 16)
    assert same_bits(small.run(np.broadcast_to(row, (3, 16))), np.repeat(small.run(row), 3, axis=0))
    y = small.run(row.astype(">f4"))
    assert y.dtype == np.float32
    assert same_bits(y, small.run(row))


# One shot


def test_one_shot_is_plan_and_run() -> None:
    weight, bias, x = fitted("4:6", 5, 18), tokens(5), tokens(3, 18)
    out = np.empty((3, 5), np.float16)
    y = ss.sparse_matmul(
        x, weight, pattern="4:6", dtype="fp8_e4m3", bias=bias, out_dtype="float16", out=out
    )
    assert y is out
    with ss.SparseGemmPlan(
        weight, "4:6", dtype="fp8_e4m3", bias=bias, out_dtype="float16", backend="reference"
    ) as made:
        assert same_bits(made.run(x), y)
    with pytest.raises(ss.OptionError, match="stream is given"):
        ss.sparse_matmul(x, weight, "4:6", stream=1)
    with pytest.raises(ss.BackendUnavailable, match="no backend can run"):
        ss.sparse_matmul(x, weight, "4:6", backend="dense")
    with pytest.raises(ss.ArrayError, match="list is no array"):
        ss.sparse_matmul([[0.0] * 18], weight, "4:6")


# Life of a plan


def test_use_after_close_is_refused(small: ss.SparseGemmPlan) -> None:
    x = tokens(2, 16)
    small.run(x)
    small.close()
    small.close()
    with pytest.raises(ss.PlanClosed, match="this plan is closed; make a new SparseGemmPlan"):
        small.run(x)
    with pytest.raises(ss.PlanClosed, match="closed"):
        small.prepare([1])
    assert small.nbytes == 0
    assert "closed" in small.explain()
    assert "closed" in repr(small)
    assert small.shape == (4, 16)


def test_a_with_block_closes_also_on_errors() -> None:
    with pytest.raises(ZeroDivisionError), ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8") as made:
        _ = 1 // 0
    with pytest.raises(ss.PlanClosed):
        made.run(tokens(2, 16))


def test_the_backend_is_closed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made = ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8")
    closed = []

    class Held:
        nbytes = 5

        def close(self) -> None:
            closed.append(threading.get_ident())

    monkeypatch.setattr(made, "_prepared", Held())
    barrier = threading.Barrier(8)

    def close(_: int) -> None:
        barrier.wait()
        made.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(close, range(8)))
    assert len(closed) == 1


def test_eight_threads_get_identical_bits() -> None:
    x = tokens(64, 96)
    for dtype in OPERAND_NAMES:
        with ss.SparseGemmPlan(fitted("6:8", 40, 96), "6:8", dtype=dtype) as made:
            expected = made.run(x)
            with ThreadPoolExecutor(8) as pool:
                found = list(pool.map(lambda i: made.run(x), range(40)))
        assert all(same_bits(y, expected) for y in found)


def test_plans_can_be_made_in_many_threads() -> None:
    weight, x = fitted("6:8", 300, 1024), tokens(4, 1024)
    expected = ss.sparse_matmul(x, weight, "6:8")
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: ss.sparse_matmul(x, weight, "6:8"), range(16)))
    assert all(same_bits(y, expected) for y in found)


def test_explain_says_what_runs_and_why() -> None:
    with ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8", bias=tokens(4)) as made:
        text = made.explain()
        assert "4 x 16, pattern 6:8, int8, on cpu" in text
        assert "backend: reference (asked for: auto; by rule: the first that can run)" in text
        assert "K' = 24" in text
        assert "1.500 x K" in text
        assert "1.333 x" in text
        assert f"{made.nbytes:,} bytes" in text
        assert made.nbytes == 4 * 16 + 4 * 4 + 4 * 4  # values, scales, bias
        assert "refused cusparselt: " in text
        assert "refused dense: " in text
        assert repr(made) == "SparseGemmPlan(4 x 16, 6:8, int8, cpu, reference)"
        named = ss.SparseGemmPlan(made.weight, backend="reference").explain()
        assert "(asked for: reference; it was asked for)" in named
        assert "refused" not in named
        assert "activations" not in text


def test_one_scale_for_all_tokens() -> None:
    """Against the definition; a token that is not finite still spoils its own row alone."""
    weight, x, bias = fitted("6:8", 5, 24), tokens(4, 24), tokens(5)
    packed = ss.SparseWeight.from_array(weight, "6:8", dtype="fp8_e4m3")
    x[1] = 0
    for dtype in ("int8", "fp8_e4m3"):
        expected = np.array(
            definition.gemm(x, weight, bias, dtype, definition.f32, float(np.float32(0.037)))
        )
        source = {"weight": weight, "pattern": "6:8", "dtype": dtype}
        with ss.SparseGemmPlan(**source, bias=bias, x_scale=0.037) as made:
            np.testing.assert_array_equal(made.run(x), expected)
            assert "activations: one scale for all tokens, 0.037 (static)" in made.explain()
            bad = x.copy()
            bad[2, 3] = np.inf
            y = made.run(bad)
            assert np.isnan(y[2]).all()
            np.testing.assert_array_equal(y[[0, 1, 3]], expected[[0, 1, 3]])
        again = ss.sparse_matmul(x, **source, bias=bias, x_scale=0.037)
        np.testing.assert_array_equal(again, expected)
        assert not np.array_equal(ss.sparse_matmul(x, **source, bias=bias), expected)
    np.testing.assert_array_equal(ss.sparse_matmul(x, packed, bias=bias, x_scale=0.037), expected)


def test_prepare_on_the_cpu_checks_its_arguments(small: ss.SparseGemmPlan) -> None:
    small.prepare([1, 64])
    for bad in (0, -1, 1.0, True, "1"):
        with pytest.raises(
            ss.OptionError, match=f"tokens holds {bad!r}; allowed are whole numbers"
        ):
            small.prepare([bad])  # type: ignore[list-item]
    with pytest.raises(ss.OptionError, match=r"tokens is 5; allowed is a list .*tokens=\[1, 64\]"):
        small.prepare(5)  # type: ignore[arg-type]
    with pytest.raises(ss.DTypeError, match="float64"):
        small.prepare([1], x_dtype="float64")


def test_a_plan_on_a_gpu_hands_over_to_its_runner(monkeypatch: pytest.MonkeyPatch) -> None:
    """Who is asked for what, and who is closed first; the GPU suite runs the real ones."""
    calls: list[Any] = []

    class Held:
        nbytes = 70

        def close(self) -> None:
            calls.append("weight closed")

    class Gpu:
        name = "dense"

        def prepare(
            self, source: Any, bias: Any, device: Device, options: Any, *, x_scale: Any
        ) -> Held:
            calls.append((type(source).__name__, bias, str(device), options.threads, x_scale))
            return Held()

    class Runner:
        nbytes = 7

        def __init__(
            self, prepared: Any, problem: Any, device: Device, options: Any, dispatch: Any
        ) -> None:
            assert isinstance(prepared, Held)
            assert dispatch is None
            assert (problem.n, problem.k, str(device)) == (4, 16, "cuda:1")

        def run(self, *arguments: Any) -> str:
            calls.append(arguments)
            return "result"

        def prepare(self, *arguments: Any) -> None:
            calls.append(arguments)

        def close(self) -> None:
            calls.append("runner closed")

    monkeypatch.setattr(
        plan, "choose", lambda *arguments: backends.Choice(Gpu(), {"x": "why"}, "so")
    )
    monkeypatch.setattr(gpu_run, "GpuRunner", Runner)
    monkeypatch.setattr(select, "default_cache", lambda: TableCache(None))
    options = ss.PlanOptions(threads=1)
    with ss.SparseGemmPlan(
        fitted("6:8", 4, 16), "6:8", device="cuda:1", options=options, x_scale=0.1
    ) as made:
        assert (made.device, made.backend, made.weight) == ("cuda:1", "dense", None)
        assert made.nbytes == 77
        assert made.run("x", out="out", stream=5) == "result"
        made.prepare([3], x_dtype="float16", stream=6)
        assert "refused x: why" in made.explain()
    half = array_type("float16")
    assert calls == [
        ("RawWeight", None, "cuda:1", 1, np.float32(0.1)),
        ("x", None, "out", 5),
        ([3], half, half, 6),
        "runner closed",
        "weight closed",
    ]
    packed = ss.SparseWeight.from_array(fitted("6:8", 4, 16), "6:8")
    assert ss.SparseGemmPlan(packed, device="cuda:1", out_dtype="float32").weight is packed


def test_the_public_names_of_the_module() -> None:
    assert set(plan.__all__) == {"SparseGemmPlan", "sparse_matmul"}
