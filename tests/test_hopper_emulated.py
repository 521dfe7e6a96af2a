"""The Hopper GEMM's own source on the CPU, every tile and every way of sharing K', to the bit.

tests/emulator has its barriers, copy engine and products.  Each does its work as early or as late
as hardware may, so that a buffer that is given free too soon, or read too soon, shows.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from emulate import COMPILER, EmulatedMachine, Memory
from hopper_cases import DTYPES, OUT_TYPES, share_always, shipped
from kernel_checks import POISON

from slidesparse_rt.dtypes import array_type, operand
from slidesparse_rt.kernels import hopper_tiles
from slidesparse_rt.kernels.hopper import HopperGemm
from slidesparse_rt.kernels.hopper_layout import pack
from slidesparse_rt.kernels.hopper_tiles import HOPPER_SHARED_BYTES, HopperConfig, tiling

pytestmark = pytest.mark.skipif(COMPILER is None, reason="there is no C++ compiler")


@pytest.fixture(autouse=True)
def _sharing(monkeypatch: pytest.MonkeyPatch) -> None:
    share_always(monkeypatch)


#: Few multiprocessors, so that each works on several tiles.
SM_COUNT = 3


def sparse(rng: np.random.Generator, rows: int, columns: int) -> np.ndarray:
    """A 2:4 matrix of whole numbers from -3 to 3, whose sums every format holds."""
    values = rng.integers(-3, 4, (rows, columns // 4, 4))
    drop = np.argsort(rng.random(values.shape), axis=2)[:, :, :2]
    np.put_along_axis(values, drop, 0, axis=2)
    return values.reshape(rows, columns)


def filled(values: np.ndarray) -> Memory:
    memory = Memory(values.nbytes)
    memory.write(values)
    return memory


class Product:
    """Operands of a product in emulated memory, and what it must give."""

    def __init__(
        self, rng: np.random.Generator, dtype: str, n: int, row_bytes: int, m: int, *, bias: bool
    ) -> None:
        kind = operand(dtype).dtype
        self.dtype, self.n, self.m, self.row_bytes = dtype, n, m, row_bytes
        columns, self.slid_bytes = row_bytes // kind.itemsize, -(-row_bytes // 256) * 256
        slid = np.zeros((-(-n // 128) * 128, self.slid_bytes // kind.itemsize), np.int64)
        slid[:n, :columns] = sparse(rng, n, columns)
        x = rng.integers(-3, 4, (m, columns))
        vectors = [rng.random(m) + 0.5, rng.random(n) + 0.5, rng.standard_normal(n)]
        s_m, s_n, b = (vector.astype(np.float32) for vector in vectors)
        y = (x @ slid[:n, :columns].T).astype(np.float32)
        scaled = operand(dtype).scaled
        if scaled:
            y = (y * s_m[:, None]) * s_n
        self.exact = y + b if bias else y
        self.operands = [filled(pack(slid.astype(kind))), filled(x.astype(kind))]
        given = [(s_m, scaled), (s_n, scaled), (b, bias)]
        self._vectors = [filled(vector) if used else None for vector, used in given]

    @property
    def addresses(self) -> list[int]:
        """Of the packed weight, the tokens, both scales and the bias."""
        return [held.address if held else 0 for held in (*self.operands, *self._vectors)]


def check_product(
    machine: EmulatedMachine,
    product: Product,
    config: HopperConfig,
    out_type: str,
    stride: int,
    offset: int = 0,
) -> None:
    """Launch twice: right to the bit, nothing else written, counters zero."""
    kind: Any = array_type(out_type).dtype
    n, m, size = product.n, product.m, kind.itemsize
    gemm = HopperGemm(
        machine.kernels,
        product.dtype,
        out_type,
        n,
        product.slid_bytes,
        product.row_bytes,
        m,
        config,
    )
    start = max(0, -stride) * (m - 1)
    out = Memory(((m - 1) * abs(stride) + n) * size, offset * size)
    cut = tiling(config, n, product.slid_bytes, m, machine.kernels.limits.sm_count)
    assert gemm.tiling == cut
    partials, counters = Memory(cut.partial_bytes), filled(np.zeros(cut.counters, np.uint32))
    for _ in range(2):
        out.write(np.full(out.read().size, POISON, np.uint8))
        gemm(
            *product.addresses,
            out.address + start * size,
            stride,
            partials.address,
            counters.address,
            machine.stream,
        )
        found = out.read().view(f"u{size}")
        rows = np.lib.stride_tricks.as_strided(
            found[start:], (m, n), (stride * size, size), writeable=True
        )
        wanted = product.exact.astype(kind).view(rows.dtype)
        wrong = np.argwhere(rows != wanted)
        assert wrong.size == 0, f"{len(wrong)} of {rows.size}, first {wrong[0]}, last {wrong[-1]}"
        rows[:] = int.from_bytes([POISON] * size, "little")
        assert (found.view(np.uint8) == POISON).all(), "written between the rows"
        for memory in (out, partials, counters):
            memory.check()
        assert not counters.read().any()


@pytest.mark.parametrize("number", range(len(shipped())))
def test_every_tile_is_exact(number: int) -> None:
    config = shipped()[number]
    machine = EmulatedMachine(
        shared_bytes=HOPPER_SHARED_BYTES, sm_count=SM_COUNT, backwards=number % 2 == 1
    )
    rng = np.random.default_rng(number)
    dtype, out_type = DTYPES[number % len(DTYPES)], OUT_TYPES[number % len(OUT_TYPES)]
    steps = 7 if config.split else config.least_steps
    least = 256 * steps - 240
    # Two tiles of channels, so that every multiprocessor has more than one tile.
    n = config.rows + 72
    m = 3 * config.tokens // 2 + 3
    check_product(machine, Product(rng, dtype, n, least, m, bias=True), config, out_type, n)
    # Rows in pieces of 8 bytes, or of 4, and one or two tiles for all.
    row_bytes = 256 * (3 * steps) + 16
    product = Product(rng, dtype, 70, row_bytes, 19, bias=False)
    beside = replace(config, tile_group=1)
    for stride, offset in ((72, 0), (76, 4), (71, 1), (-72, 0)):
        check_product(machine, product, beside, out_type, stride, offset)
    assert {spec.entry for spec, *_ in machine.launches} == {"hopper_gemm"}


@pytest.mark.parametrize("uneven", [2, 3, 4])
@pytest.mark.parametrize(
    "config",
    [
        HopperConfig(16, 1, 2, True),
        HopperConfig(16, 1, 4, True, split=True),
        HopperConfig(64, 1, 4, True),
        HopperConfig(32, 2),
        HopperConfig(208, 2),
    ],
    ids=lambda config: config.name,
)
def test_warpgroups_may_be_late(config: HopperConfig, uneven: int) -> None:
    """One sleeps while the others go on to the next tiles, as far as its work lets them.

    K' is longer than all stages, so that each is used again within a tile.
    """
    machine = EmulatedMachine(shared_bytes=HOPPER_SHARED_BYTES, sm_count=1, uneven=uneven)
    product = Product(np.random.default_rng(6), "int8", 300, 8 * 256 + 48, 35, bias=False)
    assert product.slid_bytes // 128 > config.stages
    check_product(machine, product, config, "bfloat16", 300)


@pytest.mark.parametrize("order", [{"uneven": 2}, {"together": 40}], ids=str)
@pytest.mark.parametrize(
    "config",
    [HopperConfig(16, 1, 2, True), HopperConfig(64, 1, 4, True), HopperConfig(64, 2)],
    ids=lambda config: config.name,
)
@pytest.mark.parametrize(
    ("sm_count", "n", "m", "steps", "splits"),
    [
        (16, 70, 5, 64, 16),  # one tile or two, which many blocks share
        (5, 700, 130, 9, 2),  # some tiles are shared, some are whole
        (11, 600, 150, 15, 3),
        (7, 1000, 70, 23, 5),
    ],
)
def test_tiles_that_blocks_share(
    config: HopperConfig,
    sm_count: int,
    n: int,
    m: int,
    steps: int,
    splits: int,
    order: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = replace(config, split=True)
    monkeypatch.setattr(hopper_tiles, "_splits", lambda *_: splits)
    machine = EmulatedMachine(shared_bytes=HOPPER_SHARED_BYTES, sm_count=sm_count, **order)
    product = Product(np.random.default_rng(8), "int8", n, 256 * steps - 32, m, bias=True)
    assert tiling(config, n, product.slid_bytes, m, sm_count).splits == splits
    check_product(machine, product, config, "bfloat16", n)


#: Ways in which blocks and warpgroups may meet: one block after the other in either order, or all
#: at a time, of which those that wait see the others come, or hardly any.
ORDERS = [{"backwards": True}, {"uneven": 2}, {"together": 40}, {"together": 1, "uneven": 3}]


@pytest.mark.parametrize("order", ORDERS, ids=str)
@pytest.mark.parametrize("tokens", [32, 192])
@pytest.mark.parametrize(
    ("sm_count", "n", "m", "steps", "ranges"),
    [
        (16, 70, 5, 64, 16),  # tiles that many blocks share
        (5, 700, 20, 9, 5),  # a part of a tile or none, whole ones, a part or none
        (4, 1000, 20, 4, 4),  # whole tiles only
        (7, 1000, 300, 23, 0),  # tiles of tokens, too, as many as there are multiprocessors or not
        (3, 300, 20, 1, 1),  # hardly any K'
    ],
)
def test_equal_ranges(
    tokens: int, sm_count: int, n: int, m: int, steps: int, ranges: int, order: dict[str, Any]
) -> None:
    """In either order of the blocks: who shares a tile with one that was there before writes it."""
    config = HopperConfig(tokens, 2, split=True, even=True)
    machine = EmulatedMachine(shared_bytes=HOPPER_SHARED_BYTES, sm_count=sm_count, **order)
    product = Product(np.random.default_rng(8), "int8", n, 256 * steps - 32, m, bias=True)
    cut = tiling(config, n, product.slid_bytes, m, sm_count)
    assert cut.ranges == (ranges or sm_count // cut.token_tiles)
    check_product(machine, product, config, "bfloat16", n)


@pytest.mark.parametrize("order", [{}, *ORDERS], ids=str)
@pytest.mark.parametrize(
    ("tokens", "cluster", "sm_count", "n", "m", "steps"),
    [
        (32, 2, 2, 300, 70, 5),  # one cluster for all tiles
        (64, 3, 9, 900, 100, 7),  # clusters with several tiles, and with one more than others
        (128, 5, 10, 300, 10, 5),  # hardly any K'
        (160, 8, 16, 500, 170, 19),  # more blocks than there are slices to add up for some
        (32, 8, 8, 70, 5, 64),
    ],
)
def test_clusters(
    tokens: int, cluster: int, sm_count: int, n: int, m: int, steps: int, order: dict[str, Any]
) -> None:
    config = HopperConfig(tokens, 2, cluster=cluster)
    machine = EmulatedMachine(shared_bytes=HOPPER_SHARED_BYTES, sm_count=sm_count, **order)
    product = Product(np.random.default_rng(8), "int8", n, 256 * steps - 32, m, bias=True)
    check_product(machine, product, config, "bfloat16", n)


@pytest.mark.parametrize("order", [{}, {"backwards": True}], ids=str)
def test_what_one_thread_tells_is_read_before_it_tells_again(order: dict[str, Any]) -> None:
    """Where a warpgroup is late to read it, and the next item is shared in the other way."""
    config = HopperConfig(32, 2, split=True, even=True)
    machine = EmulatedMachine(shared_bytes=HOPPER_SHARED_BYTES, sm_count=5, linger=400, **order)
    product = Product(np.random.default_rng(8), "int8", 700, 256 * 9 - 32, 20, bias=False)
    check_product(machine, product, config, "bfloat16", 700)


@pytest.mark.parametrize("config", [HopperConfig(64, 1, 4, True), HopperConfig(128, 1, 2, True)])
def test_nobody_mistakes_an_earlier_use_of_a_stage_for_the_one_awaited(
    config: HopperConfig,
) -> None:
    """Where K' takes several rounds of stages: with a stage that changes hands this fails."""
    machine = EmulatedMachine(shared_bytes=HOPPER_SHARED_BYTES, sm_count=1, uneven=2)
    product = Product(np.random.default_rng(6), "int8", 70, 24 * 256 + 48, 70, bias=False)
    check_product(machine, product, config, "bfloat16", 70)


@pytest.mark.parametrize("out_type", ["bfloat16", "float32"])
@pytest.mark.parametrize("tokens", [32, 64, 160, 208])
def test_result_buffers_are_not_written_before_they_were_read(tokens: int, out_type: str) -> None:
    """Also where a tile has an odd number of chunks, and many follow each other on short K'."""
    machine = EmulatedMachine(shared_bytes=HOPPER_SHARED_BYTES, sm_count=1)
    product = Product(np.random.default_rng(5), "int8", 264, 16, 2 * tokens + 5, bias=True)
    check_product(machine, product, HopperConfig(tokens, 2), out_type, 264)
