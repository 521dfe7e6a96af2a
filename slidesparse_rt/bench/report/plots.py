"""Drawing charts with matplotlib, the same bytes for the same data and version of matplotlib.

No pyplot: figures belong to nobody but the caller, and a user's style sheets play no part.  An SVG
says in its metadata which data it shows (:func:`~slidesparse_rt.bench.report.charts.digest`), and
which version drew it.
"""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from ...errors import MissingPackage, OptionError
from .charts import (
    BreakdownChart,
    Chart,
    PassChart,
    RateChart,
    SpeedChart,
    SpeedPanel,
    digest,
)
from .looks import COLOURS, DASHES, DOTS, GREY, MARKERS, STYLE, grid_below, token_axis
from .model_plots import draw_accuracy, draw_passes
from .results import BOTH

__all__ = ["FORMATS", "draw", "save"]

FORMATS = ("svg", "png")
#: The patterns that have :data:`COLOURS` of their own.
_OWN_COLOURS = ("2:4", "4:6", "6:8", "8:10", "14:16", "10:12", "dense")
_STAGE_COLOURS = {
    "product": "#0072B2",
    "quantize and lift": "#E69F00",
    "second pass": "#D55E00",
    BOTH: "#CC79A7",
}


def draw(chart: Chart, kind: str = "svg") -> bytes:
    """A chart as an image.

    Parameters
    ----------
    chart:
        What to show.
    kind:
        One of :data:`FORMATS`.

    Raises
    ------
    MissingPackage
        Without matplotlib.
    OptionError
        For another ``kind``.
    """
    if kind not in FORMATS:
        raise OptionError(f"format {kind!r} is unknown; allowed are {', '.join(FORMATS)}")
    try:
        import matplotlib as mpl
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise MissingPackage(
            "plots are drawn with matplotlib, which is not installed; type: pip install "
            "'slidesparse-rt[report]', or leave the plots out with --no-plots"
        ) from None
    with mpl.rc_context():
        mpl.rcdefaults()
        mpl.rcParams.update(STYLE)
        figure = Figure(layout="constrained")
        FigureCanvasAgg(figure)
        if isinstance(chart, SpeedChart):
            _speed(figure, chart)
        elif isinstance(chart, BreakdownChart):
            _breakdown(figure, chart)
        elif isinstance(chart, RateChart):
            _rates(figure, chart)
        elif isinstance(chart, PassChart):
            draw_passes(figure, chart)
        else:
            draw_accuracy(figure, chart)
        figure.suptitle(chart.title, fontsize=12, fontweight="bold")
        written = io.BytesIO()
        if kind == "svg":
            said: dict[str, Any] = {
                "Date": None,
                "Creator": f"matplotlib {mpl.__version__}",
                "Identifier": digest(chart),
            }
            figure.savefig(written, format="svg", metadata=said)
        else:
            figure.savefig(written, format="png", dpi=150, metadata={"Software": None})
    return written.getvalue()


def save(charts: Iterable[Chart], folder: Path, formats: Iterable[str] = ("svg",)) -> list[Path]:
    """Draw charts into a folder, which is made if it is missing; the files.

    Raises as :func:`draw`, and OSError.
    """
    made = {
        folder / f"{chart.name}.{kind}": draw(chart, kind) for chart in charts for kind in formats
    }
    folder.mkdir(parents=True, exist_ok=True)
    for path, content in made.items():
        path.write_bytes(content)
    return list(made)


# --- speed against M ------------------------------------------------------------------------------


def _speed(figure: Any, chart: SpeedChart) -> None:
    from matplotlib.lines import Line2D

    columns = max(len(row) for row in chart.rows)
    figure.set_size_inches(1.2 + 3.3 * columns, 1.5 + 2.9 * len(chart.rows))
    grid = figure.subplots(len(chart.rows), columns, squeeze=False, sharey=True)
    looks = _looks(chart)
    handles: dict[str, Any] = {}
    values = [
        value
        for row in chart.rows
        for panel in row
        for line in panel.lines
        for _, value in (*line.burst, *line.sustained)
    ]
    bounds = [line.bound for row in chart.rows for panel in row for line in panel.lines]
    top = 1.06 * max(*values, *(bound for bound in bounds if bound < 1.3 * max(values)), 1.0)
    for axes_row, row in zip(grid, chart.rows, strict=True):
        for axes in axes_row[len(row) :]:
            axes.set_visible(False)
        for axes, panel in zip(axes_row, row, strict=False):
            _speed_panel(axes, panel, looks, handles)
            axes.axhline(1.0, color=GREY, linewidth=1.2)
            if chart.floor is not None:
                handles[f"promised: {chart.floor:g}"] = axes.axhline(
                    chart.floor, color=GREY, linewidth=1, linestyle=DOTS
                )
            axes.set_ylim(min(0.75, 0.95 * min(values)), top)
        axes_row[0].set_ylabel("speed, dense = 1")
    handles["bound, N/(N-1)"] = Line2D([], [], color=GREY, linewidth=1, linestyle=DASHES)
    if any(line.sustained for row in chart.rows for panel in row for line in panel.lines):
        handles["sustained"] = Line2D(
            [], [], color=GREY, marker="o", markersize=8, fillstyle="none", linestyle="none"
        )
    if any(line.older for row in chart.rows for panel in row for line in panel.lines):
        handles["of an older commit"] = Line2D(
            [], [], color=GREY, marker="o", markersize=4.5, markerfacecolor="white"
        )
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=min(len(handles), 2 * columns),
    )


