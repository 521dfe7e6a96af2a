"""A whole decoder with sparse linear layers, beside the same decoder in bf16 and with dense ones.

    python benchmarks/end_to_end.py OUT.json --patterns 6:8 2:4 --dtypes int8 fp8_e4m3

Qwen2.5-7B's architecture (decoder.py) with random weights, each layer its own.  Sides: ``bf16`` is
torch's linear layer; ``dense`` is SparseGemmPlan(backend="dense") in fp8 with both scale vectors
fused, so quantization is our kernel's too, the strongest dense side there is; a sparse side, one
for each format, is SparseGemmPlan(backend="auto") on the same weights pruned.  **Prefill**: M
tokens as sequences of at most --sequence tokens, logits of the last of each.  **Decode**: one token
for each of M sequences that have --context tokens behind them.  A pass is one CUDA graph.  The
sides of a pattern take turns; each replays for at least --seconds a round, and the median round is
the figure.

``linear_us`` is a graph of the linear layers alone, on inputs of their own: what is left of the
pass is attention, norms, gates and the head, the same on all sides.

Outputs are checked before anything is timed: a sparse side's logits against the same pruned weights
in bf16.  That the products are exact is tested in tests/gpu.
"""

from __future__ import annotations

import argparse
import gc
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from decoder import LAYERS, Cache, Decoder, Linear, Sizes

import slidesparse_rt as ss
from slidesparse_rt.bench.record import command_line, environment, write_json
from slidesparse_rt.bench.shapes import model

#: What config.json of Qwen2.5-7B says beside the shapes that bench/shapes.py has.
BLOCKS, VOCABULARY = 28, 152_064
#: Cosine between a sparse side's logits and those of its weights in bf16, at least.
LEAST_COSINE = 0.9


def sizes_of(blocks: int) -> Sizes:
    """Qwen2.5-7B's, with so many blocks."""
    row = model("qwen2.5-7b")
    return Sizes(
        row.hidden,
        row.heads,
        row.kv_heads,
        row.head_size,
        row.intermediate,
        blocks,
        VOCABULARY,
    )


def random_weights(sizes: Sizes, device: str, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    """bf16 weights of every block, normally distributed so that activations keep their size."""
    draw = torch.Generator(device=device).manual_seed(seed)
    made = []
    for _ in range(sizes.blocks):
        block = {}
        for name in LAYERS:
            n, k = sizes.layer(name)
            w = torch.empty((n, k), dtype=torch.bfloat16, device=device)
            block[name] = w.normal_(0.0, k**-0.5, generator=draw)
        made.append(block)
    return made


@dataclass(slots=True)
class Side:
    """One way of running the linear layers.

    ``linears`` are those of every block; ``close`` gives plans and their memory back.
    """

    name: str
    linears: list[dict[str, Linear]]
    plans: list[ss.SparseGemmPlan]

    @property
    def nbytes(self) -> int:
        """Bytes that its plans hold."""
        return sum(plan.nbytes for plan in self.plans)

    def close(self) -> None:
        """Give its memory back."""
        self.linears.clear()
        for plan in self.plans:
            plan.close()
        self.plans.clear()


def bf16_side(weights: Sequence[dict[str, torch.Tensor]], name: str = "bf16") -> Side:
    """Linear layers of torch itself."""

    def linear(w: torch.Tensor) -> Linear:
        return lambda x: F.linear(x, w)

    return Side(name, [{key: linear(w) for key, w in block.items()} for block in weights], [])


def plan_side(
    name: str,
    weights: Sequence[dict[str, torch.Tensor]],
    pattern: str,
    dtype: str,
    *,
    backend: str,
    tuning: str,
    workspace: ss.Workspace | None,
) -> Side:
    """Plans of every layer, which share one workspace."""
    side = Side(name, [], [])
    options = ss.PlanOptions(workspace=workspace)
    for block in weights:
        made: dict[str, Linear] = {}
        for key, w in block.items():
            pruned = w if pattern == "dense" else ss.prune(w, pattern)
            chosen = {"tuning": tuning} if backend == "auto" else {}
            plan = ss.SparseGemmPlan(
                pruned,
                pattern,
                dtype=dtype,
                backend=backend,
                device=str(w.device),
                options=options,
                **chosen,
            )
            side.plans.append(plan)
            made[key] = plan.run
        side.linears.append(made)
    return side


@dataclass(frozen=True, slots=True)
class Captured:
    """A graph, and the work that it was made of: what that holds, every replay reads."""

    graph: torch.cuda.CUDAGraph
    work: Callable[[], object]

    def replay(self) -> None:
        """Launch it."""
        self.graph.replay()


class Runner:
    """Captures and times passes on one GPU."""

    def __init__(self, seconds: float, rounds: int) -> None:
        self.seconds, self.rounds = seconds, rounds
        self.stream = torch.cuda.Stream()
        self.pool = torch.cuda.graph_pool_handle()

    def capture(self, work: Callable[[], object]) -> Captured:
        """A graph of ``work``, run twice before."""
        # What it reads was made on the current stream.
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(2):
                work()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self.pool, stream=self.stream):
            work()
        torch.cuda.synchronize()
        return Captured(graph, work)

    def times(self, graphs: dict[str, Captured]) -> dict[str, list[float]]:
        """Microseconds of a replay in each round; sides take turns."""
        found: dict[str, list[float]] = {name: [] for name in graphs}
        for _ in range(self.rounds):
            for name, graph in graphs.items():
                begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                done, started = 0, time.perf_counter()
                graph.replay()
                torch.cuda.synchronize()
                # A few at a time, so that the host is never what is timed.
                together = 4 if 4 * (time.perf_counter() - started) < self.seconds else 1
                begin.record()
                while done == 0 or time.perf_counter() - started < self.seconds:
                    for _ in range(together):
                        graph.replay()
                    done += together
                    if together == 1 or done % 16 == 0:
                        torch.cuda.synchronize()
                end.record()
                torch.cuda.synchronize()
                found[name].append(begin.elapsed_time(end) * 1e3 / done)
        return found


