"""``slidesparse tune`` on stand-ins: what is measured, shown, kept, and refused."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace
from typing import Any

import pytest
from cli_helpers import Terminal, in_process
from fake_tuning import Machine

from slidesparse_rt.bench import sides, timing
from slidesparse_rt.bench.shapes import MODELS, Layer, model
from slidesparse_rt.cli import tune as command
from slidesparse_rt.errors import LibraryError
from slidesparse_rt.tuning import BUCKETS, measure, select


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return in_process(capsys)


class Weight:
    open = 0
    pointer = 1 << 20

    def __init__(self) -> None:
        Weight.open += 1

    def close(self) -> None:
        Weight.open -= 1


@pytest.fixture
def machine(gpu_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """A machine on which random weights can be made."""
    monkeypatch.setattr(timing, "require_gpu", lambda libraries, index: None)

    class Gpu(timing.Gpu):
        def __init__(self, index: int) -> None:
            self.index, self.name = index, "a stand-in"

        def active(self) -> Any:
            return contextlib.nullcontext()

        def array(self, pointer: int, shape: tuple[int, ...], kind: str) -> Any:
            assert (pointer, kind) == (Weight.pointer, "bfloat16")
            made.append(shape)
            return SimpleNamespace(shape=shape)

        def close(self) -> None:
            made.append("closed")

    made: list[Any] = []
    gpu_machine.made = made  # type: ignore[attr-defined]
    monkeypatch.setattr(timing, "Gpu", Gpu)
    monkeypatch.setattr(sides, "make_weights", lambda gpu, layers, pattern: [Weight()])
    monkeypatch.setattr(Weight, "open", 0)
    return gpu_machine


def test_a_layer_is_measured_shown_and_kept(machine: Machine, run: Any) -> None:
    code, out, err = run("tune", 8, 16)
    assert (code, err) == (0, "")
    assert "8 x 16, 6:8, int8: weight" in out
    assert "16384" in out
    rows = [line.split() for line in out.splitlines()]
    assert ["1", "dense", "51.0", "102.0", "21.5"] in rows
    assert ["128", "hopper", "178.0", "356.0", "212.0"] in rows
    folder = machine.tables.folder
    assert folder is not None
    (path,) = folder.iterdir()
    assert f"kept in {path}" in out
    assert "1 weight in" in out
    assert "on a stand-in" in out
    assert machine.made == [(8, 16), "closed"]  # type: ignore[attr-defined]
    assert Weight.open == 0
    # What is kept is not measured again, unless that is asked for.
    machine.ran()
    assert run("tune", 8, 16)[1].splitlines()[:-1] == out.splitlines()[:-1]
    assert machine.ran() == []
    assert run("tune", 8, 16, "--again")[0] == 0
    assert machine.ran()
    # What fails is refused from then on, until it is tried again.
    machine.unpackable = {"hopper": LibraryError("for once")}
    for _ in range(2):
        code, out, _ = run("tune", 8, 16, *(["--again"] if machine.unpackable else []))
        assert code == 0
        assert "refused hopper: it failed: for once" in out
        machine.unpackable = {}
    assert "refused" not in run("tune", 8, 16, "--again")[1]


def test_json(machine: Machine, run: Any) -> None:
    machine.names = ("dense", "hopper")
    code, out, _ = run(
        "tune", 8, 16, "--json", "--most-tokens", 128, "--dtype", "int8,bf16", "--no-keep-dense"
    )
    assert code == 0
    report = json.loads(out)
    first, second = report["weights"]
    assert (first["dtype"], second["dtype"]) == ("int8", "bf16")
    assert first["us"]["16"] == pytest.approx({"hopper": 66.0, "dense": 44.0})
    assert set(first["runs"].values()) == {"hopper"}
    assert first["dispatch"] == [[0, "hopper"]]
    assert first["refused"] == {"cusparselt": "it is hidden"}
    assert first["path"] != second["path"]
    assert (report["left_out"], report["unfinished"]) == ([], [])


def test_what_no_backend_runs_does_not_hide_the_rest(
    machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    able = machine.able

    def some(names: Any, problem: Any, device: Any) -> Any:
        return able([] if problem.dtype.name == "fp8_e4m3" else names, problem, device)

    monkeypatch.setattr(select, "able", some)
    code, out, err = run("tune", 8, 16, "--dtype", "fp8_e4m3,int8")
    assert (code, err) == (1, "")
    assert "8 x 16, 6:8, int8: weight" in out
    assert "8 x 16, 6:8, fp8_e4m3: not measured: no backend can run a 6:8 fp8_e4m3 weight" in out
    code, out, _ = run("tune", 8, 16, "--dtype", "fp8_e4m3,int8", "--json")
    report = json.loads(out)
    assert code == 1
    assert [row["dtype"] for row in report["weights"]] == ["int8"]
    assert list(report["failed"]) == ["8 x 16, 6:8, fp8_e4m3"]
    code, out, err = run("tune", 8, 16, "--dtype", "fp8_e4m3")
    assert (code, out) == (1, "")
    assert "no backend can run a 6:8 fp8_e4m3 weight" in err
    assert Weight.open == 0


def test_without_memory_for_many_tokens(machine: Machine, run: Any) -> None:
    machine.gpu.room = 5000 * 16 * 2
    for _ in range(2):  # the second finds no memory for anything that is missing
        code, out, _ = run("tune", 8, 16)
        assert code == 0
        assert "8 x 16, 6:8, int8: measured in part: no memory; run it again to go on" in out
    code, out, _ = run("tune", 8, 16, "--time-budget", 30)
    assert "measured in part: no memory, or the time budget is spent; run it again" in out


def test_squares_are_allowed_as_the_error_says() -> None:
    (one,) = command.wanted_layers(["square-64"], None)
    assert (one.n, one.k) == (64, 64)
    every = command.wanted_layers(["Squares"], None)
    assert every[0] == one
    assert len(every) == len({layer.n for layer in every}) > 1


def test_the_help_names_every_model(run: Any) -> None:
    code, out, _ = run("tune", "--help")
    assert code == 0
    assert f"WHAT is a model ({', '.join(MODELS)})," in " ".join(out.split())


def test_equal_shapes_of_a_model_are_measured_once(machine: Machine) -> None:
    layers = [Layer("a", 8, 16), Layer("b", 8, 16), Layer("c", 16, 16)]
    told: list[tuple[str, int, int]] = []
    report = command.run_tune(
        layers,
        ["6:8", "2:4"],
        ["int8"],
        settings=measure.MeasureOptions(most_tokens=16),
        options=command.PlanOptions(),
        progress=lambda *now: told.append(now),
    )
    assert [(row.layers, row.problem.n, row.problem.pattern.name) for row in report.rows] == [
        (("a", "b"), 8, "6:8"),
        (("c",), 16, "6:8"),
        (("a", "b"), 8, "2:4"),
        (("c",), 16, "2:4"),
    ]
    assert told[0] == ("8 x 16, 6:8, int8 M = 1", 0, 8)
    assert told[-1][1:] == (8, 8)
    assert [done for _, done, _ in told] == sorted(done for _, done, _ in told)


def test_a_bias_is_one_for_which_plans_ask(
    machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []
    real = select.tune
    monkeypatch.setattr(
        command, "tune", lambda *args, **options: seen.append(args[1]) or real(*args, **options)
    )
    run("tune", 8, 16, "--dtype", "fp8_e4m3")
    run("tune", 8, 16, "--dtype", "fp8_e4m3", "--bias")
    assert seen[0] is None
    assert seen[1].tolist() == [1.0] * 8
    assert machine.tables.folder is not None
    assert len(list(machine.tables.folder.iterdir())) == 2


def test_a_time_budget_is_shared(
    machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    for module in (measure, command):
        monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    real = measure._Bench._bucket

    def bucket(self: Any, tokens: int) -> Any:
        now[0] += 1.0
        return real(self, tokens)

    monkeypatch.setattr(measure._Bench, "_bucket", bucket)
    code, out, _ = run("tune", 8, 16, "--dtype", "int8,bf16,fp16", "--time-budget", 5, "--json")
    assert code == 0
    report = json.loads(out)
    assert [list(row["us"]) for row in report["weights"]] == [
        ["1", "32768"],
        ["1", "32768"],
        ["1", "32768"],
    ]
    assert report["unfinished"] == [f"8 x 16, 6:8, {name}" for name in ("int8", "bf16", "fp16")]
    _, out, _ = run("tune", 8, 16, "--dtype", "int8,bf16,fp16", "--time-budget", 1)
    assert "8 x 16, 6:8, bf16: not measured: the time budget is spent; run it again" in out
    assert "8 x 16, 6:8, int8: measured in part" in out
    while "measured in part" in (out := run("tune", 8, 16, "--time-budget", 3)[1]):
        pass
    assert str(BUCKETS[-1]) in out


def test_the_bar_shows_where_it_is(
    machine: Machine, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    screen = Terminal()
    monkeypatch.setattr("sys.stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    assert run("tune", 8, 16, "--most-tokens", 16)[0] == 0
    assert "buckets" in screen.getvalue()


# ------------------------------------------------------------------------------------- refused


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("what", [("qwen2.5-7b",), ("4608", "3584")])
def test_without_a_gpu_it_says_so(run: Any, what: tuple[str, ...]) -> None:
    code, out, err = run("tune", *what)
    assert (code, out) == (1, "")
    assert "error: tuning measures on a GPU, and there is none to use: the driver sees no" in err
    assert "NVRTC was not found" in err
    assert "`slidesparse doctor` shows what is missing" in err
    code, out, _ = run("tune", *what, "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "BackendUnavailable"


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        ([], 2, "Missing argument"),
        (["gpt-5"], 1, "model 'gpt-5' is unknown; allowed are 'qwen2.5-7b'"),
        (["8"], 1, "such as 'square-64'; or N K, as in `slidesparse tune 4608 3584`"),
        (["1", "2", "3"], 1, "'1 2 3' is neither a model nor N K; type for example"),
        (["qwen2.5-7b", "llama-3.2-1b"], 1, "is neither a model nor N K"),
        (["0", "16"], 1, "N K is 0 16; allowed are whole numbers from 1 on"),
        (["8", "16", "--layers", "o"], 1, "--layers picks layers of a model"),
        (["qwen2.5-7b", "--layers", "o,x"], 1, "layer 'x' is unknown; allowed are qkv, o, gate_up"),
        (["qwen2.5-7b", "--pattern", "2:8"], 1, "type '6:8'"),
        (["qwen2.5-7b", "--dtype", "int4"], 1, "'int4' is no operand format"),
        (["qwen2.5-7b", "--dtype", ","], 2, "the list is empty"),
        (["qwen2.5-7b", "--most-tokens", "100"], 1, "allowed are 1, 16, 32"),
        (["qwen2.5-7b", "--rounds", "0"], 2, "--rounds"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_that_are_refused(run: Any, arguments: list[str], code: int, says: str) -> None:
    found, out, err = run("tune", *arguments)
    assert (found, out) == (code, "")
    assert says in err


def test_layers_of_a_model() -> None:
    assert command.wanted_layers(["Qwen2.5-7B"], None) == list(model("qwen2.5-7b").layers)
    assert [layer.name for layer in command.wanted_layers(["qwen2.5-7b"], ["down", "qkv"])] == [
        "qkv",
        "down",
    ]
    assert command.wanted_layers(["8", "16"], None) == [Layer("weight", 8, 16)]
