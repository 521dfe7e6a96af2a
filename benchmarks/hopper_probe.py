"""The Hopper GEMM's configurations side by side, and beside dense cuBLASLt on the same weights.

    python benchmarks/hopper_probe.py OUT.json --configs "208,2;160,2;192,2,2,0,1,16"

A configuration is the fields of HopperConfig in order.  Times the linear layers of a model as one
graph, operands quantized already, bf16 results with scales; --once launches each configuration once
instead, for a profiler:

    ncu --clock-control none --set full -k regex:hopper_gemm -c 1 \
        python benchmarks/hopper_probe.py OUT.json --once --layers gate_up --configs "208,2"

That products are right is tested in tests/gpu/test_hopper.py.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from slidesparse_rt.backends.gpu_gemm import round_up
from slidesparse_rt.backends.gpu_weight import GpuWeight
from slidesparse_rt.bench.clocks import Clocks
from slidesparse_rt.bench.record import command_line, environment
from slidesparse_rt.bench.shapes import model
from slidesparse_rt.bench.sides import BF16, GpuSide, make_weights
from slidesparse_rt.bench.timing import Gpu, burst, sustained
from slidesparse_rt.dtypes import operand
from slidesparse_rt.kernels.hopper import HopperGemm, pack_weights
from slidesparse_rt.kernels.hopper_layout import (
    PANEL_ROWS,
    ROW_MULTIPLE,
    STEP_BYTES,
    packed_bytes,
)
from slidesparse_rt.kernels.hopper_tiles import HopperConfig, tiling
from slidesparse_rt.kernels.launch import Quantizer
from slidesparse_rt.kernels.loader import kernels_of
from slidesparse_rt.pattern import Pattern

Launch = Callable[[], None]

#: Rows of memory after the tokens, which a plan's workspace has too: the last tile reads them.
_MORE_ROWS = 256


class Hopper:
    """The layers of a model, packed, with quantized tokens."""

    def __init__(
        self, gpu: Gpu, layers: Any, weights: Any, pattern: Pattern, dtype: str, tokens: int
    ) -> None:
        self._gpu, self._layers, self._dtype, self._tokens = gpu, layers, dtype, tokens
        self._kernels = kernels_of(gpu.index)
        self._held: list[Any] = []  # keeps all memory
        self._parts = []
        row = operand(dtype)
        size = row.bits // 8
        for layer, memory in zip(layers, weights, strict=True):
            view = gpu.array(memory.pointer, (layer.n, layer.k), BF16)
            weight = GpuWeight.from_array(view, pattern, row, None, gpu.device, gpu.stream)
            slid_bytes = round_up(pattern.slid_k(layer.k) * size, STEP_BYTES)
            rows = round_up(layer.n, PANEL_ROWS)
            packed = gpu.allocate(packed_bytes(rows, slid_bytes, size))
            with weight.slide(rows, slid_bytes // size, gpu.stream) as slid:
                pack_weights(
                    self._kernels,
                    dtype,
                    slid.pointer,
                    rows,
                    slid_bytes,
                    packed.pointer,
                    gpu.stream,
                )
                gpu.synchronize()
            weight.drop_values()
            # Whole lines of L2, as in a plan.
            row_length = round_up(pattern.slid_k(layer.k), ROW_MULTIPLE // size)
            q = gpu.allocate((tokens + _MORE_ROWS) * row_length * size)
            scales, y = gpu.allocate(tokens * 4), gpu.allocate(tokens * layer.n * 2)
            x = gpu.random(tokens * layer.k * 2, BF16)
            Quantizer(self._kernels, layer.k, BF16, dtype, pattern, row_length)(
                x.pointer, layer.k, q.pointer, scales.pointer, tokens, tokens, gpu.stream
            )
            gpu.synchronize()
            x.close()
            self._held += [weight, packed, q, scales, y]
            self._parts.append((weight, packed, q, scales, y, slid_bytes, row_length * size))

    def launch(self, index: int, config: HopperConfig) -> Launch:
        """One layer's product."""
        gpu, layer = self._gpu, self._layers[index]
        weight, packed, q, scales, y, slid_bytes, row_bytes = self._parts[index]
        sm_count = self._kernels.limits.sm_count
        cut = tiling(config, layer.n, slid_bytes, self._tokens, sm_count)
        partials, counters = gpu.allocate(cut.partial_bytes), gpu.allocate(4 * cut.counters)
        gpu.set_bytes(counters.pointer, 0, counters.nbytes)
        self._held += [partials, counters]
        gemm = HopperGemm(
            self._kernels,
            self._dtype,
            BF16,
            layer.n,
            slid_bytes,
            row_bytes,
            self._tokens,
            config,
            readable=self._tokens + _MORE_ROWS,
        )
        scaled = operand(self._dtype).scaled

        def launch() -> None:
            gemm(
                packed.pointer,
                q.pointer,
                scales.pointer if scaled else 0,
                weight.scales,
                0,
                y.pointer,
                layer.n,
                partials.pointer,
                counters.pointer,
                gpu.stream,
            )

        return launch

    def close(self) -> None:
        """Give everything back."""
        for held in self._held:
            held.close()