def linear_inputs(sizes: Sizes, tokens: int, device: str) -> dict[str, torch.Tensor]:
    """What the linear layers alone are run on."""
    draw = torch.Generator(device=device).manual_seed(1)
    return {
        key: torch.empty(
            (tokens, sizes.layer(key)[1]), dtype=torch.bfloat16, device=device
        ).normal_(generator=draw)
        for key in LAYERS
    }


def linear_work(side: Side, inputs: dict[str, torch.Tensor]) -> Callable[[], None]:
    """All linear layers of a pass, on inputs of their own."""

    def work() -> None:
        for block in side.linears:
            for key in LAYERS:
                block[key](inputs[key])

    return work


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    """Cosine of the angle between two tensors."""
    return float(F.cosine_similarity(a.double().flatten(), b.double().flatten(), dim=0))


def check(side: Side, weights: Any, pattern: str, sizes: Sizes, tables: Any) -> float:
    """Cosine of the logits of a few blocks with those of the same weights in bf16.

    SystemExit where they are not alike.
    """
    few = replace(sizes, blocks=2)
    ids = torch.arange(96, device=tables[0].device).view(2, 48) * 7 % sizes.vocabulary
    same = [{key: ss.prune(w, pattern) for key, w in block.items()} for block in weights[:2]]
    wanted = Decoder(few, bf16_side(same).linears, *tables, longest=64).prefill(ids)
    found = Decoder(few, side.linears[:2], *tables, longest=64).prefill(ids)
    alike = cosine(found, wanted)
    if alike < LEAST_COSINE:
        raise SystemExit(f"{side.name}: logits of two blocks have cosine {alike:.3f} with bf16")
    return alike


