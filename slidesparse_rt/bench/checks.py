"""Refusing numbers whose outputs are wrong: sampled rows and channels against exact arithmetic.

The reference is NumPy on the operands as the definition quantizes them (docs/numerics.md): int8 has
to agree to the bit; fp8, bf16 and fp16 within the bound of that page.  Outputs are poisoned before
the run that is checked, so that what was never written is seen.  What is not sampled is compared
from side to side: a tile that is missing, stale or in the wrong place differs by its own size.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..arrays import NDArray
from ..dtypes import Operand
from ..packing import quantize
from ..packing.quantize import quantize_tokens
from .record import WrongOutput

__all__ = [
    "Exact",
    "check_alike",
    "check_bits",
    "check_poison",
    "check_result",
    "check_sums",
    "exact",
    "sample",
]

#: Largest error of a tensor-core sum relative to the sum of the products' magnitudes
#: (docs/numerics.md, measured): fp8 sums are kept in fewer bits than float32's.
_SUM_ERROR = {"int8": 0.0, "fp8_e4m3": 2.0**-10, "bf16": 2.0**-16, "fp16": 2.0**-16}
#: Unit roundoff of a type.
_ROUNDING = {"int32": 0.0, "float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}
#: Share of a row that may look like poison by chance: int32 sums are -1 about once in 10^5.
_POISON_SHARE = 0.01
#: How far results of two sides may be apart, as a part of a token's root mean square: sums that are
#: rounded differently are a hundredth of that apart, other numbers more than all of it.
_APART = 0.25


@dataclass(frozen=True, slots=True)
class Exact:
    """What sampled tokens (T) and channels (C) must give.

    ``sums`` and ``sizes`` (T, C) are the sums of products and of their magnitudes in float64,
    without scales; the scales are float32 (T,) and (C,), or ``None``.
    """

    operand: Operand
    sums: NDArray
    sizes: NDArray
    token_scales: NDArray | None
    channel_scales: NDArray | None


def sample(count: int, most: int, *, seed: int = 0) -> list[int]:
    """At most ``most`` indices below ``count``, the first and the last among them, ascending."""
    if count <= most:
        return list(range(count))
    inner = np.random.default_rng(seed).choice(np.arange(1, count - 1), most - 2, replace=False)
    return [0, *sorted(int(index) for index in inner), count - 1]


def exact(x: NDArray, weight: NDArray, operand: Operand) -> Exact:
    """The products of tokens ``x`` (T, K) and channels ``weight`` (C, K), both unquantized."""
    left, token_scales = quantize_tokens(x, operand)
    right, channel_scales = quantize(weight, operand, threads=1)
    a, b = left.astype(np.float64), right.astype(np.float64)
    return Exact(operand, a @ b.T, np.abs(a) @ np.abs(b).T, token_scales, channel_scales)


def check_sums(found: NDArray, wanted: Exact, what: str) -> float:
    """Check unscaled sums (T, C); returns the largest error over its bound (0 for int8).

    Raises WrongOutput.
    """
    if found.dtype.kind == "i":
        return check_bits(found.astype(np.int64), wanted.sums.astype(np.int64), what)
    return _check_near(
        found, wanted.sums, wanted.sizes, wanted.operand.name, _ROUNDING[found.dtype.name], what
    )


def check_result(found: NDArray, wanted: Exact, what: str, *, sums_type: str = "float32") -> float:
    """Check scaled results (T, C); returns the largest error over its bound (0 for int8).

    ``sums_type`` is the type in which the library hands sums to the last step.  Raises WrongOutput.
    """
    if wanted.operand.name == "int8":
        assert wanted.token_scales is not None
        assert wanted.channel_scales is not None
        y = wanted.sums.astype(np.float32)
        y *= wanted.token_scales[:, None]
        y *= wanted.channel_scales[None, :]
        return check_bits(found, y.astype(found.dtype), what)
    sums, sizes = wanted.sums, wanted.sizes
    if wanted.token_scales is not None and wanted.channel_scales is not None:
        scales = np.multiply.outer(
            wanted.token_scales.astype(np.float64), wanted.channel_scales.astype(np.float64)
        )
        sums, sizes = sums * scales, sizes * scales
    u = _ROUNDING[found.dtype.name] + _ROUNDING[sums_type]
    return _check_near(found, sums, sizes, wanted.operand.name, u, what)


def _check_near(
    found: NDArray, sums: NDArray, sizes: NDArray, operand_name: str, u: float, what: str
) -> float:
    wide = found.astype(np.float64)
    if not np.isfinite(wide).all():
        raise WrongOutput(
            f"{what}: {int((~np.isfinite(wide)).sum())} of {wide.size} are not finite"
        )
    error = np.abs(wide - sums)
    # The sum's own error; two scales and a cast, each rounded to float32; then the last rounding.
    allowed = sizes * (_SUM_ERROR[operand_name] + 2.0**-21) * 1.01
    allowed = allowed + u * (np.abs(sums) + sizes * 2.0**-10) + 1e-37
    worst = float((error / allowed).max(initial=0.0))
    if worst > 1.0:
        at = np.unravel_index(int(np.argmax(error / allowed)), error.shape)
        raise WrongOutput(
            f"{what}: the error is {worst:.3g} times its bound; found {wide[at]:.9g}, exact "
            f"{sums[at]:.9g}"
        )
    return worst


def check_bits(found: NDArray, wanted: NDArray, what: str) -> float:
    """Check that two arrays are the same to the bit; returns 0.  Raises WrongOutput."""
    if found.shape != wanted.shape or found.dtype != wanted.dtype:
        raise WrongOutput(
            f"{what}: found {found.dtype} {found.shape}, wanted {wanted.dtype} {wanted.shape}"
        )
    bits = f"u{found.dtype.itemsize}"
    different = np.ascontiguousarray(found).view(bits) != np.ascontiguousarray(wanted).view(bits)
    if different.any():
        at = tuple(int(i) for i in np.argwhere(different)[0])
        raise WrongOutput(
            f"{what}: {int(different.sum())} of {different.size} differ, the first at {at}: found "
            f"{found[at]}, wanted {wanted[at]}"
        )
    return 0.0


def check_alike(found: NDArray, other: NDArray, operand: Operand, what: str) -> None:
    """Check that the results (T, N) of two sides are the same, int8's to the bit.

    For the other formats that is a coarse check of many results; :func:`check_result` is the fine
    one of few.  Raises WrongOutput.
    """
    if operand.name == "int8":
        check_bits(found, other, what)
        return
    wide, wanted = found.astype(np.float32), other.astype(np.float32)
    allowed = _APART * np.sqrt(np.mean(np.square(wanted), axis=1, keepdims=True))
    far = ~(np.abs(wide - wanted) <= allowed)  # not a number is far, too
    if far.any():
        at = tuple(int(i) for i in np.argwhere(far)[0])
        raise WrongOutput(
            f"{what}: {int(far.sum())} of {far.size} are far apart, the first at {at}: "
            f"{wide[at]:.9g} and {wanted[at]:.9g}"
        )


def check_poison(row: NDArray, what: str) -> None:
    """Raise WrongOutput if a row still holds the poison (all bits set) it was filled with."""
    bits = np.ascontiguousarray(row).view(f"u{row.dtype.itemsize}")
    left = int((bits == np.iinfo(bits.dtype).max).sum())
    if left > _POISON_SHARE * row.size:
        raise WrongOutput(f"{what}: {left} of {row.size} elements of a row were never written")
