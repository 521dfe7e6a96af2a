"""The CUDA kernels' own source on the CPU, against the NumPy definition (tests/emulate.py)."""

from __future__ import annotations

import ctypes

import numpy as np
import pytest
from emulate import COMPILER, EmulatedMachine
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_checks import (
    ARRAY_NAMES,
    accumulators,
    check_check,
    check_dequantize,
    check_hopper_pack,
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
from slidesparse_rt.errors import OptionError, ShapeError
from slidesparse_rt.kernels import catalog
from slidesparse_rt.kernels.geometry import dequantize_tiles, quantize_config
from slidesparse_rt.kernels.launch import Quantizer
from slidesparse_rt.pattern import PATTERNS, Pattern

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

SIX_OF_EIGHT = Pattern.parse("6:8")
NAMES = [pattern.name for pattern in PATTERNS]
OPERAND_NAMES = [row.name for row in OPERANDS]


@pytest.fixture(params=[False, True], ids=["forwards", "backwards"])
def machine(request):
    return EmulatedMachine(backwards=request.param)


@pytest.fixture
def rng():
    return np.random.default_rng(20260214)


@pytest.mark.parametrize(
    ("name", "out"),
    [*((name, "int8") for name in NAMES), *((name, "bf16") for name in NAMES[:5] + NAMES[-2:])],
)
def test_every_pattern_lifts_whole_and_broken_groups(machine, rng, name, out):
    pattern = Pattern.parse(name)
    # One compiled kernel serves all these lengths: multiples of 8 elements that one warp holds.
    for columns in (8, 8 * pattern.group // 2, 248):
        check_quantize(
            machine,
            tokens(rng, 11, columns, "bfloat16"),
            out,
            pattern,
            pad_rows=3,
            pad_chunks=1,
            vectors=1,
        )


@pytest.mark.parametrize("out", OPERAND_NAMES)
@pytest.mark.parametrize("x_type", ARRAY_NAMES)
def test_every_type_of_array_and_operand(machine, rng, x_type, out):
    x = tokens(rng, 12, 2096, x_type)
    check_quantize(machine, x, out, SIX_OF_EIGHT, stride=2112, pad_rows=4)


@pytest.mark.parametrize("x_type", ARRAY_NAMES)
@pytest.mark.parametrize("columns", [1, 2, 7, 52, 129, 1500])
def test_odd_lengths_strides_and_addresses_give_the_same_bits(rng, x_type, columns):
    machine = EmulatedMachine()
    size = array_type(x_type).bits // 8
    x = tokens(rng, 9, columns, x_type)
    for stride, offset in ((columns, 0), (columns + 3, size), (columns + 8, 0)):
        check_quantize(machine, x, "int8", SIX_OF_EIGHT, stride=stride, offset=offset)


@pytest.mark.parametrize(("vectors", "threads"), [(1, 96), (2, 64), (4, 32), (8, 32), (4, 64)])
@pytest.mark.parametrize("out", ["int8", "fp16"])
def test_every_configuration_gives_the_same_bits(machine, rng, out, vectors, threads):
    x = tokens(rng, 5, 760, "bfloat16")
    launcher = check_quantize(
        machine, x, out, SIX_OF_EIGHT, vectors=vectors, threads=threads, pad_rows=1
    )
    assert (launcher.config.vectors, launcher.config.threads) == (vectors, threads)
    assert launcher.config.tile == 0 or threads * vectors * 8 < 760


@pytest.mark.parametrize("out", ["int8", "bf16"])
@pytest.mark.parametrize("name", ["2:4", "4:6", "6:8", "30:32", "dense"])
def test_rows_longer_than_a_block_holds(machine, rng, name, out):
    pattern = Pattern.parse(name)
    x = tokens(rng, 10, 1203, "bfloat16")
    launcher = check_quantize(
        machine, x, out, pattern, vectors=4, threads=32, pad_rows=1, pad_chunks=3, stride=1208
    )
    assert launcher.config.tile > 0
    assert launcher.config.tile % (4 * pattern.group) == 0


def test_padding_far_beyond_the_row_is_zero(machine, rng):
    check_quantize(machine, tokens(rng, 9, 40, "bfloat16"), "int8", SIX_OF_EIGHT, pad_chunks=64)
    x = tokens(rng, 9, 4096, "bfloat16")
    check_quantize(machine, x, "int8", SIX_OF_EIGHT, vectors=1, threads=32, pad_chunks=200)


def test_a_grid_with_fewer_blocks_than_rows_works_through_all(rng):
    machine = EmulatedMachine(sm_count=1)
    for columns in (64, 2048):
        x = tokens(rng, 23, columns, "bfloat16")
        check_quantize(machine, x, "int8", SIX_OF_EIGHT, pad_rows=9, blocks_per_sm=1)
    assert {launch[1] for launch in machine.launches} == {1}


def test_one_given_scale_or_one_for_each_token(machine, rng):
    for x_type in ("bfloat16", "float32"):
        x = tokens(rng, 12, 512, x_type)
        for out in ("int8", "fp8_e4m3"):
            one = np.array([0.037], np.float32)
            check_quantize(machine, x, out, SIX_OF_EIGHT, given=one)
            each = np.exp2(rng.uniform(-10, 10, 12)).astype(np.float32)
            each[[0, 2, 4, 6, 8, 10]] = [0, -1, np.nan, np.inf, 1e-40, 2.0**-126]
            check_quantize(machine, x, out, SIX_OF_EIGHT, given=each)


@pytest.mark.parametrize("out", OPERAND_NAMES)
def test_weights_are_quantized_per_channel_without_negative_zeros(machine, rng, out):
    for dtype, columns in (("float32", 70), ("bfloat16", 264)):
        w = rng.standard_normal((9, columns)).astype(array_type(dtype).dtype)
        w[1] = 0
        w[2] *= np.asarray(1e-4, w.dtype)
        w[3, 5:] *= np.asarray(1e-5, w.dtype)
        w[4, ::3] = -0.0
        check_weight_quantize(machine, w, out)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 12),
    columns=st.integers(1, 96),
    seed=st.integers(0, 2**32),
    backwards=st.booleans(),
)
def test_any_shape(rows, columns, seed, backwards):
    rng = np.random.default_rng(seed)
    machine = EmulatedMachine(backwards=backwards)
    x = tokens(rng, rows, columns, "float16")
    check_quantize(
        machine,
        x,
        "fp8_e4m3",
        Pattern.parse("4:6"),
        stride=columns + int(rng.integers(9)),
        offset=2 * int(rng.integers(8)),
        pad_rows=int(rng.integers(5)),
        pad_chunks=int(rng.integers(3)),
    )


