"""The order of packed weights for Hopper: nothing is lost, and every bit is where it is read."""

from __future__ import annotations

import numpy as np
import pytest
from hopper_cases import plain_bits, sparse_bits
from hypothesis import given
from hypothesis import strategies as st
from strategies import Array, operand_names, seeds

from slidesparse_rt.dtypes import operand
from slidesparse_rt.errors import ShapeError
from slidesparse_rt.kernels.hopper_layout import (
    PANEL_ROWS,
    STAGE_BYTES,
    STEP_BYTES,
    pack,
    packed_bytes,
    unit_bytes,
    unpack,
)

VALUE_BYTES = 64 * 64

matrices = st.builds(
    lambda seed, panels, steps, dtype, filled: sparse_bits(
        np.random.default_rng(seed),
        panels * PANEL_ROWS,
        steps * STEP_BYTES // operand(dtype).dtype.itemsize,
        dtype,
        filled=filled,
    ),
    seeds,
    st.integers(1, 2),
    st.integers(1, 3),
    operand_names,
    st.sampled_from([0.0, 0.1, 0.5, 1.0]),
)


def nibbles_of(packed: Array, size: int) -> Array:
    """All nibbles of the metadata, in the order of memory."""
    tail = packed[..., VALUE_BYTES:]
    assert tail.shape[-1] == unit_bytes(size) - VALUE_BYTES
    return np.stack([tail & 15, tail >> 4], axis=-1)


