"""A GPU of which only the book-keeping and a clock are there, and backends with known prices."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from bench_fakes import Cuda, fake_cupy
from fake_gpu import Gpu, Memory, cold_cache
from plans import fitted

import slidesparse_rt as ss
from slidesparse_rt import device_adapters, gpu_run, plan
from slidesparse_rt.arrays import Device
from slidesparse_rt.backends import Choice, Problem, gpu_device, gpu_forms, workspace
from slidesparse_rt.backends.gpu_gemm import GpuPrepared
from slidesparse_rt.backends.gpu_weight import GpuWeight
from slidesparse_rt.tuning import cache, measure, select
from slidesparse_rt.tuning.cache import TableCache

N, K = 8, 16
WEIGHT = fitted("6:8", N, K)
STREAM = 7
#: Bytes of channel scales; of a packed weight.
SCALES = 4 * N
PACKED = {"hopper": 1000, "cusparselt": 2000, "dense": 3000, "other": 10}
#: Bytes of workspace of one token.
A_TOKEN = {"hopper": 10, "cusparselt": 30, "dense": 20}


def price(name: str, tokens: int) -> float:
    """Microseconds of a run: dense is fastest up to about 64 tokens, hopper from there on."""
    return {"hopper": 50 + tokens, "cusparselt": 100 + 2 * tokens, "dense": 20 + 1.5 * tokens}[name]


class FakeGpu(Gpu):
    """With the clock of a :class:`Cuda`."""

    packing_stream = 5
    driver_version = "13000"

    def __init__(self, cuda: Cuda) -> None:
        super().__init__()
        self.cuda = cuda
        #: Bytes that an allocation may have.
        self.room = 1 << 50
        self.flushed: list[int] = []

    def allocate(self, nbytes: int) -> Memory:
        if nbytes > self.room:
            raise ss.DeviceMemoryError(f"no {nbytes} bytes left")
        return super().allocate(nbytes)

    def filled(self, nbytes: int, *arguments: Any) -> Memory:
        return self.allocate(nbytes)

    def emptied(self, stream: int) -> None:
        super().emptied(stream)
        self.flushed.append(len(self.cuda.events))
        self.cuda.enqueue(lambda: None, 40.0)


class Clock(Cuda):
    """Notes what ran."""

    def __init__(self) -> None:
        super().__init__()
        #: (backend, tokens, address of x, address of the result) of everything that ran.
        self.events: list[tuple[str, int, int, int]] = []


class Step:
    def __init__(self, form: Form, tokens: int) -> None:
        self.form, self.tokens = form, tokens
        self.chosen = (form.name, tokens) not in form.machine.unchosen
        self.nbytes = A_TOKEN[form.name] * tokens

    def launch(
        self, x: int, stride: int, out: int, out_stride: int, held: Any, stream: int
    ) -> None:
        machine, name = self.form.machine, self.form.name
        assert self.form.packed.pointer
        assert self.form.weight._values is None
        held.address(self.nbytes, stream, self.tokens)
        if name in machine.broken and machine.broken[name] <= self.tokens:
            raise ss.LibraryError(f"{name} broke\nin two lines")
        event = (name, self.tokens, x, out)
        us = machine.price(name, self.tokens)
        machine.cuda.enqueue(lambda: machine.cuda.events.append(event), us)


class Form(GpuPrepared):
    """A weight in no form at all."""

    always_direct = True
    row_length = K
    padded_n = N
    token_multiple = 1
    sums_type = "float32"

    def __init__(self, machine: Machine, name: str, weight: GpuWeight, options: Any) -> None:
        super().__init__(weight, weight.pattern, options)
        self.machine, self.name = machine, name
        assert weight._values is not None
        assert weight._values.pointer
        if name in machine.unpackable:
            raise machine.unpackable[name]
        self.packed = machine.gpu.allocate(PACKED[name])
        weight.drop_values()

    @property
    def operand_bytes(self) -> int:
        return self.packed.nbytes

    def can_write(self, *arguments: Any) -> bool:
        return True

    def compile_ahead(self, tokens: Any, kind: Any) -> None:
        machine = self.machine
        machine.ahead.append((self.name, sorted(tokens), kind.name, len(machine.stepped)))
        if self.name in machine.uncompilable:
            raise ss.CompileError(f"{self.name} does not compile")

    def make_product(self, *arguments: Any) -> Any:
        raise AssertionError("steps are made instead")

    def release(self) -> None:
        self.packed.close()

    def most_tokens(self, limit: int) -> int:
        return self.machine.most.get(self.name, 1 << 20)

    def step(self, tokens: int, x_kind: Any, out_kind: Any, direct: bool, stream: int) -> Any:
        assert direct
        self.machine.stepped.append((self.name, tokens, x_kind.name, out_kind.name))
        return Step(self, tokens)


class Backend:
    def __init__(self, machine: Machine, name: str) -> None:
        self.machine, self.name = machine, name

    def pack(self, weight: GpuWeight, options: Any, stream: int) -> Form:
        assert stream == FakeGpu.packing_stream
        self.machine.packs.append(self.name)
        return Form(self.machine, self.name, weight, options)

    def prepare(
        self, source: Any, bias: Any, device: Device, options: Any, *, x_scale: Any
    ) -> Form:
        return self.pack(self.machine.upload(source, bias, self.machine.gpu, x_scale), options, 5)


@dataclasses.dataclass
class Machine:
    """What a test may change, and what it may look at."""

    cuda: Clock
    gpu: FakeGpu
    tables: TableCache
    names: tuple[str, ...] = ("hopper", "cusparselt", "dense")
    price: Callable[[str, int], float] = price
    #: Backend -> the error of packing; the number of tokens from which on it breaks; its split.
    unpackable: dict[str, Exception] = dataclasses.field(default_factory=dict)
    broken: dict[str, int] = dataclasses.field(default_factory=dict)
    most: dict[str, int] = dataclasses.field(default_factory=dict)
    #: Backends and numbers of tokens for which there is no memory to choose how to multiply.
    unchosen: set[tuple[str, int]] = dataclasses.field(default_factory=set)
    #: Backends whose kernels do not compile; what was compiled ahead of how many steps.
    uncompilable: set[str] = dataclasses.field(default_factory=set)
    ahead: list[tuple[str, list[int], str, int]] = dataclasses.field(default_factory=list)
    packs: list[str] = dataclasses.field(default_factory=list)
    uploads: int = 0
    stepped: list[tuple[str, int, str, str]] = dataclasses.field(default_factory=list)

    def upload(self, source: Any, bias: Any, gpu: Any, x_scale: Any) -> GpuWeight:
        """A weight with its values, scales and bias."""
        self.uploads += 1
        row, pattern = getattr(source, "operand", None) or source.dtype, source.pattern
        made = GpuWeight(gpu, (N, K), pattern, row, bias, 5)
        made._values, made._scales = Memory(N * K), Memory(4 * N)  # type: ignore[assignment]
        if x_scale is not None:
            made.hold_x_scale(x_scale, 5)
        return made

    def able(
        self, names: Any, problem: Problem, device: Device
    ) -> tuple[dict[str, Any], dict[str, str]]:
        found = {name: Backend(self, name) for name in names if name in self.names}
        return found, {name: "it is hidden" for name in names if name not in found}

    def ran(self) -> list[tuple[str, int]]:
        """(backend, tokens) of what ran since the last call."""
        found = [(name, tokens) for name, tokens, _, _ in self.cuda.events]
        self.cuda.events.clear()
        return found


def x_of(tokens: int) -> torch.Tensor:
    """Activations of so many tokens."""
    return torch.zeros(tokens, K, dtype=torch.bfloat16)


def make_plan(**arguments: Any) -> plan.SparseGemmPlan:
    """A plan of :data:`WEIGHT` on the GPU, unless ``arguments`` say otherwise."""
    return plan.SparseGemmPlan(WEIGHT, "6:8", **({"device": "cuda"} | arguments))


def make_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """A machine on which plans on "cuda" take torch's CPU tensors for tensors on the GPU."""
    cuda = Clock()
    made = Machine(cuda, FakeGpu(cuda), TableCache(tmp_path / "tuning"))
    monkeypatch.setattr(Memory, "held", set())
    monkeypatch.setattr(measure, "cold_cache", cold_cache)
    monkeypatch.setattr(measure, "_RECOVERY_S", 0.0)  # the clock is not that of the host
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(cuda))

    @contextlib.contextmanager
    def nothing(*arguments: Any) -> Iterator[None]:
        yield

    for module in (measure, gpu_forms, gpu_run):
        monkeypatch.setattr(module, "working_on", nothing)
    for module in (gpu_device, gpu_forms, gpu_run):
        monkeypatch.setattr(module, "gpu_device", lambda index: made.gpu)
    for module in (gpu_run, workspace):
        monkeypatch.setattr(module, "is_capturing", lambda stream: cuda.capturing is not None)
    monkeypatch.setattr(gpu_forms, "to_gpu", made.upload)
    adapter = dataclasses.replace(
        device_adapters._torch_adapter(),
        maker=lambda shape, kind, device, stream: partial(
            torch.empty, shape, dtype=getattr(torch, kind.name)
        ),
        current_stream=lambda device: STREAM,
    )
    monkeypatch.setattr(gpu_run, "adapter_of", lambda array: adapter)
    monkeypatch.setattr(gpu_run, "device_of", lambda array, what: Device("cuda"))
    monkeypatch.setattr(gpu_run, "cuda_runtime", lambda: SimpleNamespace(getDevice=lambda: 0))
    monkeypatch.setattr(gpu_run, "relaxed_capture", nothing)
    monkeypatch.setattr(
        gpu_run, "kernels_of", lambda index: SimpleNamespace(device_of_stream=lambda stream: 0)
    )
    monkeypatch.setattr(cache, "_sources_digest", lambda: "0123")
    monkeypatch.setattr(select, "able", lambda *arguments: made.able(*arguments))
    monkeypatch.setattr(select, "default_cache", lambda: made.tables)

    def choose(name: str, problem: Any, device: Device, keep_dense: bool = True) -> Choice:
        order = sorted(made.names, key=lambda one: not keep_dense and one == "dense")
        first = order[0] if name == "auto" else name
        return Choice(Backend(made, first), {"other": "by rule"}, "by rule")  # type: ignore[arg-type]

    monkeypatch.setattr(plan, "choose", choose)
    yield made
    # Whatever was made was closed.
    assert Memory.held == set()
