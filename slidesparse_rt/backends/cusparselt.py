"""Sparse products through cuSPARSELt: the portable GPU backend.

Layout that the library takes (weights are the structured operand A): W (N, K') row-major is
declared column-major K' x N and transposed; X (M, K') row-major is column-major K' x M; D is
column-major N x M, which is (M, N) row-major.  Extents and leading dimensions are multiples of 16
bytes for X and of 32 bytes for W, counted in elements.

int8 sums come as int32 and are exact; fp8 sums come as float32; bf16 and fp16 results come rounded
to their own type.  Token scales are a second pass: the library cannot fuse scales for both sides.

It can fuse those of the channels ("alpha vector"), for int8 with 16-bit results: alpha is then a
device vector with a float32 for each row of D, and beta stays a number in host memory, as in
PyTorch's use (aten/src/ATen/native/sparse/cuda/cuSPARSELtOps.cpp) and NVIDIA's samples.
``PlanOptions(fuse_channel_scales=True)`` asks for it; results are bfloat16, whose range is
float32's.
"""

from __future__ import annotations

import contextlib
import ctypes
from dataclasses import dataclass, replace
from functools import partial

from ..dtypes import ArrayType
from ..errors import DeviceMemoryError, LibraryError, OptionError
from ..ffi.checked import DataType, HostScalar
from ..ffi.cusparselt import (
    AlgAttribute,
    AlgSelection,
    Compute,
    Handle,
    MatDescriptor,
    MatmulAttribute,
    MatmulDescriptor,
    MatmulPlan,
    Operation,
    SplitKMode,
    Status,
)
from ..ffi.cusparselt import library as cusparselt_library
from ..ffi.handles import SHARED
from ..ffi.libraries import version_text
from ..kernels.catalog import format_bytes
from ..options import PlanOptions
from .base import Problem, Support
from .buckets import token_bucket
from .fp16_probe import fp16_problem
from .gpu_device import Buffer, GpuDevice, working_on
from .gpu_gemm import GpuBackend, GpuPrepared, refused_format, round_up
from .gpu_step import Product
from .gpu_weight import GpuWeight

__all__ = ["CusparseltBackend"]


#: Workspace for a search, which also tries algorithms that need more than the default one.
_SEARCH_SCRATCH = 64 << 20


@dataclass(frozen=True, slots=True)
class _Format:
    """How the library multiplies one operand format."""

    operand: DataType
    sums: DataType
    sums_type: str
    compute: Compute
    #: Lowest compute capability.
    capability: tuple[int, int]


_FORMATS = {
    "int8": _Format(DataType.I8, DataType.I32, "int32", Compute.I32, (8, 0)),
    "fp8_e4m3": _Format(DataType.E4M3, DataType.F32, "float32", Compute.F32, (8, 9)),
    "bf16": _Format(DataType.BF16, DataType.BF16, "bfloat16", Compute.F32, (8, 0)),
    "fp16": _Format(DataType.F16, DataType.F16, "float16", Compute.F32, (8, 0)),
}
#: int8 with the channel scales fused.
_FUSED = replace(_FORMATS["int8"], sums=DataType.BF16, sums_type="bfloat16")


@dataclass(frozen=True, slots=True)
class Choice:
    """The algorithm that a search chose for one problem."""

    config_id: int
    split_k: int
    split_k_mode: int


def _one_and_zero() -> tuple[HostScalar, HostScalar]:
    """Alpha and beta in host memory; the caller keeps them as long as their addresses are used."""
    return HostScalar(ctypes.c_float, 1.0), HostScalar(ctypes.c_float, 0.0)


class _Product(Product):
    """A searched cuSPARSELt plan for one padded number of tokens."""

    direct = False

    def __init__(self, prepared: CusparseltPrepared, plan: MatmulPlan, scratch_bytes: int) -> None:
        self.scratch_bytes = scratch_bytes
        self.how = ""
        self._plan = plan
        self._weight = prepared.compressed.pointer
        self._one, self._zero = _one_and_zero()
        self._alpha = prepared.alpha or self._one.address

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
        del token_scales, target_stride, counters
        self._plan.matmul(
            self._alpha,
            self._weight,
            tokens,
            self._zero.address,
            target,
            target,
            scratch,
            stream,
        )


