"""Sliding is lossless: proved on every pattern, by exhaustion where that is cheap."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    BFLOAT16,
    E4M3,
    FLOATS,
    LAYOUTS,
    Array,
    fit,
    floats,
    group_counts,
    integer_weights,
    layouts,
    matrices,
    patterns,
    same_bits,
    seeds,
)

import slidesparse_rt as ss
from slidesparse_rt.packing import _rows
from slidesparse_rt.packing.slide import lift_rows, slide_rows, unslide_rows
from slidesparse_rt.pattern import PATTERNS, Pattern

FAMILY = [pattern for pattern in PATTERNS if pattern.name != "dense"]


def lifted(x: Array, pattern: Pattern) -> Array:
    """The definition, element by element."""
    rows, k = x.shape
    out = np.zeros((rows, pattern.slid_k(k)), x.dtype)
    for group in range(pattern.groups(k)):
        for window in range(pattern.windows):
            for slot in range(4):
                source = group * pattern.group + 2 * window + slot
                if source < k:
                    out[:, group * pattern.slots + 4 * window + slot] = x[:, source]
    return out


def assert_slid(weight: Array, slid: Array, pattern: Pattern) -> None:
    """Every nonzero stands once, in a window that covers it, and every window is 2:4."""
    rows, k = weight.shape
    assert slid.shape == (rows, pattern.slid_k(k))
    assert slid.dtype == weight.dtype
    windows = slid.astype(np.float64).reshape(rows, -1, 4)
    assert ((windows != 0).sum(axis=-1) <= 2).all()
    for row in range(rows):
        placed: dict[int, float] = {}
        for column in np.flatnonzero(slid[row]):
            group, within = divmod(int(column), pattern.slots)
            window, slot = divmod(within, 4)
            position = 2 * window + slot
            assert position < pattern.group
            assert window in pattern.windows_of(position)
            source = group * pattern.group + position
            assert source not in placed
            placed[source] = float(slid[row, column])
        assert placed == {int(i): float(weight[row, i]) for i in np.flatnonzero(weight[row])}


@given(integer_weights(), seeds)
def test_the_product_is_the_same_integer(drawn: tuple[Pattern, Array], seed: int) -> None:
    pattern, weight = drawn
    rng = np.random.default_rng(seed)
    x = rng.integers(-128, 128, (3, weight.shape[1])).astype(np.int8)
    slid = slide_rows(weight, pattern, "weight").astype(np.int64)
    assert_slid(weight, slid.astype(np.int8), pattern)
    expected = weight.astype(np.int64) @ x.T.astype(np.int64)
    np.testing.assert_array_equal(slid @ lift_rows(x, pattern).T.astype(np.int64), expected)
    # Through the public functions: sums stay below 2**24, so float32 is exact as well.
    public = ss.slide(weight.astype(np.float32), pattern) @ ss.lift(x.astype(np.float32), pattern).T
    np.testing.assert_array_equal(public, expected.astype(np.float32))
    assert same_bits(unslide_rows(slide_rows(weight, pattern, "w"), pattern, x.shape[1]), weight)


@given(st.data(), patterns, layouts)
def test_unslide_gives_back_every_bit(data: st.DataObject, pattern: Pattern, layout: str) -> None:
    plain = fit(data.draw(matrices(pattern)), pattern)
    plain[plain == 0] = 0  # -0.0 is stored as +0.0
    weight = LAYOUTS[layout](plain)
    slid = ss.slide(weight, pattern)
    assert_slid(plain, slid, pattern)
    assert same_bits(weight, plain)
    back = ss.unslide(LAYOUTS[layout](slid), pattern, plain.shape[1])
    assert same_bits(back, plain)


@given(st.data(), patterns)
def test_greedy_succeeds_exactly_where_no_group_has_too_many(
    data: st.DataObject, pattern: Pattern
) -> None:
    weight = data.draw(matrices(pattern, kinds=("normal", "ties", "sparse")))
    counts = group_counts(weight, pattern)
    over = np.argwhere(counts > pattern.keep)
    if len(over) == 0:
        assert_slid(weight, ss.slide(weight, pattern), pattern)
        return
    for call in (lambda: ss.slide(weight, pattern), lambda: slide_rows(weight, pattern, "weight")):
        with pytest.raises(ss.PatternError) as caught:
            call()
        error = caught.value
        row, group = (int(i) for i in over[0])
        assert (error.row, error.group) == (row, group)
        assert (error.found, error.allowed) == (counts[row, group], pattern.keep)
        assert error.violations == len(over)


@pytest.mark.parametrize("length", [4, 6, 8, 10, 12, 14])
def test_every_mask_of_a_group(length: int) -> None:
    """All 2**L ways to place nonzeros in one group: slid losslessly, or refused."""
    from slidesparse_rt.packing import _kernels

    pattern = Pattern.parse(f"{length - 2}:{length}")
    masks = (np.arange(2**length)[:, None] >> np.arange(length)) & 1
    weights = (masks * np.arange(1, length + 1)).astype(np.int8)
    fits = masks.sum(axis=1) <= pattern.keep
    assert (~fits).sum() == length + 1
    good = weights[fits]
    slid = slide_rows(good, pattern, "weight")
    assert ((slid.reshape(len(good), -1, 4) != 0).sum(axis=-1) <= 2).all()
    assert ((slid != 0).sum(axis=1) == masks[fits].sum(axis=1)).all()
    # A value is its position + 1, so this says that each stands in a window that covers it.
    positions = (2 * np.arange(pattern.windows)[:, None] + np.arange(4)).ravel() + 1
    assert (slid == np.where(slid != 0, positions, 0)).all()
    assert same_bits(unslide_rows(slid, pattern, length), good)
    for weight in weights[~fits]:
        out = np.zeros((1, pattern.slots), np.uint8)
        refused = _kernels.slide(
            weight[None].view(np.uint8), out, np.uint8(0xFF), length, pattern.windows
        )
        assert refused == 0
        with pytest.raises(ss.PatternError):
            slide_rows(weight[None], pattern, "weight")


@pytest.mark.parametrize("pattern", FAMILY, ids=str)
def test_every_pair_of_zeros_slides_and_one_zero_is_refused(pattern: Pattern) -> None:
    """The fullest groups of every pattern: all ways to leave out two, and to leave out one."""
    length = pattern.group
    first, second = np.triu_indices(length, 1)
    weights = np.ones((len(first), length), np.float32)
    weights[np.arange(len(first)), first] = 0
    weights[np.arange(len(first)), second] = 0
    slid = ss.slide(weights, pattern)
    # keep = 2 * windows: each window is exactly full.
    assert ((slid.reshape(len(first), -1, 4) != 0).sum(axis=-1) == 2).all()
    assert same_bits(ss.unslide(slid, pattern, length), weights)
    for position in range(length):
        crowded = np.ones((1, length), np.float32)
        crowded[0, position] = 0
        with pytest.raises(ss.PatternError, match=f"has {length - 1} nonzeros"):
            ss.slide(crowded, pattern)


@given(st.data(), patterns, layouts)
def test_lift_is_its_definition(data: st.DataObject, pattern: Pattern, layout: str) -> None:
    plain = data.draw(matrices(pattern))
    x = LAYOUTS[layout](plain)
    assert same_bits(ss.lift(x, pattern), lifted(plain, pattern))
    assert same_bits(x, plain)


def test_lift_repeats_numbers_that_are_not_finite() -> None:
    x = np.array([[np.nan, 1, -np.inf, 2]], np.float32)
    assert same_bits(ss.lift(x, "2:4"), x)
    assert same_bits(ss.lift(x, "dense"), lifted(x, Pattern.parse("dense")))


@pytest.mark.parametrize("dtype", [np.int8, E4M3, BFLOAT16, np.float16, np.float32], ids=str)
def test_rows_of_every_operand_type(dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    pattern = Pattern.parse("6:8")
    weight = fit(rng.integers(-9, 10, (5, 21)).astype(np.float32), pattern).astype(dtype)
    slid = slide_rows(weight, pattern, "weight")
    assert same_bits(unslide_rows(slid, pattern, 21), weight)
    assert same_bits(lift_rows(weight, pattern), lifted(weight, pattern))


def test_slide_rows_moves_numbers_that_are_not_finite() -> None:
    weight = np.array([[np.nan, 0, np.inf, 0]], np.float32)
    assert same_bits(slide_rows(weight, Pattern.parse("2:4"), "weight"), weight)
    with pytest.raises(ss.NonFiniteError, match="nan at row 0, column 0"):
        ss.slide(weight, "2:4")


def test_minus_zero_is_not_stored() -> None:
    weight = np.full((1, 8), -0.0, np.float32)
    weight[0, 5] = -3
    slid = ss.slide(weight, "6:8")
    assert not np.signbit(slid[slid == 0]).any()
    assert same_bits(slid.sum(axis=1), np.float32([-3]))


@pytest.mark.parametrize("threads", [1, 2, 5])
def test_threads_change_nothing(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = ss.prune(rng.standard_normal((29, 24)).astype(np.float32), "6:8")
    whole = ss.slide(weight, "6:8", threads=1)
    monkeypatch.setattr(_rows, "_BLOCK", 48)
    assert same_bits(ss.slide(weight, "6:8", threads=threads), whole)
    assert same_bits(ss.unslide(whole, "6:8", 24, threads=threads), weight)
    damaged = whole.copy()
    damaged[17, 2] = damaged[17, 4] = 1  # one input, two weights
    damaged[25, 2] = damaged[25, 4] = 1
    with pytest.raises(ss.PatternError, match="slid row 17 ") as caught:
        ss.unslide(damaged, "6:8", 24, threads=threads)
    assert caught.value.row == 17


def test_unslide_refuses_what_slide_never_makes() -> None:
    twice = np.zeros((2, 12), np.float32)
    twice[1, [2, 4]] = 1  # both are input 2
    with pytest.raises(ss.PatternError, match=r"row 1 .*6:8 weight of 8 inputs"):
        ss.unslide(twice, "6:8", 8)
    beyond = np.zeros((1, 12), np.float32)
    beyond[0, 11] = 1  # input 7 of a row of 7
    with pytest.raises(ss.PatternError, match="row 0"):
        ss.unslide(beyond, "6:8", 7)
    past = np.zeros((1, 4), np.float32)
    past[0, 2] = 1
    with pytest.raises(ss.PatternError, match="row 0"):
        ss.unslide(past, "dense", 2)
    crowded = np.zeros((1, 12), np.float32)
    crowded[0, [0, 1, 2]] = 1  # three in one window is not 2:4
    with pytest.raises(ss.PatternError, match="row 0"):
        ss.unslide(crowded, "6:8", 8)


@given(st.data(), patterns)
def test_unslide_returns_only_weights_that_fit(data: st.DataObject, pattern: Pattern) -> None:
    """Random 2:4 rows: unslide refuses them, or gives a weight that slides without loss."""
    rng = np.random.default_rng(data.draw(seeds))
    k = data.draw(st.integers(1, 3 * pattern.group))
    slid = (rng.random((1, pattern.slid_k(k))) < data.draw(st.floats(0, 0.5))).astype(np.float32)
    try:
        weight = ss.unslide(slid, pattern, k)
    except ss.PatternError:
        return
    assert weight.sum() == slid.sum()
    assert same_bits(ss.unslide(ss.slide(weight, pattern), pattern, k), weight)


@pytest.mark.parametrize("k", [0, -8, 9, 16, 8.0, "8", None, True])
def test_unslide_names_a_wrong_k(k: object) -> None:
    with pytest.raises(ss.ShapeError) as caught:
        ss.unslide(np.zeros((1, 12), np.float32), "6:8", k)  # type: ignore[arg-type]
    assert f"12 columns and k is {k!r}" in str(caught.value)
    assert "8 inputs for every 12 columns" in str(caught.value)


def test_types_that_cannot_be_slid() -> None:
    with pytest.raises(ss.DTypeError, match="weight has dtype int32; allowed are bfloat16"):
        slide_rows(np.zeros((1, 4), np.int32), Pattern.parse("2:4"), "weight")


@given(floats, st.integers(1, 40), patterns)
def test_torch_and_jax_keep_their_kind(dtype: np.dtype, k: int, pattern: Pattern) -> None:
    import jax
    import jax.numpy as jnp
    import torch

    plain = fit(np.arange(1, 2 * k + 1).reshape(2, k).astype(dtype), pattern)
    expected = ss.slide(plain, pattern)
    tensor = torch.from_numpy(plain.astype(np.float32)).to(getattr(torch, dtype.name))
    slid = ss.slide(tensor, pattern)
    assert isinstance(slid, torch.Tensor)
    assert slid.dtype == tensor.dtype
    assert torch.equal(ss.unslide(slid, pattern, k), tensor)
    assert ss.lift(tensor, pattern).dtype == tensor.dtype
    np.testing.assert_array_equal(slid.float().numpy(), expected.astype(np.float32))
    array = jnp.asarray(plain)
    slid = ss.slide(array, pattern)
    assert isinstance(slid, jax.Array)
    assert same_bits(np.asarray(slid), expected)
    assert same_bits(np.asarray(ss.unslide(slid, pattern, k)), plain)
    assert isinstance(ss.lift(array, pattern), jax.Array)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_row_and_one_input(dtype: np.dtype) -> None:
    for pattern in PATTERNS:
        weight = np.array([[3]], dtype)
        slid = ss.slide(weight, pattern)
        assert slid.shape == (1, pattern.slots)
        assert same_bits(ss.unslide(slid, pattern, 1), weight)
