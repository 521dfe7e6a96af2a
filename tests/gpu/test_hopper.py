"""The Hopper GEMM itself, every kernel that is shipped, and plans on the backend "hopper"."""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
from hopper_cases import (
    DTYPES,
    OUT_TYPES,
    keep_compiled,
    pairs,
    share_always,
    shipped,
    spec_of,
)
from kernel_checks import check_hopper_pack

import slidesparse_rt as ss
from slidesparse_rt.backends import hopper
from slidesparse_rt.backends.workspace import COUNTER_BYTES
from slidesparse_rt.kernels.catalog import hopper_pack
from slidesparse_rt.kernels.hopper import pack_weights
from slidesparse_rt.kernels.hopper_tiles import MOST_CLUSTER, HopperConfig, configurations
from slidesparse_rt.kernels.loader import kernels_of

from .common import ON_HOPPER, assert_near, assert_same, data, reference, to_host, to_torch, weight
from .hopper_products import Operands, Result, real, words
from .kernel_machine import GpuMachine

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not ON_HOPPER, reason="needs a GPU of compute capability 9.0"),
]

PAIRS = pairs()
#: Compilers that run at a time; each takes some 300 MB.
COMPILERS = 12


@pytest.fixture(scope="module", autouse=True)
def _compiled():
    """Compile side by side what the tests below would compile one after the other."""
    specs = [spec_of(*pair) for pair in PAIRS] + [hopper_pack(dtype) for dtype in DTYPES]
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(COMPILERS, mp_context=spawn) as workers:
        problems = [said for said in workers.map(keep_compiled, specs) if said]
    assert problems == []


@pytest.fixture(autouse=True)
def _sharing(monkeypatch):
    share_always(monkeypatch)


@pytest.fixture
def draw():
    import torch

    return torch.Generator(device="cuda").manual_seed(20)


def least_row_bytes(config: HopperConfig) -> int:
    """Bytes of K' of which every warpgroup gets some, and blocks where they share tiles."""
    return 256 * (12 if config.split or config.cluster else config.turns) - 240


