"""Result documents of ``slidesparse bench`` as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["render"]


def render(document: Mapping[str, Any], screen: Console, *, profile: bool = False) -> None:
    """Print a result document for people.

    Raises FormatError if it is none.
    """
    from ..bench.record import check_document
    from .console import printable

    check_document(document)
    gpu = document["gpu"] or {"name": "no GPU"}
    commit = document["commit"]
    words = [printable(str(gpu["name"]))]
    if gpu.get("driver"):
        words.append(f"driver {gpu['driver']}")
    words += [
        f"{name} {document['versions'][name]}"
        for name in ("cusparselt", "cublaslt", "cuda_runtime", "cupy", "torch")
        if document["versions"].get(name)
    ]
    if commit is not None:
        words.append(f"commit {commit['id'][:12]}{' with changes' if commit['dirty'] else ''}")
    screen.print(", ".join(words), soft_wrap=True)
    {
        "gemm": _gemm_table,
        "pipeline": _pipeline_table,
        "quantize": _quantize_table,
        "overhead": _overhead_table,
        "packing": _packing_table,
    }[document["what"]](document["rows"], screen)
    if profile:
        _profiles(document["rows"], screen)
    _left_out(document["left_out"], screen)
    if not document["complete"]:
        screen.print("This result is not complete.", soft_wrap=True)


def _left_out(entries: Sequence[Mapping[str, str]], screen: Console) -> None:
    from .console import printable

    groups: dict[tuple[str, str], list[str]] = {}
    for entry in entries:
        groups.setdefault((entry["reason"], entry["why"]), []).append(entry["case"])
    for (reason, why), cases in groups.items():
        names = ", ".join(cases[:3]) + (f" and {len(cases) - 3} more" if len(cases) > 3 else "")
        screen.print(printable(f"left out ({reason}): {names}: {why}"), soft_wrap=True)


def _gemm_table(rows: Sequence[Mapping[str, Any]], screen: Console) -> None:
    """One line for each case and sparse side, products and operators side by side."""
    from .console import show_table

    cases: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        for side in row["ratio"]:
            key = (row["model"], row["pattern"], row["dtype"], row["m"], row["mode"], side)
            cases.setdefault(key, {})[row["stage"]] = row
    lines = []
    for (model, pattern, dtype, m, mode, side), stages in cases.items():
        bound = next(iter(stages.values()))["bound"]
        line = [model, pattern, dtype, side, str(m), mode, f"{bound:.3f}"]
        for stage in ("gemm", "op"):
            if stage not in stages:
                line += ["-"] * 4
                continue
            row = stages[stage]
            best = row.get("ratio_best_8bit")
            line += [
                f"{row['us'][side]:.1f}",
                f"{row['us']['dense']:.1f}",
                f"{row['ratio'][side]:.3f}",
                "-" if best is None else f"{best[side]:.3f}",
            ]
        lines.append(line)
    titles = ["model", "pattern", "dtype", "sparse", "M", "mode", "bound"]
    for stage in ("gemm", "op"):
        titles += [f"{stage}\nsparse us", "dense us", "ratio", "to best\n8-bit"]
    show_table(screen, titles, lines, left=4)


def _pipeline_table(rows: Sequence[Mapping[str, Any]], screen: Console) -> None:
    """One line for each case, every side beside dense, and where "auto" is at its slowest."""
    from ..bench.pipeline import noise, promises
    from .console import show_table

    sides = list(dict.fromkeys(side for row in rows for side in row["us"]))
    lines = []
    for row in rows:
        runs = dict.fromkeys(row.get("layer_how", {}).get("auto", {}).values())
        ratio = row["ratio"].get("auto")
        line = [row["model"], row["pattern"], row["dtype"], row["mode"], str(row["m"])]
        line += [f"{row['us'][side]:.1f}" if side in row["us"] else "-" for side in sides]
        lines.append([*line, "-" if ratio is None else f"{ratio:.3f}", "+".join(runs) or "-"])
    titles = ["model", "pattern", "dtype", "mode", "M", *(f"{side}\nus" for side in sides)]
    show_table(screen, [*titles, "auto over\ndense", "auto runs"], lines, left=4)
    for text in (*map(str, promises(rows)), noise(rows)):
        if text:
            screen.print(text, soft_wrap=True)


def _packing_table(rows: Sequence[Mapping[str, Any]], screen: Console) -> None:
    """One line for each step and version, and what is wanted."""
    from ..bench.packing import targets
    from .console import show_table

    lines = []
    for row in rows:
        peak = row["peak_memory_over_input"]
        lines.append(
            [
                row["step"],
                row["version"],
                f"{1e3 * row['median_seconds']:.1f}",
                f"{row['weights_per_second'] / 1e6:.0f}",
                f"{row['time_over_ours']:.1f}",
                "-" if peak is None else f"{peak:.2f}",
            ]
        )
    titles = ["step", "version", "ms", "M weights/s", "time\nover ours", "memory\nover input"]
    show_table(screen, titles, lines, left=2)
    for goal in targets(rows):
        bound = (
            f"at least {goal['at_least']:.3g}"
            if "at_least" in goal
            else (f"at most {goal['at_most']}")
        )
        verdict = "met" if goal["met"] else "MISSED"
        screen.print(f"{verdict}: {goal['what']}: {goal['measured']:.3g}, wanted {bound}")


def _quantize_table(rows: Sequence[Mapping[str, Any]], screen: Console) -> None:
    from .console import show_table

    lines = [
        [
            row["kernel"],
            f"{row['x']} -> {row['out']}",
            row["pattern"] or "-",
            str(row["m"]),
            str(row["columns"]),
            f"{row['bytes']['read'] / 1e6:.1f}",
            f"{row['bytes']['written'] / 1e6:.1f}",
            f"{row['us']:.1f}",
            f"{row['tb_per_s']:.2f}",
            f"{row['copy_tb_per_s']:.2f}",
            f"{100 * row['of_copy']:.1f}%",
        ]
        for row in rows
    ]
    titles = ["kernel", "types", "pattern", "M", "K or N", "MB read", "MB written", "us", "TB/s"]
    show_table(screen, [*titles, "copy\nTB/s", "of copy"], lines, left=3)


def _overhead_table(rows: Sequence[Mapping[str, Any]], screen: Console) -> None:
    from .console import show_table

    lines = [
        [
            row["call"],
            row["backend"],
            row["dtype"],
            f"{row['median_us']:.1f}",
            f"{row['minimum_us']:.1f}",
        ]
        for row in rows
    ]
    show_table(screen, ["call", "by", "dtype", "median us", "minimum us"], lines, left=3)


def _profiles(rows: Sequence[Mapping[str, Any]], screen: Console) -> None:
    """Where the host's time goes, for every plan measured."""
    from .console import printable, show_table, styled

    for row in rows:
        if not row.get("profile"):
            continue
        screen.print()
        screen.print(styled(f"{row['backend']} {row['dtype']}, {row['call']}", "bold"))
        lines = [
            [
                printable(entry["function"]),
                f"{entry['calls']:.1f}",
                f"{entry['own_us']:.2f}",
                f"{entry['total_us']:.2f}",
            ]
            for entry in row["profile"]
        ]
        show_table(screen, ["function", "calls", "own us", "total us"], lines)
