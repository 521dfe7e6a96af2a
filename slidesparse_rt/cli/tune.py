"""``slidesparse tune``: measure the backends for the layers of a model, and keep the times."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..arrays import Device
from ..backends import Problem
from ..backends.base import RawWeight
from ..dtypes import Operand, operand
from ..errors import BackendUnavailable, OptionError, first_line
from ..options import PlanOptions
from ..pattern import Pattern
from ..tuning.measure import MeasureOptions, Progress
from ..tuning.select import tune
from ..tuning.table import Table

if TYPE_CHECKING:
    from rich.console import Console

    from ..bench.shapes import Layer

__all__ = ["Row", "TuneReport", "run_tune", "wanted_layers"]


@dataclass(frozen=True, slots=True)
class Row:
    """One weight that was measured: which layers have its shape, the times, where they are kept."""

    layers: tuple[str, ...]
    problem: Problem
    table: Table
    path: Path | None
    keep_dense: bool

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""
        dispatch = self.table.dispatch(keep_dense=self.keep_dense)
        return {
            "layers": list(self.layers),
            "n": self.problem.n,
            "k": self.problem.k,
            "pattern": self.problem.pattern.name,
            "dtype": self.problem.dtype.name,
            "us": {str(tokens): dict(row) for tokens, row in self.table.times.items()},
            "runs": {str(tokens): dispatch.at(tokens) for tokens in self.table.tokens},
            "dispatch": [list(pair) for pair in zip(dispatch.starts, dispatch.names, strict=True)],
            "refused": dict(self.table.refused),
            "path": None if self.path is None else str(self.path),
        }


@dataclass(frozen=True, slots=True)
class TuneReport:
    """Everything that was measured.

    ``left_out`` names the weights for which the time budget was too short, ``unfinished`` those of
    which only some numbers of tokens were measured, for want of memory, or of time where it was
    ``limited``.  ``failed`` has the weights that no backend could run, and why.
    """

    gpu: str
    rows: tuple[Row, ...]
    left_out: tuple[str, ...]
    unfinished: tuple[str, ...]
    seconds: float
    limited: bool = False
    failed: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and numbers."""
        return {
            "gpu": self.gpu,
            "seconds": self.seconds,
            "weights": [row.to_json() for row in self.rows],
            "unfinished": list(self.unfinished),
            "left_out": list(self.left_out),
            "failed": dict(self.failed),
        }

    def render(self, screen: Console) -> None:
        """Print the report for people."""
        from .console import show_table, styled

        for row in self.rows:
            problem, dispatch = row.problem, row.table.dispatch(keep_dense=row.keep_dense)
            screen.print(
                styled(f"{_title(problem)}: {', '.join(row.layers)}", "bold"), soft_wrap=True
            )
            names = row.table.backends
            rows = [
                (str(tokens), dispatch.at(tokens), *(f"{times[name]:.1f}" for name in names))
                for tokens, times in row.table.times.items()
            ]
            show_table(screen, ("tokens", "runs", *(f"{name}\nus" for name in names)), rows, left=2)
            for name, why in row.table.refused.items():
                screen.print(f"  refused {name}: {why.splitlines()[0]}", soft_wrap=True)
            where = "kept nowhere" if row.path is None else f"kept in {row.path}"
            screen.print(f"  {where}", soft_wrap=True)
            screen.print()
        many = "" if len(self.rows) == 1 else "s"
        screen.print(f"{len(self.rows)} weight{many} in {self.seconds:.1f} s on {self.gpu}")
        short = "no memory, or the time budget is spent" if self.limited else "no memory"
        for what, names in (
            (f"measured in part: {short}; run it again to go on", self.unfinished),
            ("not measured: the time budget is spent; run it again to go on", self.left_out),
        ):
            for name in names:
                screen.print(styled(f"{name}: {what}", "yellow"), soft_wrap=True)
        for name, why in self.failed.items():
            screen.print(styled(f"{name}: not measured: {why}", "red"), soft_wrap=True)


def wanted_layers(names: Sequence[str], layers: Sequence[str] | None) -> list[Layer]:
    """The layers that the arguments of the command name: a model, or N and K.

    Raises OptionError for anything else.
    """
    from ..bench.shapes import Layer, expanded, model

    if len(names) == 2 and all(name.isascii() and name.isdigit() for name in names):
        n, k = map(int, names)
        if not n or not k:
            raise OptionError(f"N K is {n} {k}; allowed are whole numbers from 1 on")
        if layers is not None:
            raise OptionError("--layers picks layers of a model, and N K is one; leave it out")
        return [Layer("weight", n, k)]
    if len(names) != 1:
        raise OptionError(
            f"{' '.join(names)!r} is neither a model nor N K; type for example "
            f"`slidesparse tune qwen2.5-7b` or `slidesparse tune 4608 3584`"
        )
    try:
        found = [layer for name in expanded(names) for layer in model(name).layers]
    except OptionError as error:
        raise OptionError(f"{error}; or N K, as in `slidesparse tune 4608 3584`") from None
    if layers is None:
        return found
    known = [layer.name for layer in found]
    for name in layers:
        if name not in known:
            raise OptionError(f"layer {name!r} is unknown; allowed are {', '.join(known)}")
    return [layer for layer in found if layer.name in layers]


