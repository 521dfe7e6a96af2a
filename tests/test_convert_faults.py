"""Conversions that are refused, killed, or run out of disk; and how much memory they take."""

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
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import W8A8, block, content, llama, load_all, quantized, random, write_model
from test_tensorfile import entry, raw_file

import slidesparse_rt as ss
from slidesparse_rt.convert import convert_checkpoint, files, run
from slidesparse_rt.convert.manifest import MANIFEST
from slidesparse_rt.packing import write_file

SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out"


def refused(kind: type[Exception], model: Path, out: Path, *words: str, **options: Any) -> None:
    """The conversion raises ``kind`` with these words in its message, and leaves no folder."""
    there = content(out) if out.is_dir() else None
    with pytest.raises(kind) as caught:
        convert_checkpoint(model, out, **{"pattern": "6:8", **options})
    for word in words:
        assert word in str(caught.value), str(caught.value)
    assert (content(out) if out.is_dir() else None) == there


def edit(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    plain = json.loads(path.read_text())
    change(plain)
    path.write_text(json.dumps(plain))


# What is given


def test_folders_without_a_model(tmp_path: Path, out: Path) -> None:
    refused(ss.OptionError, tmp_path / "none", out, "is no folder; give one with config.json")
    refused(ss.OptionError, tmp_path, out, "has no config.json", "slidesparse prune")
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    refused(ss.OptionError, tmp_path, out, "it has pytorch_model.bin", "save_pretrained")


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize(
    ("text", "words"), [("{", "is no intact JSON"), ("[]", "holds a list; expected a JSON object")]
)
def test_damaged_json(model: Path, out: Path, name: str, text: str, words: str) -> None:
    (model / name).write_text(text)
    refused(ss.FormatError, model, out, name, words)


def test_missing_shards(model: Path, out: Path) -> None:
    (model / SHARDS[1]).unlink()
    refused(ss.FormatError, model, out, f"lacks 1 of its 3 shards: {SHARDS[1]}", "download")


def test_an_index_that_names_absent_tensors(model: Path, out: Path) -> None:
    index = model / "model.safetensors.index.json"
    edit(index, lambda plain: plain["weight_map"].update({"ghost.weight": SHARDS[0]}))
    refused(ss.FormatError, model, out, f"ghost.weight ({SHARDS[0]})", "not in their files")


def test_an_index_that_names_the_wrong_shard(model: Path, out: Path) -> None:
    index = model / "model.safetensors.index.json"
    edit(index, lambda plain: plain["weight_map"].update({"lm_head.weight": SHARDS[0]}))
    refused(ss.FormatError, model, out, f"lm_head.weight ({SHARDS[0]})")


def test_an_index_that_forgets_tensors(model: Path, out: Path) -> None:
    index = model / "model.safetensors.index.json"
    edit(index, lambda plain: plain["weight_map"].pop("lm_head.weight"))
    refused(ss.FormatError, model, out, f"lm_head.weight ({SHARDS[2]})", "does not name")


@pytest.mark.parametrize("file", ["../other.safetensors", "a/b.safetensors", 5, "model.bin"])
def test_an_index_that_leads_elsewhere(model: Path, out: Path, file: object) -> None:
    index = model / "model.safetensors.index.json"
    edit(index, lambda plain: plain["weight_map"].update({"lm_head.weight": file}))
    refused(ss.FormatError, model, out, f"is in {file!r}", "in the same folder")


def test_an_index_without_a_map(model: Path, out: Path) -> None:
    (model / "model.safetensors.index.json").write_text("{}")
    refused(ss.FormatError, model, out, "has no 'weight_map'")


def test_a_tensor_in_two_shards(model: Path, out: Path) -> None:
    write_file(model / SHARDS[1], {"lm_head.weight": random(48, 32)}, {})
    refused(ss.FormatError, model, out, "is both in", "remove the file that is left over")


def test_both_layouts(model: Path, out: Path) -> None:
    write_file(model / "model.safetensors", {"a.weight": random(4, 8)}, {})
    refused(ss.FormatError, model, out, "has both model.safetensors and an index")


def test_a_truncated_shard(model: Path, out: Path) -> None:
    path = model / SHARDS[2]
    path.write_bytes(path.read_bytes()[:-1])
    refused(ss.FormatError, model, out, SHARDS[2], "no intact safetensors file")


def test_types_that_cannot_be_converted(tmp_path: Path, out: Path) -> None:
    tensors = {"a.weight": random(4, 8, dtype=np.float64), "b.weight": random(4, 8)}
    model = write_model(tmp_path / "model", [tensors])
    refused(ss.DTypeError, model, out, "a.weight (F64)", "F32, F16, BF16, I8, F8_E4M3", "--exclude")
    convert_checkpoint(model, out, pattern="6:8", exclude=["a"])
    assert load_all(out)["a.weight"].dtype == np.float64


def test_types_that_safetensors_does_not_know(tmp_path: Path, out: Path) -> None:
    model = write_model(tmp_path / "model", [{"a.weight": random(4, 8)}])
    raw_file(model / "model.safetensors", {"a.weight": entry("Q9", [4, 8], 0, 32)}, bytes(32))
    refused(ss.FormatError, model, out, "no intact safetensors file")


def test_nothing_to_convert(tmp_path: Path, model: Path, out: Path) -> None:
    words = "fits no include (nothing)"
    refused(ss.OptionError, model, out, "no layer to convert", words, include=["nothing"])
    bare = write_model(tmp_path / "bare", [{"norm.weight": random(8)}])
    refused(ss.OptionError, bare, out, "has no linear layer")
    many = write_model(tmp_path / "many", [{f"l.{i}.weight": random(4, 8) for i in range(20)}])
    refused(ss.OptionError, many, out, "and 8 more", include=["nothing"])


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"pattern": "2:8"}, ss.PatternError, "type '6:8'"),
        ({"dtype": "int4"}, ss.DTypeError, "allowed are 'int8'"),
        ({"method": "random"}, ss.OptionError, "allowed are magnitude, wanda"),
        ({"method": "wanda"}, ss.OptionError, "slidesparse calibrate"),
        ({"norms": "x"}, ss.OptionError, "method 'magnitude' ignores them"),
        ({"workers": 0}, ss.OptionError, "threads"),
        ({"include": ["a..b"]}, ss.OptionError, "empty component"),
        ({"exclude": "lm_head"}, ss.OptionError, "allowed is a list of globs"),
    ],
)
def test_options(
    model: Path, out: Path, options: dict[str, Any], kind: type[Exception], words: str
) -> None:
    refused(kind, model, out, words, **options)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"quant_method": "gptq"}, "is quantized by 'gptq'"),
        ({"quant_method": "slidesparse", "pattern": "6:8", "dtype": "int8"}, "converted already"),
        ({**W8A8, "format": "pack-quantized"}, "format 'pack-quantized'"),
        (
            {**W8A8, "config_groups": {"g": {"weights": {"num_bits": 4}}}},
            "quantizes weights of g with {'num_bits': 4",
        ),
        (
            {**W8A8, "config_groups": {"g": {"weights": {"num_bits": 8, "strategy": "group"}}}},
            "'strategy': 'group'",
        ),
    ],
)
def test_quantizations_that_are_not_understood(
    tmp_path: Path, out: Path, config: dict[str, Any], words: str
) -> None:
    model = write_model(tmp_path / "model", [block(0)], {"quantization_config": config})
    refused(ss.OptionError, model, out, words)


