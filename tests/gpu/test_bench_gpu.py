"""The benchmarks of products and operators on a real GPU: outputs are right, all is recorded."""

from __future__ import annotations

import json

import pytest

from slidesparse_rt.bench.record import check_document
from slidesparse_rt.cli import main
from slidesparse_rt.tuning import select
from slidesparse_rt.tuning.cache import TableCache

from .common import BACKENDS_HERE

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def tables(monkeypatch, tmp_path):
    """An empty cache; the user's own is left alone."""
    made = TableCache(tmp_path / "tuning")
    monkeypatch.setattr(select, "default_cache", lambda: made)
    return made


def bench(tmp_path, *arguments):
    """The rows of a benchmark, none of whose outputs was wrong."""
    path = tmp_path / "result.json"
    assert main(["bench", *arguments, "--rounds", "3", "--output", str(path)]) == 0
    document = json.loads(path.read_text())
    check_document(document)
    assert document["complete"]
    assert {entry["reason"] for entry in document["left_out"]} <= {"unavailable"}
    return document["rows"]


def test_pipeline(tmp_path):
    rows = bench(
        tmp_path, "pipeline", "--models", "llama-3.2-1b", "--layers", "qkv", "--tokens", "1,100",
        "--dtypes", "int8,fp8_e4m3,bf16", "--patterns", "6:8,dense",
    )  # fmt: skip
    assert len(rows) == 2 * 3 * 2
    for row in rows:
        assert {"auto", "dense"} <= set(row["us"])
        assert set(row["us"]) <= {"auto", *BACKENDS_HERE}
        # Forgotten tables would be measured for every plan.
        assert row["tuned"]["auto"] == {"qkv": "by times measured in this run"}
        assert row["layer_how"]["auto"]["qkv"] in BACKENDS_HERE
        assert set(row["quantize_us"]) == set(row["us"])
        assert min(row["quantize_us"].values()) > 0
    # Not of each row: a stage that is alone waits for its own launch, and three rounds are few.
    shares = sorted(us / row["us"][side] for row in rows for side, us in row["quantize_us"].items())
    assert shares[len(shares) // 2] < 1


def test_pipeline_by_kept_times_and_by_the_rule(tmp_path):
    arguments = ["--models", "square-256", "--dtypes", "int8", "--patterns", "6:8"]
    (row,) = bench(tmp_path, "pipeline", *arguments, "--tuning", "cached")
    assert row["tuned"]["auto"] == {"square": "by the rule: nothing is measured"}
    (row,) = bench(tmp_path, "pipeline", *arguments, "--tuning", "measure")
    assert row["tuned"]["auto"] == {"square": "by times measured in this run"}
    (row,) = bench(tmp_path, "pipeline", *arguments, "--tuning", "cached")
    assert row["tuned"]["auto"]["square"].startswith("by times measured ")


def test_products_of_squares_in_every_format(tmp_path):
    rows = bench(
        tmp_path, "gemm", "--models", "square-64,square-512", "--dtypes",
        "int8,fp8_e4m3,bf16,fp16", "--patterns", "2:4,14:16,dense",
    )  # fmt: skip
    assert {(row["model"], row["m"]) for row in rows} == {("square-64", 64), ("square-512", 512)}
    assert {row["dtype"] for row in rows} == {"int8", "fp8_e4m3", "bf16", "fp16"}
    assert {row["pattern"] for row in rows} == {"2:4", "14:16", "dense"}
    for row in rows:
        assert set(row["efficiency"]) <= set(row["us"])
