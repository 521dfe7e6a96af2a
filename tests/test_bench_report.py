"""``bench report``: result files become tables and plots, and this repository's own pages."""

from __future__ import annotations

import builtins
import json
import re
import shutil
from pathlib import Path

import pytest
from bench_fakes import new_record
from cli_helpers import in_process, leftovers

from slidesparse_rt.bench.report import charts, markdown, page, plots, published, results
from slidesparse_rt.errors import FormatError, MissingPackage, OptionError

ROOT = Path(__file__).resolve().parents[1]
H100 = {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1"}
LAYERS = ["qkv", "o", "gate_up", "down"]
MODELS = ["end-to-end-qwen2.5-7b-h100", "accuracy-h100"]
FUSED = {"hopper": "bfloat16 results, both scale vectors fused", "dense": "int32 sums"}


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def row(dtype, m, stage, mode, ratio, best=None, *, pattern="6:8", model="qwen2.5-7b", **more):
    dense = 100.0 * m
    us = {side: dense / value for side, value in ratio.items()} | {"dense": dense}
    return {
        "model": model, "m": m, "dtype": dtype, "pattern": pattern, "stage": stage, "mode": mode,
        "us": us, "ratio": ratio, "ratio_best_8bit": best, "checked": {}, "layers": LAYERS,
        "bound": {"6:8": 4 / 3, "2:4": 2.0, "4:6": 1.5, "dense": 1.0}[pattern],
        "kernels": dict(FUSED),
    } | more  # fmt: skip


def document(rows, what="gemm", *, commit="abcdef1234", time="2026-11-25T03:00:00+00:00", **more):
    return (
        new_record(what).document
        | {"rows": rows, "gpu": H100, "complete": True, "time": time, "command": f"bench {what}"}
        | {"commit": {"id": commit, "dirty": None, "source": "command line"}}
        | more
    )


def write(folder, name, *arguments, **more):
    path = folder / name
    path.write_text(json.dumps(document(*arguments, **more)))
    return path


def read(folder, name, *arguments, **more):
    return results.read_result(write(folder, name, *arguments, **more))


def lines_of(text, start):
    lines = text.splitlines()
    at = lines.index(start)
    return lines[at : at + 12]


# --------------------------------------------------------------------------------- reading, merging


def test_the_later_measurement_of_a_case_counts(tmp_path):
    old, new = {"hopper": 1.1}, {"hopper": 1.3}
    later = read(tmp_path, "b.json", [row("int8", 64, "op", "burst", new)],
                 time="2026-11-25T04:00:00+00:00", commit="fffffff9")  # fmt: skip
    first = read(
        tmp_path, "a.json",
        [row("int8", 64, "op", "burst", old), row("int8", 256, "op", "burst", old)],
    )  # fmt: skip
    for order in ([first, later], [later, first]):
        rows = results.products(order, "gemm")["hopper"]
        assert {key.m: case.row["ratio"]["hopper"] for key, case in rows.items()} == {
            64: 1.3, 256: 1.1,
        }  # fmt: skip
    text = markdown.against_dense(rows, "hopper", "qwen2.5-7b", "6:8")
    assert "| 64 | - | - | 1.30 / - | - |" in text
    assert "| 256 | - | - | 1.10 / -* | - |" in text
    assert "\\* measured at commit abcdef1, the others at fffffff." in text
    text = markdown.ratios(rows, "hopper", "op", "burst")
    assert "| int8 | 6:8 | 1.33 | 1.30 | 1.10* |" in text
    assert text.endswith("\n\n\\* measured at commit abcdef1, the others at fffffff.")


def test_a_line_of_a_plot_shows_which_points_are_of_an_older_commit(tmp_path):
    def ops(dtype, tokens, ratio, **more):
        return [row(dtype, m, "op", "burst", {"hopper": ratio}, **more) for m in tokens]

    first = read(
        tmp_path, "a.json",
        [*ops("int8", (64, 256, 1024), 1.1), *ops("fp8_e4m3", (64, 256, 1024), 1.1)],
    )  # fmt: skip
    later = read(tmp_path, "b.json", ops("int8", (1, 16, 64), 1.3),
                 time="2026-11-25T05:00:00+00:00", commit="fffffff9")  # fmt: skip
    for order in ([first, later], [later, first]):
        (chart,) = charts.speed_charts(order)
        (int8,), (fp8,) = (panel.lines for panel in chart.rows[0])
        assert int8.burst == ((1, 1.3), (16, 1.3), (64, 1.3), (256, 1.1), (1024, 1.1))
        assert int8.older == ((256, 1.1), (1024, 1.1))
        # Another format has its own most recent commit.
        assert fp8.burst == ((64, 1.1), (256, 1.1), (1024, 1.1))
        assert fp8.older == ()
        drawn = plots.draw(chart).decode()
        assert "of an older commit" in drawn
    (chart,) = charts.speed_charts([first])
    assert "of an older commit" not in plots.draw(chart).decode()


def test_sides_are_merged_apart_from_each_other(tmp_path):
    one = read(tmp_path, "a.json", [row("int8", 64, "op", "burst", {"hopper": 1.1})])
    other = read(tmp_path, "b.json", [row("int8", 64, "op", "burst", {"cusparselt": 0.9})])
    found = results.products([one, other], "gemm")
    assert {side: len(rows) for side, rows in found.items()} == {"hopper": 1, "cusparselt": 1}
    few = row("int8", 64, "op", "burst", {"hopper": 2.0}, layers=["qkv"])
    found = results.products([one, read(tmp_path, "c.json", [few])], "gemm")["hopper"]
    assert [key.model for key in found] == ["qwen2.5-7b", "qwen2.5-7b (qkv)"]


def test_rows_without_sides_are_merged_by_case(tmp_path):
    def host(us):
        return {"call": "run", "backend": "hopper", "dtype": "int8",
                "median_us": us, "minimum_us": us}  # fmt: skip

    first = read(tmp_path, "a.json", [host(20.0)], "overhead")
    second = read(tmp_path, "b.json", [host(14.0)], "overhead", time="2026-12-01T00:00:00+00:00")
    assert "| `run` | hopper | int8 | 14.0 | 14.0 |" in markdown.overhead([second, first])
    assert "20.0" not in markdown.overhead([second, first])


def test_machines_have_short_names(tmp_path):
    names = {
        "NVIDIA H100 80GB HBM3": "H100",
        "NVIDIA H200": "H200",
        "NVIDIA A100-SXM4-80GB": "A100-SXM4-80GB",
        "NVIDIA GeForce RTX 4090": "GeForce RTX 4090",
    }
    for name, short in names.items():
        found = read(tmp_path, "a.json", [], gpu={"name": name})
        assert found.machine == short
    none = read(tmp_path, "b.json", [], gpu=None, commit_id=None)
    assert none.machine == results.CPU
    assert list(results.machines([none, found])) == ["CPU", "GeForce RTX 4090"]


def test_what_is_no_result_is_refused_by_name(tmp_path):
    path = tmp_path / "x.json"
    for text, words in (("{", "no JSON"), ("[]", "no JSON object"), ("{}", "its schema")):
        path.write_text(text)
        with pytest.raises(FormatError, match=words) as error:
            results.read_result(path)
        assert "x.json" in str(error.value)


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("us", {"hopper": "fast", "dense": 1.0}, "us .*; allowed is numbers above 0, by side"),
        ("us", {"hopper": None, "dense": 1.0}, "numbers above 0, by side"),
        ("us", {"hopper": 0, "dense": 1.0}, "numbers above 0, by side"),
        ("us", {"hopper": float("nan"), "dense": 1.0}, "numbers above 0, by side"),
        ("us", {"hopper": True, "dense": 1.0}, "numbers above 0, by side"),
        ("ratio", 5, "ratio 5; allowed is numbers above 0, by side"),
        ("bound", float("inf"), "bound inf; allowed is a number above 0"),
        ("m", "16", "m '16'; allowed is a whole number from 1 on"),
        ("m", 16.5, "m 16.5; allowed is a whole number from 1 on"),
        ("pattern", "3:9", "'3:9'"),
        ("pattern", 6, "6"),
        ("dtype", "int4", "'int4' is no operand format"),
    ],
)
def test_values_that_no_benchmark_writes_are_refused_with_the_file(tmp_path, run, key, value, says):
    good = row("int8", 64, "op", "burst", {"hopper": 1.1})
    path = write(tmp_path, "a.json", [good, good | {key: value}])
    with pytest.raises(FormatError, match=rf"a\.json: row 1.*{says}"):
        results.read_result(path)
    code, out, err = run("bench", "report", path, "--output", tmp_path / "made")
    assert (code, out) == (1, "")
    assert "a.json: row 1" in err
    assert "fault" not in err


