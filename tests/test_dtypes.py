"""The table of data types against NumPy, ml_dtypes, DLPack and the arithmetic it promises."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from slidesparse_rt.dtypes import (
    ARRAY_TYPES,
    OPERANDS,
    SCALE_FLOOR,
    ArrayType,
    Operand,
    array_type,
    operand,
    storage_bits,
)
from slidesparse_rt.errors import DTypeError
from slidesparse_rt.pattern import PATTERNS, Pattern


def test_the_names_are_those_of_the_documentation() -> None:
    assert [row.name for row in OPERANDS] == ["int8", "fp8_e4m3", "bf16", "fp16"]
    assert [row.name for row in ARRAY_TYPES] == ["float32", "float16", "bfloat16"]


@pytest.mark.parametrize("row", [*OPERANDS, *ARRAY_TYPES], ids=lambda row: row.name)
def test_bits_are_the_bits_of_the_numpy_type(row: ArrayType | Operand) -> None:
    assert row.dtype.itemsize * 8 == row.bits


@pytest.mark.parametrize("row", ARRAY_TYPES, ids=lambda row: row.name)
def test_masks_tell_zeros_and_numbers_that_are_not_finite(row: ArrayType) -> None:
    assert row.bits_dtype.itemsize == row.dtype.itemsize
    special = np.array([0.0, -0.0, np.inf, -np.inf, np.nan], row.dtype)
    bits = special.view(row.bits_dtype).astype(np.int64) & row.mask
    assert (bits[:2] == 0).all()
    assert (bits[2:] >= row.inf_bits).all()
    limits = ml_dtypes.finfo(row.dtype)
    least = np.array([limits.smallest_subnormal, -limits.smallest_subnormal], row.dtype)
    assert (least.view(row.bits_dtype).astype(np.int64) & row.mask != 0).all()
    most = np.array([limits.max, -limits.max], row.dtype)
    assert (most.view(row.bits_dtype).astype(np.int64) & row.mask < row.inf_bits).all()


def test_dlpack_codes_are_those_that_numpy_and_torch_use() -> None:
    import torch

    for row in ARRAY_TYPES:
        tensor = torch.zeros(1, dtype=getattr(torch, row.name))
        other = torch.from_dlpack(tensor)
        assert other.dtype == tensor.dtype
    # dlpack.h: DLDataTypeCode kDLFloat = 2, kDLBfloat = 4.
    assert [row.dlpack for row in ARRAY_TYPES] == [(2, 32), (2, 16), (4, 16)]


def test_cuda_data_types_are_those_of_library_types_h() -> None:
    # CUDA_R_32F = 0, CUDA_R_16F = 2, CUDA_R_8I = 3, CUDA_R_16BF = 14, CUDA_R_8F_E4M3 = 28.
    assert {row.name: row.cuda_data_type for row in ARRAY_TYPES} == {
        "float32": 0,
        "float16": 2,
        "bfloat16": 14,
    }
    assert {row.name: row.cuda_data_type for row in OPERANDS} == {
        "int8": 3,
        "fp8_e4m3": 28,
        "bf16": 14,
        "fp16": 2,
    }


def test_ranges_are_those_of_the_formats() -> None:
    assert operand("int8").q_max == np.iinfo(np.int8).max
    assert operand("fp8_e4m3").q_max == float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)
    assert not operand("bf16").scaled
    assert not operand("fp16").scaled
    assert operand("int8").scaled
    assert np.finfo(np.float32).smallest_normal == SCALE_FLOOR
    assert SCALE_FLOOR.dtype == np.float32


def test_the_longest_rows_are_exact_and_one_more_would_not_be() -> None:
    k = operand("int8").max_k
    assert k is not None
    assert k * 127 * 127 <= np.iinfo(np.int32).max < (k + 1) * 127 * 127
    k = operand("fp8_e4m3").max_k
    assert k is not None
    # Units of the smallest product (2**-9)**2; the sum must fit the 53 bits of a float64.
    largest = 448 * 448 * 2**18
    assert k * largest <= 2**53
    assert operand("bf16").max_k is None


@pytest.mark.parametrize("row", OPERANDS, ids=lambda row: row.name)
def test_operand_takes_names_and_rows(row: Operand) -> None:
    assert operand(row.name) is row
    assert operand(row) is row


@pytest.mark.parametrize(
    ("alias", "name"),
    [
        ("fp8", "fp8_e4m3"),
        ("float8_e4m3fn", "fp8_e4m3"),
        ("bfloat16", "bf16"),
        ("float16", "fp16"),
    ],
)
def test_other_spellings_are_told_the_one_used_here(alias: str, name: str) -> None:
    with pytest.raises(
        DTypeError, match=f"{alias!r} is spelled {name!r} here; type dtype={name!r}"
    ):
        operand(alias)


@pytest.mark.parametrize("spec", ["int4", "", "INT8", None, 8, np.int8, ["int8"], {"int8": 1}])
def test_other_operands_are_refused(spec: object) -> None:
    with pytest.raises(DTypeError) as caught:
        operand(spec)  # type: ignore[arg-type]
    assert repr(spec) in str(caught.value)
    for row in OPERANDS:
        assert repr(row.name) in str(caught.value)


@pytest.mark.parametrize("spec", ["fp4_e2m1", "fp4", "nvfp4", "mxfp4", "float4_e2m1fn"])
def test_fp4_is_known_and_refused_with_the_reason(spec: str) -> None:
    """Not "no operand format": sparse FP4 exists, and its zeros come in pairs."""
    with pytest.raises(DTypeError, match="4:8 pairwise, zeros in adjacent pairs") as caught:
        operand(spec)
    message = str(caught.value)
    assert message.startswith(f"dtype {spec!r} has no backend")
    for words in ("PTX ISA", "cuSPARSELt", "dtype='fp8_e4m3'", "docs/patterns.md"):
        assert words in message


def test_array_type_takes_names_and_library_types() -> None:
    import jax.numpy as jnp
    import torch

    for name in ("float32", "float16", "bfloat16"):
        row = array_type(name)
        assert row.name == name
        assert array_type(row.dtype) is row
        assert array_type(row.numpy) is row
        assert array_type(getattr(torch, name)) is row
        assert array_type(getattr(jnp, name)) is row


@pytest.mark.parametrize(
    "spec", ["float64", "int8", "f4", "", None, np.float64, np.int32, 5, {"a": 1}, [("a", "f4")]]
)
def test_other_array_types_are_refused(spec: object) -> None:
    with pytest.raises(DTypeError) as caught:
        array_type(spec)
    for row in ARRAY_TYPES:
        assert row.name in str(caught.value)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
@pytest.mark.parametrize("bits", [8, 16])
def test_storage_counts_two_values_and_two_indices_in_each_window(
    pattern: Pattern, bits: int
) -> None:
    dense, packed = storage_bits(bits, pattern.group, pattern.windows)
    assert dense == bits * pattern.group
    assert packed == pattern.windows * (2 * bits + 2 * 2)
