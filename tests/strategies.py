"""Shared Hypothesis strategies, and ways to lay the same numbers out in memory.

Shapes and kinds are drawn by Hypothesis, so they shrink; bulk numbers come from a drawn seed, so
that an example costs microseconds and the thorough profile is affordable.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
from hypothesis import strategies as st

from slidesparse_rt.pattern import PATTERNS, Pattern

Array = np.ndarray[Any, Any]

BFLOAT16 = np.dtype(ml_dtypes.bfloat16)
E4M3 = np.dtype(ml_dtypes.float8_e4m3fn)
#: Types of arrays that cross the API.
FLOATS = (np.dtype(np.float32), np.dtype(np.float16), BFLOAT16)
OPERAND_NAMES = ("int8", "fp8_e4m3", "bf16", "fp16")
F32_MAX = float(np.finfo(np.float32).max)

patterns = st.sampled_from(PATTERNS)
floats = st.sampled_from(FLOATS)
operand_names = st.sampled_from(OPERAND_NAMES)
seeds = st.integers(0, 2**32 - 1)
#: Activation scales that may be given, from the smallest to the largest: all exact in float32.
x_scales = st.builds(
    lambda exponent, mantissa: min((1 + mantissa / 2**23) * 2.0**exponent, F32_MAX),
    st.one_of(st.integers(-12, 4), st.integers(-126, 127)),
    st.integers(0, 2**23 - 1),
)


@st.composite
def extents(draw: st.DrawFn, pattern: Pattern, most_rows: int = 6) -> tuple[int, int]:
    """(rows, K): whole groups, groups with a rest, and rows shorter than one group."""
    rows = draw(st.integers(1, most_rows))
    groups = draw(st.integers(0, 3))
    rest = draw(st.integers(0, pattern.group - 1))
    return rows, max(1, groups * pattern.group + rest)


def fitting_mask(rng: np.random.Generator, pattern: Pattern, rows: int, k: int, how: str) -> Array:
    """Where nonzeros may stand so that every group has at most ``pattern.keep`` of them.

    ``how``: "full" groups hold as many as they can, "loose" ones a random number from 0, "left" and
    "right" crowd them at one end of the group.
    """
    groups = pattern.groups(k)
    ranks = rng.random((rows, groups, pattern.group)).argsort(axis=-1).argsort(axis=-1)
    if how == "left":
        ranks[:] = np.arange(pattern.group)
    elif how == "right":
        ranks[:] = np.arange(pattern.group)[::-1]
    allowed: Any = pattern.keep
    if how == "loose":
        allowed = rng.integers(0, pattern.keep + 1, (rows, groups, 1))
    return (ranks < allowed).reshape(rows, -1)[:, :k]


@st.composite
def integer_weights(draw: st.DrawFn) -> tuple[Pattern, Array]:
    """A pattern and an int8 weight of -127..127 that fits it."""
    pattern = draw(patterns)
    rows, k = draw(extents(pattern))
    rng = np.random.default_rng(draw(seeds))
    mask = fitting_mask(
        rng, pattern, rows, k, draw(st.sampled_from(("full", "loose", "left", "right")))
    )
    values = rng.integers(1, 128, (rows, k)) * rng.choice((-1, 1), (rows, k))
    return pattern, np.where(mask, values, 0).astype(np.int8)


#: Kinds of numbers for :func:`numbers`.
KINDS = ("normal", "ties", "bits", "tiny", "huge", "sparse")


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any, kind: str) -> Array:
    """Finite numbers of one kind.

    "normal" is a bell; "ties" has few distinct magnitudes and both zeros; "bits" are random bit
    patterns, so every exponent is as likely; "tiny" is subnormal; "huge" is near the type's limit;
    "sparse" is mostly zeros of both signs.
    """
    dtype = np.dtype(dtype)
    unsigned = np.dtype(f"u{dtype.itemsize}")
    limits = ml_dtypes.finfo(dtype)
    if kind == "normal":
        return rng.standard_normal(shape).astype(dtype)
    if kind == "ties":
        return rng.choice((-2.0, -1.0, -0.0, 0.0, 1.0, 2.0), shape).astype(dtype)
    if kind == "tiny":
        smallest_normal = int(np.array(limits.smallest_normal, dtype).view(unsigned))
        bits = rng.integers(0, smallest_normal, shape).astype(unsigned)
    elif kind == "huge":
        largest = int(np.array(limits.max, dtype).view(unsigned))
        bits = rng.integers(largest - 50, largest + 1, shape).astype(unsigned)
    elif kind == "sparse":
        found = rng.standard_normal(shape).astype(dtype)
        return np.where(rng.random(shape) < 0.8, rng.choice((-0.0, 0.0), shape), found).astype(
            dtype
        )
    else:
        bits = rng.integers(0, 2 ** (8 * dtype.itemsize), shape).astype(unsigned)
    sign = unsigned.type(1 << (8 * dtype.itemsize - 1))
    if kind != "bits":
        bits |= np.where(rng.random(shape) < 0.5, sign, unsigned.type(0)).astype(unsigned)
    values = bits.view(dtype)
    wide = values.astype(np.float32)
    return np.where(np.isfinite(wide), values, np.zeros((), dtype))


@st.composite
def matrices(
    draw: st.DrawFn, pattern: Pattern, dtype: Any = None, kinds: tuple[str, ...] = KINDS
) -> Array:
    """A finite matrix (rows, K) of a drawn type and kind, with extents that suit ``pattern``."""
    shape = draw(extents(pattern))
    rng = np.random.default_rng(draw(seeds))
    kind = draw(st.sampled_from(kinds))
    return numbers(rng, shape, draw(floats) if dtype is None else dtype, kind)


def fit(weight: Array, pattern: Pattern) -> Array:
    """``weight`` with the later nonzeros of crowded groups set to zero (no library code used)."""
    out = weight.copy()
    for row in out:
        for start in range(0, row.size, pattern.group):
            held = np.flatnonzero(row[start : start + pattern.group])
            row[start + held[pattern.keep :]] = 0
    return out


def group_counts(weight: Array, pattern: Pattern) -> Array:
    """Nonzeros of every group, (rows, groups): an independent count."""
    rows, k = weight.shape
    padded = np.zeros((rows, -(-k // pattern.group) * pattern.group), bool)
    padded[:, :k] = weight.astype(np.float64) != 0
    return padded.reshape(rows, -1, pattern.group).sum(axis=-1)


def same_bits(left: Array, right: Array) -> bool:
    """Equal shape, type and bits: tells -0.0 from 0.0, and NaN equals itself."""
    return (
        left.shape == right.shape
        and left.dtype == right.dtype
        and np.ascontiguousarray(left).tobytes() == np.ascontiguousarray(right).tobytes()
    )


def _padded(a: Array) -> Array:
    wide = np.ones((2 * a.shape[0] + 1, 3 * a.shape[1] + 2), a.dtype)
    view = wide[1::2, 2::3]
    view[...] = a
    return view


def _row_slice(a: Array) -> Array:
    wide = np.ones((a.shape[0], a.shape[1] + 5), a.dtype)
    wide[:, 2:-3] = a
    return wide[:, 2:-3]


def _unaligned(a: Array) -> Array:
    raw = np.zeros(a.nbytes + 1, np.uint8)
    view = raw[1:].view(a.dtype).reshape(a.shape)
    view[...] = a
    return view


def _read_only(a: Array) -> Array:
    view = a.copy()
    view.flags.writeable = False
    return view


#: Name -> function that returns the same numbers in another memory layout.
LAYOUTS: dict[str, Callable[[Array], Array]] = {
    "contiguous": lambda a: np.array(a, order="C"),
    "fortran": np.asfortranarray,
    "slice of a larger array": _row_slice,
    "strided": _padded,
    "reversed rows": lambda a: np.array(a[::-1])[::-1],
    "reversed columns": lambda a: np.array(a[:, ::-1])[:, ::-1],
    "unaligned": _unaligned,
    "read-only": _read_only,
}
layouts = st.sampled_from(sorted(LAYOUTS))