def test_efficiency_is_against_two_of_four_in_the_same_file(tmp_path):
    rows = [
        row("int8", 64, "gemm", "burst", {"hopper": 1.8}, pattern="2:4"),
        row("int8", 64, "gemm", "burst", {"hopper": 1.2}),
        row("int8", 256, "gemm", "burst", {"hopper": 1.2}),
    ]
    read_rows = read(tmp_path, "a.json", rows).rows
    # gamma = 3/2; T(2:4) * gamma / T is 1.2 / 1.8 * 1.5.
    assert read_rows[1]["efficiency"] == {"hopper": pytest.approx(1.0)}
    assert read_rows[0]["efficiency"] == {"hopper": pytest.approx(1.0)}
    assert read_rows[2]["efficiency"] is None
    text = markdown.product_sections([read(tmp_path, "a.json", rows)])
    start = "| type | pattern | bound | M=64 |"
    assert lines_of(text, start)[:3] == [
        start, "| --- | --- | --- | --- |", "| int8 | 6:8 | 1.33 | 1.00 |",
    ]  # fmt: skip


def test_operators_are_taken_apart(tmp_path):
    product = row("int8", 64, "gemm", "burst", {"hopper": 1.0})
    whole = row("int8", 64, "op", "burst", {"hopper": 1.0})
    product["us"], whole["us"] = {"hopper": 80.0, "dense": 90.0}, {"hopper": 95.0, "dense": 140.0}
    text = markdown.breakdown([read(tmp_path, "a.json", [product, whole])])
    assert "| int8 | 64 | 80 + 15 = 95 | 90 + (50) = 140 |" in text
    whole["quantize_us"] = {"hopper": 14.0, "dense": 20.0}
    text = markdown.breakdown([read(tmp_path, "a.json", [product, whole])])
    assert "| int8 | 64 | 80 + 15 = 95 | 90 + 20 + 30 = 140 |" in text
    whole["us"]["hopper"] = 78.0
    one = read(tmp_path, "a.json", [product, whole])
    assert "| 80 - 2 = 78 |" in markdown.breakdown([one])
    found = results.products([one], "gemm")["hopper"].values()
    assert results.stages(*found, "hopper")[1] == ("quantize and lift", 0.0)
    # Stages that were measured in different runs are not subtracted.
    two = read(tmp_path, "b.json", [whole])
    assert markdown.breakdown([read(tmp_path, "a.json", [product]), two]) == ""


