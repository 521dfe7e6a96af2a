"""The command line under interrupts, closed pipes, full disks and narrow terminals."""

from __future__ import annotations

import io
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import threading
from fcntl import ioctl
from pathlib import Path

import pytest
import safetensors.numpy
from cli_helpers import (
    PROGRAM,
    Terminal,
    in_process,
    leftovers,
    make_checkpoint,
    random,
)
from rich.console import Console

from slidesparse_rt import cli
from slidesparse_rt.cli import console, main
from slidesparse_rt.cli import prune as prune_module
from slidesparse_rt.errors import SlideSparseError
from slidesparse_rt.packing import write_file


@pytest.fixture
def source(tmp_path):
    return make_checkpoint(tmp_path / "in.safetensors")


@pytest.fixture
def run(capsys):
    return in_process(capsys)


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "error: interrupted"), (signal.SIGTERM, 143, "")],
)
def test_signals_while_writing_leave_nothing(
    run, source, tmp_path, monkeypatch, number, code, words
):
    target = tmp_path / "out.safetensors"
    target.write_text("precious")
    before = signal.getsignal(signal.SIGTERM)

    def half(tensors, path, metadata=None):
        Path(path).write_bytes(b"half")
        signal.raise_signal(number)

    monkeypatch.setattr(safetensors.numpy, "save_file", half)
    # A shell that runs its jobs in the background has them ignore SIGINT, and so would this test.
    inherited = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        got, out, err = run("prune", source, target, "--pattern", "6:8", "--force")
    finally:
        signal.signal(signal.SIGINT, inherited)
    assert (got, out) == (code, "")
    assert err.startswith(words)
    assert target.read_text() == "precious"
    assert leftovers(tmp_path) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_while_a_report_is_written_leaves_nothing(tmp_path, monkeypatch):
    def interrupted(self, text, encoding=None):
        self.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        console.write_text(tmp_path / "report", "text")
    assert list(tmp_path.iterdir()) == []


def test_interrupted_as_json(run, source, tmp_path, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(prune_module, "write_file", interrupted)
    code, out, _ = run("prune", source, tmp_path / "out", "--pattern", "6:8", "--json")
    assert code == 130
    assert json.loads(out)["error"]["type"] == "Interrupted"


def test_interrupted_before_a_command_runs(capsys, monkeypatch):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr("slidesparse_rt.cli.app.app", interrupted)
    assert main(["doctor"]) == 130
    assert capsys.readouterr().err.startswith("error: interrupted")


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (OSError(28, "No space left on device", "/x/out"), 1, "/x/out: No space left on device"),
        (OSError("the disk is on fire"), 1, "the disk is on fire"),
        (PermissionError(13, "Permission denied", b"/x"), 1, "/x: Permission denied"),
        (MemoryError(), 1, "too little free memory"),
        (SlideSparseError("as said"), 1, "as said"),
    ],
)
def test_what_may_go_wrong_inside(run, source, tmp_path, monkeypatch, error, code, words):
    def failing(*arguments, **options):
        raise error

    monkeypatch.setattr(prune_module, "write_file", failing)
    arguments = ["prune", source, tmp_path / "out", "--pattern", "6:8"]
    got, out, err = run(*arguments)
    assert (got, out) == (code, "")
    assert err == f"error: {err[7:]}"
    assert words in err
    assert "Traceback" not in err
    got, out, err = run(*arguments, "--json")
    assert (got, err) == (code, "")
    assert json.loads(out)["error"]["type"] == type(error).__name__


def test_a_fault_of_ours_shows_where_it_is(run, source, tmp_path, monkeypatch):
    def failing(*arguments, **options):
        raise ZeroDivisionError("in the works")

    monkeypatch.setattr(prune_module, "write_file", failing)
    code, out, err = run("prune", source, tmp_path / "out", "--pattern", "6:8", "--json")
    assert code == 1
    assert json.loads(out)["error"]["type"] == "ZeroDivisionError"
    assert "Traceback" in err
    assert "please report it" in json.loads(out)["error"]["message"]


@pytest.mark.parametrize("options", [[], ["--json"]])
def test_a_closed_pipe_is_quiet(source, options):
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, "inspect", str(source), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(timeout=120) == 1
    assert err == b""


def test_a_closed_pipe_without_a_file_number(monkeypatch):
    """Streams that are no files, such as those of a notebook."""
    monkeypatch.setattr(sys, "stdout", io.StringIO())

    def broken(arguments, as_json):
        raise BrokenPipeError

    monkeypatch.setattr(cli, "_run", broken)
    assert main(["--version"]) == 1


