"""Faults of CUDA as this package's errors, with a stand-in for CuPy."""

from __future__ import annotations

import contextlib
import sys
from types import SimpleNamespace
from typing import Any

import pytest
from fake_gpu import RuntimeFault

from slidesparse_rt.backends import gpu_device
from slidesparse_rt.backends.gpu_device import GpuDevice
from slidesparse_rt.errors import DeviceMemoryError, LibraryError


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A device on which every allocation fails with ``status``, or none where it is 0."""
    made: Any = object.__new__(GpuDevice)
    made.index, made.status = 3, 0

    def memory(nbytes: int) -> Any:
        if made.status:
            raise RuntimeFault(made.status)
        return SimpleNamespace(ptr=4096)

    runtime = SimpleNamespace(CUDARuntimeError=RuntimeFault, memGetInfo=lambda: (5_000, 80_000))
    made._cupy = SimpleNamespace(cuda=SimpleNamespace(Memory=memory, runtime=runtime))
    monkeypatch.setitem(sys.modules, "cupy", made._cupy)
    monkeypatch.setattr(gpu_device, "working_on", lambda index: contextlib.nullcontext())
    return made


def test_memory_that_there_is(device: Any) -> None:
    with device.allocate(1) as held:
        assert (held.pointer, held.nbytes) == (4096, 16)


def test_memory_that_there_is_not_is_said_with_what_to_do(device: Any) -> None:
    device.status = 2  # cudaErrorMemoryAllocation
    with pytest.raises(
        DeviceMemoryError, match=r"cuda:3 has no 6,000 bytes left \(5,000 of 80,000 free\); free"
    ) as raised:
        device.allocate(6_000)
    error = raised.value
    assert (error.function, error.status) == ("cudaMalloc", 2)
    assert error.status_name == "cudaErrorMemoryAllocation"


def test_other_faults_name_the_function(device: Any) -> None:
    device.status = 700
    with pytest.raises(
        LibraryError, match=r"cudaMalloc\(64\) on cuda:3 failed: status 700"
    ) as raised:
        device.allocate(64)
    assert not isinstance(raised.value, DeviceMemoryError)
    assert (raised.value.function, raised.value.status) == ("cudaMalloc", 700)
