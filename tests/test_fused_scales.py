"""int8 products that apply the channel scales: what cuSPARSELt is asked for, and the error bound.

Up to the library's functions and the device's memory everything is the real thing.
"""

from __future__ import annotations

import contextlib
import ctypes
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from fake_gpu import Gpu, Memory
from ffi_fake import FakeDll, fake_pool
from hypothesis import given
from hypothesis import strategies as st
from plans import fitted
from strategies import F32_MAX, seeds
from tolerances import U, fused

import slidesparse_rt as ss
from slidesparse_rt import backends, plan
from slidesparse_rt.backends import cusparselt, gpu_gemm, gpu_step
from slidesparse_rt.backends.gpu_weight import GpuWeight
from slidesparse_rt.dtypes import array_type, operand
from slidesparse_rt.ffi.checked import DataType
from slidesparse_rt.ffi.cusparselt import MatmulAttribute, Status

N, K, M = 40, 64, 20
FUSED, PLAIN = ss.PlanOptions(fuse_channel_scales=True), ss.PlanOptions()


class Made(SimpleNamespace):
    """A prepared weight and the stand-ins around it."""

    prepared: Any
    dll: FakeDll
    gpu: Gpu
    scales: int


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    pool, dll, _ = fake_pool()
    gpu = Gpu()
    monkeypatch.setattr(cusparselt, "SHARED", pool)
    monkeypatch.setattr(cusparselt, "working_on", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(GpuWeight, "slide", lambda self, *arguments: Memory(1))

    def prepared(options: ss.PlanOptions, dtype: str = "int8") -> Made:
        device: Any = gpu
        weight = GpuWeight(device, (N, K), ss.Pattern.parse("2:4"), operand(dtype), None, 0)
        scales: Any = Memory(N * 4)
        weight._scales = scales
        made = cusparselt.CusparseltPrepared(weight, options, 0)
        return Made(prepared=made, dll=dll, gpu=gpu, scales=scales.pointer)

    yield prepared
    pool.close()


def called(dll: FakeDll, name: str) -> list[tuple[Any, ...]]:
    return [arguments for found, arguments in dll.calls if found == name]


def float_at(address: int) -> float:
    return ctypes.c_float.from_address(address).value


def test_the_product_gets_the_channel_scales_as_its_alpha_vector(make: Any) -> None:
    made = make(FUSED)
    prepared, dll, gpu = made.prepared, made.dll, made.gpu
    assert prepared.padded_n == 64
    assert prepared.sums_type == "bfloat16"
    alpha = prepared.alpha
    assert alpha not in (0, made.scales)
    # All of its 64 numbers are written: those beyond N are zeros.
    assert ("clear", alpha, 64 * 4, 0) in gpu.done
    assert ("copy_rows", alpha, N * 4, made.scales, N * 4, N * 4, 1, 0) in gpu.done
    before = len(dll.calls)
    product = prepared.make_product(M, None, 0)
    product.launch(11 << 8, 12 << 8, 13 << 8, 0, 14 << 8, 0, 0)
    names = [name for name, _ in dll.calls[before:]]
    for name in ("cusparseLtMatmulSearch", "cusparseLtMatmul"):
        ((_, _, first, _, _, beta, *_),) = called(dll, name)
        assert first == alpha
    # Beta stays a number in host memory.
    assert float_at(beta) == 0
    kinds = [row[6] for row in called(dll, "cusparseLtDenseDescriptorInit")]
    assert kinds == [DataType.I8, DataType.BF16] * (len(kinds) // 2)
    # The descriptor knows before an algorithm is selected for it, and before the plan is made.
    asked = names.index("cusparseLtMatmulDescSetAttribute")
    assert names.index("cusparseLtMatmulDescriptorInit") < asked
    assert asked < names.index("cusparseLtMatmulAlgSelectionInit")
    assert asked < names.index("cusparseLtMatmulPlanInit")
    descriptors = {row[1] for row in called(dll, "cusparseLtMatmulDescriptorInit")}
    for descriptor in descriptors:
        cell = dll.cells[descriptor, MatmulAttribute.ALPHA_VECTOR_SCALING]
        assert struct.unpack("i", cell) == (1,)


def test_without_the_option_alpha_is_one_and_sums_are_int32(make: Any) -> None:
    made = make(PLAIN)
    prepared, dll = made.prepared, made.dll
    assert (prepared.alpha, prepared.channel_scales) == (0, made.scales)
    prepared.make_product(M, None, 0).launch(11 << 8, 12 << 8, 13 << 8, 0, 14 << 8, 0, 0)
    ((_, _, alpha, _, _, beta, *_),) = called(dll, "cusparseLtMatmul")
    assert (float_at(alpha), float_at(beta)) == (1, 0)
    assert not called(dll, "cusparseLtMatmulDescSetAttribute")
    kinds = {row[6] for row in called(dll, "cusparseLtDenseDescriptorInit")}
    assert kinds == {DataType.I8, DataType.I32}


def test_a_search_for_the_one_is_not_taken_for_the_other(make: Any) -> None:
    for round_ in range(2):
        for options in (PLAIN, FUSED):
            made = make(options)
            made.prepared.make_product(M, None, 0)
            assert len(made.gpu.choices) == (1 if (round_, options) == (0, PLAIN) else 2)
    assert len(called(made.dll, "cusparseLtMatmulSearch")) == 2


def test_the_second_pass_reads_half_the_bytes_and_leaves_the_scales_out(
    make: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    sums: list[str] = []
    launches: list[tuple[Any, ...]] = []

    def dequantizer(device: Any, sums_type: str, kind: Any, n: int) -> Any:
        sums.append(sums_type)

        def fixed(*arguments: Any) -> Any:
            launches.append(arguments)
            return SimpleNamespace(aim=lambda *call: int)

        return SimpleNamespace(fixed=fixed)

    monkeypatch.setattr(gpu_gemm, "dequantizer", dequantizer)
    nothing: Any = SimpleNamespace(fixed=lambda *arguments: SimpleNamespace(aim=lambda *call: int))
    monkeypatch.setattr(gpu_gemm, "quantizer", lambda *arguments, **options: nothing)
    workspace: Any = SimpleNamespace(address=lambda nbytes, stream, tokens: 1 << 30)
    kind = array_type("float32")
    sizes, scales = [], []
    for options in (PLAIN, FUSED):
        made = make(options)
        step = gpu_step.Step(made.prepared, M, kind, kind, False, 0)
        layout = made.prepared.layout(made.prepared.product(M, None, 0), M)
        sizes.append(layout.scratch - layout.sums)
        step.launch(1 << 8, K, 2 << 8, N, workspace, 0)
        scales.append(made.scales)
    assert sums == ["int32", "bfloat16"]
    padded = 32 * 64  # tokens, columns
    assert sizes == [padded * 4, padded * 2]
    (_, _, token, channel, *_), (_, _, other, none, *_) = launches
    assert token == other != 0
    assert (channel, none) == (scales[0], 0)


def test_the_vector_is_counted_and_given_back(make: Any) -> None:
    plain, with_vector = make(PLAIN).prepared, make(FUSED).prepared
    assert with_vector.nbytes == plain.nbytes + 64 * 4
    with_vector.close()
    assert with_vector.alpha == 0
    assert with_vector.nbytes == 0


@pytest.mark.parametrize("function", ["AlgSelectionInit", "PlanInit", "DescSetAttribute"])
def test_a_library_that_cannot_fuse_says_so_when_the_plan_is_made(make: Any, function: str) -> None:
    dll = make(PLAIN).dll
    dll.statuses[f"cusparseLtMatmul{function}"] = Status.NOT_SUPPORTED
    with pytest.raises(ss.OptionError) as caught:
        make(FUSED)
    message = str(caught.value)
    assert message.startswith(
        "fuse_channel_scales is set, but cuSPARSELt 0.8.1 cannot fuse them on a stand-in (cuspars"
    )
    assert "NOT_SUPPORTED" in message
    assert message.endswith("; leave fuse_channel_scales out")
    dll.statuses[f"cusparseLtMatmul{function}"] = Status.INTERNAL_ERROR
    with pytest.raises(ss.LibraryError, match="INTERNAL_ERROR"):
        make(FUSED)


# The option in a plan


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ({}, "the backend is reference; allowed is int8 on cusparselt: pass backend='cusparselt'"),
        ({"backend": "reference"}, "the backend is reference; .*pass backend='cusparselt', or lea"),
        (
            {"dtype": "fp8_e4m3"},
            "the weight is fp8_e4m3; allowed is int8 on cusparselt: use dtype=",
        ),
        ({"dtype": "bf16", "backend": "reference"}, "the weight is bf16; .*leave fuse_channel_sca"),
    ],
)
def test_other_backends_and_formats_refuse_it(arguments: dict[str, Any], says: str) -> None:
    with pytest.raises(ss.OptionError, match=f"fuse_channel_scales is set, but {says}"):
        ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8", options=FUSED, **arguments)


def test_every_backend_and_format_but_one_is_refused() -> None:
    for dtype in ("int8", "fp8_e4m3", "bf16", "fp16"):
        problem = backends.Problem(4, 16, ss.Pattern.parse("6:8"), operand(dtype))
        for name in backends.BACKENDS[1:]:
            backends.check_options(PLAIN, problem, name)
            if (name, dtype) == ("cusparselt", "int8"):
                backends.check_options(FUSED, problem, name)
                continue
            with pytest.raises(ss.OptionError):
                backends.check_options(FUSED, problem, name)


def test_explain_says_it(monkeypatch: pytest.MonkeyPatch) -> None:
    backend: Any = SimpleNamespace(
        name="cusparselt",
        prepare=lambda *arguments, **options: SimpleNamespace(nbytes=0, close=lambda: None),
    )
    monkeypatch.setattr(plan, "choose", lambda *arguments: backends.Choice(backend, {}, "so"))
    weight = fitted("6:8", 4, 16)
    said = "channel scales: fused into the product, which rounds to bfloat16"
    with ss.SparseGemmPlan(weight, "6:8", device="cpu", options=FUSED) as made:
        assert said in made.explain()
    with ss.SparseGemmPlan(weight, "6:8", device="cpu") as made:
        assert said not in made.explain()


# The bound


def emulated(
    sums: Any, token_scales: Any, channel_scales: Any, bias: Any, out: np.dtype[Any]
) -> np.ndarray:
    """The arithmetic of docs/numerics.md#fused-channel-scales."""
    scaled = sums.astype(np.float32) * channel_scales
    y = scaled.astype(ml_dtypes.bfloat16).astype(np.float32) * token_scales[:, None]
    result: np.ndarray = (y if bias is None else y + bias).astype(out)
    return result


@given(
    st.data(),
    seeds,
    st.integers(-126, 20),
    st.sampled_from(("float32", "float16", "bfloat16")),
    st.booleans(),
)
def test_the_bound_holds(data: st.DataObject, seed: int, low: int, out: str, biased: bool) -> None:
    """For sums of every size, and results from subnormal numbers to near the type's limit."""
    rng = np.random.default_rng(seed)
    sums = rng.integers(-(2**31), 2**31, (6, 8)) >> rng.integers(0, 31, (6, 8))
    channel = np.exp2(rng.uniform(low, low + 8, 8)).astype(np.float32)
    aim = 2.0 ** data.draw(st.integers(-150, 14 if out == "float16" else 125))
    token = aim / max(1, np.abs(sums * channel.astype(np.float64)).max()) * rng.uniform(0.1, 1, 6)
    token = np.clip(token, 2.0**-126, F32_MAX).astype(np.float32)
    exact = sums * token.astype(np.float64)[:, None] * channel.astype(np.float64)
    bias = (rng.standard_normal(8) * np.abs(exact).max() / 8).astype(np.float32) if biased else None
    y = emulated(sums, token, channel, bias, array_type(out).dtype)
    wide = None if bias is None else bias.astype(np.float64)
    error = np.abs(y.astype(np.float64) - (exact if wide is None else exact + wide))
    assert (error <= fused(exact, wide, out)).all()


def test_the_bound_is_tight() -> None:
    """257 lies halfway between two bfloat16 numbers."""
    one = np.ones(1, np.float32)
    found = emulated(np.array([[257]]), one, one, None, np.dtype(np.float32))
    assert found.tolist() == [[256]]
    assert 1 <= fused(np.array([[257.0]]), None, "float32") < 1.005
    assert U["bfloat16"] == 2.0**-8
