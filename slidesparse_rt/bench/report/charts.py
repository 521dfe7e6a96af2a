"""What plots show, as plain data: no drawing, and no matplotlib."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from ..pipeline import FLOOR
from ..sides import AUTO, DENSE
from .accuracy import METHODS, UNPRUNED, Costs, costs
from .markdown import DTYPES, patterns_of, short
from .passes import GOAL, GOAL_PATTERN, GOAL_TOKENS, PHASES, Group, groups
from .results import (
    Measured,
    Result,
    by_model,
    merged,
    newest_of,
    operators,
    products,
    stages,
    title_of,
)

__all__ = [
    "AccuracyChart",
    "AccuracyPanel",
    "Bar",
    "BreakdownChart",
    "Chart",
    "Line",
    "PassChart",
    "PassPanel",
    "RateChart",
    "RateRow",
    "SpeedChart",
    "SpeedPanel",
    "accuracy_charts",
    "breakdown_charts",
    "charts_of",
    "digest",
    "pass_charts",
    "rate_chart",
    "speed_charts",
]

#: Fewest numbers of tokens that make a line.
_FEWEST = 3
#: Rows of a chart of rates; where there are more, only those of x in bfloat16 are shown.
_MOST_RATES = 30
_STAGES = {"gemm": "product alone", "op": "operator, bf16 in and out"}


@dataclass(frozen=True, slots=True)
class Line:
    """Speed over dense of one pattern: (M, ratio) in bursts and sustained, and the bound.

    ``older`` are the bursts of another commit than the most recent one; (M, ratio) again.
    """

    pattern: str
    bound: float
    burst: tuple[tuple[int, float], ...]
    sustained: tuple[tuple[int, float], ...]
    older: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True, slots=True)
class SpeedPanel:
    """One operand format of one stage."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True, slots=True)
class SpeedChart:
    """Speed over dense against M, rows of panels; ``floor`` is what is promised, or ``None``."""

    name: str
    title: str
    rows: tuple[tuple[SpeedPanel, ...], ...]
    floor: float | None


@dataclass(frozen=True, slots=True)
class Bar:
    """One operator: its name, the number of tokens, and the stages' microseconds in order."""

    side: str
    m: int
    stages: tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class BreakdownChart:
    """Stages of operators: (title, bars) for each operand format."""

    name: str
    title: str
    panels: tuple[tuple[str, tuple[Bar, ...]], ...]


@dataclass(frozen=True, slots=True)
class RateRow:
    """One kernel: its words, its TB/s, and those of a copy measured in turns with it."""

    label: str
    tb_per_s: float
    copy_tb_per_s: float


@dataclass(frozen=True, slots=True)
class RateChart:
    """The kernels beside the product under their roof, the copy rate."""

    name: str
    title: str
    rows: tuple[RateRow, ...]


@dataclass(frozen=True, slots=True)
class PassPanel:
    """Whole passes of one phase at one pattern.

    Attributes
    ----------
    title, tokens:
        Words above the panel and below its axis.
    lines:
        (operand format, ((M, speed over dense fp8), ...)).
    bound:
        (M, what Amdahl's law allows).
    wanted:
        (M, what was wanted).
    """

    title: str
    tokens: str
    lines: tuple[tuple[str, tuple[tuple[int, float], ...]], ...]
    bound: tuple[tuple[int, float], ...]
    wanted: tuple[tuple[int, float], ...]


@dataclass(frozen=True, slots=True)
class PassChart:
    """Speed of whole passes against M, a row of panels for each phase."""

    name: str
    title: str
    rows: tuple[tuple[PassPanel, ...], ...]


@dataclass(frozen=True, slots=True)
class AccuracyPanel:
    """One operand format: (method, ((pattern, kept share, more bits per byte), ...)).

    ``unpruned`` is what the format costs alone, or ``None``.
    """

    title: str
    lines: tuple[tuple[str, tuple[tuple[str, float, float], ...]], ...]
    unpruned: float | None


@dataclass(frozen=True, slots=True)
class AccuracyChart:
    """What pruning costs against the kept share of weights, of the file ``source``."""

    name: str
    title: str
    source: str
    panels: tuple[AccuracyPanel, ...]


