"""Launching the Hopper GEMM and its packing, with a driver that only remembers."""

from __future__ import annotations

import pytest
from fake_cuda import FakeKernels
from hopper_cases import DTYPES, OUT_TYPES, spec_of

from slidesparse_rt.errors import LibraryError, OptionError, ShapeError
from slidesparse_rt.kernels import catalog, hopper
from slidesparse_rt.kernels.compiler import read_source
from slidesparse_rt.kernels.hopper import HopperGemm, pack_weights
from slidesparse_rt.kernels.hopper_tiles import HopperConfig, tiling


@pytest.fixture
def kernels():
    return FakeKernels()


#: Arguments of a call: packed, tokens, their scales, channel scales, bias.
OPERANDS = (0x1000, 0x2000, 0x3000, 0x4000, 0x5000)
#: Partial sums, counters, stream.
REST = (0x70000, 0x80000, 99)


def test_the_layout_of_arguments_is_the_kernel_s():
    source = read_source("hopper_gemm.cu")
    start = source.text.index("hopper_gemm(const")
    whole = source.text[start : source.text.index(") {", start)]
    parameters = whole.partition("(")[2].split(",")
    assert [parameter.split()[-2] for parameter in parameters[:2]] == ["TensorMap", "TensorMap"]
    kinds = "".join(
        "Q" if "*" in parameter else "q" if "i64" in parameter else "i"
        for parameter in parameters[2:]
    )
    assert kinds == hopper._GEMM_ARGUMENTS
    assert "struct alignas(64) TensorMap {\n  u64 words[16];" in source.headers["hopper.cuh"]


@pytest.mark.parametrize(
    ("readable", "rows"), [(None, 130), (0, 130), (150, 150), (192, 192), (400, 192)]
)
def test_rows_after_the_tokens_are_read_where_there_is_memory(kernels, readable, rows):
    """Up to the end of the last tile; the map ends there."""
    config = HopperConfig(64, 2)
    gemm = HopperGemm(kernels, "int8", "float32", 1000, 4096, 4000, 130, config, readable=readable)
    gemm(*OPERANDS, 0x6000, 1024, *REST)
    assert gemm.rows_read == rows
    assert kernels.cuda.maps[0]["extents"] == (4000, rows)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("out_type", OUT_TYPES)
def test_a_launch_says_everything(kernels, dtype, out_type):
    config = HopperConfig(64, 2, split=True, tile_group=5)
    gemm = HopperGemm(kernels, dtype, out_type, 1000, 4096, 4000, 130, config)
    assert kernels.loaded == [(spec_of(config, dtype, out_type), config.shared_bytes)]
    assert gemm.tiling == tiling(config, 1000, 4096, 130, 132)
    size = catalog.format_bytes(out_type)
    gemm(*OPERANDS, 0x6000, 1024, *REST)
    launch = kernels.cuda.launches[0]
    assert launch == {
        "function": 701,
        "blocks": 4 * 3 * 8,
        "threads": 3 * 128,
        "shared": config.shared_bytes,
        "stream": 99,
        # It may begin before the kernel that writes the tokens is over.
        "attributes": [(6, 1)],
        "maps": [1, 2],
        "values": [
            *(0x1000, 0x3000, 0x4000, 0x5000, 0x6000, 1024, 0x70000, 0x80000),
            *(130, 1000, 16, 8),  # tokens, channels, steps, panels
            *(4, 3, 5, 0, 8),  # tiles of channels and of tokens, group, whole tiles, splits
            *(0, 1, 2),  # no equal ranges, an early start, in boxes
        ],
    }
    kind = {"float16": 6, "float32": 7, "bfloat16": 9}[out_type]
    assert kernels.cuda.maps == [
        {
            "kind": 0,
            "address": 0x2000,
            "extents": (4000, 130),
            "stride": (4000,),
            "box": (128, 64),
        },
        {
            "kind": kind,
            "address": 0x6000,
            "extents": (1000, 130),
            "stride": (1024 * size,),
            "box": (32, 16 if size == 4 else 32),
        },
    ]