def test_auto_says_where_it_is_slowest(tmp_path):
    rows = [
        row("int8", m, "op", "burst", {"auto": ratio, "hopper": 0.5})
        for m, ratio in ((1, 1.0), (64, 0.981), (4096, 1.2))
    ]
    text = markdown.auto_against_dense([read(tmp_path, "p.json", rows, "pipeline")])
    assert "| int8 | 6:8 | 1.33 | 1.00 | 0.98 | 1.20 |" in text
    words = "- auto is at least 0.981 x as fast as dense (qwen2.5-7b 6:8 int8 M=64 burst); promised"
    assert f"Of 3 cases:\n\n{words} is 0.98: kept\n" in text
    rows[1]["us"]["auto"] = rows[1]["us"]["dense"] / 0.979
    text = markdown.auto_against_dense([read(tmp_path, "p.json", rows, "pipeline")])
    assert "0.979 x as fast as dense" in text
    assert "promised is 0.98: BROKEN" in text
    assert markdown.auto_against_dense([read(tmp_path, "p.json", rows)]) == ""


def test_published_figures_stand_beside_ours(tmp_path):
    figures = json.loads((ROOT / "benchmarks" / "published-h100.json").read_text("utf-8"))
    rows = [
        row("fp8_e4m3", 16384, "gemm", "burst", {"hopper": 1.2}),
        row("fp8_e4m3", 16384, "op", "burst", {"hopper": 1.1}),
        row("int8", 16384, "op", "burst", {"hopper": 1.5}),
    ]
    # The int8 operator is compared with dense fp8, which is 4/5 as slow here.
    rows[2]["us"] = {"hopper": 1_310_720.0, "dense": 1.0}
    text = published.against_published(figures, [read(tmp_path, "a.json", rows)])
    # Theirs: 6060 / 6100; ours 1.2.
    assert "| fp8 | 16384 | 6060 | 6100 | 0.99 | 1638400 | 1365333 | 1.20 | 1.21 |" in text
    assert "| 16384 | 7071 | 1638400 | 0.89 | 1.10 | 1.24 | 0.93 | 1.25 | 1.34 |" in text
    assert "| fp8 | 256 |" not in text
    assert "Quantize and lift" not in text
    for name, words in figures["sources"].items():
        assert f"- **{name}**: {words}." in text
    assert published.against_published(figures, [read(tmp_path, "a.json", [])]) == ""


