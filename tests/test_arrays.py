"""Array intake and return: whose memory, which kinds, and what is refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import BFLOAT16, FLOATS, LAYOUTS, Array, floats, layouts, same_bits

import slidesparse_rt as ss
from slidesparse_rt.arrays import (
    CPU,
    Device,
    as_matrix,
    device_of,
    library_of,
    overlaps_itself,
    to_numpy,
    wrap_numpy,
    writable_numpy,
)
from slidesparse_rt.dtypes import array_type


class Foreign:
    """An array of a library that nobody has heard of: DLPack and nothing else."""

    def __init__(self, held: Array, device: tuple[int, int] | None = None) -> None:
        self.held = held
        self.place = device

    def __dlpack__(self, **options: Any) -> Any:
        return self.held.__dlpack__(**options)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.place or self.held.__dlpack_device__()


def torch_of(values: Array) -> Any:
    """The same numbers as a torch tensor of the same type."""
    import torch

    return torch.from_numpy(np.array(values, np.float32)).to(getattr(torch, values.dtype.name))


# Devices


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        ("cpu", "cpu"),
        ("cpu:0", "cpu"),
        ("cuda", "cuda:0"),
        ("cuda:3", "cuda:3"),
        (0, "cuda:0"),
        (2, "cuda:2"),
        (Device("cuda", 1), "cuda:1"),
        (CPU, "cpu"),
    ],
)
def test_devices_that_are_known(spec: object, expected: str) -> None:
    assert str(Device.parse(spec)) == expected


def test_torch_devices_are_known() -> None:
    import torch

    assert Device.parse(torch.device("cuda:1")) == Device("cuda", 1)
    assert Device.parse(torch.device("cuda")) == Device("cuda", 0)
    assert Device.parse(torch.device("cpu")) == CPU


@pytest.mark.parametrize(
    "spec", ["gpu", "cuda:", "cuda:x", "cuda:-1", "", -1, True, 1.0, None, "mps"]
)
def test_devices_that_are_not(spec: object) -> None:
    with pytest.raises(ss.DeviceError, match="allowed are 'cpu', 'cuda', 'cuda:<index>'") as caught:
        Device.parse(spec)
    assert repr(spec) in str(caught.value)


# Libraries


def test_libraries_by_type() -> None:
    import jax.numpy as jnp
    import torch

    class Own(np.ndarray):
        pass

    assert library_of(np.zeros(1)) == "numpy"
    assert library_of(np.zeros(1).view(Own)) == "numpy"
    assert library_of(np.float32(1)) == "numpy"
    assert library_of(BFLOAT16.type(1)) == "numpy"
    assert library_of(torch.zeros(1)) == "torch"
    assert library_of(torch.nn.Parameter(torch.zeros(1))) == "torch"
    assert library_of(jnp.zeros(1)) == "jax"
    assert library_of(Foreign(np.zeros(1))) == "dlpack"


@pytest.mark.parametrize("thing", [[1.0], (1.0,), 1.0, "x", None, {}, object(), memoryview(b"ab")])
def test_things_that_are_no_arrays(thing: object) -> None:
    for call in (library_of, device_of, to_numpy):
        with pytest.raises(ss.ArrayError) as caught:
            call(thing)  # type: ignore[operator]
        assert f"{type(thing).__name__} is no array" in str(caught.value)
        assert "numpy.asarray(" in str(caught.value)


def test_things_of_an_array_library_that_are_no_arrays() -> None:
    """A layer instead of its weight is an easy slip; each is an error of ours that names it."""
    import jax
    import torch

    class Model(torch.nn.Module):
        pass

    things = [
        torch.nn.Linear(2, 2),
        Model(),
        torch.float32,
        torch.device("cpu"),
        jax.ShapeDtypeStruct((2, 4), "float32"),
        np.dtype("f4"),
        np.random.default_rng(0),
    ]
    for thing in things:
        with pytest.raises(ss.SlideSparseError, match=f"{type(thing).__name__}|not supported"):
            to_numpy(thing, "weight")


# Intake


@given(floats, layouts)
def test_numpy_arrays_are_viewed_not_copied(dtype: np.dtype, layout: str) -> None:
    values = LAYOUTS[layout](np.arange(12).reshape(3, 4).astype(dtype))
    view = to_numpy(values)
    assert np.shares_memory(view, values)
    assert view.strides == values.strides
    assert same_bits(view, values)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_torch_tensors_are_viewed_not_copied(dtype: np.dtype) -> None:
    tensor = torch_of(np.arange(24).reshape(4, 6).astype(dtype))
    for given_ in (tensor, tensor.t(), tensor[1:, ::2], tensor[0], tensor[:, 3:4].expand(4, 5)):
        view = to_numpy(given_)
        assert view.dtype == dtype
        assert view.shape == tuple(given_.shape)
        assert view.strides == tuple(step * dtype.itemsize for step in given_.stride())
        assert view.__array_interface__["data"][0] == given_.data_ptr()
        assert view.astype(np.float32).tolist() == given_.float().tolist()
    to_numpy(tensor)[1, 2] = 77
    assert tensor[1, 2] == 77


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_jax_arrays_are_viewed_not_copied(dtype: np.dtype) -> None:
    import jax.numpy as jnp

    array = jnp.asarray(np.arange(64).reshape(4, 16).astype(dtype)) + jnp.zeros((), dtype)
    view = to_numpy(array)
    assert view.dtype == dtype
    assert view.__array_interface__["data"][0] == array.unsafe_buffer_pointer()
    assert not view.flags.writeable


@pytest.mark.parametrize("dtype", [np.float32, np.float16])
def test_dlpack_arrays_are_viewed_not_copied(dtype: Any) -> None:
    values = np.arange(6).astype(dtype)
    view = to_numpy(Foreign(values))
    assert np.shares_memory(view, values)
    assert device_of(Foreign(values)) == CPU


def test_dlpack_devices() -> None:
    values = np.zeros(2, np.float32)
    assert device_of(Foreign(values, (3, 0))) == CPU  # pinned
    assert device_of(Foreign(values, (2, 1))) == Device("cuda", 1)
    assert device_of(Foreign(values, (13, 0))) == Device("cuda", 0)  # managed
    with pytest.raises(
        ss.DeviceError, match="x is on DLPack device type 10; allowed are CPU and CUDA"
    ):
        device_of(Foreign(values, (10, 0)), "x")
    with pytest.raises(ss.DeviceError, match="x is on cuda:1, but a CPU array is needed; move it"):
        to_numpy(Foreign(values, (2, 1)), "x")


def test_dlpack_that_fails_is_an_array_error() -> None:
    class Broken(Foreign):
        def __dlpack__(self, **options: Any) -> Any:
            raise BufferError("sold out")

    with pytest.raises(ss.ArrayError, match=r"x of type Broken could not be read .*: sold out"):
        to_numpy(Broken(np.zeros(2, np.float32)), "x")
    with pytest.raises(ss.SlideSparseError):
        to_numpy(Foreign(np.zeros(2, BFLOAT16)), "x")  # NumPy exports no bfloat16
    with pytest.raises(ss.DTypeError, match="x has dtype int32 is not supported"):
        to_numpy(Foreign(np.zeros(2, np.int32)), "x")


def test_big_endian_arrays_are_converted() -> None:
    values = np.arange(6, dtype=">f4").reshape(2, 3)
    view = to_numpy(values)
    assert view.dtype == np.float32
    assert view.dtype.isnative
    assert view.tolist() == values.tolist()


@pytest.mark.parametrize(
    "dtype",
    [np.float64, np.int8, np.int32, np.uint8, bool, complex, "U1", object, np.longdouble, "M8[s]"],
)
def test_numpy_types_that_are_refused(dtype: Any) -> None:
    values = np.zeros((2, 4), dtype)
    with pytest.raises(ss.DTypeError) as caught:
        to_numpy(values, "x")
    assert "x has dtype" in str(caught.value)
    assert "allowed are float32, float16, bfloat16; convert the array first" in str(caught.value)


@pytest.mark.parametrize(
    "dtype", ["float64", "int8", "int32", "bool", "complex64", "float8_e4m3fn"]
)
def test_torch_and_jax_types_that_are_refused(dtype: str) -> None:
    import jax.numpy as jnp
    import torch

    with pytest.raises(ss.DTypeError, match=f"x has dtype {dtype} is not supported"):
        to_numpy(torch.zeros((2, 4)).to(getattr(torch, dtype)), "x")
    if dtype != "float64":  # JAX makes float32 of it
        with pytest.raises(ss.DTypeError, match=f"x has dtype {dtype} is not supported"):
            to_numpy(jnp.zeros((2, 4), dtype), "x")


def test_masked_arrays_are_refused() -> None:
    masked = np.ma.masked_array(np.ones((2, 4), np.float32), np.eye(2, 4))
    with pytest.raises(ss.ArrayError, match=r"x is a masked array, .*: x\.filled\(0\)"):
        to_numpy(masked, "x")


def test_torch_tensors_that_are_no_plain_arrays() -> None:
    import torch

    dense = torch.eye(4)
    layouts = {
        "torch.sparse_coo": dense.to_sparse(),
        "torch._mkldnn": dense.to_mkldnn(),
    }
    for name, tensor in layouts.items():
        with pytest.raises(
            ss.ArrayError, match=rf"layout {name}; pass a dense one: x\.to_dense\(\)"
        ):
            to_numpy(tensor, "x")
    with pytest.raises(
        ss.DeviceError, match="x is on torch device 'meta'; allowed are cpu and cuda"
    ):
        to_numpy(torch.zeros(2, 4, device="meta"), "x")


def test_torch_tensors_without_memory_of_their_own_are_errors_of_ours() -> None:
    import torch

    seen: list[BaseException] = []

    def inside(row: Any) -> Any:
        with pytest.raises(ss.ArrayError, match="x ") as caught:
            to_numpy(row, "x")
        seen.append(caught.value)
        return row

    torch.vmap(inside)(torch.ones(3, 4))
    assert seen


def test_torch_negative_views_are_read_right() -> None:
    import torch

    conjugate = torch.complex(torch.ones(2, 3), torch.full((2, 3), 5.0)).conj()
    assert conjugate.imag.is_neg()
    assert to_numpy(conjugate.imag).tolist() == [[-5.0] * 3] * 2


def test_torch_tensors_that_require_a_gradient_are_read() -> None:
    import torch

    tensor = torch.ones(2, 3, requires_grad=True)
    assert to_numpy(tensor).tolist() == [[1, 1, 1], [1, 1, 1]]


def test_jax_tracers_are_refused() -> None:
    import jax
    import jax.numpy as jnp

    for transform in (jax.jit, jax.grad, jax.vmap):
        with pytest.raises(ss.ArrayError, match=r"x is a JAX tracer: .*jax\.pure_callback"):
            transform(lambda x: to_numpy(x, "x").sum())(jnp.ones(3))


def test_deleted_jax_arrays_are_errors_of_ours() -> None:
    import jax.numpy as jnp

    array = jnp.ones((2, 4)) + 1
    array.delete()
    with pytest.raises(ss.ArrayError, match="deleted"):
        to_numpy(array, "x")


def test_jax_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    import jax.numpy as jnp

    array = jnp.ones(3)
    assert device_of(array) == CPU

    class Place:
        def __init__(self, platform: str, local_hardware_id: int | None) -> None:
            self.platform = platform
            self.local_hardware_id = local_hardware_id

    def placed(*places: Place) -> Any:
        class Fake:
            def devices(self) -> set[Place]:
                return set(places)

        Fake.__module__, Fake.__name__ = "jaxlib", "ArrayImpl"
        return Fake()

    assert device_of(placed(Place("gpu", 2))) == Device("cuda", 2)
    assert device_of(placed(Place("cuda", None))) == Device("cuda", 0)
    with pytest.raises(ss.DeviceError, match="x is on JAX platform 'tpu'; allowed are cpu and gpu"):
        device_of(placed(Place("tpu", 0)), "x")
    with pytest.raises(ss.DeviceError, match="x is spread over 2 JAX devices; gather it on one"):
        device_of(placed(Place("gpu", 0), Place("gpu", 1)), "x")


def test_devices_of_gpu_libraries() -> None:
    """The two lines that read CuPy's and Numba's device arrays, on stand-ins."""

    class Number:
        id = 3

    class CuPyArray:
        device = Number

    class NumbaArray:
        class gpu_data:  # noqa: N801
            class context:  # noqa: N801
                device = Number

    CuPyArray.__module__, CuPyArray.__name__ = "cupy", "ndarray"
    NumbaArray.__module__, NumbaArray.__name__ = "numba.cuda", "DeviceNDArrayBase"
    for kind in (CuPyArray, NumbaArray):
        assert device_of(kind()) == Device("cuda", 3)
        with pytest.raises(ss.DeviceError, match="weight is on cuda:3, but a CPU array"):
            to_numpy(kind(), "weight")


def test_matrices() -> None:
    values = np.ones((2, 3), np.float32)
    assert as_matrix(values, "x", "(M, K)") is not None
    with pytest.raises(
        ss.ShapeError, match=r"x has 1 dimensions, shape \(3,\); allowed is 2, \(M, K\)"
    ):
        as_matrix(values[0], "x", "(M, K)")
    with pytest.raises(ss.ShapeError, match=r"x is empty, shape \(0, 3\); each extent of \(M, K\)"):
        as_matrix(values[:0], "x", "(M, K)")


# Return


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.int8), np.dtype("float8_e4m3fn")], ids=str)
def test_results_share_memory_with_torch(dtype: np.dtype) -> None:
    import torch

    values = np.arange(6).reshape(2, 3).astype(dtype)
    tensor = wrap_numpy(values, torch.zeros(1))
    assert tensor.dtype == getattr(torch, dtype.name)
    assert tensor.data_ptr() == values.__array_interface__["data"][0]
    assert tensor.float().tolist() == values.astype(np.float32).tolist()


@pytest.mark.parametrize("dtype", [*FLOATS, np.dtype(np.int8), np.dtype("float8_e4m3fn")], ids=str)
def test_results_become_jax_arrays(dtype: np.dtype) -> None:
    import jax
    import jax.numpy as jnp

    values = np.arange(6).reshape(2, 3).astype(dtype)
    like = jnp.zeros(1)
    array = wrap_numpy(values, like)
    assert isinstance(array, jax.Array)
    assert array.devices() == like.devices()
    assert same_bits(np.asarray(array), values)


def test_results_for_numpy_and_strangers_are_numpy() -> None:
    values = np.zeros(3, np.float32)
    assert wrap_numpy(values, np.zeros(1)) is values
    assert wrap_numpy(values, Foreign(values)) is values


# Output


def writable(out: Any, shape: tuple[int, ...] = (2, 3), x: Array | None = None) -> Array:
    return writable_numpy(
        out, shape, array_type("float32"), np.zeros(4, np.float32) if x is None else x
    )


def test_outputs_are_viewed_not_copied() -> None:
    import torch

    for out in (
        np.zeros((2, 3), np.float32),
        np.zeros((3, 2), np.float32).T,
        np.zeros((4, 9), np.float32)[::2, ::3],
        np.zeros((2, 3), np.float32)[::-1, ::-1],
    ):
        view = writable(out)
        view[...] = 7
        assert (out == 7).all()
    tensor = torch.zeros(4, 6)[::2, ::2]
    writable(tensor)[...] = 7
    assert (tensor == 7).all()
    stranger = Foreign(np.zeros((2, 3), np.float32))
    writable(stranger)[...] = 7
    assert (stranger.held == 7).all()


@pytest.mark.parametrize(
    ("out", "error", "says"),
    [
        (np.zeros((3, 2), np.float32), ss.ShapeError, r"out has shape \(3, 2\); .* shape \(2, 3\)"),
        (np.zeros(6, np.float32), ss.ShapeError, r"shape \(6,\)"),
        (np.zeros((1, 2, 3), np.float32), ss.ShapeError, r"shape \(1, 2, 3\)"),
        (np.zeros((2, 3), np.float16), ss.DTypeError, "out is float16; the result is float32"),
        (np.zeros((2, 3)), ss.DTypeError, "out has dtype float64"),
        (
            np.broadcast_to(np.float32(0), (2, 3)),
            ss.ArrayError,
            "out is read-only; pass a writable",
        ),
        (LAYOUTS["read-only"](np.zeros((2, 3), np.float32)), ss.ArrayError, "read-only"),
        ([[0.0] * 3] * 2, ss.ArrayError, "list is no array"),
        (np.ma.zeros((2, 3), np.float32), ss.ArrayError, "masked"),
    ],
)
def test_outputs_that_are_refused(out: object, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        writable(out)


def test_jax_outputs_are_refused() -> None:
    import jax.numpy as jnp

    with pytest.raises(ss.ArrayError, match="out is a JAX array, which is immutable; omit out="):
        writable(jnp.zeros((2, 3)))


def test_torch_outputs_that_overlap_themselves_are_refused() -> None:
    import torch

    with pytest.raises(ss.ArrayError, match="elements share memory"):
        writable(torch.zeros(1, 3).expand(2, 3))
    with pytest.raises(ss.ArrayError, match="elements share memory"):
        writable(torch.zeros(4).as_strided((2, 3), (1, 1)))


def test_an_output_that_would_be_a_copy_is_refused() -> None:
    """Otherwise the result lands in the copy, and the caller's array keeps its old content."""
    import torch

    with pytest.raises(ss.SlideSparseError, match="out"):
        writable(np.zeros((2, 3), ">f4"))
    negative = torch.zeros(2, 3, dtype=torch.complex64).conj().imag
    with pytest.raises(ss.SlideSparseError, match="out"):
        writable(negative)


