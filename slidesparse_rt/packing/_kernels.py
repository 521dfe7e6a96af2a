"""The compiled inner loops of packing (Numba); everything works on the bits of the numbers.

Magnitudes of IEEE floats order like the unsigned integers of their bits without the sign, so one
integer kernel serves float32, float16, bfloat16, fp8 and int8.  ``mask`` removes the sign;
``limit`` is the smallest magnitude that is an infinity or a NaN.

Kernels release the GIL and are cached on disk by Numba where it can write; importing this module
imports Numba but compiles nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba import njit

_F = TypeVar("_F", bound=Callable[..., Any])


def _jit(function: _F, **further: Any) -> _F:
    options = {"nogil": True, "boundscheck": False, "error_model": "numpy", **further}
    compiled: _F
    try:
        compiled = njit(cache=True, **options)(function)
    except RuntimeError:  # neither the package's folder nor the user's can be written
        compiled = njit(**options)(function)
    return compiled


@_jit
def scan(bits: Any, mask: Any, limit: Any, group: Any, keep: Any) -> Any:
    """Count what is in a block of rows.

    Returns (violating groups, nonzeros, row of the first violation, its group, its nonzeros,
    row of the first non-finite element, its column); -1 for "none".
    """
    rows, columns = bits.shape
    whole = columns // group
    violations = 0
    nonzeros = 0
    first_row = -1
    first_group = -1
    first_count = 0
    bad_row = -1
    bad_column = -1
    for r in range(rows):
        largest = bits.dtype.type(0)
        row_nonzeros = 0
        row_violations = 0
        for g in range(whole):
            count = 0
            base = g * group
            for i in range(group):
                magnitude = bits[r, base + i] & mask
                count += magnitude != 0
                largest = max(largest, magnitude)
            row_nonzeros += count
            row_violations += count > keep
        tail = 0
        for i in range(whole * group, columns):
            magnitude = bits[r, i] & mask
            tail += magnitude != 0
            largest = max(largest, magnitude)
        row_nonzeros += tail
        row_violations += tail > keep
        nonzeros += row_nonzeros
        if row_violations and first_row < 0:
            first_row = r
            for g in range(whole + 1):
                count = 0
                for i in range(g * group, min(columns, (g + 1) * group)):
                    count += (bits[r, i] & mask) != 0
                if count > keep:
                    first_group = g
                    first_count = count
                    break
        violations += row_violations
        if largest >= limit and bad_row < 0:
            bad_row = r
            for i in range(columns):
                if (bits[r, i] & mask) >= limit:
                    bad_column = i
                    break
    return violations, nonzeros, first_row, first_group, first_count, bad_row, bad_column


@_jit
def prune_magnitude(bits: Any, out: Any, mask: Any, limit: Any, group: Any, keep: Any) -> Any:
    """Copy a block of rows, keeping the largest ``keep`` of each group; ties keep the lower index.

    Returns the row of the first non-finite element, or -1.  -0.0 is written as +0.0.

    The two smallest are found without branches: a key is the magnitude with the reversed index
    below it, so that keys are distinct and, among equals, the higher index is the smaller key.
    """
    rows, columns = bits.shape
    zero = bits.dtype.type(0)
    none = np.uint64(0xFFFFFFFFFFFFFFFF)
    bad_row = -1
    for r in range(rows):
        bad = False
        for base in range(0, columns, group):
            size = min(group, columns - base)
            smallest = none
            second = none
            for i in range(size):
                value = bits[r, base + i]
                magnitude = value & mask
                out[r, base + i] = value if magnitude != 0 else zero
                bad |= magnitude >= limit
                key = (np.uint64(magnitude) << np.uint64(5)) | np.uint64(31 - i)
                second = min(second, max(smallest, key))
                smallest = min(smallest, key)
            # A short last group is padded with zeros at its end, and those go first.
            drop = size - keep
            if drop >= 1:
                out[r, base + 31 - np.int64(smallest & np.uint64(31))] = zero
            if drop >= 2:
                out[r, base + 31 - np.int64(second & np.uint64(31))] = zero
        if bad and bad_row < 0:
            bad_row = r
    return bad_row


@_jit
def prune_scores(bits: Any, scores: Any, out: Any, mask: Any, group: Any, keep: Any) -> None:
    """As :func:`prune_magnitude`, by given float64 scores >= 0 (finite)."""
    rows, columns = bits.shape
    zero = bits.dtype.type(0)
    for r in range(rows):
        for base in range(0, columns, group):
            size = min(group, columns - base)
            smallest = np.inf
            second = np.inf
            at_smallest = -1
            at_second = -1
            for i in range(size):
                value = bits[r, base + i]
                out[r, base + i] = value if value & mask != 0 else zero
                score = scores[r, base + i]
                if score <= smallest:
                    second = smallest
                    at_second = at_smallest
                    smallest = score
                    at_smallest = i
                elif score <= second:
                    second = score
                    at_second = i
            drop = size - keep
            if drop >= 1:
                out[r, base + at_smallest] = zero
            if drop >= 2:
                out[r, base + at_second] = zero


_1, _2 = np.uint64(1), np.uint64(2)


@_jit
def _slide_groups(source: Any, target: Any, t: Any, groups: Any, mask: Any, pairs: Any) -> Any:
    """Slide whole groups of one row into ``target`` from slot ``t`` on; every slot is written.

    Pair by pair: it fills up the window before its own and moves on with the rest.  There are no
    branches on the data, and indices are unsigned, which spares Numba its test for negative ones.
    Returns whether all groups fit.
    """
    zero = source.dtype.type(0)
    p = np.uint64(0)
    fits = True
    for _ in range(groups):
        room = 0
        for pair in range(pairs):
            a, b = source[p], source[p + _1]
            p += _2
            has_a, has_b = (a & mask) != 0, (b & mask) != 0
            if pair == pairs - 1 and pairs > 1:  # no window of its own
                target[t] = a if has_a else zero
                target[t + _1] = b if has_b else zero
                t += _2
                fits &= has_a + has_b <= room
                break
            back_a = has_a and room > 0
            back_b = has_b and room > has_a
            if pair:
                target[t] = a if back_a else zero
                target[t + _1] = b if back_b else zero
                t += _2
            target[t] = a if has_a and not back_a else zero
            target[t + _1] = b if has_b and not back_b else zero
            t += _2
            room = 2 - (has_a - back_a) - (has_b - back_b)
        if pairs == 1:  # dense: its one window ends with two empty slots
            target[t] = zero
            target[t + _1] = zero
            t += _2
    return fits


@_jit
def slide(bits: Any, out: Any, mask: Any, group: Any, windows: Any) -> Any:
    """Place each nonzero in the earliest window that covers it and has room; fills ``out``.

    Returns the first row with a group that does not fit, or -1.
    """
    rows, columns = bits.shape
    whole = columns // group
    left = columns - whole * group
    tail = np.zeros(group, bits.dtype)
    for r in range(rows):
        fits = _slide_groups(bits[r], out[r], np.uint64(0), whole, mask, group // 2)
        if left:
            tail[:left] = bits[r, whole * group :]
            at = np.uint64(whole * 4 * windows)
            fits &= _slide_groups(tail, out[r], at, 1, mask, group // 2)
        if not fits:
            return r
    return -1


@_jit
def unslide(bits: Any, out: Any, mask: Any, group: Any, windows: Any) -> Any:
    """Put the nonzeros of slid rows back (``out`` is zeros).

    Returns the row of the first slot that cannot come from :func:`slide`, or -1: a second nonzero
    for one input, a third in one window, or one beyond the row's end.
    """
    rows, columns = out.shape
    slots = 4 * windows
    for r in range(rows):
        for g in range(bits.shape[1] // slots):
            for w in range(windows):
                room = 2
                for j in range(4):
                    value = bits[r, g * slots + 4 * w + j]
                    if (value & mask) == 0:
                        continue
                    if room == 0:
                        return r
                    room -= 1
                    i = g * group + 2 * w + j
                    # Dense windows reach past their group, where no weight is ever stored.
                    if 2 * w + j >= group or i >= columns or out[r, i] != 0:
                        return r
                    out[r, i] = value
    return -1


@_jit
def _row_scale(bits: Any, q_max: Any, floor: Any, given: Any) -> Any:
    """(scale, reciprocal) of one row from the bits of its float32 elements.

    ``given`` is the scale to use, or 0 to measure it.  The reciprocal is 0 where all values shall
    be 0: a row that is not finite, and one of zeros whose scale is measured.
    """
    largest = np.uint32(0)
    for i in range(bits.size):
        largest = max(largest, bits[i] & np.uint32(0x7FFFFFFF))
    if largest >= np.uint32(0x7F800000):
        return np.float32(np.nan), np.float32(0)
    if given != 0:
        return given, np.float32(1) / given
    if largest == 0:
        return np.float32(1), np.float32(0)
    peak = max(np.uint32(largest).view(np.float32), np.float32(floor * q_max))
    return peak / q_max, q_max / peak


@_jit
def quantize_int8(x: Any, q_max: Any, floor: Any, given: Any, out: Any, scales: Any) -> None:
    """Rows of float32 to int8: docs/numerics.md has the exact order of operations."""
    bits = x.view(np.uint32)
    for r in range(x.shape[0]):
        scale, reciprocal = _row_scale(bits[r], q_max, floor, given)
        scales[r] = scale
        if reciprocal == 0:
            out[r, :] = 0
            continue
        for i in range(x.shape[1]):
            scaled = np.rint(x[r, i] * reciprocal)
            out[r, i] = np.int8(min(max(scaled, -q_max), q_max))


@_jit
def quantize_fp8(x: Any, q_max: Any, floor: Any, given: Any, out: Any, scales: Any) -> None:
    """Rows of float32 to the bits of E4M3, rounded to nearest even and limited to +-q_max."""
    bits = x.view(np.uint32)
    for r in range(x.shape[0]):
        scale, reciprocal = _row_scale(bits[r], q_max, floor, given)
        scales[r] = scale
        if reciprocal == 0:
            out[r, :] = 0
            continue
        for i in range(x.shape[1]):
            scaled = x[r, i] * reciprocal
            magnitude = min(abs(scaled), q_max)
            # Below 2**-6 the spacing is 2**-9; 8 of those are the bits of the first normal number.
            small = np.uint32(np.rint(magnitude * np.float32(512)))
            wide = np.float32(magnitude).view(np.uint32)
            # Keep 3 of 23 mantissa bits, ties to even; exponent bias 7 instead of 127.
            wide += np.uint32(0x7FFFF) + ((wide >> np.uint32(20)) & np.uint32(1))
            normal = (wide >> np.uint32(20)) - np.uint32(120 << 3)
            code = small if magnitude < np.float32(2.0**-6) else normal
            sign = (np.float32(scaled).view(np.uint32) >> np.uint32(24)) & np.uint32(0x80)
            out[r, i] = np.uint8(code | sign)


def _row_losses(
    weight: Any, kept: Any, values: Any, weight_scales: Any, value_scales: Any, out: Any
) -> None:
    """Per row: energy of the weight, energy of what is kept of it, and energy of the error.

    ``weight`` and ``kept`` are float32 multiples of ``weight_scales``, ``values`` of
    ``value_scales``; ``out`` is (rows, 3) float64.  Products are exact in float64.
    """
    for r in range(weight.shape[0]):
        energy = 0.0
        left = 0.0
        error = 0.0
        scale = np.float64(weight_scales[r])
        value_scale = np.float64(value_scales[r])
        for i in range(weight.shape[1]):
            x = np.float64(weight[r, i]) * scale
            y = np.float64(kept[r, i]) * scale
            difference = x - np.float64(values[r, i]) * value_scale
            energy += x * x
            left += y * y
            error += difference * difference
        out[r, 0] = energy
        out[r, 1] = left
        out[r, 2] = error


#: Sums may be reordered, so that they run in vector registers: this reports, it defines nothing.
row_losses = _jit(_row_losses, fastmath={"reassoc"})
