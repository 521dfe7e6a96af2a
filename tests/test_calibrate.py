"""Calibration: norms of a small Llama, built here, against running it by hand."""

from __future__ import annotations

import builtins
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoints import block, load_all, random, write_model
from cli_helpers import in_process
from strategies import same_bits

import slidesparse_rt as ss
from slidesparse_rt.convert import Checkpoint, calibrate, convert_checkpoint
from slidesparse_rt.packing import TensorFile, write_file

TEXT = "the quick brown fox jumps over the lazy dog and the dog sleeps on " * 8
LAYERS = [
    f"model.layers.{i}.{name}_proj"
    for i in range(2)
    for name in (
        *(f"self_attn.{part}" for part in "qkvo"),
        *(f"mlp.{part}" for part in ("gate", "up", "down")),
    )
]


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama with random weights and a tokenizer of words."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("model") / "tiny"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    words = {word: i for i, word in enumerate(["<unk>", *sorted(set(TEXT.split()))])}
    plain = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=plain, unk_token="<unk>").save_pretrained(folder)
    return folder


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def by_hand(folder: Path, text: str, length: int) -> dict[str, Any]:
    """Norms from inputs that are all kept, and the number of tokens."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    tokens = AutoTokenizer.from_pretrained(folder)(text)["input_ids"]
    seen: dict[str, list[Any]] = {}
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(
                lambda module, inputs, output, name=name: seen.setdefault(name, []).append(
                    inputs[0].reshape(-1, module.in_features)
                )
            )
    with torch.no_grad():
        for start in range(0, len(tokens), length):
            model(torch.tensor([tokens[start : start + length]]))
    norms = {name: torch.cat(rows).double().norm(dim=0).numpy() for name, rows in seen.items()}
    return {"norms": norms, "tokens": len(tokens)}


def test_norms_are_those_of_the_inputs(llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "norms.safetensors"
    steps: list[tuple[str, int, int]] = []
    report = calibrate(llama, [text], output, length=20, progress=lambda *step: steps.append(step))
    expected = by_hand(llama, TEXT, 20)
    assert (report.layers, report.tokens) == (len(LAYERS), expected["tokens"])
    assert report.unseen == ()
    assert steps[-1] == ("calibrating", report.sequences - 1, report.sequences)
    with TensorFile(output) as file:
        assert set(file.keys()) == {f"{name}.weight" for name in LAYERS}
        for name in LAYERS:
            found = file.read(f"{name}.weight")
            assert found.dtype == np.float32
            assert np.allclose(found, expected["norms"][name], rtol=1e-6)
        assert file.metadata["fingerprint"] == Checkpoint.open(llama).fingerprint()
        assert file.metadata["tokens"] == str(expected["tokens"])
        digest = hashlib.sha256(TEXT.encode()).hexdigest()
        assert json.loads(file.metadata["texts"]) == [{"name": "text.txt", "sha256": digest}]


def test_the_norms_convert_the_model(llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "norms.safetensors"
    calibrate(llama, [text], output)
    out = tmp_path / "out"
    convert_checkpoint(llama, out, pattern="6:8", method="wanda", norms=output)
    before, after = load_all(llama), load_all(out)
    with TensorFile(output) as file:
        for name in LAYERS:
            weight, norms = before[f"{name}.weight"], np.array(file.read(f"{name}.weight"))
            pruned = ss.prune(weight, "6:8", method="wanda", norms=norms)
            assert same_bits(after[f"{name}.weight"], ss.quantize(pruned, "int8")[0])
    assert "lm_head.weight" not in after  # tied


def test_sequences_are_limited_by_number_and_positions(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    report = calibrate(llama, [text, text], tmp_path / "norms", sequences=3, length=4096)
    assert (report.sequences, report.tokens) == (3, 3 * 32)
    assert [one["name"] for one in report.texts] == ["text.txt", "text.txt"]


def test_include_and_exclude(llama: Path, text: Path, tmp_path: Path) -> None:
    calibrate(llama, [text], tmp_path / "norms", include=["layers.0.mlp"], exclude=["up_proj"])
    with TensorFile(tmp_path / "norms") as file:
        assert set(file.keys()) == {
            "model.layers.0.mlp.gate_proj.weight",
            "model.layers.0.mlp.down_proj.weight",
        }
    with pytest.raises(ss.OptionError, match="has no norms for 12 of 14 layers"):
        convert_checkpoint(
            llama, tmp_path / "out", pattern="6:8", method="wanda", norms=tmp_path / "norms"
        )


def test_a_checkpoint_without_the_base_models_prefix(
    llama: Path, text: Path, tmp_path: Path
) -> None:
    tensors = {name.removeprefix("model."): value for name, value in load_all(llama).items()}
    bare = tmp_path / "bare"
    bare.mkdir()
    for path in llama.iterdir():
        if path.suffix == ".json":
            (bare / path.name).write_bytes(path.read_bytes())
    write_file(bare / "model.safetensors", tensors, {"format": "pt"})
    calibrate(bare, [text], tmp_path / "bare-norms")
    calibrate(llama, [text], tmp_path / "norms")
    with TensorFile(tmp_path / "bare-norms") as a, TensorFile(tmp_path / "norms") as b:
        name = "layers.1.mlp.down_proj.weight"
        assert same_bits(a.read(name), b.read(f"model.{name}"))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sequences": 0}, "sequences is 0; allowed is a whole number from 1"),
        ({"length": True}, "length is True"),
        ({"texts": []}, "give a list of at least one file"),
        ({"texts": "text.txt"}, "give a list of at least one file"),
        ({"device": "warp:9"}, "PyTorch cannot use device 'warp:9'"),
        ({"include": ["nothing"]}, "no layer to convert"),
        ({"output": "nowhere/norms"}, "is no folder; make it first"),
    ],
)
def test_options(llama: Path, text: Path, tmp_path: Path, options: Any, words: str) -> None:
    given = {"texts": [text], "output": tmp_path / "norms", **options}
    with pytest.raises(ss.OptionError, match=words):
        calibrate(llama, given.pop("texts"), given.pop("output"), **given)
    assert not (tmp_path / "norms").exists()


def test_outputs_are_not_replaced_unless_forced(llama: Path, text: Path, tmp_path: Path) -> None:
    output = tmp_path / "norms"
    output.write_text("precious")
    with pytest.raises(ss.OptionError, match="exists; give another output, or --force"):
        calibrate(llama, [text], output)
    assert output.read_text() == "precious"
    calibrate(llama, [text], output, force=True)
    TensorFile(output).close()


def test_texts_that_are_none(llama: Path, tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"\xff\xfe")
    with pytest.raises(ss.OptionError, match="is no UTF-8 text"):
        calibrate(llama, [tmp_path / "a"], tmp_path / "norms")
    (tmp_path / "a").write_bytes(b"")
    with pytest.raises(ss.OptionError, match="the texts hold no token"):
        calibrate(llama, [tmp_path / "a"], tmp_path / "norms")


def test_models_that_transformers_cannot_load(text: Path, tmp_path: Path) -> None:
    model = write_model(tmp_path / "model", [block(0)], {"model_type": "unheard of"})
    with pytest.raises(ss.OptionError, match=r"transformers cannot load .* with its tokenizer"):
        calibrate(model, [text], tmp_path / "norms")


def test_weights_that_the_checkpoint_lacks(llama: Path, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_all(llama)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    write_file(copy / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ss.OptionError, match=r"lacks 1 weights .*layers\.1\.mlp\.up_proj"):
        calibrate(copy, [text], tmp_path / "norms")


def test_layers_that_the_model_lacks(llama: Path, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_all(llama) | {"model.extra.weight": random(8, 8, dtype=np.float32)}
    write_file(copy / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ss.OptionError, match="LlamaForCausalLM has no module for 1 of 15 layers"):
        calibrate(copy, [text], tmp_path / "norms")


def test_activations_that_are_not_finite(llama: Path, text: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    for path in llama.iterdir():
        (copy / path.name).write_bytes(path.read_bytes())
    tensors = load_all(llama)
    tensors["model.layers.0.input_layernorm.weight"] = np.full(24, np.inf, np.float32)
    write_file(copy / "model.safetensors", tensors, {"format": "pt"})
    with pytest.raises(ss.NonFiniteError, match=r"inputs of model\.layers\.\d\.\S+ hold a NaN"):
        calibrate(copy, [text], tmp_path / "norms")
    assert not (tmp_path / "norms").exists()


def test_without_transformers(
    llama: Path, text: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def missing(name: str, *rest: Any, **more: Any) -> Any:
        if name == "transformers":
            raise ModuleNotFoundError("No module named 'transformers'", name="transformers")
        return real(name, *rest, **more)

    monkeypatch.delitem(sys.modules, "transformers")
    monkeypatch.setattr(builtins, "__import__", missing)
    words = r"transformers is not installed: pip install 'slidesparse-rt\[convert\]'"
    with pytest.raises(ss.BackendUnavailable, match=words):
        calibrate(llama, [text], tmp_path / "norms")


def test_the_command(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = in_process(capsys)
    model = tmp_path / "tiny"
    model.symlink_to(llama)
    norms = llama.with_name("tiny-norms.safetensors")  # beside the folder itself
    code, out, err = run("calibrate", model, "--text", text, "--sequences", "2")
    assert (code, err) == (0, "")
    assert f"Wrote {norms}: norms of the inputs of 14 layers over 64 tokens in 2 sequences" in out
    code, out, err = run(
        "convert", model, tmp_path / "out", "--pattern", "6:8", "--method", "wanda",
        "--norms", norms,
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert "to 6:8 int8 by wanda" in out
    norms.unlink()
    code, out, _ = run("calibrate", model, "--text", text, "--json", "--sequences", "1")
    assert code == 0
    assert json.loads(out)["tokens"] == 32
    norms.unlink()


def test_experts_that_no_token_reaches_are_named(
    llama: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from slidesparse_rt.cli.console import console
    from slidesparse_rt.cli.convert import _render_norms
    from slidesparse_rt.convert import CalibrationReport

    report = CalibrationReport(
        output=tmp_path / "norms",
        layers=4,
        tokens=5,
        sequences=1,
        texts=(),
        unseen=tuple(f"experts.{i}" for i in range(4)),
        seconds=1.0,
    )
    _render_norms(report, console())
    assert "4 layers saw no token" in capsys.readouterr().out