def test_a_quantization_config_that_is_none(tmp_path: Path, out: Path) -> None:
    model = write_model(tmp_path / "model", [block(0)], {"quantization_config": 5})
    refused(ss.FormatError, model, out, "quantization_config is 5")


def w8a8(folder: Path, **changes: Any) -> Path:
    values, scales = quantized(random(8, 16), np.int8)
    tensors = {"a.weight": values, "a.weight_scale": scales.astype(np.float32), **changes}
    return write_model(folder, [{k: v for k, v in tensors.items() if v is not None}])


@pytest.mark.parametrize(
    ("changes", "kind", "words"),
    [
        ({"a.weight_scale": None}, ss.FormatError, "there is no a.weight_scale"),
        ({"a.weight_scale": np.ones((8, 2), np.float32)}, ss.FormatError, "allowed is F32, BF16"),
        ({"a.weight_scale": np.ones(8, np.int8)}, ss.FormatError, "is I8 of shape (8,)"),
        ({"a.weight_zero_point": np.zeros(8, np.int8)}, ss.OptionError, "asymmetric"),
        ({"a.weight_scale_inv": np.ones(8, np.float32)}, ss.OptionError, "block-wise"),
        ({"a.weight": random(8, 16)}, ss.FormatError, "a.weight is BF16, not quantized"),
    ],
)
def test_scales_that_do_not_go_with_their_weight(
    tmp_path: Path, out: Path, changes: dict[str, Any], kind: type[Exception], words: str
) -> None:
    refused(kind, w8a8(tmp_path / "model", **changes), out, words)


