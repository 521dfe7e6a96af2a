"""``bench pipeline`` and squares without a GPU: the real code over a CUDA of host memory."""

from __future__ import annotations

import json
from types import SimpleNamespace

import bench_fakes
import pytest
from bench_fakes import TINY, FakePlan, measure, new_record
from cli_helpers import in_process

from slidesparse_rt.bench import clocks, gemm, gemm_settings, pipeline, record, shapes, timing
from slidesparse_rt.bench.record import Budget
from slidesparse_rt.errors import BackendUnavailable, DeviceMemoryError, OptionError
from slidesparse_rt.options import PlanOptions

cuda = pytest.fixture(bench_fakes.make_cuda)
gpu = pytest.fixture(bench_fakes.make_gpu)
plans = pytest.fixture(bench_fakes.make_plans)


@pytest.fixture
def run(capsys):
    return in_process(capsys)


@pytest.fixture
def pipeline_plans(plans):
    plans.workspace_limit = PlanOptions().workspace_limit
    return plans


def measure_pipeline(gpu, settings):
    lines, result = [], new_record("pipeline", **settings.to_json())
    pipeline.run_pipeline(
        gpu,
        settings,
        result,
        budget=Budget(),
        clocks=clocks.Clocks("0"),
        say=lines.append,
        done=lambda: None,
    )
    return result, lines


# ------------------------------------------------------------------------------------------- shapes


def test_squares_are_measured_alone_with_as_many_tokens(gpu, plans, monkeypatch):
    monkeypatch.setattr(shapes, "_SQUARES", {f"square-{n}": shapes.Square(n) for n in (32, 64)})
    settings = gemm.GemmSettings(
        models=("squares", "tiny"), tokens=(1, 40), rounds=2, dtypes=("int8",), patterns=("6:8",)
    )
    assert settings.models == ("square-32", "square-64", "tiny")
    assert settings.cases == 4
    result, _ = measure(gpu, settings)
    assert result.document["left_out"] == []
    found = [(row["model"], row["m"], row["layers"]) for row in result.rows if row["stage"] == "op"]
    layers = ["qkv", "o", "gate_up", "down"]
    assert found == [
        ("square-32", 32, ["square"]),
        ("square-64", 64, ["square"]),
        ("tiny", 1, layers),
        ("tiny", 40, layers),
    ]
    result, _ = measure(gpu, settings, budget=Budget(0.0))
    assert [entry["case"] for entry in result.document["left_out"]] == [
        "square-32 6:8 int8 M=32",
        "square-64 6:8 int8 M=64",
        "tiny 6:8 int8 M=1",
        "tiny 6:8 int8 M=40",
    ]


def test_squares_and_models_by_name():
    names = shapes.expanded(["squares", "qwen2.5-7b", "square-64"])
    assert names[0] == "square-64"
    assert names[-2:] == ("square-16384", "qwen2.5-7b")
    assert len(names) == 10
    assert shapes.model("square-4096").layers == (shapes.Layer("square", 4096, 4096),)
    sizes = [(3840, 2560), (2560, 2560), (13824, 2560), (2560, 6912)]
    assert [(layer.n, layer.k) for layer in shapes.model("bitnet-2b").layers] == sizes
    with pytest.raises(OptionError, match=r"'squares' \(M = N = K\)"):
        shapes.model("square-65")
    with pytest.raises(OptionError, match="allowed are square"):
        gemm.GemmSettings(models=("square-64",), layers=("qkv",))
    few = gemm.GemmSettings(models=("square-64",), tokens=(65536,))
    assert gemm.estimate(few) < gemm.estimate(gemm.GemmSettings(models=("squares",)))


def test_fp16_and_mild_patterns_are_measured(gpu, plans):
    settings = gemm.GemmSettings(**TINY, dtypes=("fp16",), patterns=("14:16", "dense", "2:4"))
    result, _ = measure(gpu, settings)
    assert result.document["left_out"] == []
    assert {row["pattern"] for row in result.rows} == {"14:16", "dense", "2:4"}
    for row in result.rows:
        # All patterns take as long here; gamma says how long each should take.
        gamma = {"14:16": 1.75, "dense": 2.0, "2:4": 1.0}[row["pattern"]]
        assert row["efficiency"] == pytest.approx({"hopper": gamma, "cusparselt": gamma})


