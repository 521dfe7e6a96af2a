"""A CUDA runtime made of host memory, and plans and kernels on it, for the benchmarks' tests."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from types import ModuleType, SimpleNamespace
from typing import ClassVar

import ml_dtypes
import numpy as np
from fake_gpu import RuntimeFault

from slidesparse_rt import plan as plan_module
from slidesparse_rt.backends import gpu_device as gpu_device_module
from slidesparse_rt.bench import clocks, gemm, quantize, record, shapes, timing
from slidesparse_rt.bench.record import Budget, Record
from slidesparse_rt.dtypes import array_type
from slidesparse_rt.kernels import launch as launch_module
from slidesparse_rt.kernels import weight_launch
from slidesparse_rt.kernels.hopper_tiles import HOPPER_COUNTERS
from slidesparse_rt.packing import prune
from slidesparse_rt.packing import quantize as quantize_weight
from slidesparse_rt.packing.quantize import quantize_tokens
from slidesparse_rt.packing.slide import lift_rows
from slidesparse_rt.pattern import Pattern

BF16 = np.dtype(ml_dtypes.bfloat16)


# ------------------------------------------------------------------------- a GPU of host memory


class Memory:
    """Host memory that acts as device memory, full of garbage at first."""

    live: ClassVar[set[int]] = set()

    def __init__(self, nbytes):
        self.nbytes = max(16, nbytes)
        self._held = np.full(self.nbytes + 256, 0x5A, np.uint8)
        self.pointer = -(-self._held.ctypes.data // 256) * 256
        Memory.live.add(self.pointer)

    def close(self):
        Memory.live.discard(self.pointer)
        self.pointer = 0


def host(pointer, shape, dtype):
    """Host memory at an address as an array."""
    dtype = np.dtype(dtype)
    count = int(np.prod(shape))
    buffer = (ctypes.c_uint8 * (count * dtype.itemsize)).from_address(pointer)
    return np.frombuffer(buffer, dtype).reshape(shape)


class Cuda:
    """A stream with a clock of its own: work runs when it is queued, or when its graph is."""

    def __init__(self):
        self.now = 0.0
        self.capturing = None
        self.launches = 0

    def enqueue(self, work, us):
        if self.capturing is not None:
            self.capturing.append((work, us))
            return
        self.launches += 1
        work()
        self.now += us

    def copy(self, target, source, nbytes, kind, stream):
        assert (kind, stream) == (3, 7)
        assert source % 16 == target % 16 == 0
        self.enqueue(lambda: ctypes.memmove(target, source, nbytes), 2 * nbytes / 4)

    def set_bytes(self, pointer, value, nbytes, stream):
        assert stream == 7
        self.enqueue(lambda: ctypes.memset(pointer, value, nbytes), 1.0)


def fake_cupy(cuda):
    """As much of CuPy as the benchmarks use."""

    class Graph:
        def __init__(self, work):
            self.work = work

        def upload(self, stream):
            assert stream.ptr == 7

        def launch(self, stream):
            assert stream.ptr == 7
            assert cuda.capturing is None
            for work, us in self.work:
                cuda.enqueue(work, us)

    class Stream:
        ptr = 7

        def __init__(self, non_blocking):
            assert non_blocking

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def begin_capture(self):
            assert cuda.capturing is None
            cuda.capturing = []

        def end_capture(self):
            work, cuda.capturing = cuda.capturing, None
            return Graph(work)

        def synchronize(self):
            assert cuda.capturing is None

    class Event:
        def record(self, stream):
            assert stream.ptr == 7
            self.at = cuda.now

        def synchronize(self):
            pass

    class Array:
        def __init__(self, shape, dtype, memptr):
            self.shape, self.dtype, self.pointer = shape, dtype, memptr.pointer
            assert int(np.prod(shape)) * dtype.itemsize == memptr.nbytes

    module = ModuleType("cupy")
    module.__version__ = "14.0.0"
    module.ndarray = Array
    module.cuda = SimpleNamespace(
        Stream=Stream,
        Event=Event,
        get_elapsed_time=lambda begin, end: (end.at - begin.at) / 1e3,
        UnownedMemory=lambda pointer, nbytes, owner, device: SimpleNamespace(
            pointer=pointer, nbytes=nbytes, device=device
        ),
        MemoryPointer=lambda memory, offset: memory,
        runtime=SimpleNamespace(
            CUDARuntimeError=RuntimeFault,
            cudaDevAttrL2CacheSize=38,
            deviceGetAttribute=lambda attribute, index: {38: 1 << 16}[attribute],
            deviceGetPCIBusId=lambda index: f"0000:0{index}:00.0",
            runtimeGetVersion=lambda: 12080,
            memcpyAsync=cuda.copy,
            memsetAsync=cuda.set_bytes,
        ),
    )
    return module


class FakeDevice:
    index, name, capability = 0, "NVIDIA Test 80GB", (9, 0)
    sm_count, memory_bytes = 132, 80 << 30

    def allocate(self, nbytes):
        return Memory(nbytes)

    def upload(self, values, stream):
        memory = Memory(values.nbytes)
        ctypes.memmove(memory.pointer, values.ctypes.data, values.nbytes)
        return memory

    def download(self, pointer, values, stream):
        ctypes.memmove(values.ctypes.data, pointer, values.nbytes)


def make_cuda():
    return Cuda()


def make_gpu(cuda, monkeypatch):
    monkeypatch.setitem(sys.modules, "cupy", fake_cupy(cuda))
    monkeypatch.setattr(timing, "on_device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(gpu_device_module, "gpu_device", lambda index: FakeDevice())
    monkeypatch.setattr(timing, "POOL", 8 * 1009)
    Memory.live.clear()
    made = timing.Gpu(0)
    yield made
    made.close()
    assert not Memory.live  # everything was given back


# --------------------------------------------------------------------- plans on that GPU, in NumPy


class FakePlan:
    """SparseGemmPlan and its prepared weight, on host memory."""

    closed = 0
    workspace_limit = 8 << 30
    cuda: Cuda
    #: Microseconds of a product, by backend, and what spoils its outputs.
    cost: ClassVar[dict[str, float]] = {
        "hopper": 5_000.0,
        "cusparselt": 10_000.0,
        "dense": 15_000.0,
    }
    #: What a plan with backend="auto" went by (None: the rule), and what it runs from 16 tokens on.
    table = SimpleNamespace(taken="2026-01-01T00:00:00+00:00")
    choice = "hopper"
    spoil = staticmethod(lambda backend, values: None)

    def __init__(self, weight, pattern, *, dtype, backend, device, options, tuning=None):
        assert device == "cuda:0"
        assert options.workspace_limit == self.workspace_limit
        assert (tuning is not None) == (backend == "auto")
        self.tuning = tuning
        self._selected = SimpleNamespace(table=self.table)
        self.n, self.k = weight.shape
        self.backend = backend
        operands = dict(
            zip(
                ("values", "scales"),
                quantize_weight(np.array(host(weight.pointer, weight.shape, BF16)), dtype),
                strict=True,
            )
        )
        self.values, self.scales = operands["values"], operands["scales"]
        self._prepared = self
        self.weight = SimpleNamespace(operand=dtype)
        self.sparse = backend != "dense"
        self.lift = Pattern.parse(pattern) if self.sparse else Pattern.parse("2:4")
        self.row_length = self.lift.slid_k(self.k)
        self.padded_n = -(-self.n // 32) * 32
        self.sums_type = {"int8": "int32", "bf16": "bfloat16"}.get(dtype.name, "float32")
        if backend == "hopper" or (backend == "dense" and dtype.name == "bf16"):
            self.sums_type = "float32"
        self.prepared_for = set()

    def can_write(self, kind, y, stride, tokens):
        assert kind.name == "bfloat16"
        assert stride == self.n
        assert y % 16 == 0
        if self.backend == "hopper":
            return True
        return not self.sparse and self.weight.operand.name != "int8"

    def product(self, tokens, direct, stream):
        assert self.cuda.capturing is None
        # What is measured was compiled and searched for ahead of it.
        assert tokens in self.prepared_for
        assert direct is not None or self.backend != "hopper"
        plan = self

        class Product:
            scratch_bytes = 64
            how = "whole" if self.backend == "hopper" else ""

            def launch(self, q, scales, target, stride, scratch, counters, stream):
                assert scratch % 16 == 0
                assert stride == (plan.n if self.direct else plan.padded_n)
                assert not host(counters, (HOPPER_COUNTERS,), np.int32).any()
                plan.cuda.enqueue(
                    lambda: plan.multiply(tokens, q, scales, target, self.direct), plan.price
                )

        Product.direct = direct is not None
        return Product()

    @property
    def price(self):
        return self.cost[self.backend]

    def backend_for(self, tokens):
        assert self.backend == "auto"
        return self.choice if tokens >= 16 else "dense"

    def layout(self, product, tokens):
        padded = -(-tokens // 16) * 16
        scales = -(-padded * self.row_length * 2 // 256) * 256
        sums = -(-(scales + padded * 4) // 256) * 256
        scratch = -(-(sums + padded * self.padded_n * 4) // 256) * 256
        return SimpleNamespace(
            padded_tokens=padded, scales=scales, sums=sums, scratch=scratch, nbytes=scratch + 64
        )

    def quantizer(self, kind, stream):
        def run(x, stride, q, scales, tokens, padded, stream):
            assert stride == self.k
            self.cuda.enqueue(lambda: self.quantize(x, q, scales, tokens), 5.0)

        return run

    def quantize(self, x, q, scales, tokens):
        values, found = quantize_tokens(
            np.array(host(x, (tokens, self.k), BF16)), self.weight.operand
        )
        host(q, (tokens, self.row_length), values.dtype)[...] = lift_rows(values, self.lift)
        if found is not None:
            host(scales, (tokens,), np.float32)[...] = found

    def multiply(self, tokens, q, scales, target, direct):
        dtype = self.values.dtype
        left = host(q, (tokens, self.row_length), dtype).astype(np.float64)
        w = self.values
        if self.sparse:
            from slidesparse_rt.packing.slide import slide_rows

            w = slide_rows(w, self.lift, "weight")
        sums = left @ w.astype(np.float64).T
        if direct:
            out = host(target, (tokens, self.n), BF16)
            y = sums.astype(np.float32)
            if self.scales is not None:
                y = y * host(scales, (tokens,), np.float32)[:, None] * self.scales
            out[...] = y.astype(BF16)
        else:
            kind = np.int32 if self.sums_type == "int32" else array_type(self.sums_type).dtype
            out = host(target, (tokens, self.padded_n), kind)
            out[:, : self.n] = sums.astype(kind)
        self.spoil(self.backend, out)

    def prepare(self, tokens, *, x_dtype, stream):
        assert (x_dtype, stream) == ("bfloat16", 7)
        self.prepared_for |= set(tokens)

    def run(self, x, *, out, stream):
        assert x.shape[0] in self.prepared_for

        def work():
            rows = np.array(host(x.pointer, x.shape, BF16))
            values, scales = quantize_tokens(rows, self.weight.operand)
            y = (values.astype(np.float64) @ self.values.astype(np.float64).T).astype(np.float32)
            if scales is not None:
                y = y * scales[:, None] * self.scales
            target = host(out.pointer, out.shape, BF16)
            target[...] = y.astype(BF16)
            self.spoil(self.backend, target)

        name = self.backend_for(x.shape[0]) if self.backend == "auto" else self.backend
        self.cuda.enqueue(work, self.cost[name] + 2_000.0)

    def close(self):
        FakePlan.closed += 1


def make_plans(cuda, gpu, monkeypatch):
    """run_gemm's real sides over FakePlan, for a tiny model."""

    class Plan(FakePlan):
        pass

    Plan.cuda = cuda
    monkeypatch.setattr(FakePlan, "closed", 0)
    monkeypatch.setattr(plan_module, "SparseGemmPlan", Plan)
    tiny = shapes.Model("tiny", 64, 2, 1, 32, 104)
    monkeypatch.setitem(shapes.MODELS, "tiny", tiny)

    class Pruner:
        def __init__(self, pattern):
            self.pattern = pattern

        def prune_magnitude(self, w, pitch, out, out_pitch, rows, columns, stream):
            assert w == out
            assert pitch == out_pitch == 2 * columns

            def work():
                view = host(w, (rows, columns), BF16)
                view[...] = prune(np.array(view), self.pattern)

            cuda.enqueue(work, 3.0)

    monkeypatch.setattr(
        weight_launch, "weight_kernels", lambda device, dtype, pattern: Pruner(pattern)
    )
    return Plan