def test_quantized_weights_are_not_quantized_again(tmp_path: Path, out: Path) -> None:
    model = w8a8(tmp_path / "model")
    refused(ss.OptionError, model, out, "use dtype 'int8'", dtype="fp8_e4m3")


def test_quantized_layers_cannot_be_left_out(tmp_path: Path, out: Path) -> None:
    model = w8a8(tmp_path / "model", **{"b.weight": random(8, 16)})
    refused(ss.OptionError, model, out, "a is quantized (I8) but left out", exclude=["a"])


@pytest.mark.parametrize("value", [0.0, -1.0, np.nan, np.inf])
def test_scales_that_are_no_scales(tmp_path: Path, out: Path, value: float) -> None:
    scales = np.ones((8, 1), np.float32)
    scales[3] = value
    model = w8a8(tmp_path / "model", **{"a.weight_scale": scales})
    with pytest.raises(ss.NonFiniteError, match=r"'a.weight_scale' in .* at index 3"):
        convert_checkpoint(model, out, pattern="6:8")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_weights_that_are_not_finite(tmp_path: Path, out: Path, value: float) -> None:
    weight = random(600, 1024)
    weight[500, 3] = value
    model = write_model(tmp_path / "model", [{"b.weight": weight}])
    words = rf"'b.weight' in model.safetensors holds {value} at row 500, column 3; .*--exclude"
    with pytest.raises(ss.NonFiniteError, match=words):
        convert_checkpoint(model, out, pattern="6:8")
    assert not (out / "config.json").exists()
    assert not [path for path in out.iterdir() if path.name.endswith(".part")]


def test_weights_too_large_for_the_dtype(tmp_path: Path, out: Path) -> None:
    weight = random(4, 8, dtype=np.float32)
    weight[2, 5] = 1e6
    model = write_model(tmp_path / "model", [{"b.weight": weight}])
    with pytest.raises(ss.NonFiniteError, match="1e\\+06 at row 2, column 5, too large for fp16"):
        convert_checkpoint(model, out, pattern="6:8", dtype="fp16")


@pytest.mark.parametrize(
    ("tensors", "metadata", "kind", "words"),
    [
        ({}, {"fingerprint": "0" * 64}, ss.OptionError, "made from another checkpoint"),
        ({}, {}, ss.OptionError, "has no norms for 1 of 1 layers: b"),
        ({"b.weight": np.ones(7, np.float32)}, {}, ss.FormatError, "needed is F32 of shape (8,)"),
        ({"b.weight": np.ones(8)}, {}, ss.FormatError, "are F64"),
        ({"b.weight": np.float32([1] * 7 + [-1])}, {}, ss.NonFiniteError, "-1.0 at index 7"),
        ({"b.weight": np.float32([np.nan] * 8)}, {}, ss.NonFiniteError, "nan at index 0"),
    ],
)
def test_norms_that_do_not_fit(
    tmp_path: Path,
    out: Path,
    tensors: dict[str, Any],
    metadata: dict[str, str],
    kind: type[Exception],
    words: str,
) -> None:
    model = write_model(tmp_path / "model", [{"b.weight": random(4, 8)}])
    write_file(tmp_path / "norms", tensors, metadata)
    refused(kind, model, out, words, method="wanda", norms=tmp_path / "norms")


