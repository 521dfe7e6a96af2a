"""Integer views of number arrays, for kernels that work on bits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

from ..arrays import NDArray
from ..dtypes import ARRAY_TYPES
from ..errors import DTypeError

__all__ = ["BitRule", "bit_rule"]


@dataclass(frozen=True, slots=True)
class BitRule:
    """How to read the bits of one type: ``bits & mask`` is the magnitude, and from ``limit`` on it
    is an infinity or a NaN.  Both are NumPy scalars wide enough to be compared with the bits.
    """

    view: np.dtype[Any]
    mask: Any
    limit: Any

    def bits(self, values: NDArray) -> NDArray:
        """The same memory as unsigned integers, copied only if the rows are not contiguous."""
        if values.strides[-1] != values.itemsize:
            values = np.ascontiguousarray(values)
        return values.view(self.view)


def _rule(bits: int, mask: int, limit: int) -> BitRule:
    kind = np.dtype(f"u{bits // 8}")
    wide = np.dtype(f"u{max(2, bits // 8)}")
    return BitRule(kind, kind.type(mask), wide.type(limit))


_RULES = {
    **{row.dtype: _rule(row.bits, row.mask, row.inf_bits) for row in ARRAY_TYPES},
    # int8 has no infinity: the limit lies above every magnitude.
    np.dtype(np.int8): _rule(8, 0xFF, 0x100),
    # E4M3 has no infinity, and one magnitude that is NaN.
    np.dtype(ml_dtypes.float8_e4m3fn): _rule(8, 0x7F, 0x7F),
}


def bit_rule(dtype: np.dtype[Any], what: str) -> BitRule:
    """The rule for ``dtype``; DTypeError where packing knows no such type."""
    rule = _RULES.get(dtype)
    if rule is None:
        allowed = ", ".join(sorted(key.name for key in _RULES))
        raise DTypeError(f"{what} has dtype {dtype.name}; allowed are {allowed}")
    return rule
