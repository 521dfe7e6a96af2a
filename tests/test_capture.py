"""What allocates, frees, searches or loads does it in CUDA's relaxed capture mode; stand-ins only.

PyTorch captures in the global mode, where an unsafe call of any thread spoils the capture.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import slidesparse_rt as ss
from slidesparse_rt import gpu_run
from slidesparse_rt.arrays import Device
from slidesparse_rt.backends import gpu_device, gpu_gemm
from slidesparse_rt.dtypes import array_type
from slidesparse_rt.kernels import loader


class Mode:
    """Stands for ``relaxed_capture`` and ``on_device``; knows what is in force."""

    def __init__(self) -> None:
        self.relaxed = 0
        self.devices = [0]

    @contextlib.contextmanager
    def relaxed_capture(self) -> Iterator[None]:
        self.relaxed += 1
        try:
            yield
        finally:
            self.relaxed -= 1

    @contextlib.contextmanager
    def on_device(self, index: int) -> Iterator[None]:
        self.devices.append(index)
        try:
            yield
        finally:
            self.devices.pop()

    @property
    def now(self) -> tuple[int, bool]:
        """The current device, and whether the thread is exempt."""
        return self.devices[-1], self.relaxed > 0


@pytest.fixture
def mode(monkeypatch: pytest.MonkeyPatch) -> Mode:
    made = Mode()
    monkeypatch.setattr(gpu_device, "relaxed_capture", made.relaxed_capture)
    monkeypatch.setattr(gpu_device, "on_device", made.on_device)
    monkeypatch.setattr(gpu_run, "relaxed_capture", made.relaxed_capture)
    return made


class Memory:
    """CuPy's: freed when it is dropped."""

    def __init__(self, mode: Mode, freed: list[tuple[int, bool]]) -> None:
        self.ptr = 0x1000
        self._mode, self._freed = mode, freed

    def __del__(self) -> None:
        self._freed.append(self._mode.now)


def test_memory_is_freed_on_its_device_and_exempt(mode: Mode) -> None:
    freed: list[tuple[int, bool]] = []
    closed = gpu_device.Buffer(Memory(mode, freed), 64, 3)
    closed.close()
    closed.close()
    assert (freed, closed.pointer, closed.nbytes) == ([(3, True)], 0, 0)
    with gpu_device.Buffer(Memory(mode, freed), 64, 2):
        assert len(freed) == 1
    dropped = gpu_device.Buffer(Memory(mode, freed), 64, 1)  # without close()
    del dropped
    assert freed == [(3, True), (2, True), (1, True)]
    assert mode.now == (0, False)


def test_nothing_is_freed_when_the_process_ends(mode: Mode) -> None:
    freed: list[tuple[int, bool]] = []
    buffer = gpu_device.Buffer(Memory(mode, freed), 64, 1)
    buffer.__del__(is_finalizing=lambda: True)
    assert (freed, buffer.nbytes) == ([], 64)


def test_allocating_and_copying_are_exempt(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, tuple[int, bool]]] = []

    def note(name: str) -> Any:
        return lambda *arguments: seen.append((name, mode.now))

    def memory(nbytes: int) -> Any:
        note("malloc")()
        return SimpleNamespace(ptr=0x1000)

    gpu: Any = object.__new__(gpu_device.GpuDevice)
    gpu.index = 1
    runtime = SimpleNamespace(
        CUDARuntimeError=RuntimeError, memcpyAsync=note("copy"), streamSynchronize=note("wait")
    )
    gpu._cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Memory=memory))
    monkeypatch.setitem(sys.modules, "cupy", gpu._cupy)
    values: Any = SimpleNamespace(nbytes=64, ctypes=SimpleNamespace(data=0x10))
    gpu.upload(values, 7)
    gpu.download(0x1000, values, 7)
    assert [name for name, _ in seen] == ["malloc", "copy", "wait", "copy", "wait"]
    assert {state for _, state in seen} == {(1, True)}


def test_what_a_launch_needs_is_made_exempt_and_once(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    import threading

    made: list[tuple[int, bool]] = []
    monkeypatch.setattr(gpu_gemm, "Step", lambda *arguments: made.append(mode.now) or object())
    keeper: Any = SimpleNamespace(
        _threads=threading.local(), device=SimpleNamespace(index=1), _evict=lambda cache: None
    )
    kind = array_type("bfloat16")
    steps = {gpu_gemm.GpuPrepared.step(keeper, 16, kind, kind, False, 0) for _ in range(3)}
    assert len(steps) == 1
    assert made == [(1, True)]
    assert mode.now == (0, False)


def test_packing_is_exempt(mode: Mode, monkeypatch: pytest.MonkeyPatch) -> None:
    packed: list[tuple[int, bool]] = []
    gpu = SimpleNamespace(index=1, packing_stream=5)
    monkeypatch.setattr(gpu_gemm, "gpu_device", lambda index: gpu)
    monkeypatch.setattr(
        gpu_gemm.GpuWeight,
        "from_sparse",
        lambda *arguments: packed.append(mode.now) or SimpleNamespace(close=lambda: None),
    )
    backend: Any = SimpleNamespace(pack=lambda *arguments: packed.append(mode.now))
    weight = ss.SparseWeight.from_array(torch.eye(8), "6:8")
    gpu_gemm.GpuBackend.prepare(backend, weight, None, Device("cuda", 1), ss.PlanOptions())
    assert packed == [(1, True), (1, True)]


def test_the_device_and_its_kernels_are_opened_exempt(
    mode: Mode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their first use may come at any time."""
    import sys

    seen: list[tuple[int, bool]] = []
    properties = {"name": b"GPU", "major": 9, "minor": 0, "multiProcessorCount": 1}

    def look(index: int) -> dict[str, Any]:
        seen.append(mode.now)
        return {**properties, "totalGlobalMem": 1, "l2CacheSize": 1}

    def stream(**options: bool) -> Any:
        seen.append(mode.now)
        return SimpleNamespace(ptr=9)

    runtime = SimpleNamespace(getDeviceProperties=look, driverGetVersion=lambda: 13000)
    cupy: Any = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Stream=stream))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    assert gpu_device.GpuDevice(1).packing_stream == 9
    assert seen == [(1, True), (1, True)]


def test_the_driver_of_the_process_is_opened_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    class Driver:
        def __init__(self, loaded: Any) -> None:
            calls.append(f"load {loaded}")

        def cuInit(self, flags: int) -> None:  # noqa: N802
            calls.append("init")

        def cuThreadExchangeStreamCaptureMode(self, mode: Any) -> None:  # noqa: N802
            calls.append(f"mode {mode._obj.value}")
            mode._obj.value = 1

    monkeypatch.setattr(loader, "Cuda", Driver)
    monkeypatch.setattr(loader, "load", lambda name: name)
    loader._driver.cache_clear()
    try:
        for _ in range(2):
            with loader.relaxed_capture():
                calls.append("inside")
    finally:
        loader._driver.cache_clear()
    assert calls == ["load cuda", "init"] + ["mode 2", "inside", "mode 1"] * 2
