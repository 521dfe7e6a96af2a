"""The integrations on a GPU: PyTorch layers, CUDA graphs, compilation, transformers, JAX."""

from __future__ import annotations

import copy
import gc

import numpy as np
import pytest
from fake_quantized import fake_quantized

import slidesparse_rt as ss

from .common import BACKENDS, FLOATS, assert_same, data, to_host, weight

torch = pytest.importorskip("torch")

from slidesparse_rt.integrations import torch_op  # noqa: E402
from slidesparse_rt.torch import (  # noqa: E402
    SlideSparseLinear,
    fuse,
    prepare,
    release_weights,
    sparsify,
)

pytestmark = [
    pytest.mark.gpu,
    # What PyTorch's own modules warn of when they are imported or trace.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

N, K, M = 192, 256, 48


def layer(seed=0, *, n=N, dtype="int8", pattern="6:8", bias=True, backend="auto"):
    packed = ss.SparseWeight.from_array(weight(seed, n, K, pattern), pattern, dtype=dtype)
    given = torch.from_numpy(data(seed + 50, (n,))) if bias else None
    return SlideSparseLinear.from_sparse_weight(packed, given, backend=backend)


def tokens(*shape, kind="bfloat16", seed=9):
    values = torch.from_numpy(data(seed, (*shape, K)))
    return values.to(getattr(torch, kind)).cuda()


def on_cpu(made, x):
    """The exact result, by the reference on the CPU; its backend is any there."""
    other = copy.deepcopy(made).to("cpu")
    other._set_backend("auto", "cached", None)
    other._shared = None
    other._forward_hooks.clear()
    return to_host(other(x.cpu()))


@pytest.fixture(autouse=True)
def _fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("kind", FLOATS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_int8_layers_are_the_definition_to_the_bit(backend, kind):
    made = layer(backend=backend)
    x = tokens(3, M, kind=kind)
    x[1, 2] = 0
    expected = to_host(fake_quantized(made)(x.cpu()))
    made = made.cuda()
    y = made(x)
    assert y.is_cuda
    assert_same(to_host(y), expected)
    assert made.plan().backend == backend


def test_moves_between_devices():
    made = layer()
    x = tokens(M)
    expected = on_cpu(made, x)
    gc.collect()
    torch_op._ENTRIES.clear()
    for where in ("cuda", "cpu", "cuda"):
        made = made.to(where)
        assert {one.device.type for one in made.buffers()} == {where}
        assert_same(to_host(made(x.to(where))), expected)
        assert made.plan().device.startswith(where)
        gc.collect()
        assert len(torch_op._ENTRIES) == 1  # the plan of the device before is gone
    with pytest.raises(ss.DeviceError):
        made(x.cpu())
    state = made.state_dict()
    other = SlideSparseLinear(K, N, pattern="6:8", device="meta")
    other.load_state_dict(state, assign=True)
    assert_same(to_host(other(x)), expected)


def test_inputs_of_any_strides():
    made = layer().cuda()
    wide = tokens(4, 6, 2)
    for x in (
        wide[:, :, 0],
        wide[:, 0],
        wide[0, 0, 0],
        wide.transpose(0, 1),
        wide[:0],
        wide[0, 0].T.contiguous().T,
        wide[0, :1].expand(5, 2, K),
    ):
        expected = on_cpu(made, x)
        assert_same(to_host(made(x)), expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_captured_in_a_cuda_graph(backend):
    model = torch.nn.Sequential(layer(n=K, backend=backend), torch.nn.ReLU(), layer(1)).cuda()
    x = tokens(M)
    stream = torch.cuda.Stream()
    prepare(model, [M], stream=stream)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.no_grad(), torch.cuda.graph(graph, stream=stream):
        y = model(x)
    for seed in (9, 10):
        x.copy_(tokens(M, seed=seed))
        graph.replay()
        torch.cuda.synchronize()
        expected = torch.relu(torch.from_numpy(on_cpu(model[0], x).astype(np.float32)))
        assert_same(to_host(y), on_cpu(model[2], expected.to(torch.bfloat16)))


def test_a_layer_that_is_not_prepared_refuses_a_capture():
    made = layer().cuda()
    x = tokens(M)
    torch.cuda.synchronize()
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=stream):
        other = x + 1
        with pytest.raises(ss.CaptureError, match="prepare"):
            made(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(other, x + 1)
    assert_same(to_host(made(x)), on_cpu(made, x))


def fused(**settings):
    made = torch.nn.ModuleList(
        layer(seed, n=n, **settings) for seed, n in enumerate((N, 64, 64))
    ).cuda()
    fuse(*made)
    return made


@pytest.mark.parametrize("backend", BACKENDS)
def test_fused_layers_give_the_same_bits(backend):
    made = fused(backend=backend)
    for x in (tokens(1), tokens(2, M)):
        for one in made:
            assert_same(to_host(one(x).contiguous()), on_cpu(one, x))
    assert len({id(one.plan()) for one in made}) == 1
    assert made[0].plan().shape == (N + 128, K)


@pytest.mark.parametrize("together", [False, True])
def test_released_weights(together):
    made = fused() if together else torch.nn.ModuleList([layer(n=4096).cuda()])
    x = tokens(M)
    expected = [on_cpu(one, x) for one in made]
    state = {name: one.cpu() for name, one in made.state_dict().items()}
    plan = made[0].plan()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    size = sum(one.out_features for one in made) * K
    assert release_weights(made) == size
    assert torch.cuda.memory_allocated() <= before - size
    assert release_weights(made) == 0
    for one, wanted in zip(made, expected, strict=True):
        assert_same(to_host(one(x).contiguous()), wanted)
    assert made[0].plan() is plan
    again = made.state_dict()
    assert all(torch.equal(state[name], again[name].cpu()) for name in state)
    other = copy.deepcopy(made)
    assert_same(to_host(other[0](x).contiguous()), expected[0])
    moved = made.to("cpu")
    assert all(torch.equal(state[name], one) for name, one in moved.state_dict().items())
    assert_same(to_host(moved[0](x.cpu()).contiguous()), expected[0])


def test_a_bias_that_is_written_while_the_weight_is_released():
    made = layer().cuda()
    x = tokens(M)
    first = to_host(made(x))
    made.release_weight()
    made.bias.zero_()
    with pytest.raises(ss.DeviceError, match="restore_weight"):
        made(x)
    made.restore_weight()
    assert_same(to_host(made(x)), on_cpu(made, x))
    assert not np.array_equal(to_host(made(x)), first)


class Block(torch.nn.Module):
    """Two fused layers, and one that takes their outputs."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = layer(0, n=K), layer(1, n=K), layer(2)
        fuse(self.a, self.b)

    def forward(self, x):
        return self.c(torch.relu(self.a(x)) * self.b(x))


def test_compiled_in_one_graph():
    model = Block().cuda()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for rows in (M, 16, M):
            x = tokens(rows, seed=rows)
            assert_same(to_host(compiled(x)), to_host(model(x)))


def test_a_graph_of_copies_of_the_weights_is_refused():
    """PyTorch's backend "cudagraphs" copies weights like any other input, before each replay."""
    model = Block().cuda()
    compiled = torch.compile(model, fullgraph=True, backend="cudagraphs")
    try:
        with torch.no_grad(), pytest.raises(ss.CaptureError, match="reduce-overhead"):
            for _ in range(3):
                compiled(tokens(M))
    finally:
        torch._dynamo.reset()
    x = tokens(M)
    with torch.no_grad():
        assert_same(to_host(model(x)), to_host(torch.compile(model, backend="aot_eager")(x)))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_with_inductor(mode):
    pytest.importorskip("triton")
    model = Block().cuda()
    compiled = torch.compile(model, fullgraph=True, mode=mode)
    with torch.inference_mode():
        for _ in range(4):
            x = tokens(M)
            assert_same(to_host(compiled(x)), to_host(model(x)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend):
    from torch.library import opcheck

    from slidesparse_rt.integrations.torch_call import arguments

    made = layer(backend=backend).cuda()
    opcheck(torch.ops.slidesparse.linear.default, (tokens(M), *arguments((made,))))


def test_sparsify_where_the_model_is():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(K, 512), torch.nn.GELU(), torch.nn.Linear(512, N))
    there = copy.deepcopy(model).to("cuda", torch.bfloat16)
    report = sparsify(there, "6:8")
    here = model.to(torch.bfloat16)
    assert report == sparsify(here, "6:8")
    for left, right in zip(there.state_dict().values(), here.state_dict().values(), strict=True):
        assert left.is_cuda
        assert torch.equal(left.cpu(), right)
    x = tokens(M)
    with torch.no_grad():
        assert_same(to_host(there[0](x)), to_host(here[0](x.cpu())))


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Qwen3"])
def test_transformers_generates_the_same_tokens(name, tmp_path):
    transformers = pytest.importorskip("transformers")
    from slidesparse_rt.convert import convert_checkpoint
    from slidesparse_rt.integrations.torch_model import layers_of
    from slidesparse_rt.transformers import runtime_config

    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=320,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=None,
    )
    dense = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.bfloat16)
    dense.save_pretrained(tmp_path / "dense")
    out = tmp_path / "out"
    convert_checkpoint(tmp_path / "dense", out, pattern="6:8", dtype="int8")
    auto = transformers.AutoModelForCausalLM
    model = auto.from_pretrained(out).cuda()
    alone = auto.from_pretrained(out, config=runtime_config(out, fuse=False)).cuda()
    assert len({id(one.plan()) for _, one in layers_of(model)}) == 8
    prompt = torch.randint(0, 320, (2, 8)).cuda()

    # Each layer on the model's own activations, to the bit.
    checked = []

    def check(module, inputs, output):
        assert_same(to_host(output.contiguous()), on_cpu(module, inputs[0]))
        checked.append(module)

    hooks = [one.register_forward_hook(check) for _, one in layers_of(model)]
    with torch.inference_mode():
        model(prompt)
    for hook in hooks:
        hook.remove()
    assert len(set(checked)) == 14

    # The whole model: the plain layers run on the CPU, everything else stays where it is.
    class There(torch.nn.Module):
        def __init__(self, one):
            super().__init__()
            self.exact = fake_quantized(copy.deepcopy(one).cpu())

        def _apply(self, fn, recurse=True):
            return self

        def forward(self, x):
            return self.exact(x.cpu()).to(x.device)

    plain = auto.from_pretrained(out, config=runtime_config(out, fuse=False))
    for module, one in list(layers_of(plain)):
        parent, _, leaf = module.rpartition(".")
        setattr(plain.get_submodule(parent), leaf, There(one))
    plain = plain.cuda()
    settings = {
        "attention_mask": torch.ones_like(prompt),
        "max_new_tokens": 16,
        "do_sample": False,
        "pad_token_id": 0,
    }
    expected = plain.generate(prompt, **settings)
    assert torch.equal(alone.generate(prompt, **settings), expected)
    assert torch.equal(model.generate(prompt, **settings), expected)
    release_weights(model)
    assert torch.equal(model.generate(prompt, **settings), expected)


class TestJax:
    @pytest.fixture(autouse=True)
    def jax(self):
        jax = pytest.importorskip("jax")
        if jax.default_backend() != "gpu":
            pytest.skip("this JAX sees no GPU")
        return jax

    @pytest.fixture(params=BACKENDS)
    def plan(self, request):
        with ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", backend=request.param) as made:
            yield made

    @pytest.mark.parametrize("kind", FLOATS)
    def test_under_jit_where_the_buffers_are(self, jax, plan, kind):
        from slidesparse_rt.jax import sparse_matmul

        x = jax.numpy.asarray(data(1, (3, M, K))).astype(kind)
        with ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", device="cpu") as exact:
            expected = exact.run(np.asarray(x))
            doubled = exact.run(2 * np.asarray(x))
        product = jax.jit(lambda x: sparse_matmul(x, plan))
        for _ in range(3):
            found = product(x)
            assert {one.platform for one in found.devices()} == {"gpu"}
            assert_same(np.asarray(found), expected)
        assert_same(np.asarray(sparse_matmul(x, plan)), expected)
        mapped = jax.jit(jax.vmap(lambda x: sparse_matmul(2 * x, plan)))
        assert_same(np.asarray(mapped(x)), doubled)

    def test_many_calls_in_one_program(self, jax, plan):
        """Each waits for the one before on XLA's stream, and reads what it wrote."""
        from slidesparse_rt.jax import sparse_matmul

        square = ss.SparseGemmPlan(weight(3, K, K, "6:8") / 8, "6:8", backend=plan.backend)

        @jax.jit
        def program(x):
            for _ in range(20):
                x = jax.numpy.clip(sparse_matmul(x, square), -1, 1)
            return x

        x = jax.numpy.asarray(data(1, (M, K)))
        found = x
        for _ in range(20):
            found = jax.numpy.clip(sparse_matmul(found, square), -1, 1)
        assert_same(np.asarray(program(x)), np.asarray(found))
        square.close()

    def test_the_other_route_is_refused(self, jax, plan):
        from slidesparse_rt.jax import sparse_matmul

        x = jax.numpy.asarray(data(1, (M, K)))
        with pytest.raises(ss.DeviceError, match="host memory, and the plan is on cuda:0"):
            jax.jit(lambda x: sparse_matmul(x, plan, route="callback"))(x)
