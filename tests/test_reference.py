"""The reference backend against the scalar definition: the same bits for int8 and fp8."""

from __future__ import annotations

from typing import Any

import definition
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    Array,
    extents,
    fitting_mask,
    numbers,
    patterns,
    same_bits,
    seeds,
    x_scales,
)

import slidesparse_rt as ss
from slidesparse_rt.arrays import CPU, Device
from slidesparse_rt.backends import reference
from slidesparse_rt.backends.base import Problem, RawWeight
from slidesparse_rt.backends.reference import ReferenceBackend
from slidesparse_rt.dtypes import ARRAY_TYPES, array_type, operand
from slidesparse_rt.options import PlanOptions
from slidesparse_rt.pattern import Pattern

CASTS = {"float32": definition.f32, "float16": definition.f16, "bfloat16": definition.bf16}


def launched(
    weight: Any, bias: Array | None, x: Array, out_type: str, x_scale: float | None = None
) -> Array:
    """What the backend computes."""
    backend = ReferenceBackend()
    given = None if x_scale is None else np.float32(x_scale)
    prepared = backend.prepare(weight, bias, CPU, PlanOptions(), x_scale=given)
    kind = array_type(out_type)
    out = np.full((x.shape[0], weight.n), 99).astype(kind.dtype)
    problem = Problem(weight.n, weight.k, weight.pattern, weight.dtype)
    (config,) = backend.candidates(problem)
    backend.launch(prepared, x, out, kind, None, 0, config)
    return out


@st.composite
def cases(draw: st.DrawFn) -> tuple[Array, Array, Array | None, Pattern]:
    """Weight, activations and bias of any finite kind, also kinds whose results overflow."""
    pattern = draw(patterns)
    n, k = draw(extents(pattern, most_rows=4))
    rng = np.random.default_rng(draw(seeds))
    kinds = st.sampled_from(("normal", "ties", "bits", "tiny", "huge", "sparse"))
    weight = numbers(rng, (n, k), np.float32, draw(kinds))
    weight = np.where(fitting_mask(rng, pattern, n, k, "full"), weight, np.float32(0))
    x = numbers(rng, (draw(st.integers(1, 4)), k), np.float32, draw(kinds))
    bias = numbers(rng, (n,), np.float32, draw(kinds)) if draw(st.booleans()) else None
    return weight, x, bias, pattern


@given(
    cases(),
    st.sampled_from(("int8", "fp8_e4m3")),
    st.sampled_from(sorted(CASTS)),
    st.none() | x_scales,
)
def test_the_bits_are_those_of_the_definition(
    case: tuple[Array, Array, Array | None, Pattern],
    dtype: str,
    out_type: str,
    x_scale: float | None,
) -> None:
    weight, x, bias, pattern = case
    made = ss.SparseWeight.from_array(weight, pattern, dtype=dtype)
    found = launched(made, bias, x, out_type, x_scale)
    if dtype == "fp8_e4m3":
        # Stored fp8 weights have no -0, which the definition's gemm does not see either.
        assert not np.signbit(made.values.astype(np.float32)[made.values == 0]).any()
    expected = definition.gemm(x, weight, bias, dtype, CASTS[out_type], x_scale)
    np.testing.assert_array_equal(found.astype(np.float64), np.array(expected))
    again = launched(made, bias, x, out_type, x_scale)
    assert same_bits(found, again)


