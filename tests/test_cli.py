"""The command line: the way in, every way to hold it wrong, and the demo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from cli_helpers import (
    Terminal,
    in_process,
    leftovers,
    make_checkpoint,
)

import slidesparse_rt
from slidesparse_rt.cli import main
from slidesparse_rt.cli import prune as prune_module


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "in.safetensors")


@pytest.fixture
def run(capsys):
    return in_process(capsys)


# ------------------------------------------------------------------------------- the way in


def test_version(run):
    code, out, err = run("--version")
    assert (code, err) == (0, "")
    assert out == f"slidesparse {slidesparse_rt.__version__}\n"


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"]])
def test_help_lists_the_commands(run, arguments):
    code, out, err = run(*arguments)
    assert (code, err) == (0, "")
    for command in ("doctor", "demo", "prune", "inspect"):
        assert command in out


@pytest.mark.parametrize("command", ["doctor", "demo", "prune", "inspect"])
def test_every_command_has_help(run, command):
    code, out, _ = run(command, "--help")
    assert code == 0
    assert "--json" in out


def test_help_states_the_defaults(run, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    _, out, _ = run("prune", "--help")
    for default in (*prune_module.DEFAULT_INCLUDE, *prune_module.DEFAULT_EXCLUDE, "magnitude"):
        assert default in out


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["prune", "--help"], ["prune"]])
def test_help_imports_nothing_heavy(arguments):
    program = (
        "import sys\n"
        "from slidesparse_rt.cli import main\n"
        f"code = main({arguments!r})\n"
        "print('|'.join(sorted(sys.modules)), file=sys.stderr)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=True
    )
    modules = set(done.stderr.splitlines()[-1].split("|"))
    assert "typer" in modules
    heavy = {"numpy", "numba", "ml_dtypes", "safetensors", "torch", "jax", "cupy", "cuda"}
    assert not modules & heavy


def test_the_process_s_own_arguments(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["slidesparse", "--version"])
    assert main() == 0
    assert slidesparse_rt.__version__ in capsys.readouterr().out


# ----------------------------------------------------------------------------- wrong usage

WRONG_USAGE = [
    (["prun"], "No such command 'prun'"),
    (["prune"], "Missing argument"),
    (["prune", "{in}"], "Missing argument 'OUT'"),
    (["prune", "{in}", "{out}"], "Missing option '--pattern'"),
    (["prune", "nope.safetensors", "{out}", "--pattern", "6:8"], "does not exist"),
    (["prune", "{folder}", "{out}", "--pattern", "6:8"], "is a directory"),
    (["prune", "{in}", "{folder}", "--pattern", "6:8"], "is a directory"),
    (["prune", "{in}", "{out}", "--patern", "6:8"], "No such option"),
    (["prune", "{in}", "{out}", "--pattern", "6:8", "--threads", "0"], "'--threads'"),
    (["prune", "{in}", "{out}", "--pattern", "6:8", "--threads", "x"], "'--threads'"),
    (["prune", "{in}", "{out}", "--pattern", "6:8", "--norms", "nope"], "does not exist"),
    (["inspect"], "Missing argument 'FILE'"),
    (["inspect", "nope.safetensors"], "does not exist"),
    (["inspect", "{in}", "{in}"], "unexpected extra argument"),
    (["inspect", "{in}", "--threads", "1025"], "'--threads'"),
    (["demo", "--patterns", ","], "the list is empty"),
    (["demo", "--dtypes", ""], "the list is empty"),
    (["doctor", "now"], "unexpected extra argument"),
]

ERRORS = [
    (["prune", "{in}", "{out}", "--pattern", "2:8"], "PatternError", "type '6:8'"),
    (["prune", "{in}", "{out}", "--pattern", ""], "PatternError", "the pattern is empty"),
    (["prune", "{in}", "{in}", "--pattern", "6:8"], "OptionError", "are the same file"),
    (["prune", "{in}", "{in}", "--pattern", "6:8", "--force"], "OptionError", "the same file"),
    (["prune", "{in}", "{foreign}", "--pattern", "6:8"], "OptionError", "--force to replace"),
    (["prune", "{in}", "{folder}/no/x", "--pattern", "6:8"], "OptionError", "is no folder"),
    (
        ["prune", "{in}", "{out}", "--pattern", "6:8", "--include", "nothing*"],
        "OptionError",
        "no tensor to prune",
    ),
    (
        ["prune", "{in}", "{out}", "--pattern", "6:8", "--exclude", "*"],
        "OptionError",
        "fits --exclude *",
    ),
    (
        ["prune", "{in}", "{out}", "--pattern", "6:8", "--method", "best"],
        "OptionError",
        "allowed are magnitude, wanda",
    ),
    (
        ["prune", "{in}", "{out}", "--pattern", "6:8", "--method", "wanda"],
        "OptionError",
        "give --norms",
    ),
    (
        ["prune", "{in}", "{out}", "--pattern", "6:8", "--norms", "{in}"],
        "OptionError",
        "ignores norms",
    ),
    (
        ["prune", "{foreign}", "{out}", "--pattern", "6:8"],
        "FormatError",
        "no intact safetensors file",
    ),
    (["inspect", "{foreign}"], "FormatError", "no intact safetensors file"),
    (["inspect", "{in}", "--pattern", "6/8"], "PatternError", "type '6:8'"),
    (["inspect", "{in}", "--pattern", "6:8", "--pattern", "7:8"], "PatternError", "7:8"),
    (["demo", "--output", "{folder}/no/x"], "OptionError", "is no folder"),
    (["demo", "--patterns", "2:8"], "PatternError", "type '6:8'"),
    (["demo", "--dtypes", "fp8"], "DTypeError", "fp8_e4m3"),
    (["demo", "--dtypes", "bf16"], "OptionError", "bf16"),
]


@pytest.fixture
def fill(source, tmp_path):
    """Put the test's paths into a line of arguments."""
    foreign = tmp_path / "foreign.txt"
    foreign.write_text("this is no safetensors file, although it is long enough to be one")
    places = {
        "in": source,
        "out": tmp_path / "out.safetensors",
        "folder": tmp_path,
        "foreign": foreign,
    }
    return lambda arguments: [argument.format(**places) for argument in arguments]


