"""check_pattern and pattern_report against an independent NumPy count."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    BFLOAT16,
    FLOATS,
    LAYOUTS,
    Array,
    fit,
    floats,
    group_counts,
    layouts,
    matrices,
    patterns,
)

import slidesparse_rt as ss
from slidesparse_rt.packing import _rows, pattern_report
from slidesparse_rt.packing.check import check_values
from slidesparse_rt.pattern import PATTERNS, Pattern


@given(st.data(), patterns, layouts, st.sampled_from((None, 1, 2)))
def test_the_report_is_an_independent_count(
    data: st.DataObject, pattern: Pattern, layout: str, threads: int | None
) -> None:
    plain = data.draw(matrices(pattern))
    weight = LAYOUTS[layout](plain)
    counts = group_counts(plain, pattern)
    over = np.argwhere(counts > pattern.keep)
    report = pattern_report(weight, pattern, threads=threads)
    assert report.groups == counts.size
    assert report.size == plain.size
    assert report.nonzeros == counts.sum()
    assert report.violations == len(over)
    if len(over) == 0:
        assert report.first is None
        ss.check_pattern(weight, pattern, threads=threads)
        return
    row, group = (int(i) for i in over[0])
    assert report.first == (row, group, counts[row, group])
    with pytest.raises(ss.PatternError) as caught:
        ss.check_pattern(weight, pattern, threads=threads)
    error = caught.value
    found = int(counts[row, group])
    assert (error.row, error.group, error.found) == (row, group, found)
    assert (error.allowed, error.violations) == (pattern.keep, len(over))
    start = group * pattern.group
    stop = min(start + pattern.group, plain.shape[1]) - 1
    message = str(error)
    assert (
        f"pattern {pattern.name}: row {row}, group {group} (columns {start} to {stop})" in message
    )
    assert f"has {found} nonzeros, allowed are {pattern.keep}" in message
    assert f"{len(over)} of {counts.size} groups" in message
    assert f"prune(weight, '{pattern.name}')" in message


@given(st.data(), patterns)
def test_a_fitted_weight_passes(data: st.DataObject, pattern: Pattern) -> None:
    weight = fit(data.draw(matrices(pattern)), pattern)
    ss.check_pattern(weight, pattern)
    assert pattern_report(weight, pattern).first is None


def test_dense_takes_everything() -> None:
    ss.check_pattern(np.ones((3, 7), np.float32), "dense")


def test_a_short_last_group_counts_as_if_padded() -> None:
    weight = np.ones((1, 15), np.float32)
    weight[0, 6:8] = 0
    ss.check_pattern(weight[:, :14], "6:8")
    with pytest.raises(ss.PatternError, match=r"columns 8 to 14\) has 7 nonzeros"):
        ss.check_pattern(weight, "6:8")


def test_minus_zero_is_a_zero() -> None:
    weight = np.full((2, 8), -0.0, np.float32)
    weight[:, :6] = 1
    ss.check_pattern(weight, "6:8")
    assert pattern_report(weight, "6:8").nonzeros == 12


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_rows_are_counted_over_many_blocks(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_rows, "_BLOCK", 32)  # two rows of a block
    weight = np.zeros((23, 16), np.float32)
    weight[7, 8:] = 1
    weight[7, :3] = 1
    weight[19, :7] = 1
    report = pattern_report(weight, "6:8", threads=threads)
    assert (report.violations, report.first, report.nonzeros) == (2, (7, 1, 8), 18)
    weight[21, 5] = np.nan
    with pytest.raises(ss.NonFiniteError, match="nan at row 21, column 5"):
        ss.check_pattern(weight, "6:8", threads=threads)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_number_that_is_not_finite_is_named(dtype: np.dtype, bad: float) -> None:
    weight = np.zeros((5, 11), dtype)
    weight[2, 9] = weight[2, 10] = weight[4, 0] = bad
    for call in (ss.check_pattern, pattern_report):
        with pytest.raises(ss.NonFiniteError) as caught:
            call(weight, "6:8")
        assert f"weight holds {bad} at row 2, column 9" in str(caught.value)
        assert "must be finite" in str(caught.value)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_signalling_nans_are_found(dtype: np.dtype) -> None:
    unsigned = np.dtype(f"u{dtype.itemsize}")
    weight = np.zeros((1, 8), dtype)
    infinity = int(np.array(np.inf, dtype).view(unsigned))
    weight.view(unsigned)[0, 3] = infinity + 1
    for call in (
        lambda: ss.check_pattern(weight, "6:8"),
        lambda: ss.prune(weight, "6:8"),
        lambda: ss.prune(weight, "6:8", method="wanda", norms=np.ones(8, np.float32)),
        lambda: ss.slide(weight, "6:8"),
        lambda: ss.SparseWeight.from_array(weight, "6:8"),
        lambda: ss.SparseWeight.from_array(weight, "6:8", dtype="fp16"),
        lambda: ss.quantize(weight, "int8"),
        lambda: ss.quantize(weight, "fp16"),
        lambda: ss.quantize(weight, "bf16"),
    ):
        with pytest.raises(ss.NonFiniteError):
            call()


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_operand_types_are_checked_too(pattern: Pattern) -> None:
    import ml_dtypes

    full = np.ones((2, pattern.group))
    for dtype in (np.int8, ml_dtypes.float8_e4m3fn, BFLOAT16, np.float16):
        values = full.astype(dtype)
        if pattern.name == "dense":
            check_values(values, pattern, "values", threads=1)
            continue
        with pytest.raises(ss.PatternError, match="values does not fit") as caught:
            check_values(values, pattern, "values", threads=1)
        assert caught.value.violations == 2
        values[:, ::4] = 0
        values[:, 1] = 0
        check_values(values, pattern, "values", threads=1)
    low = np.full((1, pattern.group), -128, np.int8)
    low[0, : pattern.group - pattern.keep] = 0
    check_values(low, pattern, "values", threads=1)


def test_fp8_nan_is_found() -> None:
    import ml_dtypes

    values = np.zeros((2, 4), ml_dtypes.float8_e4m3fn)
    values.view(np.uint8)[1, 2] = 0xFF
    with pytest.raises(ss.NonFiniteError, match="nan at row 1, column 2"):
        check_values(values, Pattern.parse("2:4"), "values", threads=1)


@pytest.mark.parametrize(
    ("weight", "error", "says"),
    [
        (
            np.ones(8, np.float32),
            ss.ShapeError,
            r"1 dimensions, shape \(8,\); allowed is 2, \([NM], K\)",
        ),
        (np.ones((1, 2, 4), np.float32), ss.ShapeError, "3 dimensions"),
        (np.float32(1), ss.ShapeError, "0 dimensions"),
        (np.ones((0, 8), np.float32), ss.ShapeError, r"empty, shape \(0, 8\)"),
        (np.ones((8, 0), np.float32), ss.ShapeError, r"empty, shape \(8, 0\)"),
        (np.ones((2, 4)), ss.DTypeError, "float64 is not supported; allowed are float32, float16"),
        (np.ones((2, 4), np.int16), ss.DTypeError, "int16"),
        (np.ones((2, 4), complex), ss.DTypeError, "complex128"),
        (np.array([["a"]]), ss.DTypeError, "not supported"),
        (np.array([[None]]), ss.DTypeError, "object"),
        ([[1.0, 2.0]], ss.ArrayError, "list is no array"),
        (None, ss.ArrayError, "NoneType is no array"),
        ("weights", ss.ArrayError, "str is no array"),
        (np.ma.masked_array(np.ones((1, 4), np.float32)), ss.ArrayError, "masked"),
    ],
)
def test_what_is_no_weight_is_refused(weight: object, error: type[Exception], says: str) -> None:
    for call in (
        lambda: ss.check_pattern(weight, "2:4"),
        lambda: pattern_report(weight, "2:4"),
        lambda: ss.prune(weight, "2:4"),
        lambda: ss.slide(weight, "2:4"),
        lambda: ss.lift(weight, "2:4"),
        lambda: ss.quantize(weight, "int8"),
        lambda: ss.SparseWeight.from_array(weight, "2:4"),
    ):
        with pytest.raises(error, match=says):
            call()


def test_bad_options_are_refused_before_any_work() -> None:
    weight = np.ones((2, 4), np.float32)
    with pytest.raises(ss.OptionError, match="threads is 0"):
        ss.check_pattern(weight, "2:4", threads=0)
    with pytest.raises(ss.PatternError, match="type '6:8'"):
        ss.check_pattern(weight, "2:8")


@given(floats, layouts)
def test_the_input_is_left_alone(dtype: np.dtype, layout: str) -> None:
    weight: Array = LAYOUTS[layout](np.arange(24).reshape(3, 8).astype(dtype))
    before = weight.tobytes()
    pattern_report(weight, "6:8")
    assert weight.tobytes() == before


def test_big_endian_weights_are_read_as_numbers() -> None:
    weight = np.zeros((2, 8), ">f4")
    weight[:, 1] = 1
    assert pattern_report(weight, "6:8").nonzeros == 2
