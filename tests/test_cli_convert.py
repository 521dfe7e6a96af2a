"""``slidesparse convert``, and ``inspect`` on what it writes."""

from __future__ import annotations

import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import block, llama, load_all, quantized, random, write_model
from cli_helpers import Terminal, in_process, read
from rich.console import Console

from slidesparse_rt.cli import console as console_module
from slidesparse_rt.cli.inspect_model import inspect_model
from slidesparse_rt.convert.manifest import MANIFEST
from slidesparse_rt.packing import write_file

SHARD = "model-00002-of-00003.safetensors"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Any:
    return in_process(capsys)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


@pytest.fixture
def out(run: Any, model: Path, tmp_path: Path) -> Path:
    assert run("convert", model, tmp_path / "out", "--pattern", "6:8")[0] == 0
    return tmp_path / "out"


def test_the_table(run: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    code, text, err = run("convert", model, out, "--pattern", "6:8", "--workers", "1")
    assert (code, err) == (0, "")
    words = re.sub(r"\s+", " ", text)
    assert "model.layers.*.self_attn.qkv_proj 3 24 x 32" in words
    assert "model.layers.*.mlp.up_proj 3 16 x 32" in words
    assert "6 layers (3,840 weights) to 6:8 int8 by magnitude" in words
    assert "1 left dense (an embedding): model.embed_tokens" in words
    assert "1 left dense (fits exclude 'lm_head'): lm_head" in words
    assert "1 files not copied: pytorch_model.bin" in words
    assert f"Wrote {out}, 3 files of weights, in" in words
    assert "weights/s" in words
    code, text, _ = run("convert", model, out, "--pattern", "6:8")
    assert code == 0
    assert "3 files of weights, 3 of them from an earlier run, in" in re.sub(r"\s+", " ", text)


def test_padding_clamping_and_many_left_out_are_told(run: Any, tmp_path: Path) -> None:
    values, scales = quantized(random(16, 30), np.int8)
    tensors = {
        "a.weight": values,
        "a.weight_scale": scales.astype(np.float32),
        **{f"gate.{i}.weight": random(4, 4) for i in range(4)},
    }
    model = write_model(tmp_path / "model", [tensors])
    for name in "abcd":
        (model / f"{name}.bin").write_bytes(b"")
    code, text, _ = run("convert", model, tmp_path / "out", "--pattern", "6:8")
    words = re.sub(r"\s+", " ", text)
    assert code == 0
    assert "a: K = 30 is no multiple of 8; 2 inputs of zeros are added when it is loaded" in words
    assert "values of -128 became -127" in words
    assert "gate.0, gate.1, gate.2, ..." in words
    assert "4 files not copied: a.bin, b.bin, c.bin, ..." in words


def test_layers_of_several_shapes_share_a_row(run: Any, tmp_path: Path) -> None:
    model = write_model(
        tmp_path / "model", [{"l.0.weight": random(4, 8), "l.1.weight": random(8, 8)}]
    )
    _, text, _ = run("convert", model, tmp_path / "out", "--pattern", "6:8")
    assert "l.* 2 several" in re.sub(r"\s+", " ", text)


def test_json(run: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--dtype", "fp8_e4m3", "--include", "mlp", "--exclude", "layers.0", "--json")
    code, text, _ = run("convert", model, out, "--pattern", "4:6", *options)
    assert code == 0
    plain = json.loads(text)
    assert plain["output"] == str(out)
    assert plain["settings"]["include"] == ["mlp"]
    assert [row["module"] for row in plain["layers"]] == [
        "model.layers.1.mlp.up_proj",
        "model.layers.2.mlp.up_proj",
    ]
    assert {row["module"] for row in plain["dense"]} >= {"lm_head", "model.layers.0.mlp.up_proj"}


def test_errors(run: Any, model: Path, tmp_path: Path) -> None:
    code, text, err = run("convert", model, model, "--pattern", "6:8")
    assert (code, text) == (1, "")
    assert err.startswith("error: OUT_DIR")
    code, text, _ = run("convert", model, tmp_path / "o", "--pattern", "2:8", "--json")
    assert code == 1
    assert json.loads(text)["error"]["type"] == "PatternError"
    assert run("convert", model, tmp_path / "o")[0] == 2


def test_force(run: Any, model: Path, out: Path) -> None:
    code, _, err = run("convert", model, out, "--pattern", "2:4")
    assert code == 1
    assert "replace it with --force" in err
    assert run("convert", model, out, "--pattern", "2:4", "--force")[0] == 0


def test_the_bar_shows_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Terminal()
    monkeypatch.setattr(
        console_module,
        "console",
        lambda **options: Console(file=screen, force_terminal=True, width=100),
    )
    with console_module.byte_meter() as reached:
        reached("a\x1b[31mb", 500_000, 1_000_000)
    text = screen.getvalue()
    assert "0.5/1.0 MB" in text
    assert "a\\x1b[31mb" in text


# Inspecting


def test_inspect_a_model(run: Any, out: Path) -> None:
    code, text, err = run("inspect", out, "--pattern", "2:4")
    assert (code, err) == (0, "")
    words = re.sub(r"\s+", " ", text)
    assert "a converted model, 6 layers of pattern 6:8, int8, by magnitude" in words
    assert "model.layers.*.mlp.up_proj 3 16 x 32 I8 25.0% 3 fit 0 fit" in words
    assert "2 matrices are dense: model.embed_tokens, lm_head" in words
    assert "every layer is what the config says" in words


def test_inspect_a_model_as_json(run: Any, out: Path) -> None:
    code, text, _ = run("inspect", out, "--json")
    assert code == 0
    plain = json.loads(text)
    assert (plain["pattern"], plain["dtype"], plain["problems"]) == ("6:8", "int8", [])
    tensors = load_all(out)
    assert plain["bytes"] == sum(tensor.nbytes for tensor in tensors.values())
    for row in plain["layers"]:
        assert row["patterns"]["6:8"]["fits"]
        assert row["zeros"] == (tensors[f"{row['module']}.weight"] == 0).sum()


def change(out: Path, edit: Any) -> None:
    """Write one shard again with other tensors."""
    path = out / SHARD
    tensors = read(path)
    edit(tensors)
    write_file(path, tensors, {"format": "pt"})


NAME = "model.layers.1.mlp.up_proj"


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (
            lambda tensors: tensors[f"{NAME}.weight"].fill(1),
            f"{NAME}: 64 groups do not fit 6:8",
        ),
        (
            lambda tensors: tensors[f"{NAME}.weight_scale"].fill(-1),
            f"{NAME}.weight_scale: 16 scales are not finite and positive",
        ),
        (
            lambda tensors: tensors.update(
                {f"{NAME}.weight": tensors[f"{NAME}.weight"].astype(np.float32)}
            ),
            f"{NAME}.weight is F32 of shape (16, 32); expected I8 (N, K)",
        ),
        (
            lambda tensors: tensors.update({f"{NAME}.weight_scale": np.ones((3, 1), np.float32)}),
            f"{NAME}.weight_scale is F32 of shape (3, 1); expected F32 of shape (16, 1)",
        ),
    ],
)
def test_inspect_finds_what_is_wrong(run: Any, out: Path, edit: Any, words: str) -> None:
    change(out, edit)
    code, text, _ = run("inspect", out)
    assert code == 1
    assert words in text


