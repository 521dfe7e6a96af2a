"""Small checkpoints as Hugging Face stores them, for the tests of conversion."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from strategies import Array

from slidesparse_rt.packing import TensorFile, write_file

BF16 = ml_dtypes.bfloat16
E4M3 = ml_dtypes.float8_e4m3fn
W8A8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "symmetric": True, "strategy": "channel", "type": "int"},
            "input_activations": {"num_bits": 8, "dynamic": True, "strategy": "token"},
        }
    },
}


def random(*shape: int, dtype: Any = BF16, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def write_model(
    folder: Path,
    shards: Sequence[Mapping[str, Array]],
    config: Mapping[str, Any] | None = None,
    **files: str,
) -> Path:
    """A model of one file, or of shards and an index; other ``files`` have ``__`` for a dot."""
    folder.mkdir(parents=True)
    plain = {"model_type": "llama", "vocab_size": 48, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps({**plain, **(config or {})}))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    if len(shards) == 1:
        write_file(folder / "model.safetensors", shards[0], {"format": "pt"})
        return folder
    weight_map = {}
    for number, tensors in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        write_file(folder / name, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {"total_size": 1, "note": "kept"}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def block(number: int, k: int = 32, dtype: Any = BF16) -> dict[str, Array]:
    """The tensors of one transformer block."""
    name = f"model.layers.{number}."
    return {
        f"{name}self_attn.qkv_proj.weight": random(24, k, dtype=dtype, seed=10 * number + 1),
        f"{name}self_attn.qkv_proj.bias": random(24, dtype=dtype, seed=10 * number + 2),
        f"{name}mlp.up_proj.weight": random(16, k, dtype=dtype, seed=10 * number + 3),
        f"{name}input_layernorm.weight": random(k, dtype=dtype, seed=10 * number + 4),
    }


def embeddings(k: int = 32) -> dict[str, Array]:
    return {
        "model.embed_tokens.weight": random(48, k, seed=100),
        "lm_head.weight": random(48, k, seed=101),
    }


#: The files that :func:`llama` writes its weights to.
SHARDS = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]


def llama(folder: Path, blocks: int = 3) -> Path:
    """Three shards, a tokenizer and further forms of the weights."""
    shards = [{**block(number)} for number in range(blocks)]
    shards[0] |= {"model.embed_tokens.weight": embeddings()["model.embed_tokens.weight"]}
    shards[-1] |= {"lm_head.weight": embeddings()["lm_head.weight"]}
    write_model(folder, shards, tokenizer__json='{"a": 1}', README__md="# a model\n")
    (folder / "sub").mkdir()
    (folder / "sub" / "more.txt").write_text("more")
    (folder / "pytorch_model.bin").write_bytes(b"other weights")
    (folder / ".hidden").write_text("hidden")
    return folder


def quantized(weight: Array, dtype: Any) -> tuple[Array, Array]:
    """Values in int8 or E4M3 and scales (N, 1) as compressed-tensors makes them."""
    wide = weight.astype(np.float32)
    peak = np.abs(wide).max(axis=1, keepdims=True)
    if dtype == np.int8:
        scales = peak / 127.5
        return np.clip(np.rint(wide / scales), -128, 127).astype(np.int8), scales
    scales = peak / 448
    return (wide / scales).astype(E4M3), scales


def load_all(folder: Path) -> dict[str, Array]:
    """Every tensor of a model, copied."""
    found: dict[str, Array] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with TensorFile(path) as file:
            found.update({name: np.array(file.read(name)) for name in file.keys()})  # noqa: SIM118
    return found


def content(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, byte for byte."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
