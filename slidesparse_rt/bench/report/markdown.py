"""Result files as Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Sequence

from ...pattern import PATTERNS
from ..packing import targets
from ..pipeline import noise, promises
from ..shapes import SQUARES
from ..sides import AUTO, DENSE
from .results import (
    BOTH,
    Case,
    Key,
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
    "DTYPES",
    "MODES",
    "SHORT",
    "against_dense",
    "auto_against_dense",
    "breakdown",
    "left_out",
    "overhead",
    "packing",
    "patterns_of",
    "product_sections",
    "quantize",
    "ratios",
    "short",
    "source",
    "table",
]

DTYPES = ("int8", "fp8_e4m3", "bf16", "fp16")
MODES = ("sustained", "burst")
SHORT = {"gemm": "GEMM", "op": "op", "int8": "int8", "fp8_e4m3": "fp8"}
#: Stage and operand format of each column beside the best dense 8-bit product.
_COLUMNS = (("gemm", "int8"), ("gemm", "fp8_e4m3"), ("op", "int8"), ("op", "fp8_e4m3"))
#: Cases of a file that are named where they were left out; the file has them all.
_NAMED = 6
#: Elements of x from which a launch of the quantize kernel is listed.
_FULL = 1 << 26


def short(dtype: str) -> str:
    """A format as tables name it."""
    return SHORT.get(dtype, dtype)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head)]
    lines.append(["---"] * len(lines[0]))
    lines += [list(row) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(result: Result, folder: str = "../benchmarks/results") -> str:
    """Where the numbers are from: machine, driver, libraries, commit, command.

    ``folder`` is where the link leads; "" makes none.
    """
    document = result.document
    gpu, versions = document["gpu"], document["versions"]
    shown = ", ".join(
        f"{key} {versions[key]}"
        for key in ("cusparselt", "cublaslt", "nvrtc", "cupy", "torch")
        if versions.get(key)
    )
    where = "no GPU" if gpu is None else str(gpu["name"])
    if gpu and gpu.get("driver"):
        where += f", driver {gpu['driver']}"
    commit = document["commit"]["id"] if document["commit"] else "unknown"
    name = f"[`{result.name}`]({folder}/{result.name})" if folder else f"`{result.name}`"
    unfinished = "" if document.get("complete", True) else "; not complete"
    return (
        f"Source: {name}; {where}; {shown}; commit {commit}{unfinished}.\n\n"
        f"```sh\n{document['command']}\n```"
    )


def left_out(result: Result) -> str:
    """What a file was asked for and has not; "" where there is nothing."""
    groups: dict[str, list[str]] = {}
    for entry in result.document["left_out"]:
        groups.setdefault(entry["reason"], []).append(entry["case"])
    lines = []
    for reason, cases in groups.items():
        more = f" and {len(cases) - _NAMED} more" if len(cases) > _NAMED else ""
        lines.append(f"Left out ({reason}): {', '.join(cases[:_NAMED])}{more}.\n\n")
    return "".join(lines)


def patterns_of(keys: Iterable[Key]) -> list[str]:
    """The patterns that were measured, 2:4 first and dense last."""
    seen = {key.pattern for key in keys}
    return [pattern.name for pattern in PATTERNS if pattern.name in seen]


# --- products and operators -----------------------------------------------------------------------


def ratios(rows: Measured, side: str, stage: str, mode: str, value: str = "ratio") -> str:
    """Dense time over a side's, or its efficiency, by format, pattern and tokens.

    "" where nothing was measured.  Cells from another commit than the most recent one have a star.
    """
    fitting = {
        key: case
        for key, case in rows.items()
        if (key.stage, key.mode) == (stage, mode) and side in (case.row.get(value) or ())
    }
    tokens = sorted({key.m for key in fitting})
    newest, older = newest_of(fitting.values()), dict[str, None]()
    lines = []
    for dtype in DTYPES:
        for pattern in patterns_of(fitting):
            if value == "efficiency" and pattern == "2:4":
                continue  # 1 by definition
            found = {
                key.m: case
                for key, case in fitting.items()
                if (key.dtype, key.pattern) == (dtype, pattern)
            }
            if found:
                bound = next(iter(found.values())).row["bound"]
                cells = [
                    f"{found[m].row[value][side]:.2f}{_star(found[m], newest, older)}"
                    if m in found
                    else "-"
                    for m in tokens
                ]
                lines.append([dtype, pattern, f"{bound:.2f}", *cells])
    if not lines:
        return ""
    made = table(["type", "pattern", "bound", *(f"M={m}" for m in tokens)], lines)
    return f"{made}{_stars(newest, older)}"


def _star(case: Case | None, newest: str, older: dict[str, None]) -> str:
    """A star for a cell of another commit, which is added to ``older``."""
    if case is None or case.result.commit == newest:
        return ""
    older[case.result.commit] = None
    return "*"


def _stars(newest: str, older: Iterable[str]) -> str:
    """What the stars of a table mean; "" where it has none."""
    names = ", ".join(older)
    return f"\n\n\\* measured at commit {names}, the others at {newest}." if names else ""


def _cell(case: Case | None, side: str, mark: str) -> str:
    """Dense of the same format over sparse, then the best dense 8-bit over sparse."""
    if case is None:
        return "-"
    best = case.row["ratio_best_8bit"]
    both = f"{case.row['ratio'][side]:.2f} / {'-' if best is None else f'{best[side]:.2f}'}"
    return both + mark


def against_dense(rows: Measured, side: str, model: str, pattern: str) -> str:
    """One table, sustained figures first; "" where nothing was measured.

    Cells from another commit than the most recent one have a star.
    """
    fitting = {
        key: case
        for key, case in rows.items()
        if (key.model, key.pattern) == (model, pattern) and key.dtype in SHORT
    }
    if not fitting:
        return ""
    newest, older = newest_of(fitting.values()), dict[str, None]()
    modes = [mode for mode in MODES if any(key.mode == mode for key in fitting)]
    columns = [(mode, stage, dtype) for mode in modes for stage, dtype in _COLUMNS]
    head = ["M", *(f"{mode} {SHORT[stage]} {SHORT[dtype]}" for mode, stage, dtype in columns)]
    lines = []
    for m in sorted({key.m for key in fitting}):
        line = [str(m)]
        for mode, stage, dtype in columns:
            case = fitting.get(Key(model, pattern, dtype, m, stage, mode))
            line.append(_cell(case, side, _star(case, newest, older)))
        lines.append(line)
    bound = next(iter(fitting.values())).row["bound"]
    made = table(head, lines)
    return f"{pattern}, at most {bound:.2f}:\n\n{made}{_stars(newest, older)}\n\n"


def _same_format(rows: Measured, side: str) -> str:
    """Both stages of one model against dense of the same format; "" where nothing was measured."""
    text = ""
    for mode in MODES:
        for stage in ("gemm", "op"):
            made = ratios(rows, side, stage, mode)
            if made:
                formats = " and ".join(
                    dtype for dtype in DTYPES if any(key.dtype == dtype for key in rows)
                )
                text += f"{mode} {SHORT[stage]}, against dense {formats}:\n\n{made}\n\n"
    return text


def product_sections(results: Sequence[Result]) -> str:
    """Every sparse side, model and pattern of "gemm" results; "" without any."""
    text = ""
    for side, rows in products(results, "gemm").items():
        for model, own in by_model(rows).items():
            text += f"**`{side}`, {title_of(model)}**\n\n"
            alone = own
            if model != SQUARES:
                for pattern in patterns_of(own):
                    text += against_dense(own, side, model, pattern)
                alone = {key: case for key, case in own.items() if key.dtype not in SHORT}
            text += _same_format(alone, side)
            efficiency = ratios(own, side, "gemm", "burst", "efficiency")
            if efficiency:
                text += f"Efficiency of products, T(2:4) * gamma / T, burst:\n\n{efficiency}\n\n"
    return text


def auto_against_dense(results: Sequence[Result]) -> str:
    """The speed of "auto" over dense, of "pipeline" results, and where it is lowest; "" without."""
    rows = products(results, "pipeline").get(AUTO, {})
    if not rows:
        return ""
    text = ""
    for model, own in by_model(rows).items():
        for mode in MODES:
            made = ratios(own, AUTO, "op", mode)
            if made:
                text += f"{title_of(model)}, {mode}:\n\n{made}\n\n"
    found = [case.row for case in rows.values()]
    lines = (*map(str, promises(found)), noise(found))
    shown = "".join(f"- {line}\n" for line in lines if line)
    return f"{text}Of {len(rows)} cases:\n\n{shown}\n"


# --- stages of an operator ------------------------------------------------------------------------


def breakdown(results: Sequence[Result], pattern: str = "6:8") -> str:
    """The stages of operators in bursts, sparse and dense, in microseconds; "" where unmeasured."""
    text = ""
    for side, rows in products(results, "gemm").items():
        for model, own in by_model(rows).items():
            pairs = sorted(operators(own, pattern), key=lambda pair: DTYPES.index(pair[0].dtype))
            lines = [
                [key.dtype, str(key.m), *(_sum(product, whole, one) for one in (side, DENSE))]
                for key, product, whole in pairs
            ]
            if lines:
                made = table(["type", "M", f"`{side}`", "`dense`"], lines)
                text += f"{title_of(model)}, {pattern}, microseconds:\n\n{made}\n\n"
    return text


def _sum(product: Case, whole: Case, side: str) -> str:
    """An operator's time as the sum of its stages."""
    own, every = product.us(side), whole.us(side)
    parts = stages(product, whole, side)
    if every < own:  # two measurements of one thing
        shown = [f"{own:.0f} - {own - every:.0f}"]
    elif len(parts) == 2 and parts[1][0] == BOTH:
        shown = [f"{own:.0f}", f"({parts[1][1]:.0f})"]
    else:
        shown = [f"{us:.0f}" for _, us in parts]
    return f"{' + '.join(shown)} = {every:.0f}"