# -------------------------------------------------------------------------------------------- plots


def many(tmp_path, *, patterns=("6:8", "2:4"), what="gemm", side="hopper"):
    rows = [
        row(dtype, m, stage, "burst", {side: 1.0 + m / 9000}, pattern=pattern)
        for pattern in patterns
        for dtype in ("int8", "bf16")
        for m in (16, 1024, 4096)
        for stage in (("gemm", "op") if what == "gemm" else ("op",))
    ]
    rows.append(row("int8", 4096, "op", "sustained", {side: 1.4}))
    return read(tmp_path, f"{what}.json", rows, what)


def test_charts_hold_what_was_measured(tmp_path):
    found = charts.charts_of([many(tmp_path), many(tmp_path, what="pipeline", side="auto")])
    assert [chart.name for chart in found] == [
        "speed-qwen2.5-7b-hopper-h100",
        "pipeline-qwen2.5-7b-auto-h100",
        "stages-qwen2.5-7b-hopper-h100",
    ]
    speed, pipeline, stages = found
    assert [[panel.title for panel in panels] for panels in speed.rows] == [
        ["int8, product alone", "bf16, product alone"],
        ["int8, operator, bf16 in and out", "bf16, operator, bf16 in and out"],
    ]
    line = speed.rows[1][0].lines[1]
    assert (line.pattern, line.bound) == ("6:8", pytest.approx(4 / 3))
    assert line.burst == ((16, 1.0 + 16 / 9000), (1024, 1.0 + 1024 / 9000), (4096, 1 + 4096 / 9000))
    assert line.sustained == ((4096, 1.4),)
    assert speed.floor is None
    assert pipeline.floor == 0.98
    assert len(pipeline.rows) == 1
    assert [(bar.side, bar.m) for bar in stages.panels[0][1]] == [
        (side, m) for m in (16, 1024, 4096) for side in ("hopper", "dense")
    ]
    changed = many(tmp_path)
    changed.rows[0]["ratio"]["hopper"] += 1e-6
    other = charts.charts_of([changed])[0]
    assert charts.digest(other) != charts.digest(speed)


