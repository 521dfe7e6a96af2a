"""Conversions that are refused: what is given does not do, or where it goes."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import (
    SHARDS,
    W8A8,
    block,
    content,
    llama,
    load_all,
    quantized,
    random,
    write_model,
)
from test_tensorfile import entry, raw_file

import slidesparse_rt as ss
from slidesparse_rt.convert import convert_checkpoint, files
from slidesparse_rt.convert.manifest import MANIFEST
from slidesparse_rt.packing import write_file


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