def _looks(chart: SpeedChart) -> dict[str, tuple[Any, str]]:
    """Colour and marker of each pattern, its own in every plot; many go from dark to light."""
    import matplotlib as mpl

    names = list(
        dict.fromkeys(line.pattern for row in chart.rows for panel in row for line in panel.lines)
    )
    if set(names) <= set(_OWN_COLOURS):
        own = dict(zip(_OWN_COLOURS, zip(COLOURS, MARKERS, strict=True), strict=True))
        return {name: own[name] for name in names}
    scale = mpl.colormaps["viridis"]
    return {
        name: (scale(0.95 * index / max(1, len(names) - 1)), MARKERS[index % len(MARKERS)])
        for index, name in enumerate(names)
    }


def _speed_panel(
    axes: Any,
    panel: SpeedPanel,
    looks: dict[str, tuple[Any, str]],
    handles: dict[str, Any],
) -> None:
    for line in panel.lines:
        colour, marker = looks[line.pattern]
        axes.axhline(line.bound, color=colour, linewidth=1, linestyle=DASHES, alpha=0.8)
        (handle,) = axes.plot(
            *zip(*line.burst, strict=True),
            color=colour,
            marker=marker,
            markersize=4.5,
            linewidth=1.6,
        )
        handles[f"{line.pattern} (bound {line.bound:.2f})"] = handle
        for points, look in (
            (line.older, {"markersize": 4.5, "markerfacecolor": "white"}),
            (line.sustained, {"markersize": 8, "fillstyle": "none"}),
        ):
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    color=colour,
                    marker=marker,
                    linestyle="none",
                    **look,
                )
    axes.set_title(panel.title, loc="left")
    token_axis(axes, [m for line in panel.lines for m, _ in (*line.burst, *line.sustained)])
    grid_below(axes)


# --- stages ---------------------------------------------------------------------------------------


def _breakdown(figure: Any, chart: BreakdownChart) -> None:
    columns = len(chart.panels)
    figure.set_size_inches(1.2 + 3.6 * columns, 4.2)
    grid = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for axes, (dtype, bars) in zip(grid, chart.panels, strict=True):
        sizes = sorted({bar.m for bar in bars})
        dense = {bar.m: sum(us for _, us in bar.stages) for bar in bars if bar.side == "dense"}
        for bar in bars:
            at = sizes.index(bar.m) + (0.2 if bar.side == "dense" else -0.2)
            bottom = 0.0
            for stage, us in bar.stages:
                height = 100 * us / dense[bar.m]
                handle = axes.bar(
                    at,
                    height,
                    0.36,
                    bottom,
                    color=_STAGE_COLOURS[stage],
                    # What a bar is about is told by its place and, in grey, by its hatch.
                    hatch="///" if bar.side == "dense" else None,
                    edgecolor="white",
                    linewidth=0.5,
                )
                handles.setdefault(f"{stage}", _patch(_STAGE_COLOURS[stage], None))
                del handle
                bottom += height
        side = next(bar.side for bar in bars if bar.side != "dense")
        axes.set_title(f"{dtype}: left {side}, right dense (hatched)", loc="left")
        axes.set_xticks(range(len(sizes)), [str(m) for m in sizes])
        axes.tick_params(axis="x", length=0, labelsize=8)
        axes.set_xlabel("M (tokens)")
        grid_below(axes)
    grid[0].set_ylabel("time, % of the dense operator's")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))


def _patch(colour: str, hatch: str | None) -> Any:
    from matplotlib.patches import Patch

    return Patch(facecolor=colour, hatch=hatch, edgecolor="white")


# --- rates ----------------------------------------------------------------------------------------


def _rates(figure: Any, chart: RateChart) -> None:
    count = len(chart.rows)
    figure.set_size_inches(8.6, 1.3 + 0.24 * count)
    axes = figure.subplots()
    places = [count - 1 - index for index in range(count)]
    best = max(row.copy_tb_per_s for row in chart.rows)
    axes.axvline(best, color=GREY, linewidth=1.2)
    axes.annotate(
        f"fastest copy of the run, {best:.2f} TB/s = 100 %",
        (best, 1.0),
        (4, 3),
        xycoords=("data", "axes fraction"),
        textcoords="offset points",
        ha="right",
        va="bottom",
        color=GREY,
        fontsize=8,
    )
    axes.hlines(places, 0, [row.tb_per_s for row in chart.rows], color=COLOURS[0], linewidth=2)
    (kernel,) = axes.plot(
        [row.tb_per_s for row in chart.rows],
        places,
        color=COLOURS[0],
        marker="o",
        markersize=5,
        linestyle="none",
    )
    (copy,) = axes.plot(
        [row.copy_tb_per_s for row in chart.rows],
        places,
        color=COLOURS[1],
        marker="|",
        markersize=11,
        markeredgewidth=2,
        linestyle="none",
    )
    for row, place in zip(chart.rows, places, strict=True):
        share = 100 * row.tb_per_s / best
        axes.annotate(
            f"{share:.0f} %",
            (best, place),
            (9, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    axes.set_yticks(places, [row.label for row in chart.rows], fontsize=8)
    axes.set_ylim(-0.7, count - 0.3)
    axes.set_xlim(0, 1.12 * best)
    axes.set_xlabel("bytes read and written, TB/s")
    axes.spines["left"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    grid_below(axes, "x")
    figure.legend(
        [kernel, copy],
        ["the kernel", "a device-to-device copy of as many bytes, in turns with it"],
        loc="outside lower center",
        ncols=2,
    )