def test_squares_are_one_model_and_come_last(tmp_path):
    sizes = (64, 128, 256, 4096)
    rows = [
        row(dtype, m, stage, "burst", {"hopper": 1 + m / 1e4}, pattern=pattern,
            model=f"square-{m}", layers=["square"])
        for m in sizes for dtype in ("int8", "bf16") for stage in ("gemm", "op")
        for pattern in ("2:4", "6:8")
    ]  # fmt: skip
    others = [("mistral-7b", LAYERS), ("llama-3.2-3b", LAYERS), ("qwen2.5-7b", ["qkv"])]
    rows += [
        row("int8", 64, stage, "burst", {"hopper": 1.1}, model=name, layers=layers)
        for name, layers in [*others, ("qwen2.5-7b", LAYERS)] for stage in ("gemm", "op")
    ]  # fmt: skip
    found = read(tmp_path, "a.json", rows)
    measured = results.products([found], "gemm")["hopper"]
    names = ["qwen2.5-7b (qkv)", "qwen2.5-7b", "llama-3.2-3b", "mistral-7b", "squares"]
    assert list(results.by_model(measured)) == names
    text = markdown.product_sections([found])
    titles = re.findall(r"^\*\*`hopper`, (.*)\*\*$", text, re.MULTILINE)
    assert titles == [*names[:-1], "squares (M = N = K)"]
    squares = text[text.index("squares (M = N = K)") :]
    assert lines_of(squares, "burst GEMM, against dense int8 and bf16:")[2:6] == [
        "| type | pattern | bound | M=64 | M=128 | M=256 | M=4096 |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| int8 | 2:4 | 2.00 | 1.01 | 1.01 | 1.03 | 1.41 |",
        "| int8 | 6:8 | 1.33 | 1.01 | 1.01 | 1.03 | 1.41 |",
    ]
    assert "square-64" not in text
    taken = markdown.breakdown([found])
    assert len(lines_of(taken, "squares (M = N = K), 6:8, microseconds:")[4:]) == 8
    speed, stages = (
        next(chart for chart in charts.charts_of([found]) if chart.name == name)
        for name in ("speed-squares-hopper-h100", "stages-squares-hopper-h100")
    )
    assert speed.title == "hopper against dense: squares (M = N = K) on one H100"
    assert [point[0] for point in speed.rows[0][0].lines[0].burst] == list(sizes)
    assert [bar.m for bar in stages.panels[0][1]] == [m for m in sizes for _ in range(2)]
    auto = read(tmp_path, "b.json", [
        row("int8", m, "op", "burst", {"auto": 1.2}, model=f"square-{m}", layers=["square"],
            us={"auto": 1.0, "dense": 1.2}, layer_how={"auto": {"square": "hopper"}})
        for m in sizes], what="pipeline")  # fmt: skip
    shown = markdown.auto_against_dense([auto])
    assert "| int8 | 6:8 | 1.33 | 1.20 | 1.20 | 1.20 | 1.20 |" in shown
    assert shown.startswith("squares (M = N = K), burst:")


def test_rates_are_of_the_largest_launches(tmp_path):
    shutil.copy(ROOT / "benchmarks" / "results" / "quantize-h200.json", tmp_path)
    found = results.read_result(tmp_path / "quantize-h200.json")
    chart = charts.rate_chart([found])
    assert chart.name == "rates-h200"
    labels = [line.label for line in chart.rows]
    assert len(labels) == len(set(labels))
    assert all("bfloat16 to" in label or label.startswith("dequantize") for label in labels)
    best = next(line for line in chart.rows if line.label.endswith("to int8, 6:8, K = 18944"))
    most = max(
        (r for r in found.rows if (r["x"], r["out"], r["pattern"], r["columns"])
         == ("bfloat16", "int8", "6:8", 18944)), key=lambda r: r["m"],
    )  # fmt: skip
    assert best.tb_per_s == most["tb_per_s"]
    assert charts.rate_chart([]) is None


def test_plots_are_the_same_bytes_every_time(tmp_path):
    every = [
        *charts.charts_of([many(tmp_path), many(tmp_path, what="pipeline", side="auto")]),
        charts.rate_chart([results.read_result(
            ROOT / "benchmarks" / "results" / "quantize-h200.json"
        )]),
    ]  # fmt: skip
    for chart in every:
        first = plots.draw(chart)
        assert plots.draw(chart) == first
        text = first.decode()
        assert charts.digest(chart) in text
        assert not re.search(r"\d\d:\d\d:\d\d|<dc:date>", text)
        assert plots.draw(chart, "png").startswith(b"\x89PNG")
    with pytest.raises(OptionError, match="allowed are svg, png"):
        plots.draw(every[0], "pdf")


def test_many_patterns_have_looks_of_their_own():
    names = [f"{keep}:{keep + 2}" for keep in range(2, 32, 2)]
    lines = tuple(charts.Line(name, 1.5, ((1, 1.0), (16, 1.1), (64, 1.2)), ()) for name in names)
    chart = charts.SpeedChart("x", "x", ((charts.SpeedPanel("int8", lines),),), None)
    looks = plots._looks(chart)
    assert len({str(colour) for colour, _ in looks.values()}) == len(names)
    assert plots.draw(chart)
    few = charts.SpeedChart("x", "x", ((charts.SpeedPanel("int8", lines[1:3]),),), None)
    more = charts.SpeedChart("x", "x", ((charts.SpeedPanel("int8", lines[:4]),),), None)
    assert plots._looks(few).items() <= plots._looks(more).items()