def run_tune(
    layers: Sequence[Layer],
    patterns: Sequence[str],
    dtypes: Sequence[str],
    *,
    device: int = 0,
    settings: MeasureOptions,
    options: PlanOptions,
    bias: bool = False,
    again: bool = False,
    progress: Progress | None = None,
) -> TuneReport:
    """Measure each different weight once: shapes, patterns and formats that agree are one.

    Parameters
    ----------
    layers, patterns, dtypes:
        What to measure, all combinations.
    device:
        CUDA's number of the GPU.
    settings:
        How; ``seconds`` is for everything together.
    options:
        Of the plans to come.
    bias:
        Whether they will have a bias.
    again:
        Whether to measure what is kept already.
    progress:
        Told what is measured next, and how much is done.

    Raises
    ------
    BackendUnavailable
        Without a GPU; names everything that is missing.
    OptionError, DTypeError, PatternError
        For names that do not exist.
    BackendUnavailable, DeviceMemoryError, LibraryError, CompileError
        As :func:`~slidesparse_rt.tuning.select.tune` raises them, where every weight failed.
    """
    from ..backends.gpu_forms import BROKEN
    from ..bench.timing import Gpu, require_gpu

    rows = [operand(name) for name in dtypes]
    kinds = [Pattern.parse(name) for name in patterns]
    try:
        require_gpu(("nvrtc",), device)
    except BackendUnavailable as error:
        raise BackendUnavailable(
            f"tuning measures on a GPU, and there is none to use: {error}; `slidesparse doctor` "
            f"shows what is missing"
        ) from None
    shapes: dict[tuple[int, int], list[str]] = {}
    for layer in layers:
        shapes.setdefault((layer.n, layer.k), []).append(layer.name)
    jobs = [
        (shape, tuple(names), pattern, row)
        for pattern in kinds
        for row in rows
        for shape, names in shapes.items()
    ]
    started = time.monotonic()
    found: list[Row] = []
    left_out: list[str] = []
    unfinished: list[str] = []
    failed: dict[str, Exception] = {}
    gpu = Gpu(device)
    try:
        with gpu.active():
            for number, (shape, names, pattern, row) in enumerate(jobs):
                problem = Problem(*shape, pattern, row)
                title = _title(problem)
                left = None
                if settings.seconds is not None:
                    left = settings.seconds - (time.monotonic() - started)
                    if left <= 0 and found:
                        left_out.append(title)
                        continue
                    # Those to come get their share.
                    left = max(0.0, left) / (len(jobs) - number)
                try:
                    made = _tune_one(
                        gpu,
                        problem,
                        _settings(settings, left),
                        options,
                        bias=bias,
                        again=again,
                        progress=_shifted(progress, title, number, len(jobs)),
                    )
                except BROKEN as error:
                    failed[title] = error
                    continue
                found.append(Row(names, problem, *made, options.keep_dense))
                if not set(settings.buckets) <= set(made[0].tokens):
                    unfinished.append(title)
    finally:
        gpu.close()
    if failed and not found:
        raise next(iter(failed.values()))
    return TuneReport(
        gpu.name,
        tuple(found),
        tuple(left_out),
        tuple(unfinished),
        time.monotonic() - started,
        settings.seconds is not None,
        {title: first_line(error) for title, error in failed.items()},
    )


def _tune_one(
    gpu: Any,
    problem: Problem,
    settings: MeasureOptions,
    options: PlanOptions,
    *,
    bias: bool,
    again: bool,
    progress: Progress | None,
) -> tuple[Table, Path | None]:
    """Measure a random weight that fits the pattern."""
    import numpy as np

    from ..bench.shapes import Layer
    from ..bench.sides import BF16, make_weights

    (weight,) = make_weights(gpu, [Layer("", problem.n, problem.k)], problem.pattern)
    try:
        array = gpu.array(weight.pointer, (problem.n, problem.k), BF16)
        tuned = tune(
            RawWeight(array, problem.pattern, problem.dtype),
            np.ones(problem.n, np.float32) if bias else None,
            problem,
            Device("cuda", gpu.index),
            options,
            None,
            settings,
            again=again,
            progress=progress,
        )
        if tuned.forms is not None:
            tuned.forms.close()
    finally:
        weight.close()
    return tuned.table, tuned.path


def _settings(settings: MeasureOptions, seconds: float | None) -> MeasureOptions:
    from dataclasses import replace

    return replace(settings, seconds=seconds)


def _shifted(progress: Progress | None, title: str, before: int, jobs: int) -> Progress | None:
    """The progress of one weight among several."""
    if progress is None:
        return None

    def shifted(name: str, done: int, total: int) -> None:
        tokens = name.rpartition(", ")[2]
        progress(f"{title} {tokens}".rstrip(), before * total + done, jobs * total)

    return shifted


def _title(problem: Problem) -> str:
    row: Operand = problem.dtype
    return f"{problem.n} x {problem.k}, {problem.pattern.name}, {row.name}"
