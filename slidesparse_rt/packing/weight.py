"""SparseWeight: a quantized weight that fits its pattern, in memory and on disk."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._version import __version__
from ..arrays import NDArray, as_matrix
from ..dtypes import Operand, operand
from ..errors import DTypeError, FormatError, NonFiniteError, PatternError, ShapeError
from ..pattern import Pattern
from .check import check_values
from .quantize import dequantize, has_negative_zeros, positive_zeros, quantize
from .slide import slide_rows
from .tensorfile import TensorFile, write_file

__all__ = ["FORMAT", "FORMAT_VERSION", "SparseWeight"]

#: What the metadata of a saved weight says that it is.
FORMAT = "slidesparse_rt.sparse_weight"
#: Version of that layout; a reader refuses newer ones.
FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class SparseWeight:
    """A weight of a linear layer, quantized per output channel, that fits its pattern.

    Make it with :meth:`from_array` or :meth:`load`.  The values stay in their (N, K) order: the
    compressed form differs between architectures and is made when a plan is made.

    Attributes
    ----------
    values:
        Shape (N, K), int8, float8_e4m3fn, bfloat16 or float16; read-only; no -0, nothing infinite.
    scales:
        Shape (N,), float32, finite and positive: ``weight ~= values * scales[:, None]``.
        ``None`` for bf16 and fp16.
    pattern:
        The pattern that ``values`` fits.
    dtype:
        The operand format of ``values``.

    Raises
    ------
    ShapeError, DTypeError, NonFiniteError, PatternError
        When made from parts that contradict each other.
    """

    values: NDArray
    scales: NDArray | None
    pattern: Pattern
    dtype: Operand

    def __post_init__(self) -> None:
        _check_parts(self.values, self.scales, self.dtype)
        check_values(self.values, self.pattern, "weight", threads=None)
        if has_negative_zeros(self.values):
            own = self.values.copy()
            positive_zeros(own)
            object.__setattr__(self, "values", own)
        self._freeze()

    def _freeze(self) -> None:
        """Hold read-only views; the caller's arrays stay as writable as they were."""
        for name in ("values", "scales"):
            part = getattr(self, name)
            if part is not None:
                own = part.view()
                own.flags.writeable = False
                object.__setattr__(self, name, own)

    @classmethod
    def from_array(
        cls,
        weight: Any,
        pattern: str | Pattern,
        *,
        dtype: str | Operand = "int8",
        threads: int | None = None,
    ) -> SparseWeight:
        """Check and quantize a weight.

        Parameters
        ----------
        weight:
            Shape (N, K), float32, float16 or bfloat16, any library's host array, any strides.
        pattern:
            The pattern that it fits (see :func:`slidesparse_rt.prune`).
        dtype:
            "int8", "fp8_e4m3", "bf16" or "fp16".
        threads:
            CPU threads; ``None`` takes every core.

        Raises
        ------
        PatternError
            If it does not fit.
        NonFiniteError
            If it holds a NaN or an infinity, or a number too large for "fp16".
        ShapeError, DTypeError, ArrayError, DeviceError, OptionError
            For other inputs that are not as described.
        """
        parsed = Pattern.parse(pattern)
        row = operand(dtype)
        view = as_matrix(weight, "weight", "(N, K)")
        check_values(view, parsed, "weight", threads=threads)
        values, scales = quantize(view, row, threads=threads)
        # A zero stays a zero when it is quantized, so what fitted still fits: no second scan.
        made = object.__new__(cls)
        parts = {"values": values, "scales": scales, "pattern": parsed, "dtype": row}
        for name, part in parts.items():
            object.__setattr__(made, name, part)
        _check_parts(values, scales, row)
        made._freeze()
        return made

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output channels and inputs."""
        return self.n, self.k

    @property
    def n(self) -> int:
        """Output channels."""
        return int(self.values.shape[0])

    @property
    def k(self) -> int:
        """Inputs."""
        return int(self.values.shape[1])

    @property
    def nbytes(self) -> int:
        """Bytes of values and scales."""
        return self.values.nbytes + (0 if self.scales is None else self.scales.nbytes)

    def dequantize(self) -> NDArray:
        """The weight that this one stands for: (N, K) float32, ``values * scales[:, None]``."""
        return dequantize(self.values, self.scales)

    def slide(self, *, threads: int | None = None) -> NDArray:
        """The values as a 2:4 sparse matrix over lifted inputs: (N, K'), same dtype."""
        return slide_rows(self.values, self.pattern, "weight", threads=threads)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a self-describing safetensors file; ``path`` never names a half-written one.

        Raises OSError where the disk is full or the folder cannot be written.
        """
        tensors = {"values": self.values}
        if self.scales is not None:
            tensors["scales"] = self.scales
        write_file(
            path,
            tensors,
            {
                "format": FORMAT,
                "format_version": str(FORMAT_VERSION),
                "pattern": self.pattern.name,
                "dtype": self.dtype.name,
                "writer": f"slidesparse_rt {__version__}",
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SparseWeight:
        """Read what :meth:`save` wrote; everything that the file claims is checked.

        Raises
        ------
        FormatError
            If the file is truncated, foreign, of a newer version, or contradicts itself.
        OSError
            If it cannot be opened.
        """
        with TensorFile(path) as file:
            pattern, row = _described(file)
            expected = {"values"} | ({"scales"} if row.scaled else set())
            if set(file.keys()) != expected:
                raise FormatError(
                    f"{path} holds the tensors {sorted(file.keys())}; a {row.name} weight holds "
                    f"{sorted(expected)}"
                )
            try:
                parts = {name: np.array(file.read(name)) for name in expected}
            except DTypeError as error:
                raise FormatError(f"{path} contradicts itself: {error}") from error
        values = parts["values"]
        try:
            return cls(values, parts.get("scales"), pattern, row)
        except (ShapeError, DTypeError, NonFiniteError, PatternError) as error:
            raise FormatError(f"{path} contradicts itself: {error}") from error

    def __repr__(self) -> str:
        return f"SparseWeight({self.n} x {self.k}, {self.pattern.name}, {self.dtype.name})"


def _described(file: TensorFile) -> tuple[Pattern, Operand]:
    """Pattern and operand format from a file's metadata."""
    metadata = file.metadata
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"{file.path} is no saved SparseWeight: its metadata says format="
            f"{metadata.get('format')!r}, expected {FORMAT!r}; for a plain checkpoint use "
            f"SparseWeight.from_array on its tensors"
        )
    version = metadata.get("format_version", "")
    if not (version.isascii() and version.isdigit()) or int(version[:9]) < 1:
        raise FormatError(f"{file.path} has format_version {version!r}; expected a whole number")
    if int(version[:9]) > FORMAT_VERSION:
        raise FormatError(
            f"{file.path} has format_version {version}, newer than the {FORMAT_VERSION} that "
            f"slidesparse_rt {__version__} reads; upgrade: pip install --upgrade slidesparse-rt"
        )
    try:
        return Pattern.parse(metadata.get("pattern", "")), operand(metadata.get("dtype", ""))
    except (PatternError, DTypeError) as error:
        raise FormatError(f"{file.path} has metadata that is not understood: {error}") from error


