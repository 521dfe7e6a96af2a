"""Quantization against its definition, bit for bit, and against its error bounds."""

from __future__ import annotations

import math
from typing import Any

import definition
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    BFLOAT16,
    E4M3,
    F32_MAX,
    FLOATS,
    KINDS,
    LAYOUTS,
    OPERAND_NAMES,
    Array,
    floats,
    layouts,
    numbers,
    same_bits,
    seeds,
    x_scales,
)
from tolerances import quantization

import slidesparse_rt as ss
from slidesparse_rt.dtypes import SCALE_FLOOR, operand
from slidesparse_rt.packing import _rows, quantize_tokens
from slidesparse_rt.packing.quantize import dequantize, positive_zeros

TINY = float(np.float32(2.0**-149))


def by_definition(x: Array, dtype: str, x_scale: float | None = None) -> tuple[Array, Array | None]:
    """Values and scales by the scalar definition; fp8 zeros keep their sign."""
    rows = x.astype(np.float64).tolist()
    if dtype == "int8":
        found = [definition.quantize_int8(row, x_scale) for row in rows]
        values = np.array([codes for _, codes in found], np.int8)
    elif dtype == "fp8_e4m3":
        found = [definition.quantize_fp8(row, x_scale) for row in rows]
        values = np.array([codes for _, codes in found], np.uint8).view(E4M3)
    else:
        cast = definition.f16 if dtype == "fp16" else definition.bf16
        rounded = [[cast(v) for v in row] for row in rows]
        return np.array(rounded).astype(operand(dtype).dtype), None
    return values, np.array([scale for scale, _ in found]).astype(np.float32)


def without_minus_zero(values: Array) -> Array:
    return np.where(values == 0, np.zeros((), values.dtype), values)


@st.composite
def rows_of_scales(draw: st.DrawFn) -> Array:
    """Float32 rows of different kinds in one matrix: zero, subnormal, ordinary and huge ones."""
    rng = np.random.default_rng(draw(seeds))
    k = draw(st.integers(1, 24))
    kinds = draw(st.lists(st.sampled_from((*KINDS, "zero", "edge")), min_size=1, max_size=5))
    edges = np.float32(
        [127 * 2.0**-126, 448 * 2.0**-126, 2.0**-126, TINY, F32_MAX, 127, 448, 0.5, 1.5, 2.5, 63.5]
    )
    rows = []
    for kind in kinds:
        if kind == "zero":
            rows.append(np.zeros(k, np.float32))
        elif kind == "edge":
            rows.append(rng.choice(edges, k) * rng.choice(np.float32([-1, 1]), k))
        else:
            rows.append(numbers(rng, (k,), np.float32, kind))
    return np.stack(rows)


@given(rows_of_scales(), st.sampled_from(OPERAND_NAMES), floats, layouts)
def test_weights_are_quantized_by_the_definition(
    wide: Array, dtype: str, source: np.dtype, layout: str
) -> None:
    with np.errstate(over="ignore"):
        plain = wide.astype(source)
    plain[~np.isfinite(plain)] = ml_dtypes.finfo(source).max
    weight = LAYOUTS[layout](plain)
    expected, scales = by_definition(plain, dtype)
    if not np.isfinite(expected.astype(np.float32)).all():
        row = int(np.argmin(np.isfinite(expected.astype(np.float32)).all(axis=1)))
        with pytest.raises(ss.NonFiniteError, match=f"row {row} holds .*too large for {dtype}"):
            ss.quantize(weight, dtype)
        return
    values, found = ss.quantize(weight, dtype)
    assert same_bits(values, without_minus_zero(expected))
    assert (found is None) == (scales is None)
    if scales is not None:
        assert same_bits(found, scales)
    assert same_bits(weight, plain)


@given(rows_of_scales(), st.sampled_from(OPERAND_NAMES), st.data())
def test_tokens_are_quantized_by_the_definition(x: Array, dtype: str, data: st.DataObject) -> None:
    """Also with NaN and infinities in some rows, which change no other row."""
    x = x.copy()
    for bad in data.draw(st.lists(st.sampled_from((np.nan, np.inf, -np.inf)), max_size=3)):
        row = data.draw(st.integers(0, x.shape[0] - 1))
        x[row, data.draw(st.integers(0, x.shape[1] - 1))] = bad
    values, scales = quantize_tokens(x, dtype)
    expected, wanted = by_definition(x, dtype)
    if wanted is None:
        assert scales is None
        lost = ~np.isfinite(expected.astype(np.float32)).all(axis=1)
        assert np.isnan(values[lost].astype(np.float32)).all()
        assert same_bits(values[~lost], expected[~lost])
        return
    assert same_bits(values, expected)
    assert scales is not None
    lost = ~np.isfinite(x).all(axis=1)
    assert np.isnan(scales[lost]).all()
    assert (values[lost].astype(np.float32) == 0).all()
    assert same_bits(scales[~lost], wanted[~lost])


