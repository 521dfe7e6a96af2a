"""What the documentation says is true: its examples run, its links lead somewhere, its tables agree
with the code and with the measured results that they quote.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import slidesparse_rt as ss
from slidesparse_rt.bench.pipeline import promises
from slidesparse_rt.bench.report.accuracy import METHODS, costs
from slidesparse_rt.bench.report.page import outdated, own_checkout
from slidesparse_rt.bench.report.passes import GOAL, Group, groups
from slidesparse_rt.bench.report.plots import draw
from slidesparse_rt.bench.report.results import Key, Measured, products, read_result
from slidesparse_rt.dtypes import storage_bits

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
        *(ROOT / "docs").glob("*.md"),
        *(ROOT / "benchmarks").glob("*.md"),
    ]
)
FENCE = re.compile(r"^```(?P<info>[^\n`]*)\n(?P<body>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Example:
    """A Python block of a page, and the text block right below it, which is its output."""

    code: str
    output: str | None
    line: int
    runs_here: bool


def examples(page: Path) -> Iterator[Example]:
    """Python blocks; those marked ``python gpu`` need a GPU."""
    text = page.read_text(encoding="utf-8")
    blocks = list(FENCE.finditer(text))
    for block, after in itertools.zip_longest(blocks, blocks[1:]):
        language, _, needs = block["info"].partition(" ")
        if language != "python":
            continue
        follows = (
            after is not None
            and after["info"] == "text"
            and not text[block.end() : after.start()].strip()
        )
        yield Example(
            code=block["body"],
            output=after["body"] if after is not None and follows else None,
            line=text.count("\n", 0, block.start("body")),
            runs_here=not needs,
        )


def prose(page: Path) -> str:
    """A page without its blocks of code."""
    return FENCE.sub("", page.read_text(encoding="utf-8"))


def anchors(page: Path) -> set[str]:
    """The names that a page's headings can be linked by, as GitHub makes them."""
    headings = re.findall(r"^#+ +(.+?) *$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def with_examples() -> list[Path]:
    return [page for page in PAGES if any(one.runs_here for one in examples(page))]


def test_the_pages_that_a_newcomer_reads_have_examples() -> None:
    named = {name_of(page) for page in with_examples()}
    assert {"README.md", "docs/patterns.md", "docs/numerics.md"} <= named


@pytest.mark.parametrize("page", with_examples(), ids=name_of)
def test_examples_run_and_print_what_the_page_says(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    for example in examples(page):
        # Line numbers of the page, so that a traceback leads to it.
        code = compile("\n" * example.line + example.code, str(page), "exec")
        if not example.runs_here:
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(code, names)
        if example.output is not None:
            assert printed.getvalue() == example.output


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_relative_links_lead_somewhere(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if link.startswith(("https://", "http://")):
            continue
        target, _, anchor = link.partition("#")
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{name_of(page)} links to {link}, which does not exist"
        if anchor:
            assert anchor in anchors(file), f"{name_of(page)} links to {link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_commands_that_pages_name_exist(page: Path) -> None:
    from slidesparse_rt.cli.app import app

    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = set(re.findall(r"^([a-z][a-z-]*):", makefile, re.MULTILINE))
    commands = {
        command.name or command.callback.__name__
        for command in app.registered_commands
        if command.callback is not None
    } | {group.name for group in app.registered_groups}
    blocks = [block["body"] for block in FENCE.finditer(page.read_text(encoding="utf-8"))]
    code = "\n".join([*blocks, *re.findall(r"`([^`\n]+)`", prose(page))])
    assert set(re.findall(r"^make ([a-z][a-z-]*)", code, re.MULTILINE)) <= targets
    assert set(re.findall(r"^slidesparse ([a-z]+)", code, re.MULTILINE)) <= commands


def test_the_readme_shows_the_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "\nmake demo" in text
    assert "\nmake test" in text


def test_result_files_that_pages_name_exist_and_say_what_they_were_measured_on() -> None:
    named = {
        file
        for page in PAGES
        for file in re.findall(r"results/[\w.-]+\.json", page.read_text(encoding="utf-8"))
    }
    assert "results/packing-cpu.json" in named
    for file in named:
        result = json.loads((ROOT / "benchmarks" / file).read_text(encoding="utf-8"))
        assert {"command", "commit", "versions"} <= set(result), file


def test_pages_and_plots_show_the_result_files() -> None:
    assert outdated() == []
    shown = set()
    for name in ("performance.md", "end-to-end.md", "accuracy.md"):
        page = (ROOT / "docs" / name).read_text(encoding="utf-8")
        own = set(re.findall(r"\]\(plots/([^)]+)\)", page))
        assert own, name
        shown |= own
    assert shown == {path.name for path in (ROOT / "docs" / "plots").iterdir()}
    for chart in own_checkout().charts():
        committed = (ROOT / "docs" / "plots" / f"{chart.name}.svg").read_bytes()
        # Another matplotlib may draw the same data a little differently.
        if f"matplotlib {matplotlib.__version__}".encode() in committed:
            assert draw(chart) == committed, "type: slidesparse bench report"
    result = json.loads(
        (ROOT / "benchmarks" / "results" / "packing-cpu.json").read_text(encoding="utf-8")
    )
    page = (ROOT / "docs" / "packing-speed.md").read_text(encoding="utf-8")
    assert f"{result['rows'][0]['weights_per_second'] / 1e6:.0f}" in page


def products_of(gpu: str) -> Measured:
    """What was measured of the backend hopper on a GPU; the later file counts."""
    files = sorted((ROOT / "benchmarks" / "results").glob(f"gemm-*{gpu}*.json"))
    return products([read_result(path) for path in files], "gemm")["hopper"]


def ratios_of(
    rows: Measured, m: int, mode: str, *, of: str = "op", model: str = "qwen2.5-7b", at: str = "6:8"
) -> list[str]:
    """Of int8 and of fp8: products over dense of the format, operators over the better dense.

    Of products also fp8 over the better dense.
    """
    over = "ratio" if of == "gemm" else "ratio_best_8bit"
    keys = [Key(model, at, dtype, m, of, mode) for dtype in ("int8", "fp8_e4m3")]
    found = [f"{rows[key].row[over]['hopper']:.2f}" for key in keys]
    if of == "gemm":
        found.append(f"{rows[keys[1]].row['ratio_best_8bit']['hopper']:.2f}")
    return found


def test_the_readme_quotes_the_performance_of_both_gpus() -> None:
    h100, h200 = products_of("h100"), products_of("h200")
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    many, fewer = ratios_of(h100, 16384, "sustained"), ratios_of(h100, 2048, "sustained")
    assert f"16,384 tokens {many[0]} (int8) and {many[1]} (fp8) times as fast" in text
    assert f"at 2,048 tokens {fewer[0]} and {fewer[1]}." in text
    few, some = ratios_of(h100, 16, "burst"), ratios_of(h100, 256, "burst")
    assert (
        f"of 16 tokens it is {few[0]} and {few[1]}, of 256 tokens {some[0]} and {some[1]};" in text
    )
    many, fewer = ratios_of(h200, 16384, "sustained"), ratios_of(h200, 2048, "sustained")
    few, some = ratios_of(h200, 16, "burst"), ratios_of(h200, 256, "burst")
    assert (
        f"On an H200, where dense fp8 is faster, it is {many[0]} and {many[1]} with 16,384 tokens, "
        f"{fewer[0]} and {fewer[1]} with 2,048, {few[0]} and {few[1]} with 16, {some[0]} and "
        f"{some[1]} with 256." in text
    )


def test_the_page_of_the_kernel_says_what_it_reaches() -> None:
    rows = products_of("h100")
    page = (ROOT / "docs" / "hopper-kernel.md").read_text(encoding="utf-8")
    for pattern in ("2:4", "4:6", "6:8", "8:10"):
        own = partial(ratios_of, rows, at=pattern)
        many, fewer = (" / ".join(own(m, "sustained")) for m in (16384, 2048))
        wanted = r" \([0-9./ ]+\)"
        line = rf"\| {pattern} \| " + r" \| ".join(
            re.escape(number) + wanted
            for number in (*own(16384, "sustained", of="gemm"), many, fewer)
        )
        assert re.search(line, page), pattern
        few = " | ".join(" / ".join(own(m, "burst")) for m in (16, 64, 128, 256))
        assert f"| {pattern} | {few} |" in page
        wide = rows[Key("qwen2.5-7b", pattern, "bf16", 4096, "gemm", "burst")]
        assert f"{pattern} {wide.row['ratio']['hopper']:.2f}" in page


@pytest.mark.parametrize(
    ("model", "name", "many"),
    [
        ("Qwen2.5-7B", "qwen2.5-7b", 16384),
        ("Llama-3.2-3B", "llama-3.2-3b", 8192),
        ("Qwen2.5-14B", "qwen2.5-14b", 8192),
    ],
)
def test_the_page_of_the_kernel_says_what_it_reaches_on_an_h200(
    model: str, name: str, many: int
) -> None:
    rows = products_of("h200")
    page = (ROOT / "docs" / "hopper-kernel.md").read_text(encoding="utf-8")
    for pattern in ("2:4", "4:6", "6:8", "8:10"):
        own = partial(ratios_of, rows, model=name, at=pattern)
        found = [own(many, "sustained", of="gemm"), own(many, "sustained"), own(2048, "sustained")]
        found += [own(m, "burst") for m in (16, 128, 256)]
        assert f"| {model} | {pattern} | {' | '.join(map(' / '.join, found))} |" in page


def test_the_page_of_the_kernel_says_what_few_tokens_and_small_products_reach() -> None:
    page = (ROOT / "docs" / "hopper-kernel.md").read_text(encoding="utf-8")
    text = " ".join(page[page.index("- **Few tokens** (16") : page.index("Commits: the")].split())
    eight, models = ("int8", "fp8_e4m3"), ("qwen2.5-7b", "llama-3.2-3b", "qwen2.5-14b")
    rows = products_of("h200")

    def found(over: str, **wanted: Sequence[Any]) -> dict[Key, float]:
        return {
            key: case.row[over]["hopper"]
            for key, case in rows.items()
            if key.mode == "burst"
            and all(getattr(key, name) in values for name, values in wanted.items())
        }

    def span(values: Mapping[Key, float]) -> str:
        return f"{min(values.values()):.2f} to {max(values.values()):.2f}"

    def better(**wanted: Sequence[Any]) -> dict[Key, float]:
        return found("ratio_best_8bit", dtype=eight, **wanted)

    targets = {"2:4": 1.15, "4:6": 1.05, "6:8": 1.0, "8:10": 1.0}
    few = better(model=models, m=(16, 64, 128, 256), stage=["op"], pattern=list(targets))
    assert len(few) == 96
    missed = {key: value for key, value in few.items() if value < targets[key.pattern]}
    ((key, value),) = missed.items()
    assert key[:4] == ("qwen2.5-14b", "8:10", "fp8_e4m3", 256)
    assert f"{value:.3f} of 1.00" in text
    more = better(model=models, m=[512], stage=["op"], pattern=["8:10"])
    worst = [f"{more.pop(Key('qwen2.5-7b', '8:10', d, 512, 'op', 'burst')):.2f}" for d in eight]
    assert f"8:10 of Qwen2.5-7B is at {' and '.join(worst)}, of the others at {span(more)}" in text
    alone = better(model=models, m=(128, 256), stage=["gemm"], pattern=["4:6", "6:8", "8:10"])
    assert f"at {span(alone)} of the better dense product" in text
    squares = [f"square-{1 << power}" for power in range(6, 11)]
    small = {"model": squares, "stage": ["op"], "pattern": ["6:8"]}
    assert f"at 6:8 is {span(better(**small))} times as fast" in text
    assert f"ours two, is at {span(found('ratio', dtype=['bf16'], **small))}, and" in text
    layers = found(
        "ratio", dtype=["bf16"], model=("llama-3.2-1b", "bitnet-2b"), m=(256, 512), stage=["op"],
        pattern=["6:8"],
    )  # fmt: skip
    assert f"with 256 and 512 tokens at {span(layers)} " in text


def test_the_page_of_tuning_says_how_far_auto_was_from_the_fastest() -> None:
    page = (ROOT / "docs" / "tuning.md").read_text(encoding="utf-8")
    lines = [line for line in page.splitlines() if "results/" in line and line.startswith("|")]
    assert len(lines) == 10
    for line in lines:
        _, first, _, *worst, _ = line.split("|")
        (name,) = re.findall(r"results/([\w-]+\.json)", first)
        rows = read_result(ROOT / "benchmarks" / "results" / name).rows
        found = [f"{promise.least:.3f}" for promise in promises(rows)]
        assert [cell.split()[0].rstrip(":") for cell in worst] == found, line


def test_the_readme_says_what_auto_keeps_in_sustained_runs() -> None:
    rows = [
        row
        for path in (ROOT / "benchmarks" / "results").glob("pipeline-*h200*.json")
        for row in read_result(path).rows
        if row["mode"] == "sustained"
    ]
    assert {row["model"] for row in rows} == {"qwen2.5-7b"}
    assert {row["pattern"] for row in rows} == {"6:8", "8:10"}
    assert {row["dtype"] for row in rows} == {"int8", "fp8_e4m3"}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    least = math.floor(100 * min(row["ratio"]["auto"] for row in rows)) / 100
    assert f"and fp8, on an H200 at least {least:.2f} times." in text


def end_to_end_groups() -> dict[str, Group]:
    results = ROOT / "benchmarks" / "results"
    # In the order of the page: the one without a number first.
    files = sorted(results.glob("end-to-end-h100*.json"), key=lambda path: path.stem)
    return {group.pattern.name: group for group in groups([read_result(path) for path in files])}


def test_the_readme_quotes_whole_passes() -> None:
    group = end_to_end_groups()["6:8"]

    def both(phase: str, m: int) -> list[str]:
        sides = map(group.side, ("int8", "fp8_e4m3"))
        return [f"{group.ratio(phase, m, side):.2f}" for side in sides]

    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    some, many = both("prefill", 8192), both("prefill", 32768)
    assert f"8,192 tokens {some[0]} (int8) and {some[1]} (fp8) times as fast as with dense" in text
    assert f"32,768 tokens {many[0]} and {many[1]}; wanted was {GOAL:.2f}." in text
    few, more = both("decode", 16), both("decode", 512)
    assert f"decodes for 16 sequences {few[0]} and {few[1]} times as fast, for 512" in text
    assert f"for 512 sequences {more[0]} and {more[1]}." in text


def test_what_the_end_to_end_page_says_in_words_is_so() -> None:
    found = end_to_end_groups()
    assert list(found) == ["2:4", "4:6", "6:8", "8:10"]
    assert all(group.result.document["complete"] for group in found.values())
    six, eight = found["6:8"], found["8:10"]
    sides = [six.side("int8"), six.side("fp8_e4m3")]
    # The goal of prefill was missed in both formats, int8 came close.
    reached = {m: [six.ratio("prefill", m, side) for side in sides] for m in (8192, 32768)}
    assert all(value < GOAL for own in reached.values() for value in own)
    assert reached[32768][0] > 1.18
    assert reached[32768][1] < 1.14
    # Decode: nowhere below dense, much faster for few sequences, hardly for many.
    for group in found.values():
        for side in map(group.side, group.dtypes):
            assert min(group.ratio("decode", m, side) for m in group.tokens("decode")) >= 1.0
            assert group.ratio("decode", 16, side) > 1.3
            if group in (six, eight):
                assert group.ratio("decode", 512, side) < 1.05
    # About three quarters of a dense prefill, so 6:8 could pass the goal and 8:10 not.
    for group in found.values():
        for m in group.tokens("prefill"):
            row = group.rows["prefill", m, "dense"]
            assert 0.7 < row["linear_us"] / row["us"] < 0.8
    assert all(GOAL < six.bound("prefill", m) < GOAL + 0.05 for m in six.tokens("prefill"))
    assert all(eight.bound("prefill", m) < GOAL for m in eight.tokens("prefill"))
    # Alone the linear layers are fast enough at 32,768 tokens.
    assert six.linear_ratio("prefill", 32768, sides[0]) >= six.needed(32768, GOAL)
    held = {side: row["bytes"] for g in found.values() for (_, _, side), row in g.rows.items()}
    plain = 2 * six.result.document["linear_weights"]
    for pattern in ("6:8", "8:10"):
        assert held[f"{pattern} int8"] > held["dense"]
        assert 0.95 < held[f"{pattern} fp8_e4m3"] / plain < 1.05


def test_what_the_accuracy_page_says_in_words_is_so() -> None:
    (found,) = costs([read_result(ROOT / "benchmarks" / "results" / "accuracy-h100.json")])
    assert found.result.document["complete"]
    assert len(found.result.rows) == 1 + 3 * (1 + 4 * 2)
    names = [pattern.name for pattern in found.patterns]
    assert names == ["dense", "8:10", "6:8", "4:6", "2:4"]
    for dtype, method in itertools.product(found.dtypes, METHODS):
        ordered = [found.more(name, dtype, method) for name in names]
        assert ordered == sorted(ordered)
        assert 1 / 22 < ordered[2] / ordered[4] < 1 / 16
        for name in names:
            plain, int8, fp8 = (
                found.more(name, one, method) for one in ("bf16", "int8", "fp8_e4m3")
            )
            assert plain < int8 < fp8
            assert int8 - plain < 0.00025
            assert fp8 - plain < (0.0035 if name == "2:4" else 0.0011)
    saved = {
        name: 1 - found.more(name, "bf16", "wanda") / found.more(name, "bf16", "magnitude")
        for name in names[1:]
    }
    assert saved["8:10"] < 0
    assert all(0.02 < saved[name] < 0.07 for name in ("6:8", "4:6", "2:4"))


@pytest.mark.parametrize(
    ("name", "between"), [("demo-cpu.json", r"\s+"), ("demo-h100.json", r" \| ")]
)
def test_the_demo_page_quotes_its_result_files(name: str, between: str) -> None:
    document = json.loads((ROOT / "benchmarks" / "results" / name).read_text())
    page = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    assert name in page
    for row in document["rows"]:
        accuracy = row["accuracy"]
        keys = ("output_error", "cosine_mean", "cosine_min", "rank_correlation")
        numbers = between.join(re.escape(f"{accuracy[key]:.4f}") for key in keys)
        assert re.search(rf"{row['dtype']} .*{numbers}", page), row


def test_the_readme_quotes_the_host_time_of_a_bound_run() -> None:
    def times(name: str) -> list[str]:
        rows = {
            (row["call"], row["backend"], row["dtype"]): row["median_us"]
            for row in json.loads((ROOT / "benchmarks" / "results" / name).read_text())["rows"]
        }
        calls = ("SparseGemmPlan.bind graph=True, each call", "SparseGemmPlan.run out=y")
        ours = [rows[call, "auto", "int8"] for call in calls]
        return [f"{us:.0f}" for us in (ours[0], rows["torch.mm", "torch", "bf16"], ours[1])]

    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    # The performance page shows the first; it is the later one.
    bound, torch_mm, _ = times("overhead-h100.json")
    assert f"at once: {bound} us of the host's time" in text
    assert f"where `torch.mm` takes {times('overhead-h100-2.json')[1]} to {torch_mm};" in text
    bound, torch_mm, run = times("overhead-h200.json")
    assert f"{bound} on an H200's, where it takes {torch_mm} and `run(x, out=y)` {run}." in text


def test_the_pattern_table_is_computed() -> None:
    page = (ROOT / "docs" / "patterns.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `.*$", page, re.MULTILINE)
    expected = []
    for pattern in ss.PATTERNS:
        ratios = []
        for bits in (8, 16):
            dense, slid = storage_bits(bits, pattern.group, pattern.windows)
            ratios.append(f"{slid / dense:.3f}")
        expansion, bound = pattern.expansion, pattern.speed_bound
        expected.append(
            f"| `{pattern.name}` | {pattern.windows} | {pattern.group} to {pattern.slots} | "
            f"{100 * pattern.keep / pattern.group:.1f} % | {expansion} = {float(expansion):.3f} | "
            f"{bound} = {float(bound):.3f} | {ratios[0]} | {ratios[1]} |"
        )
    assert rows == expected


def test_the_rooms_are_those_that_the_import_rules_know() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = re.findall(r"^\| `(\w+)(?:\.py|/)` \|", page, re.MULTILINE)
    rules = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    # The rules list the highest first; rooms on one line stand beside each other.
    floors = re.findall(
        r'^  "(slidesparse_rt\.\w+(?: : slidesparse_rt\.\w+)*)",$', rules, re.MULTILINE
    )
    listed = [re.findall(r"slidesparse_rt\.(\w+)", floor) for floor in reversed(floors)]
    assert rooms == [room for floor in listed for room in floor]
    for room in rooms:
        home = ROOT / "slidesparse_rt" / room
        assert home.is_dir() or home.with_suffix(".py").is_file()
