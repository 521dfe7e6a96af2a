"""``slidesparse bench gemm``: sparse against dense over the linear layers of a model.

Two stages, each over all layers of a model in the order in which the model runs them, captured as
one CUDA graph, so that every layer finds its weight as cold in the cache as a model would:

gemm
    The matrix products alone, on operands that are quantized (and lifted) already: every sparse
    backend against cuBLASLt on the same operands without lifting.  Each writes what it can:
    hopper bf16 with scales (and a bias, if there were one) fused, like the dense fp8 product;
    cuSPARSELt and the dense int8 product int32 or float32 sums.
op
    The whole operator, ``SparseGemmPlan.run``: bf16 in, quantize and lift, multiply, scale, bf16
    out.  ``quantize_us`` of its rows is the time of quantizing and lifting alone; what is left of
    the operator beside that and the product is the second pass, where there is one.

``ratio`` has, for each sparse backend, dense time over its time in the same operand format.
``ratio_best_8bit`` compares with the better of dense int8 and fp8, chosen layer by layer where
layers were timed, whatever the sparse format; ``bound`` is what 2x sparse tensor cores allow at
most, N/(N-1).

``efficiency`` (after SlideSparse, arXiv 2603.05232) is T(2:4) * gamma / T, where gamma = 2 - 2/N is
the pattern's expansion, K'/K: a product of the same layers in 2:4 takes T(2:4), with gamma times as
many windows it should take gamma * T(2:4), and it takes T.  1 says that sliding costs what counting
says and nothing more.  It is ``None`` where the file has no 2:4 product of the same model, M,
format, stage and mode.

Layers are also timed one by one ("layer_us") unless told otherwise; there, a layer that fits the
cache finds its weight in it.

Outputs of the very graphs that are timed are compared with exact arithmetic first (see
:mod:`~slidesparse_rt.bench.checks`); what fails has no numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from ..dtypes import Operand, operand
from ..pattern import Pattern
from .clocks import Clocks
from .gemm_case import GemmCase, sparse_sides
from .gemm_settings import STAGES, GemmSettings, estimate, usable_backends
from .record import FAILURES, Budget, Record, reason_of
from .shapes import Layer, model
from .sides import DENSE, SPARSE, GpuSide, Side, make_weights
from .timing import Gpu, Memory

__all__ = [
    "STAGES",
    "GemmSettings",
    "add_efficiency",
    "complete_rows",
    "estimate",
    "run_gemm",
    "usable_backends",
]

#: Formats of which the better dense one is the strongest baseline.
_EIGHT_BIT = ("int8", "fp8_e4m3")


MakeSide = Callable[[Gpu, str, Sequence[Layer], Sequence[Memory], Pattern, Operand], Side]
MakeWeights = Callable[[Gpu, Sequence[Layer], Pattern], list[Memory]]
Progress = Callable[[str], None]


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
        What, whereto, and how long; the budget begins once the first weights' plans are prepared
        for, kernels compiled.
    say:
        Takes a line for people about each case.
    done:
        Called once for each case.
    make_side, make_weights:
        Stand in for the real ones in tests.
    """
    run = _Run(gpu, settings, record, budget, clocks, say, done, make_side)
    first = True
    for name, pattern_name in settings.weights():
        pattern, layers = Pattern.parse(pattern_name), settings.layers_of(model(name))
        tokens = settings.tokens_of(model(name))
        heads = {dtype: f"{name} {pattern.name} {operand(dtype).name}" for dtype in settings.dtypes}
        if not first and budget.spent:
            for head in heads.values():
                run.leave_out(head, tokens, "time budget", "no time left")
            continue
        with ExitStack() as held:
            try:
                weights = make_weights(gpu, layers, pattern)
            except FAILURES as error:
                for head in heads.values():
                    run.leave_out(head, tokens, *reason_of(error))
                continue
            for memory in weights:
                held.callback(memory.close)
            if first:
                run.prepare_ahead(layers, weights, pattern, tokens)
                budget.restart()
                first = False
            for dtype, head in heads.items():
                run.group(name, head, layers, weights, pattern, operand(dtype))
    record.finish()


