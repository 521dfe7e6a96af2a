"""Compiled kernels are loaded, shared, launched and unloaded: a driver that only remembers."""

from __future__ import annotations

import ctypes
from types import SimpleNamespace

import pytest
from fake_cuda import CountingNvrtc, FakeCuda
from hopper_cases import spec_of

from slidesparse_rt.errors import (
    BackendUnavailable,
    DeviceMemoryError,
    LibraryError,
    PlanClosed,
)
from slidesparse_rt.ffi.libraries import load
from slidesparse_rt.kernels import catalog, launch, loader, weight_launch
from slidesparse_rt.kernels.compiler import Compiler, Nvrtc, read_source
from slidesparse_rt.kernels.hopper import HOPPER_PACK_ARGUMENTS
from slidesparse_rt.kernels.hopper_tiles import HopperConfig
from slidesparse_rt.kernels.loader import KernelCache
from slidesparse_rt.pattern import Pattern

SIX_OF_EIGHT = Pattern.parse("6:8")
WEIGHT = catalog.weights("check", "int8", SIX_OF_EIGHT)


@pytest.fixture(scope="module")
def nvrtc():
    return Nvrtc(load("nvrtc"))


@pytest.fixture
def cuda():
    return FakeCuda()


@pytest.fixture
def kernels(cuda, nvrtc):
    with KernelCache(3, Compiler(library=nvrtc), library=cuda) as made:
        yield made


def test_kernels_are_loaded_once_and_unloaded_on_close(kernels, cuda):
    assert kernels.limits == loader.DeviceLimits((9, 0), 132, 232448)
    first = kernels.load(WEIGHT)
    assert kernels.load(WEIGHT) is first
    assert first.resources.registers > 0
    assert len(cuda.modules) == 1
    # Another entry point of the same code is in the same module.
    kernels.load(catalog.weights("slide", "int8", SIX_OF_EIGHT))
    assert len(cuda.modules) == 1
    kernels.load(catalog.weights("check", "int8", Pattern.parse("4:6")))
    assert len(cuda.modules) == 2
    assert cuda.pushed == []
    assert kernels.occupancy(first, 256, 0) == 5
    assert cuda.retained == 1
    kernels.close()
    kernels.close()
    assert kernels.closed
    assert (cuda.modules, cuda.retained, cuda.pushed) == ({}, 0, [])
    for use in (
        lambda: kernels.load(WEIGHT),
        lambda: kernels.occupancy(first, 256, 0),
        lambda: kernels.current().__enter__(),
    ):
        with pytest.raises(PlanClosed, match="used after close"):
            use()


def test_the_mode_of_captures_is_relaxed_within_and_the_former_after(cuda):
    """So that what one thread loads does not spoil what another captures."""
    for former in (0, 1, 2):
        cuda.mode = former
        with loader.relaxed_capture(cuda):
            assert cuda.mode == 2
            with loader.relaxed_capture(cuda):
                assert cuda.mode == 2
            assert cuda.mode == 2
        assert cuda.mode == former
        with pytest.raises(ZeroDivisionError), loader.relaxed_capture(cuda):
            1 / 0  # noqa: B018
        assert cuda.mode == former
    cuda.mode = 0
    cuda.refuse["cuThreadExchangeStreamCaptureMode"] = 999
    with pytest.raises(LibraryError, match="cuThreadExchangeStreamCaptureMode returned 999"):
        loader.relaxed_capture(cuda).__enter__()


def test_loading_and_unloading_leave_the_mode_as_it_was(kernels, cuda):
    assert cuda.mode == 0
    kernels.load(WEIGHT)
    assert cuda.mode == 0
    cuda.refuse["cuModuleLoadData"] = 2
    with pytest.raises(DeviceMemoryError):
        kernels.load(catalog.weights("check", "int8", Pattern.parse("4:6")))
    assert cuda.mode == 0
    kernels.close()
    assert (cuda.mode, cuda.modules) == (0, {})


def test_the_device_of_a_stream(kernels, cuda):
    """The fake's contexts are 1000 + device; 2003 is another context on device 3."""
    cuda.streams = {0x30: 1003, 0x40: 1001, 0x50: 2003}
    assert [kernels.device_of_stream(stream) for stream in cuda.streams] == [3, 1, 3]
    assert [kernels.device_of_stream(stream) for stream in (0, 1, 2)] == [3, 3, 3]
    # All of the device, not a part of it.
    assert [kernels.owns(stream) for stream in (*cuda.streams, 0, 1, 2)] == [
        *(True, False, False),
        *(True, True, True),
    ]
    assert cuda.pushed == []


def test_shared_memory_of_a_kernel_is_only_ever_raised(kernels, cuda):
    spec = catalog.quantize_lift("bfloat16", "int8", SIX_OF_EIGHT)
    function = kernels.load(spec, shared_bytes=60_000).function
    kernels.load(spec, shared_bytes=100_000)
    kernels.load(spec, shared_bytes=50_000)
    assert cuda.shared == {function: 100_000}


def test_what_is_compiled_ahead_is_only_loaded_later(cuda):
    library = CountingNvrtc()
    exact = spec_of(HopperConfig(16, 1, 2, True), "int8", "bfloat16")
    with KernelCache(3, Compiler(library=library), library=cuda) as kernels:
        kernels.compile_ahead({WEIGHT, exact})
        assert (library.compiled, cuda.modules) == (2, {})
        kernels.load(WEIGHT)
        kernels.load(exact)
        assert library.compiled == 2
        assert len(cuda.modules) == 2


def test_a_dropped_cache_unloads_its_kernels(cuda, nvrtc):
    made = KernelCache(3, Compiler(library=nvrtc), library=cuda)
    made.load(WEIGHT)
    del made
    assert (cuda.modules, cuda.retained) == ({}, 0)