def test_a_closed_pipe_lets_the_rest_go_nowhere(tmp_path, monkeypatch):
    def closed(*arguments, **options):
        sys.stdout.write("buffered")
        raise BrokenPipeError

    monkeypatch.setattr("slidesparse_rt.cli.app.app", closed)
    with (tmp_path / "stdout").open("w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        assert main(["--version"]) == 1
    assert (tmp_path / "stdout").read_text() == ""


@pytest.mark.parametrize("arguments", [["--version"], ["inspect", "--json", "{in}"], ["inspect"]])
def test_a_full_disk_behind_stdout(source, arguments):
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *(part.format(**{"in": source}) for part in arguments)],
            stdout=full,
            stderr=subprocess.PIPE,
            timeout=120,
            check=False,
        )
    err = done.stderr.decode()
    assert done.returncode == (2 if arguments == ["inspect"] else 1)
    assert err.count("error: ") == 1
    assert ("No space left on device" in err) == (arguments != ["inspect"])
    assert "Traceback" not in err


@pytest.mark.parametrize("code", [0, 1])
def test_stdout_that_cannot_be_flushed(monkeypatch, capsys, code):
    class Full(io.StringIO):
        def flush(self):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    monkeypatch.setattr(cli, "_run", lambda arguments, as_json: code)
    assert main([]) == 1
    assert capsys.readouterr().err.count("No space left on device") == 1 - code


def test_main_in_another_thread(capsys):
    codes = []
    thread = threading.Thread(target=lambda: codes.append(main(["--version"])))
    thread.start()
    thread.join()
    assert codes == [0]


def test_a_terminal_that_cannot_show_a_name(source):
    """An ASCII terminal, and a name that needs more."""
    write_file(source, {"gewöhnlich.weight": random(4, 8)}, {})
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, "inspect", str(source)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        timeout=120,
        check=True,
    )
    assert rb"gew\xf6hnlich.weight" in done.stdout


# -------------------------------------------------------------------------------- progress


def on_a_terminal(arguments, columns):
    """Run with stderr on a pseudo-terminal: (exit code, stdout, what the terminal got)."""
    ours, theirs = pty.openpty()
    ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, *arguments],
        stdout=subprocess.PIPE,
        stderr=theirs,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": str(columns)},
    )
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux: the other side is closed
            break
        if not part:
            break
        seen += part
    os.close(ours)
    out = process.stdout.read().decode()
    process.stdout.close()
    return process.wait(timeout=120), out, seen.decode()


def test_progress_on_a_terminal(source, tmp_path):
    target = tmp_path / "out.safetensors"
    arguments = ["prune", str(source), str(target), "--pattern", "6:8", "--json"]
    code, out, seen = on_a_terminal(arguments, 100)
    assert code == 0
    assert "0/4 tensors" in seen
    assert "writing out.safetensors" in seen
    assert json.loads(out)["totals"]["tensors"] == 4
    # The bar is wiped at the end: the last thing sent erases a line.
    assert seen.rstrip().endswith("\x1b[2K")


def test_what_the_bar_says(monkeypatch):
    screen = Terminal()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "100")
    with console.meter(2, 3000) as progress:
        progress.begin("first\x1b[2J")
        progress.advance(1500)
        progress.bar.refresh()
        assert r"first\x1b[2J" in screen.getvalue()
        assert "1/2 tensors, 1.5 kB/3.0 kB" in screen.getvalue()
        progress.advance(1500)
        progress.finish("writing it")
        assert "writing it" in screen.getvalue()
    with console.meter(0, 0, unit="runs") as progress:
        progress.reached("6:8 int8", 3, 8)
        progress.bar.refresh()
        assert "6:8 int8" in screen.getvalue()
        assert "3/8 runs" in screen.getvalue()
        assert "3/8 runs," not in screen.getvalue()


def test_no_progress_without_a_terminal(run, source, tmp_path):
    _, _, err = run("prune", source, tmp_path / "out", "--pattern", "6:8")
    assert err == ""


# -------------------------------------------------------------------------------- console


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "-"),
        (0, 10, "0.0%"),
        (10, 10, "100.0%"),
        (1, 10**6, "<0.1%"),
        (10**6 - 1, 10**6, ">99.9%"),
        (1, 3, "33.3%"),
    ],
)
def test_share(part, whole, text):
    assert console.share(part, whole) == text


def test_printable():
    assert console.printable("größe.weight [b]") == "größe.weight [b]"
    assert console.printable("a\x1b[2J\r\n\t\x00\u202e") == r"a\x1b[2J\r\n\t\x00\u202e"


def test_json_refuses_nan():
    with pytest.raises(ValueError, match="Out of range float"):
        console.to_json_text({"x": float("nan")})


def test_a_long_name_is_folded_not_cut():
    name = "a" * 70
    screen = Console(file=io.StringIO(), width=60, markup=False, highlight=False)
    console.show_table(screen, ("name", "size"), [(name, "1,234,567")])
    text = screen.file.getvalue()
    assert text.count("a") - "name".count("a") == 70
    assert "1,234,567" in text
    assert max(map(len, text.splitlines())) <= 60
