"""Writing reports: of files that a user names, and this repository's own pages.

Pages hold text that people wrote, and sections between ``<!-- measured: NAME -->`` and
``<!-- measured: end -->`` that are made from benchmarks/results/ and nothing else.  The sections
"h100" and "h200" have every file of that GPU by its name: gemm-*h100.json, gemm-*h100-2.json and so
on; "end-to-end" and "accuracy" those of the H100.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from ...errors import FormatError, OptionError
from ..record import checkout
from . import accuracy, markdown, passes
from .charts import (
    AccuracyChart,
    BreakdownChart,
    Chart,
    PassChart,
    RateChart,
    SpeedChart,
    charts_of,
    digest,
)
from .markdown import source, table
from .published import against_published
from .results import SCRIPTS, Result, machines, read_result

__all__ = ["Checkout", "outdated", "own_checkout", "write_pages", "write_report"]

#: The GPUs that pages show, as file names have them; figures of others are for the first.
_GPUS = ("h100", "h200")
_KINDS = ("gemm", "pipeline", "quantize", "overhead", "packing")


# --- reports of any files -------------------------------------------------------------------------


def write_report(
    files: Sequence[Path],
    folder: Path,
    *,
    formats: Sequence[str] = ("svg",),
    plots: bool = True,
) -> list[Path]:
    """Write ``report.md`` and ``plots/`` into a folder, which is made if it is missing.

    Raises
    ------
    FormatError
        For a file that is no result.
    MissingPackage
        Without matplotlib, unless ``plots`` is false.
    OptionError
        For an unknown format.
    OSError
        For a file that cannot be read or written.
    """
    results = [read_result(path) for path in files]
    written: list[Path] = []
    text = "# Benchmarks\n"
    for machine, own in machines(results).items():
        charts = charts_of(own) if plots else []
        if charts:
            from .plots import save

            written += save(charts, folder / "plots", formats)
        text += f"\n## {machine}\n\n{_sections(own, charts, formats[0], '')}\n"
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / "report.md"
    page.write_text(text, encoding="utf-8")
    return [page, *written]


def _pictures(charts: Sequence[Chart], kind: type[Chart], suffix: str, what: str = "") -> str:
    """Links to the charts of one kind; ``what`` is how their names begin."""
    return "".join(
        f"![{chart.title}](plots/{chart.name}.{suffix})\n\n"
        for chart in charts
        if isinstance(chart, kind) and chart.name.startswith(what)
    )


def _sections(results: Sequence[Result], charts: Sequence[Chart], suffix: str, folder: str) -> str:
    """Everything that results of one machine say; ``folder`` as of :func:`markdown.source`."""
    machine = results[0].machine
    found: list[tuple[str, str]] = [
        (
            f"auto against dense on the {machine}",
            _pictures(charts, SpeedChart, suffix, "pipeline")
            + markdown.auto_against_dense(results),
        ),
        (f"Sparse against dense on the {machine}", _against_dense(results, charts, suffix)),
        (f"Where an operator's time goes on the {machine}", _stages(results, charts, suffix)),
    ]
    if any(result.what == "quantize" for result in results):
        pictures = _pictures(charts, RateChart, suffix)
        text = f"{pictures}{markdown.quantize(results)}"
        found.append((f"Quantize and lift on the {machine}", text))
    if any(result.what == "overhead" for result in results):
        found.append((f"Host time beside the {machine}", markdown.overhead(results)))
    found += _models(results, charts, suffix)
    for result in results:
        if result.what == "packing":
            found.append(("Packing", markdown.packing(result)))
    shown = [f"### {title}\n\n{text.rstrip()}" for title, text in found if text]
    files = [
        f"{markdown.left_out(result)}{source(result, folder)}"
        + (f"\n\n{passes.conditions(result)}" if result.what == "end-to-end" else "")
        for kind in (*_KINDS, *SCRIPTS)
        for result in results
        if result.what == kind
    ]
    return "\n\n".join([*shown, f"### Sources: {machine}", *files])


def _models(
    results: Sequence[Result], charts: Sequence[Chart], suffix: str
) -> list[tuple[str, str]]:
    """Titles and texts of what whole models were measured for."""
    machine = results[0].machine
    speeds = passes.speeds(results)
    found = [
        (
            f"Whole passes on the {machine}",
            speeds and f"{_pictures(charts, PassChart, suffix)}{speeds}",
        ),
        (f"Where a pass's time goes on the {machine}", passes.breakdown(results)),
        (f"Memory of linear layers on the {machine}", passes.memory(results)),
    ]
    every = accuracy.costs(results)
    for own in every:
        drawn = [chart for chart in charts if isinstance(chart, AccuracyChart)]
        pictures = _pictures(
            [chart for chart in drawn if chart.source == own.result.name], AccuracyChart, suffix
        )
        more = f": {own.result.name}" if len(every) > 1 else ""
        title = f"What pruning costs, on the {machine}{more}"
        found.append((title, f"{pictures}{accuracy.accuracy(own)}"))
    return found


def _against_dense(results: Sequence[Result], charts: Sequence[Chart], suffix: str) -> str:
    tables = markdown.product_sections(results)
    if not tables:
        return ""
    return (
        f"{_pictures(charts, SpeedChart, suffix, 'speed')}"
        "Each cell: dense of the same operand format over sparse / the better of dense int8 and "
        "fp8 over sparse (in bursts layer by layer, where layers were timed). Sustained: each side "
        "alone for at least a second, the last half counted, rounds alternating. Burst: sides take "
        "turns, warm. Efficiency: the time of 2:4, times how much wider the pattern's rows become "
        "(gamma = 2 - 2/N), over the pattern's time; 1 means that sliding costs what counting "
        f"says. It is there where 2:4 was measured in the same run.\n\n{tables}"
    )


def _stages(results: Sequence[Result], charts: Sequence[Chart], suffix: str) -> str:
    tables = markdown.breakdown(results)
    if not tables:
        return ""
    return (
        f"{_pictures(charts, BreakdownChart, suffix)}"
        "Product + quantize and lift + second pass = operator; only a product that leaves sums has "
        "a second pass, which scales them. Product and operator are measured, and the time of "
        "quantizing where the file has it; the rest is what is left. In brackets: quantize, lift "
        "and second pass together. A product alone and the same one within its operator differ by "
        f"chance, too. Bursts.\n\n{tables}"
    )


# --- this repository's pages ----------------------------------------------------------------------


class Checkout:
    """A checkout of the sources: its result files, pages and plots.

    Parameters
    ----------
    root:
        Its folder.
    """

    def __init__(self, root: Path) -> None:
        self.results = root / "benchmarks" / "results"
        self.published = root / "benchmarks" / "published-h100.json"
        self.docs = root / "docs"
        self.plots = self.docs / "plots"
        self.pages: Mapping[Path, Mapping[str, Callable[[], str]]] = {
            self.docs / "performance.md": {gpu: partial(self._of_gpu, gpu) for gpu in _GPUS},
            self.docs / "packing-speed.md": {"packing": self._packing},
            self.docs / "end-to-end.md": {"end-to-end": partial(self._scripts, "end-to-end")},
            self.docs / "accuracy.md": {"accuracy": partial(self._scripts, "accuracy")},
        }

    def rendered(self) -> dict[Path, str]:
        """Every page with its sections made anew.

        Raises FormatError for a page without its markers, and without files that it shows.
        """
        return {
            path: _filled(path, path.read_text(encoding="utf-8"), sections)
            for path, sections in self.pages.items()
        }

    def charts(self) -> list[Chart]:
        """The plots that the pages show."""
        every = [*map(self._files, _GPUS), *(self._scripted(what) for what in SCRIPTS)]
        return [chart for results in every if results for chart in charts_of(results)]

    def read(self, name: str) -> Result:
        """A result file by its name."""
        return read_result(self.results / name)

    def _files(self, gpu: str, kinds: Sequence[str] = _KINDS) -> list[Result]:
        """The files of a GPU, those of one measurement in the order of their numbers."""
        found = {}
        for path in self.results.glob("*.json"):
            match = re.fullmatch(rf"([a-z]+(?:-[a-z]+)*)-{gpu}(?:-(\d+))?\.json", path.name)
            for kind in kinds:
                if match and (match[1] == kind or match[1].startswith(f"{kind}-")):
                    order = (kinds.index(kind), match[1], int(match[2] or 1))
                    found[order] = path
        return [read_result(found[order]) for order in sorted(found)]

    def _scripted(self, what: str) -> list[Result]:
        """The files of a script; FormatError where there is none."""
        found = self._files(_GPUS[0], [what])
        if not found:
            raise FormatError(
                f"{self.results} has no {what}-{_GPUS[0]}.json, which {self.docs / what}.md shows; "
                f"get it back, or measure it with benchmarks/{what.replace('-', '_')}.py"
            )
        return found

    def _scripts(self, what: str) -> str:
        results = self._scripted(what)
        return _sections(results, charts_of(results), "svg", "../benchmarks/results")

    def _of_gpu(self, gpu: str) -> str:
        results = self._files(gpu)
        parts = []
        if results and gpu == _GPUS[0]:
            published = json.loads(self.published.read_text(encoding="utf-8"))
            compared = against_published(published, results)
            if compared:
                title = "### Against cuSPARSELt and the published kernels"
                parts.append(f"{title}\n\n{compared.rstrip()}")
        if results:
            parts.append(_sections(results, charts_of(results), "svg", "../benchmarks/results"))
        name = f"gpu-checks-{gpu}.json"
        if (self.results / name).is_file():
            parts.append(f"### Packing and sums on the {gpu.upper()}\n\n{self._checks(name)}")
        return "\n\n".join([f"## NVIDIA {gpu.upper()}", *parts]) if parts else ""

    def _packing(self) -> str:
        return markdown.packing(self.read("packing-cpu.json"))

    def _checks(self, name: str) -> str:
        """Packing a 7B model on a GPU, and the errors of sums (benchmarks/gpu_checks.py)."""
        document: dict[str, Any] = json.loads((self.results / name).read_text(encoding="utf-8"))
        packed = table(
            ["backend", "type", "weights", "seconds", "GB held"],
            [
                [
                    row["backend"],
                    row["dtype"],
                    f"{row['weights'] / 1e9:.2f} G",
                    f"{row['seconds']:.2f}",
                    f"{row['held_bytes'] / 1e9:.2f}",
                ]
                for row in document["packing"]
            ],
        )
        lengths = sorted({row["k"] for row in document["sum_errors"]})
        sides = dict.fromkeys((row["backend"], row["dtype"]) for row in document["sum_errors"])
        errors = table(
            ["backend", "type", *(f"K={k}" for k in lengths)],
            [
                [
                    *side,
                    *(
                        f"{row['largest']:.1e}"
                        for row in document["sum_errors"]
                        if (row["backend"], row["dtype"]) == side
                    ),
                ]
                for side in sides
            ],
        )
        return (
            f"Plans for the 112 linear layers of Qwen2.5-7B's shapes, 6:8, from pruned bfloat16 "
            f"weights on the GPU:\n\n{packed}\n\nLargest error of a sum, relative to the sum of "
            f"the products' magnitudes, float32 results against float64 on the same operands:\n\n"
            f"{errors}\n\n{source(Result(name, document))}"
        )


def own_checkout() -> Checkout:
    """The checkout that this package runs from; OptionError where it is installed."""
    root = checkout()
    if root is None:
        raise OptionError(
            "without FILES this writes the pages of a checkout of slidesparse_rt, and this is an "
            "installed package; name result files, as in: slidesparse bench report result.json"
        )
    return Checkout(root)


def write_pages(home: Checkout | None = None) -> list[Path]:
    """Write the pages of a checkout again, and its plots; what was written.

    Plots that no page shows any more are removed.  Raises as :func:`write_report`.
    """
    from .plots import save

    found = own_checkout() if home is None else home
    pages = found.rendered()
    plots = save(found.charts(), found.plots)
    for path in set(found.plots.glob("*.svg")) - set(plots):
        path.unlink()
    for path, text in pages.items():
        path.write_text(text, encoding="utf-8")
    return [*pages, *plots]


def outdated(home: Checkout | None = None) -> list[Path]:
    """Pages and plots of a checkout that show something else than its result files.

    Plots say which data they show, so this needs no matplotlib.
    """
    found = own_checkout() if home is None else home
    stale = [path for path, text in found.rendered().items() if path.read_text("utf-8") != text]
    wanted = {found.plots / f"{chart.name}.svg": digest(chart) for chart in found.charts()}
    for path in sorted(set(wanted) | set(found.plots.glob("*.svg"))):
        shown = path.read_text(encoding="utf-8") if path.is_file() else ""
        if path not in wanted or wanted[path] not in shown:
            stale.append(path)
    return stale


def _given(text: str, match: re.Match[str]) -> str:
    del match
    return text


def _filled(path: Path, page: str, sections: Mapping[str, Callable[[], str]]) -> str:
    """The page with what stands between its markers replaced."""
    for name, make in sections.items():
        begin, end = f"<!-- measured: {name} -->", "<!-- measured: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = "\n\n".join(part for part in (begin, make().rstrip(), end) if part)
        # A function, because backslashes in a replacement have a meaning.
        page, count = pattern.subn(partial(_given, text), page, count=1)
        if count != 1:
            raise FormatError(f"{path} has no section {begin} ... {end}; put both where it belongs")
    return page
