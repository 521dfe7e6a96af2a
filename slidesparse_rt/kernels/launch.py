"""Launching kernels: what is worked out once, and what a call does.

A launcher is made once for fixed types, pattern and row length; calling it costs a few microseconds
of host time.  Calls take device addresses and the stream as integers; they neither allocate nor
synchronize, so they can be captured in a CUDA graph.  The launcher's device must be current in the
calling thread, and every array must be on it.  Launchers may be shared between threads.

What is launched again and again on the same memory is made by ``fixed()`` and costs less; that is
for one thread at a time (:mod:`slidesparse_rt.kernels.fixed`).

docs/kernels.md says what each kernel computes and how many bytes it moves.
"""

from __future__ import annotations

import ctypes
import struct
import threading
from collections.abc import Callable
from math import gcd
from typing import Any, Protocol

from ..dtypes import ArrayType, Operand, array_type, operand
from ..errors import ShapeError
from ..pattern import Pattern
from . import catalog
from .catalog import KernelSpec, format_bytes
from .fixed import FixedDequantize, FixedLaunch, FixedQuantize, argument_offsets
from .geometry import MAX_INT, PIECE, QuantizeConfig, dequantize_tiles, quantize_config
from .loader import Cuda, Kernel, KernelCache, kernels_of

__all__ = [
    "DEQUANTIZE_ARGUMENTS",
    "QUANTIZE_ARGUMENTS",
    "Dequantizer",
    "Quantizer",
    "dequantize_tiles",
    "dequantizer",
    "quantizer",
]

#: Kernel arguments in the order of the sources, as codes of struct: Q address, q 64, i 32 bits.
QUANTIZE_ARGUMENTS = "QqQqQQiiiiii"
DEQUANTIZE_ARGUMENTS = "QqQqQQQqqi"


#: Widest grid that CUDA takes.
_MOST_BLOCKS = 2**31 - 1

# --- quantize and lift ----------------------------------------------------------------------------


