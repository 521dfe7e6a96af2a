"""sparsify(): which layers it replaces, what it reports, and that it does all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from test_torch_layer import same, tokens

import slidesparse_rt as ss
from slidesparse_rt.packing import write_file
from slidesparse_rt.torch import SlideSparseLinear, sparsify


class Block(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj = torch.nn.Linear(16, 24)
        self.v_proj = torch.nn.Linear(16, 24, bias=False)
        self.norm = torch.nn.LayerNorm(24)
        self.down = torch.nn.Linear(24, 16)

    def forward(self, x: Any) -> Any:
        return self.down(self.norm(self.q_proj(x) * self.v_proj(x)))


class Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = torch.nn.ModuleList(Block() for _ in range(2))
        self.lm_head = torch.nn.Linear(16, 10, bias=False)

    def forward(self, x: Any) -> Any:
        for one in self.layers:
            x = x + one(x)
        return self.lm_head(x)


def sparse(model: Any) -> list[str]:
    return [name for name, one in model.named_modules() if isinstance(one, SlideSparseLinear)]


def test_every_linear_layer_but_the_head() -> None:
    model = Model().eval()
    before = {
        name: one.weight.detach().clone()
        for name, one in model.named_modules()
        if (isinstance(one, torch.nn.Linear))
    }
    report = sparsify(model, "6:8", dtype="int8")
    names = [f"layers.{i}.{name}" for i in range(2) for name in ("q_proj", "v_proj", "down")]
    assert sparse(model) == names == [one.module for one in report.layers]
    assert report.skipped == (("lm_head", "fits skip 'lm_head'"),)
    assert report.unmatched == ()
    assert not any(one.training for one in model.modules())
    for one in report.layers:
        old = before[one.module]
        packed = model.get_submodule(one.module).sparse_weight()
        expected = ss.SparseWeight.from_array(ss.prune(old, "6:8"), "6:8")
        assert (packed.values == expected.values).all()
        lost = torch.from_numpy(packed.dequantize()) - old
        assert one.relative_error == pytest.approx(float(lost.norm() / old.norm()), rel=1e-5)
        kept = float((ss.prune(old, "6:8").norm() / old.norm()) ** 2)
        assert one.kept_energy == pytest.approx(kept, rel=1e-5)
        assert one.bytes_before == 4 * old.numel()
        assert one.bytes_after == packed.nbytes
    text = str(report)
    assert "6 linear layers to 6:8 int8 (magnitude), 9,216 bytes to 2,816" in text
    assert "layers.1.down (16 x 24): error 0." in text
    assert "lm_head stays dense: fits skip 'lm_head'" in text
    with torch.no_grad():
        assert model(tokens(3, 16)).shape == (3, 10)


def test_names_are_matched_by_whole_components() -> None:
    model = Model()
    report = sparsify(
        model, "6:8", include=["layers.*.q_proj", "lm_head"], skip=["layers.0", "proj"]
    )
    assert sparse(model) == ["layers.1.q_proj", "lm_head"]
    assert dict(report.skipped)["layers.0.q_proj"] == "fits skip 'layers.0'"
    assert dict(report.skipped)["layers.1.v_proj"].startswith("fits no include (layers.*.q_proj")
    assert report.unmatched == ("proj",)
    assert "'proj' fits no linear layer" in str(report)


def test_what_must_not_be_replaced_is_not() -> None:
    class Odd(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed_tokens = torch.nn.Embedding(10, 16)
            self.tied = torch.nn.Linear(16, 10, bias=False)
            self.tied.weight = self.embed_tokens.weight
            self.hooked = torch.nn.Linear(16, 16)
            self.hooked.register_forward_hook(lambda *_: None)
            self.special = torch.nn.modules.linear.NonDynamicallyQuantizableLinear(16, 16)
            self.encoder = torch.nn.TransformerEncoderLayer(16, 2, 32)
            self.attention = torch.nn.MultiheadAttention(16, 2)
            self.plain = torch.nn.Linear(16, 16)
            self.again = self.plain

    model = Odd()
    report = sparsify(model, "2:4")
    assert [one.module for one in report.layers] == ["plain"]
    assert model.again is model.plain
    reasons = dict(report.skipped)
    assert reasons["tied"] == "shares its weight with embed_tokens.weight"
    assert "hooks" in reasons["hooked"]
    assert "NonDynamicallyQuantizableLinear" in reasons["special"]
    assert "TransformerEncoderLayer" in reasons["encoder.linear1"]
    assert "MultiheadAttention" in reasons["attention.out_proj"]
    model.eval()
    x = tokens(3, 2, 16)
    with torch.inference_mode():  # PyTorch's fused path reads weights directly
        assert model.encoder(x).shape == x.shape


def test_too_long_for_exact_sums_stays_dense() -> None:
    model = torch.nn.Sequential(torch.nn.Linear(140_000, 1), torch.nn.Linear(8, 8))
    report = sparsify(model, "6:8")
    assert report.skipped == (("0", "K = 140000; int8 sums are exact up to K = 133144"),)


def test_all_or_nothing() -> None:
    model = Model()
    with torch.no_grad():
        model.layers[1].down.weight[3, 5] = float("nan")
    state = {name: one.clone() for name, one in model.state_dict().items()}
    with pytest.raises(ss.NonFiniteError, match=r"^layers\.1\.down: .*row 3"):
        sparsify(model, "6:8")
    assert not sparse(model)
    assert all(same(one, state[name]) for name, one in model.state_dict().items())


def test_wanda_takes_norms_by_name_or_from_a_file(tmp_path: Path) -> None:
    norms = {
        f"layers.{i}.{name}": torch.linspace(1, 3 + i, 24 if name == "down" else 16)
        for i in range(2)
        for name in ("q_proj", "v_proj", "down")
    }
    models = [Model(), Model(), Model()]
    sparsify(models[0], "2:4", method="wanda", norms=norms)
    file = tmp_path / "norms.safetensors"
    write_file(file, {f"{name}.weight": one.numpy() for name, one in norms.items()}, {})
    report = sparsify(models[1], "2:4", method="wanda", norms=file)
    sparsify(models[2], "2:4")
    assert report.method == "wanda"
    left, right, magnitude = (one.layers[0].down.weight for one in models)
    assert torch.equal(left, right)
    assert not torch.equal(left, magnitude)
    old = Model().layers[0].down.weight.detach()
    kept = ss.prune(old, "2:4", method="wanda", norms=norms["layers.0.down"]) != 0
    assert not left[~kept].any()
    with pytest.raises(
        ss.OptionError, match=r"no norms for 5 of 6 layers, such as layers\.0\.v_proj"
    ):
        sparsify(Model(), "2:4", method="wanda", norms={"layers.0.q_proj": torch.ones(16)})


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"pattern": "2:8"}, ss.PatternError, "6:8"),
        ({"dtype": "int4"}, ss.DTypeError, "int4"),
        ({"method": "random"}, ss.OptionError, "'random' is unknown; allowed are magnitude, wanda"),
        ({"method": "wanda"}, ss.OptionError, "needs norms"),
        ({"norms": {}}, ss.OptionError, "ignores them"),
        ({"skip": "q_proj"}, ss.OptionError, "list of globs"),
        ({"skip": ["*"]}, ss.OptionError, r"no linear layer to replace:\n  layers.0.q_proj: fits"),
        ({"backend": "fast"}, ss.OptionError, "fast"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    model = Model()
    with pytest.raises(error, match=words):
        sparsify(model, **{"pattern": "6:8", **settings})
    assert not sparse(model)


def test_models_that_cannot_be_taken() -> None:
    with pytest.raises(ss.OptionError, match="from_linear"):
        sparsify(torch.nn.Linear(8, 8), "6:8")
    with pytest.raises(ss.OptionError, match="model is a list"):
        sparsify([], "6:8")
    with pytest.raises(ss.OptionError, match="it has none"):
        sparsify(torch.nn.Sequential(torch.nn.ReLU()), "6:8")
    with pytest.raises(ss.DeviceError, match=r"0\.weight is on the meta device"):
        sparsify(torch.nn.Sequential(torch.nn.Linear(8, 8, device="meta")), "6:8")
