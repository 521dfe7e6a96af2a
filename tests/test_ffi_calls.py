"""The bindings of cuSPARSELt and cuBLASLt: what is called, with what, and what errors say."""

from __future__ import annotations

import ctypes
import gc
from enum import IntEnum
from types import SimpleNamespace
from typing import Any

import pytest
from ffi_fake import POINTERS, dense_matmul, fake, sparse_parts

from slidesparse_rt.errors import (
    BackendUnavailable,
    DeviceMemoryError,
    FormatError,
    LibraryError,
    PlanClosed,
)
from slidesparse_rt.ffi import cublaslt, cusparselt
from slidesparse_rt.ffi.checked import CLibrary, DataType, declare, functions
from slidesparse_rt.ffi.cublaslt import CublasLt
from slidesparse_rt.ffi.cusparselt import CuSparseLt
from slidesparse_rt.ffi.objects import Memory


def test_functions_are_bound_when_first_called() -> None:
    lib, dll = fake(CuSparseLt)
    assert not [name for name in vars(lib) if name.startswith("cusparseLt")]
    memory = Memory(1024)
    lib.cusparseLtInit(memory.address)
    assert dll.calls == [("cusparseLtInit", (memory.address,))]
    assert [name for name in vars(lib) if name.startswith("cusparseLt")] == ["cusparseLtInit"]
    assert lib.cusparseLtInit.__name__ == "cusparseLtInit"


def test_unknown_and_absent_functions() -> None:
    lib, _ = fake(CuSparseLt, lacks=("cusparseLtMatmulAlgSelectionDestroy", "cusparseLtMatmul"))
    with pytest.raises(AttributeError, match="cusparseLtNonsense"):
        lib.cusparseLtNonsense()
    with pytest.raises(BackendUnavailable, match=r"no function .*SelectionDestroy.*with 0\.8"):
        lib.cusparseLtMatmulAlgSelectionDestroy(1)
    with pytest.raises(BackendUnavailable, match=r"cuSPARSELt 0\.8\.1 at /fake/lib.so has no"):
        lib.raw("cusparseLtMatmul")


@pytest.mark.parametrize("kind", [CuSparseLt, CublasLt])
def test_each_status_becomes_an_error_that_names_it(kind: type[CLibrary]) -> None:
    lib, dll = fake(kind)
    name = "cusparseLtGetProperty" if kind is CuSparseLt else "cublasLtGetProperty"
    prefix = "CUSPARSE_STATUS_" if kind is CuSparseLt else "CUBLAS_STATUS_"
    for status in [*kind.STATUS, 99]:
        dll.statuses[name] = int(status)
        if status == 0:
            assert getattr(lib, name)(1, None) is None
            continue
        with pytest.raises(LibraryError) as caught:
            getattr(lib, name)(1, None)
        error = caught.value
        assert (error.function, error.status) == (name, status)
        expected = prefix + status.name if isinstance(status, IntEnum) else "unknown status"
        assert error.status_name == expected
        assert isinstance(error, DeviceMemoryError) is (error.status_name.endswith("ALLOC_FAILED"))
        start = f"{name}(which=1, value=NULL) returned {int(status)} ({expected}): words"
        assert str(error).startswith(start)


def test_a_repeated_call_is_the_call() -> None:
    """Arguments are converted once, addresses to all of their 64 bits."""

    class Standard(CLibrary):
        FUNCTIONS = functions(declare("memcmp", "one other count:size"))

    table = SimpleNamespace(title="the C library")
    loaded: Any = SimpleNamespace(library=table, path="", version=(), handle=ctypes.CDLL(None))
    lib = Standard(loaded)
    one, other = (ctypes.c_char * 8)(), (ctypes.c_char * 8)()
    call = lib.repeated("memcmp", ctypes.addressof(one), other, 8)
    assert ctypes.addressof(one) >> 32
    assert [call(), call()] == [0, 0]
    one[7] = b"x"
    assert call() > 0
    other[7] = b"y"
    assert call() < 0
    assert lib.repeated("memcmp", None, None, 0)() == 0
    # Other calls still convert.
    assert lib.raw("memcmp")(ctypes.addressof(one), other, 7) == 0
    with pytest.raises(TypeError):
        lib.repeated("memcmp", 1.5, other, 8)
    with pytest.raises(ValueError, match="zip"):
        lib.repeated("memcmp", one, other)