def test_an_output_that_requires_a_gradient_is_refused() -> None:
    """PyTorch's own out= refuses it too: the graph would not know of the write."""
    import torch

    with pytest.raises(ss.ArrayError, match=r"out .*gradient"):
        writable(torch.zeros(2, 3, requires_grad=True))


def test_outputs_that_share_memory_with_x_are_refused() -> None:
    x = np.zeros((2, 3), np.float32)
    for out in (x, x[::-1], x[:, :]):
        with pytest.raises(ss.ArrayError, match="out shares memory with x; pass an out of its own"):
            writable(out, x=x)


def test_outputs_beside_x_in_one_buffer_are_taken() -> None:
    """Two column blocks of one buffer have no element in common."""
    buffer = np.zeros((2, 7), np.float32)
    view = writable(buffer[:, 4:], x=buffer[:, :4])
    assert np.shares_memory(view, buffer)
    with pytest.raises(ss.ArrayError, match="shares memory with x"):
        writable(buffer[:, 3:6], x=buffer[:, :4])


def test_overlap_that_is_too_hard_to_tell_counts_as_overlap(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_hard(*arrays: Array, **options: int) -> bool:
        raise np.exceptions.TooHardError("max_work exceeded")

    buffer = np.zeros((2, 7), np.float32)
    writable(buffer[:, 4:], x=buffer[:, :4])
    monkeypatch.setattr(np, "shares_memory", too_hard)
    with pytest.raises(ss.ArrayError, match="shares memory with x"):
        writable(buffer[:, 4:], x=buffer[:, :4])


@given(
    st.lists(st.tuples(st.integers(1, 4), st.integers(-12, 12)), min_size=0, max_size=3),
    st.sampled_from((1, 2, 4)),
)
def test_overlap_is_never_missed(axes: list[tuple[int, int]], itemsize: int) -> None:
    shape = tuple(extent for extent, _ in axes)
    strides = tuple(stride * itemsize for _, stride in axes)
    starts = [
        sum(index * stride for index, stride in zip(position, strides, strict=True))
        for position in np.ndindex(*shape)
    ]
    distinct = len({start // itemsize for start in starts}) == len(starts)
    assert overlaps_itself(shape, strides, itemsize) or distinct


@pytest.mark.parametrize("layout", LAYOUTS)
def test_ordinary_layouts_do_not_overlap(layout: str) -> None:
    values = LAYOUTS[layout](np.zeros((3, 4), np.float32))
    assert not overlaps_itself(values.shape, values.strides, values.itemsize)
