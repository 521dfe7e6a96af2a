"""Launching the kernels that prepare weights: checking, pruning, sliding, quantizing."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from ..dtypes import Operand, operand
from ..pattern import Pattern
from . import catalog
from .launch import HasIndex, Launch, Quantizer
from .loader import KernelCache, kernels_of

__all__ = ["WEIGHT_ARGUMENTS", "Findings", "WeightKernels", "weight_kernels"]

#: Kernel arguments in the order of the source, as codes of struct: Q address, q 64, i 32 bits.
WEIGHT_ARGUMENTS = {
    "check": "QqiiQ",
    "prune_magnitude": "QqQqii",
    "prune_wanda": "QqQqQii",
    "slide": "QqQqiiiQ",
    "unslide": "QqQqiiQ",
}

#: The pattern under which lifting leaves the order of inputs as it is.
_IN_ORDER = Pattern.parse("2:4")


@dataclass(frozen=True, slots=True)
class Findings:
    """What check, slide and unslide found.

    Attributes
    ----------
    violations:
        Groups that do not fit.
    nonzeros:
        Elements that are neither +0 nor -0 (check only).
    nonfinite:
        Elements that are NaN or infinite (check only).
    first:
        (row, group, nonzeros) of the first group that does not fit, or ``None``.
    first_nonfinite:
        (row, column) of the first such element, or ``None``.
    """

    violations: int
    nonzeros: int
    nonfinite: int
    first: tuple[int, int, int] | None
    first_nonfinite: tuple[int, int] | None

    @classmethod
    def decode(cls, words: bytes, columns: int, pattern: Pattern) -> Findings:
        """Read the :attr:`WeightKernels.FINDINGS_BYTES` bytes that the kernels left."""
        violations, nonzeros, nonfinite, group, element, _ = struct.unpack("6Q", words)
        first = first_nonfinite = None
        if group:
            index, found = divmod(~group & (2**64 - 1), 64)
            first = (*divmod(index, pattern.groups(columns)), found)
        if element:
            row, column = divmod(~element & (2**64 - 1), columns)
            first_nonfinite = (row, column)
        return cls(violations, nonzeros, nonfinite, first, first_nonfinite)


class WeightKernels:
    """The kernels that prepare weights of one type for one pattern.

    A kernel is compiled when it is first used.  Strides and pitches are bytes from row to row.
    ``findings`` is the address of :attr:`FINDINGS_BYTES` bytes, zero before, that
    :meth:`Findings.decode` reads afterwards.

    Parameters
    ----------
    kernels:
        The device's kernels.
    dtype:
        NumPy name of the type: an array type's, or (check, slide, unslide) an operand's.
    pattern:
        The pattern.
    """

    FINDINGS_BYTES = 48

    def __init__(self, kernels: KernelCache, dtype: str, pattern: Pattern) -> None:
        self._kernels = kernels
        self._dtype = dtype
        self._pattern = pattern

    def check(
        self, w: int, stride: int, rows: int, columns: int, findings: int, stream: int
    ) -> None:
        """Count what does not fit or is not finite in w (rows, columns)."""
        self._run("check", rows, stream, w, stride, rows, columns, findings)

    def prune_magnitude(
        self, w: int, stride: int, out: int, out_stride: int, rows: int, columns: int, stream: int
    ) -> None:
        """Copy w (rows, columns) to out, keeping the largest magnitudes; out may be w."""
        self._run("prune_magnitude", rows, stream, w, stride, out, out_stride, rows, columns)

    def prune_wanda(
        self,
        w: int,
        stride: int,
        out: int,
        out_stride: int,
        norms: int,
        rows: int,
        columns: int,
        stream: int,
    ) -> None:
        """As :meth:`prune_magnitude`, by ``|w| * norms``, float64 (columns)."""
        self._run("prune_wanda", rows, stream, w, stride, out, out_stride, norms, rows, columns)

    def slide(
        self,
        values: int,
        stride: int,
        out: int,
        pitch: int,
        rows: int,
        padded_rows: int,
        columns: int,
        findings: int,
        stream: int,
    ) -> None:
        """Slide values (rows, columns) into out (padded_rows, pitch bytes), zeros elsewhere.

        ``out`` and ``pitch`` are multiples of 8.
        """
        self._run(
            "slide",
            padded_rows,
            stream,
            values,
            stride,
            out,
            pitch,
            rows,
            padded_rows,
            columns,
            findings,
        )

    def unslide(
        self,
        slid: int,
        pitch: int,
        out: int,
        stride: int,
        rows: int,
        columns: int,
        findings: int,
        stream: int,
    ) -> None:
        """Undo :meth:`slide`: slid (rows, pitch bytes) into out (rows, columns)."""
        self._run("unslide", rows, stream, slid, pitch, out, stride, rows, columns, findings)

    def quantize(
        self,
        target: str | Operand,
        x: int,
        x_stride: int,
        q: int,
        q_pitch: int,
        scales: int,
        rows: int,
        columns: int,
        stream: int,
    ) -> None:
        """Quantize x (rows, columns), ``x_stride`` ELEMENTS from row to row, per output channel.

        Writes q (rows, ``q_pitch`` bytes, a multiple of 16) and scales (rows) float32; to "bf16"
        and "fp16" it converts.
        """
        row = operand(target)
        Quantizer(
            self._kernels,
            columns,
            self._dtype,
            row.name,
            _IN_ORDER,
            q_pitch // row.dtype.itemsize,
            weight=True,
        )(x, x_stride, q, scales, rows, rows, stream)

    def _run(self, entry: str, rows: int, stream: int, *arguments: int) -> None:
        if rows <= 0:
            return
        kernel = self._kernels.load(catalog.weights(entry, self._dtype, self._pattern))
        launch = Launch(self._kernels.cuda, kernel, WEIGHT_ARGUMENTS[entry])
        launch(min(rows, 8 * self._kernels.limits.sm_count), 256, 1, 0, stream, *arguments)


def weight_kernels(device: HasIndex, dtype: str, pattern: Pattern) -> WeightKernels:
    """Return :class:`WeightKernels` on ``device``, with the device's shared kernels."""
    return WeightKernels(kernels_of(device.index), dtype, pattern)
