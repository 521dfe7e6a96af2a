"""Plans that hold a weight in several forms, on stand-ins: no GPU is needed."""

from __future__ import annotations

import threading
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from fake_gpu import Memory
from fake_tuning import PACKED, SCALES, STREAM, WEIGHT, K, Machine, N, x_of
from fake_tuning import make_plan as plan

import slidesparse_rt as ss
from slidesparse_rt import gpu_route, gpu_run
from slidesparse_rt.backends import BACKENDS, GPU_BACKENDS, Problem, _order, able
from slidesparse_rt.dtypes import operand
from slidesparse_rt.tuning import BUCKETS, select


def test_a_plan_measures_and_dispatches(gpu_machine: Machine) -> None:
    with plan(tuning="measure") as made:
        gpu_machine.ran()
        assert made.backends == ("dense", "hopper")
        assert made.backend == "dense+hopper"
        assert made.timings is not None
        assert set(made.timings) == set(BUCKETS)
        # 20 + 1.5 M against 50 + M: dense is faster at 32, not at 64, which counts from 33 on.
        for tokens in (0, 1, 31, 32, 33, 64, 1000, 1 << 15):
            assert made.run(x_of(tokens)).shape == (tokens, N)
            name = "dense" if tokens <= 32 else "hopper"
            assert made.backend_for(tokens) == name
            assert gpu_machine.ran() == ([(name, tokens)] if tokens else [])
        assert repr(made).endswith("dense+hopper)")
    # One upload for all that were measured.
    assert gpu_machine.uploads == 1
    assert gpu_machine.packs == ["hopper", "cusparselt", "dense"]


def test_only_what_runs_is_held(gpu_machine: Machine) -> None:
    with plan(tuning="measure") as made:
        held = PACKED["dense"] + PACKED["hopper"] + SCALES
        assert made.nbytes == held
        made.run(x_of(100))
        assert made.nbytes > held
        assert len(Memory.held) == 2 + 1 + 1  # forms, scales, workspace
    assert made.nbytes == 0
    assert Memory.held == set()
    made.close()


def test_without_measurements_the_rule_chooses(gpu_machine: Machine) -> None:
    with plan() as made:
        assert (made.backend, made.timings) == ("hopper", None)
        assert made.backend_for(1) == made.backend_for(10_000) == "hopper"
        text = made.explain()
        assert "backend: hopper (asked for: auto; by rule)" in text
        assert "measures it, and so does `slidesparse tune 8 16 --pattern 6:8 --dtype int8`" in text
        assert "refused other: by rule" in text
        made.run(x_of(3))
        assert gpu_machine.ran() == [("hopper", 3)]
    with plan(tuning="measure"):
        pass
    with plan(tuning="heuristic") as made:
        assert (made.backend, made.timings) == ("hopper", None)
        assert "slidesparse tune" not in made.explain()
    with plan(backend="dense") as made:
        assert (made.backend, made.timings) == ("dense", None)


@pytest.mark.parametrize(
    ("change", "command"),
    [
        ({}, "slidesparse tune 8 16 --pattern 6:8 --dtype fp8_e4m3`"),
        ({"bias": np.ones(N, np.float32)}, "--dtype fp8_e4m3 --bias`"),
        ({"bias": np.full(N, 0.1, np.float32)}, ""),
        ({"x_scale": 0.5}, ""),
        ({"options": ss.PlanOptions(workspace_limit=1 << 20)}, ""),
    ],
    ids=["plain", "bias", "rounded", "static", "limit"],
)
def test_explain_names_the_command_only_where_it_would_help(
    gpu_machine: Machine, change: dict[str, Any], command: str
) -> None:
    with plan(dtype="fp8_e4m3", **change) as made:
        text = made.explain()
    assert "tuning='measure' measures it" in text
    assert command in text
    assert ("slidesparse tune" in text) == bool(command)


def test_without_dense_its_memory_is_free(gpu_machine: Machine) -> None:
    lean = ss.PlanOptions(keep_dense=False)
    for tuning in ("measure", "cached"):
        with plan(tuning=tuning, options=lean) as made:
            assert made.backends == ("hopper",)
            assert made.nbytes == PACKED["hopper"] + SCALES
            assert (
                "refused dense: keep_dense is False; it would be up to 2.37 x as fast as what runs"
                in made.explain()
            )
    gpu_machine.names = ("dense",)
    with plan(tuning="measure", options=lean) as made:
        assert made.backends == ("dense",)
        assert "keep_dense is False, but no other backend can run" in made.explain()
    gpu_machine.names = ("dense", "hopper")
    for tuning in ("heuristic", "cached"):
        gpu_machine.names = ("dense", "hopper")
        with plan(tuning=tuning, options=lean, dtype="bf16") as made:
            assert made.backend == "hopper"
        gpu_machine.names = ("dense",)
        with plan(tuning=tuning, options=lean, dtype="bf16") as made:
            assert made.backend == "dense"
            assert "keep_dense is False, but no other backend can run" in made.explain()


