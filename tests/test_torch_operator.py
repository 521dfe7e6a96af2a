"""The operator slidesparse::linear under PyTorch's tracers, and eagerly beside them."""

from __future__ import annotations

import gc
import io
from typing import Any

import pytest
import torch
from fake_quantized import fake_quantized
from test_torch_layer import K, N, layer, same, tokens
from torch.library import opcheck
from torch.utils._python_dispatch import TorchDispatchMode

import slidesparse_rt as ss
from slidesparse_rt.integrations import torch_op
from slidesparse_rt.integrations.torch_call import arguments
from slidesparse_rt.torch import SlideSparseLinear, fuse, sparsify

OP = torch.ops.slidesparse.linear.default
pytestmark = [
    # What PyTorch's own modules warn of when they are imported or trace.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Attention(torch.nn.Module):
    """Two fused layers, and one that takes their outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = layer(0, n=K), layer(1, n=K), layer(2)
        fuse(self.a, self.b)

    def forward(self, x: Any) -> Any:
        return self.c(torch.relu(self.a(x)) * self.b(x))


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("bias", [True, False])
def test_opcheck(dtype: str, bias: bool) -> None:
    made = layer(dtype=dtype, bias=bias)
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    checks += ("test_aot_dispatch_dynamic",)
    if dtype == "fp8_e4m3":
        checks = checks[1:]  # PyTorch's own comparison of tensors does not know fp8
    for x in (tokens(3, K), tokens(2, 3, K, dtype=torch.bfloat16), tokens(K), tokens(K, 5).T):
        opcheck(OP, (x, *arguments((made,))), test_utils=checks)


def test_opcheck_of_several_layers_and_a_static_scale() -> None:
    parts = (layer(0), layer(1, n=5))
    opcheck(OP, (tokens(3, K), *arguments(parts)))
    static = SlideSparseLinear(K, N, pattern="6:8", static_input=True)
    opcheck(OP, (tokens(3, K), *arguments((static,))))


def test_the_operator_refuses_gradients() -> None:
    made = layer()
    x = tokens(3, K).requires_grad_()
    with pytest.raises(ss.ArrayError, match="requires a gradient"):
        OP(x, *arguments((made,)))
    with torch.no_grad():
        assert same(OP(x, *arguments((made,))), made(x))
    compiled = torch.compile(made, fullgraph=True, backend="aot_eager")
    with pytest.raises(Exception, match="requires a gradient"):
        compiled(x)


def test_shapes_without_values() -> None:
    made = layer()
    mode = torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True)
    with mode:
        y = made(torch.empty(4, 3, K, dtype=torch.bfloat16))
        assert (y.shape, y.dtype) == ((4, 3, N), torch.bfloat16)
        with pytest.raises(ss.ShapeError, match=r"x has shape \(4, 8\); allowed is \(..., 40\)"):
            made(torch.empty(4, 8))
        with pytest.raises(ss.DTypeError, match="int64"):
            made(torch.empty(4, K, dtype=torch.int64))


@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16])
def test_compile_in_one_graph(kind: Any) -> None:
    model = Attention()
    x = tokens(3, K, dtype=kind)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (3, 1, 7):
        x = tokens(rows, K, dtype=kind, seed=rows)
        assert same(compiled(x), model(x))
    model.c.weight.zero_()
    model.c.bias.fill_(2)
    assert torch.equal(compiled(x), torch.full((7, N), 2, dtype=kind))


def test_compile_with_inductor() -> None:
    model = Attention()
    x = tokens(3, K)
    expected = model(x)
    with torch.inference_mode():
        compiled = torch.compile(model, fullgraph=True)
        assert same(compiled(x), expected)


def test_a_fused_group_is_one_node_of_the_graph() -> None:
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    model = Attention()
    x = tokens(3, K)
    compiled = torch.compile(model, fullgraph=True, backend=keep)
    assert same(compiled(x), model(x))
    nodes = [node for node in graphs[0].graph.nodes if "slidesparse" in str(node.target)]
    assert len(nodes) == 2
    assert model.a._shared._traced is None
    assert same(compiled(2 * x), model(2 * x))
    assert len(graphs) == 1


def test_layers_of_one_shape_share_a_graph() -> None:
    """The graph names no layer: compiling one serves the others, however many there are."""
    graphs: list[Any] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    def run(one: Any, x: Any) -> Any:
        return one(x) + 1

    compiled = torch.compile(run, fullgraph=True, backend=keep)
    x = tokens(3, K)
    for seed in range(12):
        one = layer(seed)
        assert same(compiled(one, x), one(x) + 1)
    assert len(graphs) == 1


@pytest.mark.parametrize("strict", [False, True])
def test_export(strict: bool) -> None:
    """The program holds the layer's tensors, so it is whole: it can be saved, and loaded."""
    model = Attention()
    x = tokens(3, K)
    tokens_dim = torch.export.Dim("tokens", min=2, max=64)
    with torch.no_grad():
        program = torch.export.export(model, (x,), dynamic_shapes=({0: tokens_dim},), strict=strict)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    loaded = torch.export.load(file).module()
    for rows in (3, 9):
        x = tokens(rows, K, seed=rows)
        assert same(program.module()(x), model(x))
        assert same(loaded(x), model(x))


def test_an_exported_program_keeps_its_plans() -> None:
    model = torch.export.export(layer(), (tokens(3, K),)).module()
    gc.collect()
    torch_op._ENTRIES.clear()
    for _ in range(3):
        model(tokens(3, K))
    assert len(torch_op._ENTRIES) == 1


def test_vmap_maps_over_tokens() -> None:
    made = layer()
    x = tokens(4, 3, K)
    assert same(torch.vmap(made)(x), made(x))
    assert same(torch.vmap(made, in_dims=1)(x), made(x).movedim(1, 0))
    with pytest.raises(ss.ShapeError, match="only x can be mapped"):
        torch.vmap(
            lambda scale, x: OP(x, [made.weight], [scale], [made.bias], None, *made._settings)
        )(made.weight_scale.expand(4, N, 1), x)


def test_modes_that_listen_to_operators_see_this_one() -> None:
    seen: list[str] = []

    class Listen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            seen.append(str(func))
            return func(*args, **(kwargs or {}))

    made = layer()
    x = tokens(3, K)
    expected = made(x)
    with Listen():
        assert same(made(x), expected)
    assert "slidesparse.linear.default" in seen


def test_a_sparsified_transformer_compiles() -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(16, 48), torch.nn.GELU(), torch.nn.LayerNorm(48), torch.nn.Linear(48, 8)
    ).requires_grad_(False)
    sparsify(model, "4:6")
    x = tokens(5, 16)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert same(compiled(x), model(x))
    exact = torch.nn.Sequential(fake_quantized(model[0]), *model[1:3], fake_quantized(model[3]))
    assert same(model(x), exact(x))
