"""SlideSparseLinear: results, state, moves, and what it refuses."""

from __future__ import annotations

import copy
import gc
import io
import pickle
import threading
from typing import Any

import numpy as np
import pytest
import torch
from fake_quantized import fake_quantized
from plans import fitted

import slidesparse_rt as ss
import slidesparse_rt.torch
from slidesparse_rt.integrations import torch_op
from slidesparse_rt.torch import SlideSparseLinear, configure, fuse, prepare, release_weights

N, K = 12, 40
FORMATS = ("int8", "fp8_e4m3", "bf16", "fp16")


def dense(n: int = N, k: int = K, *, bias: bool = True, seed: int = 0, dtype: Any = None) -> Any:
    torch.manual_seed(seed)
    return torch.nn.Linear(k, n, bias=bias, dtype=dtype)


def layer(seed: int = 0, *, n: int = N, bias: bool = True, **settings: Any) -> SlideSparseLinear:
    settings = {"pattern": "6:8", **settings}
    return SlideSparseLinear.from_linear(dense(n, bias=bias, seed=seed), **settings)


def tokens(*shape: int, dtype: Any = torch.float32, seed: int = 1) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def same(found: Any, expected: Any) -> bool:
    return (
        found.dtype == expected.dtype
        and found.shape == expected.shape
        and torch.equal(found.view(torch.uint8), expected.contiguous().view(torch.uint8))
    )


@pytest.fixture
def entries() -> Any:
    """The plans that exist, none of them another test's."""
    gc.collect()
    torch_op._ENTRIES.clear()
    return torch_op._ENTRIES