def test_explain_shows_choices_times_and_memory(gpu_machine: Machine) -> None:
    gpu_machine.names = ("hopper", "dense")
    with plan(tuning="measure") as made:
        text = made.explain()
        lines = [line.split() for line in text.splitlines()]
        assert ["tokens", "runs", "hopper", "dense"] in lines
        assert ["1", "dense", "51.0", "21.5"] in lines
        assert ["16384", "hopper", "16434.0", "24596.0"] in lines
        assert "dispatch: dense from 1 tokens on, hopper from 33" in text
        assert "memory of hopper: 1,000 bytes" in text
        assert "memory of dense: 3,000 bytes" in text
        assert "memory of scales and bias: 32 bytes" in text
        assert f"memory: {made.nbytes:,} bytes held" in text
        assert f"kept in {gpu_machine.tables.folder}" in text
        assert "refused cusparselt: it is hidden" in text
        assert "by measured times of 20" in text
    assert "memory of" not in made.explain()
    assert "closed" in made.explain()
    gpu_machine.names = ("hopper", "cusparselt", "dense")
    with plan(tuning="measure", dtype="bf16") as made:
        assert "refused cusparselt: measured, and at most 0." in made.explain()


def test_each_form_is_prepared_for_its_tokens(gpu_machine: Machine) -> None:
    gpu_machine.most = {"hopper": 1 << 20, "dense": 8}
    with plan(tuning="measure") as made:
        forms = made._prepared
        gpu_machine.stepped.clear()
        gpu_machine.ahead.clear()
        made.prepare([5, 12, 2000], x_dtype="float16")
        # Kernels are compiled together, before the first step of a form is made.
        assert sorted(row[:3] for row in gpu_machine.ahead) == [
            ("dense", [4, 5, 8], "float16"),
            ("hopper", [2000], "float16"),
        ]
        assert {gpu_machine.stepped[at][0] for _, _, _, at in gpu_machine.ahead} == {
            "dense",
            "hopper",
        }
        # 12 tokens are split as dense splits them.
        assert {row[:2] for row in gpu_machine.stepped} == {
            ("dense", 5),
            ("dense", 8),
            ("dense", 4),
            ("hopper", 2000),
        }
        assert {row[2:] for row in gpu_machine.stepped} == {("float16", "float16")}
        assert 2000 in forms["hopper"].pinned
        assert 5 in forms["dense"].pinned
        assert 2000 not in forms["dense"].pinned


def test_what_does_not_compile_is_not_prepared(gpu_machine: Machine) -> None:
    with plan(tuning="measure") as made:
        gpu_machine.uncompilable = {"hopper"}
        gpu_machine.stepped.clear()
        with pytest.raises(ss.CompileError, match="hopper does not compile"):
            made.prepare([2000, 3000])
        assert gpu_machine.stepped == []
        assert not made._prepared["hopper"].pinned & {2000, 3000}
        gpu_machine.uncompilable.clear()
        made.prepare([2000, 3000])
        # The largest workspace is taken first.
        assert [row[:2] for row in gpu_machine.stepped] == [("hopper", 3000), ("hopper", 2000)]


def test_one_run_stays_with_one_form(gpu_machine: Machine) -> None:
    """The rest of a run that is split is not handed to another backend."""
    gpu_machine.most = {"hopper": 256}
    with plan(tuning="measure") as made:
        gpu_machine.ran()
        made.run(x_of(520))
        assert gpu_machine.ran() == [("hopper", 256), ("hopper", 256), ("hopper", 8)]


def test_a_tuned_plan_can_be_captured(gpu_machine: Machine) -> None:
    """Once prepared a launch allocates nothing, whichever form runs; unprepared it says so."""
    with plan(tuning="measure") as made:
        made.prepare([8, 2000], stream=SimpleNamespace(cuda_stream=STREAM))
        held = set(Memory.held)
        gpu_machine.ran()
        gpu_machine.cuda.capturing = []
        for tokens in (8, 2000):
            made.run(x_of(tokens))
        assert len(gpu_machine.cuda.capturing) == 2
        with pytest.raises(ss.CaptureError, match=r"prepare\(tokens=\[4000\]"):
            made.run(x_of(4000))
        gpu_machine.cuda.capturing = None
        assert Memory.held == held
        assert gpu_machine.ran() == []


def test_what_is_remembered_for_a_kind_of_x_holds_its_form(gpu_machine: Machine) -> None:
    """The choice is made once for each kind of x, not in every run."""
    with plan(tuning="measure") as made:
        asked: list[int] = []
        runner = made._runner
        real = runner._form

        def form(tokens: int) -> Any:
            asked.append(tokens)
            return real(tokens)

        runner._form = form
        for _ in range(5):
            for tokens in (8, 2000):
                made.run(x_of(tokens))
        assert asked == [8, 2000]
        assert isinstance(next(iter(runner._routes.values())).form, gpu_route.Form)


