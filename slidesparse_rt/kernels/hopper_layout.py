"""The order in which hopper_gemm.cu reads weights, in NumPy: its definition, and its inverse.

A 2:4 sparse matrix (rows, row bytes) is cut into panels of 128 rows and stages of 128 bytes.  Each
panel has for every stage two *units*, one for each of its blocks of 64 rows.  A unit is what the 128
threads of a warpgroup load for two sparse products: 16 bytes of values a thread for the first 64
bytes of K', the same for the second, then the metadata.

Row ``16 * warp + g + 8 * h`` of a product's 64 rows, in block ``m``, is row ``32 * warp + 4 * g + 2 *
m + h`` of the panel, so that the results that a thread gets for a token lie side by side.

Source: PTX ISA, "Matrix fragments for warpgroup-level multiply-accumulate operation with sparse
matrix A", of m64nNk64 (8-bit) and m64nNk32 (16-bit).
"""

from __future__ import annotations

import numpy as np

from ..arrays import NDArray
from ..errors import ShapeError

__all__ = [
    "PANEL_ROWS",
    "STAGE_BYTES",
    "STEP_BYTES",
    "pack",
    "packed_bytes",
    "unit_bytes",
    "unpack",
]

#: Rows of a panel; the packed matrix has a multiple of them.
PANEL_ROWS = 128
#: Bytes of K' that tokens are loaded by.
STAGE_BYTES = 128
#: Bytes of K' that the packed matrix has a multiple of: two stages.
STEP_BYTES = 256

_THREADS = 128
_HALF = _THREADS * 16


def unit_bytes(element_bytes: int) -> int:
    """Bytes of one unit: 64 rows by 128 bytes of K'."""
    return 2 * _HALF + _THREADS * (8 if element_bytes == 1 else 4)


def packed_bytes(rows: int, row_bytes: int, element_bytes: int) -> int:
    """Bytes of a packed matrix of ``rows`` rows (a multiple of 128) of ``row_bytes`` (of 256)."""
    return rows // 64 * (row_bytes // STAGE_BYTES) * unit_bytes(element_bytes)


def _thread_parts() -> tuple[NDArray, NDArray, NDArray]:
    thread = np.arange(_THREADS)
    return thread // 32, thread % 32 // 4, thread % 4


def _rows(m: int, h: int) -> NDArray:
    """Row of the panel that each thread's registers of block ``m``, half ``h`` belong to."""
    warp, g, _ = _thread_parts()
    return 32 * warp + 4 * g + 2 * m + h


def _windows(slid: NDArray) -> NDArray:
    """The matrix as (rows, windows, 4) unsigned integers."""
    size = slid.dtype.itemsize
    return slid.view(f"u{size}").reshape(slid.shape[0], -1, 4)


