"""What the benchmarks are made of: timing, checks, result files, the command line, tables."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from types import SimpleNamespace

import bench_fakes
import numpy as np
import pytest
from bench_fakes import BF16, new_record
from cli_helpers import in_process, leftovers
from rich.console import Console

from slidesparse_rt.bench import checks, clocks, gemm_settings, overhead, record, timing
from slidesparse_rt.bench.record import WrongOutput
from slidesparse_rt.cli.bench_tables import render
from slidesparse_rt.dtypes import operand
from slidesparse_rt.errors import (
    BackendUnavailable,
    FormatError,
)
from slidesparse_rt.ffi.driver import probe

cuda = pytest.fixture(bench_fakes.make_cuda)
gpu = pytest.fixture(bench_fakes.make_gpu)
plans = pytest.fixture(bench_fakes.make_plans)
kernels = pytest.fixture(bench_fakes.make_kernels)

no_gpu = pytest.mark.skipif(bool(probe().devices), reason="there is a GPU")


# ------------------------------------------------------------------------------------------ timing


def test_burst_takes_the_median_of_interleaved_rounds(gpu, cuda):
    order = []

    def work(name, us):
        return lambda: cuda.enqueue(lambda: order.append(name), us)

    graphs = {"a": gpu.capture(work("a", 30.0)), "b": gpu.capture(work("b", 900.0))}
    assert order == []
    found = timing.burst(gpu, graphs, rounds=5)
    assert found["a"].us == pytest.approx(30.0)
    assert found["b"].us == pytest.approx(900.0)
    assert (found["a"].replays, found["b"].replays) == (7, 1)  # units of 200 us
    assert found["a"].low == pytest.approx(found["a"].high)
    last = order[-5 * 8 :]
    assert last.count("a") == 35
    assert last.count("b") == 5
    assert set(found["a"].clocks.values()) == {None}


def test_sustained_counts_the_last_half(gpu, cuda):
    class Slowing:
        """Takes 50 us at first, and 100 us once the GPU is hot."""

        def launch(self):
            cuda.enqueue(lambda: None, 50.0 if cuda.now < 30_000 else 100.0)

    us, replays, _ = timing._alone(gpu, Slowing(), 200, 300_000.0)
    assert us == pytest.approx(100.0)
    assert 1500 <= replays <= 1900
    steady = gpu.capture(lambda: cuda.enqueue(lambda: None, 70.0))
    other = gpu.capture(lambda: cuda.enqueue(lambda: None, 30_000.0))
    found = timing.sustained(gpu, {"s": other, "t": steady}, seconds=0.3, rounds=2)
    assert found["t"].us == pytest.approx(70.0)
    assert found["s"].us == pytest.approx(30_000.0)
    assert found["t"].rounds == 2
    assert found["t"].replays > 2 * 0.3e6 / 70 / 3


def test_random_data_differs_between_rows_and_buffers(gpu):
    first, second = gpu.random(40_000, "bfloat16"), gpu.random(40_000, "bfloat16")
    a, b = (gpu.read(m.pointer, BF16, 20_000).astype(np.float32) for m in (first, second))
    assert not np.array_equal(a, b)
    rows = a[:19_968].reshape(-1, 64)
    assert len({row.tobytes() for row in rows}) == len(rows)
    assert abs(a.mean()) < 0.05
    assert abs(a.std() - 1) < 0.05
    first.close()
    second.close()
    for kind, dtype in (("int32 sums", np.int32), ("float32 sums", np.float32)):
        with contextlib.closing(gpu.random(4000, kind)) as memory:
            assert gpu.read(memory.pointer, dtype, 1000).astype(float).std() > 500
    with contextlib.closing(gpu.random(100, "scales")) as memory:
        assert memory.nbytes == 112
        assert (gpu.read(memory.pointer, np.float32, 25) > 0).all()
    with pytest.raises(ValueError, match="no random data"):
        gpu.random(16, "int64")


def test_clocks_without_and_with_nvml(gpu, monkeypatch):
    monkeypatch.setitem(sys.modules, "pynvml", None)
    with clocks.Clocks("0") as seen:
        assert seen.since(0.0) == clocks.Clocks.nothing()
    assert gpu.facts()["driver"] is None

    class NVMLError(Exception):
        pass

    def no_power(handle):
        raise NVMLError

    nvml = SimpleNamespace(
        NVMLError=NVMLError,
        NVML_CLOCK_SM=1,
        NVML_TEMPERATURE_GPU=0,
        nvmlInit=lambda: None,
        nvmlDeviceGetHandleByPciBusId=lambda bus: {"0000:00:00.0": "handle"}[bus],
        nvmlSystemGetDriverVersion=lambda: b"580.1",
        nvmlDeviceGetEnforcedPowerLimit=lambda handle: 700_000,
        nvmlDeviceGetClockInfo=lambda handle, kind: 1500,
        nvmlDeviceGetPowerUsage=no_power,
        nvmlDeviceGetTemperature=lambda handle, kind: 60,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    facts = gpu.facts()
    assert (facts["driver"], facts["power_limit_w"]) == ("580.1", 700.0)
    assert facts["architecture"] == "sm_90"
    with clocks.Clocks(gpu.bus_id(), interval=0.001) as seen:
        for _ in range(1000):
            if seen.since(0.0)["sm_mhz"] is not None:
                break
            seen._stop.wait(0.005)
        assert seen.since(0.0) == {"sm_mhz": 1500.0, "power_w": None, "temperature_c": 60.0}
        # What ended before a sample was taken has the one of just now.
        nvml.nvmlDeviceGetClockInfo = lambda handle, kind: 1200
        assert seen.since(1e18) == {"sm_mhz": 1200.0, "power_w": None, "temperature_c": 60.0}


# ------------------------------------------------------------------------------------------ checks


def test_checks_pass_what_is_right_and_nothing_else():
    rng = np.random.default_rng(0)
    x = rng.standard_normal((3, 40)).astype(BF16)
    w = rng.standard_normal((5, 40)).astype(BF16)
    for dtype in ("int8", "fp8_e4m3", "bf16"):
        wanted = checks.exact(x, w, operand(dtype))
        sums = wanted.sums.astype(np.int32 if dtype == "int8" else np.float32)
        assert checks.check_sums(sums, wanted, "sums") < 1.0
        y = wanted.sums.astype(np.float32)
        if wanted.token_scales is not None:
            y = y * wanted.token_scales[:, None] * wanted.channel_scales
        assert checks.check_result(y.astype(BF16), wanted, "y") <= 1.0
        for bad in (np.nan, y[1, 2] * 1.02 + 0.01):
            spoiled = y.astype(BF16)
            spoiled[1, 2] = bad
            with pytest.raises(WrongOutput):
                checks.check_result(spoiled, wanted, "y")
        sums[0, 0] += 1
        if dtype != "bf16":
            sums[0, 0] += sums.dtype.type(0.01 * wanted.sizes[0, 0])
        with pytest.raises(WrongOutput):
            checks.check_sums(sums, wanted, "sums")
    with pytest.raises(WrongOutput, match="int32"):
        checks.check_bits(np.zeros(2, np.int32), np.zeros(2, np.int64), "kinds")
    row = np.zeros(1000, np.int32)
    row[:5] = -1
    checks.check_poison(row, "row")
    row[:20] = -1
    with pytest.raises(WrongOutput, match="20 of 1000"):
        checks.check_poison(row, "row")


def test_samples():
    assert checks.sample(3, 8) == [0, 1, 2]
    found = checks.sample(1000, 8)
    assert len(set(found)) == 8
    assert found == sorted(found)
    assert (found[0], found[-1]) == (0, 999)


# ------------------------------------------------------------------------------------------ record


def test_documents_that_are_none():
    good = new_record().document
    record.check_document(good)
    for change, words in (
        ({"schema": "other"}, "no result"),
        ({"schema_version": 3}, "schema_version is 3"),
        ({"rows": None}, "'rows'"),
        ({"what": "speed"}, "what is 'speed'"),
        ({"rows": [{"m": 1}]}, "row 0 lacks bound"),
        ({"left_out": [{"case": "a", "reason": "mood", "why": ""}]}, "'mood'"),
    ):
        with pytest.raises(FormatError, match=words):
            record.check_document(good | change)
    with pytest.raises(FormatError):
        record.check_document([])


def test_results_of_version_1_are_still_read():
    row = {
        "model": "m", "m": 1, "dtype": "int8", "pattern": "6:8", "stage": "op", "mode": "burst",
        "us": {"cusparselt": 2.0, "dense": 1.0}, "bound": 4 / 3, "checked": {},
        "ratio": 0.5, "ratio_best_8bit": None,
    }  # fmt: skip
    old = new_record().document | {"schema_version": 1, "rows": [row]}
    new = record.upgraded(old)
    record.check_document(new)
    assert new["rows"] == [row | {"ratio": {"cusparselt": 0.5}, "ratio_best_8bit": None}]
    assert record.upgraded(new) == new
    assert old["rows"] == [row]
    assert old["schema_version"] == 1
    other = new_record("quantize").document | {"schema_version": 1}
    assert record.upgraded(other) == other | {"schema_version": 2}
    for wrong in (old | {"schema_version": 3}, old | {"rows": None}, {"schema_version": 1}):
        with pytest.raises(FormatError):
            record.upgraded(wrong)


def test_files_are_whole_or_not_there(tmp_path, monkeypatch):
    path = tmp_path / "r.json"
    record.write_json(path, {"a": 1})
    assert json.loads(path.read_text()) == {"a": 1}
    with pytest.raises(ValueError, match="JSON"):
        record.write_json(path, {"a": float("nan")})
    with pytest.raises(OSError, match=str(path)):
        monkeypatch.setattr(
            record.Path, "write_text", lambda *_, **__: (_ for _ in ()).throw(OSError(28, "full"))
        )
        record.write_json(path, {"a": 2})
    assert json.loads(path.read_text()) == {"a": 1}
    assert leftovers(tmp_path) == []


def test_environment(tmp_path, gpu):
    found = record.environment({"name": "x"})
    assert found["gpu"] == {"name": "x"}
    assert found["versions"]["numpy"] == np.__version__
    assert found["versions"]["cupy"] == "14.0.0"
    assert found["versions"]["cuda_runtime"] == "12.8"
    assert len(found["sources_sha256"]) == 64
    assert record.environment(None, commit="abc")["commit"] == {
        "id": "abc",
        "dirty": None,
        "source": "command line",
    }
    assert record.commit_of(tmp_path) is None
    repository = tmp_path / "repository"
    repository.mkdir()

    def git(*arguments):
        subprocess.run(["git", "-C", str(repository), *arguments], check=True, capture_output=True)

    git("init")
    (repository / "a").write_text("1")
    git("add", "a")
    git("-c", "user.name=a", "-c", "user.email=a@b", "commit", "-m", "a")
    commit = record.commit_of(repository)
    assert len(commit["id"]) == 40
    assert commit["dirty"] is False
    (repository / "benchmarks" / "results").mkdir(parents=True)
    (repository / "benchmarks" / "results" / "r.json").write_text("{}")
    assert record.commit_of(repository)["dirty"] is False
    (repository / "b").write_text("2")
    assert record.commit_of(repository)["dirty"] is True
    assert record.commit_of(repository / "benchmarks") is None


def test_default_names(tmp_path):
    first = record.default_path("gemm", "NVIDIA H100 80GB HBM3", folder=tmp_path)
    assert first.name.startswith("gemm-h100-80gb-hbm3-20")
    first.write_text("{}")
    second = record.default_path("gemm", "NVIDIA H100 80GB HBM3", folder=tmp_path)
    assert second.stem == f"{first.stem}-2"
    root = record.checkout()
    assert root is not None
    assert record.default_path("gemm", "x").parent == root / "benchmarks" / "results"


def test_command_lines():
    line = record.command_line
    assert line(["/opt/x/bin/slidesparse", "bench", "gemm"]) == "slidesparse bench gemm"
    assert line(["-c", "bench", "a b"]) == "slidesparse bench 'a b'"
    assert line(["/x/benchmarks/overhead.py", "--json"]) == "python benchmarks/overhead.py --json"
    assert line(["/x/run.py"]) == "python run.py"


# --------------------------------------------------------------------------------- the command line


@pytest.fixture
def run(capsys):
    return in_process(capsys)


@no_gpu
@pytest.mark.parametrize("what", ["gemm", "quantize", "overhead"])
def test_without_a_gpu(run, what, tmp_path):
    output = tmp_path / "r.json"
    code, out, err = run("bench", what, "--quick", "--output", output)
    assert code == 1
    assert out == ""
    assert err.startswith("error: the CUDA driver was not found")
    code, out, err = run("bench", what, "--json", "--output", output)
    assert code == 1
    assert err == ""
    error = json.loads(out)["error"]
    assert error["type"] == "BackendUnavailable"
    assert "driver" in error["message"]
    assert not output.exists()


def test_refusal_has_the_words_of_the_backends(monkeypatch):
    monkeypatch.setattr(timing, "gpu_refusal", lambda libraries, device: f"{libraries} {device}")
    with pytest.raises(BackendUnavailable, match="'nvrtc',\\) cuda:2"):
        timing.require_gpu(("nvrtc",), 2)
    monkeypatch.setattr(timing, "gpu_refusal", lambda libraries, device: "")
    timing.require_gpu(("nvrtc",))


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (("gemm", "--tokens", "16,x"), 2, "'x' is no whole number"),
        (("quantize", "--tokens", "0"), 2, "or 'full'"),
        (("gemm", "--patterns", ","), 2, "the list is empty"),
        (("gemm", "--patterns", "3:7"), 1, "pattern '3:7'"),
        (("gemm", "--models", "x"), 1, "model 'x' is unknown"),
        (("gemm", "--backend", "x"), 1, "backends is ['x']; allowed are one or more of hopper"),
        (("gemm", "--stages", "x"), 1, "stages is ['x']; allowed are one or more of gemm, op"),
        (("quantize", "--x-types", "int8"), 1, "int8 is not supported"),
        (("overhead", "--tokens", "33"), 1, "multiples of 32"),
        (("gemm", "--output", "no/such/folder/r.json"), 1, "is no folder"),
    ],
)
def test_wrong_options(run, arguments, code, words):
    found, _, err = run("bench", *arguments)
    assert found == code
    assert words in err


def test_help(run):
    code, out, _ = run("bench")
    assert code == 0
    assert "quantize" in out
    assert run("bench", "gemm", "--help")[0] == 0


def test_commands_from_end_to_end(run, gpu, plans, kernels, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "require_gpu", lambda libraries, index: None)
    monkeypatch.setattr(timing, "Gpu", lambda index: gpu)
    refused = set()

    def choose(name, problem, device):
        if name in refused:
            raise BackendUnavailable(f"no {name} here")

    monkeypatch.setattr(gemm_settings, "choose", choose)
    path = tmp_path / "gemm.json"
    options = ("--models", "tiny", "--tokens", "16", "--rounds", "2", "--output", path)
    code, out, err = run("bench", "gemm", "--quick", *options)
    assert code == 0, err
    assert "2 cases of hopper, cusparselt, dense: about 0." in err
    assert (
        "tiny 6:8 int8 M=16: gemm burst: hopper 10000.0 us, cusparselt 20000.0 us, dense "
        "30000.0 us, ratio 3.000, 1.500 (at most 1.333)"
    ) in err
    assert "NVIDIA Test 80GB" in out
    assert "1.500" in out
    assert f"written to {path}" in out
    document = json.loads(path.read_text())
    record.check_document(document)
    assert document["settings"]["layers"] == ["qkv", "o"]
    assert document["versions"]["cupy"] == "14.0.0"
    code, out, _ = run("bench", "gemm", "--quick", *options, "--json", "--commit", "abc")
    assert code == 0
    assert json.loads(out)["commit"]["id"] == "abc"

    refused.add("hopper")
    few = ("--stages", "op", "--no-layers", "--sustained", "--seconds", "0.1")
    code, out, err = run("bench", "gemm", "--quick", *options, *few, "--time-budget", "0.1")
    assert code == 0, err
    assert "of which the time budget allows 0.0" in err
    code, out, err = run(
        "bench", "gemm", "--quick", *options, *few, "--sustained-rounds", "1", "--json"
    )
    assert code == 0, err
    document = json.loads(out)
    assert document["settings"]["backends"] == ["cusparselt"]
    assert document["settings"]["sustained_rounds"] == 1
    assert document["left_out"] == [
        {"case": "hopper", "reason": "unavailable", "why": "no hopper here"}
    ]
    assert {row["stage"] for row in document["rows"]} == {"op"}
    assert not any("layer_us" in row for row in document["rows"])
    assert {row["mode"] for row in document["rows"]} == {"burst", "sustained"}
    code, out, err = run("bench", "gemm", "--quick", *options, "--backend", "hopper")
    assert (code, err) == (1, "error: no hopper here\n")
    refused.clear()
    code, out, err = run("bench", "gemm", "--quick", *options, "--backend", "cusparselt")
    assert code == 0, err
    assert set(json.loads(path.read_text())["rows"][0]["us"]) == {"cusparselt", "dense"}

    plans.spoil = staticmethod(lambda backend, values: values.fill(0))
    code, out, _ = run("bench", "gemm", "--quick", *options)
    assert code == 1
    assert "left out (wrong output)" in out

    path = tmp_path / "quantize.json"
    small = ("--columns", "24", "--outputs", "40", "--tokens", "5", "--output", path)
    code, out, err = run("bench", "quantize", "--quick", "--rounds", "2", *small)
    assert code == 0, err
    assert "of copy" in out
    assert json.loads(path.read_text())["complete"]


def test_overhead_from_end_to_end(run, gpu, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(timing, "require_gpu", lambda libraries, index: seen.append(libraries))
    monkeypatch.setattr(timing, "Gpu", lambda index: gpu)

    def run_overhead(gpu, settings, record, *, budget, say, done):
        assert settings.backends == ("hopper", "cusparselt", "dense")
        assert settings.batches == 10
        for backend in settings.backends:
            for dtype in settings.dtypes:
                row = {"call": "SparseGemmPlan.run out=y", "backend": backend, "dtype": dtype}
                record.add(row | {"median_us": 14.26, "minimum_us": 13.0})
                done()
        record.finish()

    monkeypatch.setattr(overhead, "run_overhead", run_overhead)
    path = tmp_path / "overhead.json"
    code, out, err = run("bench", "overhead", "--quick", "--output", path)
    assert code == 0, err
    # A backend whose library is missing is left out, and stops no other.
    assert seen == [("nvrtc",)]
    assert out.count("hopper") == 3
    assert len(json.loads(path.read_text())["rows"]) == 9


def synthetic(what):
    """A result document as a GPU would have left it."""
    gpu = {"name": "NVIDIA H100", "driver": "580.1"}
    document = new_record(what).document | {"gpu": gpu, "complete": True}
    document["commit"] = {"id": "0123456789abcdef", "dirty": True, "source": "git"}
    document["left_out"] = [
        {"case": f"case {i}", "reason": "time budget", "why": "no time left"} for i in range(5)
    ]
    return document


def shown(document, **options):
    screen = Console(file=io.StringIO(), width=200, highlight=False, markup=False)
    render(document, screen, **options)
    return screen.file.getvalue()


def test_tables():
    document = synthetic("gemm")
    common = {"model": "qwen2.5-7b", "m": 4096, "dtype": "int8", "pattern": "6:8", "bound": 4 / 3}
    common |= {"mode": "sustained", "checked": {}}
    document["rows"] = [
        common | {"stage": "gemm", "us": {"hopper": 1200.0, "cusparselt": 1402.3, "dense": 1500.0},
                  "ratio": {"hopper": 1.25, "cusparselt": 1.0697},
                  "ratio_best_8bit": {"hopper": 1.1514, "cusparselt": 0.987}},
        common | {"stage": "op", "us": {"hopper": 1300.0, "dense": 1690.0},
                  "ratio": {"hopper": 1.3}, "ratio_best_8bit": None},
    ]  # fmt: skip
    text = shown(document)
    assert "NVIDIA H100, driver 580.1" in text
    assert "commit 0123456789ab with changes" in text
    lines = [" ".join(line.split()) for line in text.splitlines() if "qwen2.5-7b" in line]
    assert lines == [
        "qwen2.5-7b 6:8 int8 hopper 4096 sustained 1.333 "
        "1200.0 1500.0 1.250 1.151 1300.0 1690.0 1.300 -",
        "qwen2.5-7b 6:8 int8 cusparselt 4096 sustained 1.333 1402.3 1500.0 1.070 0.987 - - - -",
    ]
    assert "left out (time budget): case 0, case 1, case 2 and 2 more: no time left" in text
    assert "not complete" not in text
    assert "not complete" in shown(document | {"complete": False})

    document = synthetic("quantize")
    document["rows"] = [
        {"kernel": "lift", "x": "bfloat16", "out": "bf16", "pattern": "6:8", "m": 64,
         "columns": 3584, "bytes": {"read": 458752, "written": 688128}, "us": 3.25,
         "tb_per_s": 0.3529, "copy_tb_per_s": 0.4, "of_copy": 0.8822},
    ]  # fmt: skip
    assert "88.2%" in shown(document)

    document = synthetic("overhead")
    entry = {"function": "slidesparse_rt/plan.py:1 run", "calls": 1.0, "own_us": 2, "total_us": 20}
    document["rows"] = [
        {"call": "SparseGemmPlan.run out=None", "backend": "dense", "dtype": "int8",
         "median_us": 21.26, "minimum_us": 20.0, "profile": [entry]},
        {"call": "torch.mm", "backend": "torch", "dtype": "bf16",
         "median_us": 5.0, "minimum_us": 4.0},
    ]  # fmt: skip
    assert "plan.py" not in shown(document)
    text = shown(document, profile=True)
    assert "21.3" in text
    assert "slidesparse_rt/plan.py:1 run" in text
    with pytest.raises(FormatError):
        shown({"schema": "x"})