@pytest.mark.parametrize("k", [1040, 1041, 5000, 133_144])
def test_int8_sums_are_exact_where_float32_ends(k: int) -> None:
    """K = 1040 is the longest row whose sum of 127 * 127 float32 holds exactly."""
    assert 1040 * 127**2 <= 2**24 < 1041 * 127**2
    weight = np.full((2, k), 127, np.float32)
    weight[1, 1::2] *= -1
    weight[1, -1] = 126
    x = np.full((1, k), 127, np.float32)
    x[0, k // 2] = 126
    made = ss.SparseWeight.from_array(weight, "dense")
    assert made.values[0, 0] == 127
    out = launched(made, None, x, "float32")
    values = made.values.astype(np.int64)
    sums = values @ x[0].astype(np.int64)
    assert (sums < 2**31).all()
    assert out[0].tolist() == sums.astype(np.float32).tolist()


@pytest.mark.parametrize("k", [1041, 2500, 8000])
def test_int8_sums_are_exact_for_every_element(k: int) -> None:
    """Sums above 2**24 of odd products: a float32 sum would round in many of 4096 elements."""
    rng = np.random.default_rng(0)
    weight = rng.integers(111, 128, (64, k)).astype(np.float32)
    x = rng.integers(111, 128, (64, k)).astype(np.float32)
    weight[:, 0] = x[:, 0] = 127  # all scales are 1
    out = launched(ss.SparseWeight.from_array(weight, "dense"), None, x, "float32")
    sums = x.astype(np.int64) @ weight.astype(np.int64).T
    np.testing.assert_array_equal(out, sums.astype(np.float32))


def test_fp8_sums_are_exact() -> None:
    """Terms of 448 * 448 and of 2**-18 together: any rounding on the way would show."""
    k = 4096
    weight = np.full((1, k), 448, np.float32)
    x = np.full((1, k), 448, np.float32)
    weight[0, 1::2] = -448
    weight[0, -1] = x[0, -1] = 2.0**-9
    weight[0, -3] = 0
    made = ss.SparseWeight.from_array(weight, "dense", dtype="fp8_e4m3")
    total = sum(
        int(float(a) * 2**9) * int(float(b) * 2**9) for a, b in zip(weight[0], x[0], strict=True)
    )
    out = launched(made, None, x, "float32")
    assert out[0, 0] == np.float32(total / 2**18)


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16", "fp16"])
def test_blocks_change_nothing(dtype: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = ss.prune(rng.standard_normal((17, 24)).astype(np.float32), "6:8")
    made = ss.SparseWeight.from_array(weight, "6:8", dtype=dtype)
    x = rng.standard_normal((11, 24)).astype(np.float32)
    bias = rng.standard_normal(17).astype(np.float32)
    whole = launched(made, bias, x, "float32")
    monkeypatch.setattr(reference, "_BLOCK", 24 * 4)
    blocked = launched(made, bias, x, "float32")
    if dtype in ("int8", "fp8_e4m3"):
        assert same_bits(blocked, whole)
    else:
        np.testing.assert_allclose(blocked, whole, rtol=2.0**-23)
    monkeypatch.setattr(reference, "_BLOCK", 1)
    np.testing.assert_allclose(launched(made, bias, x, "float32"), whole, rtol=2.0**-23)


def test_every_output_type_is_one_rounding_of_float32() -> None:
    rng = np.random.default_rng(0)
    weight = ss.SparseWeight.from_array(rng.standard_normal((9, 6)).astype(np.float32), "dense")
    x = rng.standard_normal((5, 6)).astype(np.float32)
    exact = launched(weight, None, x, "float32")
    for kind in ARRAY_TYPES:
        assert same_bits(launched(weight, None, x, kind.name), exact.astype(kind.dtype))


def test_no_tokens() -> None:
    weight = ss.SparseWeight.from_array(np.ones((3, 6), np.float32), "dense")
    assert launched(weight, None, np.zeros((0, 6), np.float32), "float32").shape == (0, 3)


def test_it_runs_on_the_cpu_only() -> None:
    backend = ReferenceBackend()
    problem = Problem(4, 8, Pattern.parse("6:8"), operand("int8"))
    assert backend.supports(problem, CPU).ok
    refused = backend.supports(problem, Device("cuda", 1))
    assert not refused.ok
    assert "runs on the CPU, not on cuda:1" in refused.why_not


def test_a_raw_weight_is_quantized_when_it_is_prepared() -> None:
    weight = np.ones((3, 6), np.float32)
    backend = ReferenceBackend()
    bias = np.zeros(3, np.float32)
    prepared = backend.prepare(
        RawWeight(weight, Pattern.parse("dense"), operand("int8")), bias, CPU, PlanOptions()
    )
    assert prepared.nbytes == bias.nbytes
    assert same_bits(prepared.weight.values, np.full((3, 6), 127, np.int8))
    prepared.close()
    without = backend.prepare(prepared.weight, None, CPU, PlanOptions())
    assert without.weight is prepared.weight
    assert without.nbytes == 0