# --- the others -----------------------------------------------------------------------------------


def quantize(results: Sequence[Result], patterns: Sequence[str] = ()) -> str:
    """The kernels against the best copy; large launches, of these patterns or all."""
    rows = merged(results, "quantize")
    best = max(row["copy_tb_per_s"] for row in rows)
    lines = []
    for row in rows:
        if row["m"] * row["columns"] < _FULL:
            continue
        if patterns and row["pattern"] not in (None, *patterns):
            continue
        lines.append(
            [
                row["kernel"],
                f"{row['x']} to {row['out']}",
                row["pattern"] or "-",
                str(row["m"]),
                str(row["columns"]),
                f"{sum(row['bytes'].values()) / 1e6:.0f}",
                f"{row['us']:.1f}",
                f"{row['tb_per_s']:.2f}",
                f"{100 * row['tb_per_s'] / best:.0f} %",
            ]
        )
    head = ["kernel", "types", "pattern", "M", "K or N", "MB moved", "us", "TB/s", "of best copy"]
    return (
        f"The best device-to-device copy of the run moved {best:.2f} TB/s, read and written bytes "
        f"counted.\n\n{table(head, lines)}"
    )


def overhead(results: Sequence[Result]) -> str:
    """Host time of a call."""
    lines = [
        [
            f"`{row['call']}`",
            row["backend"],
            row["dtype"],
            f"{row['median_us']:.1f}",
            f"{row['minimum_us']:.1f}",
        ]
        for row in merged(results, "overhead")
    ]
    return table(["call", "backend", "type", "median us", "minimum us"], lines)


