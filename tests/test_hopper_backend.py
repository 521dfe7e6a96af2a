"""The backend "hopper" where it needs no GPU: what it packs, chooses, times and launches."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from fake_cuda import FakeKernels
from fake_gpu import Gpu, Memory, cold_cache
from hopper_cases import DTYPES, OUT_TYPES, spec_of

import slidesparse_rt as ss
from slidesparse_rt.backends import Problem, cold, hopper, trial
from slidesparse_rt.backends.gpu_weight import GpuWeight
from slidesparse_rt.backends.hopper import HopperBackend, HopperPrepared
from slidesparse_rt.dtypes import array_type, operand
from slidesparse_rt.errors import DeviceMemoryError, LibraryError
from slidesparse_rt.kernels.hopper import HOPPER_PACK_ARGUMENTS
from slidesparse_rt.kernels.hopper_layout import packed_bytes
from slidesparse_rt.kernels.hopper_tiles import (
    HOPPER_SHARED_BYTES,
    HopperConfig,
    Tiling,
    configurations,
    tiling,
)

N, K = 1000, 4100
OPTIONS = ss.PlanOptions()
STREAM = 77


class Machine(SimpleNamespace):
    """A GPU, its kernels, and what was timed on it."""

    gpu: Gpu
    kernels: FakeKernels
    timed: list[dict[str, Any]]
    slid: list[tuple[int, int, int]]
    quantized: list[tuple[int, ...]]
    widths: list[int]
    dropped: int
    pick: int


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Machine:
    made = Machine(
        gpu=Gpu(),
        kernels=FakeKernels(),
        timed=[],
        slid=[],
        quantized=[],
        widths=[],
        dropped=0,
        pick=0,
    )
    monkeypatch.setattr(hopper, "kernels_of", lambda index: {0: made.kernels}[index])

    def slide(self: GpuWeight, rows: int, pitch: int, stream: int) -> Memory:
        made.slid.append((rows, pitch, stream))
        return Memory(1)

    def drop(self: GpuWeight) -> None:
        made.dropped += 1

    def quantizer(self: HopperPrepared, kind: Any, stream: int) -> Any:
        assert (kind.name, stream) == ("bfloat16", STREAM)
        return lambda *arguments: made.quantized.append(arguments)

    def recorded(made_for: Any, products: Any, tokens: int, width: int, stream: int) -> Any:
        made.widths.append(width)
        return trial.trial(made_for, products, tokens, width, stream)

    def launch_times(runs: Any, stream: int, *, before: Any = None) -> dict[int, float]:
        start = len(made.kernels.cuda.launches)
        for run in runs:
            run(stream)
        done = len(made.gpu.done)
        if before is not None:
            before(stream)
        made.timed.append(
            {
                "stream": stream,
                "launches": made.kernels.cuda.launches[start:],
                "emptied": made.gpu.done[done:],
                "held": len(Memory.held),
            }
        )
        return {index: 2.0 - (index == made.pick) for index in range(len(runs))}

    monkeypatch.setattr(GpuWeight, "slide", slide)
    monkeypatch.setattr(GpuWeight, "drop_values", drop)
    monkeypatch.setattr(HopperPrepared, "quantizer", quantizer)
    monkeypatch.setattr(hopper, "launch_times", launch_times)
    monkeypatch.setattr(hopper, "trial", recorded)
    monkeypatch.setattr(trial, "cold_cache", cold_cache)
    monkeypatch.setattr(cold, "COLD_BYTES", 0)  # as if weights were large ones
    monkeypatch.setattr(Memory, "held", set())
    return made


def prepared(
    machine: Machine, n: int = N, k: int = K, dtype: str = "int8", pattern: str = "6:8"
) -> HopperPrepared:
    device: Any = machine.gpu
    weight = GpuWeight(device, (n, k), ss.Pattern.parse(pattern), operand(dtype), None, STREAM)
    if operand(dtype).scaled:
        scales: Any = Memory(4 * n)
        weight._scales = scales
    driver = machine.kernels.cuda
    layout, driver.layout = driver.layout, HOPPER_PACK_ARGUMENTS
    try:
        return HopperPrepared(weight, OPTIONS, STREAM)
    finally:
        driver.layout = layout


def cut_of(config: HopperConfig, made: HopperPrepared, tokens: int) -> Tiling:
    return tiling(config, made.weight.n, made._slid_bytes, tokens, made.device.sm_count)


@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_for_one_compute_capability_and_every_format(dtype: str) -> None:
    gpu: Any = Gpu()
    problem = Problem(N, K, ss.Pattern.parse("6:8"), operand(dtype))
    assert HopperBackend().supports_on(problem, gpu).ok
    for capability, found in (((8, 9), "8.9"), ((10, 0), "10.0"), ((9, 1), "9.1")):
        gpu.capability = capability
        support = HopperBackend().supports_on(problem, gpu)
        assert not support.ok
        assert support.why_not == (
            f"its kernel is for compute capability 9.0 alone, a stand-in has {found}"
        )


@pytest.mark.parametrize(
    ("dtype", "pattern", "row_length", "slid_bytes"),
    [
        ("int8", "2:4", 4224, 4352),  # K' = 4100
        ("int8", "6:8", 6272, 6400),  # 6156
        ("fp8_e4m3", "4:6", 5504, 5632),  # 5472
        ("bf16", "6:8", 6208, 12_544),
        ("fp16", "2:4", 4160, 8448),
    ],
)
def test_the_weight_is_slid_and_packed(
    machine: Machine, dtype: str, pattern: str, row_length: int, slid_bytes: int
) -> None:
    made = prepared(machine, dtype=dtype, pattern=pattern)
    size = operand(dtype).bits // 8
    assert made.row_length == row_length
    assert row_length * size % 128 == 0  # each box of the copy engine is one line of L2 a token
    assert machine.slid == [(1024, slid_bytes // size, STREAM)]
    pack = machine.kernels.cuda.launches[0]
    assert pack["stream"] == STREAM
    assert pack["values"][1:] == [
        slid_bytes,
        made.packed.pointer,
        2 * 8 * slid_bytes // 128,
        slid_bytes // 128,
    ]
    assert machine.gpu.done[-1] == ("synchronize", STREAM)
    assert machine.dropped == 1
    assert made.operand_bytes == packed_bytes(1024, slid_bytes, size)
    assert made.padded_n == N
    scales = 4 * N if operand(dtype).scaled else 0
    assert made.nbytes == made.operand_bytes + scales
    assert Memory.held == {made.packed.pointer} | ({made.weight.scales} - {0})
    made.close()
    assert Memory.held == set()


def test_packing_that_fails_gives_its_memory_back(machine: Machine) -> None:
    machine.kernels.cuda.status = 719
    with pytest.raises(LibraryError, match="cuLaunchKernel returned 719"):
        prepared(machine, dtype="bf16")
    assert Memory.held == set()
    assert machine.dropped == 0


def test_a_choice_is_timed_once_for_a_device_shape_format_and_bucket(machine: Machine) -> None:
    float32, bfloat16 = array_type("float32"), array_type("bfloat16")
    first, twin = prepared(machine), prepared(machine)
    for made in (first, twin, first):
        for tokens in (769, 900, 1024):
            made.make_product(tokens, bfloat16, STREAM)
    assert len(machine.timed) == 1
    others = [
        (first, 768, bfloat16),
        (first, 1025, bfloat16),
        (first, 1024, float32),
        (prepared(machine, n=N + 1), 1024, bfloat16),
        (prepared(machine, k=K + 400), 1024, bfloat16),
        (prepared(machine, pattern="2:4", k=6156), 1024, bfloat16),  # as many bytes as 6:8's
        (prepared(machine, dtype="fp8_e4m3"), 1024, bfloat16),
    ]
    for count, (made, tokens, kind) in enumerate(others):
        made.make_product(tokens, kind, STREAM)
        assert len(machine.timed) == count + 2
        made.make_product(tokens, kind, STREAM)
        assert len(machine.timed) == count + 2
    assert len(machine.gpu.choices) == len(machine.timed)
    # Another device has its own choices.
    machine.gpu = Gpu()
    prepared(machine).make_product(1024, bfloat16, STREAM)
    assert len(machine.timed) == len(others) + 2


@pytest.mark.parametrize("pick", [0, 1, 2])
def test_the_fastest_is_what_runs(machine: Machine, pick: int) -> None:
    machine.pick = pick
    made = prepared(machine)
    product = made.make_product(200, array_type("bfloat16"), STREAM)
    wanted = configurations(N, made._slid_bytes, 256, 132)[pick]
    (kept,) = machine.gpu.choices.values()
    assert min(kept, key=lambda timed: timed[1])[0] == wanted
    cut = cut_of(wanted, made, 200)
    assert product.scratch_bytes == cut.partial_bytes
    assert product.how == wanted.name
    product.launch(0x1000, 0x2000, 0x3000, N, 0x4000, 0x5000, 99)
    launch = machine.kernels.cuda.launches[-1]
    assert launch["stream"] == 99
    assert launch["values"][:8] == [
        made.packed.pointer,
        0x2000,
        made.weight.scales,
        0,
        0x3000,
        N,
        0x4000,
        0x5000,
    ]
    assert launch["values"][8:10] == [200, N]
    assert launch["values"][12:14] == [cut.weight_tiles, cut.token_tiles]


@pytest.mark.parametrize("dtype", DTYPES)
def test_formats_without_scales_get_none(machine: Machine, dtype: str) -> None:
    made = prepared(machine, dtype=dtype)
    product = made.make_product(5, array_type("float32"), STREAM)
    product.launch(0x1000, 0x2000, 0x3000, N, 0x4000, 0x5000, STREAM)
    _, token_scales, channel_scales, *_ = machine.kernels.cuda.launches[-1]["values"]
    scaled = operand(dtype).scaled
    assert token_scales == (0x2000 if scaled else 0)
    assert channel_scales == made.weight.scales
    assert bool(channel_scales) == scaled


@pytest.mark.parametrize(
    ("tokens", "bucket", "few"),
    [
        *((1, 16, True), (16, 16, True), (17, 32, True), (512, 512, True)),
        *((513, 768, False), (16_384, 16_384, False), (70_000, 32_768, False)),
    ],
)
def test_what_is_timed(machine: Machine, tokens: int, bucket: int, few: bool) -> None:
    """Every promising configuration, for the bucket.

    Where tokens are few, each behind the quantize kernel, and with a cold cache.
    """
    made = prepared(machine)
    held = len(Memory.held)
    made.make_product(tokens, array_type("bfloat16"), STREAM)
    (timed,) = machine.timed
    promising = configurations(N, made._slid_bytes, bucket, 132)
    # All are compiled before the first is loaded.
    ((ahead, loaded),) = machine.kernels.ahead
    used = {spec for spec, _ in machine.kernels.loaded[loaded:]}
    assert used <= ahead == {spec_of(config, "int8", "bfloat16") for config in promising}
    assert timed["stream"] == STREAM
    assert timed["emptied"] == ([("emptied", STREAM)] if few else [])
    assert len(machine.quantized) == (len(promising) if few else 0)
    assert len(timed["launches"]) == len(promising)
    places = set()
    for launch, config in zip(timed["launches"], promising, strict=True):
        assert launch["shared"] == config.shared_bytes <= HOPPER_SHARED_BYTES
        assert launch["values"][5] == N
        assert launch["values"][8:10] == [bucket, N]
        splits, ranges = launch["values"][-4:-2]
        assert (splits > 1 or ranges > 0) == (config.split or config.cluster > 0)
        clusters = [size for kind, size in launch["attributes"] if kind == 4]
        assert clusters == ([config.cluster] if config.cluster else [])
        assert (ranges > 0) == config.even
        places.add((launch["values"][0], *launch["values"][4:8:3]))
    # One result and one row of counters for all, and nothing kept afterwards.
    assert len(places) == 1
    assert machine.widths == [2]
    assert timed["held"] == held + 5 + 2 * few  # inputs, and what empties the cache
    assert len(Memory.held) == held
    ones, zeros = (done[2] for done in machine.gpu.done if done[0] == "upload")
    assert ones.tolist() == [1.0] * bucket
    assert not zeros.any()
    assert zeros.size >= max(cut_of(config, made, bucket).counters for config in promising)
    for _, stride, x, token_scales, *others, x_scale in machine.quantized:
        multiplied = {launch["values"][1] for launch in timed["launches"]}
        assert {token_scales} == multiplied
        assert (stride, others, x_scale) == (K, [bucket, bucket, STREAM], 0)
        assert x != token_scales


def test_between_buckets_rounds_of_tiles_decide(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At 4096 tokens high tiles are faster; at 3400 they need as many rounds as lower ones."""
    n = 16_384
    made = prepared(machine, n=n)
    high, lower = HopperConfig(208, 2), HopperConfig(192, 2)

    def launch_times(runs: Any, stream: int, *, before: Any = None) -> dict[int, float]:
        found = configurations(n, made._slid_bytes, 4096, 132)
        return {found.index(high): 1.0, found.index(lower): 1.01}

    monkeypatch.setattr(hopper, "launch_times", launch_times)
    bfloat16 = array_type("bfloat16")
    rounds = {
        config: [-(-cut_of(config, made, tokens).tiles // 132) for tokens in (4096, 3400)]
        for config in (high, lower)
    }
    assert rounds == {high: [10, 9], lower: [11, 9]}
    assert made.make_product(4096, bfloat16, STREAM).how == high.name
    assert made.make_product(3400, bfloat16, STREAM).how == lower.name
    # In a bucket that waits for the weights nothing is scaled.
    monkeypatch.setattr(hopper, "BUCKET_TOKENS", 4096)
    assert made.make_product(3400, bfloat16, STREAM).how == high.name


def test_weights_of_models_that_stay_in_the_cache_are_timed_there(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(machine)
    for least, empties in ((N * K, True), (N * K + 1, False)):  # int8
        monkeypatch.setattr(cold, "COLD_BYTES", least)
        machine.gpu.choices.clear()
        made.make_product(1, array_type("bfloat16"), STREAM)
        assert bool(machine.timed[-1]["emptied"]) == empties
    # What a bucket's time alone decides is what may be cold.
    assert hopper.BUCKET_TOKENS >= cold.COLD_TOKENS


def test_kernels_of_many_buckets_are_compiled_together(machine: Machine) -> None:
    made, bfloat16 = prepared(machine), array_type("bfloat16")
    made.make_product(1000, bfloat16, STREAM)
    made.compile_ahead([3000, 1, 7, 1024, 700], bfloat16)
    wanted = {
        spec_of(config, "int8", "bfloat16")
        for bucket in (16, 768, 3072)  # and not 1024, which has been timed
        for config in configurations(N, made._slid_bytes, bucket, 132)
    }
    assert machine.kernels.ahead[-1][0] == wanted
    made.compile_ahead([1000], array_type("float32"))
    assert {spec.title for spec in machine.kernels.ahead[-1][0]} == {
        spec_of(config, "int8", "float32").title
        for config in configurations(N, made._slid_bytes, 1024, 132)
    }
    assert len(machine.timed) == 1


def test_one_promising_configuration_is_not_timed(machine: Machine) -> None:
    made = prepared(machine, n=64, k=100, pattern="2:4")
    made.make_product(16, array_type("bfloat16"), STREAM)
    assert machine.timed == []
    assert len(machine.gpu.choices) == 1


def test_memory_for_timing_is_given_back_where_timing_fails(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(machine)
    held = set(Memory.held)

    def refuse(*arguments: Any, **options: Any) -> dict[int, float]:
        raise LibraryError("no")

    monkeypatch.setattr(hopper, "launch_times", refuse)
    with pytest.raises(LibraryError, match="no"):
        made.make_product(16, array_type("bfloat16"), STREAM)
    assert Memory.held == held
    assert machine.gpu.choices == {}


def test_where_there_is_no_memory_for_timing_the_run_goes_on(
    machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = prepared(machine)

    def exhausted(*arguments: Any, **options: Any) -> dict[int, float]:
        raise DeviceMemoryError("no bytes left")

    monkeypatch.setattr(hopper, "launch_times", exhausted)
    product = made.make_product(1024, array_type("bfloat16"), STREAM)
    first = configurations(N, made._slid_bytes, 1024, machine.gpu.sm_count)[0]
    assert product._gemm.tiling == cut_of(first, made, 1024)
    assert not product.chosen
    assert machine.gpu.choices == {}  # timed the next time


@pytest.mark.parametrize("out_type", OUT_TYPES)
def test_it_writes_every_result_itself(machine: Machine, out_type: str) -> None:
    made = prepared(machine)
    kind = array_type(out_type)
    assert made.always_direct
    for out, stride in ((0x1000, N), (0x1001, N + 1), (0x1002, -N)):
        assert made.can_write(kind, out, stride, 1)
    product = made.make_product(40, kind, STREAM)
    assert product.direct
    layout = made.layout(product, 40)
    assert layout.padded_tokens == 40
    assert layout.sums == layout.scratch  # no sums
    assert layout.nbytes == layout.scratch + product.scratch_bytes


@pytest.mark.parametrize("tokens", [1, 40, 200, 300])
def test_there_is_memory_for_the_rows_that_are_read_after_the_tokens(
    machine: Machine, tokens: int
) -> None:
    """Whole tiles are read; scales begin behind them."""
    made = prepared(machine)
    product = made.make_product(tokens, array_type("bfloat16"), STREAM)
    rows = product._gemm.tiling.token_tiles * product._gemm.config.tokens
    assert product.rows_read == rows >= tokens
    row_bytes = made.row_length * made.weight.operand.bits // 8
    assert made.layout(product, tokens).scales >= rows * row_bytes


def test_the_backend_packs_what_it_is_given(machine: Machine) -> None:
    device: Any = machine.gpu
    machine.kernels.cuda.layout = HOPPER_PACK_ARGUMENTS
    weight = GpuWeight(device, (N, K), ss.Pattern.parse("6:8"), operand("bf16"), None, STREAM)
    made = HopperBackend().pack(weight, OPTIONS, STREAM)
    assert isinstance(made, HopperPrepared)
    assert made.lift == ss.Pattern.parse("6:8")
    assert made.weight is weight
    assert HopperBackend().name == "hopper"