@given(rows_of_scales(), st.sampled_from(("int8", "fp8_e4m3")), x_scales, st.data())
def test_a_given_scale_is_used_by_the_definition(
    x: Array, dtype: str, x_scale: float, data: st.DataObject
) -> None:
    """For rows of zeros too; rows that are not finite have none."""
    x = x.copy()
    for bad in data.draw(st.lists(st.sampled_from((np.nan, np.inf, -np.inf)), max_size=2)):
        row = data.draw(st.integers(0, x.shape[0] - 1))
        x[row, data.draw(st.integers(0, x.shape[1] - 1))] = bad
    values, scales = quantize_tokens(x, dtype, x_scale=x_scale)
    expected, _ = by_definition(x, dtype, x_scale)
    assert same_bits(values, expected)
    lost = ~np.isfinite(x).all(axis=1)
    assert scales is not None
    assert np.isnan(scales[lost]).all()
    assert (scales[~lost] == x_scale).all()


def test_a_given_scale_is_rounded_to_float32_and_limits() -> None:
    x = np.float32([[0.05, 0.15, -0.25, 100, -1e30], [0, -0.0, 0, 0, 0]])
    values, scales = quantize_tokens(x, "int8", x_scale=0.1)
    assert scales is not None
    assert (scales == np.float32(0.1)).all()
    # 0.05 and -0.25 over float32's 0.1 are 0.5 and -2.5 once rounded: ties go to even.
    assert values.tolist() == [[0, 2, -2, 127, -127], [0, 0, 0, 0, 0]]
    values, scales = quantize_tokens(x, "fp8_e4m3", x_scale=0.1)
    assert values.astype(np.float32).tolist() == [[0.5, 1.5, -2.5, 448, -448], [0, 0, 0, 0, 0]]
    assert values.view(np.uint8)[1].tolist() == [0, 0x80, 0, 0, 0]
    with pytest.raises(ss.OptionError, match=r"x_scale is 0\.0; allowed"):
        quantize_tokens(x, "int8", x_scale=0.0)


@given(rows_of_scales(), st.sampled_from(("int8", "fp8_e4m3")), x_scales)
def test_error_bounds_hold_with_a_given_scale(x: Array, dtype: str, x_scale: float) -> None:
    """Within what the scale covers they are those of measured scales; beyond, what is cut off."""
    x_scale = min(x_scale, 2.0**126)
    values, scales = quantize_tokens(x, dtype, x_scale=x_scale)
    assert scales is not None
    exact, most = x.astype(np.float64), operand(dtype).q_max * x_scale
    back = values.astype(np.float64) * x_scale
    bound = quantization(exact, scales, dtype)
    inside = np.abs(exact) <= most
    assert (np.abs(exact - back) <= bound)[inside].all()
    assert (back == np.copysign(most, exact))[~inside].all()


@given(rows_of_scales(), st.sampled_from(OPERAND_NAMES))
def test_error_bounds_hold(x: Array, dtype: str) -> None:
    values, scales = quantize_tokens(x, dtype)
    kept = np.isfinite(values.astype(np.float32)).all(axis=1)  # fp16 and bf16 may overflow
    exact = x[kept].astype(np.float64)
    back = values[kept].astype(np.float64)
    if scales is not None:
        assert kept.all()
        assert (np.isfinite(scales) & (scales >= SCALE_FLOOR)).all()
        back = back * scales.astype(np.float64)[:, None]
    assert (np.abs(exact - back) <= quantization(exact, scales, dtype)).all()


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_the_largest_magnitude_becomes_the_largest_number(dtype: str) -> None:
    peaks = np.float32([1e-30, 2.0**-100, 0.1, 1, 3, 127, 448, 1e10, 3e38, F32_MAX])
    x = np.stack([peaks, -peaks, np.zeros_like(peaks)], axis=1)
    values, scales = quantize_tokens(x, dtype)
    q_max = operand(dtype).q_max
    assert (values.astype(np.float32) == np.float32([q_max, -q_max, 0])).all()
    assert scales is not None
    np.testing.assert_allclose(scales.astype(np.float64) * q_max, peaks, rtol=2.0**-24)


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_subnormal_rows_have_the_smallest_normal_scale(dtype: str) -> None:
    x = np.float32([[TINY, -TINY], [2.0**-127, 2.0**-130], [2.0**-126, 0]])
    values, scales = quantize_tokens(x, dtype)
    assert scales is not None
    assert (scales == SCALE_FLOOR).all()
    if dtype == "int8":
        assert values.tolist() == [[0, 0], [0, 0], [1, 0]]  # 0.5 rounds to even
    else:
        assert values.astype(np.float32).tolist() == [[0, 0], [0.5, 0.0625], [1, 0]]
        # Tiny negative activations keep the sign that rounding gives them; weights do not.
        assert values.view(np.uint8)[0].tolist() == [0x00, 0x80]
        assert ss.quantize(x, dtype)[0].view(np.uint8)[0].tolist() == [0x00, 0x00]