@pytest.mark.parametrize(("tokens", "early"), [(40, [(6, 1)]), (5000, [])])
def test_clusters_are_asked_for(kernels, tokens, early):
    """8 tiles, or 628 for 26 clusters of 5; nothing meets in device memory."""
    config = HopperConfig(32, 2, cluster=5)
    gemm = HopperGemm(kernels, "int8", "bfloat16", 1000, 4096, 4096, tokens, config)
    assert gemm.tiling.partial_bytes == gemm.tiling.counters == 0
    gemm(*OPERANDS, 0x6000, 1000, *REST)
    (launch,) = kernels.cuda.launches
    assert launch["blocks"] == 5 * min(4 * -(-tokens // 32), 26)
    assert launch["attributes"] == [*early, (4, 5)]
    assert launch["values"][-5:-2] == [0, 5, 0]  # whole tiles, splits, ranges


def test_drivers_that_lose_it_in_graphs_are_not_asked_for_an_early_start(kernels):
    kernels.cuda.driver_version = 12020
    gemm = HopperGemm(kernels, "int8", "bfloat16", 256, 512, 512, 40, HopperConfig(32, 2))
    gemm(*OPERANDS, 0x6000, 256, *REST)
    assert kernels.cuda.launches[0]["attributes"] == []


def test_many_tokens_wait_for_the_kernel_before(kernels):
    """Blocks must come to multiprocessors in order, for the sake of L2."""
    config = HopperConfig(128, 2)
    for row_bytes, most in ((512, 4096), (16_384, 4096), (16_640, 256)):
        for tokens in (1, most, most + 1, 70_000):
            gemm = HopperGemm(
                kernels, "int8", "bfloat16", 256, row_bytes, row_bytes, tokens, config
            )
            gemm(*OPERANDS, 0x6000, 256, *REST)
        early = [launch["attributes"] for launch in kernels.cuda.launches]
        assert early == [[(6, 1)], [(6, 1)], [], []]
        kernels.cuda.launches.clear()


def test_no_more_blocks_than_multiprocessors(kernels):
    config = HopperConfig(128, 2)
    for tokens, blocks in ((1, 16), (1024, 128), (1025, 132), (70_000, 132)):
        gemm = HopperGemm(kernels, "int8", "bfloat16", 4096, 4096, 4096, tokens, config)
        gemm(*OPERANDS, 0x6000, 4096, *REST)
        assert kernels.cuda.launches[-1]["blocks"] == blocks


def test_maps_are_made_again_only_for_other_addresses(kernels):
    gemm = HopperGemm(kernels, "int8", "bfloat16", 256, 512, 512, 40, HopperConfig(32, 2))
    other_tokens = (*OPERANDS[:1], 0x2400, *OPERANDS[2:])
    calls = [
        (OPERANDS, 0x6000, 256),
        (OPERANDS, 0x6000, 256),
        (other_tokens, 0x6000, 256),
        (other_tokens, 0x6100, 256),
        (other_tokens, 0x6100, 264),
        (other_tokens, 0x6102, 264),  # not in boxes: any map does, and none is made
        (other_tokens, 0x6100, 264),
        (OPERANDS, 0x6100, 264),
    ]
    for operands, out, stride in calls:
        gemm(*operands, out, stride, *REST)
    driver = kernels.cuda
    assert [launch["maps"] for launch in driver.launches] == [
        *([1, 2], [1, 2], [3, 2], [3, 4], [3, 5], [3, 3], [3, 5], [6, 5]),
    ]
    assert [driver.maps[i]["address"] for i in range(6)] == [
        *(0x2000, 0x6000, 0x2400, 0x6100, 0x6100, 0x2000),
    ]
    assert [launch["values"][-1] for launch in driver.launches] == [2, 2, 2, 2, 2, 0, 2, 2]


ONE_BY_ONE, SIDE_BY_SIDE, IN_BOXES = 0, 1, 2


@pytest.mark.parametrize(
    ("blocks", "out_type", "n", "out", "stride", "storing"),
    [
        (2, "bfloat16", 256, 0x6000, 256, IN_BOXES),
        (2, "bfloat16", 256, 0x6010, 264, IN_BOXES),
        (2, "bfloat16", 248, 0x6000, 256, IN_BOXES),
        (2, "bfloat16", 256, 0x6008, 256, SIDE_BY_SIDE),
        (2, "bfloat16", 256, 0x6000, 260, SIDE_BY_SIDE),
        (2, "float16", 256, 0x6000, 258, ONE_BY_ONE),
        (2, "float16", 256, 0x6004, 256, ONE_BY_ONE),
        (2, "float16", 256, 0x6000, 257, ONE_BY_ONE),
        (2, "float32", 256, 0x6000, 256, IN_BOXES),
        (2, "float32", 252, 0x6000, 260, IN_BOXES),
        (2, "float32", 256, 0x6008, 256, ONE_BY_ONE),
        (2, "float32", 256, 0x6000, 257, ONE_BY_ONE),
        # The copy engine writes the last channels of a row as whole 16 bytes.
        (2, "bfloat16", 252, 0x6000, 256, SIDE_BY_SIDE),
        (2, "bfloat16", 255, 0x6000, 256, SIDE_BY_SIDE),
        (2, "float32", 255, 0x6000, 256, SIDE_BY_SIDE),
        (2, "float32", 1, 0x6000, 4, SIDE_BY_SIDE),
        (1, "bfloat16", 256, 0x6000, 256, SIDE_BY_SIDE),
        (1, "bfloat16", 250, 0x6008, 260, SIDE_BY_SIDE),
        (1, "bfloat16", 256, 0x6002, 256, ONE_BY_ONE),
        (1, "float32", 256, 0x6000, 256, SIDE_BY_SIDE),
        (1, "float32", 255, 0x6000, 255, ONE_BY_ONE),
        # Rows that run backwards: the copy engine has no strides below zero.
        (2, "bfloat16", 256, 0x6000, -256, SIDE_BY_SIDE),
        (2, "bfloat16", 256, 0x6000, -260, SIDE_BY_SIDE),
        (2, "float32", 256, 0x6000, -256, SIDE_BY_SIDE),
        (2, "float32", 256, 0x6000, -257, ONE_BY_ONE),
        (1, "bfloat16", 256, 0x6000, -256, SIDE_BY_SIDE),
    ],
)
def test_how_results_are_stored(kernels, blocks, out_type, n, out, stride, storing):
    config = HopperConfig(32, blocks, 2, blocks == 1)
    gemm = HopperGemm(kernels, "bf16", out_type, n, 512, 512, 40, config)
    gemm(*OPERANDS, out, stride, *REST)
    launch = kernels.cuda.launches[0]
    assert launch["values"][-1] == storing
    assert launch["values"][4:6] == [out, stride]
    assert len(kernels.cuda.maps) == (2 if storing == IN_BOXES else 1)
    assert launch["maps"] == ([1, 2] if storing == IN_BOXES else [1, 1])


@pytest.mark.parametrize(
    ("slid_bytes", "row_bytes"), [(500, 496), (512, 500), (512, 528), (512, 0), (512, -16)]
)
def test_rows_of_other_lengths_are_refused(kernels, slid_bytes, row_bytes):
    with pytest.raises(ShapeError) as caught:
        HopperGemm(kernels, "int8", "float32", 64, slid_bytes, row_bytes, 1, HopperConfig(128, 2))
    assert str(caught.value) == (
        f"rows of {slid_bytes} and {row_bytes} bytes; allowed are multiples of 256 and of 16, the "
        f"second not larger than the first"
    )
    assert kernels.loaded == []


@pytest.mark.parametrize(
    ("config", "steps", "turns"),
    [(HopperConfig(16, 1, 4, True), 3, 4), (HopperConfig(16, 1, 2, True, split=True), 1, 2)],
)
def test_each_warpgroup_has_a_step(kernels, config, steps, turns):
    sizes = (256 * steps, 256 * steps, 1)
    with pytest.raises(OptionError) as caught:
        HopperGemm(kernels, "int8", "float32", 64, *sizes, config)
    assert str(caught.value) == (
        f"{config.name} needs {turns} steps of 256 bytes of K', but there are {steps}; use a "
        f"configuration that does not share K'"
    )
    longer = (256 * turns, 256 * turns, 1)
    HopperGemm(kernels, "int8", "float32", 64, *longer, config)


def test_tiles_that_blocks_share_have_counters():
    config, sizes = HopperConfig(128, 2, split=True), (64, 1 << 20, 1 << 20)
    HopperGemm(FakeKernels(10_000), "int8", "float32", *sizes, 128 * 682, config)
    with pytest.raises(OptionError, match=r"splits 683 tiles among blocks; allowed are 682"):
        HopperGemm(FakeKernels(10_000), "int8", "float32", *sizes, 128 * 683, config)


def test_equal_ranges_are_part_of_a_launch(kernels):
    config = HopperConfig(128, 2, split=True, even=True)
    gemm = HopperGemm(kernels, "int8", "bfloat16", 37_888, 5376, 5376, 250, config)
    gemm(*OPERANDS, 0x6000, 37_888, *REST)
    launch = kernels.cuda.launches[0]
    assert launch["blocks"] == 132
    # Every tile counts as whole where there are ranges.
    assert launch["values"][10:] == [21, 296, 148, 2, 8, 296, 1, 66, 1, 2]
    assert gemm.tiling.counters == 3 * 132
    assert gemm.tiling.partial_bytes == 2 * 132 * 256 * 128 * 4


def test_products_that_kernels_cannot_count_are_refused(kernels):
    config = HopperConfig(128, 2)
    for n, tokens in ((1 << 30, 1 << 30), (64, 2**31 - 100)):
        with pytest.raises(ShapeError) as caught:
            HopperGemm(kernels, "int8", "float32", n, 256, 256, tokens, config)
        assert str(caught.value) == (f"{tokens} tokens by {n} channels are too many for one launch")


def test_a_launch_that_fails_has_a_name(kernels):
    gemm = HopperGemm(kernels, "int8", "float32", 64, 256, 256, 1, HopperConfig(128, 2))
    kernels.cuda.status = 700
    with pytest.raises(LibraryError, match=r"cuLaunchKernelEx returned 700 \(unknown status\)"):
        gemm(*OPERANDS, 0x6000, 64, *REST)
    kernels.cuda.status = 0
    kernels.cuda.refuse["cuTensorMapEncodeTiled"] = 1
    gemm(*OPERANDS, 0x6000, 64, *REST)  # its maps are there already
    moved = (OPERANDS[0], 0x9000, *OPERANDS[2:])
    with pytest.raises(LibraryError, match="cuTensorMapEncodeTiled returned 1"):
        gemm(*moved, 0x6000, 64, *REST)
    kernels.cuda.refuse.clear()
    gemm(*moved, 0x6000, 64, *REST)
    assert kernels.cuda.maps[kernels.cuda.launches[-1]["maps"][0] - 1]["address"] == 0x9000


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_is_launched_once_a_unit(kernels, dtype):
    driver = kernels.cuda
    driver.layout = hopper.HOPPER_PACK_ARGUMENTS
    pack_weights(kernels, dtype, 0x1000, 384, 1024, 0x2000, 55)
    pack_weights(kernels, dtype, 0x1000, 128 * 1000, 1024, 0x2000, 55)
    assert [spec for spec, _ in kernels.loaded] == [catalog.hopper_pack(dtype)] * 2
    small, large = driver.launches
    assert (small["blocks"], small["threads"], small["shared"], small["stream"]) == (48, 128, 0, 55)
    assert small["values"] == [0x1000, 1024, 0x2000, 48, 8]
    assert large["blocks"] == 64 * 132
    assert large["values"] == [0x1000, 1024, 0x2000, 16_000, 8]
