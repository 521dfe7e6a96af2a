"""The order in which hopper_gemm.cu reads weights, in NumPy: its definition, and its inverse.

A 2:4 sparse matrix (rows, row bytes) is cut into panels of 128 rows and stages of 128 bytes.  Each
panel has for every stage two *units*, one for each of its blocks of 64 rows: the kept elements, 64
bytes a row, then the metadata, which names their places.

Row ``16 * warp + g + 8 * h`` of block ``m`` is row ``32 * warp + 4 * g + 2 * m + h`` of the panel,
so that the results that a thread gets for a token lie side by side.

Sources: PTX ISA, "Matrix fragments for warpgroup-level multiply-accumulate operation with sparse
matrix A" (metadata of m64nNk64 and m64nNk32) and "Strides and swizzling modes" (64 bytes).
"""

from __future__ import annotations

import numpy as np

from ..arrays import NDArray
from ..errors import ShapeError

__all__ = [
    "PANEL_ROWS",
    "ROW_MULTIPLE",
    "STAGE_BYTES",
    "STEP_BYTES",
    "pack",
    "packed_bytes",
    "unit_bytes",
    "unpack",
]

#: Rows of a panel; the packed matrix has a multiple of them.
PANEL_ROWS = 128
#: Bytes that rows of tokens are multiples of: lines of L2.  The copy engine takes multiples of 16,
#: but reads two lines then for the 128 bytes that a stage has of a token.
ROW_MULTIPLE = 128
#: Bytes of K' that are loaded at a time.
STAGE_BYTES = 128
#: Bytes of K' that the packed matrix has a multiple of: two stages.
STEP_BYTES = 256

_THREADS = 128
_BLOCK_ROWS = 64
_ROW_BYTES = 64
_VALUE_BYTES = _BLOCK_ROWS * _ROW_BYTES
_CHUNK = 16


def unit_bytes(element_bytes: int) -> int:
    """Bytes of one unit: 64 rows by 128 bytes of K'."""
    return _VALUE_BYTES + _THREADS * (8 if element_bytes == 1 else 4)


def packed_bytes(rows: int, row_bytes: int, element_bytes: int) -> int:
    """Bytes of a packed matrix of ``rows`` rows (a multiple of 128) of ``row_bytes`` (of 256)."""
    return rows // _BLOCK_ROWS * (row_bytes // STAGE_BYTES) * unit_bytes(element_bytes)


