"""Sparse products by a kernel of our own, written for Hopper GPUs (compute capability 9.0).

One kernel multiplies the lifted tokens by the slid weight on 2:4 sparse tensor cores, applies both
scales and the bias in the definition's order, and writes the result once, in any of its types, at
any address and stride.  int8 is exact; the other formats are summed in float32 as the tensor cores
round.  docs/hopper-kernel.md describes the kernel.

There are several ways to cut a product into tiles.  The first time that a token bucket is met the
promising ones are timed, and the times are kept for the device: from them follows which is fastest
for each number of tokens of the bucket.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable

from ..dtypes import ArrayType
from ..errors import DeviceMemoryError
from ..kernels.hopper import HopperGemm, gemm_kernel, pack_weights
from ..kernels.hopper_layout import PANEL_ROWS, ROW_MULTIPLE, STEP_BYTES, packed_bytes
from ..kernels.hopper_tiles import BUCKET_TOKENS, HopperConfig, clocks, configurations
from ..kernels.loader import kernels_of
from ..options import PlanOptions
from .base import Problem, Support
from .buckets import token_bucket
from .gpu_device import Buffer, GpuDevice
from .gpu_gemm import GpuBackend, GpuPrepared, round_up
from .gpu_step import Product
from .gpu_weight import GpuWeight
from .timing import launch_times
from .trial import trial

__all__ = ["HopperBackend"]

#: The one compute capability that has these instructions.
_CAPABILITY = (9, 0)
#: Configurations and their milliseconds.
_Times = tuple[tuple[HopperConfig, float], ...]


class _Product(Product):
    """A product cut by one configuration, for one number of tokens and one type of results."""

    direct = True

    def __init__(self, prepared: HopperPrepared, gemm: HopperGemm) -> None:
        self.how = gemm.config.name
        self.scratch_bytes = gemm.tiling.partial_bytes
        self.rows_read = gemm.rows_read
        self._gemm = gemm
        self._weight = prepared.packed.pointer
        self._channel_scales = prepared.weight.scales
        self._bias = prepared.weight.bias
        self._scaled = prepared.weight.operand.scaled

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
        self._gemm(
            self._weight,
            tokens,
            token_scales if self._scaled else 0,
            self._channel_scales,
            self._bias,
            target,
            target_stride,
            scratch,
            counters,
            stream,
        )

    def fixed(
        self, tokens: int, token_scales: int, scratch: int, counters: int
    ) -> Callable[[int, int, int], Callable[[], int | None]]:
        made = self._gemm.fixed(
            self._weight,
            tokens,
            token_scales if self._scaled else 0,
            self._channel_scales,
            self._bias,
            scratch,
            counters,
        )
        return made.aim


class HopperPrepared(GpuPrepared):
    """A slid weight in the order in which the kernel reads it."""

    always_direct = True
    sums_type = "float32"
    token_multiple = 1

    def __init__(self, weight: GpuWeight, options: PlanOptions, stream: int) -> None:
        super().__init__(weight, weight.pattern, options)
        size = weight.operand.bits // 8
        self.row_length = round_up(weight.pattern.slid_k(weight.k), ROW_MULTIPLE // size)
        self.padded_n = weight.n
        self._slid_bytes = round_up(self.row_length * size, STEP_BYTES)
        rows = round_up(weight.n, PANEL_ROWS)
        self.packed: Buffer = self.device.allocate(packed_bytes(rows, self._slid_bytes, size))
        try:
            with weight.slide(rows, self._slid_bytes // size, stream) as slid:
                pack_weights(
                    kernels_of(self.device.index),
                    weight.operand.name,
                    slid.pointer,
                    rows,
                    self._slid_bytes,
                    self.packed.pointer,
                    stream,
                )
                self.device.synchronize(stream)
        except BaseException:
            self.packed.close()
            raise
        weight.drop_values()

    @property
    def operand_bytes(self) -> int:
        return self.packed.nbytes

    def can_write(self, kind: ArrayType, out: int, out_stride: int, tokens: int) -> bool:
        """Always."""
        del kind, out, out_stride, tokens
        return True

    def make_product(self, tokens: int, direct: ArrayType | None, stream: int) -> _Product:
        assert direct is not None  # can_write() never says no
        config, chosen = self._config(tokens, direct, stream)
        made = _Product(self, self._gemm(tokens, direct, config))
        made.chosen = chosen
        return made

    def compile_ahead(self, tokens: Iterable[int], kind: ArrayType) -> None:
        """Every kernel that is going to be timed."""
        # Without the lock, which is held while a bucket is timed: at worst that bucket's again.
        known = self.device.choices
        buckets = {token_bucket(count) for count in tokens}
        kernels_of(self.device.index).compile_ahead(
            {
                gemm_kernel(self.weight.operand.name, kind.name, config)
                for bucket in buckets
                if self._key(bucket, kind) not in known
                for config in self._promising(bucket)
            }
        )

    def release(self) -> None:
        self.packed.close()

    def _gemm(self, tokens: int, kind: ArrayType, config: HopperConfig) -> HopperGemm:
        operand = self.weight.operand
        return HopperGemm(
            kernels_of(self.device.index),
            operand.name,
            kind.name,
            self.weight.n,
            self._slid_bytes,
            self.row_length * operand.bits // 8,
            tokens,
            config,
            # layout() makes room for all of the last tile.
            readable=tokens + config.tokens - 1,
        )

    def _config(self, tokens: int, kind: ArrayType, stream: int) -> tuple[HopperConfig, bool]:
        """The fastest configuration; those of a bucket are timed once a device and shape.

        And whether there was memory for that.

        What was measured for the bucket is scaled by what tiles tell: a round of them that hardly
        any multiprocessor takes part in costs as much as a full one.
        """
        bucket = token_bucket(tokens)
        key = self._key(bucket, kind)
        with self.device.lock:
            found = self.device.choices.get(key)
            if found is None:
                try:
                    found = self.device.choices[key] = self._timed(bucket, kind, stream)
                except DeviceMemoryError:
                    # Timing takes operands for the whole bucket; the run itself may still fit.
                    return self._promising(bucket)[0], False
        times: _Times = found
        # How much reading the weight takes is not known, so times are not scaled where that counts.
        likened = bucket if bucket <= BUCKET_TOKENS else tokens

        def expected(timed: tuple[HopperConfig, float]) -> float:
            config, milliseconds = timed
            return milliseconds * self._clocks(config, likened) / self._clocks(config, bucket)

        return min(times, key=expected)[0], True

    def _key(self, bucket: int, kind: ArrayType) -> tuple[Hashable, ...]:
        """Of the times in the device's choices: everything that they depend on."""
        weight = self.weight
        return (
            "hopper",
            weight.n,
            weight.k,
            weight.pattern.name,
            weight.operand.name,
            bool(weight.x_scale),
            kind.name,
            bucket,
        )

    def _clocks(self, config: HopperConfig, tokens: int) -> float:
        return clocks(config, self.weight.n, self._slid_bytes, tokens, self.device.sm_count)

    def _promising(self, bucket: int) -> list[HopperConfig]:
        return configurations(self.weight.n, self._slid_bytes, bucket, self.device.sm_count)

    def _timed(self, bucket: int, kind: ArrayType, stream: int) -> _Times:
        promising = self._promising(bucket)
        if len(promising) == 1:
            return ((promising[0], 1.0),)
        self.compile_ahead((bucket,), kind)
        products = [_Product(self, self._gemm(bucket, kind, config)) for config in promising]
        with trial(self, products, bucket, kind.bits // 8, stream) as (runs, empty):
            times = launch_times(runs, stream, before=empty)
            return tuple((promising[index], found) for index, found in times.items())


class HopperBackend(GpuBackend):
    """2:4 sparse tensor cores of Hopper GPUs through our own kernel, every pattern lifted."""

    name = "hopper"

    def supports_on(self, problem: Problem, device: GpuDevice) -> Support:
        """Whether this is a Hopper GPU; it multiplies every operand format."""
        del problem
        if device.capability != _CAPABILITY:
            needed, found = (".".join(map(str, pair)) for pair in (_CAPABILITY, device.capability))
            return Support(
                False,
                f"its kernel is for compute capability {needed} alone, {device.name} has {found}",
            )
        return Support(True)

    def pack(self, weight: GpuWeight, options: PlanOptions, stream: int) -> HopperPrepared:
        """Slide the weight and bring it into the kernel's order."""
        return HopperPrepared(weight, options, stream)
