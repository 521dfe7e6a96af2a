"""Measure what a product within ``jax.jit`` costs by each route, beside the plan alone, on the CPU.

Routes are those of ``slidesparse_rt.jax.sparse_matmul``: XLA's foreign function interface, and
``jax.pure_callback``.  The plan's own time is that of ``run`` on a NumPy array; what is above it is
the price of the route.  Versions take turns in shuffled order within each round and are ranked by
their medians; their outputs are compared first, and if they differ, nothing is reported.

    python benchmarks/jax_call.py
    python benchmarks/jax_call.py --rounds 50 --output result.json
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import random
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

import slidesparse_rt as ss
from slidesparse_rt.bench.record import environment
from slidesparse_rt.jax import sparse_matmul

SEED = 20260305
#: (tokens, N, K): calls that are all overhead, and one with 16 MiB of activations.
CASES = ((1, 64, 64), (64, 64, 1024), (1024, 16, 4096))
ALONE = "plan.run on NumPy"


def versions(plan: ss.SparseGemmPlan, x: Any) -> dict[str, Callable[[], Any]]:
    """Name -> one call that waits for its result."""
    host = np.asarray(x)
    found: dict[str, Callable[[], Any]] = {
        ALONE: lambda: plan.run(host),
        "eager, DLPack": lambda: sparse_matmul(x, plan).block_until_ready(),
    }
    for name, route in (("jit, FFI", "ffi"), ("jit, pure_callback", "callback")):
        product = jax.jit(lambda x, route=route: sparse_matmul(x, plan, route=route))
        found[name] = lambda product=product: product(x).block_until_ready()
    empty = jax.jit(lambda x: x[:, :1] + 1)
    found["jit of nothing much"] = lambda: empty(x).block_until_ready()
    return found


def measure(case: tuple[int, int, int], rounds: int) -> list[dict[str, Any]]:
    """Seconds of each version, for one case."""
    tokens, n, k = case
    rng = np.random.default_rng(SEED)
    weight = ss.prune(rng.standard_normal((n, k), dtype=np.float32), "6:8")
    x = jnp.asarray(rng.standard_normal((tokens, k), dtype=np.float32))
    with ss.SparseGemmPlan(weight, "6:8") as plan:
        calls = versions(plan, x)
        expected = calls[ALONE]().tobytes()
        for name, call in calls.items():
            found = np.asarray(call())
            if name != "jit of nothing much" and found.tobytes() != expected:
                raise SystemExit(f"not measured, because outputs differ: {name}")
        seconds: dict[str, list[float]] = {name: [] for name in calls}
        order = random.Random(SEED)
        for _ in range(rounds):
            for name in order.sample(list(calls), len(calls)):
                start = time.perf_counter()
                calls[name]()
                seconds[name].append(time.perf_counter() - start)
    alone = statistics.median(seconds[ALONE])
    return [
        {
            "tokens": tokens,
            "n": n,
            "k": k,
            "version": name,
            "median_us": 1e6 * statistics.median(times),
            "above_the_plan_us": 1e6 * (statistics.median(times) - alone),
            "seconds": times,
        }
        for name, times in seconds.items()
    ]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=300, help="calls of each version")
    parser.add_argument("--output", type=Path, help="write JSON here")
    arguments = parser.parse_args()
    report: dict[str, Any] = {
        "benchmark": "jax_call",
        "command": shlex.join(["python", "benchmarks/jax_call.py", *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        **environment(None),
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "rounds": arguments.rounds,
        "load_average_before": os.getloadavg()[0],
    }
    report["versions"] |= {"jax": jax.__version__, "jaxlib": jax.lib.__version__}
    report["results"] = [row for case in CASES for row in measure(case, arguments.rounds)]
    report["load_average_after"] = os.getloadavg()[0]
    table = Table("tokens", "N x K", "version", "median, us", "above the plan, us")
    for row in report["results"]:
        shape = f"{row['n']} x {row['k']}"
        numbers = (f"{row['median_us']:.0f}", f"{row['above_the_plan_us']:+.0f}")
        table.add_row(str(row["tokens"]), shape, row["version"], *numbers)
    Console().print(table)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
