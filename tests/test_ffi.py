"""The bindings of cuSPARSELt and cuBLASLt: symbols, codes and widths.

The real libraries load without a GPU, and answer for their version, symbols, status names and (only
cuBLASLt) attribute sizes; the rest runs against a fake one.
"""

from __future__ import annotations

import ctypes
import os
import site
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
from ffi_fake import BINDINGS, fake, python, sparse_parts
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_rt.dtypes import ARRAY_TYPES, OPERANDS
from slidesparse_rt.errors import BackendUnavailable, LibraryError, OptionError
from slidesparse_rt.ffi import cublaslt, cusparselt
from slidesparse_rt.ffi.checked import Attribute, CLibrary, DataType, HostScalar
from slidesparse_rt.ffi.cublaslt import CublasLt
from slidesparse_rt.ffi.cusparselt import CuSparseLt
from slidesparse_rt.ffi.libraries import Missing, examine, find
from slidesparse_rt.ffi.libraries import library as table_row
from slidesparse_rt.ffi.objects import Memory

# --- the real libraries ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    abs_path: str
    found_via: str = "this test"


def installed(name: str) -> list[Path]:
    """Every copy of a library that pip installed here."""
    row = table_row(name)
    places = [Path(root, folder) for root in site.getsitepackages() for folder in row.folders]
    return [file for place in places for soname in row.sonames for file in place.glob(soname)]


COPIES = [(name, path) for name in BINDINGS for path in installed(name) or [None]]


def load_copy(name: str, path: Path | None) -> Any:
    if path is None:
        packages = " or ".join(table_row(name).wheels.values())
        reason = f"{name} is not installed here: pip install {packages}"
        # CI installs the packages: there a missing one is a fault of the installation.
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    loaded = examine(table_row(name), search=lambda _: Found(str(path)))
    assert not isinstance(loaded, Missing), loaded
    return BINDINGS[name](loaded)


@pytest.fixture(params=COPIES, ids=lambda row: f"{row[0]}-{row[1]}")
def real(request: pytest.FixtureRequest) -> Any:
    """Each copy of each library that is installed."""
    return load_copy(*request.param)


@pytest.fixture(
    params=[row for row in COPIES if row[0] == "cublasLt"], ids=lambda row: f"{row[0]}-{row[1]}"
)
def real_cublaslt(request: pytest.FixtureRequest) -> Any:
    return load_copy(*request.param)


def test_version_of_a_real_library(real: CLibrary) -> None:
    prefix = "cusparseLt" if isinstance(real, CuSparseLt) else "cublasLt"
    parts = []
    for which in range(3):
        value = ctypes.c_int(-1)
        getattr(real, f"{prefix}GetProperty")(which, ctypes.byref(value))
        parts.append(value.value)
    assert tuple(parts) == real.version
    assert real.version >= table_row(prefix).minimum


def test_real_cublaslt_version_number(real_cublaslt: CublasLt) -> None:
    major, minor, patch = real_cublaslt.version
    assert real_cublaslt.cublasLtGetVersion() == major * 10000 + minor * 100 + patch


def test_a_real_library_has_every_function(real: CLibrary) -> None:
    for name, function in real.FUNCTIONS.items():
        expected = function.since is None or real.version >= function.since
        assert real.has(name) is expected, name
        if expected:
            assert callable(real.raw(name))


def test_status_names_are_those_of_a_real_library(real: CLibrary) -> None:
    asked = "cusparseLtGetErrorName" if isinstance(real, CuSparseLt) else "cublasLtGetStatusName"
    if not real.has(asked):
        assert isinstance(real, CuSparseLt)
        assert real.version < (0, 8)
        return
    for status in real.STATUS:
        assert getattr(real, asked)(status).decode() == real.status_name(status)
    assert real.status_name(99) == "unknown status"


def test_real_refusal_is_an_error_with_its_name(real: CLibrary) -> None:
    prefix = "cusparseLt" if isinstance(real, CuSparseLt) else "cublasLt"
    value = ctypes.c_int()
    with pytest.raises(LibraryError, match=r"GetProperty.*INVALID_VALUE") as caught:
        getattr(real, f"{prefix}GetProperty")(77, ctypes.byref(value))
    assert caught.value.status == real.STATUS["INVALID_VALUE"]
    assert caught.value.status_name.endswith("_STATUS_INVALID_VALUE")
    assert caught.value.function == f"{prefix}GetProperty"
    assert "which=77" in str(caught.value)


