"""The benchmarks without a GPU: the real code over a CUDA runtime made of host memory."""

from __future__ import annotations

import json

import bench_fakes
import numpy as np
import pytest
from bench_fakes import BF16, SMALL, TINY, FakePlan, measure, measure_kernels, new_record
from cli_helpers import leftovers

from slidesparse_rt import plan as plan_module
from slidesparse_rt.bench import checks, gemm, gemm_settings, overhead, quantize, record, shapes
from slidesparse_rt.bench.record import Budget
from slidesparse_rt.errors import (
    BackendUnavailable,
    DTypeError,
    LibraryError,
    OptionError,
    PatternError,
)
from slidesparse_rt.kernels import launch as launch_module
from slidesparse_rt.pattern import Pattern

cuda = pytest.fixture(bench_fakes.make_cuda)
gpu = pytest.fixture(bench_fakes.make_gpu)
plans = pytest.fixture(bench_fakes.make_plans)
kernels = pytest.fixture(bench_fakes.make_kernels)


# -------------------------------------------------------------------------------------------- gemm


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
        if name == "hopper" and values.shape[0] == 40:
            values.fill(0)

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


# ------------------------------------------------------------------------------------------ shapes


def test_shapes_are_those_of_the_models():
    wanted = {
        "qwen2.5-7b": [(4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944)],
        "llama-3.2-3b": [(5120, 3072), (3072, 3072), (16384, 3072), (3072, 8192)],
        "llama-3.2-1b": [(3072, 2048), (2048, 2048), (16384, 2048), (2048, 8192)],
        "qwen2.5-14b": [(7168, 5120), (5120, 5120), (27648, 5120), (5120, 13824)],
    }
    for name, sizes in wanted.items():
        assert [(layer.n, layer.k) for layer in shapes.model(name.upper()).layers] == sizes
    assert shapes.Layer("x", 2, 3).flops(5) == 60
    with pytest.raises(OptionError, match=r"allowed are 'qwen2\.5-7b'"):
        shapes.model("qwen")


# ---------------------------------------------------------------------------------------- quantize


def test_quantize_measures_against_a_copy(gpu, kernels):
    settings = quantize.QuantizeSettings(**SMALL)
    result, _ = measure_kernels(gpu, settings)
    assert result.document["left_out"] == []
    assert len(result.rows) == len(settings.cases()) == 4 * 2 * 2 * (3 + 2 + 2) + 4
    record.check_document(result.document)
    for row in result.rows:
        total = row["bytes"]["read"] + row["bytes"]["written"]
        assert row["tb_per_s"] == pytest.approx(total / row["us"] / 1e6)
        # The fake moves 3 MB/s where the fake copy moves 4; scales and the bias come for free.
        assert row["copy_tb_per_s"] == pytest.approx(4e-6)
        assert 0.749 < row["of_copy"] < 1.1
        assert 2 <= row["sets"] <= 64
    by_name = {
        (r["kernel"], r["x"], r["out"], r["pattern"], r["m"], r["columns"]): r for r in result.rows
    }
    row = by_name["quantize_lift", "bfloat16", "int8", "6:8", 20, 24]
    assert row["row_length"] == 64  # K' = 36 in units of 32 bytes
    assert row["bytes"] == {"read": 20 * 24 * 2, "written": 32 * 64 + 20 * 4}
    row = by_name["lift", "bfloat16", "bf16", "6:8", 20, 24]
    assert row["bytes"] == {"read": 20 * 24 * 2, "written": 32 * 48 * 2}
    row = by_name["dequantize", "int32", "bfloat16", None, 3, 40]
    assert row["bytes"] == {"read": 3 * 40 * 4 + 3 * 4 + 40 * 8, "written": 3 * 40 * 2}


def test_quantize_refuses_wrong_outputs(gpu, kernels):
    def last(values):
        values[-1, -1] = 1

    for spoil, rows in ((last, 0), (lambda values: values.fill(3), 0)):
        kernels.spoil = spoil
        result, lines = measure_kernels(
            gpu, quantize.QuantizeSettings(**SMALL, x_types=("float16",))
        )
        assert len(result.rows) == rows
        assert {entry["reason"] for entry in result.document["left_out"]} == {"wrong output"}
        assert all("not reported, wrong output" in line for line in lines)


def test_quantize_errors_and_budget(gpu, kernels, monkeypatch):
    def refused(*arguments):
        raise LibraryError("no kernel")

    settings = quantize.QuantizeSettings(**SMALL, x_types=("float32",), patterns=("2:4",))
    result, _ = measure_kernels(gpu, settings, Budget(0.0))
    assert {entry["reason"] for entry in result.document["left_out"]} == {"time budget"}
    monkeypatch.setattr(launch_module, "quantizer", refused)
    result, _ = measure_kernels(gpu, settings)
    assert {entry["reason"] for entry in result.document["left_out"]} == {"error"}
    assert {row["kernel"] for row in result.rows} == {"dequantize"}


def test_quantize_cases():
    settings = quantize.QuantizeSettings()
    cases = settings.cases()
    assert len(cases) == len(set(cases))
    assert cases[0] == quantize.LiftCase(18944, 3584, "bfloat16", "int8", "6:8")
    for case in cases:
        columns = case.k if isinstance(case, quantize.LiftCase) else case.n
        assert case.m in (16384, 1024, 64) or case.m * columns >= 1 << 26
    pairs = {(c.x, c.out) for c in cases if isinstance(c, quantize.LiftCase)}
    assert ("bfloat16", "bf16") in pairs
    assert ("float32", "bf16") not in pairs
    assert quantize.full_tokens(1 << 26) == 256
    for wrong in ({"tokens": (0,)}, {"tokens": ("all",)}, {"columns": (0,)}, {"rounds": 0}):
        with pytest.raises(OptionError):
            quantize.QuantizeSettings(**wrong)


