"""Converted checkpoints hold what pruning and quantizing each weight gives, nothing else."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
from checkpoints import (
    BF16,
    E4M3,
    SHARDS,
    W8A8,
    block,
    content,
    embeddings,
    llama,
    load_all,
    quantized,
    random,
    write_model,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import FLOATS, floats, operand_names, patterns, same_bits, seeds

import slidesparse_rt as ss
from slidesparse_rt.convert import Checkpoint, ModelConfig, convert_checkpoint
from slidesparse_rt.dtypes import operand
from slidesparse_rt.packing import SparseWeight, TensorFile, write_file
from slidesparse_rt.packing.quantize import dequantize

CONVERTED = ("self_attn.qkv_proj", "mlp.up_proj")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return llama(tmp_path / "model")


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16", "fp16"])
def test_layers_are_those_of_prune_and_quantize(model: Path, tmp_path: Path, dtype: str) -> None:
    out = tmp_path / "out"
    report = convert_checkpoint(model, out, pattern="6:8", dtype=dtype)
    before, after = load_all(model), load_all(out)
    modules = [f"model.layers.{i}.{name}" for i in range(3) for name in CONVERTED]
    assert {layer.module for layer in report.layers} == set(modules)
    for module in modules:
        values, scales = ss.quantize(ss.prune(before.pop(f"{module}.weight"), "6:8"), dtype)
        assert same_bits(after.pop(f"{module}.weight"), values)
        if scales is not None:
            assert same_bits(after.pop(f"{module}.weight_scale"), scales[:, None])
    assert before.keys() == after.keys()
    assert all(same_bits(after[name], before[name]) for name in before)


def test_every_file_is_there_and_the_config_says_how_to_load(model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = convert_checkpoint(model, out, pattern="6:8")
    names = set(content(out))
    assert names == {
        "config.json",
        *SHARDS,
        "model.safetensors.index.json",
        "tokenizer.json",
        "README.md",
        "sub/more.txt",
        "report.json",
        "slidesparse-manifest.json",
    }
    assert report.left_out == ("pytorch_model.bin",)
    config = json.loads((out / "config.json").read_text())
    assert config["model_type"] == "llama"
    part = config["quantization_config"]
    assert (part["quant_method"], part["version"]) == ("slidesparse", 1)
    assert (part["pattern"], part["dtype"], part["method"]) == ("6:8", "int8", "magnitude")
    assert part["weights"]["scale_shape"] == "(N, 1)"
    assert part["activations"] == {"dynamic": True, "strategy": "token", "scales": None}
    read = ModelConfig.read(out)
    assert read is not None
    assert read.pattern.name == "6:8"
    assert read.layers == tuple(layer.module for layer in report.layers)
    assert set(read.ignore) == {"model.embed_tokens", "lm_head"}
    assert not read.static_inputs
    assert ModelConfig.read(model) is None
    # The index names every tensor, and other tools read every file.
    index = json.loads((out / "model.safetensors.index.json").read_text())
    tensors = load_all(out)
    assert index["weight_map"].keys() == tensors.keys()
    assert index["metadata"] == {
        "total_size": sum(tensor.nbytes for tensor in tensors.values()),
        "note": "kept",
    }
    Checkpoint.open(out)
    with safetensors.safe_open(out / "model-00001-of-00003.safetensors", "np") as file:
        assert file.metadata()["format"] == "pt"


def test_layers_load_as_sparse_weights(model: Path, tmp_path: Path) -> None:
    convert_checkpoint(model, tmp_path / "out", pattern="4:6", dtype="fp8_e4m3")
    tensors = load_all(tmp_path / "out")
    name = "model.layers.1.mlp.up_proj.weight"
    weight = SparseWeight(
        tensors[name], tensors[f"{name}_scale"][:, 0], ss.Pattern.parse("4:6"), operand("fp8_e4m3")
    )
    x = np.ones((1, 32), np.float32)
    with ss.SparseGemmPlan(weight, backend="reference") as plan:
        assert np.allclose(plan.run(x), x @ weight.dequantize().T, rtol=0.05, atol=0.5)


@settings(max_examples=25)
@given(
    pattern=patterns,
    dtype=operand_names,
    kind=floats,
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 37)), min_size=1, max_size=4),
    seed=seeds,
)
def test_any_shapes_fit_the_pattern_within_the_bound(
    tmp_path_factory: pytest.TempPathFactory,
    pattern: ss.Pattern,
    dtype: str,
    kind: np.dtype[Any],
    shapes: list[tuple[int, int]],
    seed: int,
) -> None:
    root = tmp_path_factory.mktemp("any")
    source = {
        f"m.{i}.weight": random(*shape, dtype=kind, seed=(seed + i) % 2**32)
        for i, shape in enumerate(shapes)
    }
    source["odd"] = np.arange(3, dtype=np.int8)
    write_model(root / "model", [source])
    report = convert_checkpoint(root / "model", root / "out", pattern=pattern, dtype=dtype)
    tensors = load_all(root / "out")
    with TensorFile(root / "out" / "model.safetensors") as file:
        for name in file.keys():  # noqa: SIM118
            assert file.span(name)[0] % tensors[name].itemsize == 0, "not aligned"
    assert same_bits(tensors["odd"], source["odd"])
    for layer in report.layers:
        weight, values = source[f"{layer.module}.weight"], tensors[f"{layer.module}.weight"]
        scales = tensors.get(f"{layer.module}.weight_scale")
        flat = None if scales is None else scales[:, 0]
        # Raises unless it fits the pattern and has no -0.
        SparseWeight(values, flat, pattern, operand(dtype))
        pruned = ss.prune(weight, pattern).astype(np.float64)
        wide = dequantize(values, flat).astype(np.float64)
        peak = np.abs(pruned).max(axis=1, keepdims=True)
        half = {"int8": 0.502 / 127, "fp8_e4m3": 2**-4, "bf16": 2**-8, "fp16": 2**-11}[dtype]
        bound = half * (peak if dtype == "int8" else np.abs(pruned)) + 2**-9 * peak / 400 + 6e-8
        assert (np.abs(wide - pruned) <= bound).all()
        # The report against float64, the slow way.
        exact = weight.astype(np.float64)
        energy = (exact**2).sum()
        assert layer.kept_energy == pytest.approx((pruned**2).sum() / energy, rel=1e-9)
        error = np.sqrt(
            (
                (exact - values.astype(np.float64) * (flat[:, None] if flat is not None else 1.0))
                ** 2
            ).sum()
            / energy
        )
        assert layer.relative_error == pytest.approx(error, rel=1e-6, abs=1e-9)
        assert layer.padded == -weight.shape[1] % pattern.group
        assert layer.bytes_before == weight.nbytes
        assert layer.bytes_after == values.nbytes + (0 if scales is None else scales.nbytes)


def test_workers_change_nothing(tmp_path: Path) -> None:
    # Larger than a block, so that there is something to share.
    weights = {"a.weight": random(700, 1024), "b.weight": random(33, 4099, seed=1)}
    write_model(tmp_path / "model", [weights])
    for workers in (1, 2, 5):
        convert_checkpoint(
            tmp_path / "model", tmp_path / f"out{workers}", pattern="6:8", workers=workers
        )
    assert content(tmp_path / "out1") == content(tmp_path / "out2") == content(tmp_path / "out5")


def test_include_and_exclude(model: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(
        model, tmp_path / "out", pattern="6:8", include=["mlp", "lm_head"], exclude=["layers.1"]
    )
    assert {layer.module for layer in report.layers} == {
        "model.layers.0.mlp.up_proj",
        "model.layers.2.mlp.up_proj",
        "lm_head",
    }
    reasons = {one.module: one.reason for one in report.skipped}
    assert reasons["model.embed_tokens"] == "an embedding"
    assert reasons["model.layers.1.mlp.up_proj"] == "fits exclude 'layers.1'"
    assert reasons["model.layers.0.self_attn.qkv_proj"] == "fits no include (mlp, lm_head)"


def test_tied_heads_stay_dense(tmp_path: Path) -> None:
    write_model(tmp_path / "model", [{**block(0), **embeddings()}], {"tie_word_embeddings": True})
    report = convert_checkpoint(
        tmp_path / "model", tmp_path / "out", pattern="6:8", include=["layers", "lm_head"],
        exclude=[],
    )  # fmt: skip
    reasons = {one.module: one.reason for one in report.skipped}
    assert reasons["lm_head"] == "tied to the embedding, which stays dense"
    assert same_bits(load_all(tmp_path / "out")["lm_head.weight"], embeddings()["lm_head.weight"])


def test_heads_of_other_names_are_known_by_the_vocabulary(tmp_path: Path) -> None:
    tensors = {**block(0), "odd_head.weight": random(48, 32)}
    write_model(tmp_path / "model", [tensors], {"text_config": {"vocab_size": 48}, "vocab_size": 1})
    report = convert_checkpoint(tmp_path / "model", tmp_path / "out", pattern="6:8")
    assert {one.module: one.reason for one in report.skipped} == {
        "odd_head": "as many rows as the vocabulary: an embedding or output head"
    }


@pytest.mark.parametrize(
    ("name", "config", "bias"),
    [
        ("h.0.attn.c_attn", {"model_type": "gpt2"}, 96),
        ("h.0.attn.c_proj", {"model_type": "gpt2"}, 32),
        ("h.0.odd", {}, 96),
    ],
)
def test_conv1d_is_left_dense(tmp_path: Path, name: str, config: dict[str, Any], bias: int) -> None:
    tensors = {
        f"{name}.weight": random(32, bias),
        f"{name}.bias": random(bias),
        "l.query_key_value.weight": random(96, 32),
        "l.query_key_value.bias": random(96),
    }
    write_model(tmp_path / "model", [tensors], config)
    report = convert_checkpoint(tmp_path / "model", tmp_path / "out", pattern="6:8")
    assert [layer.module for layer in report.layers] == ["l.query_key_value"]
    (skipped,) = report.skipped
    assert skipped.module == name
    assert "Conv1D" in skipped.reason


def test_rows_too_long_for_exact_sums_stay_dense(tmp_path: Path) -> None:
    tensors = {"a.weight": np.ones((1, 133_145), BF16), "b.weight": random(4, 8)}
    write_model(tmp_path / "model", [tensors])
    report = convert_checkpoint(tmp_path / "model", tmp_path / "out", pattern="6:8")
    assert [one.reason for one in report.skipped] == [
        "K = 133145; int8 sums are exact up to K = 133144"
    ]


def as_w8a8(folder: Path, kind: Any, *, apart: bool = False, scale_type: Any = np.float32) -> Path:
    """A quantized model; with ``apart``, scales are in another shard than their weights."""
    tensors: dict[str, Any] = embeddings()
    scales: dict[str, Any] = {}
    for i in range(2):
        for name, value in block(i).items():
            if value.ndim == 2:
                tensors[name], scale = quantized(value, kind)
                scales[f"{name}_scale"] = scale.astype(scale_type)
            else:
                tensors[name] = value
    tensors["extra.weight"] = random(8, 32)
    shards = [scales, tensors] if apart else [{**tensors, **scales}]
    layout = {**W8A8, "format": "int-quantized" if kind == np.int8 else "float-quantized"}
    return write_model(folder, shards, {"quantization_config": layout})


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("scale_type", [np.float32, BF16])
@pytest.mark.parametrize(("dtype", "kind"), [("int8", np.int8), ("fp8_e4m3", E4M3)])
def test_quantized_values_are_pruned_and_their_scales_kept(
    tmp_path: Path, dtype: str, kind: Any, scale_type: Any, apart: bool
) -> None:
    model = as_w8a8(tmp_path / "model", kind, apart=apart, scale_type=scale_type)
    report = convert_checkpoint(model, tmp_path / "out", pattern="6:8", dtype=dtype)
    before, after = load_all(model), load_all(tmp_path / "out")
    assert len(report.layers) == 4
    clamped = 0
    for layer in report.layers:
        name = f"{layer.module}.weight"
        scale = before[f"{name}_scale"].astype(np.float32)
        assert same_bits(after[f"{name}_scale"], scale)
        old = before[name].astype(np.float32)
        clamped += layer.clamped
        assert layer.clamped == ((old == -128).sum() if kind == np.int8 else 0)
        # By dequantized magnitude, the lower index first among equals.
        pruned = ss.prune(np.maximum(old, -127) if kind == np.int8 else old, "6:8")
        assert (after[name].astype(np.float32) == pruned).all()
        assert layer.kept_energy == pytest.approx(
            ((pruned * scale).astype(np.float64) ** 2).sum()
            / ((old * scale).astype(np.float64) ** 2).sum(),
            rel=1e-5,
        )
    assert (clamped > 0) == (kind == np.int8)
    assert {one.module: one.reason for one in report.skipped}["extra"] == (
        "not quantized in this quantized checkpoint"
    )
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["converted_from"] == "compressed-tensors"


@pytest.mark.parametrize("shape", [(), (1,), (16,)])
def test_one_scale_for_a_tensor_becomes_one_for_each_channel(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    tensors = {
        "a.weight": np.random.default_rng(0).integers(-127, 128, (16, 24)).astype(np.int8),
        "a.weight_scale": np.full(shape, 0.25, np.float32),
        "a.input_scale": np.float32([0.5]),
    }
    write_model(tmp_path / "model", [tensors])
    convert_checkpoint(tmp_path / "model", tmp_path / "out", pattern="6:8")
    after = load_all(tmp_path / "out")
    assert same_bits(after["a.weight_scale"], np.full((16, 1), 0.25, np.float32))
    assert same_bits(after["a.input_scale"], tensors["a.input_scale"])
    read = ModelConfig.read(tmp_path / "out")
    assert read is not None
    assert read.static_inputs


@pytest.mark.parametrize("kind", [*FLOATS, np.dtype(np.int8)], ids=str)
def test_wanda_weighs_inputs(tmp_path: Path, kind: np.dtype[Any]) -> None:
    weight = random(8, 40, dtype=np.float32)
    norms = np.random.default_rng(1).random(40).astype(np.float32)
    tensors: dict[str, Any] = {"a.weight": weight.astype(kind)}
    if kind == np.int8:
        tensors["a.weight"], tensors["a.weight_scale"] = quantized(weight, np.int8)
    write_model(tmp_path / "model", [tensors])
    write_file(tmp_path / "norms", {"a.weight": norms}, {})
    convert_checkpoint(
        tmp_path / "model", tmp_path / "out", pattern="6:8", method="wanda",
        norms=tmp_path / "norms",
    )  # fmt: skip
    found = load_all(tmp_path / "out")["a.weight"]
    if kind == np.int8:
        source = np.maximum(tensors["a.weight"].astype(np.float32), -127)
        expected = ss.prune(source, "6:8", method="wanda", norms=norms).astype(np.int8)
    else:
        pruned = ss.prune(tensors["a.weight"], "6:8", method="wanda", norms=norms)
        expected = ss.quantize(pruned, "int8")[0]
    assert same_bits(found, expected)
    assert (found != ss.quantize(ss.prune(weight, "6:8"), "int8")[0]).any()


def test_the_report_file_is_the_report(model: Path, tmp_path: Path) -> None:
    report = convert_checkpoint(model, tmp_path / "out", pattern="6:8")
    written = json.loads((tmp_path / "out" / "report.json").read_text())
    assert written == json.loads(json.dumps(report.lasting()))
    assert report.to_json().items() >= report.lasting().items()
    assert report.weights_done == sum(24 * 32 + 16 * 32 for _ in range(3))
    assert report.bytes_before == sum(tensor.nbytes for tensor in load_all(model).values())
    assert report.bytes_after == sum(
        tensor.nbytes for tensor in load_all(tmp_path / "out").values()
    )


def test_progress_reaches_the_end(model: Path, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []
    convert_checkpoint(
        model, tmp_path / "out", pattern="6:8", progress=lambda *step: seen.append(step)
    )
    assert [done for _, done, _ in seen] == sorted(done for _, done, _ in seen)
    assert seen[-1][1] == seen[-1][2]
    assert {name for name, _, _ in seen} >= {"lm_head.weight", "model.layers.0.mlp.up_proj.weight"}


def test_fingerprints_tell_weights_not_files(model: Path, tmp_path: Path) -> None:
    tensors = load_all(model)
    same = write_model(tmp_path / "same", [tensors])
    tensors["lm_head.weight"][0, 0] += 1
    other = write_model(tmp_path / "other", [tensors])
    found = [Checkpoint.open(folder).fingerprint() for folder in (model, same, other)]
    assert found[0] == found[1] != found[2]


def test_symbolic_links_are_followed(model: Path, tmp_path: Path) -> None:
    # The Hugging Face cache is a folder of links.
    linked = tmp_path / "linked"
    linked.mkdir()
    for path in model.iterdir():
        (linked / path.name).symlink_to(path)
    convert_checkpoint(model, tmp_path / "a", pattern="6:8")
    convert_checkpoint(linked, tmp_path / "b", pattern="6:8")
    links, files = content(tmp_path / "b"), content(tmp_path / "a")
    del files["sub/more.txt"]  # folders that are links are left alone
    manifest = "slidesparse-manifest.json"
    assert links.pop(manifest) != files.pop(manifest)  # it lists the outputs
    assert links == files


def test_the_page_quotes_the_result_files() -> None:
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs" / "convert.md").read_text(encoding="utf-8")
    for name in ("convert-cpu.json", "convert-7b-cpu.json"):
        result = json.loads((root / "benchmarks" / "results" / name).read_text(encoding="utf-8"))
        assert f"an {result['cpu']} with" in page
        for row in result["results"]:
            peak = row["peak_memory_bytes"]
            cells = (
                f"{result['blocks']} of {result['blocks_of_the_whole_model']} blocks",
                row["step"],
                row["version"],
                f"{row['median_seconds']:.1f}",
                f"{row['weights_per_second'] / 1e6:.0f}",
                "-" if peak is None else f"{peak / 1e6:.0f} MB",
            )
            assert f"| {' | '.join(cells)} |" in page
