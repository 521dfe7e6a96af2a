"""Sliding windows: the lossless rewriting of a (2N-2):2N weight as a 2:4 weight, and its inverse.

Source: SlideSparse, arXiv 2603.05232; docs/patterns.md proves that it always works.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import NDArray, as_matrix, wrap_numpy
from ..errors import PatternError, ShapeError
from ..pattern import WINDOW, Pattern
from ._rows import over_rows
from .bits import bit_rule
from .check import check_values

__all__ = ["lift", "lift_rows", "slide", "slide_rows", "unslide", "unslide_rows"]


def slide(weight: Any, pattern: str | Pattern, *, threads: int | None = None) -> Any:
    """Rewrite a weight that fits ``pattern`` as a 2:4 sparse weight over lifted inputs.

    Parameters
    ----------
    weight:
        Shape (N, K), float32, float16, bfloat16, int8 or float8_e4m3fn, any library's host array,
        any strides.
    pattern:
        The pattern that it fits.
    threads:
        CPU threads; ``None`` takes every core.

    Returns
    -------
    array
        Shape (N, K') with ``K' = Pattern.slid_k(K)``, same dtype and kind: every nonzero stands in
        exactly one window, each window of four holds at most two, everything else is +0.0.
        ``slide(W) @ lift(x).T == W @ x.T`` exactly wherever sums are exact.

    Raises
    ------
    PatternError
        If a group holds more nonzeros than the pattern allows.
    NonFiniteError, ShapeError, DTypeError, ArrayError, DeviceError, OptionError
        For inputs that are not as described.
    """
    parsed = Pattern.parse(pattern)
    view = as_matrix(weight, "weight", "(N, K)", quantized=True)
    check_values(view, parsed, "weight", threads=threads)
    return wrap_numpy(slide_rows(view, parsed, "weight", threads=threads), weight)


def unslide(slid: Any, pattern: str | Pattern, k: int, *, threads: int | None = None) -> Any:
    """Undo :func:`slide`.

    Parameters
    ----------
    slid:
        Shape (N, K'), as :func:`slide` returned it.
    pattern:
        The pattern it was slid with.
    k:
        Inputs of the original weight.
    threads:
        CPU threads; ``None`` takes every core.

    Returns
    -------
    array
        Shape (N, k), same dtype and kind.

    Raises
    ------
    ShapeError
        If K' is not ``Pattern.slid_k(k)``.
    PatternError
        If ``slid`` cannot come from :func:`slide`: two nonzeros for one input, three in one window,
        or one where no weight is ever stored.
    DTypeError, ArrayError, DeviceError, OptionError
        For inputs that are not as described.
    """
    parsed = Pattern.parse(pattern)
    view = as_matrix(slid, "slid", "(N, K')", quantized=True)
    return wrap_numpy(unslide_rows(view, parsed, k, threads=threads), slid)


def lift(x: Any, pattern: str | Pattern) -> Any:
    """Repeat activations to match slid weights.

    Parameters
    ----------
    x:
        Shape (M, K), float32, float16, bfloat16, int8 or float8_e4m3fn, any library's host array,
        any strides.
    pattern:
        The pattern of the weight.

    Returns
    -------
    array
        Shape (M, K'), same dtype and kind:
        ``x'[m, g*4*(N-1) + 4*w + j] = x[m, g*2*N + 2*w + j]``, zero beyond K.

    Raises
    ------
    ShapeError, DTypeError, ArrayError, DeviceError, PatternError
        For inputs that are not as described.
    """
    parsed = Pattern.parse(pattern)
    return wrap_numpy(lift_rows(as_matrix(x, "x", "(M, K)", quantized=True), parsed), x)


def slide_rows(
    values: NDArray, pattern: Pattern, what: str, *, threads: int | None = None
) -> NDArray:
    """:func:`slide` for a NumPy matrix of any type that packing knows, operands included.

    Numbers that are not finite are moved like any other.
    """
    from ._kernels import slide as kernel

    rule = bit_rule(values.dtype, what)
    rows, columns = values.shape
    out = np.empty((rows, pattern.slid_k(columns)), values.dtype)
    out_bits = rule.bits(out)

    def work(start: int, stop: int) -> int:
        block = rule.bits(values[start:stop])
        return int(kernel(block, out_bits[start:stop], rule.mask, pattern.group, pattern.windows))

    if max(over_rows(rows, columns, work, threads)) >= 0:
        check_values(values, pattern, what, threads=threads)  # says which group, and raises
    return out


def unslide_rows(slid: NDArray, pattern: Pattern, k: int, *, threads: int | None = None) -> NDArray:
    """:func:`unslide` for a NumPy matrix of any type that packing knows."""
    from ._kernels import unslide as kernel

    rule = bit_rule(slid.dtype, "slid")
    rows, columns = slid.shape
    if isinstance(k, bool) or not isinstance(k, int) or k < 1 or pattern.slid_k(k) != columns:
        raise ShapeError(
            f"slid has {columns} columns and k is {k!r}; pattern {pattern.name} needs "
            f"{pattern.group} inputs for every {pattern.slots} columns"
        )
    out = np.zeros((rows, k), slid.dtype)
    out_bits = rule.bits(out)

    def work(start: int, stop: int) -> int:
        block = rule.bits(slid[start:stop])
        bad = kernel(block, out_bits[start:stop], rule.mask, pattern.group, pattern.windows)
        return -1 if bad < 0 else start + int(bad)

    for row in over_rows(rows, columns, work, threads):
        if row >= 0:
            raise PatternError(
                f"slid row {row} does not come from sliding a {pattern.name} weight of {k} inputs: "
                f"an input has two weights, a window has more than two, or a weight stands where "
                f"none is ever stored",
                row=row,
            )
    return out


def lift_rows(x: NDArray, pattern: Pattern) -> NDArray:
    """:func:`lift` for a NumPy matrix of any type."""
    rows, columns = x.shape
    groups = pattern.groups(columns)
    # The last window of "dense" reaches beyond its group, hence WINDOW more zeros.
    padded = np.zeros((rows, pattern.padded_k(columns) + WINDOW), x.dtype)
    padded[:, :columns] = x
    row, item = padded.strides
    windows = np.lib.stride_tricks.as_strided(
        padded,
        (rows, groups, pattern.windows, WINDOW),
        (row, pattern.group * item, 2 * item, item),
        writeable=False,
    )
    # Not reshape: where windows do not overlap it would return the read-only view itself.
    out = np.empty(windows.shape, x.dtype)
    out[...] = windows
    return out.reshape(rows, pattern.slid_k(columns))