def test_an_uninitialized_cusparselt_handle_is_refused(real: CLibrary) -> None:
    if not isinstance(real, CuSparseLt):
        return
    handle, matrix = Memory(1024, 64), Memory(1024, 64)
    with pytest.raises(LibraryError, match=r"rows=64, cols=32.*value_type=I8, order=COL"):
        real.cusparseLtDenseDescriptorInit(
            handle.address, matrix.address, 64, 32, 64, 16, DataType.I8, cusparselt.Order.COL
        )


@pytest.mark.parametrize(
    ("prefix", "attributes", "create"),
    [
        ("cublasLtMatrixLayout", cublaslt.LayoutAttribute, (3, 64, 32, 64)),
        ("cublasLtMatmulDesc", cublaslt.MatmulAttribute, (72, 10)),
        ("cublasLtMatmulPreference", cublaslt.PreferenceAttribute, ()),
    ],
)
def test_attribute_sizes_are_those_of_a_real_cublaslt(
    real_cublaslt: CublasLt, prefix: str, attributes: type[Attribute], create: tuple[int, ...]
) -> None:
    place, size = ctypes.c_void_p(), ctypes.c_size_t()
    getattr(real_cublaslt, f"{prefix}Create")(ctypes.byref(place), *create)
    for attribute in attributes:
        getter = getattr(real_cublaslt, f"{prefix}GetAttribute")
        getter(place.value, attribute, None, 0, ctypes.byref(size))
        assert size.value == ctypes.sizeof(attribute.ctype), attribute.name
    getattr(real_cublaslt, f"{prefix}Destroy")(place.value)


def test_attributes_of_real_cublaslt_objects(real_cublaslt: CublasLt) -> None:
    with cublaslt.MatrixLayout(real_cublaslt, DataType.I8, 64, 32, 80) as layout:
        got = {key.name: layout.get(key) for key in cublaslt.LayoutAttribute}
        assert got == {
            "TYPE": DataType.I8,
            "ORDER": cublaslt.Order.COL,
            "ROWS": 64,
            "COLS": 32,
            "LD": 80,
            "BATCH_COUNT": 1,
            "STRIDED_BATCH_OFFSET": 0,
        }
        layout.set(cublaslt.LayoutAttribute.ROWS, 2**40)
        assert layout.get(cublaslt.LayoutAttribute.ROWS) == 2**40
    matmul = cublaslt.MatmulDescriptor(real_cublaslt, cublaslt.Compute.I32, DataType.I32)
    wanted = {
        cublaslt.MatmulAttribute.TRANSA: cublaslt.Operation.T,
        cublaslt.MatmulAttribute.EPILOGUE: cublaslt.Epilogue.BIAS,
        cublaslt.MatmulAttribute.BIAS_POINTER: 0x7F0000001000,
        cublaslt.MatmulAttribute.B_SCALE_POINTER: 0x7F0000002000,
        cublaslt.MatmulAttribute.A_SCALE_MODE: cublaslt.ScaleMode.OUTER_VEC_F32,
        cublaslt.MatmulAttribute.FAST_ACCUM: 1,
        cublaslt.MatmulAttribute.BIAS_DATA_TYPE: DataType.F32,
        cublaslt.MatmulAttribute.POINTER_MODE: cublaslt.PointerMode.ALPHA_DEVICE_VECTOR_BETA_ZERO,
    }
    for key, value in wanted.items():
        matmul.set(key, value)
    assert {key: matmul.get(key) for key in wanted} == wanted
    assert matmul.get(cublaslt.MatmulAttribute.COMPUTE_TYPE) == cublaslt.Compute.I32
    assert matmul.get(cublaslt.MatmulAttribute.SCALE_TYPE) == DataType.I32
    preference = cublaslt.Preference(real_cublaslt)
    preference.set(cublaslt.PreferenceAttribute.MAX_WORKSPACE_BYTES, 32 << 20)
    assert preference.get(cublaslt.PreferenceAttribute.MAX_WORKSPACE_BYTES) == 32 << 20
    assert preference.get(cublaslt.PreferenceAttribute.MIN_ALIGNMENT_A_BYTES) == 256
    assert (
        preference.get(cublaslt.PreferenceAttribute.REDUCTION_SCHEME_MASK)
        == cublaslt.ReductionScheme.MASK
    )