def test_an_error_shows_the_arguments_that_matter() -> None:
    lib, dll = fake(CuSparseLt, lacks=("cusparseLtGetErrorString",))
    handle = cusparselt.Handle(0, lib=lib)
    dll.statuses["cusparseLtStructuredDescriptorInit"] = 10
    with pytest.raises(LibraryError) as caught:
        cusparselt.MatDescriptor(handle, 96, 33, 96, DataType.E4M3, structured=True)
    text = str(caught.value)
    assert f"handle={handle.address:#x}" in text
    assert "rows=96, cols=33, ld=96, alignment=16, value_type=E4M3, order=COL" in text
    assert "returned 10 (CUSPARSE_STATUS_NOT_SUPPORTED); this version has no kernel" in text
    assert text.endswith("[cuSPARSELt 0.8.1]")
    dll.statuses["cusparseLtDenseDescriptorInit"] = 3
    with pytest.raises(LibraryError, match="INVALID_VALUE"):
        cusparselt.MatDescriptor(handle, 1, 1, 1, DataType.I8)


@pytest.mark.parametrize("status", ["NOT_INITIALIZED", "ARCH_MISMATCH"])
def test_a_handle_that_cannot_start_is_unavailable(status: str) -> None:
    for kind, name, module in (
        (CuSparseLt, "cusparseLtInit", cusparselt),
        (CublasLt, "cublasLtCreate", cublaslt),
    ):
        lib, dll = fake(kind)
        dll.statuses[name] = kind.STATUS[status]
        with pytest.raises(BackendUnavailable, match=f"cannot start on device 3: {name}.*{status}"):
            module.Handle(3, lib=lib)
        dll.statuses[name] = kind.STATUS["ALLOC_FAILED"]
        with pytest.raises(DeviceMemoryError):
            module.Handle(3, lib=lib)
        gc.collect()
        assert dll.destroyed() == []


def test_attributes_are_written_with_their_width() -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    a, matmul, selection = parts["a"], parts["matmul"], parts["selection"]
    a.set(cusparselt.MatAttribute.BATCH_STRIDE, -(2**40))
    assert a.get(cusparselt.MatAttribute.BATCH_STRIDE) == -(2**40)
    matmul.set(cusparselt.MatmulAttribute.ALPHA_VECTOR_SCALING, 1)
    matmul.set(cusparselt.MatmulAttribute.BIAS_POINTER, 0x7F0000001000)
    matmul.set(cusparselt.MatmulAttribute.ACTIVATION_GELU_SCALING, 0.5)
    assert matmul.get(cusparselt.MatmulAttribute.BIAS_POINTER) == 0x7F0000001000
    assert matmul.get(cusparselt.MatmulAttribute.SPARSE_MAT_POINTER) == 0
    assert matmul.get(cusparselt.MatmulAttribute.ACTIVATION_GELU_SCALING) == 0.5
    selection.set(cusparselt.AlgAttribute.SPLIT_K_MODE, cusparselt.SplitKMode.TWO_KERNELS)
    assert selection.get(cusparselt.AlgAttribute.SPLIT_K_MODE) == 2
    widths = {
        (name, arguments[2]): arguments[4]
        for name, arguments in dll.calls
        if name.endswith("SetAttribute")
    }
    assert widths == {
        ("cusparseLtMatDescSetAttribute", 1): 8,
        ("cusparseLtMatmulDescSetAttribute", 5): 4,
        ("cusparseLtMatmulDescSetAttribute", 8): 8,
        ("cusparseLtMatmulDescSetAttribute", 4): 4,
        ("cusparseLtMatmulAlgSetAttribute", 4): 4,
    }
    # Each call has the handle and the object, in this order.
    for name, arguments in dll.calls:
        if name.endswith("SetAttribute"):
            assert arguments[0] == parts["handle"].address
            assert arguments[1] in {part.address for part in (a, matmul, selection)}


