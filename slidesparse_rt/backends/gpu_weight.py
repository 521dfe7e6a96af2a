"""Weights on a GPU: uploaded or taken from there, checked, quantized and slid by kernels.

The results are those of :mod:`slidesparse_rt.packing`, to the bit.
"""

from __future__ import annotations

import copy
from typing import Any

import numpy as np

from ..arrays import Device, NDArray, device_of, refuse_shape, to_numpy
from ..device_adapters import adapter_of
from ..device_arrays import DeviceArray, order_streams
from ..dtypes import ARRAY_TYPES, ArrayType, Operand
from ..errors import ArrayError, CaptureError, NonFiniteError
from ..kernels.weight_launch import Findings, WeightKernels, weight_kernels
from ..packing.check import PatternReport, refuse_misfit, refuse_nonfinite
from ..packing.weight import SparseWeight, refuse_length
from ..pattern import Pattern
from .gpu_device import Buffer, GpuDevice, is_capturing

__all__ = ["GpuWeight", "exact_types"]


def exact_types(bias: NDArray) -> dict[str, NDArray]:
    """A float32 vector in each array type in which all its values are exact, by the type's name."""
    found: dict[str, NDArray] = {}
    for row in ARRAY_TYPES:
        with np.errstate(over="ignore"):
            narrow = bias.astype(row.dtype)
        if np.array_equal(narrow.astype(np.float32), bias):
            found[row.name] = narrow
    return found


