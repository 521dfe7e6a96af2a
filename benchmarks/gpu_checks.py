"""Two measurements on a GPU that are not about time per run: sum errors, and packing a 7B model.

    python benchmarks/gpu_checks.py --output benchmarks/results/gpu-checks-<gpu>.json

**Sum errors**: the largest error of a backend's sums, relative to the sum of the products'
magnitudes, against float64 on the same quantized operands (docs/numerics.md quotes it).
**Packing**: seconds to check, quantize, slide and compress every linear layer of Qwen2.5-7B's
shapes (28 layers), from pruned bfloat16 weights on the GPU to plans that are ready to run.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

import slidesparse_rt as ss
from slidesparse_rt.arrays import Device
from slidesparse_rt.backends import Problem, choose
from slidesparse_rt.bench.record import command_line, environment, write_json
from slidesparse_rt.bench.shapes import model
from slidesparse_rt.bench.timing import Gpu
from slidesparse_rt.dtypes import operand
from slidesparse_rt.packing import quantize, quantize_tokens
from slidesparse_rt.pattern import Pattern


def able(*sides: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """Those of (backend, operand format) that this GPU can run; says which it cannot."""
    pattern = Pattern.parse("6:8")
    for backend, dtype in sides:
        try:
            choose(backend, Problem(512, 128, pattern, operand(dtype)), Device("cuda", 0))
        except ss.BackendUnavailable as error:
            print(f"{backend} {dtype}: left out: {error}", flush=True)
        else:
            yield backend, dtype


def sum_errors(backend: str, dtype: str) -> list[dict[str, Any]]:
    rows = []
    for k in (128, 1024, 4096, 18_944):
        rng = np.random.default_rng(k)
        w = ss.prune(rng.standard_normal((512, k), dtype=np.float32), "6:8")
        x = rng.standard_normal((256, k), dtype=np.float32)
        with ss.SparseGemmPlan(w, "6:8", dtype=dtype, backend=backend, device="cuda") as plan:
            y = plan.run(torch.from_numpy(x).cuda()).cpu().numpy().astype(np.float64)
        left, left_scales = quantize_tokens(x, operand(dtype))
        right, right_scales = quantize(w, dtype)
        a, b = left.astype(np.float64), right.astype(np.float64)
        if left_scales is not None:
            a *= left_scales.astype(np.float64)[:, None]
            b *= right_scales.astype(np.float64)[:, None]
        error = np.abs(y - a @ b.T) / (np.abs(a) @ np.abs(b).T)
        rows.append({"backend": backend, "dtype": dtype, "k": k, "largest": float(error.max())})
    return rows


def packing(backend: str, dtype: str) -> dict[str, Any]:
    layers = model("qwen2.5-7b").layers
    pruned = [
        ss.prune(torch.randn((layer.n, layer.k), device="cuda", dtype=torch.bfloat16), "6:8")
        for layer in layers
    ]
    for weight in pruned:  # compiles the kernels
        ss.SparseGemmPlan(weight, "6:8", dtype=dtype, backend=backend).close()
    torch.cuda.synchronize()
    start = time.perf_counter()
    plans = [
        ss.SparseGemmPlan(weight, "6:8", dtype=dtype, backend=backend)
        for _ in range(28)
        for weight in pruned
    ]
    torch.cuda.synchronize()
    seconds = time.perf_counter() - start
    held = sum(plan.nbytes for plan in plans)
    for plan in plans:
        plan.close()
    weights = 28 * sum(layer.n * layer.k for layer in layers)
    return {
        "backend": backend,
        "dtype": dtype,
        "seconds": seconds,
        "weights": weights,
        "held_bytes": held,
    }


def main() -> None:
    """Measure both, print them, write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--commit", help="the commit that runs, for a copy without git's record")
    options = parser.parse_args()
    facts = Gpu(0).facts()
    errors, packed = [], []
    for backend, dtype in able(
        ("hopper", "int8"),
        ("hopper", "fp8_e4m3"),
        ("hopper", "bf16"),
        ("hopper", "fp16"),
        ("cusparselt", "int8"),
        ("cusparselt", "fp8_e4m3"),
        ("cusparselt", "bf16"),
        ("dense", "int8"),
        ("dense", "fp8_e4m3"),
        ("dense", "bf16"),
        ("dense", "fp16"),
    ):
        errors += sum_errors(backend, dtype)
        print(backend, dtype, [f"{row['largest']:.2e}" for row in errors[-4:]], flush=True)
    for backend, dtype in able(
        ("hopper", "int8"),
        ("hopper", "fp8_e4m3"),
        ("cusparselt", "int8"),
        ("cusparselt", "fp8_e4m3"),
        ("dense", "int8"),
        ("dense", "fp8_e4m3"),
    ):
        packed.append(packing(backend, dtype))
        print(packed[-1], flush=True)
    document = environment(facts, commit=options.commit) | {
        "what": "gpu-checks",
        "command": command_line(sys.argv),
        "sum_errors": errors,
        "packing": packed,
    }
    write_json(options.output, document)


if __name__ == "__main__":
    main()