# ---------------------------------------------------------------------------------------- overhead


class HostArrays:
    name = "torch"

    def __init__(self):
        self.waits = 0

    def array(self, values):
        return values

    def host(self, array):
        return array

    def wait(self):
        self.waits += 1


class HostPlan:
    """A plan on the CPU that says it is another backend."""

    wrong = False

    def __init__(self, weight, pattern, *, dtype, backend, device):
        if (backend, dtype) == ("dense", "fp8_e4m3"):
            raise BackendUnavailable("no fp8 here")
        self.plan = plan_module.SparseGemmPlan(weight, pattern, dtype=dtype, device="cpu")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.plan.close()

    def run(self, x, *, out=None):
        y = self.plan.run(x, out=out)
        if HostPlan.wrong:
            y[0, 0] += 1
        return y


def measure_overhead(gpu, others=None, arrays=None, budget=None):
    settings = overhead.OverheadSettings(n=64, k=64, batches=3, calls=2)
    result, lines = new_record("overhead", **settings.to_json()), []
    overhead.run_overhead(
        gpu,
        settings,
        result,
        budget=budget or Budget(),
        say=lines.append,
        done=lambda: None,
        arrays=arrays or HostArrays(),
        make_plan=HostPlan,
        others=others or (lambda settings, index: []),
    )
    return result, lines


def test_overhead_measures_plans_and_pytorch(gpu):
    def refuses():
        raise RuntimeError("not compiled with it\nand more")

    result, _ = measure_overhead(
        gpu, lambda settings, index: [("torch.mm", "bf16", int), ("torch._x", "int8", refuses)]
    )
    record.check_document(result.document)
    calls = [(row["backend"], row["dtype"], row["call"]) for row in result.rows]
    assert len(calls) == 8 * 2 + 1
    assert calls[0] == ("hopper", "int8", "SparseGemmPlan.run out=None")
    assert calls[1][2] == "SparseGemmPlan.run out=y"
    assert calls[-1] == ("torch", "bf16", "torch.mm")
    assert [entry["case"] for entry in result.document["left_out"]] == [
        "dense fp8_e4m3",
        "torch._x int8",
    ]
    assert result.document["left_out"][1]["why"] == "RuntimeError: not compiled with it"
    for row in result.rows:
        assert 0 < row["minimum_us"] <= row["median_us"]
    profile = result.rows[0]["profile"]
    assert 0 < len(profile) <= 15
    assert any(entry["function"].startswith("slidesparse_rt/plan.py:") for entry in profile)
    assert all("/work" not in entry["function"] for entry in profile)
    assert not result.failed


def test_overhead_refuses_wrong_outputs_and_keeps_to_its_budget(gpu, monkeypatch):
    monkeypatch.setattr(HostPlan, "wrong", True)
    result, _ = measure_overhead(gpu)
    assert result.rows == []
    assert result.failed
    result, _ = measure_overhead(gpu, budget=Budget(0.0))
    assert {entry["reason"] for entry in result.document["left_out"]} == {"time budget"}


def test_overhead_without_pytorch(gpu):
    arrays = HostArrays()
    arrays.name = "cupy"
    result, _ = measure_overhead(gpu, arrays=arrays)
    assert result.document["settings"]["library"] == "cupy"
    assert result.document["left_out"][-1]["case"] == "PyTorch's calls"
    assert arrays.waits > 0


def test_torch_calls_compute_what_they_claim(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "device", lambda kind, index=0: "cpu")
    settings = overhead.OverheadSettings(n=64, k=64)
    made = overhead.torch_calls(settings, 0)
    names = {(call, dtype) for call, dtype, _ in made}
    assert ("torch._scaled_mm", "fp8_e4m3") in names
    assert {dtype for call, dtype in names if call == "torch._cslt_sparse_mm"} == {
        "int8",
        "fp8_e4m3",
        "bf16",
    }
    by_name = {call: run for call, _, run in made[:2]}
    product, into = by_name["torch.mm"](), by_name["torch.mm out="]()
    assert product.shape == (32, 64)
    assert torch.equal(product, into)
    # A call that this PyTorch cannot make fails when it is made, not before.
    seen = []
    overhead._measure_other(
        settings, result := new_record("overhead"), "torch._cslt_sparse_mm", "bf16", made[-1][2],
        lambda: None, seen.append,
    )  # fmt: skip
    assert len(result.rows) + len(result.document["left_out"]) == 1


def test_torch_arrays_keep_bits(monkeypatch):
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "device", lambda kind, index=0: "cpu")
    arrays = overhead.TorchArrays(0)
    values = np.arange(6, dtype=np.float32).reshape(2, 3).astype(BF16)
    made = arrays.array(values)
    assert made.dtype == torch.bfloat16
    assert checks.check_bits(arrays.host(made), values, "bits") == 0.0


def test_host_time_reads_the_clock_around_batches(monkeypatch):
    ticks = iter([0, 1000, 5000, 9000, 10000, 16000])
    monkeypatch.setattr(overhead.time, "perf_counter_ns", lambda: next(ticks))
    found = overhead.host_time(lambda: None, lambda: None, batches=3, calls=2)
    assert found == overhead.HostTime(median=2.0, minimum=0.5)


def test_overhead_settings():
    for wrong in ({"m": 33}, {"calls": 500}, {"batches": 0}):
        with pytest.raises(OptionError):
            overhead.OverheadSettings(**wrong)
    weight = np.ones((2, 20), np.float32)
    overhead.drop_last(weight, Pattern.parse("6:8"))
    assert weight[0].tolist() == [1] * 6 + [0] * 2 + [1] * 6 + [0] * 2 + [1] * 4
