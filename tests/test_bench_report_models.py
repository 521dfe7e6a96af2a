"""``bench report`` of whole models: passes end to end, and what pruning costs."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from cli_helpers import in_process

from slidesparse_rt.bench.report import accuracy, charts, markdown, page, passes, plots, results
from slidesparse_rt.errors import FormatError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
FILES = (
    "end-to-end-h100.json",
    "end-to-end-h100-2.json",
    "end-to-end-h100-3.json",
    "accuracy-h100.json",
)
SURROUNDINGS = {
    "package": "0.1.0",
    "commit": {"id": "abcdef1234", "dirty": None, "source": "command line"},
    "sources_sha256": "0",
    "gpu": {"name": "NVIDIA H100 80GB HBM3", "driver": "580.1"},
    "versions": {"torch": "2.11"},
    "linear_weights": 1_000_000_000,
    "complete": True,
}


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def of_passes(times, *, patterns="['6:8']", dtypes="['int8']", **more):
    """A document of passes: {(pattern, phase, M): {side: (us, linear us)}}."""
    rows = []
    for (pattern, phase, m), sides in times.items():
        for side, (us, linear) in sides.items():
            name = side if side in ("bf16", "dense") else f"{pattern} {side}"
            ratio = {one: sides[one][0] / us for one in ("bf16", "dense") if one in sides}
            rows.append(
                {"pattern": pattern, "phase": phase, "m": m, "side": name, "us": us,
                 "rounds_us": [us, 1.01 * us], "tokens_per_s": 1e6 * m / us, "linear_us": linear,
                 "ratio": ratio, "backends": [], "bytes": 0 if side == "bf16" else 3e9,
                 "cosine": None if side in ("bf16", "dense") else 0.99}
            )  # fmt: skip
    settings = {"patterns": patterns, "dtypes": dtypes, "prefill": "[8192]", "decode": "[]"}
    return SURROUNDINGS | {
        "what": "end-to-end", "command": "python benchmarks/end_to_end.py x.json",
        "model": "qwen2.5-7b", "settings": settings | {"blocks": "28", "tuning": "measure"},
        "rows": rows,
    } | more  # fmt: skip


def of_costs(bits, *, patterns="['6:8']", dtypes="['bf16']", **more):
    """A document of bits per byte: {(pattern, format, method): bits}."""

    def row(pattern, dtype, method, value, backend):
        case = {"pattern": pattern, "dtype": dtype, "method": method}
        bits = {"bits_per_byte": value, "perplexity": 2**value, "more_bits": value - 1.0}
        return case | bits | {"backends": [backend]}

    rows = [row("dense", "bf16", "none", 1.0, "torch")]
    rows += [row(*case, value, "hopper") for case, value in bits.items()]
    settings = {"patterns": patterns, "dtypes": dtypes, "blocks": "12", "hidden": "768"}
    return SURROUNDINGS | {
        "what": "accuracy", "command": "python benchmarks/accuracy.py x.json",
        "settings": settings | {"calibration": "1048576"},
        "text": {"files": 1200, "train_bytes": 3_000_000, "held_out_bytes": 2 << 20,
                 "largest": {"torch": 20, "jax": 10}},
        "training": {"steps": 100, "seconds": 61.0, "bytes_seen": 4_000_000},
        "rows": rows,
    } | more  # fmt: skip


def read(folder, name, document):
    path = folder / name
    path.write_text(json.dumps(document))
    return results.read_result(path)


# ------------------------------------------------------------------------------------------ reading


@pytest.mark.parametrize("document", [of_passes({}), of_costs({})], ids=["passes", "costs"])
def test_files_of_scripts_are_checked(tmp_path, document):
    assert read(tmp_path, "x.json", document).document["left_out"] == []
    for key in set(document) - {"what", "package", "sources_sha256"}:
        broken = {name: value for name, value in document.items() if name != key}
        with pytest.raises(FormatError, match=re.escape(repr(key))) as error:
            read(tmp_path, "x.json", broken)
        assert "x.json" in str(error.value)
    with pytest.raises(FormatError, match=r"'rows', of type list"):
        read(tmp_path, "x.json", document | {"rows": {}})
    with pytest.raises(FormatError, match=r"x.json: row 0 lacks .*pattern"):
        read(tmp_path, "x.json", document | {"rows": [{"m": 1}]})
    with pytest.raises(FormatError, match="its schema is not"):
        read(tmp_path, "x.json", document | {"what": ["accuracy"]})


def test_committed_files_are_complete():
    for name in FILES:
        assert results.read_result(RESULTS / name).document["complete"], name


# ------------------------------------------------------------------------------------------- passes

CASE = ("6:8", "prefill", 8192)
TWO = {"bf16": (2000.0, 1600.0), "dense": (1000.0, 800.0), "int8": (800.0, 600.0)}


def test_ratios_are_taken_within_a_file_and_pattern(tmp_path):
    slow = {side: (3 * us, 3 * linear) for side, (us, linear) in TWO.items()}
    first = read(
        tmp_path, "a.json",
        of_passes({CASE: TWO, ("6:8", "decode", 16): TWO, ("8:10", "prefill", 8192): TWO}),
    )  # fmt: skip
    second = read(tmp_path, "b.json", of_passes({CASE: slow}))
    six, eight = passes.groups([first, second])
    # A pattern's later file gives all of it: nothing of two files stands in one table.
    assert (six.result.name, eight.result.name) == ("b.json", "a.json")
    assert ("decode", 16, "dense") not in six.rows
    assert six.ratio("prefill", 8192, "6:8 int8") == pytest.approx(1.25)
    assert six.ratio("prefill", 8192, "6:8 int8", "bf16") == pytest.approx(2.5)
    assert six.linear_ratio("prefill", 8192, "6:8 int8") == pytest.approx(4 / 3)
    assert passes.groups([second, first])[0].result.name == "a.json"
    # Rounds are 1 % apart, the two measurements of dense twice their size.
    text = passes.speeds([first, second])
    assert "- Rounds of one side are up to 1.0 % apart (" in text
    assert (
        "- Dense fp8 was measured anew with each pattern: its figures are up to 200.0 % apart "
        in (text)
    )


def test_a_sparse_side_in_bf16_is_no_baseline(tmp_path):
    sides = TWO | {"bf16 ": (1.0, 1.0)}
    document = of_passes({CASE: sides}, dtypes="['int8', 'bf16']")
    document["rows"][-1]["side"] = "6:8 bf16"
    (group,) = passes.groups([read(tmp_path, "a.json", document)])
    assert group.dtypes == ["int8", "bf16"]
    assert group.rows["prefill", 8192, "bf16"]["us"] == 2000.0
    assert group.ratio("prefill", 8192, "6:8 bf16") == 1000.0


def test_bounds_follow_amdahl(tmp_path):
    times = {CASE: TWO, ("6:8", "decode", 16): TWO}
    (group,) = passes.groups([read(tmp_path, "a.json", of_passes(times))])
    # 200 us stay, 800 become 600.
    assert group.bound("prefill", 8192) == pytest.approx(1000 / 800)
    assert group.bound("decode", 16) is None
    assert group.bound("prefill", 1) is None
    # 1000 / 1.25 leaves 600 of 800; nothing is left for 5 times as fast.
    assert group.needed(8192, 1.25) == pytest.approx(800 / 600)
    assert group.needed(8192, 5.0) is None
    assert group.needed(1, 1.2) is None


def test_tables_of_passes(tmp_path):
    times = {CASE: TWO, ("6:8", "decode", 16): TWO | {"dense": (780.0, 790.0)}}
    found = [read(tmp_path, "a.json", of_passes(times))]
    text = passes.speeds(found)
    assert "| prefill at 6:8, M of 8192 or more, int8 | 1.20 | 1.250 (M=8192) | yes |" in text
    wanted = (
        "| decode, every pattern and format | 0.98 | 0.975 (6:8 int8 M=16), the lowest of 1 | no |"
    )
    assert wanted in text
    assert "- Prefill, lowest of 1: 1.250 (6:8 int8 M=8192)." in text
    words = (
        "- For 1.20 at 6:8 and M=8192 the linear layers would have to be 1.26 x as fast as dense"
    )
    assert f"{words} ones; alone they are 1.33 in int8." in text
    assert "| prefill | 8192 | 4,096,000 | 8,192,000 | 10,240,000 | 1.25 | 2.50 |" in text
    assert "not complete" not in text
    text = passes.breakdown(found)
    row = "| prefill | 8192 | 1.60 + 0.40 = 2.00 | 0.80 + 0.20 = 1.00 | 0.60 + 0.20 = 0.80 |"
    assert f"{row} 80 % | 1.33 | 1.25 |" in text
    assert "| 0.79 - 0.01 = 0.78 |" in text
    assert "up to 100 % apart (6:8, prefill M=8192: 0.2 to 0.4 ms)" in text
    text = passes.memory(found)
    assert "1,000,000,000 weights in linear layers, 2.00 GB in bf16" in text
    assert "| 6:8 | 3.00 | 1.00 | 1.50 |" in text
    assert passes.conditions(found[0]) == (
        "Blocks: 28; tuning: measure; cosine of two blocks' logits with those of the same pruned "
        "weights in bf16: at least 0.9900."
    )
    assert passes.speeds([]) == passes.breakdown([]) == passes.memory([]) == ""


def test_passes_that_have_not_run_are_said_to_have_not(tmp_path):
    times = {CASE: {"bf16": TWO["bf16"], "dense": TWO["dense"]}, ("6:8", "prefill", 32768): TWO}
    document = of_passes(
        times, patterns="['6:8', '8:10', '2:4']", dtypes="['int8', 'fp8_e4m3']", complete=False
    )
    found = [read(tmp_path, "cut.json", document)]
    text = passes.speeds(found)
    assert "`cut.json` is **not complete**" in text
    assert "Not begun: 8:10, 2:4." in text
    assert "| prefill | 8192 | 4,096,000 | 8,192,000 | - | - | - | - | - | - |" in text
    assert "int8 | 1.20 | - (M=8192), 1.250 (M=32768) | not known |" in text
    assert "fp8 | 1.20 | - (M=8192), - (M=32768) | not known |" in text
    assert "decode, every" not in text
    assert "| 6:8 | 3.00 | 1.00 | 1.50 | - | - | - |" in passes.memory(found)
    assert "commit abcdef1234; not complete." in markdown.source(found[0])
    none = read(tmp_path, "none.json", of_passes({}, complete=False))
    assert passes.speeds([none]) == ""
    # No baseline, no ratio.
    alone = read(tmp_path, "alone.json", of_passes({CASE: {"int8": TWO["int8"]}}))
    assert "| prefill | 8192 | - | - | 10,240,000 | - | - |" in passes.speeds([alone])
    assert "| prefill | 8192 | - | - | 0.60 + 0.20 = 0.80 | - | - | - |" in passes.breakdown(
        [alone]
    )
    assert "Plans of dense fp8 hold - GB" in passes.memory([alone])


def test_charts_of_passes(tmp_path):
    times = {
        (pattern, phase, m): TWO | {"fp8_e4m3": (900.0, 700.0)}
        for pattern in ("6:8", "2:4")
        for phase in ("prefill", "decode")
        for m in (512, 8192, 32768)
    }
    del times["6:8", "decode", 512]
    document = of_passes(times, dtypes="['int8', 'fp8_e4m3']")
    (chart,) = charts.charts_of([read(tmp_path, "a.json", document)])
    assert chart.name == "end-to-end-qwen2.5-7b-h100"
    assert [[panel.title for panel in row] for row in chart.rows] == [
        ["prefill, 2:4", "prefill, 6:8"], ["decode, 2:4"],
    ]  # fmt: skip
    two, six = chart.rows[0]
    assert [name for name, _ in six.lines] == ["int8", "fp8"]
    assert six.lines[0][1] == ((512, 1.25), (8192, 1.25), (32768, 1.25))
    assert dict(six.bound)[512] == pytest.approx(1.25)
    assert (six.wanted, two.wanted) == (((8192, 1.2), (32768, 1.2)), ())
    assert dict(chart.rows[1][0].wanted) == {512: 0.98, 8192: 0.98, 32768: 0.98}
    assert chart.rows[1][0].bound == ()
    few = of_passes({CASE: TWO})
    assert charts.charts_of([read(tmp_path, "few.json", few)]) == []
    document["rows"][2]["ratio"]["dense"] += 1e-6
    (other,) = charts.charts_of([read(tmp_path, "a.json", document)])
    assert charts.digest(other) != charts.digest(chart)


# ---------------------------------------------------------------------------------- what it costs

BITS = {
    ("dense", "bf16", "none"): 1.0,
    ("6:8", "bf16", "magnitude"): 1.01,
    ("6:8", "bf16", "wanda"): 1.008,
    ("2:4", "bf16", "magnitude"): 1.2,
    ("2:4", "bf16", "wanda"): 1.21,
    ("dense", "int8", "none"): 1.001,
    ("6:8", "int8", "magnitude"): 1.013,
    ("6:8", "int8", "wanda"): 1.009,
    ("2:4", "int8", "magnitude"): 1.2005,
    ("2:4", "int8", "wanda"): 1.212,
}
BOTH = {"patterns": "['6:8', '2:4']", "dtypes": "['bf16', 'int8']"}


def test_the_table_of_costs(tmp_path):
    (found,) = accuracy.costs([read(tmp_path, "a.json", of_costs(BITS, **BOTH))])
    text = accuracy.accuracy(found)
    assert "- **Model**: 12 blocks, hidden size 768, 1000 M weights in linear layers." in text
    assert "- **Text**: 1,200 files, 3 MB to train on, most of torch, jax; 2 MiB of other" in text
    assert "- **Training**: 100 steps in 61 s, 4 MB seen; wanda's norms are of 1 MiB" in text
    rows = [line for line in text.splitlines() if line.startswith(("| bf16", "| int8"))]
    assert [tuple(row.split(" | ")[:3]) for row in rows] == [
        (f"| {dtype}", pattern, kept)
        for dtype in ("bf16", "int8")
        for pattern, kept in (("dense", "100 %"), ("6:8", "75 %"), ("2:4", "50 %"))
    ]
    assert (
        "| int8 | dense | 100 % | 1.0010 | +0.0010 | 2.0014 | 1.0010 | +0.0010 | 2.0014 |" in rows
    )
    assert "| bf16 | 6:8 | 75 % | 1.0100 | +0.0100 | 2.0139 | 1.0080 | +0.0080 | 2.0111 |" in rows
    words = (
        "- int8 adds 0.00050 to 0.00300 bits to bf16 of the same pattern and method, most at 6:8, "
    )
    assert f"{words}magnitude." in text
    assert "- What the others cost of what 2:4 costs (bf16, magnitude): 6:8 5.0 %." in text
    assert "increase (bf16): 6:8 20.0 %, 2:4 -5.0 %; below 0 it costs more." in text
    assert "not complete" not in text
    assert "- bf16 adds" not in text


def test_costs_that_have_not_run_are_said_to_have_not(tmp_path):
    bits = {case: value for case, value in BITS.items() if case[1] == "bf16"}
    document = of_costs(bits, **BOTH, complete=False)
    (found,) = accuracy.costs([read(tmp_path, "cut.json", document)])
    text = accuracy.accuracy(found)
    assert "`cut.json` is **not complete**" in text
    assert "| int8 | 2:4 | 50 % | - | - | - | - | - | - |" in text
    document["rows"] = document["rows"][:1]  # PyTorch's own
    (found,) = accuracy.costs([read(tmp_path, "cut.json", document)])
    assert "| bf16 | dense | 100 % | - | - | - | - | - | - |" in accuracy.accuracy(found)
    document["rows"] = []
    (found,) = accuracy.costs([read(tmp_path, "cut.json", document)])
    assert "PyTorch in bf16" not in accuracy.accuracy(found)
    assert charts.charts_of([found.result]) == []


def test_charts_of_costs(tmp_path):
    bits = BITS | {("4:6", "bf16", one): 1.05 for one in accuracy.METHODS}
    bits |= {("4:6", "int8", one): 0.99 for one in accuracy.METHODS}
    document = of_costs(bits, patterns="['6:8', '4:6', '2:4']", dtypes="['bf16', 'int8']")
    first, second = (read(tmp_path, f"{name}.json", document) for name in "ab")
    chart, other = charts.charts_of([first, second])
    assert (chart.name, other.name) == ("accuracy-h100", "accuracy-h100-2")
    assert (chart.source, other.source) == ("a.json", "b.json")
    # int8 is left with two points: below 0 there is no power of ten.
    (panel,) = chart.panels
    assert panel.title == "bf16"
    assert [method for method, _ in panel.lines] == ["magnitude", "wanda"]
    assert panel.lines[0][1][0] == ("6:8", 0.75, pytest.approx(0.01))
    assert panel.unpruned is None
    real = results.read_result(RESULTS / "accuracy-h100.json")
    (chart,) = charts.charts_of([real])
    assert [panel.title for panel in chart.panels] == ["bf16", "int8", "fp8_e4m3"]
    assert [panel.unpruned is None for panel in chart.panels] == [True, False, False]
    assert chart.panels[2].unpruned > chart.panels[1].unpruned


# -------------------------------------------------------------------------------- plots and pages


@pytest.mark.parametrize("names", [FILES[:-1], FILES[-1:]], ids=["passes", "costs"])
def test_plots_of_models_are_the_same_bytes_every_time(names):
    (chart,) = charts.charts_of([results.read_result(RESULTS / name) for name in names])
    first = plots.draw(chart)
    assert plots.draw(chart) == first
    assert charts.digest(chart) in first.decode()
    assert plots.draw(chart, "png").startswith(b"\x89PNG")


def test_report_of_files_of_models(tmp_path, run):
    files = [RESULTS / name for name in FILES]
    shutil.copy(RESULTS / FILES[-1], tmp_path / "again.json")
    out = tmp_path / "out"
    code, _, err = run("bench", "report", *files, tmp_path / "again.json", "--output", out)
    assert code == 0, err
    text = (out / "report.md").read_text()
    titles = [line for line in text.splitlines() if line.startswith("#")]
    assert titles == [
        "# Benchmarks",
        "## H100",
        "### Whole passes on the H100",
        "### Where a pass's time goes on the H100",
        "### Memory of linear layers on the H100",
        "### What pruning costs, on the H100: accuracy-h100.json",
        "### What pruning costs, on the H100: again.json",
        "### Sources: H100",
    ]
    shown = re.findall(r"\]\((plots/[^)]+)\)", text)
    assert len(shown) == len(set(shown)) == 3
    assert sorted(shown) == sorted(f"plots/{path.name}" for path in (out / "plots").iterdir())
    # Nothing of passes where there are none.
    code, _, err = run("bench", "report", files[-1], "--output", out, "--no-plots")
    assert code == 0, err
    assert "passes" not in (out / "report.md").read_text()


@pytest.fixture
def home(tmp_path):
    """A checkout with the committed files of whole models, and no other pages."""
    for folder in ("docs/plots", "benchmarks/results"):
        (tmp_path / folder).mkdir(parents=True)
    for name in FILES:
        shutil.copy(RESULTS / name, tmp_path / "benchmarks" / "results")
    for name in ("end-to-end.md", "accuracy.md"):
        shutil.copy(ROOT / "docs" / name, tmp_path / "docs")
    found = page.Checkout(tmp_path)
    found.pages = {
        path: sections
        for path, sections in found.pages.items()
        if path.name in ("end-to-end.md", "accuracy.md")
    }
    for chart in found.charts():
        shutil.copy(ROOT / "docs" / "plots" / f"{chart.name}.svg", found.plots)
    return found


def test_committed_pages_are_what_the_committed_files_make(home):
    assert page.outdated(home) == []
    assert len(home.charts()) == 2
    for path, text in home.rendered().items():
        assert (ROOT / "docs" / path.name).read_text(encoding="utf-8") == text
        assert "not complete" not in text


@pytest.mark.parametrize(
    ("name", "shown", "plot"),
    [
        (FILES[1], "end-to-end.md", "end-to-end-qwen2.5-7b-h100.svg"),
        (FILES[-1], "accuracy.md", "accuracy-h100.svg"),
    ],
)
def test_a_changed_or_unfinished_file_is_noticed(home, name, shown, plot):
    path = home.results / name
    document = json.loads(path.read_text())
    changed = json.loads(path.read_text())
    if "accuracy" in name:
        changed["rows"][-1]["more_bits"] += 0.01
    else:
        changed["rows"][-1]["ratio"]["dense"] += 0.01
    path.write_text(json.dumps(changed))
    assert [found.name for found in page.outdated(home)] == [shown, plot]
    path.write_text(json.dumps(document | {"complete": False}))
    assert [found.name for found in page.outdated(home)] == [shown]
    page.write_pages(home)
    text = (home.docs / shown).read_text()
    assert f"`{name}` is **not complete**" in text
    assert "; not complete." in text


@pytest.mark.parametrize(
    ("names", "words"),
    [
        (FILES[:-1], r"has no end-to-end-h100.json, which .*end-to-end.md shows.*end_to_end.py"),
        (FILES[-1:], r"has no accuracy-h100.json, which .*accuracy.md shows.*accuracy.py"),
    ],
    ids=["passes", "costs"],
)
def test_a_missing_file_is_named(home, run, monkeypatch, names, words):
    for name in names:
        (home.results / name).unlink()
    with pytest.raises(FormatError, match=words):
        home.rendered()
    with pytest.raises(FormatError, match=words):
        home.charts()
    monkeypatch.setattr(page, "own_checkout", lambda: home)
    code, _, err = run("bench", "report", "--check")
    assert code == 1
    assert re.search(words, " ".join(err.split()))
