"""Pruning against an independent sort, in every type, layout and library."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FLOATS,
    KINDS,
    LAYOUTS,
    Array,
    layouts,
    matrices,
    numbers,
    patterns,
    same_bits,
    seeds,
)

import slidesparse_rt as ss
from slidesparse_rt.packing import _rows
from slidesparse_rt.pattern import PATTERNS, Pattern


def pruned(weight: Array, scores: Array, pattern: Pattern) -> Array:
    """Each group sorted by (-score, index); the first ``keep`` stay, and -0.0 becomes 0.0."""
    out = np.zeros_like(weight)
    for row in range(weight.shape[0]):
        for start in range(0, weight.shape[1], pattern.group):
            indices = range(start, min(start + pattern.group, weight.shape[1]))
            ranked = sorted(indices, key=lambda i: (-float(scores[row, i]), i))
            for i in ranked[: pattern.keep]:
                if float(weight[row, i]) != 0:
                    out[row, i] = weight[row, i]
    return out


@given(st.data(), patterns, layouts, st.sampled_from((None, 1, 2)))
def test_magnitude_keeps_the_largest_and_the_lower_index(
    data: st.DataObject, pattern: Pattern, layout: str, threads: int | None
) -> None:
    plain = data.draw(matrices(pattern))
    weight = LAYOUTS[layout](plain)
    found = ss.prune(weight, pattern, threads=threads)
    assert same_bits(found, pruned(plain, np.abs(plain.astype(np.float64)), pattern))
    assert same_bits(weight, plain)
    assert not np.shares_memory(found, weight)
    ss.check_pattern(found, pattern)


@given(st.data(), patterns, layouts, st.sampled_from(KINDS), st.sampled_from(FLOATS))
def test_wanda_keeps_the_largest_products(
    data: st.DataObject, pattern: Pattern, layout: str, kind: str, norm_type: np.dtype
) -> None:
    plain = data.draw(matrices(pattern))
    weight = LAYOUTS[layout](plain)
    rng = np.random.default_rng(data.draw(seeds))
    norms = np.abs(numbers(rng, (plain.shape[1],), norm_type, kind))
    found = ss.prune(weight, pattern, method="wanda", norms=norms)
    scores = np.abs(plain.astype(np.float64)) * norms.astype(np.float64)
    assert same_bits(found, pruned(plain, scores, pattern))
    assert same_bits(weight, plain)
    ss.check_pattern(found, pattern)


def test_wanda_and_magnitude_differ_where_norms_say_so() -> None:
    weight = np.array([[4, 3, 2, 1]], np.float32)
    norms = np.array([1, 1, 10, 100], np.float32)
    assert ss.prune(weight, "2:4").tolist() == [[4, 3, 0, 0]]
    assert ss.prune(weight, "2:4", method="wanda", norms=norms).tolist() == [[0, 0, 2, 1]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_ties_keep_the_lower_index(pattern: Pattern) -> None:
    k = 2 * pattern.group + 1
    weight = np.where(np.arange(3 * k).reshape(3, k) % 2 == 0, 1, -1).astype(np.float32)
    found = ss.prune(weight, pattern)
    kept = np.arange(k) % pattern.group < pattern.keep
    assert same_bits(found, np.where(kept, weight, np.float32(0)))
    again = ss.prune(weight, pattern, method="wanda", norms=np.full(k, 3, np.float32))
    assert same_bits(again, found)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_minus_zero_becomes_plus_zero_everywhere(dtype: np.dtype) -> None:
    weight = np.full((2, 9), -0.0, dtype)
    weight[0, 3] = -1
    for found in (
        ss.prune(weight, "6:8"),
        ss.prune(weight, "dense"),
        ss.prune(weight, "6:8", method="wanda", norms=np.ones(9, np.float32)),
    ):
        assert not np.signbit(found.astype(np.float32)[found == 0]).any()
        assert found[0, 3] == -1


def test_zero_norms_prune_by_index_alone() -> None:
    weight = np.array([[1, 2, 3, 4]], np.float32)
    found = ss.prune(weight, "2:4", method="wanda", norms=np.zeros(4, np.float32))
    assert found.tolist() == [[1, 2, 0, 0]]


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_pruning_twice_changes_nothing(pattern: Pattern, dtype: np.dtype) -> None:
    rng = np.random.default_rng(0)
    once = ss.prune(numbers(rng, (4, 3 * pattern.group + 1), dtype, "bits"), pattern)
    assert same_bits(ss.prune(once, pattern), once)


def test_broadcast_views_are_pruned_like_their_copies() -> None:
    row = np.random.default_rng(0).standard_normal((1, 19)).astype(np.float32)
    for view in (np.broadcast_to(row, (5, 19)), np.broadcast_to(row[:, :1], (5, 19))):
        assert 0 in view.strides
        assert same_bits(ss.prune(view, "6:8"), ss.prune(view.copy(), "6:8"))


@pytest.mark.parametrize("threads", [1, 2, 7])
@pytest.mark.parametrize("method", ["magnitude", "wanda"])
def test_threads_change_nothing(threads: int, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((37, 30)).astype(np.float32)
    norms = rng.random(30).astype(np.float32) if method == "wanda" else None
    whole = ss.prune(weight, "6:8", method=method, norms=norms, threads=1)
    monkeypatch.setattr(_rows, "_BLOCK", 64)
    found = ss.prune(weight, "6:8", method=method, norms=norms, threads=threads)
    assert same_bits(found, whole)
    weight[30, 7] = np.inf
    weight[11, 3] = weight[11, 5] = -np.inf
    with pytest.raises(ss.NonFiniteError, match="weight holds -inf at row 11, column 3"):
        ss.prune(weight, "6:8", method=method, norms=norms, threads=threads)


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_torch_in_torch_out(kind: str) -> None:
    import torch

    weight = torch.randn(6, 19, generator=torch.Generator().manual_seed(0)).to(getattr(torch, kind))
    parameter = torch.nn.Parameter(weight.clone())
    expected = ss.prune(weight.float().numpy(), "6:8")
    for given_ in (weight, weight.t().contiguous().t(), parameter):
        before = given_.detach().clone()
        found = ss.prune(given_, "6:8")
        assert type(found) is torch.Tensor
        assert found.dtype == weight.dtype
        assert not found.requires_grad
        assert torch.equal(given_.detach(), before)
        np.testing.assert_array_equal(found.float().numpy(), expected)
        assert found.data_ptr() != given_.data_ptr()
    norms = torch.ones(19)
    wanda = ss.prune(weight, "6:8", method="wanda", norms=norms)
    assert torch.equal(wanda, ss.prune(weight, "6:8"))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_jax_in_jax_out(kind: str) -> None:
    import jax
    import jax.numpy as jnp

    weight = jax.random.normal(jax.random.PRNGKey(0), (6, 19)).astype(getattr(jnp, kind))
    found = ss.prune(weight, "6:8")
    assert isinstance(found, jax.Array)
    assert found.dtype == weight.dtype
    assert same_bits(np.asarray(found), ss.prune(np.asarray(weight), "6:8"))


def test_any_dlpack_array_gives_numpy() -> None:
    class Foreign:
        def __init__(self, held: Array) -> None:
            self.held = held

        def __dlpack__(self, **options: Any) -> Any:
            return self.held.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.held.__dlpack_device__()

    weight = np.random.default_rng(0).standard_normal((3, 8)).astype(np.float32)
    found = ss.prune(Foreign(weight), "6:8")
    assert isinstance(found, np.ndarray)
    assert same_bits(found, ss.prune(weight, "6:8"))


def test_bad_arguments_name_the_mend() -> None:
    weight = np.ones((2, 8), np.float32)
    with pytest.raises(
        ss.OptionError, match="method 'random' is unknown; allowed are magnitude, wanda"
    ):
        ss.prune(weight, "6:8", method="random")
    with pytest.raises(ss.OptionError, match=r"needs norms=, shape \(8,\)"):
        ss.prune(weight, "6:8", method="wanda")
    with pytest.raises(ss.OptionError, match="method='magnitude' ignores them; use 'wanda'"):
        ss.prune(weight, "6:8", norms=np.ones(8, np.float32))
    with pytest.raises(ss.ShapeError, match=r"norms has shape \(7,\); allowed is \(8,\)"):
        ss.prune(weight, "6:8", method="wanda", norms=np.ones(7, np.float32))
    with pytest.raises(ss.ShapeError, match=r"norms has shape \(1, 8\)"):
        ss.prune(weight, "6:8", method="wanda", norms=np.ones((1, 8), np.float32))
    with pytest.raises(ss.DTypeError, match="norms has dtype int64"):
        ss.prune(weight, "6:8", method="wanda", norms=np.ones(8, np.int64))
    with pytest.raises(ss.ArrayError, match="list is no array"):
        ss.prune(weight, "6:8", method="wanda", norms=[1.0] * 8)
    for bad in (np.nan, np.inf, -1.0):
        norms = np.ones(8, np.float32)
        norms[5] = bad
        with pytest.raises(ss.NonFiniteError, match=f"norms holds {bad} at index 5"):
            ss.prune(weight, "6:8", method="wanda", norms=norms)
    with pytest.raises(ss.OptionError, match="threads is -2"):
        ss.prune(weight, "6:8", threads=-2)
