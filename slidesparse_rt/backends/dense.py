"""Dense products through cuBLASLt on the same quantized operands: the fallback and the baseline.

fp8 on Hopper has both scale vectors fused (cuBLAS 12.9 and newer) and writes the result itself; so
do bf16 and fp16 where no bias has to be rounded.  int8 sums come as int32 and take a second pass.
Weights are A (transposed), tokens are B, as in :mod:`slidesparse_rt.backends.cusparselt`.

The library proposes algorithms; the first time a token bucket is met they are timed, and the
fastest is kept for the device.
"""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from functools import partial

from ..dtypes import ArrayType
from ..errors import BackendUnavailable, DeviceMemoryError, LibraryError
from ..ffi.checked import DataType, HostScalar
from ..ffi.cublaslt import (
    Candidate,
    Compute,
    Epilogue,
    Handle,
    Layouts,
    Matmul,
    MatmulAttribute,
    MatmulDescriptor,
    MatrixLayout,
    Operation,
    Preference,
    PreferenceAttribute,
    ReductionScheme,
    ScaleMode,
    check,
    heuristic,
    supports_outer_vector_scales,
)
from ..ffi.cublaslt import library as cublaslt_library
from ..ffi.handles import SHARED
from ..options import PlanOptions
from ..pattern import Pattern
from .base import Problem, Support
from .buckets import token_bucket
from .gpu_device import Buffer, GpuDevice, working_on
from .gpu_gemm import GpuBackend, GpuPrepared, refused_format, round_up
from .gpu_step import Product
from .gpu_weight import GpuWeight
from .timing import fastest
from .trial import trial

__all__ = ["DenseBackend"]

#: Most workspace that an algorithm may ask for; what NVIDIA recommends for Hopper.
_SCRATCH_BYTES = 32 << 20
#: Algorithms to time for one token bucket.
_CANDIDATES = 16
#: Bytes that extents of operands are multiples of.
_MULTIPLE_BYTES = 16
_IDENTITY = Pattern.parse("2:4")


@dataclass(frozen=True, slots=True)
class _Format:
    operand: DataType
    sums: DataType
    sums_type: str
    compute: Compute
    scale: DataType
    capability: tuple[int, int]


_FORMATS = {
    "int8": _Format(DataType.I8, DataType.I32, "int32", Compute.I32, DataType.I32, (8, 0)),
    "fp8_e4m3": _Format(DataType.E4M3, DataType.F32, "float32", Compute.F32, DataType.F32, (8, 9)),
    "bf16": _Format(DataType.BF16, DataType.F32, "float32", Compute.F32, DataType.F32, (8, 0)),
    "fp16": _Format(DataType.F16, DataType.F32, "float32", Compute.F32, DataType.F32, (8, 0)),
}


class _Product(Product):
    """A cuBLASLt product for one number of tokens."""

    def __init__(
        self,
        prepared: DensePrepared,
        matmul: Matmul,
        *,
        direct: bool,
        scaled: bool,
    ) -> None:
        self.direct = direct
        self.how = ""
        self.scratch_bytes = matmul.candidate.workspace_bytes
        self._matmul = matmul
        self._scaled = scaled
        self._weight = prepared.packed.pointer
        ctype = ctypes.c_int32 if prepared.format.scale is DataType.I32 else ctypes.c_float
        self._one = HostScalar(ctype, 1)
        self._zero = HostScalar(ctype, 0)

    def launch(
        self,
        tokens: int,
        token_scales: int,
        target: int,
        target_stride: int,
        scratch: int,
        counters: int,
        stream: int,
    ) -> None:
        del target_stride, counters
        if self._scaled:
            self._matmul.matmul.point(MatmulAttribute.B_SCALE_POINTER, token_scales)
        self._matmul.run(
            self._one.address,
            self._weight,
            tokens,
            self._zero.address,
            target,
            target,
            scratch,
            self.scratch_bytes,
            stream,
        )