def test_zero_rows_have_scale_one() -> None:
    x = np.float32([[0.0, -0.0], [1, 2]])
    for dtype in ("int8", "fp8_e4m3"):
        values, scales = ss.quantize(x, dtype)
        assert scales[0] == 1
        assert not values[0].view(np.uint8).any()


def test_halves_round_to_even() -> None:
    x = np.float32([[127, 0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 126.5, -126.5]])
    values, scales = ss.quantize(x, "int8")
    assert scales.tolist() == [1.0]
    assert values.tolist() == [[127, 0, 2, 2, 0, -2, -2, 126, -126]]


def e4m3_of(values: Array) -> Array:
    """The package's conversion of numbers within +-448: a 448 in each row makes its scale 1."""
    columns = 1 << 14
    padded = np.zeros(-(-values.size // columns) * columns, np.float32)
    padded[: values.size] = values
    rows = np.full((padded.size // columns, columns + 1), 448, np.float32)
    rows[:, 1:] = padded.reshape(-1, columns)
    found, scales = quantize_tokens(rows, "fp8_e4m3")
    assert scales is not None
    assert (scales == 1).all()
    return np.ascontiguousarray(found[:, 1:]).view(np.uint8).ravel()[: values.size]


def test_fp8_conversion_over_the_whole_range() -> None:
    """Every 61st float32 up to 448, 19 million numbers, as ml_dtypes rounds them."""
    top = int(np.float32(448).view(np.uint32))
    for start in range(0, top, 1 << 27):
        bits = np.arange(start, min(start + (1 << 27), top), 61, dtype=np.uint32)
        values = bits.view(np.float32)
        codes = e4m3_of(values)
        assert (codes == values.astype(E4M3).view(np.uint8)).all()
    negative = (bits | np.uint32(1 << 31)).view(np.float32)
    assert (e4m3_of(negative) == negative.astype(E4M3).view(np.uint8)).all()


def test_fp8_conversion_around_every_decision() -> None:
    """200 floats to each side of every E4M3 number and every midpoint between two of them."""
    exact = np.array(definition.E4M3_MAGNITUDES)
    turning = np.concatenate([exact, (exact[1:] + exact[:-1]) / 2]).astype(np.float32)
    bits = turning.view(np.uint32)[:, None].astype(np.int64) + np.arange(-200, 201)
    bits = bits[(bits >= 0) & (bits <= int(np.float32(448).view(np.uint32)))].astype(np.uint32)
    for sign in (0, 1 << 31):
        values = (bits | np.uint32(sign)).view(np.float32)
        codes = e4m3_of(values)
        assert (codes == values.astype(E4M3).view(np.uint8)).all()
        step = values[::37]
        assert e4m3_of(step).tolist() == [definition.e4m3_code(float(v)) for v in step]


def test_the_definition_knows_e4m3() -> None:
    codes = np.array([code for code in range(256) if code & 0x7F != 0x7F], np.uint8)
    values = codes.view(E4M3).astype(np.float64)
    assert [definition.e4m3_value(int(code)) for code in codes] == values.tolist()


@given(st.floats(width=32), st.floats(width=32))
def test_the_definition_rounds_like_numpy(a: float, b: float) -> None:
    with np.errstate(all="ignore"):
        pairs = [
            (definition.mul(a, b), np.float32(a) * np.float32(b)),
            (definition.add(a, b), np.float32(a) + np.float32(b)),
            (definition.f16(a), np.float16(np.float32(a))),
            (definition.bf16(a), np.float32(a).astype(BFLOAT16)),
        ]
    for mine, numpys in pairs:
        assert (math.isnan(mine) and np.isnan(numpys)) or (
            mine == float(numpys) and math.copysign(1, mine) == math.copysign(1, float(numpys))
        )


@pytest.mark.parametrize("dtype", OPERAND_NAMES)
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(dtype: str, threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    x = np.random.default_rng(0).standard_normal((31, 20)).astype(np.float32)
    values, scales = ss.quantize(x, dtype, threads=1)
    monkeypatch.setattr(_rows, "_BLOCK", 64)
    again, others = ss.quantize(x, dtype, threads=threads)
    assert same_bits(values, again)
    assert (scales is None and others is None) or same_bits(scales, others)


@pytest.mark.parametrize("dtype", OPERAND_NAMES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_weights_must_be_finite(dtype: str, bad: float) -> None:
    weight = np.ones((4, 6), np.float32)
    weight[2, 5] = bad
    with pytest.raises(ss.NonFiniteError, match="NaN or an infinity in row 2"):
        ss.quantize(weight, dtype)


def test_weights_too_large_for_the_format() -> None:
    weight = np.ones((4, 6), np.float32)
    weight[3, 1] = -65520
    with pytest.raises(
        ss.NonFiniteError, match="row 3 holds 65520, too large for fp16; use"
    ) as caught:
        ss.quantize(weight, "fp16")
    assert "'bf16'" in str(caught.value)
    weight[3, 1] = 65519  # rounds to the largest float16
    assert ss.quantize(weight, "fp16")[0][3, 1] == 65504
    weight[3, 1] = F32_MAX
    with pytest.raises(ss.NonFiniteError, match="too large for bf16; use") as caught:
        ss.quantize(weight, "bf16")
    assert "use 'bf16'" not in str(caught.value)


def test_float16_reaches_bfloat16_with_one_rounding() -> None:
    x = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    x = x[np.isfinite(x)][None, :]
    values, _ = quantize_tokens(x, "bf16")
    bits = x.astype(np.float32).view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    assert (values.view(np.uint16) == rounded).all()


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("dtype", OPERAND_NAMES)
def test_kinds_and_types_that_come_back(source: np.dtype, dtype: str) -> None:
    import jax
    import torch

    names = {"int8": "int8", "fp8_e4m3": "float8_e4m3fn", "bf16": "bfloat16", "fp16": "float16"}
    plain = np.random.default_rng(0).standard_normal((3, 7)).astype(source)
    values, scales = ss.quantize(plain, dtype)
    tensor = torch.from_numpy(plain.astype(np.float32)).to(getattr(torch, source.name))
    of_torch, torch_scales = ss.quantize(tensor, dtype)
    assert of_torch.dtype == getattr(torch, names[dtype])
    assert of_torch.view(torch.uint8).numpy().tobytes() == values.tobytes()
    of_jax, jax_scales = ss.quantize(jax.numpy.asarray(plain), dtype)
    assert isinstance(of_jax, jax.Array)
    assert same_bits(np.asarray(of_jax), values)
    if scales is None:
        assert torch_scales is None
        assert jax_scales is None
    else:
        assert torch_scales.dtype == torch.float32
        assert same_bits(torch_scales.numpy(), scales)
        assert same_bits(np.asarray(jax_scales), scales)


@given(rows_of_scales(), st.sampled_from(("int8", "fp8_e4m3")))
def test_dequantize_multiplies_by_the_scale(x: Array, dtype: str) -> None:
    values, scales = ss.quantize(x, dtype)
    found = dequantize(values, scales)
    assert found.dtype == np.float32
    with np.errstate(over="ignore"):
        assert same_bits(found, values.astype(np.float32) * scales[:, None])
    lost = ~np.isfinite(found)
    assert (np.abs(x[lost]) > F32_MAX * (1 - 2.0**-4)).all()
    plain = x.astype(np.float16) if np.abs(x).max() < 6e4 else np.zeros((1, 1), np.float16)
    assert same_bits(dequantize(plain, None), plain.astype(np.float32))


def test_positive_zeros() -> None:
    for dtype in (*FLOATS, E4M3):
        values = np.array([[-0.0, 0.0, -1.0, 1.0]]).astype(dtype)
        positive_zeros(values)
        assert not np.signbit(values.astype(np.float32))[0, :2].any()
        assert values.astype(np.float32).tolist() == [[0, 0, -1, 1]]
    low = np.array([[-128, 0]], np.int8)
    positive_zeros(low)
    assert low.tolist() == [[-128, 0]]


def test_unknown_formats() -> None:
    x: Any = np.ones((1, 4), np.float32)
    for call in (lambda: ss.quantize(x, "fp8"), lambda: quantize_tokens(x, "fp8")):
        with pytest.raises(ss.DTypeError, match="type dtype='fp8_e4m3'"):
            call()
    with pytest.raises(ss.DTypeError, match="'int4' is no operand format"):
        ss.quantize(x, "int4")