def _panel_rows(m: int) -> NDArray:
    """Row of the panel of each of the 64 rows of block ``m``."""
    row = np.arange(_BLOCK_ROWS)
    return 32 * (row // 16) + 4 * (row % 8) + 2 * m + row % 16 // 8


def _chunk_places() -> NDArray:
    """Where each of a row's four chunks lies (row, chunk): the 64-byte swizzle."""
    row = np.arange(_BLOCK_ROWS)[:, None]
    return np.arange(_ROW_BYTES // _CHUNK)[None] ^ (row // 2 % 4)


def _nibble_places(element_bytes: int) -> tuple[NDArray, NDArray, NDArray]:
    """Row of the block and window of the stage of each nibble, and its shift: (words, 8) each."""
    word = np.arange(_THREADS * (2 if element_bytes == 1 else 1))[:, None]
    nibble = np.arange(8)[None]
    thread = word % _THREADS
    low, high, g = thread % 2, thread // 2 % 2, thread % 32 // 4
    if element_bytes == 1:
        row = g + 8 * low
        window = 16 * (word // _THREADS) + 8 * high + nibble
    else:
        row = g + 8 * (nibble // 4)
        window = 8 * high + 4 * low + nibble % 4
    row = row + 16 * (thread // 32)
    row, window, shift = np.broadcast_arrays(row, window, 4 * nibble)
    return row, window, shift


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
    windows = slid.view(f"u{size}").reshape(rows, -1, 4)
    magnitude = 0xFF if slid.dtype == np.int8 else (0x7F if size == 1 else 0x7FFF)
    nonzero = (windows & magnitude) != 0
    count = nonzero.sum(axis=2)
    if (count > 2).any():
        raise ShapeError("a window of four has more than two nonzeros; slide the weight first")
    # The first and the last nonzero; where there is one, an end of the window is the other.
    first = np.argmax(nonzero, axis=2)
    second = np.where(count == 2, 3 - np.argmax(nonzero[:, :, ::-1], axis=2), 3)
    first = np.where((count < 2) & (first == 3), 0, first)
    kept = np.take_along_axis(windows, np.stack([first, second], axis=2), axis=2)
    stages, panels = row_bytes // STAGE_BYTES, rows // PANEL_ROWS
    values = np.ascontiguousarray(kept.reshape(rows, -1)).view(np.uint8)
    values = values.reshape(panels, PANEL_ROWS, stages, _ROW_BYTES // _CHUNK, _CHUNK)
    indices = (first | second << 2).astype(np.uint32).reshape(panels, PANEL_ROWS, stages, -1)
    out = np.zeros((panels, stages, 2, unit_bytes(size)), np.uint8)
    place = _chunk_places()
    row, window, shift = _nibble_places(size)
    for m in range(2):
        panel_row = _panel_rows(m)
        of_block = values[:, panel_row].transpose(0, 2, 1, 3, 4)  # panel, stage, row, chunk, byte
        swizzled = np.empty_like(of_block)
        swizzled[:, :, np.arange(_BLOCK_ROWS)[:, None], place] = of_block
        out[:, :, m, :_VALUE_BYTES] = swizzled.reshape(panels, stages, _VALUE_BYTES)
        # Index arrays on both sides of a slice: (words, 8) comes first, then panels and stages.
        nibbles = indices[:, panel_row[row], :, window]
        words = (nibbles << shift[:, :, None, None].astype(np.uint32)).sum(axis=1, dtype=np.uint32)
        tail = np.ascontiguousarray(words.transpose(1, 2, 0)).view(np.uint8)
        out[:, :, m, _VALUE_BYTES:] = tail
    return out


def unpack(packed: NDArray, dtype: np.dtype[np.generic]) -> NDArray:
    """Undo :func:`pack`: uint8 (panels, stages, 2, unit bytes) to (rows, columns) of ``dtype``."""
    size = np.dtype(dtype).itemsize
    panels, stages = packed.shape[:2]
    windows = STAGE_BYTES // (4 * size)
    pairs = np.zeros((panels, PANEL_ROWS, stages, windows, 2), f"u{size}")
    indices = np.zeros((panels, PANEL_ROWS, stages, windows), np.int64)
    place = _chunk_places()
    row, window, shift = _nibble_places(size)
    for m in range(2):
        panel_row = _panel_rows(m)
        raw = packed[:, :, m, :_VALUE_BYTES].reshape(panels, stages, _BLOCK_ROWS, -1, _CHUNK)
        plain = np.ascontiguousarray(raw[:, :, np.arange(_BLOCK_ROWS)[:, None], place])
        kept = plain.reshape(panels, stages, _BLOCK_ROWS, _ROW_BYTES).view(f"u{size}")
        pairs[:, panel_row] = kept.reshape(*kept.shape[:3], windows, 2).transpose(0, 2, 1, 3, 4)
        words = np.ascontiguousarray(packed[:, :, m, _VALUE_BYTES:]).view(np.uint32)
        nibbles = (
            words.transpose(2, 0, 1)[:, None] >> shift[:, :, None, None].astype(np.uint32) & 15
        )
        indices[:, panel_row[row], :, window] = nibbles
    out = np.zeros((panels, PANEL_ROWS, stages, windows, 4), f"u{size}")
    np.put_along_axis(out, (indices & 3)[..., None], pairs[..., :1], axis=4)
    np.put_along_axis(out, (indices >> 2)[..., None], pairs[..., 1:], axis=4)
    flat: NDArray = out.reshape(panels * PANEL_ROWS, -1).view(dtype)
    return flat
