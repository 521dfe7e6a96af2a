"""Conversions that are broken off and go on: killed, or out of disk; and the memory they take."""

from __future__ import annotations

import errno
import json
import os
import random as dice
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import SHARDS, content, llama, random, write_model

import slidesparse_rt as ss
from slidesparse_rt.convert import convert_checkpoint, files, run
from slidesparse_rt.convert.manifest import MANIFEST


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted run writes."""
    convert_checkpoint(model, tmp_path / "whole", pattern="6:8")
    return content(tmp_path / "whole")


def test_a_finished_conversion_is_not_done_again(
    model: Path, out: Path, whole: dict[str, bytes]
) -> None:
    convert_checkpoint(model, out, pattern="6:8")
    before = {name: (out / name).stat().st_ino for name in SHARDS}
    report = convert_checkpoint(model, out, pattern="6:8")
    assert (report.resumed, report.weights_done) == (3, 0)
    assert {name: (out / name).stat().st_ino for name in SHARDS} == before
    assert content(out) == whole


@pytest.mark.parametrize("damage", ["changed", "short", "gone"])
def test_a_damaged_shard_is_done_again(
    model: Path, out: Path, whole: dict[str, bytes], damage: str
) -> None:
    convert_checkpoint(model, out, pattern="6:8")
    path = out / SHARDS[1]
    raw = bytearray(path.read_bytes())
    raw[-1] ^= 1
    path.write_bytes(raw if damage == "changed" else raw[:-1])
    if damage == "gone":
        path.unlink()
    report = convert_checkpoint(model, out, pattern="6:8")
    assert report.resumed == 2
    assert content(out) == whole


def test_a_full_disk_is_seen_before_anything_is_written(
    model: Path, out: Path, monkeypatch: Any
) -> None:
    usage = shutil.disk_usage(model)
    monkeypatch.setattr(files.shutil, "disk_usage", lambda path: usage._replace(free=2**20))
    with pytest.raises(OSError, match=r"0\.00 GB free and 0\.00 GB are needed") as caught:
        convert_checkpoint(model, out, pattern="6:8")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(out))
    assert not out.exists()


@pytest.mark.parametrize("room", [0, 1500, 4000, 9000, 12_000])
def test_a_disk_that_fills_up(
    model: Path, out: Path, whole: dict[str, bytes], monkeypatch: Any, room: int
) -> None:
    real, left = os.write, [room]

    def write(handle: int, data: memoryview) -> int:
        if left[0] == 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        count = real(handle, data[: left[0]])
        left[0] -= count
        return count

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "write", write)
        with pytest.raises(OSError, match="No space left") as caught:
            convert_checkpoint(model, out, pattern="6:8")
    assert caught.value.errno == errno.ENOSPC
    if room > 1000:
        assert re.search(r"\d of 3 files of weights are finished and kept; free", str(caught.value))
    assert not list(out.rglob("*.part"))
    assert not (out / "config.json").exists()
    finished = [name for name in SHARDS if (out / name).exists()]
    assert all((out / name).read_bytes() == whole[name] for name in finished)
    report = convert_checkpoint(model, out, pattern="6:8")
    assert report.resumed == len(finished)
    assert content(out) == whole


def test_other_errors_of_the_system_pass(model: Path, out: Path, monkeypatch: Any) -> None:
    def broken(handle: int) -> None:
        raise OSError(errno.EIO, "broken disk")

    monkeypatch.setattr(files.os, "fsync", broken)
    with pytest.raises(OSError, match="broken disk"):
        convert_checkpoint(model, out, pattern="6:8")


def test_large_files_reach_the_disk_while_they_grow(
    model: Path, out: Path, whole: dict[str, bytes], monkeypatch: Any
) -> None:
    synced: list[int] = []
    monkeypatch.setattr(files, "_FLUSH", 512)
    monkeypatch.setattr(files.os, "fdatasync", synced.append)
    convert_checkpoint(model, out, pattern="6:8")
    assert synced
    assert content(out) == whole

    def broken(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(files.os, "fdatasync", broken)
    with pytest.raises(OSError, match="No space left"):
        convert_checkpoint(model, out.with_name("other"), pattern="6:8")


def test_a_checkpoint_that_shrinks_while_it_is_read(
    model: Path, out: Path, monkeypatch: Any
) -> None:
    real = run.write_shard

    def shrink(shard: Any, *rest: Any) -> Any:
        path = model / shard.name
        os.truncate(path, path.stat().st_size - 100)
        return real(shard, *rest)

    monkeypatch.setattr(run, "write_shard", shrink)
    with pytest.raises(ss.FormatError, match=r"ended within tensor .*; it has changed"):
        convert_checkpoint(model, out, pattern="6:8")


#: Forks: each child converts and kills itself at its n-th call of one of the functions that matter.
KILLS = """
import os, signal, sys, traceback
from pathlib import Path
from slidesparse_rt.convert import convert_checkpoint, files

