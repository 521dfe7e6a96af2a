"""How products are cut for the Hopper GEMM: the kernel's own arithmetic, and what is timed."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from emulate import COMPILER
from fake_cuda import FakeKernels
from hopper_cases import DTYPES, OUT_TYPES, SM_COUNTS, shipped, spec_of
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_rt.backends.buckets import TOKEN_BUCKETS
from slidesparse_rt.dtypes import operand
from slidesparse_rt.errors import OptionError
from slidesparse_rt.kernels import catalog, hopper_tiles
from slidesparse_rt.kernels.compiler import read_source
from slidesparse_rt.kernels.hopper import HopperGemm
from slidesparse_rt.kernels.hopper_layout import PANEL_ROWS
from slidesparse_rt.kernels.hopper_tiles import HopperConfig, configurations, tiling

CONFIGS = shipped()
SOURCE = read_source("hopper_gemm.cu")
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")

# --- the kernel's own arithmetic ------------------------------------------------------------------


def between(first: str, last: str, text: str = SOURCE.text) -> str:
    start = text.index(first)
    return text[start : text.index(last, start)]


def built(folder: Path, program: str) -> str:
    """What a C++ program prints."""
    source, target = folder / "program.cc", folder / "program"
    source.write_text(program)
    command = [COMPILER or "c++", "-std=c++17", "-w", str(source), "-o", str(target)]
    subprocess.run(command, check=True)
    return subprocess.run([target], check=True, capture_output=True, text=True).stdout


PRINTED = (
    *("STAGE_BYTES", "UNITS", "UNIT", "TOKEN_BYTES", "CHUNK", "BOX_ROW", "BOX_BYTES"),
    *("RESULTS", "SCALES", "GATHER", "BARRIERS"),
)


@pytest.fixture(scope="module")
def constants(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, str], Any]:
    """The constants of hopper_gemm.cu, from its text, by (configuration, operand, result)."""
    numbers = SOURCE.headers["numbers.cuh"]
    formats = "\n".join(re.findall(r"#define SS_\w+ \d+", numbers))
    bytes_of = re.search(r"constexpr int bytes_of\(int type\) \{.*?\n\}", numbers, re.DOTALL)
    assert bytes_of is not None
    body = between("constexpr int TOKENS", "// Names of barriers")
    names = ("TYPE", "OUT", "TOKENS", "BLOCKS", "GROUPS", "STAGES")
    names += ("KGROUPS", "SPLITS", "CLUSTERS", "EACHLANE")
    parameters = ", ".join(f"int SS_{name}" for name in names)
    shown = ", ".join(f'\\"{name}\\": %d' for name in PRINTED)
    given_ = ", ".join(f"(int)Kernel::{name}" for name in PRINTED)
    cases = {}
    for config in CONFIGS:
        for dtype in DTYPES:
            for out_type in OUT_TYPES:
                spec = dict(spec_of(config, dtype, out_type).defines)
                values = ", ".join(str(spec[name]) for name in names)
                cases[config.name, dtype, out_type] = f"show<Shown<{values}>>();"
    calls = "\n".join(cases.values())
    said = built(
        tmp_path_factory.mktemp("constants"),
        f"""
        #include <cstdio>
        {formats}
        {bytes_of[0]}
        template <{parameters}> struct Shown {{
        {re.sub("^constexpr", "static constexpr", body, flags=re.MULTILINE)}
        }};
        template <typename Kernel> void show() {{ std::printf("{{{shown}}}\\n", {given_}); }}
        int main() {{ {calls} }}
        """,
    )
    return dict(zip(cases, map(json.loads, said.splitlines()), strict=True))


@needs_compiler
@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_shared_memory_is_what_the_kernel_adds_up(config, constants):
    for dtype in DTYPES:
        for out_type in OUT_TYPES:
            of = constants[config.name, dtype, out_type]
            # Two barriers of 8 bytes a stage, one of the warpgroups' sums, and two words that one
            # thread tells the others.
            used = of["BARRIERS"] + 16 * config.stages + 8 + 8
            assert used <= config.shared_bytes <= hopper_tiles.HOPPER_SHARED_BYTES
            assert of["STAGE_BYTES"] <= config.stage_bytes
            if operand(dtype).bits == 8:
                assert of["STAGE_BYTES"] == config.stage_bytes
                if of["CHUNK"] * catalog.format_bytes(out_type) == 64:
                    # Nothing is spare but barriers of stages that there are not.
                    assert used + 16 * (16 - config.stages) == config.shared_bytes
            assert of["CHUNK"] == config.chunk(catalog.format_bytes(out_type))
            assert of["BOX_ROW"] == 32 * catalog.format_bytes(out_type)
            assert config.tokens % of["CHUNK"] == 0
            # Swizzles count from multiples of 1024 bytes; barriers are 8 bytes.
            for name in ("STAGE_BYTES", "TOKEN_BYTES", "UNIT", "RESULTS", "BOX_BYTES"):
                assert of[name] % (512 if name == "UNIT" else 1024) == 0, name
            assert of["BOX_BYTES"] % (8 * of["BOX_ROW"]) == 0
            assert of["SCALES"] % 16 == of["GATHER"] % 16 == of["BARRIERS"] % 8 == 0


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.name)
def test_there_are_enough_stages(config):
    """Two under way and two to load; and each always the same warpgroup's where they take turns.

    A barrier tells only even from odd uses of a stage, and loads may arrive in any order: who waits
    for one must have seen the use before.
    """
    assert 4 <= config.stages <= 16
    if config.k_groups:
        assert config.stages % (2 * config.groups) == 0


@needs_compiler
def test_every_part_of_a_product_is_worked_on_once(tmp_path):
    """item_of(), from the kernel's text, of every block of whole grids."""
    schedule = SOURCE.headers["hopper_schedule.cuh"]
    text = schedule[schedule.index("struct Shape {") :]
    steps = 11
    #: weight tiles, token tiles, group, whole tiles, splits, ranges, blocks, whether in clusters
    products = [
        (*tiles, group, tiles[0] * tiles[1] - rest, splits, 0, blocks, False)
        for tiles in ((1, 1), (2, 1), (7, 2), (9, 5), (17, 2))
        for group in (1, 8, 16)
        for splits in (1, 2, 3, 11)
        for rest in {0, 1, tiles[0] * tiles[1]}
        for blocks in (1, 6)
        if blocks <= tiles[0] * tiles[1] - rest + rest * splits
    ]
    products += [
        (weight, token, 8, weight * token, 1, ranges, ranges * token, False)
        for weight, token in ((1, 1), (2, 1), (7, 2), (9, 5), (17, 2))
        for ranges in (1, 2, 3, 4, 5, 11, 14, 66)
        if ranges <= weight * steps // 2
    ]
    products += [
        (weight, token, 8, 0, cluster, 0, cluster * clusters, True)
        for weight, token in ((1, 1), (2, 1), (7, 2), (9, 5))
        for cluster in (2, 3, 8)
        for clusters in (1, 4, 14)
        if clusters <= weight * token
    ]
    calls = "\n".join(
        f"show<{int(not clusters and (splits > 1 or ranges > 0))}, {int(clusters)}>("
        f"{{0, 0, {steps}, 0, {weight}, {token}, {group}, {whole}, {splits}, {ranges}}}, {blocks});"
        for weight, token, group, whole, splits, ranges, blocks, clusters in products
    )
    program = f"""
    #include <cstdio>
    using u32 = unsigned;
    #define SS_DEVICE static
    static struct {{ unsigned x; }} blockIdx, gridDim;
    template <bool SPLITS, bool CLUSTERS> struct Order {{
    {text}
    static void show(Shape shape, int blocks) {{
      gridDim.x = blocks;
      for (blockIdx.x = 0; blockIdx.x < gridDim.x; ++blockIdx.x) {{
        for (int i = 0; i < items_of(shape); ++i) {{
          const Item item = item_of(i, shape);
          const Sharing& of = item.sharing;
          const int slot = of.part ? of.second_slot + (of.part - 1) * of.slot_step : of.first_slot;
          std::printf("%d %d %d %d %d %d %d %d %d\\n", (int)blockIdx.x, item.weight_tile,
                      item.token_tile, item.first, item.count, of.part, of.parts, of.counter, slot);
        }}
      }}
      std::printf("end\\n");
    }}
    }};
    template <bool SPLITS, bool CLUSTERS>
    void show(typename Order<SPLITS, CLUSTERS>::Shape shape, int blocks) {{
      Order<SPLITS, CLUSTERS>::show(shape, blocks);
    }}
    int main() {{ {calls} }}
    """
    runs = built(tmp_path, program).split("end\n")[:-1]
    assert len(runs) == len(products)
    for product, run in zip(products, runs, strict=True):
        weight_tiles, token_tiles, _, whole, splits, ranges, blocks, clusters = product
        done: Counter[tuple[int, int, int]] = Counter()
        shared: dict[int, list[tuple[int, ...]]] = {}
        slots: list[int] = []
        of_block: Counter[int] = Counter()
        for line in run.splitlines():
            block, weight, token, first, count, part, parts, counter, slot = map(int, line.split())
            assert count >= (1 if ranges else steps // splits)
            assert (parts > 1) == (count < steps)
            done.update((weight, token, step) for step in range(first, first + count))
            of_block[block] += count
            if clusters:
                # One cluster has all parts of a tile, each block its own.
                assert (parts, part) == (splits, block % splits)
                tile = (block // splits * token_tiles + token) * weight_tiles + weight
                shared.setdefault(tile, []).append((part, first, weight, token, parts))
            elif parts > 1:
                shared.setdefault(counter, []).append((part, first, weight, token, parts))
                slots.append(slot)
        assert set(done.values()) == {1}
        assert len(done) == weight_tiles * token_tiles * steps
        # Every part has a place of its own.
        assert len(set(slots)) == len(slots)
        if ranges:
            # Blocks have as much to do as others, to a step.
            assert max(of_block.values()) - min(of_block.values()) <= 1
            assert len(of_block) == blocks
            assert all(0 <= slot < 2 * blocks for slot in slots)
            assert all(0 <= counter < blocks for counter in shared)
        elif not clusters:
            assert all(0 <= slot < (weight_tiles * token_tiles - whole) * splits for slot in slots)
            if splits > 1:
                assert sorted(shared) == list(range(weight_tiles * token_tiles - whole))
        # Each shared tile has counters of its own, and its parts are numbered in the order of K'.
        for parts_of_tile in shared.values():
            expected = parts_of_tile[0][4]
            assert [part[0] for part in sorted(parts_of_tile)] == list(range(expected))
            assert sorted(part[1] for part in parts_of_tile) == [
                part[1] for part in sorted(parts_of_tile)
            ]
            assert len({part[2:] for part in parts_of_tile}) == 1


# --- which configurations there are ---------------------------------------------------------------


@given(
    st.one_of(st.integers(1, 600), st.integers(1, 1 << 18)),
    st.one_of(st.integers(1, 20), st.integers(1, 2000)),
    st.sampled_from(TOKEN_BUCKETS),
    st.sampled_from([1, 7, *SM_COUNTS]),
)
def test_every_configuration_fits_its_product(n, steps, bucket, sm_count):
    slid_bytes = 256 * steps
    found = configurations(n, slid_bytes, bucket, sm_count)
    assert len(found) >= 1
    assert len(found) == len(set(found))
    kernels = FakeKernels(sm_count)
    for config in found:
        assert steps >= config.least_steps
        cut = tiling(config, n, slid_bytes, bucket, sm_count)
        # Whole panels, whose blocks of 64 channels lie inside each other.
        rows = -(-n // PANEL_ROWS) * PANEL_ROWS
        assert (cut.weight_tiles - 1) * config.rows < rows <= cut.weight_tiles * config.rows
        assert (cut.token_tiles - 1) * config.tokens < bucket <= cut.token_tiles * config.tokens
        assert cut.tiles == cut.weight_tiles * cut.token_tiles
        # What was timed for a bucket also runs fewer tokens.
        for tokens in (max([1, *(less + 1 for less in TOKEN_BUCKETS if less < bucket)]), bucket):
            HopperGemm(kernels, "int8", "float32", n, slid_bytes, slid_bytes, tokens, config)
        if config.cluster:
            # All tiles at a time, and nothing in device memory.
            assert cut.blocks == config.cluster * cut.tiles <= sm_count
            assert (cut.whole, cut.splits, cut.ranges) == (0, config.cluster, 0)
            assert cut.counters == cut.partial_bytes == 0
            assert steps // cut.splits >= 2
            continue
        assert config.even or cut.blocks == min(cut.items, sm_count)
        assert config.split == (cut.splits > 1 or cut.ranges > 0)
        assert config.even == (cut.ranges > 0)
        assert cut.splits <= hopper_tiles.MOST_SPLITS
        assert steps // cut.splits >= config.turns
        # All that fill the multiprocessors are whole.
        rest = cut.tiles % sm_count if cut.splits > 1 else 0
        assert cut.shared == cut.tiles - cut.whole == rest
        assert cut.counters <= hopper_tiles.HOPPER_COUNTERS
        if config.even:
            assert cut.blocks == cut.ranges * cut.token_tiles
            assert cut.counters == hopper_tiles.COUNTERS_A_TILE * cut.blocks
            assert cut.partial_bytes == 2 * cut.blocks * 4 * config.rows * config.tokens
            continue
        assert cut.counters == hopper_tiles.COUNTERS_A_TILE * rest
        assert cut.items == cut.whole + rest * cut.splits
        assert cut.partial_bytes == rest * cut.splits * 4 * config.rows * config.tokens


@given(st.integers(1, 700), st.sampled_from(CONFIGS))
def test_tiles_have_every_channel(n, config):
    """By the order of channels in hopper_gemm.cu: the blocks of a panel alternate."""
    blocks = tiling(config, n, 1024, 1, 132).weight_tiles * config.rows // 64
    channels = {
        block // 2 * 128 + 32 * warp + 4 * g + 2 * (block % 2) + h
        for block in range(blocks)
        for warp in range(4)
        for g in range(8)
        for h in range(2)
    }
    assert channels >= set(range(n))


def test_few_tokens_share_k_and_many_of_a_large_weight_do_not():
    few, many = configurations(4096, 8192, 16, 132), configurations(4096, 8192, 4096, 132)
    assert all(config.k_groups for config in few)
    assert not any(config.k_groups for config in many)
    assert configurations(64, 256, 16, 132) == [HopperConfig(128, 2)]


@pytest.mark.parametrize(
    ("config", "n", "steps", "tokens", "whole", "splits"),
    [
        (HopperConfig(128, 2), 3584, 111, 256, 0, 4),  # 28 tiles: 112 parts
        (HopperConfig(128, 2), 3584, 3, 256, 28, 1),  # too short to share
        (HopperConfig(16, 1, 2, True), 3584, 111, 16, 0, 2),  # 56 tiles: one round of 112
        (HopperConfig(208, 2), 3584, 111, 2048, 132, 16),  # 8 of 140 tiles are left over
        (HopperConfig(208, 2), 128 * 256, 111, 208, 128, 1),  # 128 of 132: as good as all
        (HopperConfig(208, 2), 132 * 256, 111, 208, 132, 1),
    ],
)
def test_how_tiles_are_shared(config, n, steps, tokens, whole, splits):
    cut = tiling(replace(config, split=True), n, 256 * steps, tokens, 132)
    assert (cut.whole, cut.splits) == (whole, splits)
    assert tiling(config, n, 256 * steps, tokens, 132).whole == cut.tiles


def test_equal_ranges_are_for_a_few_rounds_of_tiles():
    """Where whole tiles leave multiprocessors idle in the last round, and ranges hardly any."""

    def even(n, tokens):
        return {config.tokens for config in configurations(n, 5376, tokens, 132) if config.even}

    assert even(37_888, 256) == {128}  # 296 tiles
    assert even(37_888, 192) == {128, 192}
    assert even(3584, 256) == set()  # fewer tiles than multiprocessors
    assert even(37_888, 2048) == {192}
    assert even(37_888, 16_384) == set()
    for config in configurations(37_888, 5376, 256, 132):
        assert not (config.even and config.k_groups)
        cut = tiling(config, 37_888, 5376, 256, 132)
        assert not config.even or cut.ranges == 132 // cut.token_tiles


@pytest.mark.parametrize("others", [{}, {"k_groups": True}, {"split": True, "k_groups": True}])
def test_equal_ranges_are_a_way_to_split_what_warpgroups_do_not_share(others):
    with pytest.raises(OptionError, match=r"without split, or with k_groups"):
        HopperConfig(64, 1, 2, even=True, **others)


def test_clusters_are_for_fewer_tiles_than_multiprocessors():
    def sizes(n, tokens, sm_count=132, steps=21):
        found = configurations(n, 256 * steps, tokens, sm_count)
        made: dict[tuple[int, int] | int, list[int]] = {}
        for config in found:
            if config.cluster:
                tile = config.tokens if config.blocks == 2 else (config.rows, config.tokens)
                made.setdefault(tile, []).append(config.cluster)
        return made

    assert sizes(3584, 256) == {128: [3, 4], (128, 128): [2]}  # 28 tiles, 56 of 128 channels
    assert sizes(3584, 384) == {128: [2], 192: [3, 4], (128, 192): [2]}
    assert sizes(3584, 128) == {64: [3, 4], 128: [7, 8], (128, 128): [3, 4]}
    # 18 tiles: 7 and 6 of 16 neighbours are two clusters, for 8 times 16 of them: too few.
    assert sizes(4608, 128) == {64: [2, 3], 128: [4, 5], (128, 128): [2, 3]}
    assert sizes(256 * 64, 128) == {128: [2]}
    assert sizes(256 * 65, 128) == {}
    assert sizes(3584, 128, steps=5) == {64: [2], 128: [2], (128, 128): [2]}  # two steps each
    assert sizes(37_888, 256) == {}
    assert sizes(3584, 256, sm_count=16) == {}  # a part of a GPU
    sums = {config.tokens: config.gathers for config in CONFIGS if not config.k_groups}
    assert sums == {tokens: tokens < 208 for tokens in (32, 64, 128, 160, 192, 208)}


def test_tiles_of_128_channels_are_for_few_tiles():
    """Where those of 256 are fewer than two for each multiprocessor."""

    def widths(n, tokens, sm_count=132):
        found = configurations(n, 5376, tokens, sm_count)
        return {c.tokens for c in found if c.blocks == 1 and not c.k_groups}

    assert widths(3584, 64) == set()
    assert widths(3584, 128) == widths(3584, 256) == {128}
    assert widths(3584, 384) == widths(3584, 512) == {128, 192}
    assert widths(256 * 263, 128) == {128}
    assert widths(256 * 264, 128) == set()
    assert widths(2048, 4096) == {128, 192}  # 256 and 172 tiles
    assert widths(2048, 16_384) == set()
    for config in configurations(37_888, 5376, 128, 132):
        assert not (config.blocks == 1 and config.even)


def test_tiles_of_64_channels_are_for_a_tile_a_multiprocessor():
    """The two lowest of which there are no more than multiprocessors, beside what else is tried."""

    def widths(n, tokens, sm_count=132):
        found = configurations(n, 5376, tokens, sm_count)
        return [c.tokens for c in found if c.k_groups and c.groups == 2 and not c.split]

    assert widths(512, 512) == [32, 64]  # 128 and 64 tiles; of 16 tokens 256
    assert widths(512, 1024) == [64, 128]
    assert widths(1024, 1024) == [128]
    assert widths(1024, 1024, sm_count=127) == []
    assert widths(1024, 2048) == []
    assert widths(512, 128) == [128, 16, 32]
    assert widths(2048, 256) == [128, 64]
    assert widths(4096, 256) == [128]  # tried there whatever their number
    assert widths(4096, 64) == [64, 32]
    assert widths(4096, 16) == [16]


@given(st.sampled_from(TOKEN_BUCKETS), st.integers(1, 1 << 17), st.sampled_from([132, 114, 16]))
def test_hardly_filled_tiles_are_not_tried_where_the_bucket_decides(tokens, n, sm_count):
    for config in configurations(n, 5376, tokens, sm_count):
        padded = -(-tokens // config.tokens) * config.tokens
        if config.tokens > 128 and tokens <= 512:
            assert padded < 1.2 * tokens
    assert {128} & {config.tokens for config in configurations(n, 5376, max(tokens, 65), sm_count)}


@pytest.mark.parametrize(
    "settings",
    [
        {"cluster": 1},
        {"cluster": 9},
        {"cluster": 2, "split": True},
        {"cluster": 2, "split": True, "even": True},
        {"cluster": 2, "blocks": 1, "k_groups": True},
        {"cluster": 2, "tokens": 208},
    ],
)
def test_clusters_that_there_cannot_be(settings):
    with pytest.raises(
        OptionError, match=r"clusters of \d blocks were asked for; allowed are 2 to 8"
    ):
        HopperConfig(**{"tokens": 64, "blocks": 2, **settings})


def test_a_cluster_needs_a_step_of_k_for_each_block():
    with pytest.raises(
        OptionError, match=r"clusters of 4 needs 4 steps of 256 bytes of K'.* are 3"
    ):
        HopperGemm(
            FakeKernels(132), "int8", "float32", 70, 768, 768, 5, HopperConfig(64, 2, cluster=4)
        )


def test_tiles_have_as_many_counters_as_the_kernel_counts_in():
    found = re.search(r"COUNTERS_A_TILE = (\d+);", SOURCE.headers["hopper_schedule.cuh"])
    assert found is not None
    assert int(found[1]) == hopper_tiles.COUNTERS_A_TILE


def test_names_tell_configurations_apart():
    assert HopperConfig(208, 2).name == "256x208"
    assert HopperConfig(16, 1, 4, True, split=True).name == (
        "64x16, 4 warpgroups share K', the last share K'"
    )
    assert len({config.name for config in CONFIGS}) == len(CONFIGS)


def test_a_configuration_is_kept_as_it_was_made():
    config = HopperConfig(64, 1, 4, True)
    assert (config.rows, config.threads, config.gather_bytes) == (64, 640, 3 * 32 * 128 * 4)
    assert HopperConfig(64, 2).rows == 256
    assert HopperConfig(64, 2).gather_bytes == 0
    assert replace(config, split=True).shared_bytes == config.shared_bytes


def shortly(config):
    """Channels x tokens, and how K' is shared."""
    shared = f" wg{config.groups}" if config.k_groups else ""
    shared += " ranges" if config.even else " last" if config.split else ""
    shared += f" c{config.cluster}" if config.cluster else ""
    return f"{config.rows}x{config.tokens}{shared}{' 16' if config.tile_group == 16 else ''}"


#: For (N, steps of K', bucket) on 132 multiprocessors; a change here needs a measurement.
TRIED = {
    (3584, 21, 16): ("64x16 wg2, 64x16 wg4"),
    (4608, 21, 192): (
        "64x128 wg2, 256x128, 256x192, 256x208, 128x128, 64x128 wg2 last, 256x128 c2, 256x128 "
        "c3, 256x128 last, 256x192 c4, 256x192 c5, 256x192 last"
    ),
    (37888, 21, 256): ("64x128 wg2, 256x128, 256x128 last, 256x128 ranges"),
    (3584, 111, 384): (
        "256x128, 256x192, 256x208, 128x128, 128x192, 256x128 c2, 256x128 last, 256x192 c3, "
        "256x192 c4, 256x192 last, 128x128 last, 128x192 c2, 128x192 last"
    ),
    (512, 7, 512): (
        "256x128, 256x192, 64x32 wg2, 64x64 wg2, 128x128, 128x192, 256x128 c2, 256x128 c3, "
        "256x192 c2, 256x192 c3, 128x128 c2, 128x128 c3, 128x192 c2, 128x192 c3"
    ),
    (37888, 21, 1024): (
        "256x128, 256x160, 256x192, 256x208, 256x128 ranges, 256x160 ranges, 256x192 ranges"
    ),
    (4608, 21, 2048): (
        "256x128, 256x160, 256x192, 256x208, 128x192, 256x128 last, 256x128 ranges, 256x160 "
        "ranges, 256x192 last, 256x192 ranges, 256x208 16"
    ),
    (37888, 21, 16384): ("256x128, 256x160, 256x192, 256x208, 256x208 16"),
}


@pytest.mark.parametrize("case", TRIED, ids=str)
def test_what_is_tried_for_layers_of_models(case):
    n, steps, tokens = case
    found = configurations(n, 256 * steps, tokens, 132)
    assert ", ".join(map(shortly, found)) == TRIED[case]
