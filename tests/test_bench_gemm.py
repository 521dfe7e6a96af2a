"""``bench gemm`` without a GPU: the real code over a CUDA runtime made of host memory."""

from __future__ import annotations

import json

import bench_fakes
import numpy as np
import pytest
from bench_fakes import BF16, TINY, FakePlan, measure
from cli_helpers import leftovers

from slidesparse_rt.bench import checks, gemm, gemm_settings, record
from slidesparse_rt.bench.record import Budget, WrongOutput
from slidesparse_rt.dtypes import operand
from slidesparse_rt.errors import (
    BackendUnavailable,
    DeviceMemoryError,
    DTypeError,
    LibraryError,
    OptionError,
    PatternError,
)

cuda = pytest.fixture(bench_fakes.make_cuda)
gpu = pytest.fixture(bench_fakes.make_gpu)
plans = pytest.fixture(bench_fakes.make_plans)


def test_gemm_measures_every_case_and_compares(gpu, plans, tmp_path):
    path = tmp_path / "result.json"
    settings = gemm.GemmSettings(**TINY, patterns=("6:8", "4:6"), sustained=True)
    result, lines = measure(gpu, settings, path)
    document = json.loads(path.read_text())
    record.check_document(document)
    assert document == result.document
    assert document["complete"]
    assert document["left_out"] == []
    assert not result.failed
    keys = [(r["pattern"], r["dtype"], r["m"], r["stage"], r["mode"]) for r in document["rows"]]
    assert len(keys) == len(set(keys)) == 2 * 3 * 2 * 2 * 2
    # Patterns, the first twice (all is prepared ahead of its time); formats, sides, layers.
    assert FakePlan.closed == (2 + 1) * 3 * 3 * 4
    cost = {"hopper": 5_000, "cusparselt": 10_000, "dense": 15_000}
    for row in document["rows"]:
        extra = 2_000.0 if row["stage"] == "op" else 0.0
        assert row["us"] == pytest.approx({name: 4 * (us + extra) for name, us in cost.items()})
        assert row["ratio"] == pytest.approx(
            {name: (15_000 + extra) / (cost[name] + extra) for name in ("hopper", "cusparselt")}
        )
        assert row["bound"] == pytest.approx({"6:8": 4 / 3, "4:6": 3 / 2}[row["pattern"]])
        assert row["best_dense_8bit_us"] == pytest.approx(row["us"]["dense"])
        assert row["ratio_best_8bit"] == pytest.approx(row["ratio"])
        assert row["checked"]["tokens"] == min(8, row["m"])
        assert set(row["checked"]["error_over_bound"]) == set(cost)
        if row["mode"] == "burst":
            assert row["layer_us"]["dense"] == pytest.approx(
                dict.fromkeys(("qkv", "o", "gate_up", "down"), 15_000 + extra)
            )
    flops = 2 * (128 * 64 + 64 * 64 + 208 * 64 + 64 * 104)
    first = document["rows"][0]
    assert first["dense_equivalent_tflops"]["cusparselt"] == pytest.approx(flops / 40_000 / 1e6)
    kernels = {(r["dtype"]): r["kernels"] for r in document["rows"] if r["stage"] == "gemm"}
    fused = "bfloat16 results, both scale vectors fused"
    assert kernels["int8"] == {"hopper": fused, "cusparselt": "int32 sums", "dense": "int32 sums"}
    assert kernels["fp8_e4m3"] == {"hopper": fused, "cusparselt": "float32 sums", "dense": fused}
    assert kernels["bf16"] == {
        "hopper": "bfloat16 results",
        "cusparselt": "bfloat16 sums",
        "dense": "bfloat16 results",
    }
    for row in document["rows"]:
        how = dict.fromkeys(row["layers"], "whole")
        assert row["layer_how"] == ({"hopper": how} if row["stage"] == "gemm" else {})
    assert any("ratio 3.000, 1.500 (at most 1.333)" in line for line in lines)