@given(matrices)
def test_unpacking_undoes_packing(slid: Array) -> None:
    """Bit by bit; only a zero that is not kept loses its sign."""
    size = slid.itemsize
    packed = pack(slid)
    stages = slid.shape[1] * size // STAGE_BYTES
    assert packed.dtype == np.uint8
    assert packed.shape == (slid.shape[0] // PANEL_ROWS, stages, 2, unit_bytes(size))
    assert packed.nbytes == packed_bytes(slid.shape[0], slid.shape[1] * size, size)
    back = unpack(packed, slid.dtype)
    assert back.dtype == slid.dtype
    np.testing.assert_array_equal(plain_bits(back), plain_bits(slid))
    # Unpacked zeros are positive, or kept ones, so that packing is stable from there on.
    np.testing.assert_array_equal(plain_bits(unpack(pack(back), slid.dtype)), plain_bits(slid))


@given(matrices)
def test_the_two_indices_of_a_window_ascend(slid: Array) -> None:
    """PTX leaves equal or descending indices undefined; hardware computes something else then."""
    nibbles = nibbles_of(pack(slid), slid.itemsize)
    assert (nibbles & 3 < nibbles >> 2).all()
    assert nibbles.size == slid.size // 4


def read_like_the_kernel(packed: Array, rows: int, row_bytes: int, size: int) -> Array:
    """The matrix, element by element as the comments in hopper_gemm.cu and hopper_pack.cu say.

    Slow and independent of hopper_layout.py: a place is computed from the PTX ISA's coordinates.
    """
    out = np.zeros((rows, row_bytes // size), f"u{size}")
    flat = packed.reshape(-1)
    stages, unit = row_bytes // 128, 64 * 64 + 128 * (8 if size == 1 else 4)
    of_stage = 128 // (4 * size)  # windows
    for panel in range(rows // 128):
        for stage in range(stages):
            for m in range(2):
                at = ((panel * stages + stage) * 2 + m) * unit
                words = flat[at + VALUE_BYTES : at + unit].view(np.uint32)
                for r in range(64):
                    warp, g, h = r // 16, r % 8, r % 16 // 8
                    channel = panel * 128 + 32 * warp + 4 * g + 2 * m + h
                    row = flat[at + 64 * r : at + 64 * (r + 1)].reshape(4, 16)
                    plain = row[np.arange(4) ^ (r // 2 % 4)].reshape(-1).view(out.dtype)
                    for window in range(of_stage):
                        if size == 1:  # a product is 16 windows; a thread has 8 of one row
                            product, within = divmod(window, 16)
                            lane = 4 * g + 2 * (within // 8) + h
                            word, shift = 128 * product + 32 * warp + lane, 4 * (within % 8)
                        else:  # a product is 8 windows; a thread has 4 of rows g and g + 8
                            product, within = divmod(window, 8)
                            lane = 4 * g + 2 * product + within // 4
                            word, shift = 32 * warp + lane, 16 * h + 4 * (within % 4)
                        nibble = int(words[word]) >> shift & 15
                        column = (stage * of_stage + window) * 4
                        out[channel, column + (nibble & 3)] = plain[2 * window]
                        out[channel, column + (nibble >> 2)] = plain[2 * window + 1]
    return out


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16", "fp16"])
def test_every_element_is_where_the_kernel_reads_it(dtype: str) -> None:
    kind = operand(dtype).dtype
    slid = sparse_bits(np.random.default_rng(1), 256, 512 // kind.itemsize, dtype)
    found = read_like_the_kernel(pack(slid), 256, 512, kind.itemsize).view(kind)
    np.testing.assert_array_equal(plain_bits(found), plain_bits(slid))


@pytest.mark.parametrize(
    ("kept", "nibble"),
    [
        ((), 0b1100),
        ((0,), 0b1100),
        ((1,), 0b1101),
        ((2,), 0b1110),
        ((3,), 0b1100),
        ((0, 1), 0b0100),
        ((0, 2), 0b1000),
        ((0, 3), 0b1100),
        ((1, 2), 0b1001),
        ((1, 3), 0b1101),
        ((2, 3), 0b1110),
    ],
)
@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16", "fp16"])
def test_the_nibble_of_each_window(dtype: str, kept: tuple[int, ...], nibble: int) -> None:
    kind = operand(dtype).dtype
    window = np.zeros(4, np.int8)
    window[list(kept)] = [5, -6][: len(kept)]
    slid = np.tile(window.astype(kind), (128, STEP_BYTES // kind.itemsize // 4))
    packed = pack(slid)
    assert (nibbles_of(packed, kind.itemsize) == nibble).all()
    pair = packed[0, 0, 0, : 2 * kind.itemsize].view(kind).astype(np.float32)
    first, second = nibble & 3, nibble >> 2
    assert pair.tolist() == [float(window[first]), float(window[second])]


def test_minus_zero_is_a_zero_but_minus_128_is_none() -> None:
    window = np.array([-0.0, -0.0, 3.0, -0.0], np.float16)
    packed = pack(np.tile(window, (128, 32)))
    assert (nibbles_of(packed, 2) == 0b1110).all()
    low = np.array([0, -128, 0, 0], np.int8)
    packed = pack(np.tile(low, (128, 64)))
    assert (nibbles_of(packed, 1) == 0b1101).all()
    np.testing.assert_array_equal(unpack(packed, np.dtype(np.int8)), np.tile(low, (128, 64)))


@pytest.mark.parametrize(
    ("rows", "columns"), [(127, 256), (64, 256), (129, 256), (128, 128), (128, 260), (1, 1)]
)
def test_other_sizes_are_refused(rows: int, columns: int) -> None:
    with pytest.raises(ShapeError) as caught:
        pack(np.zeros((rows, columns), np.int8))
    assert str(caught.value) == (
        f"the matrix has {rows} rows of {columns} bytes; allowed are multiples of 128 rows and "
        f"256 bytes"
    )


def test_bytes_count_not_columns() -> None:
    assert pack(np.zeros((128, 128), np.float16)).shape == (1, 2, 2, 4608)
    with pytest.raises(ShapeError, match="128 rows of 128 bytes"):
        pack(np.zeros((128, 64), np.float16))


@pytest.mark.parametrize("places", [(0, 1, 2), (1, 2, 3), (0, 1, 2, 3)])
def test_three_in_a_window_are_refused(places: tuple[int, ...]) -> None:
    slid = np.zeros((128, 256), np.int8)
    slid[77, 40 + np.array(places)] = 1
    with pytest.raises(ShapeError) as caught:
        pack(slid)
    assert str(caught.value) == (
        "a window of four has more than two nonzeros; slide the weight first"
    )