def test_objects_are_made_from_each_other() -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    at = {name: part.address for name, part in parts.items()}
    assert dll.arguments("cusparseLtStructuredDescriptorInit") == (
        *(at["handle"], at["a"], 64, 32, 64, 16),
        *(DataType.I8, cusparselt.Order.COL, cusparselt.Sparsity.HALF),
    )
    assert dll.arguments("cusparseLtMatmulDescriptorInit") == (
        *(at["handle"], at["matmul"], 1, 0),
        *(at["a"], at["b"], at["d"], at["d"], cusparselt.Compute.I32),
    )
    assert dll.arguments("cusparseLtMatmulAlgSelectionInit") == (
        *(at["handle"], at["selection"], at["matmul"]),
        cusparselt.MatmulAlg.DEFAULT,
    )
    assert dll.arguments("cusparseLtMatmulPlanInit") == (
        *(at["handle"], at["plan"], at["matmul"], at["selection"]),
    )


def test_the_other_calls_of_cusparselt() -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    handle, a, matmul, plan = (parts[name].address for name in ("handle", "a", "matmul", "plan"))
    assert parts["plan"].workspace_bytes() == 4096
    assert parts["plan"].compressed_size() == (5000, 6000)
    assert parts["a"].compressed_size() == (5000, 6000)
    parts["plan"].compress(1, 2, 3, 4)
    assert dll.arguments("cusparseLtSpMMACompress") == (handle, plan, 1, 2, 3, 4)
    parts["a"].compress(1, 2, 3, 4, operation=cusparselt.Operation.T)
    assert dll.arguments("cusparseLtSpMMACompress2") == (handle, a, 1, 1, 1, 2, 3, 4)
    parts["matmul"].prune(1, 2, 3)
    assert dll.arguments("cusparseLtSpMMAPrune") == (handle, matmul, 1, 2, 1, 3)
    parts["matmul"].prune_check(1, 2, 3)
    assert dll.arguments("cusparseLtSpMMAPruneCheck") == (handle, matmul, 1, 2, 3)


@pytest.mark.parametrize("name", ["matmul", "search"])
def test_a_product_gets_its_pointers_and_its_stream(name: str) -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    function = {"matmul": "cusparseLtMatmul", "search": "cusparseLtMatmulSearch"}[name]
    streams: list[int | None] = []
    dll.during[function] = lambda *got: streams.append(ctypes.c_void_p.from_address(got[9]).value)
    run = getattr(parts["plan"], name)
    for stream in (0xABC, 0, 0xDEF):
        run(*POINTERS, stream)
    assert streams == [0xABC, None, 0xDEF]
    for called, arguments in dll.calls:
        if called == function:
            at = (parts["handle"].address, parts["plan"].address)
            assert arguments[:9] == (*at, *POINTERS)
            assert arguments[10] == 1
    dll.statuses[function] = 6
    with pytest.raises(LibraryError, match=r"alpha=0x10, a=0x20.*EXECUTION_FAILED") as caught:
        run(*POINTERS, 0xABC)
    assert caught.value.function == function


def test_a_dense_product_gets_everything_in_order() -> None:
    lib, dll = fake(CublasLt)
    product = dense_matmul(lib)
    product.run(1, 2, 3, 4, 5, 6, 7, 8, 9)
    got = dll.arguments("cublasLtMatmul")
    layouts = got[4], got[6], got[9], got[11]
    assert got[:4] == (product.handle.address, product.matmul.address, 1, 2)
    assert (got[5], got[7], got[8], got[10]) == (3, 4, 5, 6)
    assert len({*layouts, *got[:2]}) == 6
    assert ctypes.string_at(got[12], 64) == bytes(range(64))
    assert got[13:] == (7, 8, 9)
    dll.statuses["cublasLtMatmul"] = 15
    with pytest.raises(LibraryError, match=r"workspace_bytes=8, stream=0x9.*NOT_SUPPORTED"):
        product.run(1, 2, 3, 4, 5, 6, 7, 8, 9)
    product.close()
    with pytest.raises(PlanClosed, match=r"cublaslt\.Matmul"):
        product.run(1, 2, 3, 4, 5, 6, 7, 8, 9)


