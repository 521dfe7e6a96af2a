"""``slidesparse prune``: what it writes, what it says, what it refuses."""

from __future__ import annotations

import json
import os
import struct

import numpy as np
import pytest
from cli_helpers import (
    PRUNED,
    in_process,
    leftovers,
    make_checkpoint,
    random,
    read,
    same_bytes,
)

from slidesparse_rt.cli import prune as prune_module
from slidesparse_rt.packing import SparseWeight, TensorFile, prune, write_file


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "in.safetensors")


@pytest.fixture
def run(capsys):
    return in_process(capsys)


def test_prune(run, source, tmp_path):
    target = tmp_path / "out.safetensors"
    code, out, err = run("prune", source, target, "--pattern", "6:8")
    assert (code, err) == (0, "")
    before, after = read(source), read(target)
    assert list(before) == list(after)
    for name, value in before.items():
        expected = prune(value, "6:8") if name in PRUNED else value
        assert same_bytes(after[name], expected), name
    with TensorFile(target) as file:
        assert file.metadata == {"format": "pt", "note": "as it was"}
    assert "4 tensors pruned to 6:8 by magnitude" in out
    row = next(line for line in out.splitlines() if "layers.0.q.weight" in line)
    assert row.split()[:5] == ["layers.0.q.weight", "24", "x", "40", "F32"]
    assert row.split()[6:] == ["0.0%", "25.0%"]
    assert "copied unchanged (fits --exclude *embed*): model.Embed_tokens.weight" in out
    assert "copied unchanged (fits --exclude *norm*): layers.0.LayerNorm.weight" in out
    assert "copied unchanged (3 dimensions, not 2): layers.0.conv.weight" in out
    assert "copied unchanged (no elements): empty.weight" in out
    assert "(does not fit --include *.weight): " in out
    assert r"[red]\x1b[31mx\n.weight" in out
    assert "\x1b" not in out
    assert leftovers(tmp_path) == []


def test_prune_as_json(run, source, tmp_path):
    target = tmp_path / "out.safetensors"
    code, out, err = run("prune", source, target, "--pattern", "2:4", "--json", "--threads", "2")
    assert (code, err) == (0, "")
    plain = json.loads(out)
    assert plain["input"] == str(source)
    assert plain["output"] == str(target)
    assert (plain["pattern"], plain["method"]) == ("2:4", "magnitude")
    before, after = read(source), read(target)
    assert {row["name"] for row in plain["pruned"]} == set(PRUNED)
    assert {row["name"] for row in plain["copied"]} == set(before) - set(PRUNED)
    assert all(row["reason"] for row in plain["copied"])
    old_energy = new_energy = 0.0
    for row in plain["pruned"]:
        old, new = (part[row["name"]].astype(np.float64) for part in (before, after))
        assert row["shape"] == list(old.shape)
        assert row["bytes"] == before[row["name"]].nbytes
        assert row["kept_energy"] == pytest.approx((new**2).sum() / (old**2).sum(), rel=1e-12)
        assert row["zeros_before"] == (old == 0).sum()
        assert row["zeros_after"] == (new == 0).sum()
        old_energy += (old**2).sum()
        new_energy += (new**2).sum()
    totals = plain["totals"]
    assert totals["tensors"] == 4
    assert totals["weights"] == sum(before[name].size for name in PRUNED)
    assert totals["bytes"] == sum(before[name].nbytes for name in PRUNED)
    assert totals["kept_energy"] == pytest.approx(new_energy / old_energy, rel=1e-12)
    assert totals["zeros_after"] == sum(row["zeros_after"] for row in plain["pruned"])
    assert 0 < totals["kept_energy"] < 1
    assert totals["seconds"] >= 0


