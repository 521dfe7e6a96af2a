"""A GPU with real launchers on it: plans of the backend "hopper" whose driver only remembers."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from fake_cuda import FakeKernels, LaunchingCuda
from fake_gpu import Gpu, Memory, cold_cache

import slidesparse_rt as ss
from slidesparse_rt import device_adapters, gpu_bound, gpu_run
from slidesparse_rt.arrays import Device
from slidesparse_rt.backends import Problem, gpu_gemm, hopper, trial, workspace
from slidesparse_rt.backends.gpu_weight import GpuWeight
from slidesparse_rt.dtypes import operand
from slidesparse_rt.kernels import launch
from slidesparse_rt.kernels.hopper import _GEMM_ARGUMENTS, HOPPER_PACK_ARGUMENTS

N, K = 64, 128
#: The stream that is current unless a test says otherwise.
STREAM = 7
LAYOUTS = {
    "quantize_lift": launch.QUANTIZE_ARGUMENTS,
    "dequantize": launch.DEQUANTIZE_ARGUMENTS,
    "hopper_gemm": _GEMM_ARGUMENTS,
    "hopper_pack": HOPPER_PACK_ARGUMENTS,
}


class Driver(LaunchingCuda):
    """Knows the arguments of every kernel."""

    def __init__(self, kernels: FakeKernels) -> None:
        super().__init__()
        self.kernels = kernels
        #: Called before each launch, with the kernel's name.
        self.before: Any = lambda entry: None

    def _launch(self, function: int, *rest: Any) -> int:
        entry = self.kernels.loaded[function - 701][0].entry
        self.before(entry)
        self.layout = LAYOUTS[entry]
        if self.status:
            return self.status
        gx, gy, gz, bx, by, bz, *others = rest
        status = super()._launch(function, gx, gy, gz, bx, 1, bz, *others)
        found = self.captured.get(others[1], self.launches)
        found[-1] |= {"entry": entry, "height": by}
        return status

    def _repeat(self, executable: int, stream: int) -> int:
        for found in self.graphs[executable]:
            self.before(found["entry"])
        return super()._repeat(executable, stream)

    def _launch_with_settings(self, *arguments: Any) -> int:
        if self.status:
            return self._launch(arguments[1])
        return super()._launch_with_settings(*arguments)


class Kernels(FakeKernels):
    def __init__(self) -> None:
        super().__init__()
        self.cuda = Driver(self)

        #: Streams of green contexts.
        self.green: set[int] = set()

    def current(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def occupancy(self, *arguments: Any) -> int:
        return 4

    def owns(self, stream: int) -> bool:
        return stream not in self.green


class Machine:
    """What a test may change, and what it may look at."""

    def __init__(self) -> None:
        self.kernels = Kernels()
        self.gpu = Gpu()
        self.current_stream = STREAM
        self.capturing: set[int] = set()
        self.device = 0
        #: What was made current, in order.
        self.devices: list[int] = []
        self.relaxed = 0
        self.ordered: list[tuple[int, int]] = []
        self.shared: list[int] = []

    @property
    def driver(self) -> Driver:
        found: Any = self.kernels.cuda
        return found

    def taken(self) -> list[dict[str, Any]]:
        """The launches since the last call."""
        found = list(self.driver.launches)
        self.driver.launches.clear()
        return found

    def set_device(self, index: int) -> None:
        self.device = index
        self.devices.append(index)

    @contextlib.contextmanager
    def relaxing(self, *arguments: Any) -> Iterator[None]:
        self.relaxed += 1
        try:
            yield
        finally:
            self.relaxed -= 1

    @contextlib.contextmanager
    def without_context(self) -> Iterator[list[int]]:
        """The driver refuses launches until the runtime is asked for a device; which ones were."""
        asked: list[int] = []
        self.driver.status = 201

        def runtime(index: int) -> None:
            asked.append(index)
            self.driver.status = 0

        with pytest.MonkeyPatch.context() as patch:
            for module in (gpu_run, gpu_bound):
                patch.setattr(module, "set_device", runtime)
            yield asked

    def prepared(self, dtype: str = "int8", x_scale: int = 0) -> hopper.HopperPrepared:
        """A weight of this machine, packed."""
        device: Any = self.gpu
        weight = GpuWeight(device, (N, K), ss.Pattern.parse("6:8"), operand(dtype), None, STREAM)
        made: Any = weight
        made._scales = Memory(4 * N)
        if x_scale:
            made._x_scale = SimpleNamespace(pointer=x_scale, close=lambda: None)
        found = hopper.HopperPrepared(weight, ss.PlanOptions(), STREAM)
        self.taken()
        return found

    def runner(
        self, prepared: Any = None, options: ss.PlanOptions | None = None, dispatch: Any = None
    ) -> gpu_run.GpuRunner:
        """A plan's runner."""
        problem = Problem(N, K, ss.Pattern.parse("6:8"), operand("int8"))
        return gpu_run.GpuRunner(
            self.prepared() if prepared is None else prepared,
            problem,
            Device("cuda"),
            options or ss.PlanOptions(),
            dispatch,
        )


def make_machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine that takes torch's CPU tensors for tensors on cuda:0."""
    made = Machine()
    for module in (hopper, launch, gpu_bound):
        monkeypatch.setattr(module, "kernels_of", lambda index: made.kernels)
    foreign = SimpleNamespace(device_of_stream=lambda stream: 1 if stream == 0x700 else 0)
    monkeypatch.setattr(gpu_run, "kernels_of", lambda index: foreign)
    monkeypatch.setattr(gpu_run, "gpu_device", lambda index: made.gpu)
    monkeypatch.setattr(GpuWeight, "slide", lambda *arguments: Memory(1))
    monkeypatch.setattr(GpuWeight, "drop_values", lambda self: None)
    monkeypatch.setattr(trial, "cold_cache", cold_cache)
    monkeypatch.setattr(hopper, "launch_times", lambda *arguments, **options: {0: 1.0})
    for module in (gpu_run, gpu_bound, gpu_gemm):
        monkeypatch.setattr(module, "working_on", made.relaxing)
    for module in (gpu_run, gpu_bound):
        monkeypatch.setattr(module, "relaxed_capture", made.relaxing)
        monkeypatch.setattr(module, "set_device", made.set_device)
    runtime = SimpleNamespace(getDevice=lambda: made.device)
    monkeypatch.setattr(gpu_run, "cuda_runtime", lambda: runtime)
    for module in (gpu_run, gpu_bound, gpu_gemm, workspace):
        monkeypatch.setattr(module, "is_capturing", lambda stream: stream in made.capturing)
    monkeypatch.setattr(gpu_run, "order_streams", lambda *pair: made.ordered.append(pair))
    adapter = dataclasses.replace(
        device_adapters._torch_adapter(),
        maker=lambda shape, kind, device, stream: partial(
            torch.empty, shape, dtype=getattr(torch, kind.name)
        ),
        current_stream=lambda device: made.current_stream,
        share=lambda array, stream, device: made.shared.append(stream),
    )
    real = device_adapters.adapter_of
    monkeypatch.setattr(
        gpu_run,
        "adapter_of",
        lambda array: adapter if isinstance(array, torch.Tensor) else real(array),
    )
    monkeypatch.setattr(gpu_run, "device_of", lambda array, what: Device("cuda"))
    return made