def test_a_pointer_that_stays_is_set_once() -> None:
    lib, dll = fake(CublasLt)
    matmul = cublaslt.MatmulDescriptor(lib, cublaslt.Compute.F32, DataType.F32)
    key = cublaslt.MatmulAttribute.B_SCALE_POINTER
    for address in (0x100, 0x100, 0x200, 0x200):
        matmul.point(key, address)
        assert matmul.get(key) == address
    matmul.set(key, 0x300)
    matmul.point(key, 0x200)
    assert matmul.get(key) == 0x200
    assert dll.names().count("cublasLtMatmulDescSetAttribute") == 4


def test_heuristic_keeps_what_can_run() -> None:
    lib, dll = fake(CublasLt)
    product = dense_matmul(lib)
    layouts = cublaslt.Layouts(
        *(cublaslt.MatrixLayout(lib, DataType.I8, 64, 32, 64) for _ in range(4))
    )
    preference = cublaslt.Preference(lib)

    def answer(*arguments: Any) -> None:
        rows = (cublaslt.HeuristicResult * 4).from_address(arguments[8])
        for place, state in enumerate((0, 15, 0)):
            rows[place].algorithm[0] = place + 1
            rows[place].workspace_bytes = 1000 + place
            rows[place].state = state
            rows[place].waves = 0.5 * place
        ctypes.c_int.from_address(arguments[9]).value = 3

    name = "cublasLtMatmulAlgoGetHeuristic"
    dll.during[name] = answer
    found = cublaslt.heuristic(product.handle, product.matmul, layouts, preference, count=4)
    assert [(row.algorithm[0], row.workspace_bytes, row.waves) for row in found] == [
        (1, 1000, 0.0),
        (3, 1002, 1.0),
    ]
    assert all(len(row.algorithm) == cublaslt.ALGORITHM_BYTES for row in found)
    got = dll.arguments(name)
    addresses = [part.address for part in (product.handle, product.matmul, *layouts, preference)]
    assert list(got[:8]) == [*addresses, 4]
    dll.statuses[name] = 15
    assert cublaslt.heuristic(product.handle, product.matmul, layouts, preference) == []
    dll.statuses[name] = 7
    with pytest.raises(LibraryError, match="INVALID_VALUE"):
        cublaslt.heuristic(product.handle, product.matmul, layouts, preference)


def test_a_stored_algorithm_is_checked() -> None:
    lib, dll = fake(CublasLt)
    product = dense_matmul(lib)
    layouts = cublaslt.Layouts(
        *(cublaslt.MatrixLayout(lib, DataType.I8, 64, 32, 64) for _ in range(4))
    )
    stored = bytes(reversed(range(64)))

    def answer(*arguments: Any) -> None:
        assert ctypes.string_at(arguments[6], 64) == stored
        result = cublaslt.HeuristicResult.from_address(arguments[7])
        result.workspace_bytes, result.waves = 77, 2.0

    dll.during["cublasLtMatmulAlgoCheck"] = answer
    found = cublaslt.check(product.handle, product.matmul, layouts, stored)
    assert found == cublaslt.Candidate(stored, 77, 2.0)
    dll.statuses["cublasLtMatmulAlgoCheck"] = 15
    with pytest.raises(LibraryError, match=r"cublasLtMatmulAlgoCheck.*NOT_SUPPORTED"):
        cublaslt.check(product.handle, product.matmul, layouts, stored)
    with pytest.raises(FormatError, match="has 64 bytes, this one has 63"):
        cublaslt.check(product.handle, product.matmul, layouts, stored[1:])
