"""Kernels on the GPU at hand: right first, then their rate beside a device-to-device copy.

    python benchmarks/quantize_probe.py OUT.json [--quick]

Checks every kernel against the NumPy definition (the checks of tests/gpu), then measures
quantize+lift and dequantize in several configurations, the host time of a launch, and the weight
kernels.  Rates are bytes that must move (each input read once, each output written once) over the
median time; versions take turns in shuffled order, and inputs rotate past the L2 cache.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import kernel_checks as checks  # noqa: E402
from gpu.kernel_machine import GpuMachine  # noqa: E402

from slidesparse_rt.dtypes import array_type, operand  # noqa: E402
from slidesparse_rt.errors import SlideSparseError  # noqa: E402
from slidesparse_rt.ffi.libraries import load  # noqa: E402
from slidesparse_rt.kernels import catalog  # noqa: E402
from slidesparse_rt.kernels.compiler import Nvrtc  # noqa: E402
from slidesparse_rt.kernels.geometry import quantize_config  # noqa: E402
from slidesparse_rt.kernels.launch import Dequantizer, Quantizer  # noqa: E402
from slidesparse_rt.kernels.weight_launch import WeightKernels  # noqa: E402
from slidesparse_rt.pattern import Pattern  # noqa: E402

TORCH = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
#: Elements of a measured input, at least.
ELEMENTS = 1 << 27
ROUNDS, BATCH = 12, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", type=Path)
    parser.add_argument("--quick", action="store_true", help="fewer configurations")
    parser.add_argument("--no-check", action="store_true", help="measure only")
    options = parser.parse_args()
    machine = GpuMachine()
    record: dict[str, Any] = {"machine": describe(machine), "argv": sys.argv[1:]}
    print(" | ".join(f"{key} {value}" for key, value in record["machine"].items()))
    if not options.no_check:
        record["checks"] = check_all(machine)
    copy = copy_rate()
    record["copy_bytes_per_s"] = copy
    print(f"device-to-device copy: {copy / 1e12:.3f} TB/s, bytes read and written")
    record["quantize"] = measure_quantize(machine, copy, quick=options.quick)
    record["dequantize"] = measure_dequantize(machine, copy, quick=options.quick)
    record["small"] = measure_small(machine)
    record["host_us"] = measure_host(machine)
    record["weights"] = measure_weights(machine)
    record["copy_after_bytes_per_s"] = copy_rate()
    print(f"copy again: {record['copy_after_bytes_per_s'] / 1e12:.3f} TB/s")
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record, indent=1) + "\n")


def describe(machine: GpuMachine) -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0"]
    driver = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False, cwd=ROOT
    ).stdout.strip()
    return {
        "gpu": properties.name,
        "driver": driver or "unknown",
        "sms": machine.kernels.limits.sm_count,
        "torch": torch.__version__,
        "nvrtc": ".".join(map(str, Nvrtc(load("nvrtc")).version)),
        "commit": commit or "unknown",
    }


# --- right first ----------------------------------------------------------------------------------


def check_all(machine: GpuMachine) -> dict[str, str]:
    """Run a selection of tests/gpu/test_kernels.py; stop at nothing, and report everything."""
    rng = np.random.default_rng(1)
    six = Pattern.parse("6:8")
    cases: dict[str, Callable[[], Any]] = {}
    for out in ("int8", "fp8_e4m3", "bf16", "fp16"):
        for name in ("2:4", "4:6", "6:8", "8:10", "30:32", "dense"):
            x = checks.tokens(rng, 40, 2000, "bfloat16")
            cases[f"quantize bf16->{out} {name}"] = lambda x=x, out=out, name=name: (
                checks.check_quantize(machine, x, out, Pattern.parse(name), pad_rows=3)
            )
        for x_type in ("float32", "float16"):
            x = checks.tokens(rng, 60, 4096, x_type)
            cases[f"quantize {x_type}->{out}"] = lambda x=x, out=out: checks.check_quantize(
                machine, x, out, six, pad_chunks=2
            )
        for columns in (3, 1001, 18_944, 40_000, 65_536, 100_000):
            x = checks.tokens(rng, 10, columns, "bfloat16")
            cases[f"quantize K={columns}->{out}"] = lambda x=x, out=out: checks.check_quantize(
                machine, x, out, six
            )
    for acc in ("int32", "float32", "bfloat16"):
        for out in TORCH:
            a = checks.accumulators(rng, 70, 1027, acc)
            cases[f"dequantize {acc}->{out}"] = lambda a=a, out=out: checks.check_dequantize(
                machine, np.random.default_rng(2), a, out, acc_pad=1
            )
            b = checks.accumulators(rng, 70, 1024, acc)
            cases[f"dequantize {acc}->{out} 16-byte"] = lambda b=b, out=out: (
                checks.check_dequantize(machine, np.random.default_rng(2), b, out)
            )
    for dtype in ("int8", "float8_e4m3fn", "bfloat16"):
        w = checks.sparse_values(rng, 50, 2005, dtype, six)
        cases[f"slide {dtype}"] = lambda w=w: checks.check_slide(machine, w, six)
        cases[f"check {dtype}"] = lambda w=w: checks.check_check(machine, w, six)
    w = rng.standard_normal((50, 2005)).astype(np.float32)
    norms = rng.random(2005).astype(np.float32)
    cases["prune magnitude"] = lambda: checks.check_prune(machine, w, six, None, in_place=False)
    cases["prune wanda"] = lambda: checks.check_prune(machine, w, six, norms, in_place=False)
    cases["weights int8"] = lambda: checks.check_weight_quantize(machine, w, "int8")
    cases["weights fp8"] = lambda: checks.check_weight_quantize(machine, w, "fp8_e4m3")
    failed: dict[str, str] = {}
    for title, case in cases.items():
        try:
            case()
        except (AssertionError, SlideSparseError) as error:
            failed[title] = str(error)[:300]
    print(f"checks: {len(cases) - len(failed)} of {len(cases)} passed")
    for title, why in list(failed.items())[:12]:
        print(f"  FAILED {title}: {why}")
    return {"passed": str(len(cases) - len(failed)), "cases": str(len(cases)), **failed}


# --- timing ---------------------------------------------------------------------------------------


def race(versions: dict[str, Callable[[int], None]], sets: int) -> dict[str, float]:
    """Median seconds of a launch of each version; a version takes the number of its input set."""
    for version in versions.values():
        for i in range(sets):
            version(i)
    torch.cuda.synchronize()
    times: dict[str, list[float]] = {name: [] for name in versions}
    names = list(versions)
    turn = 0
    for _ in range(ROUNDS):
        random.shuffle(names)
        for name in names:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            versions[name]((turn := turn + 1) % sets)
            start.record()
            for _ in range(BATCH):
                versions[name]((turn := turn + 1) % sets)
            stop.record()
            stop.synchronize()
            times[name].append(start.elapsed_time(stop) / 1e3 / BATCH)
    return {name: statistics.median(values) for name, values in times.items()}


def rotating(
    go: Callable[..., None], addresses: list[int], rest: tuple[int, ...]
) -> Callable[[int], None]:
    """Launch with one input set after another."""
    return lambda i: go(addresses[i], *rest)


def copy_rate() -> float:
    source = [torch.randint(0, 255, (1 << 29,), dtype=torch.uint8, device="cuda") for _ in range(2)]
    target = torch.empty_like(source[0])

    def copy(i: int) -> None:
        target.copy_(source[i])

    seconds = race({"copy": copy}, 2)["copy"]
    return 2 * target.nbytes / seconds


def row(title: str, nbytes: int, seconds: float, copy: float, extra: str = "") -> dict[str, Any]:
    rate = nbytes / seconds
    print(f"{title:<46} {seconds * 1e6:8.1f} us {rate / 1e12:6.3f} TB/s {rate / copy:5.2f} {extra}")
    return {"title": title, "bytes": nbytes, "seconds": seconds, "of_copy": rate / copy}


def measure_quantize(machine: GpuMachine, copy: float, *, quick: bool) -> list[dict[str, Any]]:
    limit = machine.kernels.limits.shared_bytes
    shapes = [
        (3584, "bfloat16", "int8", "6:8"),
        (3584, "bfloat16", "fp8_e4m3", "6:8"),
        (4096, "bfloat16", "int8", "6:8"),
        (8192, "bfloat16", "int8", "6:8"),
        (18_944, "bfloat16", "int8", "6:8"),
        (18_944, "bfloat16", "fp8_e4m3", "6:8"),
        (28_672, "bfloat16", "int8", "6:8"),
        (65_536, "bfloat16", "int8", "6:8"),
        (1024, "bfloat16", "int8", "6:8"),
        (4096, "bfloat16", "int8", "2:4"),
        (4096, "bfloat16", "int8", "4:6"),
        (4096, "bfloat16", "int8", "dense"),
        (4096, "float32", "int8", "6:8"),
        (4096, "float16", "fp8_e4m3", "6:8"),
        (4096, "bfloat16", "bf16", "6:8"),
        (4100, "bfloat16", "int8", "6:8"),
        (4097, "bfloat16", "int8", "6:8"),
    ]
    rows = []
    for columns, x_type, out, name in shapes:
        pattern = Pattern.parse(name)
        size = operand(out).dtype.itemsize
        tokens = -(-ELEMENTS // columns)
        length = -(-pattern.slid_k(columns) * size // 16) * 16 // size
        x = [torch.randn((tokens, columns), device="cuda", dtype=TORCH[x_type]) for _ in range(2)]
        q = torch.empty((tokens, length * size), device="cuda", dtype=torch.uint8)
        scales = torch.empty(tokens, device="cuda")
        launchers: dict[str, Quantizer] = {}
        default = quantize_config(columns, x_type, out, pattern, shared_limit=limit)
        configs = {"rule": default}
        if not quick:
            for vectors in (2, 4, 8):
                config = quantize_config(
                    columns, x_type, out, pattern, shared_limit=limit, vectors=vectors
                )
                if config != default:
                    configs[f"v{config.vectors}"] = config
            if columns > 32_768:
                configs["tiled"] = quantize_config(
                    columns, x_type, out, pattern, shared_limit=limit, vectors=4, threads=512
                )
        for label, config in configs.items():
            for blocks in (None,) if quick or label != "rule" else (None, 1 << 14):
                launchers[label + ("" if blocks is None else " all")] = Quantizer(
                    machine.kernels,
                    columns,
                    x_type,
                    out,
                    pattern,
                    length,
                    config=config,
                    blocks_per_sm=blocks,
                )
        at = [each.data_ptr() for each in x]
        rest = (columns, q.data_ptr(), scales.data_ptr(), tokens, tokens, machine.stream)
        versions = {label: rotating(go, at, rest) for label, go in launchers.items()}
        nbytes = x[0].nbytes + q.nbytes + (scales.nbytes if operand(out).scaled else 0)
        for label, seconds in sorted(race(versions, 2).items()):
            go = launchers[label]
            config = go.config
            shape = f"V{config.vectors} T{config.threads} R{config.rows}"
            shape += " tiled" if config.tile else ""
            busy = machine.kernels.occupancy(go.kernel, config.threads, config.shared_bytes)
            shape += f" {go.kernel.resources.registers}r {busy}/SM a{go.access}"
            title = f"quantize {name} {x_type[:4]}->{out} K={columns} {label}"
            rows.append(row(title, nbytes, seconds, copy, shape) | asdict(config))
        del x, q
    return rows


def measure_dequantize(machine: GpuMachine, copy: float, *, quick: bool) -> list[dict[str, Any]]:
    rows = []
    shapes = [(3584, "int32"), (4608, "int32"), (37_888, "int32"), (4608, "bfloat16")]
    shapes += [(4608, "float32"), (3585, "int32")]
    for columns, acc_type in shapes:
        tokens = -(-ELEMENTS // 2 // columns)
        if acc_type == "int32":
            acc = [
                torch.randint(-(2**20), 2**20, (tokens, columns), device="cuda", dtype=torch.int32)
                for _ in range(2)
            ]
        else:
            kind = TORCH[acc_type]
            acc = [torch.randn((tokens, columns), device="cuda", dtype=kind) for _ in range(2)]
        out = torch.empty((tokens, columns), device="cuda", dtype=torch.bfloat16)
        token, channel, bias = (torch.rand(n, device="cuda") for n in (tokens, columns, columns))
        specs = {"rule": catalog.dequantize(acc_type, "bfloat16")}
        if not quick:
            for wide, tall, batch in ((4, 8, 8), (4, 16, 4), (4, 4, 4), (8, 8, 4), (8, 4, 2)):
                specs[f"c{wide} r{tall} b{batch}"] = catalog.dequantize(
                    acc_type, "bfloat16", columns=wide, rows=tall, batch=batch
                )
        launchers = {
            label: Dequantizer(machine.kernels, columns, acc_type, "bfloat16", spec=spec)
            for label, spec in specs.items()
        }
        at = [each.data_ptr() for each in acc]
        vectors = (token.data_ptr(), channel.data_ptr(), bias.data_ptr())
        rest = (columns, out.data_ptr(), columns, *vectors, tokens, machine.stream)
        versions = {label: rotating(go, at, rest) for label, go in launchers.items()}
        nbytes = acc[0].nbytes + out.nbytes + token.nbytes + channel.nbytes + bias.nbytes
        for label, seconds in sorted(race(versions, 2).items()):
            registers = launchers[label].kernel.resources.registers
            title = f"dequantize {acc_type}->bf16 N={columns} {label}"
            rows.append(row(title, nbytes, seconds, copy, f"{registers}r"))
    return rows


def measure_small(machine: GpuMachine) -> list[dict[str, Any]]:
    """Few tokens: microseconds of the kernel alone, launched from a graph of 50."""
    rows = []
    for columns in (3584, 18_944):
        for tokens in (1, 16, 64, 256):
            x = torch.randn((tokens, columns), device="cuda", dtype=torch.bfloat16)
            pattern = Pattern.parse("6:8")
            length = -(-pattern.slid_k(columns) // 16) * 16
            q = torch.empty((tokens, length), device="cuda", dtype=torch.int8)
            scales = torch.empty(tokens, device="cuda")
            for vectors in (1, 2, None):
                limit = machine.kernels.limits.shared_bytes
                config = quantize_config(
                    columns, "bfloat16", "int8", pattern, shared_limit=limit, vectors=vectors
                )
                if config.tile:
                    continue
                go = Quantizer(
                    machine.kernels, columns, "bfloat16", "int8", pattern, length, config=config
                )
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    stream = torch.cuda.current_stream().cuda_stream
                    for _ in range(50):
                        go(
                            x.data_ptr(),
                            columns,
                            q.data_ptr(),
                            scales.data_ptr(),
                            tokens,
                            tokens,
                            stream,
                        )
                seconds = race({"graph": lambda _, graph=graph: graph.replay()}, 1)["graph"] / 50
                shape = f"V{config.vectors} T{config.threads}"
                print(f"quantize M={tokens:<4} K={columns:<6} {shape:<10} {seconds * 1e6:6.2f} us")
                rows.append(
                    {"tokens": tokens, "columns": columns, "seconds": seconds} | asdict(config)
                )
    return rows


def measure_host(machine: GpuMachine) -> dict[str, float]:
    """Host microseconds of a launch, the queue kept short."""
    x = torch.randn((1, 512), device="cuda", dtype=torch.bfloat16)
    q = torch.empty((1, 768), device="cuda", dtype=torch.int8)
    y = torch.empty((1, 192), device="cuda", dtype=torch.bfloat16)
    scales = torch.empty(1, device="cuda")
    pattern = Pattern.parse("6:8")
    quantize = Quantizer(machine.kernels, 512, "bfloat16", "int8", pattern, 768)
    dequantize = Dequantizer(machine.kernels, 192, "int32", "bfloat16")
    x_at, q_at, y_at, s_at = (t.data_ptr() for t in (x, q, y, scales))
    calls: dict[str, Callable[[], None]] = {
        "quantize": lambda: quantize(x_at, 512, q_at, s_at, 1, 1, machine.stream),
        "dequantize": lambda: dequantize(q_at, 192, y_at, 192, s_at, 0, 0, 1, machine.stream),
    }
    found = {}
    for name, call in calls.items():
        samples = []
        for _ in range(50):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for _ in range(50):
                call()
            samples.append((time.perf_counter() - start) / 50 * 1e6)
        found[name] = statistics.median(samples)
        print(f"host time of a {name} launch: {found[name]:.2f} us")
    return found


def measure_weights(machine: GpuMachine) -> list[dict[str, Any]]:
    pattern = Pattern.parse("6:8")
    n, k = 37_888, 3584
    w = torch.randn((n, k), device="cuda", dtype=torch.bfloat16)
    pruned, norms = torch.empty_like(w), torch.rand(k, device="cuda", dtype=torch.float64)
    q = torch.empty((n, k), device="cuda", dtype=torch.int8)
    slid = torch.empty((n, pattern.slid_k(k)), device="cuda", dtype=torch.int8)
    scales = torch.empty(n, device="cuda")
    found = torch.zeros(WeightKernels.FINDINGS_BYTES, device="cuda", dtype=torch.uint8)
    arrays = WeightKernels(machine.kernels, array_type("bfloat16").name, pattern)
    values = WeightKernels(machine.kernels, "int8", pattern)
    stream, row_bytes = machine.stream, 2 * k
    steps: dict[str, tuple[int, Callable[[int], None]]] = {
        "check": (
            w.nbytes,
            lambda _: arrays.check(pruned.data_ptr(), row_bytes, n, k, found.data_ptr(), stream),
        ),
        "prune magnitude": (
            2 * w.nbytes,
            lambda _: arrays.prune_magnitude(
                w.data_ptr(), row_bytes, pruned.data_ptr(), row_bytes, n, k, stream
            ),
        ),
        "prune wanda": (
            2 * w.nbytes,
            lambda _: arrays.prune_wanda(
                w.data_ptr(),
                row_bytes,
                pruned.data_ptr(),
                row_bytes,
                norms.data_ptr(),
                n,
                k,
                stream,
            ),
        ),
        "quantize": (
            w.nbytes + q.nbytes,
            lambda _: arrays.quantize(
                "int8", pruned.data_ptr(), k, q.data_ptr(), k, scales.data_ptr(), n, k, stream
            ),
        ),
        "slide": (
            q.nbytes + slid.nbytes,
            lambda _: values.slide(
                q.data_ptr(),
                k,
                slid.data_ptr(),
                slid.shape[1],
                n,
                n,
                k,
                found.data_ptr(),
                stream,
            ),
        ),
    }
    steps["prune magnitude"][1](0)
    rows = []
    for name, (nbytes, step) in steps.items():
        seconds = race({name: step}, 1)[name]
        print(f"weights {name:<16} {seconds * 1e6:8.1f} us {nbytes / seconds / 1e12:6.3f} TB/s")
        rows.append({"step": name, "shape": [n, k], "bytes": nbytes, "seconds": seconds})
    return rows


if __name__ == "__main__":
    main()
