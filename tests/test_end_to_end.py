"""benchmarks/decoder.py and what benchmarks/end_to_end.py does around it, at a size for a CPU."""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch

import slidesparse_rt as ss

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import end_to_end as bench
from decoder import LAYERS, Cache, Decoder, Sizes

SIZES = Sizes(64, 8, 2, 8, 96, 3, 50)


@pytest.fixture(scope="module")
def weights() -> list[dict[str, torch.Tensor]]:
    return bench.random_weights(SIZES, "cpu")


@pytest.fixture(scope="module")
def tables() -> list[torch.Tensor]:
    draw = torch.Generator().manual_seed(3)
    return [
        torch.randn((SIZES.vocabulary, SIZES.hidden), generator=draw).bfloat16() for _ in range(2)
    ]


def full(weights: Any, tables: Any, **options: Any) -> Decoder:
    """A decoder in float32, whose results are not lost in rounding."""
    blocks = [{key: w.float() for key, w in block.items()} for block in weights]
    found = [table.float() for table in tables]
    return Decoder(SIZES, bench.bf16_side(blocks).linears, *found, longest=32, **options)


def test_it_is_the_decoder_that_transformers_has(weights: Any, tables: Any) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.Qwen2Config(
        vocab_size=SIZES.vocabulary,
        hidden_size=SIZES.hidden,
        intermediate_size=SIZES.intermediate,
        num_hidden_layers=SIZES.blocks,
        num_attention_heads=SIZES.heads,
        num_key_value_heads=SIZES.kv_heads,
        rope_theta=SIZES.rope_theta,
        rms_norm_eps=SIZES.epsilon,
        tie_word_embeddings=False,
    )
    theirs = transformers.Qwen2ForCausalLM(config).eval()
    state = {key: torch.zeros_like(value) for key, value in theirs.state_dict().items()}
    for key in state:
        if "norm" in key:
            state[key] += 1
    state["model.embed_tokens.weight"], state["lm_head.weight"] = (t.float() for t in tables)
    across, kv = SIZES.heads * SIZES.head_size, SIZES.kv_heads * SIZES.head_size
    for i, block in enumerate(weights):
        at = f"model.layers.{i}."
        parts = block["qkv"].float().split([across, kv, kv])
        for name, part in zip("qkv", parts, strict=True):
            state[f"{at}self_attn.{name}_proj.weight"] = part
        state[at + "self_attn.o_proj.weight"] = block["o"].float()
        gate, up = block["gate_up"].float().chunk(2)
        state[at + "mlp.gate_proj.weight"], state[at + "mlp.up_proj.weight"] = gate, up
        state[at + "mlp.down_proj.weight"] = block["down"].float()
    theirs.load_state_dict(state)
    ids = torch.arange(18).view(2, 9) * 5 % SIZES.vocabulary
    with torch.no_grad():
        wanted = theirs(ids).logits[:, -1]
        found = full(weights, tables).prefill(ids)
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def test_a_step_continues_what_was_prefilled(weights: Any, tables: Any) -> None:
    decoder = full(weights, tables)
    ids = torch.arange(20).view(2, 10) * 7 % SIZES.vocabulary
    cache = Cache(SIZES, 2, 10, decoder.embedding)
    decoder.prefill(ids[:, :8], cache)
    decoder.step(ids[:, 8], cache, 8)
    found = decoder.step(ids[:, 9], cache, 9)
    torch.testing.assert_close(found, decoder.prefill(ids), rtol=1e-4, atol=1e-4)
    last = decoder.hidden(ids)[:, -1]
    torch.testing.assert_close(last @ decoder.head.T, found, rtol=1e-4, atol=1e-4)
    assert cache.nbytes == 3 * 2 * 2 * 2 * 10 * 8 * 4


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16"])
def test_sides_of_plans_run_the_pruned_weights(weights: Any, tables: Any, dtype: str) -> None:
    settings: Any = {"backend": "auto", "tuning": "heuristic", "workspace": None}
    side = bench.plan_side("6:8", weights, "6:8", dtype, **settings)
    assert [sorted(block) for block in side.linears] == [sorted(LAYERS)] * SIZES.blocks
    assert bench.check(side, weights, "6:8", SIZES, tables) > 0.97
    assert side.nbytes > 0
    for phase, m, shape in (("prefill", 12, 2), ("decode", 5, 5)):
        options = argparse.Namespace(sequence=6, context=4, no_compile=True)
        work = bench.passes(side, SIZES, tables, options, phase, m)
        assert work().shape == (shape, SIZES.vocabulary)
    bench.linear_work(side, bench.linear_inputs(SIZES, 7, "cpu"))()
    plan = side.plans[0]
    side.close()
    with pytest.raises(ss.PlanClosed):
        plan.run(torch.zeros((1, 64)))


def test_a_side_of_other_weights_is_not_reported(weights: Any, tables: Any) -> None:
    wrong = bench.bf16_side([{key: -w for key, w in block.items()} for block in weights], "wrong")
    with pytest.raises(SystemExit, match=r"wrong: logits of two blocks have cosine"):
        bench.check(wrong, weights, "6:8", SIZES, tables)


def test_its_sizes_are_qwen_2_5_7b_s() -> None:
    sizes = bench.sizes_of(28)
    assert sizes.layer("qkv") == (4608, 3584)
    assert sizes.layer("gate_up") == (37888, 3584)
    # 6.5 of its 7.6 billion weights; the rest is embedding, head and norms.
    assert sizes.linear_weights == 6_525_288_448
    options = bench.parse(["out.json", "--prefill", "512", "--decode"])
    assert (options.prefill, options.decode, options.blocks) == ([512], [], 28)


def test_a_capture_waits_for_its_inputs_and_keeps_them(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replays read whatever the work read, written on another stream and held by nobody else."""
    said: list[str] = []

    class Stream:
        def wait_stream(self, other: str) -> None:
            said.append(f"waits for {other}")

    class Graph:
        def replay(self) -> None:
            said.append("replay")

    cuda = torch.cuda
    monkeypatch.setattr(cuda, "Stream", Stream)
    monkeypatch.setattr(cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(cuda, "graph_pool_handle", lambda: None)
    monkeypatch.setattr(cuda, "current_stream", lambda: "the current one")
    monkeypatch.setattr(cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "graph", lambda *_, **__: contextlib.nullcontext())
    monkeypatch.setattr(cuda, "synchronize", lambda: None)
    ids = torch.arange(3)
    held = weakref.ref(ids)

    def work(ids: torch.Tensor = ids) -> None:
        assert ids is not None
        said.append("work")

    captured = bench.Runner(0.1, 1).capture(work)
    assert said == ["waits for the current one", "work", "work", "work"]
    del work, ids
    gc.collect()
    assert held() is not None
    captured.replay()
    assert said[-1] == "replay"