def test_without_matplotlib(tmp_path, run, monkeypatch):
    real = builtins.__import__

    def missing(name, *arguments, **more):
        if name.split(".")[0] == "matplotlib":
            raise ImportError(name)
        return real(name, *arguments, **more)

    many(tmp_path)
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(MissingPackage, match=r"slidesparse-rt\[report\]"):
        plots.draw(charts.charts_of([many(tmp_path)])[0])
    code, _, err = run("bench", "report", tmp_path / "gemm.json", "--output", tmp_path / "o")
    assert code == 1
    assert "pip install" in err
    assert not (tmp_path / "o").exists()
    code, _, err = run(
        "bench", "report", tmp_path / "gemm.json", "--output", tmp_path / "o", "--no-plots"
    )
    assert code == 0, err
    assert "![" not in (tmp_path / "o" / "report.md").read_text()


# -------------------------------------------------------------------------------- reports and pages


def test_report_of_files(tmp_path, run):
    many(tmp_path)
    many(tmp_path, what="pipeline", side="auto")
    for name in ("quantize-h200.json", "overhead-h200.json", "packing-cpu.json"):
        shutil.copy(ROOT / "benchmarks" / "results" / name, tmp_path)
    files = sorted(tmp_path.glob("*.json"))
    out = tmp_path / "out"
    code, said, err = run("bench", "report", *files, "--output", out, "--format", "png")
    assert code == 0, err
    text = (out / "report.md").read_text()
    assert [line for line in text.splitlines() if line.startswith("## ")] == [
        "## H100", "## H200", "## CPU",
    ]  # fmt: skip
    shown = re.findall(r"\]\((plots/[^)]+)\)", text)
    assert sorted(shown) == sorted(f"plots/{path.name}" for path in (out / "plots").iterdir())
    assert len(shown) == 4
    assert said.count("written: ") == 5
    assert "Source: `gemm.json`; NVIDIA H100 80GB HBM3, driver 580.1" in text
    assert "### Packing" in text
    assert "### Host time beside the H200" in text
    code, _, err = run("bench", "report", *files, "--output", out, "--format", "pdf")
    assert code == 1
    assert "allowed are svg, png" in err
    (tmp_path / "x.json").write_text("{}")
    code, _, err = run("bench", "report", tmp_path / "x.json")
    assert code == 1
    assert "x.json: this is no result" in err
    code, _, err = run("bench", "report", tmp_path / "none.json")
    assert code == 1
    assert "none.json" in err


def test_options_that_do_not_go_together(run, tmp_path, monkeypatch):
    for arguments, words in (
        (("--output", tmp_path), "go with FILES"),
        (("--no-plots",), "go with FILES"),
        (("x.json", "--check"), "leave FILES out"),
    ):
        code, _, err = run("bench", "report", *arguments)
        assert code == 1
        assert words in err
    monkeypatch.setattr(page, "checkout", lambda: None)
    code, _, err = run("bench", "report")
    assert code == 1
    assert "installed package" in err


