"""The compiled loops of packing run as plain Python give the same bits.

Coverage cannot look into compiled code; this is where every line and branch of it is executed.
"""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import Array, fit, matrices, numbers, patterns, seeds

from slidesparse_rt.dtypes import SCALE_FLOOR
from slidesparse_rt.packing import _kernels
from slidesparse_rt.packing.bits import bit_rule
from slidesparse_rt.pattern import Pattern


def test_packing_works_where_no_cache_can_be_written() -> None:
    """A read-only installation and no home folder, as in a hardened container."""
    code = """
from numba.core import caching
for kind in vars(caching).values():
    if hasattr(kind, "_locator_classes"):
        kind._locator_classes = []
import numpy as np
import slidesparse_rt as ss
print(ss.prune(np.float32([[3, 1, 2, 4]]), "2:4").tolist())
"""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    assert found.stdout == "[[3.0, 0.0, 0.0, 4.0]]\n"


def python(kernel: Any) -> Any:
    """The source of a kernel; NumPy warns where unsigned integers wrap, as they are meant to."""

    def run(*arguments: Any) -> Any:
        with np.errstate(over="ignore"):
            return kernel.py_func(*arguments)

    return run


@given(st.data(), patterns, st.sampled_from((None, np.nan, np.inf)))
def test_scan(data: st.DataObject, pattern: Pattern, bad: float | None) -> None:
    weight = data.draw(matrices(pattern))
    if bad is not None:
        weight[-1, -1] = bad
    rule = bit_rule(weight.dtype, "weight")
    arguments = (rule.bits(weight), rule.mask, rule.limit, pattern.group, pattern.keep)
    assert tuple(python(_kernels.scan)(*arguments)) == tuple(_kernels.scan(*arguments))


@given(st.data(), patterns, st.sampled_from((None, np.nan, np.inf)))
def test_prune_magnitude(data: st.DataObject, pattern: Pattern, bad: float | None) -> None:
    weight = data.draw(matrices(pattern))
    if bad is not None:
        weight[weight.shape[0] // 2 :, 0] = bad
    rule = bit_rule(weight.dtype, "weight")
    bits = rule.bits(weight)
    out, compiled = np.empty_like(bits), np.empty_like(bits)
    rest = (rule.mask, rule.limit, pattern.group, pattern.keep)
    row = python(_kernels.prune_magnitude)(bits, out, *rest)
    assert row == _kernels.prune_magnitude(bits, compiled, *rest)
    assert row == (-1 if bad is None else weight.shape[0] // 2)
    np.testing.assert_array_equal(out, compiled)


@given(st.data(), patterns)
def test_prune_scores(data: st.DataObject, pattern: Pattern) -> None:
    weight = data.draw(matrices(pattern))
    rule = bit_rule(weight.dtype, "weight")
    bits = rule.bits(weight)
    scores = np.abs(weight.astype(np.float64))
    out, compiled = np.empty_like(bits), np.empty_like(bits)
    rest = (rule.mask, pattern.group, pattern.keep)
    python(_kernels.prune_scores)(bits, scores, out, *rest)
    _kernels.prune_scores(bits, scores, compiled, *rest)
    np.testing.assert_array_equal(out, compiled)


@given(st.data(), patterns, st.booleans())
def test_slide_and_unslide(data: st.DataObject, pattern: Pattern, fits: bool) -> None:
    weight = data.draw(matrices(pattern, kinds=("normal", "ties", "sparse")))
    if fits:
        weight = fit(weight, pattern)
    rule = bit_rule(weight.dtype, "weight")
    bits = rule.bits(weight)
    rest = (rule.mask, pattern.group, pattern.windows)
    shape = (weight.shape[0], pattern.slid_k(weight.shape[1]))
    out, compiled = np.zeros(shape, bits.dtype), np.zeros(shape, bits.dtype)
    row = python(_kernels.slide)(bits, out, *rest)
    assert row == _kernels.slide(bits, compiled, *rest)
    np.testing.assert_array_equal(out, compiled)
    back, compiled_back = np.zeros_like(bits), np.zeros_like(bits)
    assert python(_kernels.unslide)(out, back, *rest) == _kernels.unslide(out, compiled_back, *rest)
    np.testing.assert_array_equal(back, compiled_back)


@given(patterns, seeds)
def test_unslide_of_anything(pattern: Pattern, seed: int) -> None:
    rng = np.random.default_rng(seed)
    k = int(rng.integers(1, 3 * pattern.group))
    slid = (rng.random((4, pattern.slid_k(k))) < rng.random((4, 1))).astype(np.uint8)
    rest = (np.uint8(0xFF), pattern.group, pattern.windows)
    back, compiled = np.zeros((4, k), np.uint8), np.zeros((4, k), np.uint8)
    assert python(_kernels.unslide)(slid, back, *rest) == _kernels.unslide(slid, compiled, *rest)
    np.testing.assert_array_equal(back, compiled)


def rows_of_every_kind(rng: np.random.Generator) -> Array:
    kinds = ("normal", "ties", "bits", "tiny", "huge")
    rows = [numbers(rng, (9,), np.float32, kind) for kind in kinds]
    special = np.float32([[0] * 9, [np.nan] + [1] * 8, [np.inf] + [1] * 8])
    return np.concatenate([np.stack(rows), special])


@pytest.mark.parametrize(
    ("name", "q_max", "kind"), [("quantize_int8", 127, np.int8), ("quantize_fp8", 448, np.uint8)]
)
@pytest.mark.parametrize("scale", [0, 0.037])
@given(seed=seeds)
def test_quantize(name: str, q_max: int, kind: Any, scale: float, seed: int) -> None:
    x = rows_of_every_kind(np.random.default_rng(seed))
    kernel = getattr(_kernels, name)
    results = []
    for run in (python(kernel), kernel):
        out, scales = np.full(x.shape, 55, kind), np.full(len(x), 55, np.float32)
        run(x, np.float32(q_max), SCALE_FLOOR, np.float32(scale), out, scales)
        results.append((out.tobytes(), scales.view(np.uint32) & 0x7FFFFFFF))
    assert results[0][0] == results[1][0]
    np.testing.assert_array_equal(results[0][1], results[1][1])


@given(seeds, st.sampled_from((0, 0.037)))
def test_row_scale(seed: int, scale: float) -> None:
    for row in rows_of_every_kind(np.random.default_rng(seed)):
        arguments = (row.view(np.uint32), np.float32(127), SCALE_FLOOR, np.float32(scale))
        np.testing.assert_array_equal(
            python(_kernels._row_scale)(*arguments), _kernels._row_scale(*arguments)
        )
