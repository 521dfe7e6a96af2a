"""``bench packing``: small weights, real versions."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from bench_fakes import new_record
from cli_helpers import in_process

from slidesparse_rt.bench import packing, packing_versions, record
from slidesparse_rt.errors import OptionError, PatternError
from slidesparse_rt.pattern import Pattern

SMALL = {"n": 24, "k": 200, "rounds": 2, "threads": 2, "memory": False}


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def measure(settings, versions=None):
    lines, done = [], []
    result = new_record("packing", **settings.to_json())
    packing.run_packing(
        settings, result, say=lines.append, done=lambda: done.append(1), versions=versions
    )
    return result, lines, done


@pytest.mark.parametrize("pattern", ["6:8", "2:4", "dense"])
def test_all_versions_agree_and_are_measured(pattern, monkeypatch):
    monkeypatch.setattr(packing, "_PAUSE", 0.0)
    settings = packing.PackingSettings(**SMALL, pattern=pattern)
    result, lines, done = measure(settings)
    record.check_document(result.document)
    assert result.document["complete"]
    assert result.document["left_out"] == []
    names = [one.name for one in packing_versions.all_versions(Pattern.parse(pattern), 1)]
    assert names[:2] == ["slidesparse_rt", "numpy"]
    steps = ("check", "prune", "prune+quantize+slide fp8_e4m3", "prune+quantize+slide int8")
    found = [(row["step"], row["version"]) for row in result.rows]
    assert found == [(step, name) for step in steps for name in ("slidesparse_rt", *names[1:])]
    assert len(done) == settings.runs(len(names))
    for row in result.rows:
        assert len(row["seconds"]) == 2
        assert row["weights_per_second"] == pytest.approx(24 * 200 / row["median_seconds"])
        assert row["peak_memory_over_input"] is None
    assert result.rows[0]["time_over_ours"] == 1.0
    assert result.document["host"]["cores"] >= 1
    assert lines[0].startswith("comparing the outputs of slidesparse_rt, numpy")


@pytest.mark.parametrize("step", ["fits", "prune", "pack"])
def test_nothing_is_reported_where_outputs_differ(step):
    ours, other, *_ = packing_versions.all_versions(Pattern.parse("6:8"), 1)

    def fits(weight):
        return not other.fits(weight)

    def prune(weight):
        pruned = other.prune(weight).copy()
        pruned[0, np.flatnonzero(pruned[0])[0]] *= 2
        return pruned

    def pack(weight, dtype):
        slid, scales = other.pack(weight, dtype)
        slid = slid.copy()
        slid[-1, 0] ^= 1
        return slid, scales

    wrong = replace(other, **{step: {"fits": fits, "prune": prune, "pack": pack}[step]})
    result, lines, done = measure(packing.PackingSettings(**SMALL), [ours, wrong])
    assert result.failed
    assert result.rows == []
    assert result.document["complete"]
    (entry,) = result.document["left_out"]
    assert entry["reason"] == "wrong output"
    assert "numpy" in entry["why"]
    assert not done
    assert lines[-1].startswith("not measured, because outputs differ")


def test_equal_magnitudes_may_be_pruned_either_way():
    ours, other, *_ = packing_versions.all_versions(Pattern.parse("2:4"), 1)
    weight = np.ones((2, 8), np.float32)
    weight[1] = [4, 3, 2, 1, 4, 3, 2, 1]

    def last(array):
        pruned = array.copy()
        pruned[0, [0, 1, 4, 5]] = 0  # as good a choice as any
        pruned[1, [2, 3, 6, 7]] = 0
        return pruned

    def pack(array, dtype):
        slid, scales = ours.pack(array, dtype)
        values = slid.reshape(2, 2, 4).copy()
        values[0] = values[0][:, [2, 3, 0, 1]]
        return values.reshape(slid.shape), scales

    tied = replace(other, prune=last, pack=pack)
    assert packing_versions.compare([ours, tied], weight, Pattern.parse("2:4")) == {"numpy": 2}


@pytest.mark.skipif(not packing._STATUS.exists(), reason="memory is measured on Linux alone")
def test_peak_memory_is_of_a_process_of_its_own(monkeypatch):
    monkeypatch.setattr(packing, "_PAUSE", 0.0)
    settings = packing.PackingSettings(n=512, k=2048, rounds=1, threads=1)
    (ours, *_) = packing_versions.all_versions(Pattern.parse("6:8"), 1)
    result, _, done = measure(settings, [ours])
    peaks = [row["peak_memory_over_input"] for row in result.rows]
    assert peaks[:2] == [None, None]
    assert all(1.2 < peak < 20 for peak in peaks[2:])
    assert len(done) == settings.runs(1) == 4 + 2


@pytest.mark.skipif(not packing._STATUS.exists(), reason="memory is measured on Linux alone")
def test_peak_memory_counts_the_input_once(capsys):
    # Arrays of more than 32 MiB: the allocator keeps no memory of that size from what ran before.
    packing.print_peak(2048, 4608, "6:8", 1, "numpy", "int8")
    # Its input, and at least a pruned float32 copy and the slid bytes.
    assert 2.3 < float(capsys.readouterr().out) < 20
    with pytest.raises(LookupError, match="VmNone"):
        packing._memory_bytes("VmNone")


def test_targets_are_met_or_missed():
    def row(step, rate, peak=None, version="slidesparse_rt"):
        return {"step": step, "version": version, "weights_per_second": rate,
                "peak_memory_over_input": peak}  # fmt: skip

    found = packing.targets(
        [
            row("check", 1e9),
            row("prune", 1e6),
            row("prune+quantize+slide int8", 2e8, 2.6),
            row("prune", 1.0, version="numpy"),
        ]
    )
    assert [(goal["what"], goal["met"]) for goal in found] == [
        ("check, weights per second", True),
        ("prune, weights per second", False),
        ("prune+quantize+slide int8, weights per second", True),
        ("prune+quantize+slide int8, peak memory over input", False),
    ]


def test_settings():
    assert packing.PackingSettings().threads >= 1
    with pytest.raises(OptionError, match="from 1 on"):
        packing.PackingSettings(n=0)
    with pytest.raises(OptionError, match="threads"):
        packing.PackingSettings(threads=0)
    with pytest.raises(PatternError):
        packing.PackingSettings(pattern="2:8")


def test_packing_from_end_to_end(run, tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "_PAUSE", 0.0)
    path = tmp_path / "packing.json"
    small = ("--rows", "16", "--columns", "96", "--quick", "--output", path)
    code, out, err = run("bench", "packing", *small)
    assert code == 0, err
    assert "no GPU" in out
    assert "prune+quantize+slide" in out
    assert ("met: check, weights" in out) or ("MISSED: check, weights" in out)
    document = json.loads(path.read_text())
    record.check_document(document)
    assert document["gpu"] is None
    assert document["settings"]["n"] == 16
    assert document["versions"]["numba"]
    code, out, err = run("bench", "packing", *small, "--json", "--commit", "abc")
    assert code == 0, err
    assert json.loads(out)["commit"]["id"] == "abc"

    def wrong(versions, weight, pattern):
        raise record.WrongOutput("prune: numpy keeps other magnitudes")

    monkeypatch.setattr(packing, "compare", wrong)
    code, out, err = run("bench", "packing", *small)
    assert code == 1
    assert "left out (wrong output): packing: prune: numpy keeps other magnitudes" in out
    code, _, err = run("bench", "packing", "--output", tmp_path / "no" / "r.json")
    assert code == 1
    assert "is no folder" in err


def test_the_script_is_the_command(tmp_path):
    script = Path(__file__).resolve().parents[1] / "benchmarks" / "packing.py"
    path = tmp_path / "r.json"
    options = ["--rows", "8", "--columns", "64", "--quick", "--output", str(path)]
    subprocess.run([sys.executable, str(script), *options], check=True, capture_output=True)
    command = json.loads(path.read_text())["command"]
    assert command.startswith("python benchmarks/packing.py --rows 8")


def test_without_pytorch_there_is_one_version_less(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    names = [one.name for one in packing_versions.all_versions(Pattern.parse("6:8"), 1)]
    assert names == ["slidesparse_rt", "numpy"]