# Where it goes


def test_the_same_folder_and_folders_inside_each_other(model: Path, tmp_path: Path) -> None:
    before = content(model)
    link = tmp_path / "link"
    link.symlink_to(model)
    for out in (model, link, model / "sub" / "..", model / "out", link / "out", tmp_path):
        with pytest.raises(ss.OptionError, match=r"same folder|lies inside the other folder"):
            convert_checkpoint(model, out, pattern="6:8")
    assert content(model) == before


def test_a_file_in_the_way(model: Path, out: Path) -> None:
    out.write_text("precious")
    with pytest.raises(ss.OptionError, match="is a file; OUT_DIR is a folder"):
        convert_checkpoint(model, out, pattern="6:8")
    assert out.read_text() == "precious"


@pytest.mark.parametrize("force", [False, True])
def test_a_folder_with_other_things(model: Path, out: Path, force: bool) -> None:
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    refused(ss.OptionError, model, out, "thesis.txt", "new or empty folder", force=force)


def test_other_settings_are_refused_unless_forced(model: Path, out: Path, tmp_path: Path) -> None:
    convert_checkpoint(model, out, pattern="6:8")
    words = ("pattern '6:8' (now '4:6')", "exclude ['lm_head'", "--force")
    refused(ss.OptionError, model, out, *words, pattern="4:6", exclude=["x"])
    (out / "note.txt").write_text("mine")
    convert_checkpoint(model, out, pattern="4:6", dtype="bf16", force=True)
    convert_checkpoint(model, tmp_path / "fresh", pattern="4:6", dtype="bf16")
    assert (out / "note.txt").read_text() == "mine"
    (out / "note.txt").unlink()
    assert content(out) == content(tmp_path / "fresh")


def test_another_checkpoint_is_another_setting(model: Path, out: Path) -> None:
    convert_checkpoint(model, out, pattern="6:8")
    tensors = block(0) | {"model.embed_tokens.weight": random(48, 32, seed=7)}
    write_file(model / SHARDS[0], tensors, {"format": "pt"})
    refused(ss.OptionError, model, out, "fingerprint")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda plain: plain.update(format_version=2), "version 2; slidesparse_rt"),
        (lambda plain: plain.update(shards=[]), "is damaged"),
        (lambda plain: plain.update(outputs=["../../precious"]), "is damaged"),
        (lambda plain: plain.update(outputs=["/precious"]), "is damaged"),
        (lambda plain: plain.update(outputs=[5]), "is damaged"),
    ],
)
def test_damaged_manifests(
    model: Path, out: Path, change: Callable[[dict[str, Any]], object], words: str
) -> None:
    convert_checkpoint(model, out, pattern="6:8")
    edit(out / MANIFEST, change)
    refused(ss.FormatError, model, out, words, force=True)


def test_two_conversions_at_once(model: Path, out: Path) -> None:
    out.mkdir()
    with files.locked(out):
        refused(ss.OptionError, model, out, "is being written by another conversion")


def test_file_systems_without_locks(model: Path, out: Path, monkeypatch: Any) -> None:
    def unsupported(handle: int, how: int) -> None:
        raise OSError(errno.ENOTSUP, "not supported")

    monkeypatch.setattr(files.fcntl, "flock", unsupported)
    convert_checkpoint(model, out, pattern="6:8")

    def broken(handle: int, how: int) -> None:
        raise OSError(errno.EIO, "broken")

    monkeypatch.setattr(files.fcntl, "flock", broken)
    with pytest.raises(OSError, match="broken"):
        convert_checkpoint(model, out, pattern="6:8")


# Going on


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
