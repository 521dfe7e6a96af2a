"""Launching hopper_gemm.cu and hopper_pack.cu: what is worked out once, and what a call does.

Everything that does not change from call to call is worked out when the launcher is made; a call
packs the arguments and launches, and can be captured in a CUDA graph.
"""

from __future__ import annotations

import ctypes

from ..dtypes import array_type, operand
from ..errors import OptionError, ShapeError
from . import catalog
from .fixed import AimedLaunch, FixedLaunch, starts_early
from .geometry import MAX_INT
from .hopper_layout import PANEL_ROWS, STAGE_BYTES, STEP_BYTES
from .hopper_tiles import (
    COUNTERS_A_TILE,
    GROUP_THREADS,
    HOPPER_COUNTERS,
    MOST_SPLITS,
    HopperConfig,
    tiling,
)
from .launch import Launch
from .loader import Cuda, KernelCache

__all__ = ["HOPPER_PACK_ARGUMENTS", "FixedGemm", "HopperGemm", "gemm_kernel", "pack_weights"]

#: Kernel arguments of hopper_pack as codes of struct.
HOPPER_PACK_ARGUMENTS = "QqQqi"
#: Those of hopper_gemm after the tensor map.
_GEMM_ARGUMENTS = "QQQQQqQQiiiiiiiiiiii"
_MAP_BYTES = 128
_MAP_ALIGNMENT = 64
#: Bytes that addresses, strides and row lengths of results stored in boxes are multiples of.
_OUT_MULTIPLE = 16
#: Channels of a box of results: those of a warp.
_BOX_CHANNELS = 32

# cuda.h: CUtensorMapDataType, ...Interleave, ...Swizzle, ...L2promotion, ...FloatOOBfill
_UINT8 = 0
_MAP_TYPES = {"float16": 6, "float32": 7, "bfloat16": 9}
_NOT_INTERLEAVED = 0
#: Rows of a box are swizzled over all their bytes.
_SWIZZLES = {64: 2, 128: 3}
_PROMOTE_256B = 3
_FILL_ZEROS = 0

#: Tokens up to which it may begin while the kernel before it still runs, and up to which it may
#: where rows of the packed matrix have at most so many bytes.  Blocks then come to multiprocessors
#: in the order in which these fall free, and no longer in that in which neighbours read the same
#: from L2: where there is much to share that costs more than a launch (docs/hopper-kernel.md).
_EARLY_TOKENS, _EARLY_TOKENS_SHORT, _SHORT_ROWS = 256, 4096, 1 << 14

#: Tensor maps of results that a product keeps: PyTorch gives new results a few addresses in turn.
_OUT_MAPS = 16
#: Places of arguments in the layout.
_OUT, _OUT_STRIDE, _STORING = 4, 5, 19

# How results are stored (hopper_gemm.cu).
_ONE_BY_ONE, _SIDE_BY_SIDE, _IN_BOXES = 0, 1, 2


def gemm_kernel(dtype: str, out_type: str, config: HopperConfig) -> catalog.KernelSpec:
    """The kernel of a configuration; formats as of :class:`HopperGemm`."""
    return catalog.hopper_gemm(operand(dtype).name, out_type, **config.settings)