class CusparseltPrepared(GpuPrepared):
    """A weight compressed by cuSPARSELt."""

    def __init__(self, weight: GpuWeight, options: PlanOptions, stream: int) -> None:
        super().__init__(weight, weight.pattern, options)
        self._fused: Buffer | None = None
        format_ = _FUSED if options.fuse_channel_scales else _FORMATS[weight.operand.name]
        self.format = format_
        size = weight.operand.bits // 8
        self.token_multiple = 16 // size
        self.row_length = round_up(weight.pattern.slid_k(weight.k), 32 // size)
        self.padded_n = round_up(weight.n, 32 // size)
        self.sums_type = format_.sums_type
        if options.fuse_channel_scales:
            self._refuse_unless_fusing()
            self._fused = weight.padded_scales(self.padded_n, stream)
        with weight.slide(self.padded_n, self.row_length, stream) as slid:
            self.compressed = self._compress(slid, stream)
        weight.drop_values()

    @property
    def operand_bytes(self) -> int:
        return self.compressed.nbytes + (0 if self._fused is None else self._fused.nbytes)

    @property
    def alpha(self) -> int:
        """Device address of the channel scales that the product applies; 0: it applies none."""
        return 0 if self._fused is None else self._fused.pointer

    @property
    def channel_scales(self) -> int:
        return 0 if self._fused is not None else super().channel_scales

    def can_write(self, kind: ArrayType, out: int, out_stride: int, tokens: int) -> bool:
        """Never: one of the two scales is always left to a second pass."""
        del kind, out, out_stride, tokens
        return False

    def make_product(self, tokens: int, direct: ArrayType | None, stream: int) -> _Product:
        del direct
        handle = self._handle()
        padded = round_up(tokens, self.token_multiple)
        choice: Choice | None = None
        with contextlib.suppress(DeviceMemoryError):
            # Searching takes operands for the whole bucket; the run itself may still fit.
            choice = self._choice(handle, token_bucket(tokens), stream)
        try:
            plan = self._plan(handle, padded, choice)
        except DeviceMemoryError:
            raise
        except LibraryError:
            # What was chosen for the bucket need not exist for every M in it.
            plan = self._plan(handle, padded, None)
        made = _Product(self, plan, plan.workspace_bytes())
        made.chosen = choice is not None
        return made

    def release(self) -> None:
        self.compressed.close()
        if self._fused is not None:
            self._fused.close()

    def _refuse_unless_fusing(self) -> None:
        """Raise OptionError where the library has no product that applies channel scales."""
        handle = self._handle()
        try:
            self._plan(handle, self.token_multiple, None)
        except LibraryError as error:
            if error.status != Status.NOT_SUPPORTED:
                raise
            raise OptionError(
                f"fuse_channel_scales is set, but cuSPARSELt "
                f"{version_text(handle.library.version)} cannot fuse them on {self.device.name} "
                f"({error}); leave fuse_channel_scales out"
            ) from error

    def _handle(self) -> Handle:
        return SHARED.cusparselt(self.device.index, around=partial(working_on, self.device.index))

    def _structured(self, handle: Handle) -> MatDescriptor:
        return MatDescriptor(
            handle,
            self.row_length,
            self.padded_n,
            self.row_length,
            self.format.operand,
            structured=True,
        )

    def _compress(self, slid: Buffer, stream: int) -> Buffer:
        descriptor = self._structured(self._handle())
        nbytes, scratch_bytes = descriptor.compressed_size()
        target = self.device.allocate(nbytes)
        scratch = self.device.allocate(scratch_bytes)
        descriptor.compress(
            slid.pointer, target.pointer, scratch.pointer, stream, operation=Operation.T
        )
        self.device.synchronize(stream)
        scratch.close()
        return target

    def _selection(self, handle: Handle, padded_tokens: int) -> AlgSelection:
        row = self.format
        weight = self._structured(handle)
        tokens = MatDescriptor(handle, self.row_length, padded_tokens, self.row_length, row.operand)
        sums = MatDescriptor(handle, self.padded_n, padded_tokens, self.padded_n, row.sums)
        matmul = MatmulDescriptor(
            (Operation.T, Operation.N), (weight, tokens, sums, sums), row.compute
        )
        if self.options.fuse_channel_scales:
            matmul.set(MatmulAttribute.ALPHA_VECTOR_SCALING, 1)
        return AlgSelection(matmul)

    def _plan(self, handle: Handle, padded_tokens: int, choice: Choice | None) -> MatmulPlan:
        selection = self._selection(handle, padded_tokens)
        if choice is not None:
            selection.set(AlgAttribute.CONFIG_ID, choice.config_id)
            if choice.split_k > 1:
                selection.set(AlgAttribute.SPLIT_K, choice.split_k)
                if choice.split_k_mode != SplitKMode.INVALID:
                    selection.set(AlgAttribute.SPLIT_K_MODE, choice.split_k_mode)
        return MatmulPlan(selection)

    def _choice(self, handle: Handle, bucket: int, stream: int) -> Choice:
        """What the library's search finds fastest for ``bucket`` tokens; searched once a device."""
        key = (
            "cusparselt",
            handle.library.version,
            self.padded_n,
            self.row_length,
            self.weight.operand.name,
            self.sums_type,
            bucket,
        )
        with self.device.lock:
            found = self.device.choices.get(key)
            if found is None:
                found = self.device.choices[key] = self._search(handle, bucket, stream)
        chosen: Choice = found
        return chosen

    def _search(self, handle: Handle, bucket: int, stream: int) -> Choice:
        padded = round_up(bucket, self.token_multiple)
        selection = self._selection(handle, padded)
        plan = MatmulPlan(selection)
        one, zero = _one_and_zero()
        size = self.weight.operand.bits // 8
        width = format_bytes(self.sums_type)
        with (
            self.device.filled(padded * self.row_length * size, self.weight.operand, stream) as x,
            self.device.allocate(padded * self.padded_n * width) as sums,
            self.device.allocate(max(plan.workspace_bytes(), _SEARCH_SCRATCH)) as scratch,
        ):
            plan.search(
                self.alpha or one.address,
                self.compressed.pointer,
                x.pointer,
                zero.address,
                sums.pointer,
                sums.pointer,
                scratch.pointer,
                stream,
            )
            self.device.synchronize(stream)
        return Choice(
            selection.get(AlgAttribute.CONFIG_ID),
            selection.get(AlgAttribute.SPLIT_K),
            selection.get(AlgAttribute.SPLIT_K_MODE),
        )


class CusparseltBackend(GpuBackend):
    """2:4 sparse tensor cores through cuSPARSELt, every pattern lifted to windows."""

    name = "cusparselt"

    def supports_on(self, problem: Problem, device: GpuDevice) -> Support:
        """Whether the library multiplies this format on this GPU."""
        row = _FORMATS.get(problem.dtype.name)
        refusal = refused_format(
            "cuSPARSELt", None if row is None else row.capability, problem, device
        )
        if refusal:
            return Support(False, refusal)
        version = cusparselt_library().version
        if problem.dtype.name == "fp8_e4m3" and device.capability == (8, 9) and version < (0, 8):
            return Support(False, "fp8 on compute capability 8.9 needs cuSPARSELt 0.8 or newer")
        if problem.dtype.name == "fp16":
            wrong = fp16_problem(
                device.index, (device.name, device.driver_version, version_text(version))
            )
            if wrong:
                return Support(
                    False,
                    f"fp16 products of cuSPARSELt {version_text(version)} fail on {device.name} "
                    f"(tried in a process of its own: {wrong}); use bf16, or backend='dense'",
                )
        return Support(True)

    def pack(self, weight: GpuWeight, options: PlanOptions, stream: int) -> CusparseltPrepared:
        """Slide and compress the weight."""
        return CusparseltPrepared(weight, options, stream)