def packing(result: Result) -> str:
    """Packing on the CPU: facts, times, and what is wanted."""
    document, settings = result.document, result.document["settings"]
    host = document.get("host", {})
    commit = document["commit"] or {"id": "none yet", "dirty": False}
    versions = {"slidesparse-rt": document["package"]} | {
        name: document["versions"].get(name)
        for name in ("python", "numpy", "numba", "ml_dtypes", "torch")
    }
    shown = ", ".join(f"{name} {number}" for name, number in versions.items() if number)
    facts = [
        f"weight: {settings['n']} x {settings['k']}, {settings['input']}, {settings['pattern']}",
        f"machine: {host.get('cpu')}, {host.get('cores')} cores, {host.get('system')}; "
        f"{settings['threads']} threads",
        f"versions: {shown}",
        f"commit: {commit['id']}{' with changes' if commit['dirty'] else ''}; SHA-256 of the "
        f"sources: {document['sources_sha256'][:16]}",
        f"time: {document['time']}; load average {_load(host, 'before')} before, "
        f"{_load(host, 'after')} after; {settings['rounds']} rounds",
    ]
    lines = ["```sh", document["command"], "```", ""]
    for fact in facts:
        lines += textwrap.wrap(
            fact, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
        )
    head = ["step", "version", "ms", "M weights/s", "time over ours", "peak memory over input"]
    rows = [
        [
            row["step"],
            row["version"],
            f"{1e3 * row['median_seconds']:.0f}",
            f"{row['weights_per_second'] / 1e6:.0f}",
            f"{row['time_over_ours']:.1f}",
            _optional(row["peak_memory_over_input"]),
        ]
        for row in result.rows
    ]
    wanted = []
    for goal in targets(result.rows):
        if "at_least" in goal:
            numbers = [
                f"at least {goal['at_least'] / 1e6:.0f} M",
                f"{goal['measured'] / 1e6:.0f} M",
            ]
        else:
            numbers = [f"at most {goal['at_most']}", f"{goal['measured']:.2f}"]
        wanted.append([goal["what"], *numbers, "yes" if goal["met"] else "no"])
    text = "\n".join(lines)
    goals = table(["wanted on two cores", "bound", "measured", "met"], wanted)
    return f"{text}\n\n{table(head, rows)}\n\n{goals}"


def _optional(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _load(host: dict[str, float | None], when: str) -> str:
    return _optional(host.get(f"load_average_{when}"))