@pytest.fixture
def home(tmp_path):
    """A checkout with the pages of this one, and of results those of the H200, of the CPU and of
    whole models.
    """
    (tmp_path / "docs" / "plots").mkdir(parents=True)
    (tmp_path / "benchmarks" / "results").mkdir(parents=True)
    for name in ("performance.md", "packing-speed.md", "end-to-end.md", "accuracy.md"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    shutil.copy(ROOT / "benchmarks" / "published-h100.json", tmp_path / "benchmarks")
    for path in (ROOT / "benchmarks" / "results").iterdir():
        wanted = ("h200.json", "packing-cpu.json", "accuracy-h100.json")
        if path.name.endswith(wanted) or path.name.startswith("end-to-end-h100"):
            shutil.copy(path, tmp_path / "benchmarks" / "results")
    return page.Checkout(tmp_path)


def sections(home):
    """What stands between the markers of the H100."""
    text = home.rendered()[home.docs / "performance.md"]
    return text.split("<!-- measured: h100 -->")[1].split("<!-- measured: end -->")[0]


def names(home):
    return [chart.name for chart in home.charts()]


def test_pages_without_files_of_an_h100(home):
    assert sections(home) == "\n\n"
    text = home.rendered()[home.docs / "performance.md"]
    # Files of version 1, whose ratios are numbers, give what they always gave.
    assert "| bf16 | 6:8 | 1.33 | 0.48 | 0.48 | 0.70 | 0.84 | 0.93 | 0.93 |" in text
    shown = names(home)
    assert [name for name in shown if not name.endswith("h200")] == MODELS
    assert "speed-qwen2.5-7b-cusparselt-h200" in shown
    page.write_pages(home)
    assert page.outdated(home) == []


def test_pages_with_files_of_an_h100(home, tmp_path):
    rows = [
        row("int8", m, stage, "burst", {"hopper": 1.25}, {"hopper": 1.2})
        for m in (16, 1024, 16384)
        for stage in ("gemm", "op")
    ]
    left = [{"case": f"case {n}", "reason": "time budget", "why": ""} for n in range(8)]
    write(home.results, "gemm-h100.json", rows, left_out=left)
    write(
        home.results, "gemm-sustained-h100-2.json",
        [row("int8", 16384, "op", "sustained", {"hopper": 1.31}, {"hopper": 1.28})],
        complete=False, commit="0000000", time="2026-11-25T03:00:01+00:00",
    )  # fmt: skip
    write(home.results, "gemm-h100-2026-11-25.json", [row("int8", 1, "op", "burst", {"x": 7.0})])
    write(home.results, "hopper-h100.json", [])
    shutil.copy(home.results / "quantize-h200.json", home.results / "quantize-h100.json")
    shutil.copy(home.results / "gpu-checks-h200.json", home.results / "gpu-checks-h100.json")
    made = sections(home)
    lines = made.splitlines()
    titles = [line.removeprefix("### ") for line in lines if line.startswith("### ")]
    assert titles == [
        "Against cuSPARSELt and the published kernels",
        "Sparse against dense on the H100",
        "Where an operator's time goes on the H100",
        "Quantize and lift on the H100",
        "Sources: H100",
        "Packing and sums on the H100",
    ]
    six = lines.index("6:8, at most 1.33:")
    assert lines[six + 2].startswith("| M | sustained GEMM int8 |")
    assert lines[six + 6] == (
        "| 16384 | - | - | 1.31 / 1.28 | - | 1.25 / 1.20* | - | 1.25 / 1.20* | - |"
    )
    assert "Left out (time budget): case 0, case 1, case 2, case 3, case 4, case 5 and 2 more." in (
        lines
    )
    assert any(line.endswith("commit 0000000; not complete.") for line in lines)
    assert "7.00" not in made
    assert names(home)[:2] == [
        "speed-qwen2.5-7b-hopper-h100", "stages-qwen2.5-7b-hopper-h100",
    ]  # fmt: skip

    stale = home.plots / "speed-old.svg"
    stale.write_text("")
    out = page.outdated(home)
    assert home.docs / "performance.md" in out
    assert stale in out
    assert home.docs / "packing-speed.md" not in out
    written = page.write_pages(home)
    assert not stale.exists()
    assert home.plots / "speed-qwen2.5-7b-hopper-h100.svg" in written
    assert page.outdated(home) == []
    assert leftovers(home.plots) == []
    # Another number, and both the page and its plot are out of date.
    rows[0]["ratio"]["hopper"] = 1.26
    write(home.results, "gemm-h100.json", rows, left_out=left)
    assert {path.name for path in page.outdated(home)} == {
        "performance.md", "speed-qwen2.5-7b-hopper-h100.svg",
    }  # fmt: skip


def test_check_names_what_is_out_of_date(home, run, monkeypatch):
    monkeypatch.setattr(page, "own_checkout", lambda: home)
    code, _, err = run("bench", "report", "--check")
    assert code == 1
    assert "performance.md" in err
    assert run("bench", "report")[0] == 0
    assert run("bench", "report", "--check") == (0, "", "")


def test_a_page_without_its_markers_is_refused(home):
    (home.docs / "packing-speed.md").write_text("# Packing")
    with pytest.raises(FormatError, match=r"packing-speed.md has no section <!-- measured: pack"):
        home.rendered()