def test_gemm_measures_only_what_was_asked_for(gpu, plans, monkeypatch):
    made = []
    original = gemm.make_weights

    def counted(gpu, layers, pattern):
        made.append(pattern.name)
        return original(gpu, layers, pattern)

    monkeypatch.setitem(gemm.run_gemm.__kwdefaults__, "make_weights", counted)
    settings = gemm.GemmSettings(
        **TINY,
        patterns=("6:8", "2:4"),
        backends=("hopper",),
        stages=("op",),
        layer_times=False,
        sustained=True,
    )
    result, _ = measure(gpu, settings)
    assert result.document["left_out"] == []
    assert made == ["6:8", "2:4"]  # once for all operand formats
    assert {row["stage"] for row in result.rows} == {"op"}
    assert not any("layer_us" in row for row in result.rows)
    for row in result.rows:
        assert set(row["us"]) == {"hopper", "dense"}
        # Without layers, the better sum.
        assert row["ratio_best_8bit"] == pytest.approx({"hopper": 17 / 7})


def test_gemm_a_broken_side_stops_no_other(gpu, plans, monkeypatch):
    original = plans.__init__

    def init(self, weight, pattern, *, dtype, backend, **others):
        if (backend, dtype.name) == ("cusparselt", "fp8_e4m3"):
            raise BackendUnavailable("no fp8 in that library")
        original(self, weight, pattern, dtype=dtype, backend=backend, **others)

    def spoil(name, values):
        if name == "hopper" and values.shape[0] == 40 and not plans.running:
            values.fill(0)

    def run(self, x, *, out, stream):
        plans.running = True
        original_run(self, x, out=out, stream=stream)

    def product(self, tokens, direct, stream):
        plans.running = False
        return original_product(self, tokens, direct, stream)

    original_run, original_product = plans.run, plans.product
    monkeypatch.setattr(plans, "run", run)
    monkeypatch.setattr(plans, "product", product)
    monkeypatch.setattr(plans, "__init__", init)
    plans.spoil = staticmethod(spoil)
    settings = gemm.GemmSettings(**TINY, dtypes=("int8", "fp8_e4m3"), patterns=("6:8",))
    result, lines = measure(gpu, settings)
    reasons = [(entry["case"], entry["reason"]) for entry in result.document["left_out"]]
    assert reasons == [
        ("tiny 6:8 int8 M=40 hopper", "wrong output"),
        ("tiny 6:8 fp8_e4m3 M=1 cusparselt", "unavailable"),
        ("tiny 6:8 fp8_e4m3 M=40", "wrong output"),
        ("tiny 6:8 fp8_e4m3 M=40 cusparselt", "unavailable"),
    ]
    # The operator of the side whose product was wrong would be right, and is not measured.
    sides = {(row["dtype"], row["m"]): set(row["us"]) for row in result.rows}
    assert sides == {
        ("int8", 1): {"hopper", "cusparselt", "dense"},
        ("int8", 40): {"cusparselt", "dense"},
        ("fp8_e4m3", 1): {"hopper", "dense"},
    }
    assert len(result.rows) == 3 * 2
    assert result.failed
    assert any("M=40 hopper: not reported, wrong output" in line for line in lines)


