"""Emptying the level-2 cache, on a GPU of which only the book-keeping is there."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_cuda import FakeKernels
from fake_gpu import Gpu, Memory

from slidesparse_rt.backends import cold
from slidesparse_rt.dtypes import operand
from slidesparse_rt.errors import DeviceMemoryError
from slidesparse_rt.kernels import catalog

STREAM = 7


@pytest.fixture
def kernels(monkeypatch: pytest.MonkeyPatch) -> FakeKernels:
    made = FakeKernels()
    made.cuda.layout = cold._ARGUMENTS
    monkeypatch.setattr(cold, "kernels_of", lambda index: {0: made}[index])
    monkeypatch.setattr(Memory, "held", set())
    return made


def test_as_much_is_read_as_the_cache_holds_twice(kernels: FakeKernels) -> None:
    gpu: Any = Gpu()
    with cold.cold_cache(gpu) as empty:
        (memory,) = Memory.held
        assert kernels.cuda.launches == []
        empty(STREAM)
        empty(STREAM + 1)
    assert Memory.held == set()
    assert kernels.loaded == [(catalog.evict(), 0)]
    first, second = kernels.cuda.launches
    assert first["values"] == second["values"] == [memory, 2 * gpu.l2_bytes // 16]
    assert (first["stream"], second["stream"]) == (STREAM, STREAM + 1)


def test_its_memory_is_given_back_where_something_fails(kernels: FakeKernels) -> None:
    gpu: Any = Gpu()
    with pytest.raises(KeyError, match="something"), cold.cold_cache(gpu):
        raise KeyError("something")
    assert Memory.held == set()

    def none(nbytes: int) -> Memory:
        raise DeviceMemoryError(f"no {nbytes} bytes left")

    gpu.allocate = none
    with pytest.raises(DeviceMemoryError, match="bytes left"), cold.cold_cache(gpu):
        raise AssertionError("there is nothing to empty it with")


@pytest.mark.parametrize(
    ("tokens", "nbytes", "most", "expected"),
    [
        (1, cold.COLD_BYTES, cold.COLD_TOKENS, True),
        (cold.COLD_TOKENS, cold.COLD_BYTES, cold.COLD_TOKENS, True),
        (cold.COLD_TOKENS + 1, 1 << 30, cold.COLD_TOKENS, False),
        (1, cold.COLD_BYTES - 1, cold.COLD_TOKENS, False),
        (1, 1 << 30, 0, False),
        (33, 1 << 30, 32, False),
    ],
)
def test_which_products_find_their_weight_in_memory(
    tokens: int, nbytes: int, most: int, expected: bool
) -> None:
    for name, size in (("int8", 1), ("bf16", 2)):
        weight: Any = SimpleNamespace(n=4, k=nbytes // (4 * size), operand=operand(name))
        assert cold.is_cold(weight, tokens, most) == expected
