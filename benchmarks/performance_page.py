"""The measured sections of docs/performance.md, from the result files and nothing else.

python benchmarks/performance_page.py          # write the page's sections again
python benchmarks/performance_page.py --check  # exit 1 if the page differs

The sections of the H100 are made from gemm-h100.json, gemm-sustained-h100.json (either also in
several runs: gemm-sustained-h100-2.json and so on), quantize-h100.json, overhead-h100.json and
gpu-checks-h100.json; what is not there has no section.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

from slidesparse_rt.bench.record import upgraded
from slidesparse_rt.bench.sides import SPARSE

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "performance.md"
RESULTS = ROOT / "benchmarks" / "results"
PATTERNS = ("2:4", "4:6", "6:8", "8:10")


def read(name: str) -> dict[str, Any]:
    """One result file."""
    document: dict[str, Any] = json.loads((RESULTS / name).read_text())
    return upgraded(document) if "schema" in document else document


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """A Markdown table."""
    lines = [list(head)]
    lines.append(["---"] * len(lines[0]))
    lines += [list(row) for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def source(name: str) -> str:
    """Where the numbers are from: GPU, driver, libraries, commit, command."""
    document = read(name)
    gpu, versions = document["gpu"], document["versions"]
    shown = ", ".join(
        f"{key} {versions[key]}"
        for key in ("cusparselt", "cublaslt", "nvrtc", "cupy", "torch")
        if versions.get(key)
    )
    driver = f", driver {gpu['driver']}" if "driver" in gpu else ""
    return (
        f"Source: [`{name}`](../benchmarks/results/{name}); {gpu['name']}{driver}; {shown}; commit "
        f"{document['commit']['id']}.\n\n```sh\n{document['command']}\n```"
    )


def ratios(rows: Iterable[dict[str, Any]], side: str, stage: str, mode: str) -> str:
    """Dense time over sparse time of the same operand format, by pattern and tokens."""
    rows = [
        row
        for row in rows
        if row["stage"] == stage and row["mode"] == mode and side in row["ratio"]
    ]
    tokens = sorted({row["m"] for row in rows})
    lines = []
    for dtype in ("int8", "fp8_e4m3", "bf16"):
        for pattern in PATTERNS:
            found = {r["m"]: r for r in rows if (r["dtype"], r["pattern"]) == (dtype, pattern)}
            if not found:
                continue
            bound = next(iter(found.values()))["bound"]
            cells = [f"{found[m]['ratio'][side]:.2f}" if m in found else "-" for m in tokens]
            lines.append([dtype, pattern, f"{bound:.2f}", *cells])
    return table(["type", "pattern", "bound", *(f"M={m}" for m in tokens)], lines)


def gemm() -> str:
    """Bursts, all numbers of tokens."""
    name = "gemm-h200.json"
    rows = read(name)["rows"]
    return (
        f"Operator (bf16 in, bf16 out; quantization on both sides):\n\n"
        f"{ratios(rows, 'cusparselt', 'op', 'burst')}\n\nProduct alone, on prepared operands:\n\n"
        f"{ratios(rows, 'cusparselt', 'gemm', 'burst')}\n\n{source(name)}"
    )


def sustained() -> str:
    """Each side alone for at least a second."""
    name = "gemm-sustained-h200.json"
    document = read(name)
    rows = document["rows"]
    left = ", ".join(entry["case"] for entry in document["left_out"])
    return (
        f"Operator:\n\n{ratios(rows, 'cusparselt', 'op', 'sustained')}\n\nProduct alone:\n\n"
        f"{ratios(rows, 'cusparselt', 'gemm', 'sustained')}\n\nNot measured (time): {left}.\n\n"
        f"{source(name)}"
    )


def quantize(name: str) -> str:
    """The kernels against the best copy of the run."""
    rows = read(name)["rows"]
    best = max(row["copy_tb_per_s"] for row in rows)
    lines = []
    for row in rows:
        elements = row["m"] * row["columns"]
        if elements < 1 << 26 or row.get("pattern") not in (None, *PATTERNS):
            continue
        types = f"{row.get('x') or row.get('acc')} to {row['out']}"
        moved = sum(row["bytes"].values()) / 1e6
        lines.append(
            [
                row["kernel"],
                types,
                row.get("pattern") or "-",
                str(row["m"]),
                str(row["columns"]),
                f"{moved:.0f}",
                f"{row['us']:.1f}",
                f"{row['tb_per_s']:.2f}",
                f"{100 * row['tb_per_s'] / best:.0f} %",
            ]
        )
    head = ["kernel", "types", "pattern", "M", "K or N", "MB moved", "us", "TB/s", "of best copy"]
    return (
        f"The best device-to-device copy of the run moved {best:.2f} TB/s, read and written bytes "
        f"counted.\n\n{table(head, lines)}\n\n{source(name)}"
    )


def overhead(name: str) -> str:
    """Host time of a call."""
    lines = [
        [
            f"`{row['call']}`",
            row["backend"],
            row["dtype"],
            f"{row['median_us']:.1f}",
            f"{row['minimum_us']:.1f}",
        ]
        for row in read(name)["rows"]
    ]
    head = ["call", "backend", "type", "median us", "minimum us"]
    return f"{table(head, lines)}\n\n{source(name)}"


def checks(name: str) -> str:
    """Packing a 7B model, and the errors of sums."""
    document = read(name)
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
        f"weights on the GPU:\n\n{packed}\n\nLargest error of a sum, relative to the sum of the "
        f"products' magnitudes, float32 results against float64 on the same operands:\n\n{errors}"
        f"\n\n{source(name)}"
    )


# --- H100 -----------------------------------------------------------------------------------------

#: Stage and operand format of each column.
_COLUMNS = (("gemm", "int8"), ("gemm", "fp8_e4m3"), ("op", "int8"), ("op", "fp8_e4m3"))
_SHORT = {"gemm": "GEMM", "op": "op", "int8": "int8", "fp8_e4m3": "fp8"}
_MODES = ("sustained", "burst")
#: Cases of a file that are named where they were left out; the file has them all.
_NAMED = 6

#: (model, pattern, operand format, M, stage, mode)
Key = tuple[str, str, str, int, str, str]
#: Rows of one sparse side.
Rows = dict[Key, dict[str, Any]]


def parts(stem: str) -> list[str]:
    """The files of a measurement that was made in one run or in several: stem.json, stem-2.json."""
    found = {}
    for path in RESULTS.glob(f"{stem}*.json"):
        match = re.fullmatch(rf"{re.escape(stem)}(?:-(\d+))?\.json", path.name)
        if match:
            found[int(match[1] or 1)] = path.name
    return [found[number] for number in sorted(found)]


def measured(names: Iterable[str], side: str) -> Rows:
    """The rows of a sparse side in several files; the first file that has a case counts."""
    rows: Rows = {}
    for name in names:
        for row in read(name)["rows"]:
            if side in row["ratio"]:
                key = (row["model"], row["pattern"], row["dtype"])
                rows.setdefault((*key, row["m"], row["stage"], row["mode"]), row)
    return rows


def cell(row: dict[str, Any] | None, side: str) -> str:
    """Dense of the same format over sparse, then the best dense 8-bit over sparse."""
    if row is None:
        return "-"
    best = row["ratio_best_8bit"]
    return f"{row['ratio'][side]:.2f} / {'-' if best is None else f'{best[side]:.2f}'}"


def against_dense(rows: Rows, side: str, model: str, pattern: str) -> str:
    """One table, sustained figures first; "" where nothing was measured."""
    fitting = [key for key in rows if key[:2] == (model, pattern) and key[2] in _SHORT]
    if not fitting:
        return ""
    modes = [mode for mode in _MODES if any(key[5] == mode for key in fitting)]
    columns = [(mode, stage, dtype) for mode in modes for stage, dtype in _COLUMNS]
    head = ["M", *(f"{mode} {_SHORT[stage]} {_SHORT[dtype]}" for mode, stage, dtype in columns)]
    lines = []
    for m in sorted({key[3] for key in fitting}):
        found = (
            rows.get((model, pattern, dtype, m, stage, mode)) for mode, stage, dtype in columns
        )
        lines.append([str(m), *(cell(row, side) for row in found)])
    return f"{pattern}, at most {rows[fitting[0]]['bound']:.2f}:\n\n{table(head, lines)}\n\n"


def left_out(name: str) -> str:
    """What a file was asked for and has not."""
    groups: dict[str, list[str]] = {}
    for entry in read(name)["left_out"]:
        groups.setdefault(entry["reason"], []).append(entry["case"])
    lines = []
    for reason, cases in groups.items():
        more = f" and {len(cases) - _NAMED} more" if len(cases) > _NAMED else ""
        lines.append(f"Left out ({reason}): {', '.join(cases[:_NAMED])}{more}.\n\n")
    return "".join(lines)


def sparse_against_dense(machine: str) -> str:
    """Every model, sparse backend and pattern that was measured; "" without a file."""
    names = [*parts(f"gemm-{machine}"), *parts(f"gemm-sustained-{machine}")]
    if not names:
        return ""
    text = (
        f"### Sparse against dense on the {machine.upper()}\n\n"
        "Each cell: dense of the same operand format over sparse / the better of dense int8 and "
        "fp8 over sparse (in bursts layer by layer, where layers were timed). Sustained: each side "
        "alone for at least a second, the last half counted, rounds alternating. Burst: sides take "
        "turns, warm.\n\n"
    )
    for side in SPARSE:
        rows = measured(names, side)
        for model in dict.fromkeys(key[0] for key in rows):
            tables = [against_dense(rows, side, model, pattern) for pattern in PATTERNS]
            text += f"**`{side}`, {model}**\n\n{''.join(tables)}{sixteen_bits(rows, side, model)}"
    return text + "\n\n".join(left_out(name) + source(name) for name in names)


def sixteen_bits(rows: Rows, side: str, model: str) -> str:
    """bf16 against dense bf16; "" where it was not measured."""
    found = [row for key, row in rows.items() if (key[0], key[2]) == (model, "bf16")]
    text = ""
    for mode in _MODES:
        for stage in ("gemm", "op"):
            if any((row["stage"], row["mode"]) == (stage, mode) for row in found):
                text += f"{mode} {_SHORT[stage]}, against dense bf16:\n\n"
                text += f"{ratios(found, side, stage, mode)}\n\n"
    return text


def h100() -> str:
    """Everything that has a result file from an H100."""
    machine = "h100"
    sections = [sparse_against_dense(machine)]
    for stem, title, make in (
        ("quantize", "Quantize and lift on the H100", quantize),
        ("overhead", "Host time beside the H100", overhead),
        ("gpu-checks", "Packing and sums on the H100", checks),
    ):
        name = f"{stem}-{machine}.json"
        if (RESULTS / name).is_file():
            sections.append(f"### {title}\n\n{make(name)}")
    made = [section for section in sections if section]
    return "\n\n".join(["## NVIDIA H100", *made]) if made else ""


SECTIONS: dict[str, Callable[[], str]] = {
    "h100": h100,
    "gemm": gemm,
    "sustained": sustained,
    "quantize": partial(quantize, "quantize-h200.json"),
    "overhead": partial(overhead, "overhead-h200.json"),
    "checks": partial(checks, "gpu-checks-h200.json"),
}


def _given(text: str, match: re.Match[str]) -> str:
    del match
    return text


def rendered(page: str) -> str:
    """The page with each section between its markers made anew."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- measured: {name} -->", "<!-- measured: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = "\n\n".join(part for part in (begin, make(), end) if part)
        # A function, because backslashes in a replacement have a meaning.
        page, count = pattern.subn(partial(_given, text), page, count=1)
        if count != 1:
            raise SystemExit(f"{PAGE} has no section {begin}")
    return page


def main() -> None:
    """Write the page, or check it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true")
    options = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    made = rendered(page)
    if options.check:
        sys.exit(0 if made == page else f"{PAGE} differs from the result files; run this script")
    PAGE.write_text(made, encoding="utf-8")


if __name__ == "__main__":
    main()