class Quantizer:
    """Quantizes and lifts rows of ``columns`` inputs.

    Parameters
    ----------
    kernels:
        The device's kernels.
    columns:
        Inputs of a row (K).
    x_type:
        "float32", "float16" or "bfloat16".
    out:
        Operand: "int8", "fp8_e4m3"; "bf16" and "fp16" only lift.
    pattern:
        How to lift; 2:4 leaves the order as it is.
    row_length:
        Elements of one output row, at least K'; rows are multiples of 16 bytes.  What lies beyond
        K' becomes zeros.
    given_scales:
        Whether the caller gives the scales.
    weight:
        Whether zeros lose their sign (output channels of a weight).
    config:
        How to spread the work; ``None`` applies the rule.
    blocks_per_sm:
        Blocks of the grid for each multiprocessor; ``None``: one for every row (or every few rows
        of a block that holds several), and as many as run at a time where single 16-bit elements
        are loaded.  Tried on an H200: 0.91 to 0.94 of the copy rate, against
        0.84 to 0.88 for a grid that stays; with 2-byte loads 0.67 against 0.76.

    Raises
    ------
    CompileError, LibraryError, ShapeError, OptionError
        As :meth:`KernelCache.load` and :func:`quantize_config` do.
    """

    def __init__(
        self,
        kernels: KernelCache,
        columns: int,
        x_type: str,
        out: str,
        pattern: Pattern,
        row_length: int,
        *,
        given_scales: bool = False,
        weight: bool = False,
        config: QuantizeConfig | None = None,
        blocks_per_sm: int | None = None,
    ) -> None:
        if config is None:
            config = quantize_config(
                columns, x_type, out, pattern, shared_limit=kernels.limits.shared_bytes
            )
        slid, size = pattern.slid_k(columns), operand(out).dtype.itemsize
        if row_length < slid or row_length * size % PIECE or row_length * size > MAX_INT:
            raise ShapeError(
                f"row_length is {row_length}; allowed are multiples of {PIECE // size} from K' = "
                f"{slid} on"
            )
        self.columns = columns
        self.config = config
        in_bytes = array_type(x_type).bits // 8
        #: Bytes of one load, for arrays that are aligned to it, and for any other.
        self.access = gcd(columns * in_bytes, PIECE)
        options = {
            "vectors": config.vectors,
            "threads": config.threads,
            "given_scales": given_scales,
            "weight": weight,
        }
        specs = [
            catalog.quantize_lift(
                x_type,
                out,
                pattern,
                access=access,
                warp_row=config.warp_row,
                tiled=config.tile > 0,
                **options,  # type: ignore[arg-type]
            )
            for access in (self.access, in_bytes)
        ]
        loaded = [kernels.load(spec, shared_bytes=config.shared_bytes) for spec in specs]
        self.kernel, self.fallback = loaded
        self._launch, self._launch_any = (
            Launch(kernels.cuda, kernel, QUANTIZE_ARGUMENTS) for kernel in loaded
        )
        most = []
        for access, kernel in zip((self.access, in_bytes), loaded, strict=True):
            blocks = blocks_per_sm
            if blocks is None and access == 2:
                blocks = kernels.occupancy(kernel, config.threads, config.shared_bytes)
            most.append(
                _MOST_BLOCKS if blocks is None else max(1, blocks) * kernels.limits.sm_count
            )
        self._most_blocks, self._most_any = most
        self._q_pitch = row_length * size
        self._in_bytes = in_bytes
        self._given = given_scales
        self._cuda = kernels.cuda

    def __call__(
        self,
        x: int,
        x_stride: int,
        q: int,
        scales: int,
        rows: int,
        padded_rows: int,
        stream: int,
        given: int = 0,
        given_step: int = 0,
    ) -> None:
        """Launch.

        Parameters
        ----------
        x:
            Address of x (rows, columns).
        x_stride:
            Elements from row to row.
        q:
            Address of the output (padded_rows, row_length), a multiple of 16.
        scales:
            Address of ``rows`` float32, written; anything where the kernel only lifts.
        rows:
            Rows of x.
        padded_rows:
            Rows of q, at least ``rows``; those beyond become zeros.
        stream:
            CUDA stream.
        given, given_step:
            Address of the scales to use, and 0 if one serves all rows, 1 if each row has its own.

        Raises
        ------
        LibraryError
            If the driver refuses the launch.
        """
        if padded_rows <= 0:
            return
        config = self.config
        blocks = -(-padded_rows // config.rows)
        x_stride *= self._in_bytes
        launch, most = self._launch, self._most_blocks
        if (x | x_stride) % self.access:
            launch, most = self._launch_any, self._most_any
        if blocks > most:  # noqa: PLR1730 (min() costs a call)
            blocks = most
        launch(
            blocks,
            config.threads,
            1,
            config.shared_bytes,
            stream,
            x,
            x_stride,
            q,
            self._q_pitch,
            scales,
            given,
            given_step,
            rows,
            padded_rows,
            self.columns,
            config.stage_bytes,
            config.tile,
        )

    def fixed(
        self,
        q: int,
        scales: int,
        rows: int,
        padded_rows: int,
        given: int = 0,
        given_step: int = 0,
    ) -> FixedQuantize:
        """Return the call with all but x and the stream in place; arguments as of a call.

        ``padded_rows`` is at least 1.
        """
        config = self.config
        blocks = -(-padded_rows // config.rows)
        after = (
            *(q, self._q_pitch, scales, given, given_step, rows, padded_rows, self.columns),
            *(config.stage_bytes, config.tile),
        )
        fast, anything = (
            FixedLaunch(
                self._cuda,
                kernel,
                QUANTIZE_ARGUMENTS,
                (min(blocks, most), config.threads, 1, config.shared_bytes),
                (0, 0, *after),
            )
            for kernel, most in (
                (self.kernel, self._most_blocks),
                (self.fallback, self._most_any),
            )
        )
        return FixedQuantize(fast, anything, self.access, self._in_bytes)


# --- dequantize -----------------------------------------------------------------------------------


class Dequantizer:
    """Applies scales and bias to a GEMM's result: (rows, columns) to (rows, columns).

    Parameters
    ----------
    kernels:
        The device's kernels.
    columns:
        Output channels (N).
    acc_type:
        "int32", "float32", "bfloat16" or "float16".
    out_type:
        "float32", "float16" or "bfloat16".
    spec:
        The kernel; ``None`` is the rule's choice.
    """

    def __init__(
        self,
        kernels: KernelCache,
        columns: int,
        acc_type: str,
        out_type: str,
        *,
        spec: KernelSpec | None = None,
    ) -> None:
        spec = catalog.dequantize(acc_type, out_type) if spec is None else spec
        self.columns = columns
        self._acc_bytes = format_bytes(acc_type)
        self._out_bytes = format_bytes(out_type)
        self._acc_align = min(16, dict(spec.defines)["COLUMNS"] * self._acc_bytes)
        self._out_align = min(16, dict(spec.defines)["COLUMNS"] * self._out_bytes)
        self.kernel = kernels.load(spec)
        self.fallback = kernels.load(catalog.dequantize(acc_type, out_type, aligned=False))
        self._cuda = kernels.cuda
        # (launch, block width, block height, column tiles, rows of a tile) of both.
        self._fast, self._any = (
            (Launch(kernels.cuda, one, DEQUANTIZE_ARGUMENTS), *dequantize_tiles(columns, one.spec))
            for one in (self.kernel, self.fallback)
        )

    def __call__(
        self,
        acc: int,
        acc_stride: int,
        out: int,
        out_stride: int,
        token_scales: int,
        channel_scales: int,
        bias: int,
        rows: int,
        stream: int,
    ) -> None:
        """Launch ``out = (acc * token_scales) * channel_scales + bias``.

        Parameters
        ----------
        acc, out:
            Addresses.
        acc_stride, out_stride:
            Elements from row to row.
        token_scales, channel_scales, bias:
            Addresses of float32 vectors (rows), (columns), (columns); 0 leaves a step out.
        rows:
            Tokens (M).
        stream:
            CUDA stream.
        """
        if rows <= 0:
            return
        odd = (acc | acc_stride * self._acc_bytes) % self._acc_align or (
            out | out_stride * self._out_bytes
        ) % self._out_align
        launch, width, height, tiles, tall = self._any if odd else self._fast
        launch(
            tiles * -(-rows // tall),
            width,
            height,
            0,
            stream,
            acc,
            acc_stride,
            out,
            out_stride,
            token_scales,
            channel_scales,
            bias,
            rows,
            self.columns,
            tiles,
        )

    def fixed(
        self,
        acc: int,
        acc_stride: int,
        token_scales: int,
        channel_scales: int,
        bias: int,
        rows: int,
    ) -> FixedDequantize:
        """Return the call with all but the result and the stream in place; arguments as of a call.

        ``rows`` is at least 1.
        """
        acc_odd = (acc | acc_stride * self._acc_bytes) % self._acc_align != 0
        fast, anything = (
            FixedLaunch(
                self._cuda,
                kernel,
                DEQUANTIZE_ARGUMENTS,
                (tiles * -(-rows // tall), width, height, 0),
                (
                    *(acc, acc_stride, 0, 0, token_scales, channel_scales, bias),
                    *(rows, self.columns, tiles),
                ),
            )
            for kernel, (_, width, height, tiles, tall) in (
                (self.kernel, self._fast),
                (self.fallback, self._any),
            )
        )
        return FixedDequantize(
            anything if acc_odd else fast, anything, self._out_align, self._out_bytes
        )


# --- by device ------------------------------------------------------------------------------------


class HasIndex(Protocol):
    """A device by its CUDA number."""

    @property
    def index(self) -> int:
        """CUDA's number of the device."""


def quantizer(
    device: HasIndex,
    kind: ArrayType,
    target: Operand,
    lift: Pattern,
    columns: int,
    row_length: int,
    *,
    given_scales: bool = False,
) -> Quantizer:
    """Return a :class:`Quantizer` on ``device``, with the device's shared kernels."""
    kernels = kernels_of(device.index)
    return Quantizer(
        kernels, columns, kind.name, target.name, lift, row_length, given_scales=given_scales
    )


def dequantizer(device: HasIndex, sums_type: str, kind: ArrayType, columns: int) -> Dequantizer:
    """Return a :class:`Dequantizer` on ``device``, with the device's shared kernels."""
    return Dequantizer(kernels_of(device.index), columns, sums_type, kind.name)


# --- the call -------------------------------------------------------------------------------------


class _Frame(threading.local):
    """A thread's own memory for the arguments of one kernel."""

    def __init__(self, layout: str) -> None:
        self.values = ctypes.create_string_buffer(struct.calcsize(layout))
        start = ctypes.addressof(self.values)
        self.addresses = (ctypes.c_void_p * len(layout))(
            *(start + offset for offset in argument_offsets(layout))
        )


class Launch:
    """One kernel, bound to ``cuLaunchKernel``: a call packs the arguments and launches.

    Parameters
    ----------
    cuda:
        The driver.
    kernel:
        The kernel.
    layout:
        Its arguments as :mod:`struct` codes.
    """

    __slots__ = ("_cuda", "_frame", "_function", "_pack", "_run")

    def __init__(self, cuda: Cuda, kernel: Kernel, layout: str) -> None:
        self._cuda = cuda
        self._function = kernel.function
        self._pack: Callable[..., None] = struct.Struct(layout).pack_into
        self._run: Callable[..., Any] = cuda.raw("cuLaunchKernel")
        self._frame = _Frame(layout)

    def __call__(
        self, blocks: int, width: int, height: int, shared: int, stream: int, *arguments: int
    ) -> None:
        """Launch ``blocks`` blocks of ``width`` x ``height`` threads; LibraryError if refused."""
        frame = self._frame
        self._pack(frame.values, 0, *arguments)
        status = self._run(
            self._function,
            blocks,
            1,
            1,
            width,
            height,
            1,
            shared,
            stream,
            frame.addresses,
            None,
        )
        if status:
            raise self._cuda.error("cuLaunchKernel", status, ())