def test_threads_run_both_forms_at_once(gpu_machine: Machine) -> None:
    with plan(tuning="measure") as made:
        gpu_machine.ran()
        sizes = [8, 2000, 30, 64] * 5
        threads = [
            threading.Thread(target=lambda m=m: [made.run(x_of(m)) for _ in range(10)])
            for m in sizes
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        found = gpu_machine.ran()
        assert sorted(found) == sorted((made.backend_for(m), m) for m in sizes for _ in range(10))


def test_errors_give_all_memory_back(gpu_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    for broken in ({"hopper": 0, "cusparselt": 0, "dense": 0}, {}):
        gpu_machine.broken = broken
        if broken:
            with pytest.raises(ss.LibraryError, match="broke"):
                plan(tuning="measure")
    assert Memory.held == set()
    with plan(tuning="measure"):
        pass
    gpu_machine.unpackable = {
        name: ss.LibraryError(f"not any more: {name}") for name in ("dense", "cusparselt", "hopper")
    }
    with pytest.raises(ss.LibraryError, match="not any more: dense"):
        plan()
    assert Memory.held == set()
    gpu_machine.unpackable = {}

    def refuse(*arguments: Any) -> None:
        raise ss.DeviceError("no runner")

    monkeypatch.setattr(gpu_run, "GpuRunner", refuse)
    with pytest.raises(ss.DeviceError, match="no runner"):
        plan()
    assert Memory.held == set()


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({"tuning": "fast"}, "tuning 'fast' is unknown; allowed are 'cached', 'measure', 'heur"),
        ({"tuning": None}, "tuning None is unknown"),
        ({"tuning": ["cached"]}, "is unknown"),
        (
            {"tuning": "measure", "backend": "dense"},
            "but backend='dense' names one; pass backend='auto', or leave tuning= out",
        ),
        (
            {"tuning": "measure", "options": ss.PlanOptions(fuse_channel_scales=True)},
            "fuse_channel_scales exists for cusparselt alone",
        ),
        (
            {"backend": "dense", "options": ss.PlanOptions(keep_dense=False)},
            "keep_dense is False, but the backend is dense; pass backend='auto'",
        ),
    ],
)
def test_options_that_contradict_each_other(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ss.OptionError, match=says):
        ss.SparseGemmPlan(WEIGHT, "6:8", **arguments)


def test_on_the_cpu_there_is_nothing_to_measure() -> None:
    for tuning in select.TUNINGS:
        with ss.SparseGemmPlan(WEIGHT, "6:8", tuning=tuning) as made:
            assert (made.backends, made.timings) == (("reference",), None)
            assert made.backend_for(7) == "reference"
            assert "tuning" not in made.explain()
            for bad in (-1, 1.5, "x", None, True):
                with pytest.raises(ss.OptionError, match=f"tokens is {bad!r}; allowed are whole"):
                    made.backend_for(bad)  # type: ignore[arg-type]
    lean = ss.PlanOptions(keep_dense=False)
    with ss.SparseGemmPlan(WEIGHT, "6:8", options=lean) as made:
        assert "refused dense: it runs on a GPU, and the plan is on cpu" in made.explain()


@pytest.mark.usefixtures("no_gpu")
def test_the_backends_that_can_run() -> None:
    problem = Problem(N, K, ss.Pattern.parse("6:8"), operand("int8"))
    found, refused = able([*GPU_BACKENDS, "reference", "odd"], problem, ss.plan.Device("cuda"))
    assert found == {}
    assert refused["odd"] == "there is no such backend"
    assert "plan is on cuda:0" in refused["reference"]
    assert set(GPU_BACKENDS) == set(BACKENDS) - {"auto", "reference"}
    found, _ = able(["reference"], problem, ss.plan.CPU)
    assert list(found) == ["reference"]


@pytest.mark.usefixtures("no_gpu")
def test_the_rule_takes_dense_last_where_its_memory_is_to_be_saved(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from slidesparse_rt import backends

    problem = Problem(N, K, ss.Pattern.parse("6:8"), operand("int8"))
    monkeypatch.setattr(
        backends, "_able", lambda row, *rest: (row, "") if row.module != "hopper" else (None, "no")
    )
    device = ss.plan.Device("cuda")
    monkeypatch.setattr(backends, "_order", lambda *a: (["hopper", "dense", "cusparselt"], "so"))
    assert backends.choose("auto", problem, device).backend.module == "dense"  # type: ignore[attr-defined]
    lean = backends.choose("auto", problem, device, False)
    assert lean.backend.module == "cusparselt"  # type: ignore[attr-defined]
    assert lean.refused == {"hopper": "no", "dense": "keep_dense is False"}
    assert backends.choose("auto", problem, device).refused == {
        "hopper": "no",
        "cusparselt": "not tried: by rule dense goes first",
    }
    assert _order(problem, ss.plan.CPU)[0][-1] == "reference"