def test_algorithm_configuration_of_a_real_cublaslt(real_cublaslt: CublasLt) -> None:
    blank = bytes(cublaslt.ALGORITHM_BYTES)
    assert set(cublaslt.describe(real_cublaslt, blank)) == set(cublaslt.AlgorithmAttribute)


@pytest.mark.parametrize("module", [cusparselt, cublaslt])
def test_the_library_of_this_process(module: Any) -> None:
    name = "cusparseLt" if module is cusparselt else "cublasLt"
    found = find(name)
    if isinstance(found, Missing):
        with pytest.raises(BackendUnavailable, match="was not found"):
            module.library()
    else:
        assert module.library() is module.library()
        assert (module.library().path, module.library().version) == (found.path, found.version)


def test_without_a_gpu_a_real_handle_is_unavailable(real: CLibrary) -> None:
    """In a child process that sees no GPU, even where there is one: an error, not a crash."""
    name = "cusparseLt" if isinstance(real, CuSparseLt) else "cublasLt"
    code = f"""
        from slidesparse_rt.errors import BackendUnavailable
        from slidesparse_rt.ffi import {name.lower()} as m
        from slidesparse_rt.ffi.libraries import examine, library
        class Found:
            abs_path, found_via = {real.path!r}, "this test"
        lib = m.{type(real).__name__}(examine(library({name!r}), search=lambda _: Found))
        for device in (0, 1):
            try:
                m.Handle(device, lib=lib)
            except BackendUnavailable as error:
                assert f"cannot start on device {{device}}" in str(error), error
                assert "NOT_INITIALIZED" in str(error), error
                assert lib.path in str(error), error
            else:
                raise SystemExit("a handle without a GPU")
        print("refused")
    """
    ran = python(code, CUDA_VISIBLE_DEVICES="-1")
    assert ran.stdout == "refused\n", ran


# --- codes, sizes, layouts ------------------------------------------------------------------------


def codes(enum: type[IntEnum]) -> dict[str, int]:
    return {member.name: int(member) for member in enum}


def test_codes_of_cusparselt() -> None:
    """Typed in a second time, from the headers, against slips of the first."""
    assert codes(cusparselt.Status) == {
        "SUCCESS": 0,
        "NOT_INITIALIZED": 1,
        "ALLOC_FAILED": 2,
        "INVALID_VALUE": 3,
        "ARCH_MISMATCH": 4,
        "MAPPING_ERROR": 5,
        "EXECUTION_FAILED": 6,
        "INTERNAL_ERROR": 7,
        "MATRIX_TYPE_NOT_SUPPORTED": 8,
        "ZERO_PIVOT": 9,
        "NOT_SUPPORTED": 10,
        "INSUFFICIENT_RESOURCES": 11,
    }
    assert codes(cusparselt.Compute) == {"I32": 0, "F16": 1, "F32": 2}
    assert codes(cusparselt.Order) == {"COL": 1, "ROW": 2}
    assert codes(cusparselt.Operation) == {"N": 0, "T": 1}
    assert codes(cusparselt.Sparsity) == {"HALF": 0}
    assert codes(cusparselt.PruneAlg) == {"TILE": 0, "STRIP": 1}
    assert codes(cusparselt.MatmulAlg) == {"DEFAULT": 0}
    modes = ["INVALID", "ONE_KERNEL", "TWO_KERNELS", "HEURISTIC", "DATAPARALLEL", "SPLITK"]
    assert list(codes(cusparselt.SplitKMode).items()) == [
        *((name, code) for code, name in enumerate(modes)),
        ("STREAMK", 6),
    ]
    assert [mode.value for mode in cusparselt.ScaleMode] == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("attributes", "sizes"),
    [
        (cusparselt.MatAttribute, [4, 8]),
        (
            cusparselt.MatmulAttribute,
            [4, 4, 4, 4, 4, 4, 4, 8, 8, 8, 4, 4, 4, 4, 4, 8, 8, 8, 8, 8],
        ),
        (cusparselt.AlgAttribute, [4, 4, 4, 4, 4, 4]),
    ],
)
def test_attribute_sizes_of_cusparselt(attributes: type[Attribute], sizes: list[int]) -> None:
    assert [int(attribute) for attribute in attributes] == list(range(len(sizes)))
    assert [ctypes.sizeof(attribute.ctype) for attribute in attributes] == sizes