@pytest.mark.parametrize(("arguments", "words"), WRONG_USAGE, ids=lambda row: " ".join(row)[:50])
def test_wrong_usage(run, fill, tmp_path, arguments, words):
    before = sorted(path.name for path in tmp_path.iterdir())
    code, out, err = run(*fill(arguments))
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert words in err
    assert "--help" in err
    code, out, err = run(*fill(arguments), "--json")
    assert (code, err) == (2, "")
    error = json.loads(out)["error"]
    assert error["type"] == "UsageError"
    assert words in error["message"]
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize(("arguments", "kind", "words"), ERRORS, ids=lambda row: " ".join(row)[:50])
def test_errors(run, fill, tmp_path, arguments, kind, words):
    arguments = fill(arguments)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    code, out, err = run(*arguments)
    assert (code, out) == (1, "")
    assert err.startswith("error: ")
    assert words in err
    code, out, err = run(*arguments, "--json")
    assert (code, err) == (1, "")
    plain = json.loads(out)
    assert list(plain) == ["error"]
    assert plain["error"]["type"] == kind
    assert words in plain["error"]["message"]
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_error_line_is_red_on_a_terminal(monkeypatch):
    screen = Terminal()
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setattr(sys, "stderr", screen)
    assert main(["inspect"]) == 2
    assert screen.getvalue().startswith("\x1b[31merror: Missing argument 'FILE'")


# ------------------------------------------------------------------------------------- demo


class Report:
    """What the demo returns."""

    def to_json(self):
        return {"rows": [1, 2]}

    def render(self, screen):
        screen.print("[bold]a table[/]")


@pytest.fixture
def fake_demo(monkeypatch):
    """Replace the demo, which takes long and has its own tests; record how it was called."""
    calls = []

    def run_demo(**arguments):
        calls.append(arguments)
        arguments["progress"]("load", 0, 3)
        arguments["progress"]("done", 3, 3)
        return Report()

    monkeypatch.setattr("slidesparse_rt.demo.run_demo", run_demo)
    return calls


def test_demo(run, fake_demo):
    code, out, err = run("demo")
    assert (code, out, err) == (0, "a table\n", "")
    (call,) = fake_demo
    assert call["patterns"] == ["2:4", "4:6", "6:8", "8:10"]
    assert call["dtypes"] == ["int8", "fp8_e4m3"]
    assert call["threads"] is None


def test_demo_options(run, fake_demo, tmp_path):
    arguments = ["--patterns", "6:8, 8:10", "--dtypes", "int8", "--threads", "2"]
    output = tmp_path / "report.json"
    output.write_text("an older one")
    code, out, err = run("demo", *arguments, "--output", output, "--commit", "abc", "--json")
    assert (code, err) == (0, "")
    assert json.loads(out) == {"rows": [1, 2]}
    written = json.loads(output.read_text())
    assert written["rows"] == [1, 2]
    assert {"package", "versions", "command"} <= set(written)
    assert written["commit"] == {"id": "abc", "dirty": None, "source": "command line"}
    (call,) = fake_demo
    assert call["patterns"] == ["6:8", "8:10"]
    assert call["dtypes"] == ["int8"]
    assert call["threads"] == 2
    assert leftovers(tmp_path) == []


@pytest.mark.usefixtures("fake_demo")
def test_demo_output_keeps_the_old_report_if_it_cannot_write(run, tmp_path, monkeypatch):
    output = tmp_path / "report.json"
    output.write_text("an older one")

    def full(self, text, encoding=None):
        self.touch()
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    code, out, err = run("demo", "--output", output)
    assert (code, out) == (1, "")
    assert err == f"error: {output}: No space left on device\n"
    assert output.read_bytes() == b"an older one"
    assert leftovers(tmp_path) == []
