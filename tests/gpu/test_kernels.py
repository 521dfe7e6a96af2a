"""The CUDA kernels on a GPU against the NumPy definition, to the bit."""

from __future__ import annotations

import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_checks import (
    ARRAY_NAMES,
    accumulators,
    check_check,
    check_dequantize,
    check_prune,
    check_quantize,
    check_slide,
    check_slide_misfit,
    check_unslide_misfit,
    check_weight_quantize,
    sparse_values,
    tokens,
)

from slidesparse_rt.dtypes import OPERANDS, array_type
from slidesparse_rt.errors import PlanClosed
from slidesparse_rt.kernels import catalog
from slidesparse_rt.kernels.compiler import Compiler
from slidesparse_rt.kernels.geometry import quantize_config
from slidesparse_rt.kernels.launch import Dequantizer, Quantizer
from slidesparse_rt.kernels.loader import KernelCache
from slidesparse_rt.pattern import PATTERNS, Pattern

from .kernel_machine import GpuMachine

pytestmark = pytest.mark.gpu

SIX_OF_EIGHT = Pattern.parse("6:8")
NAMES = [pattern.name for pattern in PATTERNS]
OPERAND_NAMES = [row.name for row in OPERANDS]
SHAPES = settings(
    max_examples=100,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def machine():
    return GpuMachine()


@pytest.fixture
def rng():
    return np.random.default_rng(20260214)


@pytest.mark.parametrize("out", OPERAND_NAMES)
@pytest.mark.parametrize("name", NAMES)
def test_every_pattern(machine, rng, name, out):
    pattern = Pattern.parse(name)
    for columns in (8, 8 * pattern.group // 2, 248, 4096):
        x = tokens(rng, 33, columns, "bfloat16")
        check_quantize(machine, x, out, pattern, pad_rows=3, pad_chunks=1)


@pytest.mark.parametrize("out", OPERAND_NAMES)
@pytest.mark.parametrize("x_type", ARRAY_NAMES)
@pytest.mark.parametrize("columns", [3584, 18944])
def test_every_type_at_the_sizes_of_a_model(machine, rng, x_type, out, columns):
    x = tokens(rng, 300, columns, x_type)
    check_quantize(machine, x, out, SIX_OF_EIGHT, pad_rows=4)


@pytest.mark.parametrize("columns", [24_000, 32_768, 57_344, 65_536, 65_541, 133_144])
@pytest.mark.parametrize("out", ["int8", "fp8_e4m3", "bf16"])
def test_long_rows(machine, rng, columns, out):
    for x_type in ("bfloat16", "float32"):
        check_quantize(machine, tokens(rng, 12, columns, x_type), out, SIX_OF_EIGHT)


@pytest.mark.parametrize("x_type", ARRAY_NAMES)
@pytest.mark.parametrize("columns", [1, 2, 7, 52, 129, 1500, 4099])
def test_odd_lengths_strides_and_addresses(machine, rng, x_type, columns):
    size = array_type(x_type).bits // 8
    x = tokens(rng, 9, columns, x_type)
    for stride, offset in ((columns, 0), (columns + 3, size), (columns + 8, 0)):
        check_quantize(machine, x, "int8", SIX_OF_EIGHT, stride=stride, offset=offset)


@pytest.mark.parametrize(("vectors", "threads"), [(1, 512), (2, 256), (4, 128), (8, 64), (4, 32)])
@pytest.mark.parametrize("out", ["int8", "fp8_e4m3", "fp16"])
def test_every_configuration(machine, rng, out, vectors, threads):
    x = tokens(rng, 500, 4096, "bfloat16")
    check_quantize(machine, x, out, SIX_OF_EIGHT, vectors=vectors, threads=threads, pad_rows=1)


@pytest.mark.parametrize("rows", [1, 15, 16, 17, 255, 4096])
def test_any_number_of_tokens(machine, rng, rows):
    for columns in (64, 512, 1024, 2048):
        x = tokens(rng, rows, columns, "bfloat16")
        check_quantize(machine, x, "int8", SIX_OF_EIGHT, pad_rows=-rows % 16)


def test_all_16_bit_numbers_are_quantized_alike(machine, rng):
    """Every bfloat16 and every float16 at several scales."""
    every = np.arange(2**16, dtype=np.uint16)
    for name in ("bfloat16", "float16"):
        values = every.view(array_type(name).dtype)
        values = values[np.isfinite(values.astype(np.float32))]
        x = np.resize(values, (1, values.size // 8 * 8))
        for out in ("int8", "fp8_e4m3"):
            check_quantize(machine, x, out, SIX_OF_EIGHT)
            scales = np.exp2(rng.uniform(-30, 8, 8)).astype(np.float32)
            check_quantize(machine, np.repeat(x, 8, axis=0), out, SIX_OF_EIGHT, given=scales)


@SHAPES
@given(
    rows=st.integers(1, 40),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**32),
    name=st.sampled_from(["2:4", "4:6", "6:8", "dense"]),
    x_type=st.sampled_from(ARRAY_NAMES),
    out=st.sampled_from(OPERAND_NAMES),
)
def test_any_shape(machine, rows, columns, seed, name, x_type, out):
    rng = np.random.default_rng(seed)
    size = array_type(x_type).bits // 8
    check_quantize(
        machine,
        tokens(rng, rows, columns, x_type),
        out,
        Pattern.parse(name),
        stride=columns + int(rng.integers(9)),
        offset=size * int(rng.integers(8)),
        pad_rows=int(rng.integers(5)),
        pad_chunks=int(rng.integers(3)),
    )


def test_given_scales(machine, rng):
    for x_type in ("bfloat16", "float32"):
        x = tokens(rng, 12, 512, x_type)
        for out in ("int8", "fp8_e4m3"):
            check_quantize(machine, x, out, SIX_OF_EIGHT, given=np.array([0.037], np.float32))
            each = np.exp2(rng.uniform(-10, 10, 12)).astype(np.float32)
            each[[0, 2, 4, 6, 8, 10]] = [0, -1, np.nan, np.inf, 1e-40, 2.0**-126]
            check_quantize(machine, x, out, SIX_OF_EIGHT, given=each)


@pytest.mark.parametrize("out", OPERAND_NAMES)
def test_weights_per_channel(machine, rng, out):
    for dtype, columns in (("float32", 70), ("bfloat16", 264), ("float16", 4097)):
        w = rng.standard_normal((200, columns)).astype(array_type(dtype).dtype)
        w[1] = 0
        w[2] *= np.asarray(1e-4, w.dtype)
        w[3, 5:] *= np.asarray(1e-5, w.dtype)
        w[4, ::3] = -0.0
        check_weight_quantize(machine, w, out)


def test_more_than_2_to_the_31_elements(machine):
    """M = 70,000 at K' = 56,832: rows far beyond 2^31 bytes are where and what they should be."""
    import torch

    rows, columns = 70_000, 37_888
    pattern = Pattern.parse("6:8")
    slid = pattern.slid_k(columns)
    assert slid == 56_832
    x = torch.randn((rows, columns), device="cuda", dtype=torch.bfloat16)
    q = torch.full((rows, slid), 99, device="cuda", dtype=torch.int8)
    scales = torch.empty(rows, device="cuda")
    launcher = Quantizer(machine.kernels, columns, "bfloat16", "int8", pattern, slid)
    launcher(x.data_ptr(), columns, q.data_ptr(), scales.data_ptr(), rows, rows, machine.stream)
    # One slide window after another, by torch; float32 arithmetic in the definition's order.
    for start in (0, 37_000, rows - 64):
        part = x[start : start + 64].float()
        peak = part.abs().amax(dim=1, keepdim=True)
        # (A number divided by a tensor is a product with its reciprocal in PyTorch.)
        reciprocal = torch.full_like(peak, 127.0) / peak
        values = torch.round(part * reciprocal).to(torch.int8)
        index = torch.arange(slid, device="cuda")
        source = index // 12 * 8 + index % 12 // 4 * 2 + index % 4
        assert torch.equal(q[start : start + 64], values[:, source])
        assert torch.equal(scales[start : start + 64], (peak / torch.full_like(peak, 127.0))[:, 0])
    # Nothing in between was left out.
    left = sum(int(torch.count_nonzero(part == 99)) for part in q.split(4096))
    assert left < 1e-3 * rows * slid


def test_dequantize_more_than_2_to_the_31_elements(machine):
    import torch

    rows, columns = 70_000, 37_888
    acc = torch.randint(-(2**30), 2**30, (rows, columns), device="cuda", dtype=torch.int32)
    out = torch.full((rows, columns), float("nan"), device="cuda", dtype=torch.bfloat16)
    token = torch.rand(rows, device="cuda")
    channel = torch.rand(columns, device="cuda")
    bias = torch.randn(columns, device="cuda")
    Dequantizer(machine.kernels, columns, "int32", "bfloat16")(
        acc.data_ptr(),
        columns,
        out.data_ptr(),
        columns,
        token.data_ptr(),
        channel.data_ptr(),
        bias.data_ptr(),
        rows,
        machine.stream,
    )
    for start in (0, 35_000, 60_000, rows - 1000):
        part = acc[start : start + 1000].float() * token[start : start + 1000, None]
        want = (part * channel + bias).bfloat16()
        assert torch.equal(out[start : start + 1000], want)
    assert not bool(out.isnan().any())


@pytest.mark.parametrize("acc", ["int32", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("out", ARRAY_NAMES)
def test_every_result_type(machine, rng, acc, out):
    check_dequantize(machine, rng, accumulators(rng, 300, 4608, acc), out)
    check_dequantize(machine, rng, accumulators(rng, 19, 264, acc), out, acc_pad=8, out_pad=24)


@pytest.mark.parametrize("factors", ["", "t", "c", "b", "tc", "tb", "cb", "tcb"])
def test_factors_that_are_not_given_change_nothing(machine, rng, factors):
    check_dequantize(machine, rng, accumulators(rng, 5, 40, "float32"), "float32", factors=factors)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (65, 30), (2, 1029), (1000, 1024)])
@pytest.mark.parametrize("columns_of_thread", [4, 8])
def test_any_result_shape(machine, rng, rows, columns, columns_of_thread):
    spec = catalog.dequantize("int32", "bfloat16", columns=columns_of_thread)
    for acc_pad, out_pad, offset in ((0, 0, 0), (3, 1, 0), (0, 5, 1)):
        check_dequantize(
            machine,
            rng,
            accumulators(rng, rows, columns, "int32"),
            "bfloat16",
            acc_pad=acc_pad,
            out_pad=out_pad,
            offset=offset,
            spec=spec,
        )


@pytest.mark.parametrize("name", NAMES)
def test_sliding_and_back(machine, rng, name):
    pattern = Pattern.parse(name)
    for dtype in ("int8", "float8_e4m3fn", "bfloat16", "float16"):
        for columns in (pattern.group, 5 * pattern.group - 1, 4096):
            check_slide(machine, sparse_values(rng, 60, columns, dtype, pattern), pattern)


@pytest.mark.parametrize("name", ["2:4", "6:8", "30:32", "dense"])
def test_what_does_not_fit_is_reported(machine, name):
    pattern = Pattern.parse(name)
    check_unslide_misfit(machine, pattern)
    if name != "dense":
        check_slide_misfit(machine, pattern)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", ARRAY_NAMES)
def test_pruning(machine, rng, name, dtype):
    pattern = Pattern.parse(name)
    kind = array_type(dtype).dtype
    for columns in (1, pattern.group - 1, 4 * pattern.group, 2049):
        w = (rng.integers(-3, 4, (70, columns)) * -0.5).astype(kind)
        check_prune(machine, w, pattern, None, in_place=columns % 2 == 0)
        norms = np.resize(np.array([0, 1, 2, 1e-30, 1e30, 1 + 2.0**-23], np.float32), columns)
        check_prune(machine, w, pattern, norms, in_place=False)
    close = np.resize(np.array([1, 1 + 2.0**-23, 1 + 2.0**-22], np.float32), 403)
    check_prune(machine, np.full((2, 403), 0.7, kind), pattern, close, in_place=True)


@pytest.mark.parametrize("dtype", [*ARRAY_NAMES, "int8", "float8_e4m3fn"])
def test_checking(machine, rng, dtype):
    clean = sparse_values(rng, 500, 2003, dtype, SIX_OF_EIGHT)
    check_check(machine, clean, SIX_OF_EIGHT)
    dirty = clean.copy()
    dirty[205, 16:24] = 1
    dirty[207, 200:207] = 1
    dirty[208, :] = 1
    if dtype != "int8":
        dirty[206, 9] = np.nan
        dirty[206, 100] = np.nan if dtype == "float8_e4m3fn" else -np.inf
    check_check(machine, dirty, SIX_OF_EIGHT)


def test_kernels_are_captured_in_a_graph_and_replayed(machine, rng):
    import torch

    x = torch.randn((128, 512), device="cuda", dtype=torch.bfloat16)
    q = torch.empty((128, 768), device="cuda", dtype=torch.int8)
    y = torch.empty((128, 768), device="cuda", dtype=torch.float32)
    scales = torch.empty(128, device="cuda")
    quantize = Quantizer(machine.kernels, 512, "bfloat16", "int8", SIX_OF_EIGHT, 768)
    dequantize = Dequantizer(machine.kernels, 768 // 4, "int32", "float32")

    def launch(stream: int) -> None:
        quantize(x.data_ptr(), 512, q.data_ptr(), scales.data_ptr(), 128, 128, stream)
        dequantize(q.data_ptr(), 192, y.data_ptr(), 768, scales.data_ptr(), 0, 0, 128, stream)

    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        launch(stream.cuda_stream)
    for _ in range(3):
        x.normal_()
        q.zero_()
        graph.replay()
        torch.cuda.synchronize()
        replayed = q.clone(), scales.clone(), y.clone()
        launch(machine.stream)
        torch.cuda.synchronize()
        for eager, captured in zip((q, scales, y), replayed, strict=True):
            assert torch.equal(
                eager.view(torch.uint8).reshape(-1), captured.view(torch.uint8).reshape(-1)
            )


def test_one_launcher_in_several_threads(machine, rng):
    import torch

    xs = [torch.randn((64, 1024), device="cuda", dtype=torch.bfloat16) for _ in range(8)]
    want = [torch.empty((64, 1536), device="cuda", dtype=torch.int8) for _ in xs]
    got = [torch.empty_like(q) for q in want]
    scales = torch.empty((8, 64), device="cuda")
    launcher = Quantizer(machine.kernels, 1024, "bfloat16", "int8", SIX_OF_EIGHT, 1536)

    def work(i: int, target: list[torch.Tensor], stream: int) -> None:
        torch.cuda.set_device(0)
        for _ in range(200):
            launcher(
                xs[i].data_ptr(), 1024, target[i].data_ptr(), scales[i].data_ptr(), 64, 64, stream
            )

    for i in range(8):
        work(i, want, machine.stream)
    streams = [torch.cuda.Stream() for _ in xs]
    torch.cuda.synchronize()
    threads = [
        threading.Thread(target=work, args=(i, got, streams[i].cuda_stream)) for i in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    for one, other in zip(want, got, strict=True):
        assert torch.equal(one, other)


def test_the_rule_is_the_one_that_runs(machine):
    config = quantize_config(
        3584,
        "bfloat16",
        "int8",
        SIX_OF_EIGHT,
        shared_limit=machine.kernels.limits.shared_bytes,
    )
    launcher = Quantizer(machine.kernels, 3584, "bfloat16", "int8", SIX_OF_EIGHT, 5376)
    assert launcher.config == config
    assert launcher.kernel.resources.spill_loads == 0


def test_closing_unloads_and_a_new_cache_works(machine, rng, tmp_path):
    for _ in range(3):
        with KernelCache(0, Compiler(tmp_path)) as kernels:
            mine = GpuMachine()
            mine.kernels = kernels
            check_quantize(mine, tokens(rng, 9, 64, "bfloat16"), "int8", SIX_OF_EIGHT)
        with pytest.raises(PlanClosed):
            Quantizer(kernels, 64, "bfloat16", "int8", SIX_OF_EIGHT, 96)
