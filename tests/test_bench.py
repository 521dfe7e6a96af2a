"""The benchmarks without a GPU: the real code over a CUDA runtime made of host memory."""

from __future__ import annotations

import bench_fakes
import fake_machine
import numpy as np
import pytest
from bench_fakes import BF16, SMALL, measure_kernels, new_record

from slidesparse_rt import plan as plan_module
from slidesparse_rt.bench import checks, overhead, overhead_calls, quantize, record, shapes
from slidesparse_rt.bench.record import Budget
from slidesparse_rt.errors import (
    BackendUnavailable,
    LibraryError,
    OptionError,
)
from slidesparse_rt.kernels import launch as launch_module
from slidesparse_rt.kernels import loader
from slidesparse_rt.pattern import Pattern

cuda = pytest.fixture(bench_fakes.make_cuda)
gpu = pytest.fixture(bench_fakes.make_gpu)
kernels = pytest.fixture(bench_fakes.make_kernels)


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

    backends = ("dense", "hopper")

    def __init__(self, weight, pattern, *, dtype, backend, device, tuning):
        assert tuning == ("measure" if backend == "auto" else "cached")
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

    def bind(self, x, out, *, graph=False):
        return self.plan.bind(x, out, graph=graph)

    def backend_for(self, tokens):
        assert tokens == 32
        return "dense"


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
        others=others or (lambda m, n, k, index: []),
        launches=lambda index: [("cuLaunchKernelEx", "any", int)],
    )
    return result, lines


def test_overhead_measures_plans_and_pytorch(gpu):
    def refuses():
        raise RuntimeError("not compiled with it\nand more")

    result, _ = measure_overhead(
        gpu, lambda m, n, k, index: [("torch.mm", "bf16", int), ("torch._x", "int8", refuses)]
    )
    record.check_document(result.document)
    calls = [(row["backend"], row["dtype"], row["call"]) for row in result.rows]
    assert len(calls) == (8 + 3) * 4 + 2
    assert calls[0] == ("hopper", "int8", "SparseGemmPlan.run out=None")
    assert calls[1][2] == "SparseGemmPlan.run out=y"
    assert calls[2][2] == "SparseGemmPlan.bind, each call"
    assert calls[3][2] == "SparseGemmPlan.bind graph=True, each call"
    assert calls[-2] == ("driver", "any", "cuLaunchKernelEx")
    assert calls[-1] == ("torch", "bf16", "torch.mm")
    chosen = [(row["ran"], row["forms"]) for row in result.rows if row["backend"] == "auto"]
    assert chosen == [("dense", ["dense", "hopper"])] * 12
    assert all("ran" not in row for row in result.rows if row["backend"] != "auto")
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
    assert [row["backend"] for row in result.rows] == ["driver"]
    assert result.failed
    monkeypatch.setattr(HostPlan, "wrong", False)
    monkeypatch.setattr(HostPlan, "bind", lambda plan, x, out, **_: lambda: out)  # writes nothing
    result, _ = measure_overhead(gpu)
    assert [row["backend"] for row in result.rows] == ["driver"]
    result, _ = measure_overhead(gpu, budget=Budget(0.0))
    assert {entry["reason"] for entry in result.document["left_out"]} == {"time budget"}
    assert len(result.document["left_out"]) == 12


def test_bare_launches_do_nothing_as_plans_do_something(monkeypatch):
    made = fake_machine.Kernels()
    monkeypatch.setattr(loader, "kernels_of", lambda index: {3: made}[index])
    calls = overhead_calls.driver_calls(3)
    assert [(call, dtype) for call, dtype, _ in calls] == [
        ("cuDriverGetVersion", "any"),
        ("cuLaunchKernel", "any"),
        ("cuLaunchKernelEx", "any"),
        ("cuLaunchKernelEx twice, the second early", "any"),
        ("cuGraphLaunch of these two", "any"),
    ]
    seen = []
    for _, _, run in calls:
        run()
        seen.append(len(made.cuda.launches))
    assert seen == [0, 1, 2, 4, 6]
    for launch in made.cuda.launches:
        rows, padded_rows = launch["values"][7:9]
        assert (launch["blocks"], launch["stream"], rows, padded_rows) == (1, 0, 0, 0)
    found = [launch.get("attributes") for launch in made.cuda.launches]
    assert found == [None, [], [], [(6, 1)], [], [(6, 1)]]
    made.cuda.status = 700
    for _, _, run in calls[1:]:
        with pytest.raises(LibraryError, match="returned 700"):
            run()


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
    made = overhead_calls.torch_calls(settings.m, settings.n, settings.k, 0)
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
        settings, result := new_record("overhead"), "torch._cslt_sparse_mm", "torch", "bf16",
        made[-1][2], lambda: None, seen.append,
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
    overhead_calls.drop_last(weight, Pattern.parse("6:8"))
    assert weight[0].tolist() == [1] * 6 + [0] * 2 + [1] * 6 + [0] * 2 + [1] * 4
