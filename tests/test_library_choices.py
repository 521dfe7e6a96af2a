"""How the libraries' backends choose algorithms by token bucket; stand-ins for the libraries."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace
from typing import Any

import pytest

from slidesparse_rt.backends import cusparselt, dense
from slidesparse_rt.backends.buckets import TOKEN_BUCKETS
from slidesparse_rt.dtypes import array_type
from slidesparse_rt.errors import DeviceMemoryError, LibraryError

HANDLE: Any = SimpleNamespace(library=SimpleNamespace(version=130100))
BF16 = array_type("bfloat16")


class Product:
    """Stands for a product: what is multiplied, and whether it was chosen."""

    def __init__(self, made: Any, matmul: Any, *, direct: bool, scaled: bool) -> None:
        assert not scaled or direct
        self.matmul, self.direct = matmul, direct
        self.chosen = True


def found(made: Any, tokens: int, direct: Any) -> Any:
    """The product for so many tokens: its call, and whether it was chosen."""
    product = made._found(HANDLE, tokens, direct, 0)
    if product is None:
        return None
    assert product.direct == (direct is not None)
    return product.matmul, product.chosen


class Library:
    """Stands for cuBLASLt: algorithms are named by the tokens that they were proposed for."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.timed: list[int] = []
        self.proposes, self.refuses = True, False
        self.broken: Exception | None = None
        monkeypatch.setattr(dense.DensePrepared, "_described", lambda _, handle, m, direct: (m, m))
        monkeypatch.setattr(dense.DensePrepared, "_candidates", self._candidates)
        monkeypatch.setattr(dense, "trial", self._trial)
        monkeypatch.setattr(dense, "fastest", self._fastest)
        monkeypatch.setattr(dense, "check", self._check)
        monkeypatch.setattr(dense, "Matmul", lambda handle, m, layouts, found: (m, found.algorithm))
        monkeypatch.setattr(dense, "_Product", Product)

    def _candidates(self, handle: Any, m: int, layouts: int) -> list[Any]:
        names = [b"first of %d" % m, b"best of %d" % m]
        return [SimpleNamespace(algorithm=name) for name in names] if self.proposes else []

    @contextlib.contextmanager
    def _trial(self, made: Any, products: Any, tokens: int, width: int, stream: int) -> Any:
        if self.broken:
            raise self.broken
        assert [product.matmul for product in products] == [
            (tokens, b"%s of %d" % (place, tokens)) for place in (b"first", b"best")
        ]
        assert width == (2 if products[0].direct else 4)
        self.timed.append(tokens)
        yield ["first", "best"], "empties"

    def _fastest(self, runs: Any, stream: int, *, before: Any) -> int:
        assert (runs, before) == (["first", "best"], "empties")
        return 1

    def _check(self, handle: Any, m: int, layouts: int, algorithm: bytes) -> Any:
        if self.refuses:
            raise LibraryError("not for so many")
        return SimpleNamespace(algorithm=algorithm)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    return Library(monkeypatch)


def prepared() -> Any:
    made: Any = object.__new__(dense.DensePrepared)
    made.device = SimpleNamespace(lock=threading.RLock(), choices={})
    made.padded_n, made.row_length, made.token_multiple = 64, 128, 16
    made._fuses = True
    made.weight = SimpleNamespace(operand=SimpleNamespace(name="int8"), bias=0, k=120, x_scale=0)
    return made


def test_dense_times_its_algorithms_for_the_bucket_whatever_comes_first(library: Library) -> None:
    made = prepared()
    for tokens in (520, 768, 700):
        assert found(made, tokens, BF16) == ((tokens, b"best of 768"), True)
    assert library.timed == [768]
    # Sums without a type of results are other products, and so are those of another weight.
    assert found(made, 768, None) == ((768, b"best of 768"), True)
    assert found(made, 769, BF16) == ((769, b"best of 1024"), True)
    made.weight.k = 121
    assert found(made, 769, BF16) == ((769, b"best of 1024"), True)
    made.weight.x_scale = 0x500
    assert found(made, 769, BF16) == ((769, b"best of 1024"), True)
    assert library.timed == [768, 768, 1024, 1024, 1024]
    assert found(made, 10**6, BF16) == (
        (10**6, b"best of %d" % TOKEN_BUCKETS[-1]),
        True,
    )


def test_dense_takes_the_favourite_where_the_choice_does_not_run(library: Library) -> None:
    made = prepared()
    library.refuses = True
    assert found(made, 700, BF16) == ((700, b"first of 700"), True)
    library.refuses = False
    assert found(made, 700, BF16) == ((700, b"best of 768"), True)


def test_dense_goes_on_where_there_is_no_memory_for_timing(library: Library) -> None:
    made = prepared()
    library.broken = DeviceMemoryError("no bytes left")
    assert found(made, 700, BF16) == ((700, b"first of 700"), False)
    assert made.device.choices == {}  # timed the next time
    library.broken = None
    assert found(made, 700, BF16) == ((700, b"best of 768"), True)


def test_dense_goes_on_where_nothing_runs_for_the_bucket(library: Library) -> None:
    library.broken = LibraryError("not for so many")
    assert found(prepared(), 700, BF16) == ((700, b"first of 700"), True)


def test_dense_says_where_the_library_has_nothing(library: Library) -> None:
    library.proposes = False
    assert found(prepared(), 700, BF16) is None
    assert library.timed == []


def test_cusparselt_goes_on_where_there_is_no_memory_for_its_search(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    made: Any = object.__new__(cusparselt.CusparseltPrepared)
    made.token_multiple = 32
    asked: list[int] = []
    full = True

    def choice(handle: Any, bucket: int, stream: int) -> str:
        asked.append(bucket)
        if full:
            raise DeviceMemoryError("no bytes left")
        return "found"

    monkeypatch.setattr(made, "_handle", lambda: HANDLE)
    monkeypatch.setattr(made, "_choice", choice)
    plans: list[Any] = []

    def plan(handle: Any, padded: int, chosen: Any) -> Any:
        plans.append((padded, chosen))
        return SimpleNamespace(workspace_bytes=lambda: 0)

    monkeypatch.setattr(made, "_plan", plan)
    monkeypatch.setattr(cusparselt, "_Product", lambda *arguments: SimpleNamespace())
    assert not made.make_product(700, None, 0).chosen
    full = False
    assert made.make_product(700, None, 0).chosen
    assert plans == [(704, None), (704, "found")]
    assert asked == [768, 768]