# --- dequantize -----------------------------------------------------------------------------------


@pytest.mark.parametrize("acc", ["int32", "float32", "bfloat16", "float16"])
@pytest.mark.parametrize("out", ARRAY_NAMES)
def test_every_result_type(machine, rng, acc, out):
    x = accumulators(rng, 19, 264, acc)
    check_dequantize(machine, rng, x, out, acc_pad=8)


@pytest.mark.parametrize("factors", ["", "t", "c", "b", "tc", "tb", "cb", "tcb"])
def test_factors_that_are_not_given_change_nothing(rng, factors):
    x = accumulators(rng, 5, 40, "float32")
    check_dequantize(EmulatedMachine(), rng, x, "float32", factors=factors)


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (65, 30), (2, 1029), (9, 1024)])
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


@given(columns=st.integers(1, 10**6), wide=st.sampled_from([4, 8]))
def test_dequantize_tiles_cover_every_column_once(columns, wide):
    spec = catalog.dequantize("int32", "bfloat16", columns=wide)
    width, height, tiles, tall = dequantize_tiles(columns, spec)
    assert width * height == 256
    assert (tiles - 1) * width * wide < columns <= tiles * width * wide
    assert tall == dict(spec.defines)["ROWS"] * height


# --- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_sliding_and_back(machine, rng, name):
    pattern = Pattern.parse(name)
    for columns in (pattern.group, 5 * pattern.group - 1, 3):
        check_slide(machine, sparse_values(rng, 6, columns, "int8", pattern), pattern)


@pytest.mark.parametrize("dtype", ["float8_e4m3fn", "bfloat16", "float16"])
def test_sliding_every_operand(machine, rng, dtype):
    for columns in (8, 77, 2400):
        check_slide(machine, sparse_values(rng, 4, columns, dtype, SIX_OF_EIGHT), SIX_OF_EIGHT)


@pytest.mark.parametrize("name", ["2:4", "6:8", "30:32", "dense"])
def test_what_does_not_fit_is_reported(machine, name):
    pattern = Pattern.parse(name)
    check_unslide_misfit(machine, pattern)
    if name != "dense":  # nothing is too full for "dense"
        check_slide_misfit(machine, pattern)


@pytest.mark.parametrize("name", ["2:4", "4:6", "6:8", "30:32", "dense"])
def test_pruning_by_magnitude(machine, rng, name):
    pattern = Pattern.parse(name)
    for columns in (1, pattern.group - 1, 4 * pattern.group, 5 * pattern.group + 1):
        # Few different values, so that there are ties, zeros of both signs among them.
        w = rng.integers(-3, 4, (7, columns)).astype(np.float32) * np.float32(-0.5)
        check_prune(machine, w, pattern, None, in_place=columns % 2 == 0)


@pytest.mark.parametrize("dtype", ARRAY_NAMES)
def test_pruning_every_type(machine, rng, dtype):
    w = (rng.standard_normal((6, 403)) * 0.1).astype(array_type(dtype).dtype)
    check_prune(machine, w, SIX_OF_EIGHT, None, in_place=False)
    norms = np.resize(np.array([0, 1, 2, 1e-30, 1e30], np.float32), 403)
    check_prune(machine, w, SIX_OF_EIGHT, norms, in_place=False)
    # Scores whose order is lost in single precision.
    close = np.resize(np.array([1, 1 + 2.0**-23, 1 + 2.0**-22], np.float32), 403)
    check_prune(machine, np.full((2, 403), 0.7, w.dtype), SIX_OF_EIGHT, close, in_place=True)