def drop(out: Path, name: str) -> None:
    change(out, lambda tensors: tensors.pop(name))
    index = out / "model.safetensors.index.json"
    plain = json.loads(index.read_text())
    del plain["weight_map"][name]
    index.write_text(json.dumps(plain))


def test_inspect_finds_what_is_missing(run: Any, out: Path) -> None:
    drop(out, f"{NAME}.weight_scale")
    drop(out, "model.layers.1.self_attn.qkv_proj.weight")
    (out / MANIFEST).unlink()
    code, text, _ = run("inspect", out)
    assert code == 1
    assert f"{NAME}.weight_scale is missing; expected F32" in text
    assert "model.layers.1.self_attn.qkv_proj.weight is missing" in text
    assert f"{MANIFEST} is missing" in text


def test_inspect_compares_sizes(run: Any, out: Path) -> None:
    change(out, lambda tensors: tensors.update({NAME + ".bias": tensors.pop(NAME + ".weight")}))
    code, _, err = run("inspect", out)
    assert code == 1
    assert "names 1 tensors that are not in their files" in err


def test_inspect_bf16_and_nan(run: Any, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run("convert", model, out, "--pattern", "6:8", "--dtype", "bf16")[0] == 0
    assert run("inspect", out)[0] == 0
    change(out, lambda tensors: tensors[f"{NAME}.weight"].fill(np.nan))
    code, text, _ = run("inspect", out)
    assert code == 1
    assert f"{NAME}: weight holds nan at row 0, column 0" in text


def test_inspect_other_folders(run: Any, model: Path, out: Path) -> None:
    code, _, err = run("inspect", model)
    assert code == 1
    assert "is no converted model" in err
    (out / "config.json").unlink()
    code, _, err = run("inspect", out)
    assert code == 1
    assert "is an unfinished conversion: 3 files of weights are done" in err


def test_inspect_configs_that_are_not_understood(run: Any, out: Path) -> None:
    path = out / "config.json"
    whole = json.loads(path.read_text())
    for change, words in (
        ({"version": 2}, "has quantization_config version 2"),
        ({"pattern": "2:8"}, "is not understood: pattern"),
        ({"layers": "all"}, "has no list of module names under 'layers'"),
        ({"ignore": [1]}, "has no list of module names under 'ignore'"),
        ({"method": "luck"}, "has method 'luck'"),
    ):
        part = {**whole["quantization_config"], **change}
        path.write_text(json.dumps({**whole, "quantization_config": part}))
        code, _, err = run("inspect", out)
        assert code == 1
        assert words in err


def test_inspect_one_shard(run: Any, out: Path) -> None:
    code, text, _ = run("inspect", out / SHARD, "--json")
    assert code == 0
    plain = json.loads(text)
    assert {row["name"] for row in plain["tensors"]} == {
        f"{NAME}.weight",
        "model.layers.1.self_attn.qkv_proj.weight",
    }
    assert all(row["patterns"]["6:8"]["fits"] for row in plain["tensors"])
    reasons = {row["name"]: row["reason"] for row in plain["skipped"]}
    assert reasons[f"{NAME}.weight_scale"] == "scales of a weight"


def test_a_long_list_of_dense_matrices_is_cut(tmp_path: Path, run: Any) -> None:
    tensors = {**block(0), **{f"gate.{i}.weight": random(4, 4) for i in range(6)}}
    model = write_model(tmp_path / "model", [tensors])
    assert run("convert", model, tmp_path / "out", "--pattern", "6:8")[0] == 0
    file = io.StringIO()
    inspect_model(tmp_path / "out").render(Console(file=file, width=200))
    assert "6 matrices are dense: gate.0, gate.1, gate.2, gate.3, ..." in file.getvalue()