def test_the_time_of_quantizing_alone(gpu, plans, monkeypatch):
    settings = gemm.GemmSettings(**TINY, dtypes=("int8",), patterns=("6:8",))
    result, _ = measure(gpu, settings)
    for row in result.rows:
        if row["stage"] == "op":
            assert row["quantize_us"] == pytest.approx(
                dict.fromkeys(("hopper", "cusparselt", "dense"), 4 * 5.0)
            )
        else:
            assert "quantize_us" not in row
    original = bench_fakes.FakePlan.layout

    def layout(self, product, tokens):
        if self.backend == "cusparselt" and tokens == 40 and 40 in ran:
            raise DeviceMemoryError("the GPU has no room")
        return original(self, product, tokens)

    def run(self, x, *, out, stream):
        ran.add(x.shape[0])
        bench_fakes.FakePlan.run(self, x, out=out, stream=stream)

    ran: set[int] = set()
    monkeypatch.setattr(plans, "layout", layout)
    monkeypatch.setattr(plans, "run", run)
    result, _ = measure(gpu, gemm.GemmSettings(**TINY, dtypes=("int8",), patterns=("6:8",)))
    # There is no room for what is only measured to tell stages apart, and nothing else is lost.
    (row,) = [r for r in result.rows if r["stage"] == "op" and r["m"] == 40]
    assert set(row["quantize_us"]) == {"hopper", "dense"}
    assert set(row["us"]) == {"hopper", "cusparselt", "dense"}
    assert result.document["left_out"] == []


# ----------------------------------------------------------------------------------------- pipeline


def test_pipeline_puts_auto_beside_every_backend(gpu, pipeline_plans):
    settings = pipeline.PipelineSettings(
        **TINY, dtypes=("int8", "bf16"), patterns=("6:8", "2:4"), sustained=True
    )
    assert settings.sides == ("auto", "hopper", "cusparselt", "dense")
    result, lines = measure_pipeline(gpu, settings)
    record.check_document(result.document)
    assert result.document["left_out"] == []
    assert result.document["settings"]["tuning"] == "measure"
    assert result.document["settings"]["floor"] == 0.98
    assert result.document["settings"]["workspace_limit"] == 2 << 30
    assert len(result.rows) == 2 * 2 * 2 * 2
    for row in result.rows:
        assert row["stage"] == "op"
        # Below 16 tokens dense runs, and from there hopper.
        auto = {1: 17_000.0, 40: 7_000.0}[row["m"]]
        assert row["us"]["auto"] == pytest.approx(4 * auto)
        assert row["ratio"]["auto"] == pytest.approx(17_000 / auto)
        ran = {1: "dense", 40: "hopper"}[row["m"]]
        assert row["layer_how"]["auto"] == dict.fromkeys(row["layers"], ran)
        assert set(row["layer_how"]) == {"auto"}
        assert row["tuned"] == {
            "auto": dict.fromkeys(
                row["layers"], "by times measured before it, 2026-01-01T00:00:00+00:00"
            )
        }
        assert "layer_us" not in row
    dense, single = pipeline.promises(result.rows)
    # Where dense runs, it is not compared with itself.
    assert (dense.row["m"], dense.least) == (40, pytest.approx(17 / 7))
    # With one token dense runs, and hopper would be faster.
    assert (single.row["m"], single.least) == (1, pytest.approx(7 / 17))
    assert str(single).startswith("auto is at least 0.412 x as fast as the fastest single backend")
    assert str(single).endswith("promised is 0.98: BROKEN")
    assert pipeline.promises([]) == []
    assert pipeline.noise(result.rows) == (
        "auto is 1.000 to 1.000 x as fast as the backend that it ran in every layer, measured "
        "beside it (16 cases, not counted above: the same kernels at other addresses)"
    )
    assert pipeline.noise([]) == ""
    several = {"auto": {"qkv": "dense", "o": "hopper"}}
    row = {"us": {"auto": 2.0, "dense": 1.9, "hopper": 3.0}, "layer_how": several}
    dense, single = pipeline.promises([row])
    assert (dense.least, single.least) == (0.95, 0.95)
    assert pipeline.noise([row]) == ""
    assert any("auto chooses for qkv by times measured before it" in line for line in lines)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (SimpleNamespace(taken="9999-01-01T00:00:00+00:00"), "by times measured in this run"),
        (SimpleNamespace(taken=""), "by times measured before it, undated"),
        (None, "by the rule: nothing is measured"),
    ],
)
def test_pipeline_says_what_auto_went_by(gpu, pipeline_plans, table, words):
    pipeline_plans.table = table
    seen = []
    original = pipeline_plans.__init__

    def init(self, *arguments, **options):
        original(self, *arguments, **options)
        seen.append(self.tuning)

    pipeline_plans.__init__ = init
    settings = pipeline.PipelineSettings(
        **TINY, dtypes=("int8",), patterns=("6:8",), backends=("hopper",), tuning="cached"
    )
    result, _ = measure_pipeline(gpu, settings)
    assert set(seen) == {"cached", None}
    assert {how for row in result.rows for how in row["tuned"]["auto"].values()} == {words}