def test_prune_measures_the_same_on_any_number_of_threads():
    before = random(700, 1024)
    after = prune(before, "6:8")
    one = prune_module._measure(before, after, 1)
    assert one == prune_module._measure(before, after, 3)
    assert one[2:] == (0, before.size // 4)


def test_pruning_zeros_keeps_all_energy(run, tmp_path):
    write_file(tmp_path / "in", {"a.weight": np.zeros((4, 8), np.float32)}, {})
    code, out, _ = run("prune", tmp_path / "in", tmp_path / "out", "--pattern", "2:4", "--json")
    assert code == 0
    (row,) = json.loads(out)["pruned"]
    assert row["kept_energy"] == 1.0
    assert row["zeros_before"] == row["zeros_after"] == 32


def test_include_and_exclude(run, source, tmp_path):
    target = tmp_path / "out.safetensors"
    arguments = ["prune", source, target, "--pattern", "2:4", "--json", "--include", "LM_*"]
    _, out, _ = run(*arguments)
    assert [row["name"] for row in json.loads(out)["pruned"]] == ["lm_head"]
    arguments += ["--include", "*.q.*", "--include", "*embed*", "--exclude", "lm*", "--force"]
    _, out, _ = run(*arguments)
    names = {row["name"] for row in json.loads(out)["pruned"]}
    assert names == {"layers.0.q.weight", "model.Embed_tokens.weight"}
    reasons = {row["name"]: row["reason"] for row in json.loads(out)["copied"]}
    assert reasons["lm_head"] == "fits --exclude lm*"
    assert reasons["layers.0.q.bias"] == "1 dimensions, not 2"
    assert reasons["ids"] == "does not fit --include LM_* *.q.* *embed*"


def test_nothing_to_prune_lists_what_there_is(run, tmp_path):
    tensors = {f"t{index:02}": np.ones(3, np.int32) for index in range(20)}
    write_file(tmp_path / "in", tensors, {})
    code, _, err = run("prune", tmp_path / "in", tmp_path / "out", "--pattern", "2:4")
    assert code == 1
    assert "  t00 (3, I32): does not fit --include *.weight" in err
    assert "t11" in err
    assert "t12" not in err
    assert "and 8 more" in err
    (tmp_path / "none").write_bytes(struct.pack("<Q", 2) + b"{}")
    code, _, err = run("prune", tmp_path / "none", tmp_path / "out", "--pattern", "2:4")
    assert code == 1
    assert "holds no tensor at all" in err


def test_force_replaces(run, source, tmp_path):
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    code, _, err = run("prune", source, target, "--pattern", "6:8")
    assert code == 1
    assert f"{target} exists" in err
    assert target.read_text() == "precious"
    assert run("prune", source, target, "--pattern", "6:8", "--force")[0] == 0
    assert "layers.0.q.weight" in read(target)


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_links_to_the_input_are_refused(run, source, tmp_path, link):
    before = source.read_bytes()
    target = tmp_path / "link.safetensors"
    link(source, target)
    code, _, err = run("prune", source, target, "--pattern", "6:8", "--force")
    assert code == 1
    assert "are the same file; pruning cannot be undone" in err
    assert source.read_bytes() == before


def test_a_relative_target(run, source, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run("prune", "in.safetensors", "out.safetensors", "--pattern", "6:8")[0] == 0
    assert (tmp_path / "out.safetensors").is_file()
    assert run("prune", "in.safetensors", "./in.safetensors", "--pattern", "6:8")[0] == 1


def test_a_packed_weight_is_not_pruned_again(run, tmp_path):
    weight = SparseWeight.from_array(prune(random(8, 16), "6:8"), "6:8", dtype="bf16")
    weight.save(tmp_path / "packed")
    code, _, err = run(
        "prune", tmp_path / "packed", tmp_path / "out", "--pattern", "2:4", "--include", "*"
    )
    assert code == 1
    assert "is a packed SparseWeight of pattern '6:8'" in err


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_weight_that_is_not_finite_is_named(run, tmp_path, value):
    bad = random(4, 8)
    bad[2, 5] = value
    write_file(tmp_path / "in", {"a.weight": random(4, 8), "b.weight": bad}, {})
    code, out, _ = run("prune", tmp_path / "in", tmp_path / "out", "--pattern", "2:4", "--json")
    assert code == 1
    error = json.loads(out)["error"]
    assert error["type"] == "NonFiniteError"
    assert error["message"].startswith("tensor 'b.weight': ")
    assert "row 2" in error["message"]
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------ wanda


def test_wanda(run, source, tmp_path):
    weights = read(source)
    norms = {
        name: np.abs(random(weights[name].shape[1], seed=index + 20))
        for index, name in enumerate(PRUNED)
    }
    write_file(tmp_path / "norms", {**norms, "unused": np.ones(3, np.float32)}, {})
    target = tmp_path / "out"
    arguments = ["prune", source, target, "--pattern", "6:8", "--method", "wanda"]
    code, out, _ = run(*arguments, "--norms", tmp_path / "norms")
    assert code == 0
    assert "pruned to 6:8 by wanda" in out
    after = read(target)
    for name in PRUNED:
        expected = prune(weights[name], "6:8", method="wanda", norms=norms[name])
        assert same_bytes(after[name], expected)
    by_size = prune(weights["layers.0.q.weight"], "6:8")
    assert not same_bytes(after["layers.0.q.weight"], by_size)


def wanda(run, tmp_path, weights, norms):
    write_file(tmp_path / "in", weights, {})
    write_file(tmp_path / "norms", norms, {})
    arguments = ["prune", tmp_path / "in", tmp_path / "out", "--pattern", "2:4"]
    code, _, err = run(*arguments, "--method", "wanda", "--norms", tmp_path / "norms")
    assert code == 1
    assert not (tmp_path / "out").exists()
    return err


def test_wanda_without_norms_for_a_tensor(run, tmp_path):
    weights = {f"w{index:02}.weight": random(2, 4) for index in range(15)}
    err = wanda(run, tmp_path, weights, {"w00.weight": np.ones(4, np.float32)})
    assert "has no norms for 'w01.weight', 'w02.weight'" in err
    assert "and 2 more" in err
    err = wanda(run, tmp_path, {"a.weight": random(2, 4)}, {"b": np.ones(4, np.float32)})
    assert "has no norms for 'a.weight'; add them" in err


@pytest.mark.parametrize(
    "norms", [np.ones(5, np.float32), np.ones((1, 4), np.float32), np.ones(4, np.float64)]
)
def test_wanda_with_norms_that_do_not_fit(run, tmp_path, norms):
    err = wanda(run, tmp_path, {"a.weight": random(2, 4)}, {"a.weight": norms})
    assert "norms 'a.weight'" in err
    assert "needed is F32 of shape (4,)" in err


def test_wanda_with_norms_that_are_not_norms(run, tmp_path):
    norms = np.array([1, 2, -3, 4], np.float32)
    err = wanda(run, tmp_path, {"a.weight": random(2, 4)}, {"a.weight": norms})
    assert "tensor 'a.weight': norms holds -3.0 at index 2" in err


def test_the_norms_are_not_overwritten(run, source, tmp_path):
    write_file(tmp_path / "norms", {"x": np.ones(3, np.float32)}, {})
    arguments = ["prune", source, tmp_path / "norms", "--pattern", "2:4", "--force"]
    code, _, err = run(*arguments, "--method", "wanda", "--norms", tmp_path / "norms")
    assert code == 1
    assert "--norms" in err
    assert "are the same file" in err