@pytest.mark.parametrize("kind", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pattern", ["2:4", "6:8", "14:16", "dense"])
def test_int8_is_the_definition_to_the_bit(pattern: str, kind: Any) -> None:
    made = layer(pattern=pattern)
    x = tokens(2, 3, K, dtype=kind)
    x[0, 1] = 0
    assert same(made(x), fake_quantized(made)(x))


def test_fp8_is_the_definition_to_the_bit() -> None:
    made = layer(dtype="fp8_e4m3")
    x = tokens(5, K)
    assert same(made(x), fake_quantized(made)(x))


@pytest.mark.parametrize("dtype", FORMATS)
def test_it_runs_what_a_plan_runs(dtype: str) -> None:
    linear = dense()
    made = SlideSparseLinear.from_linear(linear, "6:8", dtype=dtype)
    pruned = ss.prune(linear.weight.detach(), "6:8")
    x = tokens(5, K)
    with ss.SparseGemmPlan(pruned, "6:8", dtype=dtype, bias=linear.bias) as plan:
        assert same(made(x), plan.run(x))
    assert same(made(x[0]), made(x)[0])
    assert same(made(x.T.contiguous().T), made(x))
    assert made(x[:0]).shape == (0, N)
    assert f"dtype='{dtype}'" in repr(made)


def test_a_static_scale_serves_every_token() -> None:
    made = layer()
    static = SlideSparseLinear(K, N, pattern="6:8", static_input=True)
    state = {**made.state_dict(), "input_scale": torch.tensor([0.03])}
    static.load_state_dict(state)
    x = tokens(5, K)
    with ss.SparseGemmPlan(made.sparse_weight(), bias=made.bias, x_scale=0.03) as plan:
        assert same(static(x), plan.run(x))
    assert "static_input=True" in repr(static)
    static.input_scale.fill_(0.05)
    assert not same(static(x), plan_run(made, x, x_scale=0.03))
    assert same(static(x), plan_run(made, x, x_scale=0.05))


def plan_run(made: SlideSparseLinear, x: Any, **settings: Any) -> Any:
    with ss.SparseGemmPlan(made.sparse_weight(), bias=made.bias, **settings) as plan:
        return plan.run(x)


@pytest.mark.parametrize("dtype", FORMATS)
def test_state_dict_round_trip(dtype: str) -> None:
    made = layer(dtype=dtype)
    x = tokens(3, K)
    file = io.BytesIO()
    torch.save(made.state_dict(), file)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    scaled = {"weight_scale"} if dtype in ("int8", "fp8_e4m3") else set()
    assert set(state) == {"weight", "bias", *scaled}
    other = SlideSparseLinear(K, N, pattern="6:8", dtype=dtype)
    before = other(x)
    other.load_state_dict(state)
    assert same(other(x), made(x))
    assert not same(before, made(x))


def test_a_layer_on_the_meta_device_takes_a_state_dict() -> None:
    made = layer()
    x = tokens(3, K)
    for give in ("assign", "empty"):
        other = SlideSparseLinear(K, N, pattern="6:8", device="meta")
        assert all(one.is_meta for one in other.buffers())
        with pytest.raises(ss.DeviceError, match="meta device"):
            other.plan()
        assert other(x.to("meta")).shape == (3, N)
        if give == "assign":
            other.load_state_dict(made.state_dict(), assign=True)
        else:
            other = other.to_empty(device="cpu")
            other.load_state_dict(made.state_dict())
        assert same(other(x), made(x))


def test_values_of_another_type_are_not_loaded() -> None:
    """copy_() would round a dense weight to integers without a word."""
    made = layer()
    before = made.weight.clone()
    with pytest.raises(RuntimeError, match=r"weight is torch.float32.*takes torch.int8.*convert"):
        made.load_state_dict(dense().state_dict(), strict=False)
    assert torch.equal(made.weight, before)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
def test_copies_are_layers_of_their_own(again: Any) -> None:
    made = layer()
    x = tokens(3, K)
    expected = made(x)
    other = again(made)
    other.bias.zero_()
    assert same(made(x), expected)
    assert not same(other(x), expected)


def test_types_change_for_the_bias_alone() -> None:
    for dtype in FORMATS:
        made = layer(dtype=dtype)
        before = {name: one.clone() for name, one in made.named_buffers() if name != "bias"}
        made.half()
        made.to(torch.bfloat16)
        assert made.bias.dtype == torch.bfloat16
        for name, one in before.items():
            assert same(getattr(made, name), one)


def test_writing_a_buffer_makes_the_plan_anew(entries: Any) -> None:
    made = layer()
    x = tokens(3, K)
    first, plan = made(x), made.plan()
    assert made.plan() is plan
    made.weight_scale *= 2
    assert made.plan() is not plan
    made.bias.zero_()
    half = layer(bias=False)(x)
    assert same(made(x), half * 2)
    assert not same(made(x), first)
    made.weight = made.weight.clone().zero_()
    assert not made(x).any()
    assert len(entries) == 1


def test_in_inference_mode_too() -> None:
    with torch.inference_mode():
        made = layer()
        x = tokens(3, K)
        assert same(made(x), fake_quantized(made)(x))
        assert made.plan() is made.plan()


def test_plans_go_with_their_layers(entries: Any) -> None:
    made = [layer(seed) for seed in range(3)]
    for one in made:
        one(tokens(2, K))
    assert len(entries) == 3
    moved = made[0].to("meta")
    assert len(entries) == 2
    del made, one, moved
    gc.collect()
    assert not entries


def test_threads_share_one_plan(entries: Any) -> None:
    made = layer()
    x = tokens(4, K)
    expected = fake_quantized(made)(x)
    start = threading.Barrier(8)
    plans, results = [], []

    def work() -> None:
        start.wait()
        results.append(made(x))
        plans.append(made.plan())

    workers = [threading.Thread(target=work) for _ in range(8)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert len(results) == 8
    assert all(same(one, expected) for one in results)
    assert len({id(plan) for plan in plans}) == 1


def test_gradients_are_refused_when_they_are_asked_for() -> None:
    made = layer()
    x = tokens(3, K).requires_grad_()
    with pytest.raises(ss.ArrayError, match=r"requires a gradient.*torch.no_grad"):
        made(x)
    with torch.no_grad():
        assert not made(x).requires_grad
    assert not list(made.parameters())


def test_a_weight_that_does_not_fit_is_refused_when_it_runs() -> None:
    made = layer()
    made.weight.fill_(1)
    with pytest.raises(ss.PatternError, match="6:8"):
        made(tokens(3, K))
    made = layer()
    made.weight_scale[3] = float("nan")
    with pytest.raises(ss.NonFiniteError, match="index 3"):
        made(tokens(3, K))


def test_from_sparse_weight_and_back() -> None:
    packed = ss.SparseWeight.from_array(fitted("6:8", N, K), "6:8", dtype="fp8_e4m3")
    bias = tokens(N, dtype=torch.float16)
    made = SlideSparseLinear.from_sparse_weight(packed, bias)
    again = made.sparse_weight()
    assert np.array_equal(again.values.view(np.uint8), packed.values.view(np.uint8))
    assert np.array_equal(again.scales, packed.scales)
    linear = made.to_linear()
    assert linear.weight.dtype == torch.float16
    expected = torch.from_numpy(packed.dequantize())
    assert torch.equal(made.to_linear(torch.float32).weight, expected)
    assert torch.equal(linear.bias, bias)
    with pytest.raises(ss.ShapeError, match=r"bias has shape \(3,\); allowed is \(12,\)"):
        SlideSparseLinear.from_sparse_weight(packed, bias[:3])


def test_wanda_weighs_inputs() -> None:
    linear = dense()
    norms = torch.linspace(0, 3, K)
    made = SlideSparseLinear.from_linear(linear, "2:4", method="wanda", norms=norms)
    kept = ss.prune(linear.weight.detach(), "2:4", method="wanda", norms=norms) != 0
    assert torch.equal(made.weight != 0, kept)
    assert not torch.equal(kept, ss.prune(linear.weight.detach(), "2:4") != 0)


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"pattern": "2:8"}, ss.PatternError, "6:8"),
        ({"dtype": "int4"}, ss.DTypeError, "int4"),
        ({"backend": "fast"}, ss.OptionError, "fast"),
        ({"tuning": "often"}, ss.OptionError, "often"),
        ({"options": 3}, ss.OptionError, "PlanOptions"),
        ({"dtype": "bf16", "static_input": True}, ss.OptionError, "no scales"),
        ({"in_features": 200_000}, ss.ShapeError, "133144"),
        ({"out_features": 0}, ss.ShapeError, "out_features is 0"),
        ({"bias_dtype": torch.float64}, ss.DTypeError, "float64"),
    ],
)
def test_refusals(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SlideSparseLinear(
            **{"in_features": K, "out_features": N, "pattern": "6:8", "device": "meta", **settings}
        )
    with pytest.raises(ss.OptionError, match="Conv1d"):
        SlideSparseLinear.from_linear(torch.nn.Conv1d(1, 1, 1), "6:8")
    with pytest.raises(ss.DeviceError, match="meta"):
        SlideSparseLinear.from_linear(torch.nn.Linear(8, 8, device="meta"), "6:8")


def test_what_runs_can_be_set_for_a_whole_model() -> None:
    model = torch.nn.Sequential(layer(), torch.nn.ReLU())
    x = tokens(3, K)
    expected = model(x)
    configure(model, backend="reference", options=ss.PlanOptions(threads=1))
    assert same(model(x), expected)
    assert model[0].plan()._options == ss.PlanOptions(threads=1)
    assert "asked for: reference" in model[0].plan().explain()
    prepare(model, [1, 8])
    # On the CPU the plan shares the buffer: there is nothing to release.
    assert release_weights(model) == 0
    configure(model, backend="hopper")
    with pytest.raises(ss.BackendUnavailable, match="hopper"):
        model(x)


def test_plans_of_former_settings_are_let_go(entries: Any) -> None:
    parts = torch.nn.ModuleList([layer(0), layer(1)])
    x = tokens(3, K)
    for one in parts:
        one(x)
    assert len(entries) == 2
    configure(parts, backend="reference")
    assert not entries
    for one in parts:
        one(x)
    fuse(*parts)
    assert not entries
    parts[0](x)
    assert len(entries) == 1
    configure(parts)
    assert not entries
    parts[1](x)
    parts.to("meta")
    assert not entries


class TestFused:
    """Layers with the same input."""

    @staticmethod
    def group(**settings: Any) -> Any:
        made = torch.nn.ModuleList(layer(seed, n=n, **settings) for seed, n in enumerate((8, 5, 3)))
        fuse(*made)
        return made

    @pytest.mark.parametrize("bias", [True, False])
    @pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
    def test_the_same_bits_as_alone(self, dtype: str, bias: bool) -> None:
        x = tokens(2, 3, K)
        alone = [layer(seed, n=n, dtype=dtype, bias=bias)(x) for seed, n in enumerate((8, 5, 3))]
        together = self.group(dtype=dtype, bias=bias)
        for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
            for index in order:
                assert same(together[index](x).contiguous(), alone[index])

    def test_one_product_for_all(self, monkeypatch: pytest.MonkeyPatch) -> None:
        runs: list[tuple[int, ...]] = []
        real = ss.SparseGemmPlan.run

        def run(plan: Any, x: Any, **settings: Any) -> Any:
            runs.append(plan.shape)
            return real(plan, x, **settings)

        monkeypatch.setattr(ss.SparseGemmPlan, "run", run)
        made = self.group()
        x = tokens(3, K)
        for _ in range(2):
            for one in made:
                one(x)
        assert runs == [(16, K)] * 2

    def test_an_input_or_weight_that_was_written_counts_as_new(self) -> None:
        made = self.group()
        x = tokens(3, K)
        made[0](x)
        x.mul_(-3)
        assert same(made[1](x).contiguous(), fake_quantized(made[1])(x))
        made[0](x)
        made[1].weight.zero_()
        made[1].bias.zero_()
        assert not made[1](x).any()

    def test_threads_do_not_get_each_others_outputs(self) -> None:
        made = self.group()
        xs = [tokens(3, K, seed=seed) for seed in range(4)]
        expected = [[fake_quantized(one)(x) for one in made] for x in xs]
        wrong: list[int] = []
        start = threading.Barrier(4)

        def work(number: int) -> None:
            start.wait()
            for _ in range(50):
                found = [one(xs[number]).contiguous() for one in made]
                if not all(map(same, found, expected[number])):
                    wrong.append(number)

        workers = [threading.Thread(target=work, args=(number,)) for number in range(4)]
        for one in workers:
            one.start()
        for one in workers:
            one.join()
        assert not wrong

    def test_threads_that_take_turns_compute_once_each(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        runs: list[int] = []
        real = ss.SparseGemmPlan.run
        monkeypatch.setattr(
            ss.SparseGemmPlan, "run", lambda plan, x: (runs.append(1), real(plan, x))[1]
        )
        made = self.group()
        mine, other = tokens(3, K, seed=3), tokens(3, K, seed=4)
        first, second = threading.Event(), threading.Event()

        def work() -> None:
            first.wait()
            made[0](other)
            second.set()
            made[1](other)

        worker = threading.Thread(target=work)
        worker.start()
        made[0](mine)
        first.set()
        second.wait()
        made[1](mine)
        worker.join()
        assert len(runs) == 2

    @pytest.mark.parametrize("again", [copy.deepcopy, lambda one: pickle.loads(pickle.dumps(one))])
    def test_copies_are_fused_among_themselves(self, again: Any) -> None:
        made = self.group()
        x = tokens(3, K)
        made[0](x)
        other = again(made)
        assert {one._shared for one in other} == {other[0]._shared} != {made[0]._shared}
        assert other[0]._shared.layers == tuple(other)
        assert all(same(a(x), b(x)) for a, b in zip(made, other, strict=True))
        assert set(other.state_dict()) == set(made.state_dict())
        assert "fused" in repr(other)

    def test_nothing_is_kept_once_all_were_called(self) -> None:
        made = self.group()
        x = tokens(3, K)
        for one in made:
            one(x)
        assert made[0]._shared._local.held is None

    def test_gradients_are_refused_for_kept_outputs_too(self) -> None:
        made = self.group()
        x = tokens(3, K)
        made[0](x)
        x.requires_grad_()
        with pytest.raises(ss.ArrayError, match="gradient"):
            made[1](x)

    def test_refusals(self) -> None:
        with pytest.raises(ss.OptionError, match="two SlideSparseLinear or more"):
            fuse(layer())
        with pytest.raises(ss.OptionError, match="given SlideSparseLinear, Linear"):
            fuse(layer(), dense())  # type: ignore[arg-type]
        one = layer()
        with pytest.raises(ss.OptionError, match="one layer twice"):
            fuse(one, one)
        with pytest.raises(ss.OptionError, match="fused already"):
            fuse(self.group()[0], one)
        for other, words in (
            (layer(pattern="4:6"), "alike in pattern; found 6:8 and 4:6"),
            (layer(dtype="fp8_e4m3"), "alike in dtype"),
            (layer(bias=False), "alike in having a bias"),
            (layer(backend="reference"), "alike in backend"),
            (SlideSparseLinear(K, N, pattern="6:8", static_input=True), "alike in static"),
            (SlideSparseLinear(48, N, pattern="6:8"), "alike in K; found 40 and 48"),
        ):
            with pytest.raises(ss.OptionError, match=words):
                fuse(one, other)
        assert one._shared is None


def test_the_public_module_is_not_torch() -> None:
    assert ss.torch is slidesparse_rt.torch
    assert slidesparse_rt.torch is not torch
    assert {"sparsify", "SlideSparseLinear"} <= set(slidesparse_rt.torch.__all__)