class HopperGemm:
    """A product of packed weights and quantized, lifted tokens: launches hopper_gemm.

    For one thread at a time: it keeps the arguments of its last launch.

    Parameters
    ----------
    kernels:
        The device's kernels; compute capability 9.0.
    dtype:
        Operand format: "int8", "fp8_e4m3", "bf16" or "fp16".
    out_type:
        "float32", "float16" or "bfloat16".
    n:
        Output channels (N).
    slid_bytes:
        Bytes of one row of the packed matrix, a multiple of 256.
    row_bytes:
        Bytes from one row of tokens to the next, a multiple of 16 and at most ``slid_bytes``.
    tokens:
        Tokens (M), at least 1.
    config:
        How to cut it.
    readable:
        Rows of tokens that there is memory for, M unless given.  Of those after M whatever they
        hold is read, up to the end of the last tile, and none of it reaches a result: that is
        up to twice as fast as having the copy engine fill in rows beyond its map.

    Raises
    ------
    OptionError
        If the configuration does not fit the product.
    ShapeError
        If a number is out of range.
    CompileError, LibraryError
        As :meth:`KernelCache.load`.
    """

    def __init__(
        self,
        kernels: KernelCache,
        dtype: str,
        out_type: str,
        n: int,
        slid_bytes: int,
        row_bytes: int,
        tokens: int,
        config: HopperConfig,
        readable: int | None = None,
    ) -> None:
        steps = slid_bytes // STEP_BYTES
        if slid_bytes % STEP_BYTES or row_bytes % 16 or not 0 < row_bytes <= slid_bytes:
            raise ShapeError(
                f"rows of {slid_bytes} and {row_bytes} bytes; allowed are multiples of "
                f"{STEP_BYTES} and of 16, the second not larger than the first"
            )
        if steps < config.least_steps:
            raise OptionError(
                f"{config.name} needs {config.least_steps} steps of {STEP_BYTES} bytes of K', but "
                f"there are {steps}; use a configuration that does not share K'"
            )
        cut = tiling(config, n, slid_bytes, tokens, kernels.limits.sm_count)
        if cut.items > MAX_INT // 2 or tokens > MAX_INT - 256 or steps > MAX_INT // MOST_SPLITS:
            raise ShapeError(f"{tokens} tokens by {n} channels are too many for one launch")
        if cut.counters > HOPPER_COUNTERS:
            tiles, allowed = cut.counters // COUNTERS_A_TILE, HOPPER_COUNTERS // COUNTERS_A_TILE
            raise OptionError(
                f"{config.name} splits {tiles} tiles among blocks; allowed are {allowed}: use a "
                "configuration that splits none"
            )
        self.config, self.tiling = config, cut
        self._tokens, self._row_bytes, self._box = tokens, row_bytes, config.tokens
        #: Rows of tokens that are read.
        self.rows_read = min(max(readable or 0, tokens), cut.token_tiles * config.tokens)
        self._out_bytes = array_type(out_type).bits // 8
        self._n = n
        spec = gemm_kernel(dtype, out_type, config)
        self.kernel = kernels.load(spec, shared_bytes=config.shared_bytes)
        self._shape = (cut.blocks, config.threads, 1, config.shared_bytes)
        limit = _EARLY_TOKENS_SHORT if slid_bytes <= _SHORT_ROWS else _EARLY_TOKENS
        self._early = tokens <= limit and starts_early(kernels.cuda)
        panels = -(-n // PANEL_ROWS)
        self._sizes = (
            tokens,
            n,
            steps,
            panels,
            cut.weight_tiles,
            cut.token_tiles,
            config.tile_group,
            cut.whole,
            cut.splits,
            cut.ranges,
            int(self._early),
        )
        self._cuda = kernels.cuda
        # The copy engine writes whole pieces of 16 bytes, also of the last channels of a row.
        self._row_bytes_out = n * self._out_bytes
        self._boxes = config.blocks == 2 and self._row_bytes_out % _OUT_MULTIPLE == 0
        self._out_box = (_BOX_CHANNELS, config.chunk(self._out_bytes))
        self._out_kind = _MAP_TYPES[out_type]
        self._out_maps: dict[tuple[int, int], _TensorMap] = {}
        self._last: tuple[tuple[int, ...], FixedGemm] | None = None

    def __call__(
        self,
        packed: int,
        tokens: int,
        token_scales: int,
        channel_scales: int,
        bias: int,
        out: int,
        out_stride: int,
        partials: int,
        counters: int,
        stream: int,
    ) -> None:
        """Launch ``out = cast((W x) * token_scales * channel_scales + bias)``.

        Parameters
        ----------
        packed:
            Address of the packed weights, 16-byte aligned.
        tokens:
            Address of the quantized tokens (M, row bytes), 16-byte aligned.
        token_scales, channel_scales, bias:
            Addresses of float32 vectors (M), (N), (N); 0 leaves a step out.
        out, out_stride:
            Address, and elements from row to row.
        partials, counters:
            Memory as :attr:`tiling` says; counters are zero before the first launch and again
            after each.
        stream:
            CUDA stream.
        """
        operands = (packed, tokens, token_scales, channel_scales, bias, partials, counters)
        last = self._last
        if last is None or last[0] != operands:
            last = self._last = (operands, self.fixed(*operands))
        last[1].launch(out, out_stride, stream)

    def fixed(
        self,
        packed: int,
        tokens: int,
        token_scales: int,
        channel_scales: int,
        bias: int,
        partials: int,
        counters: int,
    ) -> FixedGemm:
        """Return the call with all but the result and the stream in place; arguments as of a call.

        Raises LibraryError if the driver refuses the tensor map.
        """
        token_map = _TensorMap(
            self._cuda,
            _UINT8,
            tokens,
            1,
            (self._row_bytes, self.rows_read),
            self._row_bytes,
            (STAGE_BYTES, self._box),
        )
        launch = FixedLaunch(
            self._cuda,
            self.kernel,
            _GEMM_ARGUMENTS,
            self._shape,
            (
                *(packed, token_scales, channel_scales, bias, 0, 0, partials, counters),
                *self._sizes,
                _ONE_BY_ONE,
            ),
            maps=2,
            early=self._early,
            cluster=self.config.cluster,
        )
        return FixedGemm(self, launch, token_map)

    def storing(self, out: int, out_stride: int) -> tuple[int, _TensorMap | None]:
        """How results at an address are stored, and the tensor map where that takes one."""
        size = self._out_bytes
        width = out_stride * size
        if self._boxes and width >= self._row_bytes_out and not (out | width) % _OUT_MULTIPLE:
            found = self._out_maps.get((out, out_stride))
            if found is None:
                found = _TensorMap(
                    self._cuda,
                    self._out_kind,
                    out,
                    size,
                    (self._n, self._tokens),
                    width,
                    self._out_box,
                )
                if len(self._out_maps) >= _OUT_MAPS:
                    self._out_maps.clear()
                self._out_maps[out, out_stride] = found
            return _IN_BOXES, found
        return (_ONE_BY_ONE if (out | width) % (4 * size) else _SIDE_BY_SIDE), None


class FixedGemm(AimedLaunch):
    """A product of operands that stay where they are; its array is the result.

    :meth:`HopperGemm.fixed` makes it; products made from one HopperGemm are for one thread at a
    time together.
    """

    __slots__ = ("_gemm", "_maps")

    def __init__(self, gemm: HopperGemm, launch: FixedLaunch, token_map: _TensorMap) -> None:
        super().__init__(launch)
        self._gemm = gemm
        self._maps = (token_map, token_map)  # kept alive for the driver to read
        launch.set_map(0, token_map.location)

    def _aimed(self, address: int, stride: int) -> FixedLaunch:
        storing, out_map = self._gemm.storing(address, stride)
        token_map = self._maps[0]
        if out_map is None:
            out_map = token_map  # anything, where none is used
        self._maps = (token_map, out_map)
        launch = self._launch
        launch.set_map(1, out_map.location)
        launch.set_argument(_OUT, address)
        launch.set_argument(_OUT_STRIDE, stride)
        launch.set_argument(_STORING, storing)
        return launch


def pack_weights(
    kernels: KernelCache, dtype: str, slid: int, rows: int, slid_bytes: int, out: int, stream: int
) -> None:
    """Pack a slid matrix (rows, slid bytes) at ``slid`` into ``out``.

    ``rows`` is a multiple of 128 and ``slid_bytes`` of 256; ``out`` has
    :func:`~slidesparse_rt.kernels.hopper_layout.packed_bytes` bytes.
    """
    kernel = kernels.load(catalog.hopper_pack(dtype))
    stages = slid_bytes // STAGE_BYTES
    units = rows // 64 * stages
    launch = Launch(kernels.cuda, kernel, HOPPER_PACK_ARGUMENTS)
    launch(
        min(units, 64 * kernels.limits.sm_count),
        GROUP_THREADS,
        1,
        0,
        stream,
        slid,
        slid_bytes,
        out,
        units,
        stages,
    )


class _TensorMap:
    """A CUtensorMap of a matrix, whose boxes have rows of 64 or 128 bytes, swizzled.

    Parameters
    ----------
    cuda:
        The driver.
    kind:
        CUtensorMapDataType.
    address, size, extents, stride:
        The matrix: where it lies, bytes of an element, (columns, rows), bytes from row to row.
    box:
        (columns, rows) of a box.
    """

    __slots__ = ("_memory", "location")

    def __init__(
        self,
        cuda: Cuda,
        kind: int,
        address: int,
        size: int,
        extents: tuple[int, int],
        stride: int,
        box: tuple[int, int],
    ) -> None:
        self._memory = ctypes.create_string_buffer(_MAP_BYTES + _MAP_ALIGNMENT)
        start = ctypes.addressof(self._memory)
        #: Address of the map in host memory.
        self.location = -(-start // _MAP_ALIGNMENT) * _MAP_ALIGNMENT
        two = ctypes.c_uint32 * 2
        cuda.cuTensorMapEncodeTiled(
            self.location,
            kind,
            2,
            address,
            (ctypes.c_uint64 * 2)(*extents),
            (ctypes.c_uint64 * 1)(stride),
            two(*box),
            two(1, 1),
            _NOT_INTERLEAVED,
            _SWIZZLES[box[0] * size],
            _PROMOTE_256B,
            _FILL_ZEROS,
        )