def test_codes_of_cublaslt() -> None:
    assert codes(cublaslt.Compute) == {"F16": 64, "F32": 68, "I32": 72}
    assert codes(cublaslt.Operation) == {"N": 0, "T": 1}
    assert codes(cublaslt.Order) == {"COL": 0, "ROW": 1}
    assert list(cublaslt.PointerMode) == [0, 1, 2, 3, 4]
    assert cublaslt.ScaleMode.OUTER_VEC_F32 == 3
    assert cublaslt.Epilogue.BIAS == 4
    assert cublaslt.Epilogue.GELU_BIAS == cublaslt.Epilogue.GELU | cublaslt.Epilogue.BIAS
    assert cublaslt.Epilogue.RELU_BIAS == cublaslt.Epilogue.RELU | cublaslt.Epilogue.BIAS


def test_layout_of_a_heuristic_result() -> None:
    """Sizes and offsets that a C compiler gives for cublasLt.h 12.8.4 to 13.10.0."""
    row = cublaslt.HeuristicResult
    assert ctypes.sizeof(row) == 96
    assert ctypes.alignment(row) == 8
    offsets = [getattr(row, name).offset for name, _ in row._fields_]
    assert offsets == [0, 64, 72, 76, 80]
    assert row.algorithm.size == cublaslt.ALGORITHM_BYTES == 64


def test_data_types_agree_with_the_dtype_table() -> None:
    assert codes(DataType) == {
        "F32": 0,
        "F16": 2,
        "I8": 3,
        "I32": 10,
        "BF16": 14,
        "E4M3": 28,
        "E2M1": 33,
    }
    for row in (*ARRAY_TYPES, *OPERANDS):
        assert row.cuda_data_type in list(DataType)


@pytest.mark.parametrize(
    ("version", "capability", "expected"),
    [
        ((12, 8, 4), (9, 0), False),
        ((12, 9, 0), (9, 0), True),
        ((12, 9, 1), (9, 0), True),
        ((13, 0, 0), (9, 0), True),
        ((13, 10, 0), (9, 0), True),
        ((13, 10, 0), (8, 9), False),
        ((13, 10, 0), (10, 0), False),
        ((13, 10, 0), (12, 0), False),
    ],
)
def test_outer_vector_scales(
    version: tuple[int, ...], capability: tuple[int, int], expected: bool
) -> None:
    assert cublaslt.supports_outer_vector_scales(version, capability) is expected


def test_attribute_values_must_fit() -> None:
    key = cusparselt.AlgAttribute.SPLIT_K
    assert key.cell(-1).value == -1
    with pytest.raises(OptionError, match=r"AlgAttribute\.SPLIT_K is 4294967296.*32 bits"):
        key.cell(2**32)
    pointer = cusparselt.MatmulAttribute.BIAS_POINTER
    assert pointer.cell(0).value is None
    assert pointer.cell(0x7F0000001000).value == 0x7F0000001000
    assert cusparselt.MatmulAttribute.ACTIVATION_GELU_SCALING.cell(0.1).value == pytest.approx(0.1)


@given(size=st.integers(1, 5000), alignment=st.sampled_from([16, 64, 256]))
def test_memory_is_aligned_zeroed_and_stays(size: int, alignment: int) -> None:
    memory = Memory(size, alignment)
    assert memory.address % alignment == 0
    assert ctypes.string_at(memory.address, size) == bytes(size)
    ctypes.memset(memory.address, 7, size)
    assert ctypes.string_at(memory.address, size) == b"\x07" * size


def test_opaque_structures_are_large_and_aligned_enough() -> None:
    """1024 bytes in 0.7.1; 512 bytes aligned to 16 from 0.8.0 on."""
    lib, _ = fake(CuSparseLt)
    assert cusparselt.OPAQUE_BYTES >= 1024
    for part in sparse_parts(lib).values():
        assert part.address % 64 == 0


def test_host_scalars() -> None:
    scalar = HostScalar(ctypes.c_float, 1.5)
    assert ctypes.c_float.from_address(scalar.address).value == scalar.value == 1.5
    number = HostScalar(ctypes.c_int32, -3)
    assert ctypes.c_int32.from_address(number.address).value == number.value == -3