@pytest.mark.parametrize("backend", ["auto", "hopper", "dense"])
def test_pipeline_refuses_wrong_outputs(gpu, pipeline_plans, backend):
    def spoil(name, values):
        if name == backend:
            values[0, 0] += values.dtype.type(100)

    pipeline_plans.spoil = staticmethod(spoil)
    settings = pipeline.PipelineSettings(**TINY, dtypes=("int8",), patterns=("6:8",))
    result, _ = measure_pipeline(gpu, settings)
    assert result.failed
    assert {entry["reason"] for entry in result.document["left_out"]} == {"wrong output"}
    for row in result.rows:
        assert backend not in row["us"]
    # Without dense there is nothing to compare with; without another side there still is.
    assert len(result.rows) == (0 if backend == "dense" else 2)


def test_pipeline_goes_without_a_sparse_backend(gpu, pipeline_plans, monkeypatch):
    def choose(name, problem, device):
        if name != "dense":
            raise BackendUnavailable(f"no {name} here")

    monkeypatch.setattr(gemm_settings, "choose", choose)
    settings = pipeline.PipelineSettings(**TINY, dtypes=("int8",), patterns=("6:8",))
    backends, refused = gemm.usable_backends(settings, 0, asked=False)
    assert backends == ()
    assert set(refused) == {"hopper", "cusparselt"}
    alone = pipeline.PipelineSettings(
        **TINY, dtypes=("int8",), patterns=("6:8",), backends=backends
    )
    pipeline_plans.choice = "dense"
    result, _ = measure_pipeline(gpu, alone)
    assert {tuple(row["us"]) for row in result.rows} == {("auto", "dense")}


def test_forms_that_round_more_have_wider_bounds():
    form = SimpleNamespace
    from slidesparse_rt.bench.sides import _sums_type

    assert _sums_type([form(sums_type="int32")]) == "int32"
    several = {"dense": form(sums_type="float32"), "cusparselt": form(sums_type="bfloat16")}
    assert _sums_type([form(sums_type="float32"), several]) == "bfloat16"


def test_pipeline_settings():
    with pytest.raises(OptionError, match="allowed are 'cached', 'measure', 'heuristic'"):
        pipeline.PipelineSettings(tuning="always")
    with pytest.raises(OptionError, match="measured whole"):
        pipeline.PipelineSettings(stages=("gemm", "op"))
    with pytest.raises(OptionError, match="backends"):
        pipeline.PipelineSettings(backends=("auto",))
    measured = pipeline.PipelineSettings(tokens=(16,), dtypes=("int8",), patterns=("6:8",))
    kept = pipeline.PipelineSettings(
        tokens=(16,), dtypes=("int8",), patterns=("6:8",), tuning="cached"
    )
    # Four layers are tuned.
    assert gemm.estimate(measured) - gemm.estimate(kept) == pytest.approx(4 * 3.0)


def test_pipeline_from_end_to_end(run, gpu, pipeline_plans, tmp_path, monkeypatch):
    monkeypatch.setattr(timing, "require_gpu", lambda libraries, index: None)
    monkeypatch.setattr(timing, "Gpu", lambda index: gpu)
    monkeypatch.setattr(gemm_settings, "choose", lambda *arguments: None)
    path = tmp_path / "pipeline.json"
    options = ("--models", "tiny", "--tokens", "1,40", "--rounds", "2", "--output", path)
    code, out, err = run("bench", "pipeline", "--quick", *options, "--tuning", "cached")
    assert code == 0, err
    assert "4 cases of auto, hopper, cusparselt, dense" in err
    assert "auto is at least 2.429 x as fast as dense (tiny 6:8 int8 M=40 burst)" in out
    assert "auto is 1.000 to 1.000 x as fast as the backend that it ran in every layer" in out
    assert "promised is 0.98: kept" in out
    assert "0.412 x as fast as the fastest single backend" in out
    document = json.loads(path.read_text())
    assert document["what"] == "pipeline"
    assert document["settings"]["tuning"] == "cached"
    assert document["settings"]["layers"] == ["qkv", "o"]
    lines = [" ".join(line.split()) for line in out.splitlines() if "tiny 6:8 int8 burst" in line]
    assert not lines or lines[0].endswith("dense")
    FakePlan.cost["dense"] = 1_000.0
    try:
        code, out, err = run("bench", "pipeline", "--quick", *options)
    finally:
        FakePlan.cost["dense"] = 15_000.0
    assert code == 0, err
    assert "promised is 0.98: BROKEN" in out
    squares = ("--models", "square-64", *options[2:], "--commit", "abc")
    code, out, err = run("bench", "pipeline", "--quick", *squares)
    assert code == 0, err
    assert {row["m"] for row in json.loads(path.read_text())["rows"]} == {64}
    code, _, err = run("bench", "pipeline", "--tuning", "never", "--output", path)
    assert code == 1
    assert "tuning is 'never'" in err