def new_record(what="gemm", path=None, **settings):
    return Record(
        what,
        settings,
        command="slidesparse bench",
        surroundings=record.environment(None),
        path=path,
    )


def measure(gpu, settings, path=None, budget=None):
    """Run the gemm benchmark: (document, lines said)."""
    lines, done = [], []
    result = new_record(path=path, **settings.to_json())
    gemm.run_gemm(
        gpu,
        settings,
        result,
        budget=Budget() if budget is None else budget,
        clocks=clocks.Clocks("0"),
        say=lines.append,
        done=lambda: done.append(1),
    )
    assert len(done) == settings.cases
    return result, lines


TINY = {"models": ("tiny",), "tokens": (1, 40), "rounds": 3, "seconds": 0.01}


def make_kernels(cuda, monkeypatch):
    """quantizer and dequantizer in NumPy; ``spoil`` may change what they write."""
    state = SimpleNamespace(spoil=lambda values: None)

    def quantizer(device, kind, row, pattern, k, row_length):
        def run(x, stride, q, scales, rows, padded, stream):
            assert (stride, stream) == (k, 7)

            def work():
                values, found = quantize_tokens(np.array(host(x, (rows, k), kind.dtype)), row)
                out = host(q, (padded, row_length), row.dtype)
                out[...] = 0
                out[:rows, : pattern.slid_k(k)] = lift_rows(values, pattern)
                state.spoil(out)
                if found is not None:
                    host(scales, (rows,), np.float32)[...] = found

            bytes_ = rows * k * kind.bits // 8 + padded * row_length * row.bits // 8
            cuda.enqueue(work, bytes_ / 3)

        return run

    def dequantizer(device, sums_type, kind, n):
        def run(sums, sums_stride, out, out_stride, by_token, by_channel, bias, rows, stream):
            assert (sums_stride, out_stride, stream) == (n, n, 7)

            def work():
                y = host(sums, (rows, n), sums_type).astype(np.float32)
                y = y * host(by_token, (rows,), np.float32)[:, None]
                y = y * host(by_channel, (n,), np.float32) + host(bias, (n,), np.float32)
                target = host(out, (rows, n), kind.dtype)
                target[...] = y.astype(kind.dtype)
                state.spoil(target)

            cuda.enqueue(work, rows * n * 6 / 3)

        return run

    monkeypatch.setattr(launch_module, "quantizer", quantizer)
    monkeypatch.setattr(launch_module, "dequantizer", dequantizer)
    return state


SMALL = {"columns": (24, 52), "outputs": (40,), "tokens": (20, 3), "rounds": 3}


def measure_kernels(gpu, settings, budget=None):
    lines, result = [], new_record("quantize", **settings.to_json())
    quantize.run_quantize(
        gpu,
        settings,
        result,
        budget=Budget() if budget is None else budget,
        clocks=clocks.Clocks("0"),
        say=lines.append,
        done=lambda: None,
    )
    return result, lines