@pytest.mark.parametrize("dtype", [*ARRAY_NAMES, "int8", "float8_e4m3fn"])
def test_checking_counts_and_finds_the_first(machine, rng, dtype):
    clean = sparse_values(rng, 9, 203, dtype, SIX_OF_EIGHT)
    check_check(machine, clean, SIX_OF_EIGHT)
    dirty = clean.copy()
    dirty[5, 16:24] = 1
    dirty[7, 200:203] = 1
    dirty[8, :] = 1
    if dtype != "int8":
        dirty[6, 9] = np.nan
        dirty[6, 100] = np.nan if dtype == "float8_e4m3fn" else -np.inf
    check_check(machine, dirty, SIX_OF_EIGHT)
    if dtype == "int8":
        dirty[0, :3] = -128
        check_check(machine, dirty, SIX_OF_EIGHT)


# --- rules and refusals ---------------------------------------------------------------------------


@given(
    columns=st.integers(1, 200_000),
    x_type=st.sampled_from(ARRAY_NAMES),
    out=st.sampled_from(OPERAND_NAMES),
    name=st.sampled_from(NAMES),
    shared=st.sampled_from([99 * 1024, 163 * 1024, 227 * 1024]),
)
def test_the_rule_holds_every_row(columns, x_type, out, name, shared):
    pattern = Pattern.parse(name)
    config = quantize_config(columns, x_type, out, pattern, shared_limit=shared)
    in_bytes = array_type(x_type).bits // 8
    out_bytes = 2 if out in ("bf16", "fp16") else 1
    assert config.threads % 32 == 0
    assert config.threads <= catalog.quantize_threads(config.vectors, tiled=config.tile > 0)
    assert config.shared_bytes <= shared
    threads = 32 if config.warp_row else config.threads
    held = threads * config.vectors * 16 // in_bytes
    if config.tile == 0:
        assert columns <= held
        assert config.stage_bytes >= pattern.padded_k(columns) * out_bytes + 16
        # No thread beyond what the row needs, but for the rounding to whole warps.
        assert config.warp_row or (threads - 32) * config.vectors * 16 < columns * in_bytes
    else:
        assert config.tile + 2 <= held
        assert config.tile % (4 * pattern.group) == 0
    assert config.stage_bytes >= held * out_bytes


def test_refused_numbers():
    def config(columns=64, **options):
        return quantize_config(
            columns, "bfloat16", "bf16", SIX_OF_EIGHT, **{"shared_limit": 99 * 1024, **options}
        )

    with pytest.raises(ShapeError, match="rows of 0 elements"):
        config(0)
    with pytest.raises(ShapeError, match="rows of 2147483647 elements"):
        config(2**31 - 1)
    with pytest.raises(OptionError, match="threads is 48; allowed are multiples of 32"):
        config(threads=48)
    with pytest.raises(OptionError, match="do not fit 6:8 and 1024 bytes of shared memory"):
        config(10_000, shared_limit=1024)
    machine = EmulatedMachine()
    for row_length in (47, 50, 2**31):
        with pytest.raises(ShapeError, match=f"row_length is {row_length}; allowed are multiples"):
            Quantizer(machine, 64, "bfloat16", "int8", Pattern.parse("6:8"), row_length)


def test_no_rows_launch_nothing(rng):
    machine = EmulatedMachine()
    launcher = Quantizer(machine, 64, "bfloat16", "int8", SIX_OF_EIGHT, 96)
    launcher(0, 64, 0, 0, 0, 0, 0)
    assert machine.launches == []


def test_rows_that_are_only_padding_become_zeros():
    machine = EmulatedMachine()
    launcher = Quantizer(machine, 64, "bfloat16", "int8", SIX_OF_EIGHT, 96)
    q = machine.memory(5 * 96)
    launcher(0, 64, q.address, 0, 0, 5, 0)
    assert not q.read().any()
    q.check()


def test_a_refused_launch_is_an_error(monkeypatch):
    class Refusing(EmulatedMachine):
        def raw(self, name):
            return lambda *_: 700

        def error(self, name, status, arguments):
            return RuntimeError(f"{name} {status}")

    machine = Refusing()
    machine.cuda = machine
    launcher = Quantizer(machine, 64, "bfloat16", "int8", SIX_OF_EIGHT, 96)
    with pytest.raises(RuntimeError, match="cuLaunchKernel 700"):
        launcher(0, 64, 0, 0, 1, 1, 0)
    assert ctypes.sizeof(ctypes.c_void_p) == 8


@pytest.mark.parametrize("dtype", OPERAND_NAMES)
def test_weights_are_packed_for_hopper(machine, rng, dtype):
    """One unit after the other and, with more units than blocks, several a block."""
    for rows, row_bytes in ((128, 256), (384, 768), (256, 8704)):
        check_hopper_pack(machine, rng, rows, row_bytes, dtype)
    assert [blocks for _, blocks, *_ in machine.launches] == [4, 36, 128]
