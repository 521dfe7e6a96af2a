"""``slidesparse bench gemm``: sparse against dense over the linear layers of a model.

Two stages, each over all layers of a model in the order in which the model runs them, captured as
one CUDA graph, so that every layer finds its weight as cold in the cache as a model would:

gemm
    The matrix products alone, on operands that are quantized (and lifted) already: cuSPARSELt
    against cuBLASLt on the same operands without lifting.  Both write what their library can:
    int32 or float32 sums; the dense fp8 product has both scale vectors fused and writes bf16.
op
    The whole operator, ``SparseGemmPlan.run``: bf16 in, quantize and lift, multiply, scale, bf16
    out.

``ratio`` is dense time over sparse time of the same operand format.  ``ratio_best_8bit`` compares
with the better of dense int8 and fp8, chosen layer by layer, whatever the sparse format;
``bound`` is what 2x sparse tensor cores allow at most, N/(N-1).  Layers are also timed one by one
("layer_us"); there, a layer that fits the cache finds its weight in it.

Outputs of the very graphs that are timed are compared with exact arithmetic first (see
:mod:`~slidesparse_rt.bench.checks`); a case that fails has no numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..arrays import NDArray
from ..dtypes import Operand, array_type, operand
from ..errors import OptionError
from ..pattern import Pattern
from .checks import Exact, check_poison, check_result, check_sums, exact, sample
from .clocks import Clocks
from .record import FAILURES, Budget, Record, reason_of
from .shapes import Layer, Model, model
from .sides import BF16, WORKSPACE, GpuSide, Output, Side, Work, make_weights
from .timing import Gpu, Graph, Memory, Times, burst, sustained

__all__ = ["LIBRARIES", "SIDES", "GemmSettings", "complete_rows", "run_gemm"]

#: Libraries without which nothing can be compared.
LIBRARIES = ("cusparseLt", "cublasLt", "nvrtc")
#: The backends that are compared.
SPARSE, DENSE = SIDES = ("cusparselt", "dense")
STAGES = ("gemm", "op")
#: Formats of which the better dense one is the strongest baseline.
_EIGHT_BIT = ("int8", "fp8_e4m3")
#: Tokens and channels that are checked.
_TOKENS, _CHANNELS = 8, 64


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmSettings:
    """What to measure.

    Attributes
    ----------
    models, tokens, dtypes, patterns:
        As in the command's options.
    layers:
        Names of layers; empty: all.
    rounds:
        Rounds of a burst, at least 20 for a figure to be quoted.
    sustained:
        Also measure sustained.
    seconds, sustained_rounds:
        Length and number of sustained rounds.
    """

    models: tuple[str, ...] = ("qwen2.5-7b",)
    tokens: tuple[int, ...] = (16, 64, 256, 1024, 4096, 16384)
    dtypes: tuple[str, ...] = ("int8", "fp8_e4m3", "bf16")
    patterns: tuple[str, ...] = ("6:8", "4:6", "2:4", "8:10")
    layers: tuple[str, ...] = ()
    rounds: int = 20
    sustained: bool = False
    seconds: float = 1.0
    sustained_rounds: int = 2

    def __post_init__(self) -> None:
        for name in self.models:
            self.layers_of(model(name))
        for dtype in self.dtypes:
            operand(dtype)
        for pattern in self.patterns:
            Pattern.parse(pattern)
        if not self.tokens or min(self.tokens) < 1:
            raise OptionError(f"tokens is {list(self.tokens)}; allowed are numbers from 1 on")
        if self.rounds < 1 or self.sustained_rounds < 1 or self.seconds <= 0:
            raise OptionError("rounds and seconds must be positive")

    def layers_of(self, shape: Model) -> tuple[Layer, ...]:
        """The chosen layers of a model; OptionError for a name that is none."""
        names = [layer.name for layer in shape.layers]
        wrong = [name for name in self.layers if name not in names]
        if wrong:
            raise OptionError(f"layer {wrong[0]!r} is unknown; allowed are {', '.join(names)}")
        return tuple(row for row in shape.layers if not self.layers or row.name in self.layers)

    def to_json(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return {
            "models": list(self.models),
            "tokens": list(self.tokens),
            "dtypes": list(self.dtypes),
            "patterns": list(self.patterns),
            "layers": list(self.layers),
            "rounds": self.rounds,
            "sustained": self.sustained,
            "seconds": self.seconds,
            "sustained_rounds": self.sustained_rounds,
            "x": "bfloat16, normal",
            "weight": "bfloat16, normal, pruned by magnitude; dense runs the same pruned weight",
            "out": "bfloat16",
            "workspace_limit": WORKSPACE,
        }

    def groups(self) -> list[tuple[str, str, str]]:
        """(model, pattern, dtype), the order in which they are measured."""
        return [
            (name, pattern, dtype)
            for name in self.models
            for pattern in self.patterns
            for dtype in self.dtypes
        ]

    @property
    def cases(self) -> int:
        """How many (group, number of tokens) there are."""
        return len(self.groups()) * len(self.tokens)


MakeSide = Callable[[Gpu, str, Sequence[Layer], Sequence[Memory], Pattern, Operand], Side]
MakeWeights = Callable[[Gpu, Sequence[Layer], Pattern], list[Memory]]
Progress = Callable[[str], None]


# --- the benchmark --------------------------------------------------------------------------------


def run_gemm(
    gpu: Gpu,
    settings: GemmSettings,
    record: Record,
    *,
    budget: Budget,
    clocks: Clocks,
    say: Progress,
    done: Callable[[], None],
    make_side: MakeSide = GpuSide,
    make_weights: MakeWeights = make_weights,
) -> None:
    """Measure every case and add its rows to ``record``, which is saved after each.

    Parameters
    ----------
    gpu, clocks:
        Where it runs; both are open.
    settings, record, budget:
        What, whereto, and how long.
    say:
        Takes a line for people about each case.
    done:
        Called once for each case.
    make_side, make_weights:
        Stand in for the real ones in tests.
    """
    for name, pattern_name, dtype in settings.groups():
        pattern, row = Pattern.parse(pattern_name), operand(dtype)
        layers = settings.layers_of(model(name))
        head = f"{name} {pattern.name} {row.name}"
        cases = [(m, f"{head} M={m}") for m in settings.tokens]
        if budget.spent:
            _leave_out(record, cases, "time budget", "no time left", say, done)
            continue
        with ExitStack() as held:
            try:
                say(f"{head}: preparing {len(layers)} layers")
                weights = make_weights(gpu, layers, pattern)
                for memory in weights:
                    held.callback(memory.close)
                sides = {}
                for side in SIDES:
                    sides[side] = make_side(gpu, side, layers, weights, pattern, row)
                    held.callback(sides[side].close)
            except FAILURES as error:
                kind, why = reason_of(error)
                _leave_out(record, cases, kind, why, say, done)
                continue
            for index, (tokens, case) in enumerate(cases):
                if budget.spent:
                    _leave_out(record, cases[index:], "time budget", "no time left", say, done)
                    break
                bench = _Case(gpu, settings, layers, weights, sides, row, tokens, clocks)
                common = {
                    "model": name,
                    "layers": [layer.name for layer in layers],
                    "m": tokens,
                    "dtype": row.name,
                    "pattern": pattern.name,
                    "bound": float(pattern.speed_bound),
                    "weight_bytes": sum(layer.n * layer.k for layer in layers) * row.bits // 8,
                }
                try:
                    for measured in bench.rows():
                        record.add(common | measured)
                        complete_rows(record.rows)
                        say(f"{case}: {_line(record.rows[-1])}")
                except FAILURES as error:
                    kind, why = reason_of(error)
                    record.leave_out(case, kind, why)
                    say(f"{case}: not reported, {kind}: {why}")
                record.save()
                done()
    record.finish()


def _leave_out(
    record: Record,
    cases: Sequence[tuple[int, str]],
    reason: str,
    why: str,
    say: Progress,
    done: Callable[[], None],
) -> None:
    for _, case in cases:
        record.leave_out(case, reason, why)
        done()
    say(f"{cases[0][1]} and {len(cases) - 1} more: left out, {reason}: {why}")
    record.save()


class _Case:
    """One number of tokens: both sides, both stages, all layers."""

    def __init__(
        self,
        gpu: Gpu,
        settings: GemmSettings,
        layers: Sequence[Layer],
        weights: Sequence[Memory],
        sides: dict[str, Side],
        row: Operand,
        tokens: int,
        clocks: Clocks,
    ) -> None:
        self._gpu = gpu
        self._settings = settings
        self._layers = layers
        self._weights = weights
        self._sides = sides
        self._operand = row
        self._tokens = tokens
        self._clocks = clocks

    def rows(self) -> Iterator[dict[str, Any]]:
        """Check and time; raises WrongOutput before there is a number."""
        gpu, tokens = self._gpu, self._tokens
        with ExitStack() as held:
            inputs, outputs = [], []
            for layer in self._layers:
                inputs.append(gpu.random(tokens * layer.k * 2, BF16))
                held.callback(inputs[-1].close)
                outputs.append(gpu.allocate(tokens * layer.n * 2))
                held.callback(outputs[-1].close)
            # Waits before anything is given back, whatever went wrong.
            held.callback(gpu.synchronize)
            wanted = [self._exact(index, inputs[index]) for index in range(len(inputs))]
            for stage in STAGES:
                works: dict[str, list[Work]] = {}
                try:
                    for name, side in self._sides.items():
                        make = side.gemm if stage == "gemm" else side.op
                        works[name] = [
                            make(index, tokens, x.pointer, y.pointer)
                            for index, (x, y) in enumerate(zip(inputs, outputs, strict=True))
                        ]
                    gpu.synchronize()
                    yield from self._stage(stage, works, wanted)
                finally:
                    gpu.synchronize()
                    for side in self._sides.values():
                        side.release()

    def _stage(
        self, stage: str, works: dict[str, list[Work]], wanted: list[Exact]
    ) -> Iterator[dict[str, Any]]:
        gpu, settings = self._gpu, self._settings
        whole = {name: gpu.capture(_sequence(row)) for name, row in works.items()}
        worst = {
            name: self._check(name, graph, works[name], wanted) for name, graph in whole.items()
        }
        single = {
            (name, index): gpu.capture(work.launch)
            for name, row in works.items()
            for index, work in enumerate(row)
        }
        common = {
            "stage": stage,
            "checked": {
                "tokens": len(self._token_rows()),
                "channels": _CHANNELS,
                "error_over_bound": worst,
            },
            "kernels": {name: row[0].kernels for name, row in works.items()},
        }
        found = burst(gpu, whole, rounds=settings.rounds, clocks=self._clocks)
        by_layer: dict[str, dict[str, float]] = {name: {} for name in works}
        for index, layer in enumerate(self._layers):
            graphs: dict[str, Graph] = {name: single[name, index] for name in works}
            times = burst(
                gpu, graphs, rounds=settings.rounds, clocks=self._clocks, least_warm_us=2000.0
            )
            for name, row in times.items():
                by_layer[name][layer.name] = row.us
        yield self._row(found, "burst") | {"layer_us": by_layer} | common
        if settings.sustained:
            found = sustained(
                gpu,
                whole,
                seconds=settings.seconds,
                rounds=settings.sustained_rounds,
                clocks=self._clocks,
            )
            yield self._row(found, "sustained") | common

    def _row(self, found: dict[str, Times], mode: str) -> dict[str, Any]:
        flops = sum(layer.flops(self._tokens) for layer in self._layers)
        return {
            "mode": mode,
            "us": {name: row.us for name, row in found.items()},
            "times": {name: row.to_json() for name, row in found.items()},
            "dense_equivalent_tflops": {name: flops / row.us / 1e6 for name, row in found.items()},
            "ratio": found[DENSE].us / found[SPARSE].us,
        }

    def _token_rows(self) -> list[int]:
        return sample(self._tokens, _TOKENS, seed=1)

    def _exact(self, index: int, x: Memory) -> Exact:
        """What the sampled tokens and channels of a layer must give."""
        gpu, layer, weight = self._gpu, self._layers[index], self._weights[index]
        dtype = array_type(BF16).dtype
        tokens = [gpu.read(x.pointer + t * layer.k * 2, dtype, layer.k) for t in self._token_rows()]
        channels = [
            gpu.read(weight.pointer + c * layer.k * 2, dtype, layer.k)
            for c in sample(layer.n, _CHANNELS, seed=2)
        ]
        return exact(np.stack(tokens), np.stack(channels), self._operand)

    def _check(self, name: str, graph: Graph, works: list[Work], wanted: list[Exact]) -> float:
        """Poison all outputs, replay the graph once, and compare; the largest error over bound."""
        gpu, worst = self._gpu, 0.0
        for work in works:
            output = work.output
            size = _numpy_type(output.kind).itemsize
            gpu.poison(output.pointer, self._tokens * output.stride * size)
        graph.launch()
        for layer, work, goal in zip(self._layers, works, wanted, strict=True):
            what = f"{name} {layer.name} {layer.n} x {layer.k}, {work.kernels}"
            found = self._read(work.output, what, layer)
            if work.output.scaled:
                sums = self._sides[name].sums_type
                worst = max(worst, check_result(found, goal, what, sums_type=sums))
            else:
                worst = max(worst, check_sums(found, goal, what))
        return worst

    def _read(self, output: Output, what: str, layer: Layer) -> NDArray:
        """The sampled tokens and channels of an output; its rows are looked through for poison."""
        dtype = _numpy_type(output.kind)
        rows = []
        for token in self._token_rows():
            at = output.pointer + token * output.stride * dtype.itemsize
            row = self._gpu.read(at, dtype, output.columns)
            check_poison(row, f"{what}, token {token}")
            rows.append(row[sample(layer.n, _CHANNELS, seed=2)])
        return np.stack(rows)


def _numpy_type(kind: str) -> np.dtype[Any]:
    return np.dtype(np.int32) if kind == "int32" else array_type(kind).dtype


def _sequence(works: Sequence[Work]) -> Callable[[], None]:
    def launch() -> None:
        for work in works:
            work.launch()

    return launch


def complete_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Compare every row with the better dense 8-bit product, as far as both are measured.

    The best dense time is the better of the int8 and the fp8 sum, lowered by what choosing layer by
    layer would save according to the layers' own times (sustained runs have none).  Rows of one
    model, pattern, M, stage and mode belong together; until both formats are there, the comparison
    is ``None``.
    """
    groups: dict[tuple[Any, ...], dict[str, dict[str, Any]]] = {}
    for row in rows:
        key = tuple(row[part] for part in ("model", "pattern", "m", "stage", "mode"))
        groups.setdefault((*key, tuple(row.get("layers", ()))), {})[row["dtype"]] = row
    for group in groups.values():
        best: float | None = None
        if all(dtype in group for dtype in _EIGHT_BIT):
            best = min(group[dtype]["us"][DENSE] for dtype in _EIGHT_BIT)
            tables = [group[dtype].get("layer_us") for dtype in _EIGHT_BIT]
            if all(table is not None for table in tables):
                mixed = sum(
                    min(table[DENSE][layer] for table in tables if table is not None)
                    for layer in group[_EIGHT_BIT[0]]["layer_us"][DENSE]
                )
                # Layers timed alone find small weights in the cache: only their proportion counts.
                alone = min(sum(table[DENSE].values()) for table in tables if table is not None)
                best *= min(1.0, mixed / alone)
        for row in group.values():
            row["best_dense_8bit_us"] = best
            row["ratio_best_8bit"] = None if best is None else best / row["us"][SPARSE]


def _line(row: dict[str, Any]) -> str:
    return (
        f"{row['stage']} {row['mode']}: cusparselt {row['us'][SPARSE]:.1f} us, dense "
        f"{row['us'][DENSE]:.1f} us, ratio {row['ratio']:.3f} (at most {row['bound']:.3f})"
    )