class _Run:
    """What all cases of a run have in common."""

    def __init__(
        self,
        gpu: Gpu,
        settings: GemmSettings,
        record: Record,
        budget: Budget,
        clocks: Clocks,
        say: Progress,
        done: Callable[[], None],
        make_side: MakeSide,
    ) -> None:
        self._gpu = gpu
        self._settings = settings
        self._record = record
        self._budget = budget
        self._clocks = clocks
        self._say = say
        self._done = done
        self._make_side = make_side

    def prepare_ahead(
        self,
        layers: Sequence[Layer],
        weights: Sequence[Memory],
        pattern: Pattern,
        tokens: Sequence[int],
    ) -> None:
        """Compile and search, for all formats, what the process and the device then remember.

        What fails here fails again, and is reported, where it is to be measured.
        """
        self._say("compiling kernels and searching algorithms, ahead of the time budget")
        begun = time.monotonic()
        for dtype in self._settings.dtypes:
            with ExitStack() as held:
                self._sides(held, layers, weights, pattern, operand(dtype), tokens)
        self._say(f"compiled and searched: {time.monotonic() - begun:.1f} s")

    def group(
        self,
        name: str,
        head: str,
        layers: Sequence[Layer],
        weights: Sequence[Memory],
        pattern: Pattern,
        row: Operand,
    ) -> None:
        """One model, pattern and operand format, with every number of tokens."""
        settings, record = self._settings, self._record
        counts = settings.tokens_of(model(name))
        if self._budget.spent:
            self.leave_out(head, counts, "time budget", "no time left")
            return
        with ExitStack() as held:
            self._say(f"{head}: preparing {len(layers)} layers")
            sides, failed = self._sides(held, layers, weights, pattern, row, counts)
            tuned = {side: dict(made.tuned) for side, made in sides.items() if made.tuned}
            for side, layer_words in tuned.items():
                for layer, words in layer_words.items():
                    self._say(f"{head}: {side} chooses for {layer} {words}")
            if DENSE not in sides or not sparse_sides(sides):
                error = failed.get(DENSE) or next(iter(failed.values()))
                self.leave_out(head, counts, *reason_of(error))
                return
            for index, tokens in enumerate(counts):
                if self._budget.spent:
                    left = counts[index:]
                    self.leave_out(head, left, "time budget", "no time left")
                    break
                case = f"{head} M={tokens}"
                bench = GemmCase(
                    self._gpu, settings, layers, weights, sides, row, tokens, self._clocks
                )
                common = {
                    "model": name,
                    "layers": [layer.name for layer in layers],
                    "m": tokens,
                    "dtype": row.name,
                    "pattern": pattern.name,
                    "bound": float(pattern.speed_bound),
                    "weight_bytes": sum(layer.n * layer.k for layer in layers) * row.bits // 8,
                } | ({"tuned": tuned} if tuned else {})
                try:
                    for measured in bench.rows():
                        record.add(common | measured)
                        complete_rows(record.rows)
                        self._say(f"{case}: {_line(record.rows[-1])}")
                except FAILURES as error:
                    self._not_reported(case, error)
                for side, broken in (failed | bench.failed).items():
                    self._not_reported(f"{case} {side}", broken)
                record.save()
                self._done()

    def leave_out(self, head: str, tokens: Sequence[int], reason: str, why: str) -> None:
        """Note that numbers of tokens of a group are not measured."""
        for count in tokens:
            self._record.leave_out(f"{head} M={count}", reason, why)
            self._done()
        self._say(f"{head} M={tokens[0]} and {len(tokens) - 1} more: left out, {reason}: {why}")
        self._record.save()

    def _not_reported(self, case: str, error: Exception) -> None:
        kind, why = reason_of(error)
        self._record.leave_out(case, kind, why)
        self._say(f"{case}: not reported, {kind}: {why}")

    def _sides(
        self,
        held: ExitStack,
        layers: Sequence[Layer],
        weights: Sequence[Memory],
        pattern: Pattern,
        row: Operand,
        tokens: Sequence[int],
    ) -> tuple[dict[str, Side], dict[str, Exception]]:
        """The sides, prepared for all numbers of tokens, and those that cannot be."""
        sides: dict[str, Side] = {}
        failed: dict[str, Exception] = {}
        for name in self._settings.sides:
            try:
                side = self._make_side(self._gpu, name, layers, weights, pattern, row)
                held.callback(side.close)
                side.prepare(tokens)
            except FAILURES as error:
                failed[name] = error
            else:
                sides[name] = side
        return sides, failed


def complete_rows(rows: Sequence[dict[str, Any]]) -> None:
    """Compare rows with the better dense 8-bit product and with 2:4, as far as they are measured.

    The best dense time is the better of the int8 and the fp8 sum, lowered by what choosing layer by
    layer would save according to the layers' own times, where both formats have them (sustained
    runs do not).  Rows of one model, pattern, M, stage and mode belong together; until both formats
    are there, the comparison is ``None``.  The efficiency is defined at the top of this module.
    """
    add_efficiency(rows)
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
            us = row["us"]
            row["best_dense_8bit_us"] = best
            row["ratio_best_8bit"] = (
                None if best is None else {name: best / us[name] for name in sparse_sides(us)}
            )


def add_efficiency(rows: Sequence[dict[str, Any]]) -> None:
    """Give every row its efficiency by sparse backend, or ``None``."""

    def key(row: dict[str, Any]) -> tuple[Any, ...]:
        parts = [row[part] for part in ("model", "dtype", "m", "stage", "mode")]
        return (*parts, tuple(row.get("layers", ())))

    native = {key(row): row["us"] for row in rows if row["pattern"] == "2:4"}
    for row in rows:
        us, base = row["us"], native.get(key(row), {})
        gamma = float(Pattern.parse(row["pattern"]).expansion)
        found = {
            side: base[side] * gamma / us[side] for side in SPARSE if side in us and side in base
        }
        row["efficiency"] = found or None


def _line(row: dict[str, Any]) -> str:
    us = row["us"]
    sparse = ", ".join(f"{name} {us[name]:.1f} us" for name in sparse_sides(us))
    ratios = ", ".join(f"{ratio:.3f}" for ratio in row["ratio"].values())
    return (
        f"{row['stage']} {row['mode']}: {sparse}, dense {us[DENSE]:.1f} us, ratio {ratios} "
        f"(at most {row['bound']:.3f})"
    )