def passes(
    side: Side, sizes: Sizes, tables: Any, options: argparse.Namespace, phase: str, m: int
) -> Callable[[], torch.Tensor]:
    """What one replay of a phase runs for M tokens."""
    device = tables[0].device
    if phase == "prefill":
        length = min(m, options.sequence)
        decoder = Decoder(
            sizes, side.linears, *tables, longest=length, compiled=not options.no_compile
        )
        ids = torch.randint(0, sizes.vocabulary, (m // length, length), device=device)
        return lambda: decoder.prefill(ids)
    past = options.context
    decoder = Decoder(
        sizes, side.linears, *tables, longest=past + 1, compiled=not options.no_compile
    )
    cache = Cache(sizes, m, past + 1, tables[0])
    cache.memory.normal_()
    ids = torch.randint(0, sizes.vocabulary, (m,), device=device)
    return lambda: decoder.step(ids, cache, past)


def measure(
    sides: Sequence[Side], sizes: Sizes, tables: Any, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for each side, phase and number of tokens."""
    runner = Runner(options.seconds, options.rounds)
    cases = [("prefill", m) for m in options.prefill] + [("decode", m) for m in options.decode]
    for phase, m in cases:
        whole, linear = {}, {}
        inputs = linear_inputs(sizes, m, str(tables[0].device))
        for side in sides:
            for plan in side.plans:
                plan.prepare([m], x_dtype="bfloat16", stream=runner.stream)
            whole[side.name] = runner.capture(passes(side, sizes, tables, options, phase, m))
            linear[side.name] = runner.capture(linear_work(side, inputs))
        times, alone = runner.times(whole), runner.times(linear)
        medians = {name: statistics.median(found) for name, found in times.items()}
        for side in sides:
            used = {plan.backend_for(m) for plan in side.plans}
            us = medians[side.name]
            yield {
                "phase": phase,
                "m": m,
                "side": side.name,
                "us": us,
                "rounds_us": times[side.name],
                "tokens_per_s": m / us * 1e6,
                "linear_us": statistics.median(alone[side.name]),
                "ratio": {
                    name: medians[name] / us for name in ("bf16", "dense") if name in medians
                },
                "backends": sorted(used),
                "bytes": side.nbytes,
            }
        whole.clear()
        linear.clear()
        gc.collect()
        torch.cuda.empty_cache()


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--patterns", nargs="+", default=["6:8", "2:4", "4:6", "8:10"])
    parser.add_argument("--dtypes", nargs="+", default=["int8", "fp8_e4m3"])
    parser.add_argument("--prefill", nargs="*", type=int, default=[512, 2048, 8192, 32768])
    parser.add_argument("--decode", nargs="*", type=int, default=[16, 64, 256, 512])
    parser.add_argument("--sequence", type=int, default=2048)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--blocks", type=int, default=BLOCKS)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tuning", default="cached", choices=["cached", "measure", "heuristic"])
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--commit")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure and write the file."""
    from slidesparse_rt.bench.timing import Gpu

    options = parse(sys.argv[1:])
    device = "cuda:0"
    sizes = sizes_of(options.blocks)
    weights = random_weights(sizes, device)
    draw = torch.Generator(device=device).manual_seed(2)
    shape = (sizes.vocabulary, sizes.hidden)
    tables = [
        torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, scale, generator=draw)
        for scale in (1.0, sizes.hidden**-0.5)
    ]
    workspace = ss.Workspace(device)
    settings = {"backend": "dense", "tuning": "heuristic", "workspace": workspace}
    dense = plan_side("dense", weights, "dense", "fp8_e4m3", **settings)
    document: dict[str, Any] = environment(Gpu(0).facts(), commit=options.commit) | {
        "what": "end-to-end",
        "command": command_line(sys.argv),
        "model": "qwen2.5-7b",
        "settings": {key: str(value) for key, value in vars(options).items()},
        "linear_weights": sizes.linear_weights,
        "complete": False,
        "rows": [],
    }
    with torch.inference_mode():
        for pattern in options.patterns:
            sides = []
            cosines: dict[str, float] = {}
            for dtype in options.dtypes:
                side = plan_side(
                    f"{pattern} {dtype}",
                    weights,
                    pattern,
                    dtype,
                    backend="auto",
                    tuning=options.tuning,
                    workspace=workspace,
                )
                sides.append(side)
                cosines[side.name] = check(side, weights, pattern, sizes, tables)
                print(
                    f"{side.name}: cosine of logits with bf16 {cosines[side.name]:.4f}", flush=True
                )
            for row in measure([bf16_side(weights), dense, *sides], sizes, tables, options):
                known = {"pattern": pattern, "cosine": cosines.get(row["side"])}
                document["rows"].append(row | known)
                print(
                    f"{pattern} {row['phase']} M={row['m']} {row['side']}: "
                    f"{row['us']:.0f} us, {row['tokens_per_s']:.0f} tokens/s, linear layers "
                    f"{row['linear_us']:.0f} us, {row['ratio']}",
                    flush=True,
                )
                write_json(options.output, document)
            for side in sides:
                side.close()
    dense.close()
    workspace.close()
    write_json(options.output, document | {"complete": True})


if __name__ == "__main__":
    main()
