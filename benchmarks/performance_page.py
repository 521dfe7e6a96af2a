"""The measured sections of docs/performance.md, from the result files and nothing else.

python benchmarks/performance_page.py          # write the page's sections again
python benchmarks/performance_page.py --check  # exit 1 if the page differs
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from slidesparse_rt.bench.record import upgraded

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


def ratios(name: str, stage: str, mode: str) -> str:
    """Dense time over sparse time of the same operand format, by pattern and tokens."""
    rows = [r for r in read(name)["rows"] if r["stage"] == stage and r["mode"] == mode]
    tokens = sorted({row["m"] for row in rows})
    lines = []
    for dtype in ("int8", "fp8_e4m3", "bf16"):
        for pattern in PATTERNS:
            found = {r["m"]: r for r in rows if (r["dtype"], r["pattern"]) == (dtype, pattern)}
            if not found:
                continue
            bound = next(iter(found.values()))["bound"]
            cells = [
                f"{found[m]['ratio']['cusparselt']:.2f}" if m in found else "-" for m in tokens
            ]
            lines.append([dtype, pattern, f"{bound:.2f}", *cells])
    return table(["type", "pattern", "bound", *(f"M={m}" for m in tokens)], lines)


def gemm() -> str:
    """Bursts, all numbers of tokens."""
    name = "gemm-h200.json"
    return (
        f"Operator (bf16 in, bf16 out; quantization on both sides):\n\n"
        f"{ratios(name, 'op', 'burst')}\n\nProduct alone, on prepared operands:\n\n"
        f"{ratios(name, 'gemm', 'burst')}\n\n{source(name)}"
    )


def sustained() -> str:
    """Each side alone for at least a second."""
    name = "gemm-sustained-h200.json"
    left = ", ".join(entry["case"] for entry in read(name)["left_out"])
    return (
        f"Operator:\n\n{ratios(name, 'op', 'sustained')}\n\nProduct alone:\n\n"
        f"{ratios(name, 'gemm', 'sustained')}\n\nNot measured (time): {left}.\n\n{source(name)}"
    )


def quantize() -> str:
    """The kernels against the best copy of the run."""
    name = "quantize-h200.json"
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


def overhead() -> str:
    """Host time of a call."""
    name = "overhead-h200.json"
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


def checks() -> str:
    """Packing a 7B model, and the errors of sums."""
    name = "gpu-checks-h200.json"
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


SECTIONS: dict[str, Callable[[], str]] = {
    "gemm": gemm,
    "sustained": sustained,
    "quantize": quantize,
    "overhead": overhead,
    "checks": checks,
}


def rendered(page: str) -> str:
    """The page with each section between its markers made anew."""
    for name, make in SECTIONS.items():
        begin, end = f"<!-- measured: {name} -->", "<!-- measured: end -->"
        pattern = re.compile(f"{re.escape(begin)}.*?{re.escape(end)}", re.DOTALL)
        text = f"{begin}\n\n{make()}\n\n{end}"
        page, count = pattern.subn(lambda _, text=text: text, page, count=1)
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
