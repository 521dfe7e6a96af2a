"""Operands on which products are timed; no GPU is needed."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import Gpu, Memory, cold_cache

from slidesparse_rt.backends import cold, trial
from slidesparse_rt.backends.workspace import COUNTER_BYTES
from slidesparse_rt.dtypes import operand
from slidesparse_rt.errors import CompileError, DeviceMemoryError, LibraryError

STREAM, OTHER = 77, 88
N, K, ROW_LENGTH = 100, 200, 320


class Sized(Gpu):
    """Notes what each piece of memory is for, in order, and can run out of it."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []
        self.most = 100

    def allocate(self, nbytes: int) -> Memory:
        if len(self.sizes) == self.most:
            raise DeviceMemoryError("no bytes left")
        self.sizes.append(nbytes)
        return super().allocate(nbytes)

    def filled(self, nbytes: int, *arguments: Any) -> Memory:
        self.done.append(("filled", arguments[0].name))
        return self.allocate(nbytes)

    def upload(self, values: Any, stream: int) -> Memory:
        self.done.append(("upload", values.copy()))
        return self.allocate(values.nbytes)


class Product:
    """Notes what it multiplies."""

    def __init__(self, log: list[Any], name: str, scratch_bytes: int, rows_read: int) -> None:
        self.log, self.name = log, name
        self.scratch_bytes, self.rows_read = scratch_bytes, rows_read

    def launch(self, *arguments: int) -> None:
        self.log.append((self.name, arguments))


class Prepared(SimpleNamespace):
    """A weight of N channels whose rows of tokens are padded, in groups of 16."""

    def __init__(self, dtype: str = "int8", x_scale: int = 0) -> None:
        super().__init__(
            device=Sized(),
            weight=SimpleNamespace(n=N, k=K, operand=operand(dtype), x_scale=x_scale),
            row_length=ROW_LENGTH,
            padded_n=112,
            token_multiple=16,
            log=[],
            refuses=None,
        )
        self.products = [Product(self.log, "a", 500, 70), Product(self.log, "b", 0, 0)]

    def quantizer(self, kind: Any, stream: int) -> Any:
        if self.refuses:
            raise self.refuses
        assert (kind.name, stream) == ("bfloat16", STREAM)
        return lambda *arguments: self.log.append(("quantize", arguments))

    def trial(self, tokens: int) -> Any:
        made: Any = self
        return trial.trial(made, made.products, tokens, 4, STREAM)


@pytest.fixture(autouse=True)
def nothing_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Memory, "held", set())
    monkeypatch.setattr(trial, "cold_cache", cold_cache)
    monkeypatch.setattr(cold, "COLD_BYTES", N * K)


@pytest.mark.parametrize(("dtype", "size"), [("int8", 1), ("bf16", 2)])
def test_few_tokens_are_quantized_before_each_product(dtype: str, size: int) -> None:
    made = Prepared(dtype)
    with made.trial(50) as (runs, empty):
        for run in (*runs, runs[0]):
            run(OTHER)
        assert len(Memory.held) == 7
        empty(OTHER)
    assert Memory.held == set()
    # Quantized tokens with the rows that are read after them, scales, results, scratch, counters;
    # inputs; what empties the cache.
    assert made.device.sizes[:6] == [
        *(70 * ROW_LENGTH * size, 64 * 4, 64 * 112 * 4, 500, COUNTER_BYTES),
        50 * K * 2,
    ]
    assert ("emptied", OTHER) in made.device.done
    assert [entry[1] for entry in made.device.done if entry[0] == "filled"] == [dtype, "bf16"]
    ones, zeros = (entry[1] for entry in made.device.done if entry[0] == "upload")
    assert ones.tolist() == [1.0] * 64
    assert not zeros.any()
    names, given = zip(*made.log, strict=True)
    assert names == ("quantize", "a", "quantize", "b", "quantize", "a")
    first, product = given[:2]
    assert given[2::2] == (first, first)
    assert given[3::2] == (product, product)
    inputs, stride, x, scales, *others = first
    assert inputs
    assert stride == K
    assert others == [50, 64, OTHER, 0]
    assert product[:2] == (x, scales)
    assert product[3] == 112
    assert product[6] == OTHER
    assert len({inputs, *product[:3], *product[4:6]}) == 6


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_one_scale_for_all_tokens_is_one_that_fits_the_inputs(dtype: str) -> None:
    """The plan's own may make zeros of them, which would flatter, or cut them off."""
    made = Prepared(dtype, x_scale=0x500)
    with made.trial(50) as (runs, _):
        runs[0](OTHER)
        assert len(Memory.held) == 8
    (_, quantized), _ = made.log
    assert quantized[-1] not in (0, 0x500)
    given = [done[1] for done in made.device.done if done[0] == "upload"][-1]
    assert given.dtype == np.float32
    row = operand(dtype)
    assert row.q_max is not None
    values = np.random.default_rng(0).standard_normal(1 << 16) / given
    assert (np.abs(values) < 1).mean() < 0.05
    assert (np.abs(values) > row.q_max).mean() < 0.001
    assert Memory.held == set()


def test_rows_are_those_of_the_tokens_where_none_are_read_after_them() -> None:
    made = Prepared()
    made.products = made.products[1:]
    with made.trial(50) as (runs, _):
        runs[0](OTHER)
    assert made.device.sizes[0] == 64 * ROW_LENGTH
    assert made.device.sizes[3] == 0


def test_many_tokens_are_multiplied_alone_and_warm() -> None:
    made = Prepared()
    with made.trial(cold.COLD_TOKENS + 1) as (runs, empty):
        runs[1](OTHER)
        assert len(Memory.held) == 5
    assert empty is None
    assert [name for name, _ in made.log] == ["b"]
    assert Memory.held == set()


def test_small_weights_stay_in_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cold, "COLD_BYTES", N * K + 1)
    made = Prepared()
    with made.trial(16) as (runs, empty):
        runs[0](OTHER)
    assert empty is None
    assert [name for name, _ in made.log] == ["quantize", "a"]


@pytest.mark.parametrize("most", range(7))
def test_memory_is_given_back_where_there_is_not_enough(most: int) -> None:
    made = Prepared()
    made.device.most = most
    with pytest.raises(DeviceMemoryError, match="no bytes left"), made.trial(16):
        pass
    assert Memory.held == set()


@pytest.mark.parametrize("error", [CompileError("no"), LibraryError("no")])
def test_memory_is_given_back_where_no_quantize_kernel_is(error: Exception) -> None:
    made = Prepared()
    made.refuses = error
    with pytest.raises(type(error), match="no"), made.trial(16):
        pass
    assert Memory.held == set()