class DensePrepared(GpuPrepared):
    """A quantized weight with its zeros in place."""

    def __init__(self, weight: GpuWeight, options: PlanOptions, stream: int) -> None:
        super().__init__(weight, _IDENTITY, options)
        self.format = _FORMATS[weight.operand.name]
        multiple = _MULTIPLE_BYTES * 8 // weight.operand.bits
        self.token_multiple = multiple
        self.row_length = round_up(weight.k, multiple)
        self.padded_n = round_up(weight.n, multiple)
        self.sums_type = self.format.sums_type
        self.packed: Buffer = weight.padded(self.padded_n, self.row_length, stream)
        weight.drop_values()
        self._fuses = weight.operand.name == "fp8_e4m3" and supports_outer_vector_scales(
            cublaslt_library().version, self.device.capability
        )

    @property
    def operand_bytes(self) -> int:
        return self.packed.nbytes

    def can_write(self, kind: ArrayType, out: int, out_stride: int, tokens: int) -> bool:
        """Whether the result can leave the product finished: every step exact or fused."""
        weight = self.weight
        if weight.operand.scaled and not self._fuses:
            return False
        if weight.operand.name in ("bf16", "fp16") and kind.name not in (
            weight.operand.dtype.name,
            "float32",
        ):
            return False
        if weight.bias and kind.name not in weight.bias_exact_in:
            return False
        row_bytes = weight.n * kind.bits // 8
        return (
            out_stride == weight.n
            and weight.n == self.padded_n
            and out % _MULTIPLE_BYTES == 0
            and row_bytes % _MULTIPLE_BYTES == 0
            and tokens > 0
        )

    def make_product(self, tokens: int, direct: ArrayType | None, stream: int) -> _Product:
        handle = SHARED.cublaslt(self.device.index, around=partial(working_on, self.device.index))
        made = None
        if direct is not None:
            made = self._found(handle, tokens, direct, stream)
        padded = round_up(tokens, self.token_multiple)
        made = made or self._found(handle, padded, None, stream)
        if made is None:
            raise BackendUnavailable(
                f"cuBLASLt {handle.library.version} has no algorithm for {padded} x "
                f"{self.padded_n} x {self.row_length} {self.weight.operand.name} on "
                f"{self.device.name}; use backend='cusparselt'"
            )
        return made

    def release(self) -> None:
        self.packed.close()

    def _product(self, matmul: Matmul, direct: ArrayType | None) -> _Product:
        """The product of a call that writes results of ``direct``, or sums."""
        writes = direct is not None
        return _Product(self, matmul, direct=writes, scaled=writes and self._fuses)

    def _found(
        self, handle: Handle, tokens: int, direct: ArrayType | None, stream: int
    ) -> _Product | None:
        """The product for exactly ``tokens`` rows, or ``None`` if the library has none."""
        best, memory = None, True
        try:
            best = self._choice(handle, token_bucket(tokens), direct, stream)
        except DeviceMemoryError:
            memory = False  # timing takes operands for the whole bucket; the run may still fit
        except LibraryError:
            pass  # what the library proposes for the bucket fails, which says nothing of this M
        descriptor, layouts = self._described(handle, tokens, direct)
        found: Candidate | None = None
        if best is not None:
            try:
                found = check(handle, descriptor, layouts, best)
            except DeviceMemoryError:
                raise
            except LibraryError:
                pass  # what was chosen for the bucket need not run for every M in it
        if found is None:
            proposed = self._candidates(handle, descriptor, layouts)
            if not proposed:
                return None
            found = proposed[0]
        made = self._product(Matmul(handle, descriptor, layouts, found), direct)
        made.chosen = memory
        return made

    def _choice(
        self, handle: Handle, bucket: int, direct: ArrayType | None, stream: int
    ) -> bytes | None:
        """The algorithm that is fastest for ``bucket`` tokens; those are timed once a device."""
        key = (
            "dense",
            handle.library.version,
            self.padded_n,
            self.weight.k,
            self.weight.operand.name,
            bool(self.weight.x_scale),
            "" if direct is None else direct.name,
            bool(direct is not None and self.weight.bias),
            bucket,
        )
        with self.device.lock:
            stored: bytes | None = self.device.choices.get(key)
        if stored is not None:
            return stored
        padded = round_up(bucket, self.token_multiple)
        descriptor, layouts = self._described(handle, padded, direct)
        found = self._candidates(handle, descriptor, layouts)
        if not found:
            return None
        best = self._timed(handle, descriptor, layouts, found, padded, direct, stream)
        with self.device.lock:
            chosen: bytes = self.device.choices.setdefault(key, best.algorithm)
        return chosen

    def _described(
        self, handle: Handle, tokens: int, direct: ArrayType | None
    ) -> tuple[MatmulDescriptor, Layouts]:
        lib, row, weight = handle.library, self.format, self.weight
        descriptor = MatmulDescriptor(lib, row.compute, row.scale)
        descriptor.set(MatmulAttribute.TRANSA, Operation.T)
        result = row.sums if direct is None else DataType(direct.cuda_data_type)
        if direct is not None and self._fuses:
            descriptor.set(MatmulAttribute.A_SCALE_MODE, ScaleMode.OUTER_VEC_F32)
            descriptor.set(MatmulAttribute.B_SCALE_MODE, ScaleMode.OUTER_VEC_F32)
            descriptor.point(MatmulAttribute.A_SCALE_POINTER, weight.scales)
            descriptor.point(MatmulAttribute.B_SCALE_POINTER, weight.scales)
        if direct is not None and weight.bias:
            descriptor.set(MatmulAttribute.EPILOGUE, Epilogue.BIAS)
            descriptor.set(MatmulAttribute.BIAS_DATA_TYPE, result)
            descriptor.point(MatmulAttribute.BIAS_POINTER, weight.bias_in(direct))
        a = MatrixLayout(lib, row.operand, self.row_length, self.padded_n, ld=self.row_length)
        b = MatrixLayout(lib, row.operand, self.row_length, tokens, ld=self.row_length)
        d = MatrixLayout(lib, result, self.padded_n, tokens, ld=self.padded_n)
        return descriptor, Layouts(a, b, d, d)

    def _candidates(
        self, handle: Handle, descriptor: MatmulDescriptor, layouts: Layouts
    ) -> list[Candidate]:
        preference = Preference(handle.library)
        preference.set(PreferenceAttribute.MAX_WORKSPACE_BYTES, _SCRATCH_BYTES)
        # Partial sums of a split K are never rounded to the type of the result.
        preference.set(PreferenceAttribute.REDUCTION_SCHEME_MASK, ReductionScheme.COMPUTE_TYPE)
        preference.set(PreferenceAttribute.MIN_ALIGNMENT_D_BYTES, _MULTIPLE_BYTES)
        preference.set(PreferenceAttribute.MIN_ALIGNMENT_C_BYTES, _MULTIPLE_BYTES)
        return heuristic(handle, descriptor, layouts, preference, count=_CANDIDATES)

    def _timed(
        self,
        handle: Handle,
        descriptor: MatmulDescriptor,
        layouts: Layouts,
        found: list[Candidate],
        tokens: int,
        direct: ArrayType | None,
        stream: int,
    ) -> Candidate:
        if len(found) == 1:
            return found[0]
        products = [
            self._product(Matmul(handle, descriptor, layouts, candidate), direct)
            for candidate in found
        ]
        width = 4 if direct is None else direct.bits // 8
        with trial(self, products, tokens, width, stream) as (runs, empty):
            return found[fastest(runs, stream, before=empty)]


class DenseBackend(GpuBackend):
    """Dense tensor cores through cuBLASLt: no lifting, no use of the zeros."""

    name = "dense"

    def supports_on(self, problem: Problem, device: GpuDevice) -> Support:
        """Whether the library multiplies this format on this GPU."""
        row = _FORMATS.get(problem.dtype.name)
        refusal = refused_format(
            "cuBLASLt", None if row is None else row.capability, problem, device
        )
        if refusal:
            return Support(False, refusal)
        return Support(True)

    def pack(self, weight: GpuWeight, options: PlanOptions, stream: int) -> DensePrepared:
        """Pad the weight."""
        return DensePrepared(weight, options, stream)
