"""Converted folders in transformers: loading, the same tokens as plain arithmetic, refusals."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from checkpoints import load_all
from fake_quantized import fake_quantized
from transformers import AutoConfig, AutoModelForCausalLM

import slidesparse_rt as ss
import slidesparse_rt.transformers
from slidesparse_rt.convert import convert_checkpoint
from slidesparse_rt.integrations.torch_model import layers_of
from slidesparse_rt.packing import write_file
from slidesparse_rt.torch import sparsify
from slidesparse_rt.transformers import SlideSparseConfig, runtime_config

VOCABULARY, HIDDEN = 64, 32
ARCHITECTURES = ("Llama", "Qwen2", "Qwen3")


def build(name: str, *, seed: int = 0, **settings: Any) -> Any:
    """A tiny model with random weights."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
        **settings,
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def converted(folder: Path, name: str = "Llama", **settings: Any) -> Path:
    model = build(name, **settings.pop("model", {}))
    if (kind := settings.pop("kind", None)) is not None:
        model.to(kind)
    model.save_pretrained(folder / "dense")
    convert_checkpoint(folder / "dense", folder / "sparse", **{"pattern": "6:8", **settings})
    return folder / "sparse"


@pytest.fixture(autouse=True)
def _quiet() -> Any:
    transformers.utils.logging.disable_progress_bar()
    yield
    transformers.utils.logging.enable_progress_bar()


def load(folder: Path, **settings: Any) -> Any:
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, **settings)
    for key in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        assert not info[key], (key, info[key])
    return model


def plain(model: Any) -> Any:
    """The model with its sparse layers in plain torch arithmetic."""
    other = copy.deepcopy(model)
    for name, one in list(layers_of(other)):
        parent, _, leaf = name.rpartition(".")
        setattr(other.get_submodule(parent), leaf, fake_quantized(one))
    return other


PROMPT = torch.tensor([[3, 17, 42, 9, 28], [60, 1, 5, 5, 31]])


def generate(model: Any, **settings: Any) -> Any:
    return model.generate(
        PROMPT,
        attention_mask=torch.ones_like(PROMPT),
        max_new_tokens=16,
        do_sample=False,
        pad_token_id=0,
        **settings,
    )


@torch.no_grad()
def logits(model: Any) -> Any:
    return model(PROMPT).logits


@pytest.mark.parametrize("kind", [None, torch.bfloat16])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_same_tokens_as_plain_arithmetic(name: str, kind: Any, tmp_path: Path) -> None:
    model = load(converted(tmp_path, name, kind=kind))
    assert type(model).__name__ == f"{name}ForCausalLM"
    assert model.dtype == (kind or torch.float32)
    layers = dict(layers_of(model))
    assert len(layers) == 14
    assert {one.weight.dtype for one in layers.values()} == {torch.int8}
    # qkv and gate/up share a plan each; o and down have their own.
    assert len({id(one.plan()) for one in layers.values()}) == 8
    exact = plain(model)
    assert torch.equal(logits(model), logits(exact))
    found = generate(model)
    assert found.shape == (2, 21)
    assert torch.equal(found, generate(exact))
    assert len(set(found[:, 5:].flatten().tolist())) > 2  # it says something
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    assert not torch.equal(logits(dense), logits(model))


def test_the_same_as_pruning_the_loaded_model(tmp_path: Path) -> None:
    model = load(converted(tmp_path))
    other = AutoModelForCausalLM.from_pretrained(tmp_path / "dense").eval()
    report = sparsify(other, "6:8")
    assert {one.module for one in report.layers} == set(dict(layers_of(model)))
    assert torch.equal(logits(model), logits(other))


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_fused_layers_give_the_same_bits(dtype: str, tmp_path: Path) -> None:
    folder = converted(tmp_path, "Qwen2", dtype=dtype)
    fused = load(folder)
    alone = load(folder, config=runtime_config(folder, fuse=False))
    assert fused.model.layers[0].self_attn.q_proj._shared is not None
    assert all(one._shared is None for _, one in layers_of(alone))
    assert torch.equal(logits(fused), logits(alone))
    assert torch.equal(logits(fused), logits(plain(fused)))
    assert torch.equal(generate(fused), generate(alone))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_formats_without_scales(dtype: str, tmp_path: Path) -> None:
    model = load(converted(tmp_path, dtype=dtype))
    wide = load(tmp_path / "sparse").dequantize()
    assert not hasattr(wide.config, "quantization_config")
    assert isinstance(wide.model.layers[0].mlp.down_proj, torch.nn.Linear)
    # The plain model does not round activations to 16 bits.
    assert torch.allclose(logits(model), logits(wide), atol=0.05)


def test_saving_and_loading_again(tmp_path: Path) -> None:
    folder = converted(tmp_path, "Qwen3")
    model = load(folder, config=runtime_config(folder, backend="reference", fuse=False))
    model.save_pretrained(tmp_path / "again")
    first, again = load_all(folder), load_all(tmp_path / "again")
    assert set(first) == set(again)
    assert all(np.array_equal(first[name], again[name]) for name in first)
    configs = [
        json.loads((one / "config.json").read_text()) for one in (folder, tmp_path / "again")
    ]
    assert configs[0]["quantization_config"] == configs[1]["quantization_config"]
    assert torch.equal(logits(load(tmp_path / "again")), logits(model))


