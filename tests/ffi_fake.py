"""A library made of ctypes callbacks, for the tests of the bindings.

Everything up to the C call is the real thing; the callbacks record what they are called with.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import textwrap
from typing import Any

from slidesparse_rt.ffi import cublaslt, cusparselt, handles
from slidesparse_rt.ffi.checked import CLibrary, DataType
from slidesparse_rt.ffi.cublaslt import CublasLt
from slidesparse_rt.ffi.cusparselt import CuSparseLt
from slidesparse_rt.ffi.libraries import Loaded
from slidesparse_rt.ffi.libraries import library as table_row

BINDINGS: dict[str, type[CLibrary]] = {"cusparseLt": CuSparseLt, "cublasLt": CublasLt}


class FakeDll:
    """Looks like a ctypes.CDLL: its functions are callbacks that record their arguments."""

    def __init__(self, kind: type[CLibrary], *, lacks: tuple[str, ...] = ()) -> None:
        self.kind = kind
        self.lacks = lacks
        self.calls: list[tuple[str, tuple[Any, ...]]] = []
        self.statuses: dict[str, int] = {}
        self.during: dict[str, Any] = {}
        self.next_address = 0x1000
        self.cells: dict[tuple[int, int], bytes] = {}

    def __getitem__(self, name: str) -> Any:
        if name in self.lacks or name not in self.kind.FUNCTIONS:
            raise AttributeError(name)
        function = self.kind.FUNCTIONS[name]
        if function.returns is not None:
            return lambda *_: b"words" if function.returns is ctypes.c_char_p else 130000

        def body(*arguments: Any) -> int:
            self.calls.append((name, arguments))
            if name in self.during:
                self.during[name](*arguments)
            status = self.statuses.get(name, 0)
            if status == 0:
                self.act(name, arguments)
            return status

        return ctypes.CFUNCTYPE(ctypes.c_int, *function.arguments.values())(body)

    def act(self, name: str, arguments: tuple[Any, ...]) -> None:
        """What the real functions write."""
        if name.startswith("cublasLt") and name.endswith("Create"):
            self.next_address += 0x100
            ctypes.c_void_p.from_address(arguments[0]).value = self.next_address
        elif name.endswith("SetAttribute"):
            *_, owner, attribute, data, size = arguments
            self.cells[owner, attribute] = ctypes.string_at(data, size)
        elif name.endswith("GetAttribute"):
            place = 1 if name.startswith("cusparseLt") else 0
            owner, attribute, data, size = arguments[place : place + 4]
            stored = self.cells.get((owner, attribute), bytes(size))
            assert len(stored) == size
            ctypes.memmove(data, stored, size)
        elif name == "cusparseLtMatmulGetWorkspace":
            ctypes.c_size_t.from_address(arguments[2]).value = 4096
        elif "CompressedSize" in name:
            ctypes.c_size_t.from_address(arguments[2]).value = 5000
            ctypes.c_size_t.from_address(arguments[3]).value = 6000

    def names(self) -> list[str]:
        return [name for name, _ in self.calls]

    def arguments(self, name: str) -> tuple[Any, ...]:
        """The arguments of the only call of ``name``."""
        (found,) = [arguments for called, arguments in self.calls if called == name]
        return found

    def destroyed(self) -> list[tuple[str, int]]:
        return [(name, arguments[0]) for name, arguments in self.calls if name.endswith("Destroy")]


def fake(kind: type[CLibrary], **options: Any) -> tuple[Any, FakeDll]:
    dll = FakeDll(kind, **options)
    name = next(name for name, binding in BINDINGS.items() if binding is kind)
    version = (0, 8, 1) if kind is CuSparseLt else (12, 9, 1)
    return kind(Loaded(table_row(name), dll, "/fake/lib.so", "this test", version)), dll


def sparse_parts(lib: CuSparseLt, device: int = 0) -> dict[str, Any]:
    """Every kind of object that a cuSPARSELt plan needs."""
    handle = cusparselt.Handle(device, lib=lib)
    a = cusparselt.MatDescriptor(handle, 64, 32, 64, DataType.I8, structured=True)
    b = cusparselt.MatDescriptor(handle, 64, 16, 64, DataType.I8)
    d = cusparselt.MatDescriptor(handle, 32, 16, 32, DataType.I32)
    matmul = cusparselt.MatmulDescriptor(
        (cusparselt.Operation.T, cusparselt.Operation.N), (a, b, d, d), cusparselt.Compute.I32
    )
    selection = cusparselt.AlgSelection(matmul)
    plan = cusparselt.MatmulPlan(selection)
    return {
        "handle": handle,
        "a": a,
        "b": b,
        "d": d,
        "matmul": matmul,
        "selection": selection,
        "plan": plan,
    }


POINTERS = (0x10, 0x20, 0x30, 0x40, 0x50, 0x60, 0x70)


def dense_matmul(lib: CublasLt) -> cublaslt.Matmul:
    handle = cublaslt.Handle(0, lib=lib)
    layouts = cublaslt.Layouts(
        *(cublaslt.MatrixLayout(lib, DataType.I8, 64, 32, 64) for _ in range(4))
    )
    matmul = cublaslt.MatmulDescriptor(lib, cublaslt.Compute.I32, DataType.I32)
    candidate = cublaslt.Candidate(bytes(range(64)), 1 << 20, 1.5)
    return cublaslt.Matmul(handle, matmul, layouts, candidate)


def python(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run ``code`` in a new interpreter; it must end well."""
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, **environment},
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    return ran


def fake_pool() -> tuple[handles.HandlePool, FakeDll, FakeDll]:
    sparse, sparse_dll = fake(CuSparseLt)
    dense, dense_dll = fake(CublasLt)
    return handles.HandlePool(sparse=sparse, dense=dense), sparse_dll, dense_dll
