"""What the GPU backends have in common: the weight on the GPU, and the steps that it is run by."""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from ..arrays import Device, NDArray
from ..device_arrays import DeviceArray
from ..dtypes import ArrayType
from ..errors import CaptureError
from ..kernels.catalog import format_bytes
from ..kernels.launch import Dequantizer, Quantizer, dequantizer, quantizer
from ..options import PlanOptions
from ..packing.weight import SparseWeight
from ..pattern import Pattern
from .base import Config, Problem, RawWeight, Support
from .gpu_device import GpuDevice, gpu_device, is_capturing, working_on
from .gpu_step import Layout, Product, Step
from .gpu_weight import GpuWeight
from .workspace import Memory

__all__ = [
    "GpuBackend",
    "GpuPrepared",
    "parts_of",
    "refused_format",
    "round_up",
    "to_gpu",
]

#: Tokens of one launch are a multiple of this where a run is split.
_SPLIT = 256
#: Products and steps that one thread keeps ready for one plan; each is a few kilobytes.
_KEPT = 128
_ALIGNMENT = 256


def round_up(value: int, multiple: int) -> int:
    """``value`` rounded up to a multiple."""
    return -(-value // multiple) * multiple


def parts_of(tokens: int, most: int) -> set[int]:
    """The numbers of tokens of the launches of a run that takes at most ``most`` at a time."""
    return {min(tokens, most), tokens % most} - {0}


class GpuPrepared(ABC):
    """A weight on a GPU in a backend's own form; subclasses bring the product."""

    def __init__(self, weight: GpuWeight, lift: Pattern, options: PlanOptions) -> None:
        self.device: GpuDevice = weight.device
        self.weight = weight
        self.options = options
        #: How activations are repeated: the weight's pattern, or 2:4, which repeats nothing.
        self.lift = lift
        #: Numbers of tokens that the user prepared for: what is made for them stays.
        self.pinned: set[int] = set()
        self._threads = threading.local()
        self._quantizers: dict[str, Quantizer] = {}
        self._dequantizers: dict[str, Dequantizer] = {}

    # What a backend decides.

    #: Multiples that tokens and the row length of quantized tokens are padded to, in elements.
    token_multiple: int
    row_length: int
    #: Columns of the accumulators, and their type's name in the kernel catalogue.
    padded_n: int
    sums_type: str
    #: Whether the product writes every result itself, whatever its type, address and stride.
    always_direct: bool = False

    @property
    @abstractmethod
    def operand_bytes(self) -> int:
        """Bytes of the weight in the backend's own form."""

    @abstractmethod
    def make_product(self, tokens: int, direct: ArrayType | None, stream: int) -> Product:
        """Make the product for ``tokens`` tokens; ``direct``: may write results of that type.

        It may allocate, search and wait.
        """

    @abstractmethod
    def can_write(self, kind: ArrayType, out: int, out_stride: int, tokens: int) -> bool:
        """Whether the library could write a result of ``kind`` at this address itself.

        Of the address nothing counts but its lowest 8 bits.
        """

    def compile_ahead(self, tokens: Iterable[int], kind: ArrayType) -> None:
        """Compile side by side what products with results of ``kind`` may need, where that is ours.

        Raises BackendUnavailable, CompileError where there is no NVRTC, or none for this GPU.
        """
        del tokens, kind  # libraries bring their kernels

    @abstractmethod
    def release(self) -> None:
        """Give back the backend's own form of the weight."""

    # What they share.

    @property
    def channel_scales(self) -> int:
        """Device address of the channel scales that the second pass applies; 0: none are left."""
        return self.weight.scales

    @property
    def nbytes(self) -> int:
        """Device memory held: the packed weight, scales and bias."""
        return self.operand_bytes + self.weight.vector_bytes

    def most_tokens(self, limit: int) -> int:
        """Tokens whose workspace stays within ``limit`` bytes, by the layout without scratch."""
        operand = self.weight.operand
        sums = 0 if self.always_direct else self.padded_n * 4
        a_token = self.row_length * operand.bits // 8 + 4 + sums
        # Kernels count tokens in 32 bits.
        return min(2**31 - 2 * _SPLIT, max(_SPLIT, limit // a_token // _SPLIT * _SPLIT))

    def close(self) -> None:
        """Give all device memory back."""
        self._threads = threading.local()
        self.release()
        self.weight.close()

    def step(
        self, tokens: int, x_kind: ArrayType, out_kind: ArrayType, direct: bool, stream: int
    ) -> Step:
        """What a launch for ``tokens`` tokens does, from this thread's cache or new.

        Raises CaptureError where it would have to be made while ``stream`` is captured.
        """
        threads = self._threads
        cache: OrderedDict[tuple[int, str, str, bool], Step] | None
        cache = getattr(threads, "steps", None)
        if cache is None:
            cache = threads.steps = OrderedDict()
        key = (tokens, x_kind.name, out_kind.name, direct)
        found = cache.get(key)
        if found is None:
            with working_on(self.device.index):
                found = cache[key] = Step(self, tokens, x_kind, out_kind, direct, stream)
            self._evict(cache)
        else:
            cache.move_to_end(key)
        return found

    def layout(self, product: Product, tokens: int) -> Layout:
        """Where things lie for ``tokens`` tokens."""
        padded = round_up(tokens, self.token_multiple)
        operand = self.weight.operand
        rows = max(padded, product.rows_read)
        scales = round_up(rows * self.row_length * operand.bits // 8, _ALIGNMENT)
        sums = scales + round_up(padded * 4 if operand.scaled else 0, _ALIGNMENT)
        width = format_bytes(self.sums_type)
        taken = 0 if product.direct else padded * self.padded_n * width
        scratch = sums + round_up(taken, _ALIGNMENT)
        return Layout(padded, scales, sums, scratch, scratch + product.scratch_bytes)

    def product(self, tokens: int, direct: ArrayType | None, stream: int) -> Product:
        """The product for ``tokens``, from this thread's cache or new.

        Raises CaptureError where it would have to be made while ``stream`` is captured.
        """
        cache: OrderedDict[tuple[int, str], Product] | None
        cache = getattr(self._threads, "products", None)
        if cache is None:
            cache = self._threads.products = OrderedDict()
        key = (tokens, "" if direct is None else direct.name)
        found = cache.get(key)
        if found is not None:
            cache.move_to_end(key)
            return found
        if is_capturing(stream):
            results, given = "", ""
            if direct is not None:
                results, given = f" with {direct.name} results", f", x_dtype={direct.name!r}"
            raise CaptureError(
                f"a CUDA graph is being captured, and this plan is not prepared for {tokens} "
                f"tokens{results} on this thread; call plan.prepare(tokens=[{tokens}]{given}) "
                f"before the capture"
            )
        made = self.make_product(tokens, direct, stream)
        cache[key] = made
        self._evict(cache)
        return made

    def _evict(self, cache: OrderedDict[Any, Any]) -> None:
        """Forget the entry that was not used for longest, but none that was prepared for."""
        if len(cache) > _KEPT:
            oldest = next((key for key in cache if key[0] not in self.pinned), None)
            if oldest is not None:
                del cache[oldest]

    def quantizer(self, kind: ArrayType, stream: int) -> Quantizer:
        """The compiled quantize-and-lift for activations of ``kind``."""
        found = self._quantizers.get(kind.name)
        if found is None:
            self._refuse_capture(stream, kind)
            found = quantizer(
                self.device,
                kind,
                self.weight.operand,
                self.lift,
                self.weight.k,
                self.row_length,
                given_scales=self.weight.x_scale != 0,
            )
            self._quantizers[kind.name] = found
        return found

    def dequantizer(self, kind: ArrayType, stream: int) -> Dequantizer:
        """The compiled dequantize into results of ``kind``."""
        found = self._dequantizers.get(kind.name)
        if found is None:
            self._refuse_capture(stream, kind)
            found = dequantizer(self.device, self.sums_type, kind, self.weight.n)
            self._dequantizers[kind.name] = found
        return found

    def _refuse_capture(self, stream: int, kind: ArrayType) -> None:
        if is_capturing(stream):
            raise CaptureError(
                f"a CUDA graph is being captured, and this plan is not prepared for {kind.name}; "
                f"call plan.prepare(..., x_dtype={kind.name!r}) before the capture"
            )


def refused_format(
    library: str, capability: tuple[int, int] | None, problem: Problem, device: GpuDevice
) -> str:
    """Why ``library`` cannot multiply a format that needs ``capability``; "" if it can.

    ``capability`` is the lowest compute capability, ``None`` for a format that it does not have.
    """
    if capability is None:
        return f"{library} has no {problem.dtype.name} product"
    if device.capability < capability:
        needed, found = (".".join(map(str, pair)) for pair in (capability, device.capability))
        return f"{problem.dtype.name} needs compute capability {needed}, {device.name} has {found}"
    return ""


def to_gpu(
    weight: SparseWeight | RawWeight,
    bias: NDArray | None,
    gpu: GpuDevice,
    x_scale: np.float32 | None,
) -> GpuWeight:
    """Bring a weight to a GPU, check and quantize it there; ``gpu`` is current."""
    stream = gpu.packing_stream
    if isinstance(weight, SparseWeight):
        held = GpuWeight.from_sparse(weight, bias, gpu, stream)
    else:
        held = GpuWeight.from_array(weight.array, weight.pattern, weight.operand, bias, gpu, stream)
    try:
        if x_scale is not None:
            held.hold_x_scale(x_scale, stream)
    except BaseException:
        held.close()
        raise
    return held


class GpuBackend(ABC):
    """A backend that runs on a CUDA device."""

    name: str

    def supports(self, problem: Problem, device: Device) -> Support:
        """Whether the GPU ``device`` has the operand format; its libraries are there."""
        return self.supports_on(problem, gpu_device(device.index))

    @abstractmethod
    def supports_on(self, problem: Problem, device: GpuDevice) -> Support:
        """Whether ``device`` can run ``problem``."""

    @abstractmethod
    def pack(self, weight: GpuWeight, options: PlanOptions, stream: int) -> GpuPrepared:
        """Bring a weight that is on the GPU into the backend's own form."""

    def prepare(
        self,
        weight: SparseWeight | RawWeight,
        bias: NDArray | None,
        device: Device,
        options: PlanOptions,
        *,
        x_scale: np.float32 | None = None,
    ) -> GpuPrepared:
        """Bring the weight to the GPU, check and quantize it there, and pack it."""
        gpu = gpu_device(device.index)
        with working_on(gpu.index):
            held = to_gpu(weight, bias, gpu, x_scale)
            try:
                return self.pack(held, options, gpu.packing_stream)
            except BaseException:
                held.close()
                raise

    def candidates(self, problem: Problem) -> Sequence[Config]:
        """One: the library's algorithm is searched per token bucket when it is first needed."""
        del problem
        return (Config("searched"),)

    def launch(
        self,
        prepared: GpuPrepared,
        x: DeviceArray,
        out: DeviceArray,
        out_type: ArrayType,
        workspace: Memory,
        stream: int,
        config: Config,
    ) -> None:
        """Compute ``out`` (M, N) from ``x`` (M, K) on ``stream``.

        Once prepared it neither allocates nor waits.  The caller holds ``workspace.lock``, has made
        the device current, and has checked shapes.
        """
        del config
        tokens = x.shape[0]
        direct = prepared.can_write(out_type, out.pointer, out.strides[0], tokens)
        step = prepared.step(tokens, x.kind, out_type, direct, stream)
        step.launch(x.pointer, x.strides[0], out.pointer, out.strides[0], workspace, stream)