@pytest.mark.parametrize("stage", ["gemm", "op"])
@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("backend", ["hopper", "cusparselt", "dense"])
def test_gemm_refuses_wrong_outputs(gpu, plans, backend, dtype, stage):
    def spoil(name, values):
        whole_result = values.dtype == BF16 and values.shape[1] in (64, 128, 208)
        if name == backend and (stage == "gemm") == (plans.price_of_op is False):
            assert whole_result or stage == "gemm"
            values[0, 0] += values[0, 0] * values.dtype.type(0.25) + values.dtype.type(1)

    plans.price_of_op = False
    original = plans.run

    def run(self, x, *, out, stream):
        plans.price_of_op = True
        original(self, x, out=out, stream=stream)

    plans.run = run
    plans.spoil = staticmethod(spoil)
    result, lines = measure(
        gpu,
        gemm.GemmSettings(
            **TINY | {"tokens": (40,)},
            dtypes=(dtype,),
            patterns=("6:8",),
            backends=(backend if backend != "dense" else "cusparselt",),
        ),
    )
    assert result.failed
    assert result.document["complete"]
    (entry,) = result.document["left_out"]
    assert entry["reason"] == "wrong output"
    assert backend in entry["why"]
    assert "qkv" in entry["why"]
    # What was right before is kept; the wrong stage has no row.
    assert [row["stage"] for row in result.rows] == ([] if stage == "gemm" else ["gemm"])
    assert any("not reported, wrong output" in line for line in lines)


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16"])
def test_operators_that_differ_where_nothing_is_sampled_are_refused(gpu, plans, dtype):
    """A tile of zeros, of which no token is among those that are compared with exact sums."""
    tokens = 40
    sampled = checks.sample(tokens, 8, seed=1)
    (token,) = [token for token in range(tokens) if token not in sampled][:1]

    def spoil(name, values):
        if name == "hopper" and values.dtype == BF16 and len(values) == tokens:
            values[token] = 0

    plans.spoil = staticmethod(spoil)
    result, _ = measure(
        gpu,
        gemm.GemmSettings(
            **TINY | {"tokens": (tokens,), "stages": ("op",)},
            dtypes=(dtype,),
            patterns=("6:8",),
            backends=("hopper", "cusparselt"),
        ),
    )
    (entry,) = result.document["left_out"]
    assert (entry["case"], entry["reason"]) == (f"tiny 6:8 {dtype} M=40 hopper", "wrong output")
    assert entry["why"].startswith("hopper beside dense, qkv 128 x 64: ")
    assert (
        f" of 5120 {'differ' if dtype == 'int8' else 'are far apart'}, the first at (1, "
        in (entry["why"])
    )
    # The others are measured without it.
    (row,) = result.rows
    assert set(row["us"]) == {"dense", "cusparselt"}


def test_results_that_are_rounded_differently_are_alike() -> None:
    row = operand("fp8_e4m3")
    values = np.random.default_rng(0).standard_normal((5, 300)).astype(np.float32)
    checks.check_alike((values * (1 + 2**-8)).astype(BF16), values.astype(BF16), row, "one")
    for spoiled in (0, np.nan, np.inf):
        wrong = values.copy()
        wrong[3, 10:20] = spoiled
        with pytest.raises(WrongOutput, match=r"one: \d+ of 1500 are far apart, the first at \(3"):
            checks.check_alike(wrong, values, row, "one")
    with pytest.raises(WrongOutput, match="far apart"):
        checks.check_alike(values[::-1], values, row, "swapped")


@pytest.mark.parametrize("backend", ["cusparselt", "dense"])
def test_gemm_refuses_outputs_that_are_not_written(gpu, plans, monkeypatch, backend):
    monkeypatch.setattr(
        plans,
        "multiply",
        lambda self, *arguments: (
            None if self.backend == backend else FakePlan.multiply(self, *arguments)
        ),
    )
    settings = gemm.GemmSettings(
        **TINY, dtypes=("int8",), patterns=("6:8",), backends=("cusparselt",)
    )
    result, _ = measure(gpu, settings)
    assert result.rows == []
    assert [entry["reason"] for entry in result.document["left_out"]] == ["wrong output"] * 2
    assert "never written" in result.document["left_out"][0]["why"]


def test_gemm_leaves_out_what_cannot_run_and_goes_on(gpu, plans, monkeypatch):
    original = plans.__init__

    def init(self, weight, pattern, *, dtype, backend, device, options):
        if dtype.name == "fp8_e4m3":
            raise BackendUnavailable("this GPU has no fp8")
        original(
            self, weight, pattern, dtype=dtype, backend=backend, device=device, options=options
        )
        if dtype.name == "bf16" and backend == "dense":
            raise LibraryError("it broke")

    monkeypatch.setattr(plans, "__init__", init)
    result, _ = measure(gpu, gemm.GemmSettings(**TINY, patterns=("6:8",)))
    reasons = [(entry["case"], entry["reason"]) for entry in result.document["left_out"]]
    assert reasons == [
        ("tiny 6:8 fp8_e4m3 M=1", "unavailable"),
        ("tiny 6:8 fp8_e4m3 M=40", "unavailable"),
        ("tiny 6:8 bf16 M=1", "error"),
        ("tiny 6:8 bf16 M=40", "error"),
    ]
    assert {row["dtype"] for row in result.rows} == {"int8"}
    assert {row["best_dense_8bit_us"] for row in result.rows} == {None}
    assert result.failed


