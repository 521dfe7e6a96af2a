"""Launches with their arguments in place are those of the launchers that pack them each time."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from fake_machine import Kernels

import slidesparse_rt as ss
from slidesparse_rt.errors import LibraryError
from slidesparse_rt.kernels import catalog, launch
from slidesparse_rt.kernels.fixed import FixedLaunch, argument_offsets
from slidesparse_rt.pattern import Pattern

SIX_OF_EIGHT = Pattern.parse("6:8")


@pytest.fixture
def kernels() -> Kernels:
    return Kernels()


def last(kernels: Kernels) -> dict[str, Any]:
    return {key: value for key, value in kernels.cuda.launches[-1].items() if key != "attributes"}


@pytest.mark.parametrize(("columns", "blocks"), [(1024, None), (1024, 2), (1001, None)])
def test_quantize(kernels: Kernels, columns: int, blocks: int | None) -> None:
    any_kernels: Any = kernels
    made = launch.Quantizer(
        any_kernels, columns, "bfloat16", "int8", SIX_OF_EIGHT, 1536, blocks_per_sm=blocks
    )
    fixed = made.fixed(8192, 12288, 2999, 3008, 0xABC0)
    calls = itertools.product((4096, 4098, 4104, 4096), (columns, columns + 1, -columns), (77, 0))
    functions = set()
    for x, stride, stream in calls:
        fixed.launch(x, stride, stream)
        found = last(kernels)
        made(x, stride, 8192, 12288, 2999, 3008, stream, 0xABC0, 0)
        assert found == last(kernels)
        assert found["values"][:2] == [x, 2 * stride]
        functions.add(found["function"])
    assert len(functions) == (2 if columns == 1024 else 1)
    kernels.cuda.status = 700
    with pytest.raises(LibraryError, match="cuLaunchKernelEx returned 700"):
        fixed.launch(4096, columns, 5)


def test_an_aimed_launch_can_be_repeated(kernels: Kernels) -> None:
    any_kernels: Any = kernels
    made = launch.Quantizer(any_kernels, 1024, "bfloat16", "int8", SIX_OF_EIGHT, 1536)
    fixed = made.fixed(8192, 12288, 2999, 3008)
    run = fixed.aim(4096, 1024, 5)
    assert kernels.cuda.launches == []
    for _ in range(2):
        assert run() == 0
        assert (last(kernels)["values"][:2], last(kernels)["stream"]) == ([4096, 2048], 5)
    fixed.aim(4112, 1032, 6)()
    assert (last(kernels)["values"][:2], last(kernels)["stream"]) == ([4112, 2064], 6)
    kernels.cuda.status = 2
    assert run() == 2
    assert isinstance(fixed.error(2), ss.DeviceMemoryError)


def test_a_stride_that_was_set_in_part_is_set_again(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control-C between the two launches of a quantization."""
    any_kernels: Any = kernels
    made = launch.Quantizer(any_kernels, 64, "bfloat16", "int8", SIX_OF_EIGHT, 96)
    fixed = made.fixed(8192, 12288, 3, 3, 0)
    fixed.launch(4096, 64, 5)

    def interrupted(self: FixedLaunch, argument: int, value: int) -> None:
        set_argument(self, argument, value)
        raise KeyboardInterrupt

    set_argument = FixedLaunch.set_argument
    with monkeypatch.context() as patch:
        patch.setattr(FixedLaunch, "set_argument", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fixed.launch(4096, 128, 5)
    fixed.launch(4096, 64, 5)
    assert last(kernels)["values"][:2] == [4096, 128]  # bytes


@pytest.mark.parametrize("acc", [8192, 8196])
def test_dequantize(kernels: Kernels, acc: int) -> None:
    any_kernels: Any = kernels
    made = launch.Dequantizer(any_kernels, 1000, "int32", "bfloat16")
    fixed = made.fixed(acc, 1024, 3, 4, 5, 77)
    functions = set()
    for out, stride, stream in itertools.product((4096, 4098, 4096), (1000, 1001), (9, 0)):
        fixed.launch(out, stride, stream)
        found = last(kernels)
        made(acc, 1024, out, stride, 3, 4, 5, 77, stream)
        assert found == last(kernels)
        assert found["values"] == [acc, 1024, out, stride, 3, 4, 5, 77, 1000, found["values"][-1]]
        functions.add(found["function"])
    assert len(functions) == (2 if acc == 8192 else 1)
    kernels.cuda.status = 700
    with pytest.raises(LibraryError, match="cuLaunchKernelEx returned 700"):
        fixed.launch(4096, 1000, 5)


def test_arguments_of_any_size_can_change(kernels: Kernels) -> None:
    layout = launch.QUANTIZE_ARGUMENTS
    kernel = kernels.load(
        catalog.quantize_lift("bfloat16", "int8", SIX_OF_EIGHT, access=16, vectors=1, threads=32)
    )
    values = list(range(1, len(layout) + 1))
    cuda: Any = kernels.cuda
    made = FixedLaunch(cuda, kernel, layout, (3, 64, 1, 2048), values)
    assert made.run() == 0
    assert last(kernels)["values"] == values
    for index, value in ((0, 2**64 - 1), (1, -5), (6, -7), (11, 2**31 - 1)):
        made.set_argument(index, value)
        values[index] = value
    made.words[2] = 99
    values[2] = 99
    made.set_stream(2**63 + 5)
    assert made.run() == 0
    found = last(kernels)
    assert found["values"] == values
    assert [found[key] for key in ("blocks", "threads", "shared")] == [3, 64, 2048]
    assert found["stream"] == made.stream == 2**63 + 5
    assert kernels.cuda.launches[-1]["attributes"] == []
    assert argument_offsets("iQi") == [0, 8, 16]
