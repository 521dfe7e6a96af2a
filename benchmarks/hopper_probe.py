"""The Hopper GEMM alone: right first, then its speed beside dense cuBLASLt, by configuration.

    python benchmarks/hopper_probe.py OUT.json [--check] [--large] [--small] [--patterns 6:8]

--check compares products of random 2:4 matrices with exact arithmetic, for every configuration that
is tried.  --large times the four layers of a model at many tokens, sustained and burst; --small at
few tokens, burst, layer by layer.  Everything is written to OUT.json.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import statistics
import sys
import time
from dataclasses import replace
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch

from slidesparse_rt.backends.gpu_weight import GpuWeight
from slidesparse_rt.bench.clocks import Clocks
from slidesparse_rt.bench.record import command_line, environment
from slidesparse_rt.bench.shapes import model
from slidesparse_rt.bench.sides import GpuSide, make_weights
from slidesparse_rt.bench.timing import Gpu, burst, sustained
from slidesparse_rt.device_arrays import DeviceArray
from slidesparse_rt.dtypes import array_type, operand
from slidesparse_rt.errors import SlideSparseError
from slidesparse_rt.kernels import catalog
from slidesparse_rt.kernels.hopper import HopperConfig, HopperGemm, pack_weights, tiling
from slidesparse_rt.kernels.hopper_layout import packed_bytes, unpack
from slidesparse_rt.kernels.launch import Quantizer
from slidesparse_rt.kernels.loader import kernels_of
from slidesparse_rt.pattern import Pattern

TORCH = {"int8": torch.int8, "fp8_e4m3": torch.float8_e4m3fn, "bf16": torch.bfloat16}
BF16 = "bfloat16"

LARGE = [
    HopperConfig(128, 2, source=0),
    HopperConfig(160, 2, source=0),
    HopperConfig(128, 2, source=1),
    HopperConfig(160, 2, source=1),
    HopperConfig(192, 2, source=1),
    HopperConfig(128, 2),
    HopperConfig(160, 2),
    HopperConfig(192, 2),
    HopperConfig(208, 2),
    HopperConfig(256, 1),
]
SMALL = [
    HopperConfig(16, 1, 4, True),
    HopperConfig(16, 1, 2, True),
    HopperConfig(16, 1, 2, True, 2),
    HopperConfig(16, 1, 4, True, 2),
    HopperConfig(16, 2, 2),
    HopperConfig(32, 1, 2, True),
    HopperConfig(32, 1, 2, True, 2),
    HopperConfig(32, 1, 4, True, 2),
    HopperConfig(64, 1, 2, True),
    HopperConfig(64, 1, 4, True),
    HopperConfig(64, 1, 2, True, 2),
    HopperConfig(64, 1, 4, True, 2),
    HopperConfig(64, 2, 2),
    HopperConfig(64, 1, 2),
    HopperConfig(64, 2, 2, False, 2),
    HopperConfig(64, 2, 2, False, 4),
    HopperConfig(128, 1, 2, True),
    HopperConfig(128, 1, 2, True, 2),
    HopperConfig(128, 1, 2),
    HopperConfig(128, 1, 2, False, 2),
    HopperConfig(128, 2, 2, False, 2),
    HopperConfig(128, 2, 2, False, 4),
    HopperConfig(128, 2, 2),
    HopperConfig(160, 2, 2),
    HopperConfig(256, 1, 2),
    HopperConfig(256, 1, 2, False, 2),
]


def random_slid(rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """A 2:4 sparse matrix of small whole numbers, exact in every format."""
    values = torch.randint(-7, 8, (rows, columns // 4, 4), device="cuda")
    order = torch.rand(rows, columns // 4, 4, device="cuda").argsort(dim=2)
    values.scatter_(2, order[:, :, :2], 0)
    return values.view(rows, columns).to(torch.float32).to(dtype)


def check(config: HopperConfig, dtype: str, n: int, columns: int, m: int, out: str, bias: bool) -> str:
    """"" if a product is right."""
    kernels = kernels_of(0)
    kind = TORCH[dtype]
    size = kind.itemsize
    rows = -(-n // 128) * 128
    row_bytes = -(-columns * size // 16) * 16
    slid_bytes = -(-row_bytes // 256) * 256
    slid = torch.zeros((rows, slid_bytes // size), dtype=kind, device="cuda")
    slid[:n, :columns] = random_slid(n, columns, kind)
    tokens = torch.zeros((m, row_bytes // size), dtype=kind, device="cuda")
    tokens[:, :columns] = torch.randint(-7, 8, (m, columns), device="cuda").float().to(kind)
    packed = torch.empty(packed_bytes(rows, slid_bytes, size), dtype=torch.uint8, device="cuda")
    stream = torch.cuda.current_stream().cuda_stream
    pack_weights(kernels, dtype, slid.data_ptr(), rows, slid_bytes, packed.data_ptr(), stream, config.source)
    if config.source == 1:
        host = packed.cpu().numpy().reshape(rows // 128, slid_bytes // 128, 2, -1)
        numpy_kind = operand(dtype).dtype
        back = unpack(host, numpy_kind).view(np.uint8)
        if not (back == slid.view(torch.uint8).cpu().numpy()).all():
            return "unpack differs"
    scaled = operand(dtype).scaled
    s_m = torch.rand(m, device="cuda") + 0.5
    s_n = torch.rand(n, device="cuda") + 0.5
    b = torch.randn(n, device="cuda")
    exact = (tokens.double() @ slid[:n, : row_bytes // size].double().T).float()
    want = exact
    if scaled:
        want = (exact * s_m[:, None]) * s_n
    if bias:
        want = want + b
    out_kind = getattr(torch, out)
    y = torch.full((m, n + 8), float("nan"), dtype=out_kind, device="cuda")
    cut = tiling(config, n, m)
    partials = torch.empty(max(16, cut.partial_bytes), dtype=torch.uint8, device="cuda")
    counters = torch.zeros(max(16, cut.counters), dtype=torch.int32, device="cuda")
    gemm = HopperGemm(kernels, dtype, out, n, slid_bytes, row_bytes, m, config)
    for _ in range(2):
        gemm(
            packed.data_ptr(), tokens.data_ptr(), s_m.data_ptr() if scaled else 0,
            s_n.data_ptr() if scaled else 0, b.data_ptr() if bias else 0, y.data_ptr(), n + 8,
            partials.data_ptr(), counters.data_ptr(), stream,
        )  # fmt: skip
    torch.cuda.synchronize()
    got = y[:, :n]
    if not torch.isnan(y[:, n:].float()).all():
        return "wrote beyond the row"
    wrong = got != want.to(out_kind)
    if wrong.any():
        where = wrong.nonzero()
        return (
            f"{int(wrong.sum())} of {wrong.numel()} wrong, first {where[0].tolist()}, last "
            f"{where[-1].tolist()}: {got[wrong][:4].tolist()} for {want[wrong][:4].tolist()}"
        )
    return ""


def check_all(options: Any) -> list[str]:
    failures = []
    cases = 0
    for dtype in options.dtypes:
        for config in options.configs:
            faulthandler.dump_traceback_later(20, exit=True)
            began = time.monotonic()
            for n, columns, m, out, bias in (
                (256, 2048, 300, "bfloat16", True),
                (100, 1500 if dtype != "bf16" else 700, 37, "float32", False),
                (1000, 4096, 129, "float16", True),
                (3584, 5376, 513, "bfloat16", False),
            ):
                if out != "bfloat16" and not options.all_outs:
                    out = "bfloat16"  # compiling takes a second
                cases += 1
                try:
                    said = check(config, dtype, n, columns, m, out, bias)
                except SlideSparseError as error:
                    said = f"{type(error).__name__}: {str(error)[:300]}"
                if said:
                    failures.append(f"{dtype} {config.name} {n}x{columns}x{m} {out}: {said}")
                    print("WRONG", failures[-1], flush=True)
            print(f"{dtype} {config.name}: {time.monotonic() - began:.1f} s", flush=True)
    print(f"{cases} products checked, {len(failures)} wrong", flush=True)
    return failures


class Hopper:
    """The layers of a model, packed, with quantized tokens."""

    def __init__(self, gpu: Gpu, layers: Any, weights: Any, pattern: Pattern, dtype: str) -> None:
        self.gpu, self.layers, self.dtype, self.pattern = gpu, layers, dtype, pattern
        self.kernels = kernels_of(0)
        row = operand(dtype)
        size = row.bits // 8
        self.packed, self.fragments = [], []
        for layer, memory in zip(layers, weights, strict=True):
            view = gpu.array(memory.pointer, (layer.n, layer.k), BF16)
            held = GpuWeight.from_array(view, pattern, row, None, gpu.device, gpu.stream)
            slid_bytes = -(-pattern.slid_k(layer.k) * size // 256) * 256
            rows = -(-layer.n // 128) * 128
            slid = held.slide(rows, slid_bytes // size, gpu.stream)
            out = gpu.allocate(packed_bytes(rows, slid_bytes, size))
            pack_weights(self.kernels, dtype, slid.pointer, rows, slid_bytes, out.pointer, gpu.stream)
            other = gpu.allocate(packed_bytes(rows, slid_bytes, size))
            pack_weights(self.kernels, dtype, slid.pointer, rows, slid_bytes, other.pointer, gpu.stream, 1)
            self.fragments.append(other)
            gpu.synchronize()
            slid.close()
            held.drop_values()
            self.packed.append((held, out, slid_bytes))

    def quantize(self, tokens: int) -> None:
        self.tokens = tokens
        self.inputs = []
        size = operand(self.dtype).bits // 8
        for layer, _ in zip(self.layers, self.packed, strict=True):
            row_length = -(-self.pattern.slid_k(layer.k) * size // 16) * 16 // size
            x = self.gpu.random(tokens * layer.k * 2, BF16)
            q = self.gpu.allocate(tokens * row_length * size)
            scales = self.gpu.allocate(tokens * 4)
            Quantizer(self.kernels, layer.k, BF16, self.dtype, self.pattern, row_length)(
                x.pointer, layer.k, q.pointer, scales.pointer, tokens, tokens, self.gpu.stream
            )
            y = self.gpu.allocate(tokens * layer.n * 2)
            self.gpu.synchronize()
            x.close()
            self.inputs.append((q, scales, y, row_length * size))

    def work(self, index: int, config: HopperConfig) -> Any:
        gpu, layer = self.gpu, self.layers[index]
        held, packed, slid_bytes = self.packed[index]
        if config.source != 2:
            packed = self.fragments[index]
        q, scales, y, row_bytes = self.inputs[index]
        cut = tiling(config, layer.n, self.tokens)
        partials = gpu.allocate(max(16, cut.partial_bytes))
        counters = gpu.allocate(max(16, cut.counters * 4))
        gpu.set_bytes(counters.pointer, 0, counters.nbytes)
        gemm = HopperGemm(
            self.kernels, self.dtype, BF16, layer.n, slid_bytes, row_bytes, self.tokens, config
        )
        scaled = operand(self.dtype).scaled

        def launch(keep: Any = (partials, counters)) -> None:
            gemm(
                packed.pointer, q.pointer, scales.pointer if scaled else 0, held.scales, 0,
                y.pointer, layer.n, partials.pointer, counters.pointer, gpu.stream,
            )  # fmt: skip

        return launch

    def close(self) -> None:
        for held, out, _ in self.packed:
            held.close()
            out.close()


def sequence(works: list[Any]) -> Any:
    def launch() -> None:
        for work in works:
            work()

    return launch


def time_large(gpu: Gpu, clocks: Clocks, options: Any) -> list[dict[str, Any]]:
    rows = []
    layers = [
        row for row in model(options.model).layers if not options.layers or row.name in options.layers
    ]
    for pattern_name in options.patterns:
        pattern = Pattern.parse(pattern_name)
        with ExitStack() as stack:
            weights = make_weights(gpu, layers, pattern)
            for memory in weights:
                stack.callback(memory.close)
            for m in options.tokens:
                graphs: dict[str, Any] = {}
                keep = []
                for dtype in options.dtypes:
                    dense = GpuSide(gpu, "dense", layers, weights, pattern, operand(dtype))
                    keep.append(dense)
                    inputs = [gpu.random(m * layer.k * 2, BF16) for layer in layers]
                    outputs = [gpu.allocate(m * layer.n * 2) for layer in layers]
                    works = [
                        dense.gemm(i, m, x.pointer, y.pointer).launch
                        for i, (x, y) in enumerate(zip(inputs, outputs, strict=True))
                    ]
                    keep += [inputs, outputs]
                    graphs[f"{dtype} dense"] = gpu.capture(sequence(works))
                    hopper = Hopper(gpu, layers, weights, pattern, dtype)
                    hopper.quantize(m)
                    keep.append(hopper)
                    for config in options.configs:
                        try:
                            works = [hopper.work(i, config) for i in range(len(layers))]
                            gpu.synchronize()
                            name = f"{dtype} {config.name} g{config.tile_group}"
                            if options.once:
                                sequence(works)()
                                gpu.synchronize()
                                continue
                            graphs[name] = gpu.capture(sequence(works))
                            keep.append(works)
                        except SlideSparseError as error:
                            print(config.name, str(error)[:200], flush=True)
                if options.once:
                    return []
                for mode in options.modes:
                    if mode == "burst":
                        times = burst(gpu, graphs, rounds=10, clocks=clocks)
                    else:
                        times = sustained(gpu, graphs, seconds=options.seconds, rounds=2, clocks=clocks)
                    best = min(times[f"{d} dense"].us for d in options.dtypes)
                    for name, found in times.items():
                        own = times[f"{name.split()[0]} dense"].us
                        clock = found.clocks
                        print(
                            f"{pattern_name} M={m} {mode:9s} {name:28s} {found.us:9.1f} us  "
                            f"{own / found.us:.3f} of own dense, {best / found.us:.3f} of best  {clock}",
                            flush=True,
                        )
                        rows.append(
                            {"pattern": pattern_name, "m": m, "mode": mode, "name": name,
                             "us": found.us, "own": own / found.us, "best": best / found.us,
                             "times": found.to_json()}
                        )  # fmt: skip
                gpu.synchronize()
                for thing in keep:
                    if hasattr(thing, "close"):
                        thing.close()
                del keep, graphs
    return rows


def time_small(gpu: Gpu, clocks: Clocks, options: Any) -> list[dict[str, Any]]:
    """Each layer with weights that rotate past L2, burst."""
    rows = []
    layers = model(options.model).layers
    for pattern_name in options.patterns:
        pattern = Pattern.parse(pattern_name)
        weights = make_weights(gpu, layers, pattern)
        for dtype in options.dtypes:
            dense = GpuSide(gpu, "dense", layers, weights, pattern, operand(dtype))
            hopper = Hopper(gpu, layers, weights, pattern, dtype)
            flush = gpu.allocate(128 << 20)
            for m in options.small_tokens:
                hopper.quantize(m)
                total = {"dense": 0.0, "hopper": 0.0}
                for i, layer in enumerate(layers):
                    x = gpu.random(m * layer.k * 2, BF16)
                    y = gpu.allocate(m * layer.n * 2)
                    base = dense.gemm(i, m, x.pointer, y.pointer).launch
                    candidates: dict[str, Any] = {"dense": base}
                    for config in SMALL:
                        if config.tokens > max(16, 2 * m):
                            continue
                        try:
                            candidates[config.name] = hopper.work(i, config)
                        except SlideSparseError as error:
                            print(config.name, str(error)[:100])
                    gpu.synchronize()
                    times = cold(gpu, candidates, flush)
                    best = min((us, name) for name, us in times.items() if name != "dense")
                    total["dense"] += times["dense"]
                    total["hopper"] += best[0]
                    order = sorted(times.items(), key=lambda pair: pair[1])
                    print(
                        f"{pattern_name} {dtype} M={m} {layer.name}: "
                        + ", ".join(f"{name} {us:.1f}" for name, us in order[:7])
                        + f"; dense {times['dense']:.1f}",
                        flush=True,
                    )
                    rows.append({"pattern": pattern_name, "dtype": dtype, "m": m, "layer": layer.name, "us": times})
                print(f"  sum: dense {total['dense']:.1f} hopper {total['hopper']:.1f} ratio {total['dense'] / total['hopper']:.3f}", flush=True)
    return rows


def cold(gpu: Gpu, works: dict[str, Any], flush: Any, rounds: int = 7) -> dict[str, float]:
    """Median microseconds of each, the L2 flushed before; graphs, so that launches cost nothing."""
    graphs = {}
    for name, work in works.items():
        work()
        graphs[name] = gpu.capture(work)
    marks: list[tuple[str, Any, Any]] = []
    for _ in range(rounds):
        for name, graph in graphs.items():
            gpu.set_bytes(flush.pointer, 1, flush.nbytes)
            begin = gpu.event()
            graph.launch()
            marks.append((name, begin, gpu.event()))
    gpu.synchronize()
    found: dict[str, list[float]] = {name: [] for name in works}
    for name, begin, end in marks:
        found[name].append(gpu.elapsed_us(begin, end))
    return {name: statistics.median(us) for name, us in found.items()}


def configs_of(text: str) -> list[HopperConfig]:
    """"160,2;128,2,2,0,1,16" and so on: fields of HopperConfig in order."""
    made = []
    for part in text.split(";"):
        numbers = [int(word) for word in part.split(",")]
        if len(numbers) > 3:
            numbers[3] = bool(numbers[3])
        made.append(HopperConfig(*numbers))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--variant", nargs="*", default=[])
    parser.add_argument("--layers", nargs="*", default=[])
    parser.add_argument("--no-dense", action="store_true")
    parser.add_argument("--once", action="store_true")
    parser.add_argument("--all-outs", action="store_true")
    parser.add_argument("--all-configs", action="store_true")
    parser.add_argument("--large", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--patterns", nargs="+", default=["6:8"])
    parser.add_argument("--dtypes", nargs="+", default=["int8", "fp8_e4m3"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    parser.add_argument("--small-tokens", nargs="+", type=int, default=[16, 64, 256])
    parser.add_argument("--modes", nargs="+", default=["sustained", "burst"])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--configs", type=configs_of, default=LARGE)
    options = parser.parse_args()
    if options.variant:
        real = catalog.hopper_gemm

        def changed(*args: Any, **kw: Any) -> Any:
            spec = real(*args, **kw)
            extra = tuple((name, 1) for name in options.variant)
            return replace(spec, defines=(*spec.defines, *extra))

        catalog.hopper_gemm = changed
    if options.all_configs:
        options.configs = [*LARGE, *SMALL]
    faulthandler.dump_traceback_later(60, exit=True)
    gpu = Gpu(0)
    document = environment(gpu.facts(), commit=None) | {
        "what": "hopper-probe",
        "command": command_line(sys.argv),
    }
    with Clocks(gpu.bus_id()) as clocks:
        if options.check:
            document["failures"] = check_all(options)
        for name, run in (("large", time_large), ("small", time_small)):
            if getattr(options, name):
                faulthandler.dump_traceback_later(90, exit=True)
                document[name] = run(gpu, clocks, options)
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.write_text(json.dumps(document, indent=1, default=str) + "\n")


if __name__ == "__main__":
    main()
