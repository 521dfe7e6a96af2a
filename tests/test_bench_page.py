"""docs/performance.md is made from result files: with those of an H100, and without."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
from bench_fakes import new_record

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def page(tmp_path, monkeypatch):
    """The script, with a folder of results that has those of the H200 alone."""
    spec = importlib.util.spec_from_file_location(
        "performance_page", ROOT / "benchmarks" / "performance_page.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for path in (ROOT / "benchmarks" / "results").glob("*h200.json"):
        shutil.copy(path, tmp_path)
    monkeypatch.setattr(module, "RESULTS", tmp_path)
    return module


def row(dtype, m, stage, mode, ratio, best, *, pattern="6:8", model="qwen2.5-7b"):
    return {
        "model": model, "m": m, "dtype": dtype, "pattern": pattern, "stage": stage, "mode": mode,
        "us": {}, "ratio": ratio, "ratio_best_8bit": best, "bound": 4 / 3, "checked": {},
    }  # fmt: skip


def write(page, name, rows, *, what="gemm", left_out=(), **more):
    document = new_record(what).document | {
        "rows": rows,
        "left_out": list(left_out),
        "gpu": {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1"},
        "commit": {"id": "abc", "dirty": None, "source": "command line"},
        "command": f"slidesparse bench {what} --output {name}",
    }
    (page.RESULTS / name).write_text(json.dumps(document | more))


def sections(text):
    """What stands between the markers of the H100."""
    return text.split("<!-- measured: h100 -->")[1].split("<!-- measured: end -->")[0]


def test_without_files_of_an_h100(page):
    text = page.rendered(page.PAGE.read_text(encoding="utf-8"))
    assert sections(text) == "\n\n"
    assert page.rendered(text) == text
    # Files of version 1, whose ratios are numbers, give what they always gave.
    assert "| int8 | 6:8 | 1.33 | 0.97 | 0.98 | 0.86 | 0.92 | 0.89 | 0.92 |" in text


def test_sustained_first_and_burst_beside_it(page):
    both = {"hopper": 1.25, "cusparselt": 0.9}
    write(
        page,
        "gemm-sustained-h100.json",
        [
            row("int8", 8192, "gemm", "sustained", {"hopper": 1.31}, {"hopper": 1.28}),
            row("fp8_e4m3", 8192, "op", "sustained", {"hopper": 1.17}, None),
            row("int8", 8192, "gemm", "burst", {"hopper": 9.0}, {"hopper": 9.0}),
            row("int8", 256, "op", "burst", {"hopper": 1.02}, {"hopper": 1.01}),
        ],
        left_out=[
            {"case": f"case {number}", "reason": "time budget", "why": "no time left"}
            for number in range(8)
        ],
    )
    write(page, "gemm-h100.json", [row("int8", 8192, "gemm", "burst", both, both)])
    write(
        page,
        "gemm-h100-2.json",
        [
            # Measured again: what came first counts.
            row("int8", 8192, "gemm", "burst", {"hopper": 5.0}, {"hopper": 5.0}),
            row("int8", 64, "gemm", "burst", {"hopper": 1.5}, {"hopper": 1.4}, pattern="4:6"),
            row("bf16", 64, "op", "burst", {"hopper": 1.19}, {"hopper": 2.0}),
        ],
    )
    write(page, "gemm-h100-2026-11-25.json", [row("int8", 1, "op", "burst", {"hopper": 7.0}, None)])
    text = page.rendered(page.PAGE.read_text(encoding="utf-8"))
    assert page.rendered(text) == text
    made = sections(text)
    lines = made.splitlines()
    start = lines.index("**`hopper`, qwen2.5-7b**")
    six = lines.index("6:8, at most 1.33:")
    assert start < lines.index("4:6, at most 1.33:") < six
    assert lines[six + 2] == (
        "| M | sustained GEMM int8 | sustained GEMM fp8 | sustained op int8 | sustained op fp8 "
        "| burst GEMM int8 | burst GEMM fp8 | burst op int8 | burst op fp8 |"
    )
    assert lines[six + 4 : six + 7] == [
        "| 256 | - | - | - | - | - | - | 1.02 / 1.01 | - |",
        "| 8192 | 1.31 / 1.28 | - | - | 1.17 / - | 1.25 / 1.25 | - | - | - |",
        "",
    ]
    other = lines.index("**`cusparselt`, qwen2.5-7b**")
    assert "| 8192 | 0.90 / 0.90 | - | - | - |" in lines[other:]
    assert "| bf16 | 6:8 | 1.33 | 1.19 |" in lines
    assert "Left out (time budget): case 0, case 1, case 2, case 3, case 4, case 5 and 2 more." in (
        lines
    )
    named = [line.split("`")[1] for line in lines if line.startswith("Source:")]
    assert named == ["gemm-h100.json", "gemm-h100-2.json", "gemm-sustained-h100.json"]
    assert "slidesparse bench gemm --output gemm-h100-2.json" in lines
    assert "Host time beside" not in made


def test_the_other_files_of_an_h100(page):
    write(
        page,
        "overhead-h100.json",
        [
            {"call": "SparseGemmPlan.run out=y", "backend": "hopper", "dtype": "int8",
             "median_us": 14.26, "minimum_us": 13.0},
        ],
        what="overhead",
    )  # fmt: skip
    made = sections(page.rendered(page.PAGE.read_text(encoding="utf-8")))
    assert "## NVIDIA H100" in made
    assert "| `SparseGemmPlan.run out=y` | hopper | int8 | 14.3 | 13.0 |" in made
    assert "Sparse against dense" not in made
    shutil.copy(page.RESULTS / "quantize-h200.json", page.RESULTS / "quantize-h100.json")
    shutil.copy(page.RESULTS / "gpu-checks-h200.json", page.RESULTS / "gpu-checks-h100.json")
    made = sections(page.rendered(page.PAGE.read_text(encoding="utf-8")))
    assert "### Quantize and lift on the H100" in made
    assert "### Packing and sums on the H100" in made
    assert "`quantize-h100.json`" in made


def test_a_page_without_its_markers_is_refused(page):
    with pytest.raises(SystemExit, match="no section <!-- measured: h100 -->"):
        page.rendered("# Performance")
