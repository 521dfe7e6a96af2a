"""The one table of data types: names, widths, code numbers and quantization ranges.

Operand formats are what a GEMM multiplies ("int8", "fp8_e4m3", "bf16", "fp16"); array types are
what users hand in and get back (float32, float16, bfloat16).  Nothing else in the package writes a
data type's code number or range down a second time.

Sources: ``cudaDataType`` from CUDA's library_types.h; DLPack codes from dlpack.h (0 int, 1 uint,
2 float, 4 bfloat, 10 float8_e4m3fn); E4M3 range from the OCP 8-bit floating point specification.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np
import numpy.typing as npt

from .errors import DTypeError

__all__ = [
    "ARRAY_TYPES",
    "OPERANDS",
    "SCALE_FLOOR",
    "ArrayType",
    "Operand",
    "array_type",
    "operand",
    "storage_bits",
]


@dataclass(frozen=True, slots=True)
class ArrayType:
    """A type of array that crosses the API.

    ``mask`` and ``inf_bits`` serve the integer view of the bits: ``bits & mask`` is zero for +0 and
    -0 alone, and at least ``inf_bits`` for infinities and NaNs alone.
    """

    name: str
    numpy: npt.DTypeLike
    bits: int
    cuda_data_type: int
    dlpack: tuple[int, int]
    mask: int
    inf_bits: int

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The NumPy dtype object."""
        return np.dtype(self.numpy)

    @property
    def bits_dtype(self) -> np.dtype[np.generic]:
        """The unsigned integer type of the same width."""
        return np.dtype(f"u{self.bits // 8}")


@dataclass(frozen=True, slots=True)
class Operand:
    """A type of GEMM operand.

    Attributes
    ----------
    q_max:
        Largest magnitude that the quantizer emits (127 for int8, 448 for fp8_e4m3);
        ``None`` where values pass through unscaled.
    accumulator:
        NumPy type in which the hardware sums the products.
    max_k:
        Longest row for which the accumulator is exact (int8: int32 must not overflow; fp8: every
        partial sum fits the 53 bits of a float64, which makes the reference exact in any order);
        ``None`` where sums are rounded anyway.
    """

    name: str
    numpy: npt.DTypeLike
    bits: int
    cuda_data_type: int
    q_max: float | None
    accumulator: npt.DTypeLike
    max_k: int | None

    @property
    def dtype(self) -> np.dtype[np.generic]:
        """The NumPy dtype object of stored values."""
        return np.dtype(self.numpy)

    @property
    def scaled(self) -> bool:
        """Whether weights and activations carry scales."""
        return self.q_max is not None


#: Smallest scale: the smallest normal float32.  A row whose absmax is below ``SCALE_FLOOR * q_max``
#: is quantized with this scale, so that scale and reciprocal stay within float32's normal range.
SCALE_FLOOR = np.float32(2.0**-126)

ARRAY_TYPES: tuple[ArrayType, ...] = (
    ArrayType("float32", np.float32, 32, 0, (2, 32), 0x7FFFFFFF, 0x7F800000),
    ArrayType("float16", np.float16, 16, 2, (2, 16), 0x7FFF, 0x7C00),
    ArrayType("bfloat16", ml_dtypes.bfloat16, 16, 14, (4, 16), 0x7FFF, 0x7F80),
)

OPERANDS: tuple[Operand, ...] = (
    # int8: |q| <= 127, so |sum| <= K * 127^2 < 2^31 holds up to K = 133,144.
    Operand("int8", np.int8, 8, 3, 127.0, np.int32, (2**31 - 1) // 127**2),
    # fp8: products are multiples of 2^-18 below 2^18 in magnitude, 36 bits; 2^17 of them need 53.
    Operand("fp8_e4m3", ml_dtypes.float8_e4m3fn, 8, 28, 448.0, np.float32, 2**17),
    Operand("bf16", ml_dtypes.bfloat16, 16, 14, None, np.float32, None),
    Operand("fp16", np.float16, 16, 2, None, np.float32, None),
)

_OPERAND_ALIASES = {
    "fp8": "fp8_e4m3",
    "float8_e4m3fn": "fp8_e4m3",
    "bfloat16": "bf16",
    "float16": "fp16",
}

#: Formats that GPUs multiply but that sliding cannot serve -> why, and what to take instead.
#: Sources: PTX ISA 9.1, "Sparse matrix storage" and "Sparse tcgen05.mma.sp with .kind::mxf4 and
#: .kind::mxf4nvf4"; cuSPARSELt, ``cusparseLtSparsity_t``.
_REFUSED = {
    "fp4_e2m1": (
        "sparse FP4 takes 4:8 pairwise, zeros in adjacent pairs (PTX ISA: mma.sp and "
        "tcgen05.mma.sp with .kind::mxf4 or .kind::mxf4nvf4; cuSPARSELt: 'paired 4:8 for e2m1'), "
        "and sliding makes 2:4 windows, whose zeros lie anywhere; use dtype='fp8_e4m3' or 'int8' "
        "(docs/patterns.md#why-there-is-no-fp4)"
    ),
}
_REFUSED_ALIASES = dict.fromkeys(
    ("fp4", "mxfp4", "nvfp4", "e2m1", "float4_e2m1fn", "float4_e2m1fn_x2"), "fp4_e2m1"
)


def operand(spec: str | Operand) -> Operand:
    """Return the operand format that ``spec`` names; DTypeError for anything else."""
    if isinstance(spec, Operand):
        return spec
    if isinstance(spec, str):
        for row in OPERANDS:
            if row.name == spec:
                return row
        meant = _OPERAND_ALIASES.get(spec)
        if meant is not None:
            raise DTypeError(f"dtype {spec!r} is spelled {meant!r} here; type dtype={meant!r}")
        refused = _REFUSED.get(_REFUSED_ALIASES.get(spec, spec))
        if refused is not None:
            raise DTypeError(f"dtype {spec!r} has no backend: {refused}")
    allowed = ", ".join(repr(row.name) for row in OPERANDS)
    raise DTypeError(f"dtype {spec!r} is no operand format; allowed are {allowed}")


def array_type(spec: object) -> ArrayType:
    """Return the array type for a name ("bfloat16") or a NumPy dtype; DTypeError otherwise."""
    name = spec if isinstance(spec, str) else None
    if name is None:
        try:
            name = np.dtype(spec).name  # type: ignore[call-overload]
        except TypeError:
            name = str(spec).rsplit(".", 1)[-1]
    for row in ARRAY_TYPES:
        if row.name == name:
            return row
    allowed = ", ".join(row.name for row in ARRAY_TYPES)
    raise DTypeError(f"{name} is not supported; allowed are {allowed}; convert the array first")


def storage_bits(bits: int, group: int, windows: int) -> tuple[int, int]:
    """Bits that one group takes dense and in 2:4-compressed windows (values plus 2-bit indices).

    A window stores two values and two 2-bit positions (PTX ISA, sparse MMA metadata).
    """
    return bits * group, windows * (2 * bits + 4)