def test_gemm_an_error_in_a_capture_ends_the_capture(gpu, plans, monkeypatch):
    def run(self, x, *, out, stream):
        raise RuntimeError("cudaErrorStreamCaptureInvalidated")

    monkeypatch.setattr(plans, "run", run)
    result, _ = measure(gpu, gemm.GemmSettings(**TINY, dtypes=("int8",), patterns=("6:8",)))
    assert [row["stage"] for row in result.rows] == ["gemm", "gemm"]
    assert {entry["why"] for entry in result.document["left_out"]} == {
        "RuntimeError: cudaErrorStreamCaptureInvalidated"
    }
    assert result.failed


def test_gemm_time_budget(gpu, plans):
    budget = Budget(3600.0)
    result, _ = measure(gpu, gemm.GemmSettings(**TINY, patterns=("6:8",)), budget=budget)
    assert not result.document["left_out"]
    spent = Budget(0.0)
    result, _ = measure(gpu, gemm.GemmSettings(**TINY, patterns=("6:8", "2:4")), budget=spent)
    assert not result.rows
    assert {entry["reason"] for entry in result.document["left_out"]} == {"time budget"}
    assert len(result.document["left_out"]) == 12
    assert not result.failed


def test_gemm_time_budget_begins_when_all_is_compiled(gpu, plans, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    prepare, calls = plans.prepare, []

    def slow(self, tokens, *, x_dtype, stream):
        calls.append(tokens)
        if len(calls) <= 3 * 3 * 4:  # formats, sides, layers: what is prepared ahead
            now[0] += 100.0
        prepare(self, tokens, x_dtype=x_dtype, stream=stream)

    monkeypatch.setattr(plans, "prepare", slow)
    result, _ = measure(gpu, gemm.GemmSettings(**TINY, patterns=("6:8",)), budget=Budget(60.0))
    assert now[0] > 60.0
    assert result.document["left_out"] == []


def test_gemm_time_budget_ends_between_numbers_of_tokens(gpu, plans, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(record.time, "monotonic", lambda: now[0])
    original = gemm.GemmCase.rows

    def rows(self):
        now[0] += 50.0
        return original(self)

    monkeypatch.setattr(gemm.GemmCase, "rows", rows)
    settings = gemm.GemmSettings(**TINY, dtypes=("int8", "bf16"), patterns=("6:8",))
    result, lines = measure(gpu, settings, budget=Budget(50.0))
    assert {(row["dtype"], row["m"]) for row in result.rows} == {("int8", 1)}
    assert [entry["case"] for entry in result.document["left_out"]] == [
        "tiny 6:8 int8 M=40",
        "tiny 6:8 bf16 M=1",
        "tiny 6:8 bf16 M=40",
    ]
    assert "tiny 6:8 bf16 M=1 and 1 more: left out, time budget: no time left" in lines
    assert not result.failed


def test_gemm_without_memory_for_the_weights(gpu, plans, monkeypatch):
    original = gemm.make_weights

    def refused(gpu, layers, pattern):
        if pattern.name == "6:8":
            raise DeviceMemoryError("the GPU has no room")
        return original(gpu, layers, pattern)

    monkeypatch.setitem(gemm.run_gemm.__kwdefaults__, "make_weights", refused)
    settings = gemm.GemmSettings(**TINY, dtypes=("int8",), patterns=("6:8", "4:6"))
    result, lines = measure(gpu, settings)
    assert [(e["case"], e["why"]) for e in result.document["left_out"]] == [
        ("tiny 6:8 int8 M=1", "the GPU has no room"),
        ("tiny 6:8 int8 M=40", "the GPU has no room"),
    ]
    assert {row["pattern"] for row in result.rows} == {"4:6"}
    # Nothing was compiled before these weights were there.
    assert any(line.startswith("compiled and searched") for line in lines)


def test_estimate_grows_with_what_is_asked_for():
    one = gemm.GemmSettings(tokens=(4096,), dtypes=("int8",), patterns=("6:8",))
    small = gemm.estimate(one)
    # 4 s for the plans, 1 s for the case, two stages of less than half a second.
    assert 5.0 < small < 6.0
    more = gemm.GemmSettings(tokens=(4096,), dtypes=("int8",), patterns=("6:8",), sustained=True)
    # Two stages, three sides, two rounds of a second each.
    assert gemm.estimate(more) - small == pytest.approx(12 * 1.06)
    fewer = gemm.GemmSettings(
        tokens=(4096,), dtypes=("int8",), patterns=("6:8",), stages=("op",), layer_times=False
    )
    assert gemm.estimate(fewer) < small
    assert gemm.estimate(gemm.GemmSettings()) > 50 * small / 2


def test_usable_backends(monkeypatch):
    able = {"dense", "hopper"}

    def choose(name, problem, device):
        assert (problem.n, problem.k, problem.pattern.name) == (4608, 3584, "6:8")
        assert str(device) == "cuda:1"
        if name not in able or problem.dtype.name == "bf16":
            raise BackendUnavailable(f"{name} cannot")

    monkeypatch.setattr(gemm_settings, "choose", choose)
    settings = gemm.GemmSettings(dtypes=("bf16", "int8"))
    assert gemm.usable_backends(settings, 1, asked=False) == (
        ("hopper",),
        {"cusparselt": "cusparselt cannot"},
    )
    with pytest.raises(BackendUnavailable, match="cusparselt cannot"):
        gemm.usable_backends(settings, 1, asked=True)
    able.remove("hopper")
    with pytest.raises(BackendUnavailable, match="hopper cannot\ncusparselt cannot"):
        gemm.usable_backends(settings, 1, asked=False)
    able |= {"hopper", "cusparselt"}
    assert gemm.usable_backends(settings, 1, asked=True) == (("hopper", "cusparselt"), {})
    able.remove("dense")
    with pytest.raises(BackendUnavailable, match="dense cannot"):
        gemm.usable_backends(settings, 1, asked=False)


def test_gemm_file_is_complete_after_every_case(gpu, plans, tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    seen = []
    original = record.write_json

    def watched(target, document):
        original(target, document)
        seen.append((json.loads(target.read_text())["complete"], len(document["rows"])))

    monkeypatch.setattr(record, "write_json", watched)
    measure(gpu, gemm.GemmSettings(**TINY, dtypes=("int8",), patterns=("6:8",)), path)
    assert seen == [(False, 2), (False, 4), (True, 4)]
    assert leftovers(tmp_path) == []


def test_best_dense_takes_the_better_format_of_each_layer():
    def row(dtype, us, layers):
        return {
            "model": "m", "pattern": "6:8", "m": 16, "stage": "gemm", "mode": "burst",
            "dtype": dtype, "us": {"cusparselt": 100.0, "hopper": 50.0, "dense": us},
            "layer_us": {"dense": layers},
        }  # fmt: skip

    rows = [row("int8", 200.0, {"a": 50.0, "b": 150.0}), row("bf16", 400.0, {"a": 1.0, "b": 1.0})]
    gemm.complete_rows(rows)
    assert [entry["best_dense_8bit_us"] for entry in rows] == [None, None]
    rows.append(row("fp8_e4m3", 220.0, {"a": 70.0, "b": 130.0}))
    gemm.complete_rows(rows)
    # The better sum, 200, by the layers' proportion: (50 + 130) / (50 + 150).
    assert [entry["best_dense_8bit_us"] for entry in rows] == [180.0] * 3
    assert rows[0]["ratio_best_8bit"] == pytest.approx({"cusparselt": 1.8, "hopper": 3.6})


def test_gemm_settings_refuse_what_does_not_exist():
    for wrong, error in (
        ({"models": ("gpt-5",)}, OptionError),
        ({"layers": ("lm_head",)}, OptionError),
        ({"dtypes": ("int3",)}, DTypeError),
        ({"patterns": ("2:8",)}, PatternError),
        ({"tokens": (0,)}, OptionError),
        ({"rounds": 0}, OptionError),
        ({"backends": ()}, OptionError),
        ({"backends": ("dense",)}, OptionError),
        ({"backends": ("hopper", "hopper")}, OptionError),
        ({"stages": ("gemm", "ops")}, OptionError),
    ):
        with pytest.raises(error):
            gemm.GemmSettings(**wrong)