def pack(slid: NDArray) -> NDArray:
    """Pack a 2:4 sparse matrix, shape (rows, columns), of int8, float8_e4m3fn or a 16-bit float.

    Returns uint8 of shape (panels, stages, 2, unit bytes).  Raises ShapeError if rows are not a
    multiple of 128, row bytes not of 256, or a window of four has more than two nonzeros.
    """
    size = slid.dtype.itemsize
    rows, row_bytes = slid.shape[0], slid.shape[1] * size
    if rows % PANEL_ROWS or row_bytes % STEP_BYTES:
        raise ShapeError(
            f"the matrix has {rows} rows of {row_bytes} bytes; allowed are multiples of "
            f"{PANEL_ROWS} rows and {STEP_BYTES} bytes"
        )
    windows = _windows(slid)
    magnitude = 0xFF if slid.dtype == np.int8 else (0x7F if size == 1 else 0x7FFF)
    nonzero = (windows & magnitude) != 0
    if (nonzero.sum(axis=2) > 2).any():
        raise ShapeError("a window of four has more than two nonzeros; slide the weight first")
    # The first and the last nonzero; where there is one, an end of the window is the other.
    first = np.argmax(nonzero, axis=2)
    count = nonzero.sum(axis=2)
    second = np.where(count == 2, 3 - np.argmax(nonzero[:, :, ::-1], axis=2), 3)
    first = np.where((count < 2) & (first == 3), 0, first)
    kept = np.take_along_axis(windows, np.stack([first, second], axis=2), axis=2)
    values = np.ascontiguousarray(kept.reshape(rows, -1)).view(np.uint8)  # half the row bytes
    indices = (first | second << 2).astype(np.uint32)
    stages, panels = row_bytes // STAGE_BYTES, rows // PANEL_ROWS
    out = np.zeros((panels, stages, 2, unit_bytes(size)), np.uint8)
    values = values.reshape(panels, PANEL_ROWS, stages, 2, 32)  # two halves of 64 bytes of K'
    nibbles = indices.reshape(panels, PANEL_ROWS, stages, -1, 8)  # eight windows a word
    words = (nibbles << (4 * np.arange(8, dtype=np.uint32))).sum(axis=4, dtype=np.uint32)
    thread = np.arange(_THREADS)
    q = thread % 4
    for m in range(2):
        upper, lower = _rows(m, 0), _rows(m, 1)
        for half in range(2):
            part = values[:, :, :, half, :].reshape(panels, PANEL_ROWS, stages, 2, 4, 4)
            # Each is (thread, panels, stages, bytes): NumPy puts what index arrays select first.
            registers = [part[:, side_, :, c, q] for c in (0, 1) for side_ in (upper, lower)]
            block = np.stack(registers, axis=3).transpose(1, 2, 0, 3, 4)
            flat = block.reshape(panels, stages, _HALF)
            out[:, :, m, half * _HALF : (half + 1) * _HALF] = flat
        mine = np.where(thread % 2 == 0, upper, lower)
        side = thread // 2 % 2
        tail = out[:, :, m, 2 * _HALF :].view(np.uint32)
        if size == 2:
            tail[:, :, :] = _gather_words(words, mine, side)
        else:
            tail[:, :, :_THREADS] = _gather_words(words, mine, side)
            tail[:, :, _THREADS:] = _gather_words(words, mine, 2 + side)
    return out


def _gather_words(words: NDArray, rows: NDArray, columns: NDArray) -> NDArray:
    """``words[panel, rows[t], stage, columns[t]]`` as (panel, stage, t)."""
    return words[:, rows, :, columns].transpose(1, 2, 0)


def unpack(packed: NDArray, dtype: np.dtype) -> NDArray:
    """Undo :func:`pack`: uint8 (panels, stages, 2, unit bytes) to (rows, columns) of ``dtype``."""
    size = np.dtype(dtype).itemsize
    panels, stages = packed.shape[:2]
    rows, windows_a_stage = panels * PANEL_ROWS, STAGE_BYTES // (4 * size)
    values = np.zeros((panels, PANEL_ROWS, stages, 2, 2, 4, 4), np.uint8)
    words = np.zeros((panels, PANEL_ROWS, stages, windows_a_stage // 8), np.uint32)
    for m in range(2):
        for thread in range(_THREADS):
            warp, g, q = thread // 32, thread % 32 // 4, thread % 4
            row = 32 * warp + 4 * g + 2 * m
            for half in range(2):
                at = half * _HALF + thread * 16
                four = packed[:, :, m, at : at + 16].reshape(panels, stages, 4, 4)
                for register in range(4):
                    values[:, row + register % 2, :, half, register // 2, q] = four[:, :, register]
            tail = np.ascontiguousarray(packed[:, :, m, 2 * _HALF :]).view(np.uint32)
            mine, side = row + thread % 2, thread // 2 % 2
            words[:, mine, :, side] = tail[:, :, thread]
            if size == 1:
                words[:, mine, :, 2 + side] = tail[:, :, _THREADS + thread]
    kept = values.reshape(rows, stages * windows_a_stage * 2 * size).view(f"u{size}")
    nibbles = words.reshape(rows, -1, 1) >> (4 * np.arange(8, dtype=np.uint32)) & 15
    nibbles = nibbles.reshape(rows, -1).astype(np.int64)
    out = np.zeros((rows, stages * windows_a_stage, 4), f"u{size}")
    pairs = kept.reshape(rows, -1, 2)
    np.put_along_axis(out, (nibbles & 3)[:, :, None], pairs[:, :, :1], axis=2)
    np.put_along_axis(out, (nibbles >> 2)[:, :, None], pairs[:, :, 1:], axis=2)
    return out.reshape(rows, -1).view(dtype)