class GpuWeight:
    """A quantized weight in GPU memory, on its way to a backend's own form.

    Attributes
    ----------
    n, k, pattern, operand:
        As of :class:`~slidesparse_rt.SparseWeight`.
    scales, bias:
        Device addresses of float32 vectors (N,); 0 where there is none.
    x_scale:
        Device address of the float32 scale of all activations; 0 where each token has its own.
    bias_exact_in:
        Names of the array types in which every bias value is exact.
    """

    def __init__(
        self,
        device: GpuDevice,
        shape: tuple[int, int],
        pattern: Pattern,
        operand: Operand,
        bias: NDArray | None,
        stream: int,
    ) -> None:
        self.device = device
        self.n, self.k = shape
        self.pattern = pattern
        self.operand = operand
        self._values: Buffer | None = None
        self._pitch = self.k  # elements from row to row of the values
        self._scales: Buffer | None = None
        self._x_scale: Buffer | None = None
        self._biases: dict[str, Buffer] = {}
        self._lent = False
        if bias is not None:
            for name, narrow in exact_types(bias).items():
                self._biases[name] = device.upload(narrow, stream)
        self.bias_exact_in = frozenset(self._biases)

    @property
    def scales(self) -> int:
        """Device address of the channel scales, float32 (N,); 0 without."""
        return 0 if self._scales is None else self._scales.pointer

    @property
    def x_scale(self) -> int:
        """Device address of the scale of all activations, one float32; 0 without."""
        return 0 if self._x_scale is None else self._x_scale.pointer

    def hold_x_scale(self, x_scale: np.float32, stream: int) -> None:
        """Bring the scale of all activations to the device."""
        self._x_scale = self.device.upload(np.full(1, x_scale, np.float32), stream)

    @property
    def bias(self) -> int:
        """Device address of the bias, float32 (N,); 0 without."""
        held = self._biases.get("float32")
        return 0 if held is None else held.pointer

    def bias_in(self, kind: ArrayType) -> int:
        """Device address of the bias in a type in which it is exact."""
        return self._biases[kind.name].pointer

    @property
    def vector_bytes(self) -> int:
        """Bytes of scales and bias; none of its own where they are lent."""
        return 0 if self._lent else sum(buffer.nbytes for buffer in self._vectors())

    def _vectors(self) -> list[Buffer]:
        scales = (self._scales, self._x_scale)
        return [*self._biases.values(), *(buffer for buffer in scales if buffer is not None)]

    def slide(self, rows: int, pitch: int, stream: int) -> Buffer:
        """The values slid into a new zero-padded matrix (rows, pitch)."""
        assert self._values is not None
        size = self.operand.bits // 8
        out = self.device.allocate(rows * pitch * size)
        findings = self.device.allocate(WeightKernels.FINDINGS_BYTES)
        self.device.clear(findings.pointer, findings.nbytes, stream)
        weight_kernels(self.device, self.operand.dtype.name, self.pattern).slide(
            self._values.pointer,
            self._pitch * size,
            out.pointer,
            pitch * size,
            self.n,
            rows,
            self.k,
            findings.pointer,
            stream,
        )
        words = np.empty(findings.nbytes, np.uint8)
        self.device.download(findings.pointer, words, stream)
        findings.close()
        found = Findings.decode(words.tobytes(), self.k, self.pattern)
        report = PatternReport(
            groups=self.n * self.pattern.groups(self.k),
            violations=found.violations,
            nonzeros=0,
            size=self.n * self.k,
            first=found.first,
        )
        refuse_misfit(report, self.pattern, self.k, "weight")
        return out

    def padded(self, rows: int, pitch: int, stream: int) -> Buffer:
        """The values in a new zero-padded matrix (rows, pitch)."""
        assert self._values is not None
        size = self.operand.bits // 8
        out = self.device.allocate(rows * pitch * size)
        self.device.clear(out.pointer, out.nbytes, stream)
        self.device.copy_rows(
            out.pointer,
            pitch * size,
            self._values.pointer,
            self._pitch * size,
            self.k * size,
            self.n,
            stream,
        )
        self.device.synchronize(stream)
        return out

    def padded_scales(self, rows: int, stream: int) -> Buffer:
        """The channel scales in a new vector of ``rows`` float32, zeros at its end."""
        out = self.device.allocate(rows * 4)
        self.device.clear(out.pointer, out.nbytes, stream)
        held = self.n * 4
        self.device.copy_rows(out.pointer, held, self.scales, held, held, 1, stream)
        self.device.synchronize(stream)
        return out

    def lend(self) -> GpuWeight:
        """The same weight, in the same memory, for one of several backends to pack.

        What was lent gives no memory back; this one does, and has to live longer.
        """
        lent = copy.copy(self)
        lent._lent = True
        lent._biases = dict(self._biases)
        return lent

    def drop_values(self) -> None:
        """Give the plain values back, once a backend has its own form."""
        if self._values is not None:
            if not self._lent:
                self._values.close()
            self._values = None

    def close(self) -> None:
        """Give everything back."""
        self.drop_values()
        if not self._lent:
            for buffer in self._vectors():
                buffer.close()
        self._biases.clear()
        self._scales = self._x_scale = None

    def _refuse_overflow(self, stream: int) -> None:
        """Raise NonFiniteError if a finite weight overflowed its 16-bit type."""
        assert self._values is not None
        kind = next(row for row in ARRAY_TYPES if row.dtype == self.operand.dtype)
        view = DeviceArray(self._values.pointer, (self.n, self.k), (self._pitch, 1), kind)
        found = _findings(view, self.pattern, self.device, stream)
        if found.first_nonfinite is not None:
            raise NonFiniteError(
                f"weight row {found.first_nonfinite[0]} holds a number too large for "
                f"{self.operand.name}; use 'bf16' or 'int8'"
            )

    @classmethod
    def from_sparse(
        cls, weight: SparseWeight, bias: NDArray | None, device: GpuDevice, stream: int
    ) -> GpuWeight:
        """Upload a weight that is quantized already."""
        made = cls(device, weight.shape, weight.pattern, weight.dtype, bias, stream)
        made._values = device.upload(np.ascontiguousarray(weight.values), stream)
        if weight.scales is not None:
            made._scales = device.upload(np.ascontiguousarray(weight.scales), stream)
        return made

    @classmethod
    def from_array(
        cls,
        weight: Any,
        pattern: Pattern,
        operand: Operand,
        bias: NDArray | None,
        device: GpuDevice,
        stream: int,
    ) -> GpuWeight:
        """Check and quantize an array (N, K), from the host or from ``device``.

        Raises
        ------
        PatternError, NonFiniteError, ShapeError, DTypeError, ArrayError, DeviceError
            As :meth:`SparseWeight.from_array`; on a GPU the rows must be contiguous.
        """
        upload: Buffer | None = None
        if device_of(weight, "weight") == Device("cuda", device.index):
            current = adapter_of(weight).current_stream(device.index)
            refuse_capture(current)
            order_streams(current, stream)
            view = view_weight(weight, stream)
        else:
            host = to_numpy(weight, "weight")
            refuse_shape(host.shape, "weight", "(N, K)")
            host = np.ascontiguousarray(host)
            upload = device.upload(host, stream)
            kind = next(row for row in ARRAY_TYPES if row.dtype == host.dtype)
            view = DeviceArray(upload.pointer, host.shape, (host.shape[1], 1), kind)
        shape = (view.shape[0], view.shape[1])
        refuse_length(shape[1], operand)
        kernels = weight_kernels(device, view.kind.name, pattern)
        check_on_device(view, pattern, device, stream)
        made = cls(device, shape, pattern, operand, bias, stream)
        size = operand.bits // 8
        # Rows start at multiples of 16 bytes, as the quantizer stores.
        made._pitch = -(-shape[1] * size // 16) * 16 // size
        made._values = device.allocate(shape[0] * made._pitch * size)
        if operand.scaled:
            made._scales = device.allocate(shape[0] * 4)
        kernels.quantize(
            operand,
            view.pointer,
            view.strides[0],
            made._values.pointer,
            made._pitch * size,
            made.scales,
            shape[0],
            shape[1],
            stream,
        )
        device.synchronize(stream)
        if not operand.scaled:
            made._refuse_overflow(stream)
        if upload is not None:
            upload.close()
        return made


def check_on_device(view: DeviceArray, pattern: Pattern, device: GpuDevice, stream: int) -> None:
    """:func:`slidesparse_rt.check_pattern` for a matrix on the GPU."""
    rows, columns = view.shape
    found = refuse_nonfinite_on_device(view, pattern, device, stream)
    report = PatternReport(
        groups=rows * pattern.groups(columns),
        violations=found.violations,
        nonzeros=found.nonzeros,
        size=rows * columns,
        first=found.first,
    )
    refuse_misfit(report, pattern, columns, "weight")


def refuse_nonfinite_on_device(
    view: DeviceArray, pattern: Pattern, device: GpuDevice, stream: int
) -> Findings:
    """Raise NonFiniteError for the first NaN or infinity; what else was found otherwise."""
    found = _findings(view, pattern, device, stream)
    if found.first_nonfinite is not None:
        row, column = found.first_nonfinite
        value = np.empty(1, view.kind.dtype)
        size = view.kind.bits // 8
        address = view.pointer + (row * view.strides[0] + column) * size
        device.download(address, value, stream)
        refuse_nonfinite(float(value[0]), row, column, "weight")
    return found


def _findings(
    view: DeviceArray, pattern: Pattern, device: GpuDevice, stream: int, dtype: str = ""
) -> Findings:
    rows, columns = view.shape
    size = view.kind.bits // 8
    words = np.empty(WeightKernels.FINDINGS_BYTES, np.uint8)
    with device.allocate(words.nbytes) as held:
        device.clear(held.pointer, words.nbytes, stream)
        weight_kernels(device, dtype or view.kind.name, pattern).check(
            view.pointer, view.strides[0] * size, rows, columns, held.pointer, stream
        )
        device.download(held.pointer, words, stream)
    return Findings.decode(words.tobytes(), columns, pattern)


def refuse_capture(stream: int) -> None:
    """Raise CaptureError where a CUDA graph is being captured: preparing allocates and waits."""
    if is_capturing(stream):
        raise CaptureError(
            "a CUDA graph is being captured, and checking, pruning or packing a weight allocates "
            "memory and waits; do it before the capture"
        )


def view_weight(weight: Any, stream: int) -> DeviceArray:
    """A weight (N, K) on the GPU, its rows contiguous; ShapeError or ArrayError otherwise."""
    view = adapter_of(weight).view(weight, "weight", stream)
    refuse_shape(view.shape, "weight", "(N, K)")
    if view.shape[1] > 1 and view.strides[1] != 1:
        raise ArrayError(
            f"weight has strides {view.strides} (elements); on a GPU its rows must be contiguous: "
            f"pass weight.contiguous()"
        )
    if view.shape[0] == 1:  # its stride says nothing
        return DeviceArray(view.pointer, view.shape, (view.shape[1], 1), view.kind)
    return view
