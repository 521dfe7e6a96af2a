"""How hopper_gemm.cu cuts a product into tiles: arithmetic, the same with and without a GPU."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from ..errors import OptionError
from .hopper_layout import PANEL_ROWS, STAGE_BYTES, STEP_BYTES, unit_bytes

__all__ = [
    "BUCKET_TOKENS",
    "COUNTERS_A_TILE",
    "GROUP_THREADS",
    "HOPPER_COUNTERS",
    "HOPPER_SHARED_BYTES",
    "MOST_CLUSTER",
    "MOST_SPLITS",
    "HopperConfig",
    "Tiling",
    "clocks",
    "configurations",
    "tiling",
]

#: Dynamic shared memory that a block of hopper_gemm may take.
HOPPER_SHARED_BYTES = 227 * 1024
#: 32-bit counters of tiles of which blocks share K' (backends/workspace.py has the memory), and how
#: many each needs.
HOPPER_COUNTERS = 2048
COUNTERS_A_TILE = 3
#: Threads of a warpgroup.
GROUP_THREADS = 128
#: Shared memory that stages start at a multiple of.
_STAGE_ALIGNMENT = 1024
_MOST_STAGES = 16
#: Shared memory in which a warp keeps what it works on.
_ITEM_BYTES = 32
#: Tokens of tiles where there are few, up to so many, or few tiles.
_LOW_TILES = (16, 32, 64, 128)
_HIGH_TILES = (128, 160, 192, 208)
#: Those of tiles of 128 channels, and the number of tokens from which on each is worth a try where
#: tiles of 256 channels are fewer than so many for each multiprocessor: more blocks read the
#: weight, and each has fewer sums to write.
_HALF_TILES, _UNFILLED = ((128, 65), (192, 257)), 2
#: Of the tiles of 64 channels that have a multiprocessor each, so many of the lowest are tried.
_LOWEST = 2
_FEW_TOKENS = 128
_MANY_TOKENS = 1024
#: Up to so many tokens a configuration is chosen by its time for the bucket alone; tiles that are
#: for so many times the bucket's tokens are not worth a try there, but for those of 128.
BUCKET_TOKENS = 512
_WASTE = 1.2
#: Parts of K' at most; a block has at least so many steps of it.
MOST_SPLITS = 16
_LEAST_STEPS = 2
#: Blocks of a cluster at most, so that any GPU can hold it; and multiprocessors from which on there
#: are clusters: the parts of a GPU (MIG) may have none of that size.
MOST_CLUSTER = 8
_CLUSTERS_FROM = 64
#: A cluster lies within a part of the GPU that has at least so many multiprocessors, mostly.
_CLUSTERED = 16
#: To choose the number of parts: bytes a clock of operands from L2 (docs/hopper-kernel.md, "The
#: budget") and of sums that blocks write and read; clocks around each tile and around each part.
_INGRESS, _WRITTEN, _READ, _TILE_CLOCKS, _PART_CLOCKS = 64, 32, 64, 3000, 10000
#: The same of sums that meet in shared memory: bytes a clock, and clocks around each tile.
_EXCHANGED, _CLUSTER_CLOCKS = 32, 4000
#: Rounds of whole tiles up to which the last one matters.
_MOST_ROUNDS = 14
#: Highest tile of tokens that blocks share: the next leaves no registers for it.
_MOST_SHARED = 192
#: What must be left of the time that the last tiles take, for sharing them to be worth a try.
_WORTHWHILE = 0.85
#: Part of all multiprocessors that equal ranges must give work, for the same.
_BUSY = 0.95
#: Tiles of channels side by side, unless something else was faster.
_BESIDE = 8


@dataclass(frozen=True, slots=True)
class HopperConfig:
    """How hopper_gemm cuts a product.

    Attributes
    ----------
    tokens:
        Tokens of a tile.
    blocks:
        Blocks of 64 channels of a warpgroup: 1 or 2.
    groups:
        Warpgroups that multiply: 2 or 4.
    k_groups:
        Whether they share the channels of a tile and take turns at K', instead of having channels
        of their own.
    split:
        Whether blocks of threads share tiles, each with a part of their K': those that would not
        fill all multiprocessors, unless ``even``.
    tile_group:
        Tiles of channels that are worked on side by side, for the sake of L2.
    even:
        Whether the K' of all channels is cut into equal ranges instead, wherever tiles begin and
        end; with ``split``, without ``k_groups``.
    cluster:
        Blocks of a cluster, which share each tile and add up their sums in shared memory, 2 to 8;
        0: there are none.  Without ``split``, ``k_groups``, and tiles whose sums do not fit there.
    """

    tokens: int
    blocks: int
    groups: int = 2
    k_groups: bool = False
    split: bool = False
    tile_group: int = _BESIDE
    even: bool = False
    cluster: int = 0

    def __post_init__(self) -> None:
        able = 2 <= self.cluster <= MOST_CLUSTER and self.gathers and not self.split
        if self.cluster and not able:
            raise OptionError(
                f"clusters of {self.cluster} blocks were asked for; allowed are 2 to "
                f"{MOST_CLUSTER}, without split and k_groups, for tiles whose sums fit where their "
                "stages and results were"
            )
        if self.even and (self.k_groups or not self.split):
            raise OptionError(
                "equal ranges of K' (even) were asked for without split, or with k_groups; they "
                "are a way to split K' among blocks, for tiles of which warpgroups share none"
            )

    @property
    def gathers(self) -> bool:
        """Whether blocks of a cluster can share its tiles.

        Their sums must fit where stages and boxes of results were, of any operands and results.
        """
        room = self.stages * self._stage_bytes(2) + self._boxes_bytes(self.chunk(2))
        return not self.k_groups and self.rows * self.tokens * 4 <= room

    @property
    def rows(self) -> int:
        """Channels of a tile."""
        return 64 * self.blocks * (1 if self.k_groups else self.groups)

    @property
    def turns(self) -> int:
        """Warpgroups that take turns at K': of every so many steps, one has one."""
        return self.groups if self.k_groups else 1

    @property
    def least_steps(self) -> int:
        """Steps of 256 bytes that K' must have, so that everybody who shares it has one."""
        return max(self.turns, self.cluster)

    @property
    def threads(self) -> int:
        """Threads of a block: the warpgroups that multiply and the one that loads."""
        return (self.groups + 1) * GROUP_THREADS

    @property
    def gather_bytes(self) -> int:
        """Shared memory in which warpgroups add up their sums."""
        if not self.k_groups:
            return 0
        return (self.groups - 1) * self.blocks * self.tokens // 2 * GROUP_THREADS * 4

    @property
    def results_bytes(self) -> int:
        """Shared memory through which results leave: as 32 tokens of 16 bits need, or 16 of 32."""
        return self._boxes_bytes(32)

    def _boxes_bytes(self, tokens: int) -> int:
        # Two buffers a warp, of its 32 channels by so many tokens of 16 bits.
        return self.groups * 4 * 2 * 32 * tokens * 2 if self.blocks == 2 else 0

    @property
    def extra_bytes(self) -> int:
        """Shared memory beside the stages: results, token scales, items, sums, barriers."""
        barriers = _MOST_STAGES * 16 + 16  # and two words that one thread tells the others
        of_warps = self.groups * 4 * (self.tokens * 4 + _ITEM_BYTES)
        return self.results_bytes + of_warps + self.gather_bytes + barriers

    @property
    def stages(self) -> int:
        """Stages that shared memory holds beside that, at most 16.

        Where warpgroups take turns at steps of two stages, a whole number of rounds: each stage
        then always belongs to the same warpgroup.  A barrier tells only even from odd uses of a
        stage, so one that waits must have seen the use before.
        """
        room = HOPPER_SHARED_BYTES - self.extra_bytes
        fitting = min(_MOST_STAGES, room // self.stage_bytes)
        unit = 2 * self.turns if self.k_groups else 1
        return fitting // unit * unit

    @property
    def stage_bytes(self) -> int:
        """Shared memory of a stage: tokens and weights (of 8 bits, which have more metadata)."""
        return self._stage_bytes(1)

    def _stage_bytes(self, size: int) -> int:
        units = self.rows // 64 * unit_bytes(size)
        return self.tokens * STAGE_BYTES + -(-units // _STAGE_ALIGNMENT) * _STAGE_ALIGNMENT

    def chunk(self, out_bytes: int) -> int:
        """Tokens whose results of ``out_bytes`` each leave shared memory together."""
        return 16 if self.tokens % 32 or out_bytes == 4 else 32

    @property
    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.stages * self.stage_bytes + self.extra_bytes

    @property
    def settings(self) -> dict[str, Any]:
        """What the kernel is compiled with: arguments of :func:`.catalog.hopper_gemm`."""
        return {
            "tokens": self.tokens,
            "blocks": self.blocks,
            "groups": self.groups,
            "k_groups": self.k_groups,
            "stages": self.stages,
            "splits": self.split,
            "clusters": self.cluster > 0,
        }

    @property
    def name(self) -> str:
        """For people: channels x tokens of a tile, and how K' is shared."""
        shared = f", {self.groups} warpgroups share K'" if self.k_groups else ""
        way = "equal ranges of" if self.even else "the last share"
        split = f", {way} K'" if self.split else ""
        if self.cluster:
            split = f", clusters of {self.cluster}"
        beside = f", {self.tile_group} tiles side by side" if self.tile_group != _BESIDE else ""
        return f"{self.rows}x{self.tokens}{shared}{split}{beside}"


@dataclass(frozen=True, slots=True)
class Tiling:
    """A product cut by a configuration.

    Attributes
    ----------
    weight_tiles, token_tiles:
        Tiles along N and along M.
    whole, splits:
        Tiles that one block works on, the first ones, and by how many blocks each other is shared:
        with clusters all of them, each by one cluster.
    ranges:
        Or the equal ranges of K' of all channels, of each of which every tile of tokens has a
        block; 0 where there are none.
    blocks:
        Blocks of threads.
    partial_bytes:
        Memory for the sums of blocks that share a tile; 0 where none do.
    """

    weight_tiles: int
    token_tiles: int
    whole: int
    splits: int
    ranges: int
    blocks: int
    partial_bytes: int

    @property
    def tiles(self) -> int:
        """Tiles of the product."""
        return self.weight_tiles * self.token_tiles

    @property
    def shared(self) -> int:
        """Tiles left over for the last round, which several blocks share."""
        return self.tiles - self.whole

    @property
    def counters(self) -> int:
        """How many 32-bit counters, zero before the first launch, shared tiles need."""
        if not self.partial_bytes:
            return 0  # nothing meets in device memory
        return COUNTERS_A_TILE * (self.blocks if self.ranges else self.shared)

    @property
    def items(self) -> int:
        """Whole tiles and parts of the others."""
        return self.tiles + self.blocks if self.ranges else self.whole + self.shared * self.splits


def tiling(config: HopperConfig, n: int, slid_bytes: int, tokens: int, sm_count: int) -> Tiling:
    """Cut a product of ``n`` channels and ``tokens`` tokens for so many multiprocessors."""
    # Channels of a panel alternate between its two blocks of 64, so both are there even if few are.
    rows = -(-n // PANEL_ROWS) * PANEL_ROWS
    weight_tiles, token_tiles = -(-rows // config.rows), -(-tokens // config.tokens)
    tiles = weight_tiles * token_tiles
    steps, tile_bytes = slid_bytes // STEP_BYTES, config.rows * config.tokens * 4
    if config.cluster:
        blocks = config.cluster * max(1, min(tiles, sm_count // config.cluster))
        return Tiling(weight_tiles, token_tiles, 0, config.cluster, 0, blocks, 0)
    if config.even:
        ranges = _ranges(weight_tiles, token_tiles, steps, sm_count)
        if ranges:
            # A block may share its first and its last tile.
            blocks = ranges * token_tiles
            return Tiling(
                weight_tiles, token_tiles, tiles, 1, ranges, blocks, 2 * blocks * tile_bytes
            )
    whole, splits = tiles, 1
    if config.split and tiles % sm_count:
        rest = tiles % sm_count
        splits = _splits(config, rest, steps, sm_count)
        whole -= rest if splits > 1 else 0
    parts = (tiles - whole) * splits
    return Tiling(
        weight_tiles,
        token_tiles,
        whole,
        splits,
        0,
        min(whole + parts, sm_count),
        parts * tile_bytes,
    )


def _ranges(weight_tiles: int, token_tiles: int, steps: int, sm_count: int) -> int:
    """Into how many equal ranges all channels' K' is cut; 0: there are too many tokens for any."""
    return min(
        sm_count // token_tiles, weight_tiles * steps // _LEAST_STEPS, weight_tiles * MOST_SPLITS
    )


def _splits(config: HopperConfig, tiles: int, steps: int, sm_count: int) -> int:
    """By how many blocks each tile is shared best, where ``tiles`` are left over; 1: by none."""
    able = [
        splits
        for splits in range(2, MOST_SPLITS + 1)
        if steps // splits >= max(config.turns, _LEAST_STEPS)
        and _left(tiles, splits, sm_count) <= _WORTHWHILE
    ]
    return min([1, *able], key=lambda splits: _clocks(config, tiles, splits, steps, sm_count))


def _tile_clocks(config: HopperConfig, steps: int) -> int:
    """Clocks of a tile's products: of shared memory or of L2, whichever takes longer."""
    reads = config.rows // 64 * 2 * (config.tokens // 2 + 16)
    loads = (config.rows * 80 + config.tokens * STAGE_BYTES) // _INGRESS
    return 2 * steps * max(reads, loads)


def _clocks(config: HopperConfig, tiles: int, splits: int, steps: int, sm_count: int) -> float:
    """Clocks of ``tiles`` tiles, each shared by so many blocks."""
    rounds, of_tile = -(-tiles * splits // sm_count), _tile_clocks(config, steps)
    return rounds * (of_tile / splits + (_part_clocks(config) if splits > 1 else _TILE_CLOCKS))


def _part_clocks(config: HopperConfig) -> float:
    """Clocks for sums of blocks that share a tile to meet.

    Each writes a part, and reads as much: an equal share of all parts of its tile.
    """
    part_bytes = config.rows * config.tokens * 4
    return part_bytes / _WRITTEN + part_bytes / _READ + _PART_CLOCKS


def clocks(config: HopperConfig, n: int, slid_bytes: int, tokens: int, sm_count: int) -> float:
    """Clocks that a product takes where nothing else limits it; for comparing numbers of tokens.

    The arguments are those of :func:`tiling`.
    """
    cut = tiling(config, n, slid_bytes, tokens, sm_count)
    steps = slid_bytes // STEP_BYTES
    if config.cluster:
        rounds = -(-cut.tiles // (cut.blocks // config.cluster))
        exchanged = config.rows * config.tokens * 4 / _EXCHANGED
        of_part = _tile_clocks(config, steps) / config.cluster
        return rounds * (of_part + exchanged + _CLUSTER_CLOCKS)
    if cut.ranges:
        of_range = _tile_clocks(config, steps) * cut.weight_tiles / cut.ranges
        return of_range + 2 * _part_clocks(config)
    whole = _clocks(config, cut.whole, 1, steps, sm_count)
    return whole + _clocks(config, cut.shared, cut.splits, steps, sm_count)


def _left(tiles: int, splits: int, sm_count: int) -> float:
    """What is left of a tile's time where each is shared by so many blocks."""
    return -(-tiles * splits // sm_count) / splits


def configurations(n: int, slid_bytes: int, tokens: int, sm_count: int) -> list[HopperConfig]:
    """Configurations worth timing for ``n`` channels and ``tokens`` tokens, at least one.

    Few tokens are limited by reading the weight, so tiles are low; many tokens by shared memory, so
    tiles are as large as registers allow; small products by multiprocessors that have no tile, so
    tiles are as small as leaves one for each.
    """
    if tokens <= _FEW_TOKENS:
        width = next(size for size in _LOW_TILES if size >= tokens)
        found = [HopperConfig(width, 1, 2, True)]
        if width < _FEW_TOKENS:
            found.append(HopperConfig(width, 1, 4, True))
        if tokens > _LOW_TILES[0]:
            found.append(HopperConfig(width, 2))
        if width == _FEW_TOKENS:
            found.append(HopperConfig(width // 2, 2))  # more blocks read the weight
    else:
        found = [HopperConfig(128, 1, 2, True)] if tokens <= 2 * _FEW_TOKENS else []
        found += [HopperConfig(width, 2) for width in _HIGH_TILES if _fills(width, tokens)]
    low = [HopperConfig(width, 1, 2, True) for width in _LOW_TILES if width < tokens]
    alone = [c for c in low if tiling(c, n, slid_bytes, tokens, sm_count).tiles <= sm_count]
    found += [config for config in alone[:_LOWEST] if config not in found]
    for width, least in _HALF_TILES:
        tiles = tiling(HopperConfig(width, 2), n, slid_bytes, tokens, sm_count).tiles
        if tokens >= least and tiles < _UNFILLED * sm_count and _fills(width, tokens):
            found.append(HopperConfig(width, 1))
    for config in tuple(found):
        if config.tokens > _MOST_SHARED:
            continue
        found += _clustered(config, n, slid_bytes, tokens, sm_count)
        cut = tiling(replace(config, split=True), n, slid_bytes, tokens, sm_count)
        if cut.splits > 1 and cut.whole <= _MOST_ROUNDS * sm_count:
            found.append(replace(config, split=True))
        if (
            config.k_groups
            or config.blocks == 1
            or not sm_count < cut.tiles <= _MOST_ROUNDS * sm_count
        ):
            continue
        even = replace(config, split=True, even=True)
        cut = tiling(even, n, slid_bytes, tokens, sm_count)
        if cut.ranges and cut.blocks >= _BUSY * sm_count and cut.tiles % sm_count:
            found.append(even)
    if tokens > _MANY_TOKENS:
        found.append(HopperConfig(_HIGH_TILES[-1], 2, tile_group=16))
    steps = slid_bytes // STEP_BYTES
    return [config for config in found if steps >= config.least_steps] or [HopperConfig(128, 2)]


def _fills(width: int, tokens: int) -> bool:
    """Whether tiles of so many tokens are worth timing for a bucket."""
    wasted = -(-tokens // width) * width >= _WASTE * tokens
    return width == _HIGH_TILES[0] or tokens > BUCKET_TOKENS or not wasted


def _clustered(
    config: HopperConfig, n: int, slid_bytes: int, tokens: int, sm_count: int
) -> list[HopperConfig]:
    """The same with clusters, where there are too few tiles for all multiprocessors.

    Of the largest size with which all tiles are worked on at a time, as far as numbers tell, and of
    one less, as they do not tell how this GPU is built.
    """
    if not config.gathers or sm_count < _CLUSTERS_FROM:
        return []
    tiles, steps = tiling(config, n, slid_bytes, tokens, sm_count).tiles, slid_bytes // STEP_BYTES
    sizes = [
        size
        for size in range(2, min(MOST_CLUSTER, steps // _LEAST_STEPS) + 1)
        if tiles <= sm_count // _CLUSTERED * (_CLUSTERED // size)
    ]
    return [replace(config, cluster=size) for size in sizes[-2:]]