def test_how_a_model_runs_can_be_chosen(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    model = load(folder, config=runtime_config(folder, backend="reference", tuning="heuristic"))
    for _, one in layers_of(model):
        assert (one.backend, one.tuning) == ("reference", "heuristic")
    with pytest.raises(ss.OptionError, match="'fast'"):
        load(folder, config=runtime_config(folder, backend="fast"))
    with pytest.raises(ss.OptionError, match="fuse is 1"):
        load(folder, config=runtime_config(folder, fuse=1))  # type: ignore[arg-type]
    with pytest.raises(ss.OptionError, match="not converted"):
        runtime_config(tmp_path / "dense")


def test_layers_left_out_stay_dense(tmp_path: Path) -> None:
    folder = converted(tmp_path, exclude=["v_proj", "layers.1", "lm_head"])
    model = load(folder)
    names = {name.removeprefix("model.layers.0.") for name, _ in layers_of(model)}
    assert names == {
        *(f"self_attn.{one}_proj" for one in "qko"),
        *(f"mlp.{one}_proj" for one in ("gate", "up", "down")),
    }
    attention = model.model.layers[0].self_attn
    assert attention.q_proj._shared.layers == (attention.q_proj, attention.k_proj)
    assert torch.equal(logits(model), logits(plain(model)))


def test_tied_embeddings(tmp_path: Path) -> None:
    model = load(converted(tmp_path, "Qwen2", model={"tie_word_embeddings": True}))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert torch.equal(generate(model), generate(plain(model)))


def test_the_base_model_takes_the_same_folder(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    base = transformers.AutoModel.from_pretrained(folder)
    assert len(list(layers_of(base))) == 14
    whole = load(folder)
    with torch.no_grad():
        assert torch.equal(base(PROMPT).last_hidden_state, whole.model(PROMPT).last_hidden_state)


def test_static_activation_scales(tmp_path: Path) -> None:
    folder = converted(tmp_path)
    tensors = load_all(folder)
    scales = {}
    for layer in range(2):
        for index, name in enumerate(("q", "k", "v", "o")):
            # q and k share one, v has its own: it cannot be fused with them.
            scale = np.array([0.02 if index < 2 else 0.03], np.float32)
            scales[f"model.layers.{layer}.self_attn.{name}_proj.input_scale"] = scale
    write_file(folder / "model.safetensors", {**tensors, **scales}, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"]["activations"] = {"dynamic": False, "strategy": "tensor"}
    (folder / "config.json").write_text(json.dumps(config))
    model = load(folder)
    attention = model.model.layers[0].self_attn
    assert float(attention.v_proj.input_scale) == np.float32(0.03)
    assert attention.q_proj._shared is None
    assert model.model.layers[0].mlp.up_proj.input_scale is None
    x = torch.randn(2, HIDDEN)
    layer = attention.q_proj
    with ss.SparseGemmPlan(layer.sparse_weight(), x_scale=0.02) as plan:
        assert torch.equal(layer(x), plan.run(x))


def test_generation_compiles_in_one_graph(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = load(converted(tmp_path, "Qwen2"))
    expected = logits(model)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(PROMPT, use_cache=False).logits, expected)
    torch._dynamo.reset()


class TestRefusals:
    @staticmethod
    def rewrite(folder: Path, tensors: dict[str, Any]) -> None:
        write_file(folder / "model.safetensors", tensors, {"format": "pt"})

    def test_missing_scales(self, tmp_path: Path) -> None:
        folder = converted(tmp_path)
        tensors = load_all(folder)
        del tensors["model.layers.1.mlp.up_proj.weight_scale"]
        self.rewrite(folder, tensors)
        with pytest.raises(
            ss.FormatError, match=r"layers\.1\.mlp\.up_proj\.weight_scale is not in"
        ):
            load(folder)

    def test_values_of_another_type(self, tmp_path: Path) -> None:
        folder = converted(tmp_path)
        tensors = load_all(folder)
        name = "model.layers.0.mlp.up_proj.weight"
        tensors[name] = tensors[name].astype(np.float32)
        self.rewrite(folder, tensors)
        with pytest.raises(ss.FormatError, match=r"up_proj\.weight is F32 of shape \(44, 32\).*I8"):
            load(folder)

    def test_a_weight_that_does_not_fit(self, tmp_path: Path) -> None:
        folder = converted(tmp_path)
        tensors = load_all(folder)
        tensors["model.layers.0.mlp.up_proj.weight"][3] = 1
        self.rewrite(folder, tensors)
        with pytest.raises(ss.PatternError, match=r"^model\.layers\.0\.mlp\.up_proj: .*row 3"):
            load(folder)

    def test_a_model_without_these_layers(self, tmp_path: Path) -> None:
        folder = converted(tmp_path)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["layers"].append("model.layers.9.mlp.up_proj")
        path.write_text(json.dumps(config))
        with pytest.raises(ss.OptionError, match=r"no Linear for 1 of 15 .*layers\.9\.mlp"):
            load(folder)

    def test_another_version(self, tmp_path: Path) -> None:
        folder = converted(tmp_path)
        path = folder / "config.json"
        config = json.loads(path.read_text())
        config["quantization_config"]["version"] = 7
        path.write_text(json.dumps(config))
        with pytest.raises(ss.FormatError, match="version 7"):
            load(folder)

    def test_quantizing_while_loading(self, tmp_path: Path) -> None:
        folder = converted(tmp_path)
        config = AutoConfig.from_pretrained(folder).quantization_config
        with pytest.raises(ss.OptionError, match="slidesparse convert"):
            AutoModelForCausalLM.from_pretrained(
                tmp_path / "dense", quantization_config=SlideSparseConfig(**config)
            )

    def test_training(self, tmp_path: Path) -> None:
        model = load(converted(tmp_path))
        assert not model.hf_quantizer.is_trainable
        with pytest.raises(ss.ArrayError, match="gradient"):
            model(PROMPT)


def test_the_public_module_is_not_transformers() -> None:
    assert ss.transformers is slidesparse_rt.transformers
    assert slidesparse_rt.transformers is not transformers