def sequence(works: list[Launch]) -> Launch:
    def launch() -> None:
        for work in works:
            work()

    return launch


def measure(gpu: Gpu, clocks: Clocks, options: argparse.Namespace) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    pattern = Pattern.parse(options.pattern)
    layers = [row for row in model(options.model).layers if row.name in options.layers]
    for m in options.tokens:
        with ExitStack() as stack:
            weights = make_weights(gpu, layers, pattern)
            for memory in weights:
                stack.callback(memory.close)
            graphs: dict[str, Any] = {}
            for dtype in options.dtypes:
                hopper = Hopper(gpu, layers, weights, pattern, dtype, m)
                stack.callback(hopper.close)
                for config in options.configs:
                    works = [hopper.launch(i, config) for i in range(len(layers))]
                    gpu.synchronize()
                    if options.once:
                        sequence(works)()
                        gpu.synchronize()
                    else:
                        name = f"{dtype} {config.name}, groups of {config.tile_group}"
                        graphs[name] = gpu.capture(sequence(works))
                if options.once:
                    continue
                dense = GpuSide(gpu, "dense", layers, weights, pattern, operand(dtype))
                stack.callback(dense.close)
                works = []
                for index, layer in enumerate(layers):
                    x, y = gpu.random(m * layer.k * 2, BF16), gpu.allocate(m * layer.n * 2)
                    stack.callback(x.close)
                    stack.callback(y.close)
                    works.append(dense.gemm(index, m, x.pointer, y.pointer).launch)
                graphs[f"{dtype} dense"] = gpu.capture(sequence(works))
            stack.callback(gpu.synchronize)
            for mode in () if options.once else options.modes:
                if mode == "burst":
                    times = burst(gpu, graphs, rounds=10, clocks=clocks)
                else:
                    times = sustained(gpu, graphs, seconds=options.seconds, clocks=clocks)
                for name, found in times.items():
                    ratio = times[f"{name.split()[0]} dense"].us / found.us
                    mhz = found.clocks["sm_mhz"]
                    print(
                        f"M={m} {mode} {name}: {found.us:.1f} us, {ratio:.3f} of dense, {mhz} MHz"
                    )
                    rows.append(
                        {"m": m, "mode": mode, "name": name, "us": found.us, "ratio": ratio}
                        | found.to_json()
                    )
    return rows


def configs_of(text: str) -> list[HopperConfig]:
    """Read "160,2;128,2,2,0,1,16": fields of HopperConfig in order."""
    made = []
    for part in text.split(";"):
        numbers: list[Any] = [int(word) for word in part.split(",")]
        numbers[3:5] = map(bool, numbers[3:5])
        made.append(HopperConfig(*numbers))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--configs", type=configs_of, default=configs_of("208,2;192,2;160,2;128,2"))
    parser.add_argument("--model", default="qwen2.5-7b")
    parser.add_argument("--layers", nargs="+", default=["qkv", "o", "gate_up", "down"])
    parser.add_argument("--pattern", default="6:8")
    parser.add_argument("--dtypes", nargs="+", default=["int8", "fp8_e4m3"])
    parser.add_argument("--tokens", nargs="+", type=int, default=[16384])
    parser.add_argument("--modes", nargs="+", default=["sustained", "burst"])
    parser.add_argument("--seconds", type=float, default=1.0)
    parser.add_argument("--once", action="store_true", help="launch once, for a profiler")
    options = parser.parse_args()
    gpu = Gpu(0)
    with Clocks(gpu.bus_id()) as clocks:
        rows = measure(gpu, clocks, options)
    document = environment(gpu.facts()) | {
        "what": "hopper-probe",
        "command": command_line(sys.argv),
        "rows": rows,
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
