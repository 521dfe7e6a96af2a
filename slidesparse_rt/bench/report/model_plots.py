"""Drawing charts of whole models: passes end to end, and what pruning costs."""

from __future__ import annotations

from typing import Any

from .charts import AccuracyChart, PassChart, PassPanel
from .looks import COLOURS, DASHES, DOTS, GREY, MARKERS, grid_below, token_axis
from .markdown import DTYPES, short

__all__ = ["draw_accuracy", "draw_passes"]

#: Lines that lie on each other: the first one is wide, its markers are rings around the second's.
_LINES: tuple[dict[str, Any], ...] = (
    {"color": COLOURS[0], "marker": MARKERS[0], "markersize": 8, "linewidth": 2.4}
    | {"fillstyle": "none"},
    {"color": COLOURS[1], "marker": MARKERS[1], "markersize": 4, "linewidth": 1.2},
    {"color": COLOURS[2], "marker": MARKERS[2], "markersize": 4, "linewidth": 1.2},
    {"color": COLOURS[3], "marker": MARKERS[3], "markersize": 4, "linewidth": 1.2},
)
_FORMATS = [short(dtype) for dtype in DTYPES]


def draw_passes(figure: Any, chart: PassChart) -> None:
    """Draw speeds over dense fp8, panels of one height for every pattern and phase."""
    columns = max(len(row) for row in chart.rows)
    figure.set_size_inches(1.2 + 2.9 * columns, 1.5 + 2.7 * len(chart.rows))
    grid = figure.subplots(len(chart.rows), columns, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    values = [
        value
        for row in chart.rows
        for panel in row
        for points in (*(points for _, points in panel.lines), panel.bound, panel.wanted)
        for _, value in points
    ]
    for axes_row, row in zip(grid, chart.rows, strict=True):
        for axes in axes_row[len(row) :]:
            axes.set_visible(False)
        for axes, panel in zip(axes_row, row, strict=False):
            _pass_panel(axes, panel, handles)
            axes.set_ylim(min(0.9, 0.97 * min(values)), 1.04 * max(*values, 1.0))
        axes_row[0].set_ylabel("speed, dense fp8 = 1")
    lines = list(
        dict.fromkeys(name for row in chart.rows for panel in row for name, _ in panel.lines)
    )
    order = [*lines, *(name for name in handles if name not in lines)]
    figure.legend(
        [handles[name] for name in order],
        order,
        loc="outside lower center",
        ncols=min(len(handles), 2 * columns),
    )


def _pass_panel(axes: Any, panel: PassPanel, handles: dict[str, Any]) -> None:
    axes.axhline(1.0, color=GREY, linewidth=1.2)
    if panel.bound:
        (handles["at most, were linear layers N/(N-1) times as fast"],) = axes.plot(
            *zip(*panel.bound, strict=True), color=GREY, linewidth=1, linestyle=DASHES
        )
    if panel.wanted:
        (handles["wanted"],) = axes.plot(
            *zip(*panel.wanted, strict=True), color="#000000", linewidth=1.4, linestyle=DOTS
        )
    for name, points in panel.lines:
        look = _LINES[_FORMATS.index(name)]
        (handles[name],) = axes.plot(*zip(*points, strict=True), **look)
    axes.set_title(panel.title, loc="left")
    token_axis(axes, [m for _, points in panel.lines for m, _ in points], panel.tokens)
    grid_below(axes)


def draw_accuracy(figure: Any, chart: AccuracyChart) -> None:
    """Draw increases of bits per byte, a panel for each format, on an axis of powers of ten."""
    from matplotlib.lines import Line2D
    from matplotlib.ticker import FuncFormatter

    columns = len(chart.panels)
    figure.set_size_inches(1.2 + 3.3 * columns, 4.4)
    grid = figure.subplots(1, columns, squeeze=False, sharey=True)[0]
    handles: dict[str, Any] = {}
    for axes, panel in zip(grid, chart.panels, strict=True):
        shares: dict[float, str] = {}
        for index, (method, points) in enumerate(panel.lines):
            shares |= {100 * share: pattern for pattern, share, _ in points}
            (handles[method],) = axes.plot(
                [100 * share for _, share, _ in points],
                [more for _, _, more in points],
                **_LINES[index],
            )
        if panel.unpruned is not None:
            axes.axhline(panel.unpruned, color=GREY, linewidth=1.2, linestyle=DOTS)
            handles["quantized alone, nothing pruned (bf16: 0)"] = Line2D(
                [], [], color=GREY, linewidth=1.2, linestyle=DOTS
            )
        ticks = sorted(shares)
        axes.set_xticks(ticks, [f"{shares[tick]}\n{tick:.0f} %" for tick in ticks])
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.set_title(panel.title, loc="left")
        axes.set_xlabel("pattern, and the share of weights that it keeps")
        grid_below(axes)
    grid[0].set_ylabel("bits per byte more than bf16 unpruned, log scale")
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))