Chart = SpeedChart | BreakdownChart | RateChart | PassChart | AccuracyChart


def digest(chart: Chart) -> str:
    """SHA-256 of everything that a chart shows."""
    text = json.dumps([type(chart).__name__, asdict(chart)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def charts_of(results: Sequence[Result]) -> list[Chart]:
    """Every chart that results of one machine allow."""
    found: list[Chart] = [*speed_charts(results), *breakdown_charts(results)]
    rates = rate_chart(results)
    if rates is not None:
        found.append(rates)
    return [*found, *pass_charts(results), *accuracy_charts(results)]


def _slug(*parts: str) -> str:
    """A file name's stem."""
    return re.sub(r"[^a-z0-9.]+", "-", "-".join(parts).lower()).strip("-")


# --- speed against M ------------------------------------------------------------------------------


def speed_charts(results: Sequence[Result]) -> list[SpeedChart]:
    """One for each model and sparse side of "gemm" results, and for "auto" of "pipeline" ones."""
    found = []
    for side, rows in products(results, "gemm").items():
        for model, own in by_model(rows).items():
            found += _speed(results, side, model, own, "speed")
    for model, own in by_model(products(results, "pipeline").get(AUTO, {})).items():
        found += _speed(results, AUTO, model, own, "pipeline", floor=FLOOR)
    return found


def _speed(
    results: Sequence[Result],
    side: str,
    model: str,
    own: Measured,
    what: str,
    floor: float | None = None,
) -> list[SpeedChart]:
    grid = []
    for stage, words in _STAGES.items():
        panels = []
        for dtype in DTYPES:
            lines = [_line(own, side, pattern, dtype, stage) for pattern in patterns_of(own)]
            drawn = tuple(line for line in lines if len(line.burst) >= _FEWEST)
            if drawn:
                panels.append(SpeedPanel(f"{dtype}, {words}", drawn))
        if panels:
            grid.append(tuple(panels))
    if not grid:
        return []
    machine = results[0].machine
    title = f"{side} against dense: {title_of(model)} on one {machine}"
    return [SpeedChart(_slug(what, model, side, machine), title, tuple(grid), floor)]


def _line(rows: Measured, side: str, pattern: str, dtype: str, stage: str) -> Line:
    own = {
        key: case
        for key, case in rows.items()
        if (key.pattern, key.dtype, key.stage) == (pattern, dtype, stage)
    }

    def points(mode: str, without: str = "") -> tuple[tuple[int, float], ...]:
        return tuple(
            (key.m, float(case.row["ratio"][side]))
            for key, case in sorted(own.items(), key=lambda item: item[0].m)
            if key.mode == mode and case.result.commit != without
        )

    bound = float(next(iter(own.values())).row["bound"]) if own else 0.0
    newest = newest_of(case for key, case in own.items() if key.mode == "burst")
    # Beside others, points of older commits might look like an effect of M.
    return Line(pattern, bound, points("burst"), points("sustained"), points("burst", newest))


# --- stages ---------------------------------------------------------------------------------------


def breakdown_charts(results: Sequence[Result], pattern: str = "6:8") -> list[BreakdownChart]:
    """The stages of operators in bursts, for each model and sparse side, at one pattern."""
    found = []
    for side, rows in products(results, "gemm").items():
        for model, own in by_model(rows).items():
            pairs = list(operators(own, pattern))
            panels = []
            for dtype in DTYPES:
                bars = [
                    Bar(one, key.m, stages(product, whole, one))
                    for key, product, whole in pairs
                    if key.dtype == dtype
                    for one in (side, DENSE)
                ]
                if len(bars) >= 2 * _FEWEST:
                    panels.append((dtype, tuple(bars)))
            if panels:
                machine = results[0].machine
                name = _slug("stages", model, side, machine)
                what = f"{title_of(model)}, {pattern}"
                title = f"Where an operator's time goes: {what}, on one {machine}"
                found.append(BreakdownChart(name, title, tuple(panels)))
    return found


# --- rates ----------------------------------------------------------------------------------------


def rate_chart(results: Sequence[Result]) -> RateChart | None:
    """The largest launch of every kernel of "quantize" results; ``None`` without any."""
    largest: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in merged(results, "quantize"):
        key = (row["kernel"], row["x"], row["out"], str(row["pattern"]), str(row["columns"]))
        if key not in largest or largest[key]["m"] < row["m"]:
            largest[key] = row
    if not largest:
        return None
    if len(largest) > _MOST_RATES:
        largest = {key: row for key, row in largest.items() if key[1] == "bfloat16"}
    rows = []
    for row in largest.values():
        letter = "N" if row["kernel"] == "dequantize" else "K"
        pattern = f", {row['pattern']}" if row["pattern"] else ""
        kernel = {"quantize_lift": "quantize + lift"}.get(str(row["kernel"]), row["kernel"])
        rows.append(
            RateRow(
                f"{kernel}, {row['x']} to {row['out']}{pattern}, {letter} = {row['columns']}",
                float(row["tb_per_s"]),
                float(row["copy_tb_per_s"]),
            )
        )
    title = f"Rates of the kernels beside the product, on one {results[0].machine}"
    return RateChart(_slug("rates", results[0].machine), title, tuple(rows))


# --- whole models ---------------------------------------------------------------------------------


def pass_charts(results: Sequence[Result]) -> list[PassChart]:
    """One for each model of "end-to-end" results."""
    found = []
    every = groups(results)
    for model in dict.fromkeys(group.model for group in every):
        own = [group for group in every if group.model == model]
        rows = []
        for phase in PHASES:
            panels = tuple(_pass_panel(group, phase) for group in own)
            drawn = tuple(panel for panel in panels if panel.lines)
            if drawn:
                rows.append(drawn)
        if rows:
            machine = results[0].machine
            title = f"Whole passes against dense fp8: {model} on one {machine}"
            found.append(PassChart(_slug("end-to-end", model, machine), title, tuple(rows)))
    return found


def _pass_panel(group: Group, phase: str) -> PassPanel:
    tokens = group.tokens(phase)
    lines = []
    for dtype in group.dtypes:
        ratios = ((m, group.ratio(phase, m, group.side(dtype))) for m in tokens)
        points = tuple((m, ratio) for m, ratio in ratios if ratio is not None)
        if len(points) >= _FEWEST:
            lines.append((short(dtype), points))
    bounds = ((m, group.bound(phase, m)) for m in tokens)
    wanted: tuple[tuple[int, float], ...] = ()
    if phase == "decode":
        wanted = tuple((m, FLOOR) for m in tokens)
    elif group.pattern.name == GOAL_PATTERN:
        wanted = tuple((m, GOAL) for m in tokens if m >= GOAL_TOKENS)
    return PassPanel(
        f"{phase}, {group.pattern}",
        "M (tokens)" if phase == "prefill" else "M (sequences, a token each)",
        tuple(lines),
        tuple((m, bound) for m, bound in bounds if bound is not None),
        wanted,
    )


def accuracy_charts(results: Sequence[Result]) -> list[AccuracyChart]:
    """One for each "accuracy" result."""
    charts: list[AccuracyChart] = []
    for found in costs(results):
        drawn = tuple(panel for panel in map(partial(_cost_panel, found), found.dtypes) if panel)
        if drawn:
            machine = found.result.machine
            more = [] if not charts else [str(len(charts) + 1)]
            title = f"What pruning costs a small language model, on one {machine}"
            charts.append(
                AccuracyChart(_slug("accuracy", machine, *more), title, found.result.name, drawn)
            )
    return charts


def _cost_panel(found: Costs, dtype: str) -> AccuracyPanel | None:
    """``None`` where less than three patterns of every method have run.

    An axis of powers has no room for 0 and less; the table has them.
    """
    lines = []
    for method in METHODS:
        points = []
        for pattern in found.patterns:
            more = found.more(pattern.name, dtype, method)
            if pattern.name != UNPRUNED and more is not None and more > 0:
                points.append((pattern.name, pattern.keep / pattern.group, more))
        if len(points) >= _FEWEST:
            lines.append((method, tuple(points)))
    unpruned = found.more(UNPRUNED, dtype, METHODS[0])
    own = unpruned if unpruned and unpruned > 0 else None
    return AccuracyPanel(dtype, tuple(lines), own) if lines else None