def test_errors_of_the_driver_carry_its_name_for_them(kernels, cuda):
    cuda.refuse["cuModuleLoadData"] = 2
    with pytest.raises(DeviceMemoryError, match=r"cuModuleLoadData returned 2 \(CUDA_ERROR_OUT_OF"):
        kernels.load(WEIGHT)
    assert cuda.pushed == []
    cuda.refuse = {"cuModuleGetFunction": 999}
    with pytest.raises(LibraryError, match=r"returned 999 \(unknown status\) \[a driver\]"):
        kernels.load(WEIGHT)
    cuda.refuse = {"cuModuleUnload": 4}
    kernels.close()  # at the end an error helps no one


def test_launchers_pack_their_arguments_and_pick_a_kernel(kernels):
    quantize = launch.Quantizer(kernels, 1024, "bfloat16", "int8", SIX_OF_EIGHT, 1536)
    seen = []
    quantize._launch = lambda *arguments: seen.append(("fast", *arguments))
    quantize._launch_any = lambda *arguments: seen.append(("any", *arguments))
    quantize(4096, 1024, 8192, 12288, 10_000, 10_016, 77)
    quantize(4096 + 2, 1024, 8192, 12288, 3, 3, 77)
    quantize(4096, 1025, 8192, 12288, 3, 3, 77)
    fast, odd_address, odd_stride = seen
    config = quantize.config
    assert config.rows == 4
    assert fast == (
        *("fast", 10_016 // 4, config.threads, 1, config.shared_bytes, 77),
        *(4096, 2048, 8192, 1536, 12288, 0, 0, 10_000, 10_016, 1024),
        *(config.stage_bytes, config.tile),
    )
    assert odd_address[:2] == odd_stride[:2] == ("any", 1)

    few = launch.Quantizer(kernels, 1024, "bfloat16", "int8", SIX_OF_EIGHT, 1536, blocks_per_sm=2)
    seen.clear()
    few._launch = lambda *arguments: seen.append(arguments)
    few(4096, 1024, 8192, 12288, 10_000, 10_016, 77)
    few(4096, 1024, 8192, 12288, 9, 9, 77)
    assert [blocks for blocks, *_ in seen] == [2 * 132, 3]

    packed = launch.Launch(kernels.cuda, quantize.kernel, launch.QUANTIZE_ARGUMENTS)
    calls = []
    packed._run = lambda *arguments: calls.append(arguments) or 0
    packed(9, 128, 1, 2048, 55, *range(1, 13))
    function, gx, gy, gz, bx, by, bz, shared, stream, addresses, extra = calls[0]
    assert (gx, gy, gz, bx, by, bz, shared, stream, extra) == (
        *(9, 1, 1, 128, 1, 1, 2048, 55),
        None,
    )
    assert function == quantize.kernel.function
    values = [
        (ctypes.c_int64 if code in "Qq" else ctypes.c_int32).from_address(address).value
        for code, address in zip(launch.QUANTIZE_ARGUMENTS, addresses, strict=True)
    ]
    assert values == list(range(1, 13))


def test_every_layout_matches_the_source():
    """struct codes against the parameter lists of the kernels themselves."""
    wanted = {
        "quantize_lift": ("quantize_lift.cu", launch.QUANTIZE_ARGUMENTS),
        "dequantize": ("dequantize.cu", launch.DEQUANTIZE_ARGUMENTS),
        **{name: ("weights.cu", codes) for name, codes in weight_launch.WEIGHT_ARGUMENTS.items()},
        "hopper_pack": ("hopper_pack.cu", HOPPER_PACK_ARGUMENTS),
    }
    for entry, (name, codes) in wanted.items():
        text = read_source(name).text
        start = text.index(f"{entry}(const", text.index("SS_KERNEL"))
        parameters = text[text.index("(", start) + 1 : text.index(") {", start)].split(",")
        kinds = "".join(
            "Q" if "*" in parameter else "q" if "i64" in parameter else "i"
            for parameter in parameters
        )
        assert kinds == codes, entry


def test_the_kernels_of_a_device_are_shared(monkeypatch, nvrtc):
    made = []

    def make(device, compiler):
        made.append(device)
        return SimpleNamespace(device=device)

    loader._shared.cache_clear()
    monkeypatch.setattr(loader, "KernelCache", make)
    try:
        assert loader.kernels_of(0) is loader.kernels_of(0)
        assert loader.kernels_of(1) is not loader.kernels_of(0)
        assert made == [0, 1]
    finally:
        loader._shared.cache_clear()


def test_the_functions_by_device_use_the_shared_kernels(monkeypatch, kernels):
    for module in (launch, weight_launch):
        monkeypatch.setattr(module, "kernels_of", lambda index: {3: kernels}[index])
    device = SimpleNamespace(index=3)
    float32, bfloat16 = (launch.array_type(name) for name in ("float32", "bfloat16"))
    int8 = launch.operand("int8")
    assert launch.quantizer(device, bfloat16, int8, SIX_OF_EIGHT, 64, 96).columns == 64
    assert launch.dequantizer(device, "int32", float32, 48).columns == 48
    assert weight_launch.weight_kernels(device, "int8", SIX_OF_EIGHT).FINDINGS_BYTES == 48


def test_without_a_driver_there_is_a_clear_error(monkeypatch):
    def missing(name):
        raise BackendUnavailable(f"{name} was not found")

    monkeypatch.setattr(loader, "load", missing)
    with pytest.raises(BackendUnavailable, match="cuda was not found"):
        KernelCache(0, Compiler())
