"""Plans on the CPU: every kind of array in and out, and the ones that are refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from plans import fitted, tokens
from strategies import (
    BFLOAT16,
    LAYOUTS,
    OPERAND_NAMES,
    Array,
    same_bits,
)

import slidesparse_rt as ss
from slidesparse_rt.dtypes import operand

#: These tests are about machines without a GPU, also where there is one.
pytestmark = pytest.mark.usefixtures("no_gpu")

# Kinds of arrays


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_torch_in_torch_out(kind: str, small: ss.SparseGemmPlan) -> None:
    import torch

    plain = tokens(2, 3, 16, dtype=np.dtype(kind) if kind != "bfloat16" else BFLOAT16)
    x = torch.from_numpy(plain.astype(np.float32)).to(getattr(torch, kind))
    before = x.clone()
    y = small.run(x)
    assert isinstance(y, torch.Tensor)
    assert y.dtype == x.dtype
    assert tuple(y.shape) == (2, 3, 4)
    assert y.float().tolist() == small.run(plain).astype(np.float32).tolist()
    assert torch.equal(x, before)
    permuted = x.permute(1, 0, 2)
    assert torch.equal(small.run(permuted), y.permute(1, 0, 2))


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_jax_in_jax_out(kind: str, small: ss.SparseGemmPlan) -> None:
    import jax
    import jax.numpy as jnp

    plain = tokens(2, 3, 16, dtype=np.dtype(kind) if kind != "bfloat16" else BFLOAT16)
    y = small.run(jnp.asarray(plain))
    assert isinstance(y, jax.Array)
    assert same_bits(np.asarray(y), small.run(plain))


def test_weights_and_biases_of_every_kind() -> None:
    import jax.numpy as jnp
    import torch

    weight, bias, x = fitted("6:8", 4, 16), tokens(4), tokens(2, 16)
    expected = ss.sparse_matmul(x, weight, "6:8", bias=bias)
    layer = torch.nn.Linear(16, 4)
    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(weight))
        layer.bias.copy_(torch.from_numpy(bias))
    pairs = [
        (torch.from_numpy(weight), torch.from_numpy(bias)),
        (layer.weight, layer.bias),
        (jnp.asarray(weight), jnp.asarray(bias)),
        (torch.from_numpy(weight), jnp.asarray(bias)),
        (ss.SparseWeight.from_array(weight, "6:8"), bias[::-1].copy()[::-1]),
    ]
    for given_weight, given_bias in pairs:
        pattern = None if isinstance(given_weight, ss.SparseWeight) else "6:8"
        with ss.SparseGemmPlan(given_weight, pattern, bias=given_bias) as made:
            assert same_bits(made.run(x), expected)


def test_the_plan_does_not_lean_on_the_callers_arrays() -> None:
    weight, bias, x = fitted("6:8", 4, 16), tokens(4), tokens(2, 16)
    for dtype in OPERAND_NAMES:
        own = weight.astype(operand(dtype).dtype) if dtype in ("bf16", "fp16") else weight.copy()
        own_bias = bias.copy()
        made = ss.SparseGemmPlan(own, "6:8", dtype=dtype, bias=own_bias)
        before = made.run(x)
        own[...] = 0
        own_bias[...] = 0
        assert same_bits(made.run(x), before)


def test_any_dlpack_array_is_taken() -> None:
    class Foreign:
        def __init__(self, held: Array) -> None:
            self.held = held

        def __dlpack__(self, **options: Any) -> Any:
            return self.held.__dlpack__(**options)

        def __dlpack_device__(self) -> tuple[int, int]:
            return self.held.__dlpack_device__()

    weight, x = fitted("6:8", 4, 16), tokens(2, 16)
    expected = ss.sparse_matmul(x, weight, "6:8")
    y = ss.sparse_matmul(Foreign(x), weight, "6:8", bias=Foreign(np.zeros(4, np.float32)))
    assert isinstance(y, np.ndarray)
    np.testing.assert_array_equal(y, expected)
    assert same_bits(ss.sparse_matmul(x, Foreign(weight), "6:8"), expected)


# Output arrays


def outputs() -> dict[str, Array]:
    """Writable float32 arrays of shape (3, 4) in different layouts."""
    return {
        "contiguous": np.full((3, 4), 9, np.float32),
        "fortran": np.full((4, 3), 9, np.float32).T,
        "slice": np.full((5, 9), 9, np.float32)[1:4, 2:6],
        "strided": np.full((6, 8), 9, np.float32)[::2, ::2],
        "reversed": np.full((3, 4), 9, np.float32)[::-1, ::-1],
        "unaligned": np.zeros(3 * 4 * 4 + 1, np.uint8)[1:].view(np.float32).reshape(3, 4),
    }


@pytest.mark.parametrize("layout", sorted(outputs()))
def test_out_is_written_and_returned(layout: str, small: ss.SparseGemmPlan) -> None:
    out = outputs()[layout]
    base = out.base if out.base is not None else out
    size = base.nbytes
    untouched = base.copy()
    x = tokens(3, 16)
    assert small.run(x, out=out) is out
    assert same_bits(np.ascontiguousarray(out), small.run(x))
    out[...] = 9 if layout != "unaligned" else 0
    assert base.nbytes == size
    assert (base == untouched).all()  # nothing beside the slice was written


@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_torch_outputs_are_written_in_place(kind: str, small: ss.SparseGemmPlan) -> None:
    import torch

    dtype = getattr(torch, kind)
    x = torch.from_numpy(tokens(3, 16)).to(dtype)
    expected = small.run(x)
    wide = torch.full((5, 9), 9, dtype=dtype)
    for out in (
        torch.empty(3, 4, dtype=dtype),
        torch.empty(4, 3, dtype=dtype).t(),
        wide[1:4, 2:6],
        torch.empty(6, 8, dtype=dtype)[::2, ::2],
    ):
        address = out.data_ptr()
        assert small.run(x, out=out) is out
        assert out.data_ptr() == address
        assert torch.equal(out, expected)
    wide[1:4, 2:6] = 9
    assert (wide == 9).all()


def test_out_may_be_of_another_library(small: ss.SparseGemmPlan) -> None:
    import torch

    x = tokens(3, 16)
    out = torch.empty(3, 4)
    assert small.run(x, out=out) is out
    assert same_bits(out.numpy(), small.run(x))


def test_out_has_the_plans_type_when_it_has_one() -> None:
    weight, x = fitted("6:8", 4, 16), tokens(3, 16)
    made = ss.SparseGemmPlan(weight, "6:8", out_dtype="float16")
    out = np.empty((3, 4), np.float16)
    assert same_bits(made.run(x, out=out), ss.sparse_matmul(x, weight, "6:8").astype(np.float16))
    with pytest.raises(ss.DTypeError, match="out is float32; the result is float16"):
        made.run(x, out=np.empty((3, 4), np.float32))


def test_outputs_that_are_refused(small: ss.SparseGemmPlan) -> None:
    import jax.numpy as jnp
    import torch

    x = tokens(3, 16)
    read_only = LAYOUTS["read-only"](np.zeros((3, 4), np.float32))
    cases: list[tuple[Any, type[Exception], str]] = [
        (np.zeros((4, 3), np.float32), ss.ShapeError, r"out has shape \(4, 3\); .* \(3, 4\)"),
        (np.zeros((3, 5), np.float32), ss.ShapeError, r"\(3, 5\)"),
        (np.zeros(12, np.float32), ss.ShapeError, r"\(12,\)"),
        (np.zeros((3, 4), np.float16), ss.DTypeError, "out is float16; the result is float32"),
        (np.zeros((3, 4), np.float64), ss.DTypeError, "float64"),
        (np.zeros((3, 4), np.int32), ss.DTypeError, "int32"),
        (read_only, ss.ArrayError, "read-only"),
        (jnp.zeros((3, 4)), ss.ArrayError, "JAX array, which is immutable; omit out="),
        (torch.zeros(1, 4).expand(3, 4), ss.ArrayError, "elements share memory"),
        (torch.zeros(3, 4, device="meta"), ss.DeviceError, "out is on torch device 'meta'"),
        (torch.zeros(3, 4).to_sparse(), ss.ArrayError, "layout torch.sparse_coo"),
        ([[0.0] * 4] * 3, ss.ArrayError, "list is no array"),
    ]
    for out, error, says in cases:
        with pytest.raises(error, match=says):
            small.run(x, out=out)
    assert (read_only == 0).all()


def test_out_that_is_x_is_refused() -> None:
    weight = fitted("6:8", 16, 16)
    x = tokens(16, 16)
    before = x.copy()
    for out in (x, x.T, x[::-1]):
        with pytest.raises(ss.ArrayError, match="out shares memory with x"):
            ss.sparse_matmul(x, weight, "6:8", out=out)
    import torch

    tensor = torch.from_numpy(x)
    with pytest.raises(ss.ArrayError, match="out shares memory with x"):
        ss.sparse_matmul(tensor, weight, "6:8", out=tensor)
    assert same_bits(x, before)


def test_a_big_endian_out_is_refused_and_not_dropped(small: ss.SparseGemmPlan) -> None:
    out = np.full((3, 4), 7, ">f4")
    with pytest.raises(ss.SlideSparseError, match="out"):
        small.run(tokens(3, 16), out=out)


def test_a_negative_view_as_out_is_refused_and_not_dropped(small: ss.SparseGemmPlan) -> None:
    import torch

    out = torch.zeros(3, 4, dtype=torch.complex64).conj().imag
    assert out.is_neg()
    with pytest.raises(ss.SlideSparseError, match="out"):
        small.run(torch.ones(3, 16), out=out)


def test_bad_x_leaves_out_alone(small: ss.SparseGemmPlan) -> None:
    out = np.full((3, 4), 7, np.float32)
    with pytest.raises(ss.ShapeError):
        small.run(tokens(3, 15), out=out)
    assert (out == 7).all()


# x that is refused


def test_x_that_is_refused(small: ss.SparseGemmPlan) -> None:
    import torch

    cases: list[tuple[Any, type[Exception], str]] = [
        (
            np.float32(1),
            ss.ShapeError,
            r"x has shape \(\); allowed is \(..., 16\): the last extent",
        ),
        (np.zeros((2, 15), np.float32), ss.ShapeError, r"x has shape \(2, 15\); .*\(..., 16\)"),
        (np.zeros((16, 2), np.float32), ss.ShapeError, r"\(16, 2\)"),
        (np.zeros((2, 0), np.float32), ss.ShapeError, r"\(2, 0\)"),
        (np.zeros((2, 16)), ss.DTypeError, "x has dtype float64 .* convert the array first"),
        (np.zeros((2, 16), np.int8), ss.DTypeError, "x has dtype int8"),
        (np.zeros((2, 16), np.int64), ss.DTypeError, "x has dtype int64"),
        (np.zeros((2, 16), complex), ss.DTypeError, "x has dtype complex128"),
        (torch.zeros(2, 16, dtype=torch.float64), ss.DTypeError, "x has dtype float64"),
        (torch.zeros(2, 16, dtype=torch.int8), ss.DTypeError, "x has dtype int8"),
        ([[0.0] * 16], ss.ArrayError, "list is no array"),
        (None, ss.ArrayError, "NoneType is no array"),
        (np.ma.zeros((2, 16), np.float32), ss.ArrayError, r"x is a masked array"),
        (torch.zeros(2, 16).to_sparse(), ss.ArrayError, "x is a torch tensor of layout"),
        (torch.zeros(2, 16, device="meta"), ss.DeviceError, "x is on torch device 'meta'"),
    ]
    for x, error, says in cases:
        with pytest.raises(error, match=says):
            small.run(x)


def test_x_on_a_gpu_is_refused_by_a_plan_on_the_cpu(small: ss.SparseGemmPlan) -> None:
    class OnGpu:
        shape = (2, 16)

        def __dlpack__(self, **options: Any) -> Any:
            raise AssertionError("never read")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 1)

    with pytest.raises(
        ss.DeviceError, match=r"x is on cuda:1, .* plan is on cpu; .*device='cuda:1'"
    ):
        small.run(OnGpu())


def test_jax_transformations_are_refused_by_name(small: ss.SparseGemmPlan) -> None:
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(tokens(2, 16))
    for traced in (
        jax.jit(small.run),
        jax.grad(lambda x: small.run(x).sum()),
        jax.vmap(small.run),
        jax.jit(lambda x: ss.sparse_matmul(x, fitted("6:8", 4, 16), "6:8")),
    ):
        with pytest.raises(ss.ArrayError, match=r"x is a JAX tracer: .*jax.pure_callback"):
            traced(x)
    with pytest.raises(ss.ArrayError, match="weight is a JAX tracer"):
        jax.jit(lambda w: ss.SparseGemmPlan(w, "6:8").shape)(jnp.asarray(fitted("6:8", 4, 16)))


def test_the_advice_for_jax_works(small: ss.SparseGemmPlan) -> None:
    import jax
    import jax.numpy as jnp

    x = jnp.asarray(tokens(2, 16))
    shape = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    found = jax.jit(lambda x: jax.pure_callback(lambda x: np.asarray(small.run(x)), shape, x))(x)
    assert same_bits(np.asarray(found), np.asarray(small.run(x)))


def test_autograd_is_refused_where_it_would_be_silently_wrong(small: ss.SparseGemmPlan) -> None:
    import torch

    x = torch.ones(2, 16, requires_grad=True)
    for given_ in (x, x * 2):
        with pytest.raises(ss.ArrayError, match=r"x requires a gradient.*torch\.no_grad\(\)"):
            small.run(given_)
        with pytest.raises(ss.ArrayError, match=r"x\.detach\(\)"):
            ss.sparse_matmul(given_, fitted("6:8", 4, 16), "6:8")
    expected = small.run(torch.ones(2, 16))
    with torch.no_grad():
        assert torch.equal(small.run(x), expected)
        assert not small.run(x).requires_grad
    with torch.inference_mode():
        assert torch.equal(small.run(x), expected)
    assert torch.equal(small.run(x.detach()), expected)


def test_a_stream_on_the_cpu_is_refused(small: ss.SparseGemmPlan) -> None:
    for stream in (0, 1, object()):
        with pytest.raises(ss.OptionError, match="stream is given, but this plan runs on the CPU"):
            small.run(tokens(2, 16), stream=stream)
