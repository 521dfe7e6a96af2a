"""Pruning a dense weight to a pattern."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..arrays import NDArray, as_matrix, to_numpy, wrap_numpy
from ..errors import NonFiniteError, OptionError, ShapeError
from ..pattern import Pattern
from ._rows import over_rows
from .bits import bit_rule
from .check import refuse_nonfinite

__all__ = ["METHODS", "check_method", "checked_norms", "prune"]

#: Values of ``method=``.
METHODS = ("magnitude", "wanda")


def prune(
    weight: Any,
    pattern: str | Pattern,
    *,
    method: str = "magnitude",
    norms: Any = None,
    threads: int | None = None,
) -> Any:
    """Return a copy of ``weight`` that keeps the most important ``keep`` weights of every group.

    Parameters
    ----------
    weight:
        Shape (N, K), float32, float16 or bfloat16, any library's host array, any strides.
    pattern:
        "2:4", "4:6", "6:8", ...; "dense" prunes nothing.
    method:
        "magnitude" keeps the largest ``|w|``.  "wanda" keeps the largest ``|w| * norm`` of the
        weight's input (Sun et al., arXiv 2306.11695); products are compared exactly.
    norms:
        For "wanda": shape (K,), the l2 norm of each input over calibration tokens; finite, >= 0.
    threads:
        CPU threads; ``None`` takes every core.

    Returns
    -------
    array
        Same shape, dtype and kind as ``weight``.  Kept weights are unchanged; the others, and every
        -0.0, are +0.0.  Among equally important weights of a group the lower index is kept, so the
        result is the same on every machine.

    Raises
    ------
    NonFiniteError
        If the weight or the norms hold a NaN or an infinity.
    OptionError
        For an unknown method, "wanda" without norms, or norms that another method would ignore.
    ShapeError, DTypeError, ArrayError, DeviceError, PatternError
        For inputs that are not as described.
    """
    parsed = Pattern.parse(pattern)
    view = as_matrix(weight, "weight", "(N, K)")
    check_method(method, norms)
    if method == "wanda":
        pruned = _by_scores(view, parsed, checked_norms(norms, view.shape[1]), threads)
    else:
        pruned = _by_magnitude(view, parsed, threads)
    return wrap_numpy(pruned, weight)


def _by_magnitude(weight: NDArray, pattern: Pattern, threads: int | None) -> NDArray:
    from ._kernels import prune_magnitude

    rule = bit_rule(weight.dtype, "weight")
    out = np.empty(weight.shape, weight.dtype)
    out_bits = rule.bits(out)

    def work(start: int, stop: int) -> int:
        block = rule.bits(weight[start:stop])
        bad = prune_magnitude(
            block, out_bits[start:stop], rule.mask, rule.limit, pattern.group, pattern.keep
        )
        return -1 if bad < 0 else start + bad

    for row in over_rows(weight.shape[0], weight.shape[1], work, threads):
        if row >= 0:
            _refuse_row(weight, row)
    return out


def _by_scores(weight: NDArray, pattern: Pattern, norms: NDArray, threads: int | None) -> NDArray:
    from ._kernels import prune_scores

    rule = bit_rule(weight.dtype, "weight")
    out = np.empty(weight.shape, weight.dtype)
    out_bits = rule.bits(out)

    def work(start: int, stop: int) -> int:
        block = weight[start:stop]
        # The product of two float32 numbers is exact in float64, and so is their order.
        with np.errstate(invalid="ignore"):  # a signalling NaN is reported below
            scores = np.abs(block.astype(np.float64))
        bad = ~np.isfinite(scores).all(axis=1)
        if bad.any():
            return start + int(np.argmax(bad))
        scores *= norms
        prune_scores(
            rule.bits(block), scores, out_bits[start:stop], rule.mask, pattern.group, pattern.keep
        )
        return -1

    for row in over_rows(weight.shape[0], weight.shape[1], work, threads):
        if row >= 0:
            _refuse_row(weight, row)
    return out


def _refuse_row(weight: NDArray, row: int) -> None:
    column = int(np.argmax(~np.isfinite(weight[row].astype(np.float32))))
    refuse_nonfinite(float(weight[row, column]), row, column, "weight")


def check_method(method: str, norms: Any) -> None:
    """Raise OptionError unless the method exists and goes with the norms."""
    if method not in METHODS:
        raise OptionError(f"method {method!r} is unknown; allowed are {', '.join(METHODS)}")
    if method == "magnitude" and norms is not None:
        raise OptionError("norms are given, but method='magnitude' ignores them; use 'wanda'")


def checked_norms(norms: Any, k: int) -> NDArray:
    """The norms as float64 (k,); raises where they are missing, misshapen, negative or infinite."""
    if norms is None:
        raise OptionError(
            f"method='wanda' needs norms=, shape ({k},): the l2 norm of each input over "
            f"calibration tokens"
        )
    view = to_numpy(norms, "norms")
    if view.shape != (k,):
        raise ShapeError(f"norms has shape {view.shape}; allowed is ({k},), one for each input")
    wide = view.astype(np.float64)
    bad = ~(np.isfinite(wide) & (wide >= 0))
    if bad.any():
        index = int(np.argmax(bad))
        raise NonFiniteError(
            f"norms holds {wide[index]} at index {index}; norms must be finite and not negative"
        )
    return wide