def several_items(config: HopperConfig, n: int) -> int:
    """Tokens for which every block works on several tiles."""
    across = -(-n // config.rows)
    sm_count = kernels_of(0).limits.sm_count
    return -(-5 * sm_count // (2 * across)) * config.tokens - 3


@pytest.mark.parametrize(
    "pair", PAIRS, ids=lambda pair: f"{pair[1]}-{pair[2]}-{pair[0].name}".replace(" ", "_")
)
def test_every_kernel_is_exact(draw, pair):
    """Edges in N, M and K', each way of storing, with and without bias, several tiles a block."""
    import torch

    config, dtype, out_type = pair
    least = least_row_bytes(config)
    stream = torch.cuda.current_stream().cuda_stream
    for n, row_bytes, m, stride, offset, bias in (
        (1, least, 1, 1, 0, True),
        (66, least, 37, 67, 1, False),
        (300, 2048 + 16, 129, 300, 0, True),  # 16-bit rows are multiples of 8 bytes, not of 16
        (384, 4096 + 128, 300, 384, 0, False),  # boxes that end at the last channel
        (392, 2048, 513, 416, 32, True),  # and such that do not
        (385, 2048, 64, 416, 0, True),  # rows of the result end within 16 bytes
        (130, 4096 - 48, 300, 132, 4, True),
        (1000, least, several_items(config, 1000), 1024, 0, True),
        (1001, least + 256, several_items(config, 1001), 1002, 2, False),
    ):
        held = max(row_bytes, least)
        used = replace(config, tile_group=(8, 16, 1, 3)[m % 4])
        operands = Operands(draw, dtype, n, held, m, bias=bias)
        result = Result(operands, used, out_type, stride, offset)
        expected = operands.exact(out_type)
        for _ in range(2):
            result.launch(stream)
            result.check(expected)
            result.words.fill_(7)


@pytest.mark.parametrize(
    "pair", PAIRS, ids=lambda pair: f"{pair[1]}-{pair[2]}-{pair[0].name}".replace(" ", "_")
)
def test_every_kernel_on_few_multiprocessors(draw, pair, monkeypatch):
    """Blocks that work on several tiles though the product is small; for sanitizers too."""
    import torch

    config, dtype, out_type = pair
    kernels = kernels_of(0)
    monkeypatch.setattr(
        kernels, "limits", replace(kernels.limits, sm_count=4 if config.even else 2)
    )
    row_bytes = least_row_bytes(config) + 512
    stream = torch.cuda.current_stream().cuda_stream
    n, m = 2 * config.rows + 8, 2 * config.tokens + 5
    if config.even:  # seven tiles of channels in four ranges
        n, m = 7 * config.rows - 56, config.tokens - 3
    operands = Operands(draw, dtype, n, row_bytes, m, bias=True)
    result = Result(operands, config, out_type, n + 8, 0)
    assert result.gemm.tiling.items > result.gemm.tiling.blocks
    assert result.gemm.tiling.ranges == (4 if config.even else 0)
    expected = operands.exact(out_type)
    for _ in range(2):
        result.launch(stream)
        result.check(expected)
        result.words.fill_(7)


@pytest.mark.parametrize("cluster", range(2, MOST_CLUSTER + 1))
@pytest.mark.parametrize("tokens", [32, 192])
def test_clusters_of_every_size(draw, tokens, cluster):
    """Fewer tiles than clusters, and several for each; parts of K' that differ by a step."""
    import torch

    config = HopperConfig(tokens, 2, cluster=cluster)
    stream = torch.cuda.current_stream().cuda_stream
    for n, m in ((300, 2 * tokens - 3), (2056, 19 * tokens)):
        operands = Operands(draw, "int8", n, 256 * (cluster + 5), m, bias=True)
        result = Result(operands, config, "bfloat16", n, 0)
        expected = operands.exact("bfloat16")
        for _ in range(2):
            result.launch(stream)
            result.check(expected)
            result.words.fill_(7)


@pytest.mark.parametrize("config", [HopperConfig(128, 2), HopperConfig(64, 1, 4, True, split=True)])
def test_int8_sums_of_every_size(draw, config):
    """Up to the largest that K allows: far beyond what float32 counts in ones."""
    import torch

    n, m, columns = 70, 20, 262_144
    operands = Operands(draw, "int8", n, columns, m, bias=False)
    operands.token_scales = operands.channel_scales = None
    # The 127s of token 0 meet those of channel 0: 127 * 127 * K' / 2.
    operands.slid[0] = torch.tensor([127, 127, 0, 0], device="cuda").repeat(columns // 4)
    operands.slid[1] = -operands.slid[0]
    operands.tokens[0] = 127
    stream = torch.cuda.current_stream().cuda_stream
    rows = operands.slid.shape[0]
    pack_weights(
        kernels_of(0),
        "int8",
        operands.slid.data_ptr(),
        rows,
        columns,
        operands.packed.address,
        stream,
    )
    expected = operands.exact("float32")
    assert float(expected[0, 0]) == np.float32(127 * 127 * columns // 2) > 2**30
    assert float(expected[0, 1]) == -float(expected[0, 0])
    result = Result(operands, config, "float32", n, 0)
    result.launch(stream)
    result.check(expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "config",
    [
        HopperConfig(32, 1, 4, True),
        HopperConfig(32, 1, 4, True, split=True),
        HopperConfig(32, 2, split=True),
        HopperConfig(32, 2, split=True, even=True),
        HopperConfig(32, 2, cluster=5),
    ],
    ids=lambda config: config.name.replace(" ", "_"),
)
@pytest.mark.parametrize("few", [False, True])
def test_rounded_sums_are_the_same_every_time(draw, dtype, config, few, monkeypatch):
    """Whatever else runs, and whichever of the blocks that share a tile finishes last.

    With few multiprocessors two blocks share a tile, or one block has several.
    """
    import torch

    n, m = 1000, 70
    if few:
        kernels = kernels_of(0)
        monkeypatch.setattr(kernels, "limits", replace(kernels.limits, sm_count=5))
        n, m = 7 * config.rows, 30
    operands = Operands(draw, dtype, n, 8 * 4 * 256, m, bias=True, make=real)
    results = [Result(operands, config, "float32", n, 0) for _ in range(2)]
    assert bool(results[0].gemm.tiling.ranges) == config.even
    stream, beside = torch.cuda.current_stream(), torch.cuda.Stream()
    results[0].launch(stream.cuda_stream)
    first = results[0].words.clone()
    torch.cuda.synchronize()
    differ = torch.zeros((), dtype=torch.int64, device="cuda")
    held = torch.empty(1 << 26, device="cuda")
    for repeat in range(200):
        with torch.cuda.stream(beside):
            held.fill_(repeat)
        results[1].words.fill_(7)
        results[1].launch(stream.cuda_stream)
        differ += (results[1].words != first).sum()
    assert int(differ) == 0
    results[1].check(first.view(torch.float32))
    assert bool(torch.isfinite(first.view(torch.float32)).all())


@pytest.mark.parametrize(
    "config",
    [
        HopperConfig(16, 1, 4, True, split=True),
        HopperConfig(64, 2, split=True),
        HopperConfig(64, 2, split=True, even=True),
        HopperConfig(64, 2, cluster=3),
        HopperConfig(192, 2),
    ],
    ids=lambda config: config.name.replace(" ", "_"),
)
def test_a_graph_repeats_the_launch_with_the_data_of_then(draw, config):
    import torch

    m = 2 * config.tokens - 5
    operands = Operands(draw, "fp8_e4m3", 520, 4096, m, bias=True)
    result = Result(operands, config, "bfloat16", 520, 0)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        result.launch(stream.cuda_stream)
    for seed in range(3):
        fresh = Operands(draw.manual_seed(seed), "fp8_e4m3", 520, 4096, m, bias=True)
        operands.tokens.copy_(fresh.tokens)
        result.words.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        result.check(operands.exact("bfloat16"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_packing_is_the_definition_to_the_bit(dtype):
    rng = np.random.default_rng(3)
    for rows, row_bytes in ((128, 256), (384, 2304), (256, 98_304), (8192, 1024)):
        check_hopper_pack(GpuMachine(), rng, rows, row_bytes, dtype)


# --- everything at once ---------------------------------------------------------------------------

STREAMS = 4
#: Problems that are launched in turns before others are drawn, and launches of such a round.
PROBLEMS, LAUNCHES = 12, 400


def drawn(rng, draw):
    """A random problem on a random kernel, with a result for each stream."""
    config, dtype, out_type = PAIRS[rng.integers(len(PAIRS))]
    least = least_row_bytes(config)
    row_bytes = least + 16 * int(rng.integers(0, 400))
    config = replace(config, tile_group=int(rng.choice([1, 2, 8, 16])))
    if config.cluster:
        config = replace(config, cluster=int(rng.integers(2, MOST_CLUSTER + 1)))
    n, m = int(rng.integers(1, 2000)), int(rng.integers(1, rng.choice([40, 300, 1500])))
    exact = bool(rng.integers(4))
    operands = Operands(
        draw,
        dtype,
        n,
        row_bytes,
        m,
        bias=bool(rng.integers(2)),
        **({} if exact else {"make": real}),
    )
    stride = n + int(rng.choice([0, 1, 3, -n % 16, -n % 8 + 8]))
    offset = int(rng.choice([0, 1, 4, 16]))
    results = [Result(operands, config, out_type, stride, offset) for _ in range(STREAMS)]
    return operands, results, operands.exact(out_type) if exact else None


def test_stress(draw, request):
    """Random shapes and kernels, several streams, and kernels beside them that take bandwidth.

    Every result is compared with the first one of its problem, to the bit, and most with exact
    arithmetic.  --stress-seconds says for how long.
    """
    import torch

    seed = 7
    rng = np.random.default_rng(seed)
    draw.manual_seed(seed)
    streams = [torch.cuda.Stream() for _ in range(STREAMS)]
    beside = [torch.cuda.Stream() for _ in range(2)]
    large = torch.empty(1 << 26, device="cuda")
    host = torch.empty(1 << 22, pin_memory=True)
    differ = [torch.zeros(PROBLEMS, dtype=torch.int64, device="cuda") for _ in range(STREAMS)]
    end = time.monotonic() + float(request.config.getoption("stress_seconds", 20))
    rounds = 0
    while rounds < 2 or time.monotonic() < end:
        problems = [drawn(rng, draw) for _ in range(PROBLEMS)]
        firsts = []
        for _, results, exact in problems:
            results[0].launch(torch.cuda.current_stream().cuda_stream)
            first = results[0].words.clone()
            if exact is not None:
                results[0].check(exact)
            firsts.append((first, exact))
        torch.cuda.synchronize()
        for launch in range(LAUNCHES):
            which, place = int(rng.integers(PROBLEMS)), int(rng.integers(STREAMS))
            result = problems[which][1][place]
            with torch.cuda.stream(streams[place]):
                result.words.fill_(7)
                result.launch(streams[place].cuda_stream)
                differ[place][which] += (result.words != firsts[which][0]).sum()
            if launch % 8 == 0:
                with torch.cuda.stream(beside[0]):
                    large.mul_(1.0)
                with torch.cuda.stream(beside[1]):
                    host.copy_(large[: 1 << 22], non_blocking=True)
        torch.cuda.synchronize()
        for which, (operands, results, _) in enumerate(problems):
            count = sum(int(of_stream[which]) for of_stream in differ)
            config = results[0].config
            assert count == 0, (
                f"round {rounds}: {count} elements of {operands.dtype} {operands.n} x "
                f"{operands.row_bytes} bytes x {operands.m}, {config}, differ from the first run"
            )
            first, exact = firsts[which]
            for result in results:
                # A problem that no launch of this round met is launched here.
                result.launch(torch.cuda.current_stream().cuda_stream)
                result.check(first.view(torch_type_of(result)))
                if exact is not None:
                    result.check(exact)
        rounds += 1


def torch_type_of(result: Result):
    """Any type whose bits :func:`words` reads as the result's."""
    import torch

    return torch.float32 if result.words.element_size() == 4 else torch.float16


# --- plans ----------------------------------------------------------------------------------------


def counters_of(plan):
    """The counters before each of a plan's workspaces."""
    import cupy

    found = []
    for block in plan._runner.workspace._blocks.values():
        host = np.empty(COUNTER_BYTES, np.uint8)
        cupy.cuda.runtime.memcpy(host.ctypes.data, block.pointer, COUNTER_BYTES, 2)
        found.append(host)
    return found


@pytest.mark.parametrize("pattern", ["2:4", "4:6", "6:8", "dense"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_auto_picks_it_and_says_so(pattern, dtype):
    """Where nothing is measured: but where the rule says that dense is faster."""
    w, x = weight(0, 160, 352, pattern), data(1, (33, 352), "bfloat16")
    with ss.SparseGemmPlan(w, pattern, dtype=dtype, device="cuda") as plan:
        slower = pattern == "dense" or (pattern, dtype) == ("6:8", "bf16")
        assert plan.backend == ("dense" if slower else "hopper")
        assert "hopper" in plan.explain()
        y = to_host(plan.run(to_torch(x)))
        assert_near(y, w, x, dtype)
        if dtype == "int8":
            assert_same(y, reference(w, pattern, x, dtype))


@pytest.mark.parametrize("out_type", OUT_TYPES)
def test_one_scale_for_all_tokens(out_type):
    w, x = weight(2, 100, 512, "6:8"), data(3, (300, 512))
    options = {"x_scale": 0.02, "out_dtype": out_type, "bias": data(4, (100,))}
    with ss.SparseGemmPlan(w, "6:8", device="cuda", **options) as plan:
        assert plan.backend == "hopper"
        assert "0.02 (static)" in plan.explain()
        assert_same(to_host(plan.run(to_torch(x))), reference(w, "6:8", x, "int8", **options))


def test_streams_at_once_leave_their_counters_at_zero(monkeypatch):
    """Each stream has a workspace and counters of its own, where blocks share K'."""
    import torch

    def sharing(*problem):
        return [config for config in configurations(*problem) if config.split]

    monkeypatch.setattr(hopper, "configurations", sharing)
    n, k = 1032, 8216  # this test's own, so that nothing was chosen for it before
    w = weight(5, n, k, "6:8")
    sizes = (1, 16, 60, 200, 700)
    inputs = {m: data(m, (m, k), "bfloat16") for m in sizes}
    with ss.SparseGemmPlan(w, "6:8", device="cuda") as plan:
        streams = [torch.cuda.Stream() for _ in range(3)]
        held = {m: to_torch(x) for m, x in inputs.items()}
        wanted = {
            m: to_torch(reference(w, "6:8", x, "int8").view(np.int16)) for m, x in inputs.items()
        }
        for stream in streams:
            plan.prepare(sizes, stream=stream)
        torch.cuda.synchronize()
        differ = [torch.zeros((), dtype=torch.int64, device="cuda") for _ in streams]
        torch.cuda.synchronize()
        for turn in range(150):
            m, place = sizes[turn % len(sizes)], turn % len(streams)
            with torch.cuda.stream(streams[place]):
                y = plan.run(held[m])
                differ[place] += (words(y) != wanted[m]).sum()
        torch.cuda.synchronize()
        assert [int(count) for count in differ] == [0, 0, 0]
        found = counters_of(plan)
        assert len(found) == len(streams)
        assert not any(counters.any() for counters in found)


def test_a_result_whose_rows_run_backwards():
    """Boxes cannot be stored to it, whatever its alignment."""
    import cupy

    w, x = weight(6, 256, 512, "6:8"), data(7, (300, 512))
    with ss.SparseGemmPlan(w, "6:8", device="cuda") as plan:
        assert plan.backend == "hopper"
        out = cupy.zeros((300, 256), np.float32)
        plan.run(cupy.asarray(x), out=out[::-1])
        assert_same(cupy.asnumpy(out)[::-1], reference(w, "6:8", x, "int8"))


def test_what_is_shipped_is_what_was_tested_here():
    """Every configuration that the device would time for some shape is one of those above."""
    configs = {(pair[0].name, pair[1]) for pair in PAIRS}
    assert len(configs) == len(shipped()) * len(DTYPES)
    # Ranges and how large clusters are come with a launch; whatever else differs is another kernel.
    compiled = {(replace(config, even=False), *formats) for config, *formats in PAIRS}
    assert len({spec_of(*pair) for pair in PAIRS}) == len(compiled)
    assert {(pair[1], pair[2]) for pair in PAIRS} == {
        (dtype, out_type) for dtype in DTYPES for out_type in OUT_TYPES
    }
