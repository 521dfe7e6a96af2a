"""How work is spread over threads: pure arithmetic, the same with and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass

from ..dtypes import array_type, operand
from ..errors import OptionError, ShapeError
from ..pattern import Pattern
from .catalog import KernelSpec, quantize_threads

__all__ = ["MAX_INT", "PIECE", "QuantizeConfig", "dequantize_tiles", "quantize_config"]

#: Bytes that a thread loads at a time.
PIECE = 16
#: Largest 32-bit kernel argument.
MAX_INT = 2**31 - 1


@dataclass(frozen=True, slots=True)
class QuantizeConfig:
    """How quantize_lift spreads rows over threads.

    Attributes
    ----------
    vectors:
        Pieces of 16 bytes of a row that a thread holds in registers.
    threads:
        Threads of a block, a multiple of 32.
    rows:
        Rows that a block works on at a time: 1, or one for each of its warps.
    tile:
        Inputs of one tile where rows are longer than the block holds, else 0.
    stage_bytes:
        Shared memory of one row, in bytes.
    """

    vectors: int
    threads: int
    rows: int
    tile: int
    stage_bytes: int

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block, in bytes."""
        return self.rows * self.stage_bytes

    @property
    def warp_row(self) -> bool:
        """Whether each warp has its own row (see catalog.quantize_lift)."""
        return self.rows > 1


def quantize_config(
    columns: int,
    x_type: str,
    out: str,
    pattern: Pattern,
    *,
    shared_limit: int,
    vectors: int | None = None,
    threads: int | None = None,
) -> QuantizeConfig:
    """Return how to quantize rows of ``columns`` inputs.

    Parameters
    ----------
    columns:
        Inputs of a row (K).
    x_type, out, pattern:
        As for :func:`slidesparse_rt.kernels.catalog.quantize_lift`.
    shared_limit:
        Most shared memory of a block, in bytes.
    vectors, threads:
        Choose these instead of the rule's; a row that the block then cannot hold is tiled.

    Raises
    ------
    ShapeError
        If ``columns`` is out of range.
    OptionError
        If ``vectors`` or ``threads`` is not possible.
    """
    in_bytes = array_type(x_type).bits // 8
    out_bytes = operand(out).dtype.itemsize
    slid = pattern.slid_k(columns) if columns > 0 else 0
    if columns < 1 or max(columns * in_bytes, slid * out_bytes) > MAX_INT - 2**20:
        raise ShapeError(f"rows of {columns} elements cannot be quantized; allowed are 1 to 2^27")
    pieces = -(-columns * in_bytes // PIECE)
    if threads is not None and (threads < 32 or threads % 32):
        raise OptionError(f"threads is {threads}; allowed are multiples of 32")
    if threads is None and pieces <= 32 * (vectors or 4):
        # Four rows a block: few enough that a handful of rows still spreads over the GPU.
        vectors = vectors or next(v for v in (1, 2, 4) if pieces <= 32 * v)
        stage = _stage_bytes(32 * vectors * PIECE, columns, in_bytes, out_bytes, pattern)
        return QuantizeConfig(vectors, 4 * 32, 4, 0, stage)
    chosen = vectors
    if vectors is None:
        # Blocks of which two run at a time hide each other's waits.
        fitting = (v for v in (4, 8) if pieces <= v * quantize_threads(v, overlapping=True))
        vectors = next(fitting, 8)
    if threads is None:
        threads = 32 * -(-pieces // (32 * vectors))
    if threads <= quantize_threads(vectors) and pieces <= threads * vectors:
        held = threads * vectors * PIECE
        stage = _stage_bytes(held, columns, in_bytes, out_bytes, pattern)
        if stage <= shared_limit:
            return QuantizeConfig(vectors, threads, 1, 0, stage)
    vectors = chosen or 4
    threads = min(threads, quantize_threads(vectors, tiled=True))
    # A whole number of groups whose windows fill whole chunks of 16 bytes, and room for the two
    # inputs by which the last window of "dense" reaches beyond its group.
    unit = 4 * pattern.group
    elements = threads * vectors * PIECE // in_bytes
    tile = (elements - 4) // unit * unit
    stage = elements * out_bytes + 32
    if tile < unit or stage > shared_limit:
        raise OptionError(
            f"{threads} threads with {vectors} pieces of 16 bytes do not fit {pattern.name} and "
            f"{shared_limit} bytes of shared memory; use other numbers, or leave them out"
        )
    return QuantizeConfig(vectors, threads, 1, tile, stage)


def _stage_bytes(held: int, columns: int, in_bytes: int, out_bytes: int, pattern: Pattern) -> int:
    """Shared memory for one row: what the threads hold, and what windows read beyond the row."""
    elements = max(held // in_bytes, pattern.padded_k(columns))
    return -(-(elements * out_bytes + 32) // 16) * 16


def dequantize_tiles(columns: int, spec: KernelSpec) -> tuple[int, int, int, int]:
    """Return (block width, block height, column tiles, rows of a tile) for results this wide."""
    settings = dict(spec.defines)
    across = -(-columns // settings["COLUMNS"])
    width = 32
    while width < 256 and width < across:
        width *= 2
    height = 256 // width
    return width, height, -(-across // width), settings["ROWS"] * height