model, out, first, step = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4])
convert_checkpoint(model, out / "warm", pattern="6:8", workers=1)  # compiles before forking


def run(target, kill_at):
    pid = os.fork()
    if pid == 0:
        calls = 0

        def counted(function):
            def call(*arguments, **options):
                nonlocal calls
                calls += 1
                if calls == kill_at:
                    if function is os_write:
                        os_write(arguments[0], bytes(arguments[1])[: len(arguments[1]) // 2])
                    os.kill(os.getpid(), signal.SIGKILL)
                return function(*arguments, **options)

            return call

        os_write = os.write
        files.os.write = counted(os.write)
        files.os.fsync = counted(os.fsync)
        Path.replace = counted(Path.replace)
        Path.unlink = counted(Path.unlink)
        try:
            convert_checkpoint(model, target, pattern="6:8", workers=1)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    return os.waitpid(pid, 0)[1]


kill_at = first
while True:
    target = out / f"out{kill_at}"
    status = run(target, kill_at)
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    assert not (target / "config.json").exists() or (target / "report.json").exists()
    # Killed again while it goes on, and then left alone.
    run(target, 1 + kill_at % 7)
    assert run(target, 0) == 0
    kill_at += step
print(kill_at)
"""


def test_kills_at_every_step(model: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    (tmp_path / "runs").mkdir()
    command = [sys.executable, "-W", "ignore", "-c", KILLS, str(model), str(tmp_path / "runs")]
    done = subprocess.run([*command, "1", "3"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    outs = sorted((tmp_path / "runs").iterdir())
    assert len(outs) > 20
    for out in outs:
        assert content(out) == whole, out.name


#: Converts slowly, and says what it has done.
SLOW = """
import sys, tempfile, time
from slidesparse_rt.convert import convert_checkpoint

with tempfile.TemporaryDirectory() as warm:  # loads what is compiled
    convert_checkpoint(sys.argv[1], warm, pattern="6:8")


def slowly(name, done, total):
    print(name, flush=True)
    time.sleep(0.01)


convert_checkpoint(sys.argv[1], sys.argv[2], pattern="6:8", progress=slowly)
"""


def test_kills_at_random_moments(model: Path, tmp_path: Path, whole: dict[str, bytes]) -> None:
    out = tmp_path / "out"
    inodes: dict[str, int] = {}
    kept = 0
    chance = dice.Random(6)
    for _ in range(6):
        child = subprocess.Popen(
            [sys.executable, "-c", SLOW, str(model), str(out)], stdout=subprocess.PIPE
        )
        assert child.stdout is not None
        child.stdout.readline()  # comes with the first bytes
        time.sleep(chance.uniform(0, 0.3))
        child.send_signal(signal.SIGKILL)
        child.wait()
        child.stdout.close()
        manifest = out / MANIFEST
        if not manifest.exists():
            continue
        for name in json.loads(manifest.read_text())["shards"]:
            path = out / name
            if path.exists():
                # A finished shard is never written again.
                assert inodes.setdefault(name, path.stat().st_ino) == path.stat().st_ino
                assert path.read_bytes() == whole[name]
                kept += 1
    report = convert_checkpoint(model, out, pattern="6:8")
    assert kept > 0
    assert report.resumed >= len(inodes) > 0
    assert {name: (out / name).stat().st_ino for name in inodes} == inodes
    assert content(out) == whole


def test_interrupting_leaves_no_temporary_file(model: Path, out: Path) -> None:
    def interrupt(name: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(model, out, pattern="6:8", progress=interrupt)
    assert not list(out.rglob("*.part"))
    assert not (out / "config.json").exists()


MEMORY = """
import resource, sys
from pathlib import Path
from slidesparse_rt.convert import convert_checkpoint


def peak():
    # Of this program alone: getrusage counts what the process was before it, too.
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


small, large, out = map(Path, sys.argv[1:])
convert_checkpoint(small, out / "small", pattern="6:8", workers=2)
before = peak()
convert_checkpoint(large, out / "large", pattern="6:8", workers=2)
print(peak() - before)
"""


def test_memory_does_not_grow_with_shards(tmp_path: Path) -> None:
    small = write_model(tmp_path / "small", [{"a.weight": random(8, 64)}])
    tile = random(512, 4096)
    shards = [
        {f"l.{i}.weight": np.tile(tile, (10, 1)), f"embed.{i}": np.tile(tile, (4, 1))}
        for i in range(3)
    ]
    large = write_model(tmp_path / "large", shards)
    shard = min(path.stat().st_size for path in large.glob("*.safetensors"))
    command = [sys.executable, "-c", MEMORY, str(small), str(large), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < shard, (done.stdout, shard)
