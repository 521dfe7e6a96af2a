"""benchmarks/accuracy.py at a size for a CPU: its text, its training, and what pruning costs."""

from __future__ import annotations

import itertools
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import accuracy
from decoder import LAYERS, Sizes

SIZES = Sizes(48, 6, 2, 8, 64, 2, 256, rope_theta=1e4)
SENTENCE = b"the quick brown fox jumps over the lazy dog; "


def test_text_is_of_different_files(tmp_path: Path) -> None:
    for name, content in {
        "a/one.py": b"x = 1\n" * 50,
        "a/same.py": b"x = 1\n" * 50,
        "b/two.txt": b"words and words " * 30,
        "b/short.txt": b"short",
        "b/data.txt": b"\0" * 400,
        "c/other.bin": b"words " * 100,
    }.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    files = accuracy.text_files([tmp_path], 1 << 20)
    assert sorted(package for package, _ in files) == ["a", "b"]
    assert files == accuracy.text_files([tmp_path], 1 << 20)
    assert len(accuracy.text_files([tmp_path], 400)) <= 1


def test_what_is_measured_was_not_trained_on() -> None:
    files = [("package", f"<{number}>".encode()) for number in range(100)]
    train, held_out = accuracy.split(files)
    parts = [set(bytes(data).split(b"\n")) for data in (train, held_out)]
    assert parts[0].isdisjoint(parts[1])
    assert len(parts[0] | parts[1]) == 100
    assert b"<0>" in parts[1]


def test_batches_are_pieces_of_the_text() -> None:
    data = np.arange(200, dtype=np.uint8)
    for pieces in itertools.islice(accuracy.batches(data, 3, 10, seed=0), 5):
        assert pieces.shape == (3, 11)
        assert (pieces.diff(dim=1) == 1).all()


@pytest.fixture(scope="module")
def trained() -> Any:
    """A model that knows one sentence."""
    data = np.frombuffer(SENTENCE * 200, np.uint8)
    weights = accuracy.Weights(SIZES, "cpu")
    before = accuracy.bits_per_byte(
        weights.decoder(weights.linears(), 32), data[:2000], batch=8, length=32
    )
    options: dict[str, Any] = {"most_steps": 60, "batch": 8, "length": 32, "compiled": False}
    done = accuracy.train(weights, data, minutes=1.0, rate=1e-2, say=lambda text: None, **options)
    return weights, data, before, done


def test_training_learns(trained: Any) -> None:
    weights, data, before, done = trained
    after = accuracy.bits_per_byte(
        weights.decoder(weights.linears(), 32), data[:2000], batch=8, length=32
    )
    assert before > 6
    assert after < 3
    assert (done["steps"], done["bytes_seen"]) == (60, 60 * 8 * 32)


def test_bits_of_a_model_that_knows_nothing(trained: Any) -> None:
    weights = trained[0]
    decoder = weights.decoder(weights.linears(), 32)
    decoder.head = torch.zeros_like(decoder.head)
    bits = accuracy.bits_per_byte(decoder, trained[1][:1000], batch=4, length=32)
    assert bits == pytest.approx(8.0, abs=1e-6)


def test_norms_are_those_of_the_inputs(trained: Any) -> None:
    weights, data, *_ = trained
    norms = accuracy.input_norms(weights, data, count=500, batch=4, length=32)
    assert [sorted(block) for block in norms] == [sorted(LAYERS)] * SIZES.blocks
    for block, of_block in zip(weights.blocks, norms, strict=True):
        for name, w in block.items():
            assert of_block[name].shape == (w.shape[1],)
    # Inputs of qkv and gate_up are normed: 512 tokens whose squares sum to K.
    for name in ("qkv", "gate_up"):
        assert float(norms[0][name].square().sum()) == pytest.approx(512 * SIZES.hidden, rel=0.02)


def test_what_pruning_costs(trained: Any, tmp_path: Path) -> None:
    weights, data, *_ = trained
    words = "x.json --batch 8 --length 32 --patterns 6:8 2:4 --dtypes int8 bf16"
    options = accuracy.parse(words.split())
    norms = accuracy.input_norms(weights, data, count=500, batch=8, length=32)
    rows = list(accuracy.measured(weights, data[:2000], norms, options))
    assert len(rows) == 1 + 2 * (1 + 2 * 2)
    bits = {(r["pattern"], r["dtype"], r["method"]): r["bits_per_byte"] for r in rows[1:]}
    plain = rows[0]["bits_per_byte"]
    assert bits["dense", "bf16", "none"] == pytest.approx(plain, abs=0.02)
    assert bits["dense", "int8", "none"] == pytest.approx(plain, abs=0.1)
    for method in accuracy.METHODS:
        assert plain < bits["6:8", "int8", method] < bits["2:4", "int8", method]
    for row in rows:
        assert row["perplexity"] == pytest.approx(2 ** row["bits_per_byte"])
        assert math.isfinite(row["more_bits"])
    shown = accuracy.table(rows).splitlines()
    assert shown[0].count("|") == 6
    assert [line.split(" | ")[0] for line in shown[2:]] == ["| dense", "| 6:8", "| 2:4"]


def test_the_whole_script(tmp_path: Path) -> None:
    folder = tmp_path / "text" / "package"
    folder.mkdir(parents=True)
    for number in range(45):
        (folder / f"{number}.txt").write_bytes(SENTENCE * 12 + b"%d" % number)
    output = tmp_path / "accuracy.json"
    words = (
        f"{output} --folders {folder.parent} --steps 3 --blocks 1 --hidden 48 --length 16 "
        "--batch 4 --calibration 64 --held-out 400 --patterns 4:6 --dtypes int8 --device cpu "
        "--no-compile"
    )
    document = accuracy.run(accuracy.parse(words.split()))
    assert json.loads(output.read_text()) == document
    assert document["complete"]
    assert document["text"]["files"] == 45
    assert document["text"]["largest"] == {
        "package": sum(len(SENTENCE) * 12 + len(str(number)) for number in range(45))
    }
    assert [row["pattern"] for row in document["rows"]] == ["dense", "dense", "4:6", "4:6"]