def refuse_length(k: int, row: Operand) -> None:
    """Raise ShapeError for a row that is too long for exact sums."""
    if row.max_k is not None and k > row.max_k:
        raise ShapeError(
            f"the weight has K = {k}; {row.name} sums are exact up to K = {row.max_k}; "
            f"split the layer along K"
        )


def _check_parts(values: NDArray, scales: NDArray | None, row: Operand) -> None:
    """Whether values and scales have the shapes, types and ranges of their format."""
    if values.ndim != 2 or values.size == 0:
        raise ShapeError(f"values has shape {values.shape}; allowed is (N, K), both at least 1")
    if values.dtype != row.dtype:
        raise DTypeError(f"values is {values.dtype.name}; a {row.name} weight is {row.dtype.name}")
    refuse_length(values.shape[1], row)
    if row.name == "int8" and values.min() < -127:
        raise NonFiniteError("values holds -128; int8 weights lie in -127..127")
    if row.scaled != (scales is not None):
        raise ShapeError(
            f"a {row.name} weight has {'scales (N,)' if row.scaled else 'no scales'}; "
            f"{'none are' if scales is None else 'some are'} given"
        )
    if scales is not None:
        if scales.shape != values.shape[:1] or scales.dtype != np.float32:
            raise ShapeError(
                f"scales is {scales.dtype.name} of shape {scales.shape}; allowed is float32 of "
                f"shape ({values.shape[0]},)"
            )
        bad = ~(np.isfinite(scales) & (scales > 0))
        if bad.any():
            index = int(np.argmax(bad))
            raise NonFiniteError(
                f"scales holds {scales[index]} at index {index}; scales are finite and positive"
            )
