"""``slidesparse inspect``, against counting the slow way."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from cli_helpers import (
    in_process,
    make_checkpoint,
    random,
    read,
)
from rich.console import Console

from slidesparse_rt.cli import inspect as inspect_module
from slidesparse_rt.dtypes import storage_bits
from slidesparse_rt.packing import SparseWeight, TensorFile, prune, write_file
from slidesparse_rt.pattern import PATTERNS, Pattern


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "in.safetensors")


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def violations(weight, pattern):
    """Groups with too many nonzeros, counted the slow way."""
    n, k = weight.shape
    padded = np.zeros((n, pattern.padded_k(k)))
    padded[:, :k] = weight.astype(np.float64)
    counts = np.count_nonzero(padded.reshape(n, -1, pattern.group), axis=2)
    return int((counts > pattern.keep).sum())


def test_inspect_as_json(run, source):
    asked = ("2:4", "4:6", "6:8", "8:10")
    code, out, err = run("inspect", source, "--json")
    assert (code, err) == (0, "")
    plain = json.loads(out)
    assert plain["file"] == str(source)
    assert plain["bytes"] == source.stat().st_size
    assert plain["metadata"] == {"format": "pt", "note": "as it was"}
    assert plain["sparse_weight"] is None
    tensors = read(source)
    matrices = {
        name for name, value in tensors.items() if value.ndim == 2 and value.size and name != "ids"
    }
    assert {row["name"] for row in plain["tensors"]} == matrices
    for row in plain["tensors"]:
        weight = tensors[row["name"]]
        n, k = weight.shape
        assert row["bytes"] == weight.nbytes
        assert row["zeros"] == weight.size - np.count_nonzero(weight)
        assert row["int8_bytes"] == n * k + 4 * n
        for name in asked:
            pattern = Pattern.parse(name)
            found = row["patterns"][name]
            assert found["violations"] == violations(weight, pattern)
            assert found["fits"] == (found["violations"] == 0)
            assert found["groups"] == n * pattern.groups(k)
            assert (found["first_violation"] is None) == found["fits"]
            _, bits = storage_bits(8, pattern.group, pattern.windows)
            assert found["int8_packed_bytes"] == -(-n * pattern.groups(k) * bits // 8) + 4 * n
        fitting = [p.name for p in PATTERNS[:-1] if violations(weight, p) == 0]
        assert row["sparsest"] == (fitting[0] if fitting else None)
    by_name = {row["name"]: row for row in plain["tensors"]}
    assert by_name["layers.0.v.weight"]["sparsest"] == "4:6"
    assert by_name["layers.0.q.weight"]["patterns"]["2:4"]["first_violation"] == {
        "row": 0,
        "group": 0,
        "nonzeros": 4,
    }
    reasons = {row["name"]: row["reason"] for row in plain["skipped"]}
    assert reasons == {
        "layers.0.q.bias": "1 dimensions, not 2",
        "layers.0.conv.weight": "3 dimensions, not 2",
        "empty.weight": "no elements",
        "scale.weight": "0 dimensions, not 2",
        "ids": "type I64, not F32, F16, BF16",
    }
    totals = plain["totals"]
    assert totals["bytes"] == sum(row["bytes"] for row in plain["tensors"])
    for name in asked:
        rows = [row["patterns"][name] for row in plain["tensors"]]
        assert totals["patterns"][name] == {
            "fit": sum(row["fits"] for row in rows),
            "tensors": len(rows),
            "violations": sum(row["violations"] for row in rows),
            "groups": sum(row["groups"] for row in rows),
            "int8_packed_bytes": sum(row["int8_packed_bytes"] for row in rows),
        }


def test_inspect(run, source):
    code, out, err = run("inspect", source)
    assert (code, err) == (0, "")
    assert "metadata: format=pt, note=as it was" in out
    line = next(line for line in out.splitlines() if "layers.0.v.weight" in line)
    assert line.split()[:6] == ["layers.0.v.weight", "8", "x", "30", "F16", "33.3%"]
    assert line.split()[8] == "fits"
    assert line.split()[-3:] == ["4:6", "480", "bytes"]
    assert "1 of 7" in out
    assert "2 skipped" not in out
    assert "1 skipped (type I64, not F32, F16, BF16): ids" in out
    assert r"[red]\x1b[31mx\n.weight" in out
    assert "\x1b" not in out


@pytest.mark.parametrize("pattern", ["2:4", "6:8", "30:32", "dense"])
def test_inspect_one_pattern(run, tmp_path, pattern):
    weight = prune(random(6, 70), pattern)
    write_file(tmp_path / "in", {"a": weight}, {})
    _, out, _ = run("inspect", tmp_path / "in", "--pattern", pattern, "--json", "--threads", "1")
    (row,) = json.loads(out)["tensors"]
    assert list(row["patterns"]) == [pattern]
    assert row["patterns"][pattern]["fits"]
    assert row["sparsest"] == (None if pattern == "dense" else pattern)


@pytest.mark.parametrize("zeros", [0.0, 0.1, 0.3, 0.5, 0.7, 1.0])
@pytest.mark.parametrize("columns", [4, 30, 37])
def test_sparsest_never_skips_a_pattern_that_fits(zeros, columns):
    """The short cut by counting must agree with looking at every pattern."""
    weight = random(5, columns)
    weight[np.random.default_rng(3).random(weight.shape) < zeros] = 0
    wanted = (Pattern.parse("6:8"),)
    entry = inspect_module.Entry("a", weight.shape, "F32", weight.nbytes)
    found = inspect_module.look(entry, weight, wanted, 1).sparsest
    fitting = [pattern for pattern in PATTERNS[:-1] if violations(weight, pattern) == 0]
    assert found == (fitting[0] if fitting else None)


def test_inspect_a_weight_that_is_not_finite(run, tmp_path):
    bad = random(4, 8)
    bad[1, 3] = np.nan
    write_file(tmp_path / "in", {"bad": bad, "good": prune(random(4, 8), "2:4")}, {})
    code, out, _ = run("inspect", tmp_path / "in")
    assert code == 0
    assert "bad: weight holds nan at row 1, column 3" in out
    assert "1 of 2" in out
    _, out, _ = run("inspect", tmp_path / "in", "--json")
    by_name = {row["name"]: row for row in json.loads(out)["tensors"]}
    assert "nan" in by_name["bad"]["problem"]
    assert by_name["good"]["sparsest"] == "2:4"


def test_inspect_a_file_without_matrices(run, tmp_path):
    write_file(tmp_path / "in", {"a": np.ones(3, np.float32)}, {})
    code, out, _ = run("inspect", tmp_path / "in")
    assert code == 0
    assert "no two-dimensional float tensor" in out
    assert json.loads(run("inspect", tmp_path / "in", "--json")[1])["tensors"] == []


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16", "fp16"])
def test_inspect_a_packed_weight(run, tmp_path, dtype):
    weight = SparseWeight.from_array(prune(random(8, 24), "4:6"), "4:6", dtype=dtype)
    weight.save(tmp_path / "packed")
    code, out, _ = run("inspect", tmp_path / "packed")
    assert code == 0
    assert "a packed SparseWeight: 8 outputs x 24 inputs, pattern 4:6, " + dtype in out
    assert "skipped" not in out
    plain = json.loads(run("inspect", tmp_path / "packed", "--json")[1])
    assert plain["sparse_weight"] == {
        "shape": [8, 24],
        "pattern": "4:6",
        "dtype": dtype,
        "bytes": weight.nbytes,
    }
    (row,) = plain["tensors"]
    assert row["name"] == "values"
    assert row["sparsest"] == "4:6"


def test_inspect_a_packed_weight_that_lies(run, tmp_path):
    weight = SparseWeight.from_array(prune(random(8, 24), "6:8"), "6:8")
    weight.save(tmp_path / "packed")
    with TensorFile(tmp_path / "packed") as file:
        metadata = file.metadata | {"pattern": "2:4"}
    write_file(tmp_path / "lying", read(tmp_path / "packed"), metadata)
    code, _, err = run("inspect", tmp_path / "lying")
    assert code == 1
    assert "contradicts itself" in err


def test_a_narrow_terminal_cuts_nothing(source):
    report = inspect_module.inspect_file(source, patterns=["2:4", "6:8"])
    screen = Console(file=io.StringIO(), width=40, markup=False, highlight=False)
    report.render(screen)
    text = screen.file.getvalue()
    assert "layers.0.q.weight\n" in text
    assert "shape 24 x 40, type F32, zeros 0.0%, 2:4 240 bad" in text
    assert "sparsest that fits 4:6" in text
