"""``slidesparse bench quantize``: the kernels before and after the product, against a plain copy.

Both kernels do little arithmetic, so the yardstick is a device-to-device copy of as many bytes in
all (read plus written), measured in turns with the kernel in the same run.  Bytes are the least
that has to move: x once, the operands once (padding included), the scales once.

Every replay goes through several sets of buffers, together several times the level-2 cache, so that
nothing is found there from the round before; only where a set is so small that 64 of them do not
fill it is the cache part of the figure ("sets_bytes" against "l2_bytes").
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..arrays import NDArray
from ..dtypes import array_type, operand
from ..errors import OptionError
from ..packing.quantize import quantize_tokens
from ..packing.slide import lift_rows
from ..pattern import Pattern
from .checks import check_bits, check_poison, sample
from .clocks import Clocks
from .record import FAILURES, Budget, Record, reason_of
from .timing import Gpu, Memory, burst

__all__ = [
    "FULL",
    "LIBRARIES",
    "DequantizeCase",
    "LiftCase",
    "QuantizeSettings",
    "full_tokens",
    "run_quantize",
]

LIBRARIES = ("nvrtc",)
#: Elements of x (or of the result) from which a launch counts as large.
FULL_ELEMENTS = 1 << 26
#: How the command line spells "as many tokens as make that".
FULL = "full"
#: Buffers rotate through this many times the level-2 cache, in at most so many sets.
_CACHES, _MOST_SETS = 6, 64
#: Bytes that the size of a copy is a multiple of.
_COPY_UNIT = 1 << 16
_ROWS_CHECKED = 8
#: What the sparse backend rounds a row of operands up to, and tokens, in bytes and in rows.
_ROW_BYTES, _TOKEN_MULTIPLE = 32, 16


def full_tokens(columns: int) -> int:
    """Tokens, a multiple of 256, that make at least 64 M elements."""
    return -(-FULL_ELEMENTS // columns // 256) * 256


@dataclass(frozen=True, slots=True)
class LiftCase:
    """Quantize and lift x (m, k): int8 and fp8_e4m3 quantize, bf16 and fp16 only lift."""

    m: int
    k: int
    x: str
    out: str
    pattern: str

    @property
    def name(self) -> str:
        """For people."""
        kernel = "quantize+lift" if operand(self.out).scaled else "lift"
        return f"{kernel} {self.x} -> {self.out} {self.pattern} K={self.k} M={self.m}"

    @property
    def row_length(self) -> int:
        """Elements of one output row, as the sparse backend wants them."""
        unit = _ROW_BYTES * 8 // operand(self.out).bits
        return -(-Pattern.parse(self.pattern).slid_k(self.k) // unit) * unit

    @property
    def padded_rows(self) -> int:
        """Output rows."""
        return -(-self.m // _TOKEN_MULTIPLE) * _TOKEN_MULTIPLE

    @property
    def read(self) -> int:
        """Bytes that have to be read."""
        return self.m * self.k * array_type(self.x).bits // 8

    @property
    def written(self) -> int:
        """Bytes that have to be written."""
        row = operand(self.out)
        values = self.padded_rows * self.row_length * row.bits // 8
        return values + (self.m * 4 if row.scaled else 0)

    def describe(self) -> dict[str, Any]:
        """The case in a result's row."""
        return {
            "kernel": "quantize_lift" if operand(self.out).scaled else "lift",
            "m": self.m,
            "columns": self.k,
            "x": self.x,
            "out": self.out,
            "pattern": self.pattern,
            "row_length": self.row_length,
        }


@dataclass(frozen=True, slots=True)
class DequantizeCase:
    """Scale sums (m, n) to bf16 with token scales, channel scales and a bias."""

    m: int
    n: int
    sums: str
    out: str = "bfloat16"

    @property
    def name(self) -> str:
        """For people."""
        return f"dequantize+bias {self.sums} -> {self.out} N={self.n} M={self.m}"

    @property
    def read(self) -> int:
        """Bytes that have to be read."""
        return self.m * self.n * 4 + self.m * 4 + self.n * 8

    @property
    def written(self) -> int:
        """Bytes that have to be written."""
        return self.m * self.n * array_type(self.out).bits // 8

    def describe(self) -> dict[str, Any]:
        """The case in a result's row."""
        return {
            "kernel": "dequantize",
            "m": self.m,
            "columns": self.n,
            "x": self.sums,
            "out": self.out,
            "pattern": None,
        }


Case = LiftCase | DequantizeCase


@dataclass(frozen=True, kw_only=True, slots=True)
class QuantizeSettings:
    """What to measure.

    Attributes
    ----------
    columns:
        Row lengths K of quantize+lift; those after the second only for bf16 with the first pattern.
    outputs:
        Row lengths N of dequantize.
    x_types, targets, patterns:
        Types of x; operand formats; patterns.  bf16 and fp16 are lifted from their own type alone.
    tokens:
        Numbers of tokens, or "full"; empty: "full" for everything, and several for the cases that
        a server has most, bf16 with the first pattern.
    rounds:
        Rounds.
    """

    columns: tuple[int, ...] = (3584, 18944, 4096, 14336)
    outputs: tuple[int, ...] = (3584, 4608, 37888)
    x_types: tuple[str, ...] = ("bfloat16", "float16", "float32")
    targets: tuple[str, ...] = ("int8", "fp8_e4m3", "bf16")
    patterns: tuple[str, ...] = ("6:8", "4:6", "2:4", "8:10")
    tokens: tuple[int | str, ...] = ()
    rounds: int = 20

    def __post_init__(self) -> None:
        for kind in self.x_types:
            array_type(kind)
        for target in self.targets:
            operand(target)
        for pattern in self.patterns:
            Pattern.parse(pattern)
        counts = [count for count in self.tokens if count != FULL]
        if any(not isinstance(count, int) or count < 1 for count in counts):
            raise OptionError(f"tokens is {list(self.tokens)}; allowed are numbers and {FULL!r}")
        if min((*self.columns, *self.outputs), default=1) < 1 or self.rounds < 1:
            raise OptionError("row lengths and rounds must be at least 1")

    def to_json(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return {
            "columns": list(self.columns),
            "outputs": list(self.outputs),
            "x_types": list(self.x_types),
            "targets": list(self.targets),
            "patterns": list(self.patterns),
            "tokens": list(self.tokens),
            "rounds": self.rounds,
            "data": "normal",
            "bytes": "x once, operands with padding once, scales once; a copy moves half of them",
        }

    def cases(self) -> list[Case]:
        """Everything to measure, the most telling first."""
        lifts = [
            (x, target, pattern, k)
            for x in self.x_types
            for pattern in self.patterns
            for k in self.columns
            for target in self.targets
            if operand(target).scaled or operand(target).dtype == array_type(x).dtype
        ]
        found: list[Case] = []
        for x, target, pattern, k in lifts:
            if x == self.x_types[0] and pattern == self.patterns[0]:
                found += [LiftCase(m, k, x, target, pattern) for m in self._tokens(k, True)]
        for n in self.outputs:
            for sums in ("int32", "float32"):
                found += [DequantizeCase(m, n, sums) for m in self._tokens(n, True)]
        for x, target, pattern, k in lifts:
            if k in self.columns[:2]:
                found += [LiftCase(m, k, x, target, pattern) for m in self._tokens(k, False)]
        return list(dict.fromkeys(found))

    def _tokens(self, columns: int, many: bool) -> list[int]:
        wanted = self.tokens or ((FULL, 16384, 1024, 64) if many else (FULL,))
        return [full_tokens(columns) if count == FULL else int(count) for count in wanted]


# --- kernels --------------------------------------------------------------------------------------


class Kernels(Protocol):
    """Makes the kernels that are measured."""

    def lift(self, case: LiftCase) -> Callable[[int, int, int, int], None]:
        """(x, q, scales, stream) -> launched; addresses."""
        ...

    def dequantize(self, case: DequantizeCase) -> Callable[[int, int, int, int, int, int], None]:
        """(sums, out, token scales, channel scales, bias, stream) -> launched; addresses."""
        ...


class GpuKernels:
    """The kernels of :mod:`slidesparse_rt.kernels.launch`."""

    def __init__(self, gpu: Gpu) -> None:
        self._device = gpu.device

    def lift(self, case: LiftCase) -> Callable[[int, int, int, int], None]:
        """See :class:`Kernels`."""
        from ..kernels.launch import quantizer

        pattern = Pattern.parse(case.pattern)
        kernel = quantizer(
            self._device, array_type(case.x), operand(case.out), pattern, case.k, case.row_length
        )

        def launch(x: int, q: int, scales: int, stream: int) -> None:
            kernel(x, case.k, q, scales, case.m, case.padded_rows, stream)

        return launch

    def dequantize(self, case: DequantizeCase) -> Callable[[int, int, int, int, int, int], None]:
        """See :class:`Kernels`."""
        from ..kernels.launch import dequantizer

        kernel = dequantizer(self._device, case.sums, array_type(case.out), case.n)

        def launch(
            sums: int, out: int, token_scales: int, channel_scales: int, bias: int, stream: int
        ) -> None:
            kernel(sums, case.n, out, case.n, token_scales, channel_scales, bias, case.m, stream)

        return launch


# --- the benchmark --------------------------------------------------------------------------------


def run_quantize(
    gpu: Gpu,
    settings: QuantizeSettings,
    record: Record,
    *,
    budget: Budget,
    clocks: Clocks,
    say: Callable[[str], None],
    done: Callable[[], None],
    kernels: Kernels | None = None,
) -> None:
    """Measure every case; arguments as of :func:`~slidesparse_rt.bench.gemm.run_gemm`."""
    made = GpuKernels(gpu) if kernels is None else kernels
    for case in settings.cases():
        if budget.spent:
            record.leave_out(case.name, "time budget", "no time left")
            done()
            continue
        try:
            row = _measure(gpu, case, made, settings.rounds, clocks)
        except FAILURES as error:
            reason, why = reason_of(error)
            record.leave_out(case.name, reason, why)
            say(f"{case.name}: not reported, {reason}: {why}")
        else:
            record.add(row)
            say(
                f"{case.name}: {row['us']:.1f} us, {row['tb_per_s']:.2f} TB/s, "
                f"{100 * row['of_copy']:.0f} % of a copy ({row['copy_tb_per_s']:.2f} TB/s)"
            )
        record.save()
        done()
    record.finish()


def _measure(gpu: Gpu, case: Case, kernels: Kernels, rounds: int, clocks: Clocks) -> dict[str, Any]:
    """Check and time one case."""
    total = case.read + case.written
    sets = int(min(_MOST_SETS, max(2, -(-_CACHES * gpu.l2_bytes // total))))
    # Copies of odd sizes are slow (2.7 instead of 4.1 TB/s on an H200): the yardstick gets whole
    # units, and its rate is that of the bytes it moves.
    half = max(_COPY_UNIT, total // 2 // _COPY_UNIT * _COPY_UNIT)
    with ExitStack() as held:

        def hold(memory: Memory) -> Memory:
            held.callback(memory.close)
            return memory

        if isinstance(case, LiftCase):
            works = _lifts(gpu, case, kernels, sets, hold)
        else:
            works = _dequantizes(gpu, case, kernels, sets, hold)
        launches = list(works)
        copies = [
            (hold(gpu.random(half, "bfloat16")).pointer, hold(gpu.allocate(half)).pointer)
            for _ in range(sets)
        ]

        def run() -> None:
            for launch in launches:
                launch()

        def copy() -> None:
            for source, target in copies:
                gpu.copy(target, source, half)

        times = burst(
            gpu,
            {"kernel": gpu.capture(run), "copy": gpu.capture(copy)},
            rounds=rounds,
            clocks=clocks,
        )
    us, copy_us = times["kernel"].us / sets, times["copy"].us / sets
    rate, copy_rate = total / us / 1e6, 2 * half / copy_us / 1e6
    return case.describe() | {
        "bytes": {"read": case.read, "written": case.written},
        "us": us,
        "tb_per_s": rate,
        "copy_us": copy_us,
        "copy_tb_per_s": copy_rate,
        "of_copy": rate / copy_rate,
        "sets": sets,
        "sets_bytes": sets * total,
        "times": {name: row.to_json() for name, row in times.items()},
    }


def _lifts(
    gpu: Gpu, case: LiftCase, kernels: Kernels, sets: int, hold: Callable[[Memory], Memory]
) -> Iterator[Callable[[], None]]:
    """One launch for each set of buffers, the first one checked."""
    launch, row = kernels.lift(case), operand(case.out)
    q_bytes = case.padded_rows * case.row_length * row.bits // 8
    for index in range(sets):
        x = hold(gpu.random(case.read, case.x)).pointer
        q = hold(gpu.allocate(q_bytes)).pointer
        scales = hold(gpu.allocate(case.padded_rows * 4)).pointer
        if index == 0:
            gpu.poison(q, q_bytes)
            gpu.poison(scales, case.padded_rows * 4)
            launch(x, q, scales, gpu.stream)
            _check_lift(gpu, case, x, q, scales)
        yield _bound(launch, x, q, scales, gpu.stream)


def _check_lift(gpu: Gpu, case: LiftCase, x: int, q: int, scales: int) -> None:
    row, kind = operand(case.out), array_type(case.x)
    pattern = Pattern.parse(case.pattern)
    width, bits = case.row_length, row.bits // 8
    tokens = sample(case.m, _ROWS_CHECKED)
    pitch = case.k * kind.bits // 8
    rows = np.stack([gpu.read(x + token * pitch, kind.dtype, case.k) for token in tokens])
    values, wanted_scales = quantize_tokens(rows, row)
    wanted = np.zeros((len(tokens), width), row.dtype)
    wanted[:, : pattern.slid_k(case.k)] = lift_rows(values, pattern)
    found = _rows(gpu, q, tokens, width * bits, row.dtype, width)
    check_bits(found, wanted, f"{case.name}, rows {tokens}")
    if wanted_scales is not None:
        found = np.concatenate([gpu.read(scales + 4 * t, np.float32, 1) for t in tokens])
        check_bits(found, wanted_scales, f"{case.name}, scales of rows {tokens}")
    if case.padded_rows > case.m:
        tail = _rows(gpu, q, [case.padded_rows - 1], width * bits, row.dtype, width)
        check_bits(tail, np.zeros_like(tail), f"{case.name}, the last row of padding")


def _dequantizes(
    gpu: Gpu, case: DequantizeCase, kernels: Kernels, sets: int, hold: Callable[[Memory], Memory]
) -> Iterator[Callable[[], None]]:
    """One launch for each set of buffers, the first one checked."""
    launch = kernels.dequantize(case)
    token_scales = hold(gpu.random(case.m * 4, "scales")).pointer
    channel_scales = hold(gpu.random(case.n * 4, "scales")).pointer
    bias = hold(gpu.random(case.n * 4, "float32")).pointer
    for index in range(sets):
        sums = hold(gpu.random(case.m * case.n * 4, f"{case.sums} sums")).pointer
        out = hold(gpu.allocate(case.written)).pointer
        if index == 0:
            gpu.poison(out, case.written)
            launch(sums, out, token_scales, channel_scales, bias, gpu.stream)
            _check_dequantize(gpu, case, sums, out, token_scales, channel_scales, bias)
        yield _bound(launch, sums, out, token_scales, channel_scales, bias, gpu.stream)


def _check_dequantize(
    gpu: Gpu, case: DequantizeCase, sums: int, out: int, by_token: int, by_channel: int, bias: int
) -> None:
    kind = array_type(case.out)
    tokens = sample(case.m, _ROWS_CHECKED)
    y = _rows(gpu, sums, tokens, case.n * 4, np.dtype(case.sums), case.n).astype(np.float32)
    y *= np.concatenate([gpu.read(by_token + 4 * t, np.float32, 1) for t in tokens])[:, None]
    y *= gpu.read(by_channel, np.float32, case.n)[None, :]
    y += gpu.read(bias, np.float32, case.n)[None, :]
    found = _rows(gpu, out, tokens, case.n * kind.bits // 8, kind.dtype, case.n)
    for row in found:
        check_poison(row, case.name)
    check_bits(found, y.astype(kind.dtype), f"{case.name}, rows {tokens}")


def _rows(
    gpu: Gpu, pointer: int, rows: Sequence[int], pitch: int, dtype: Any, count: int
) -> NDArray:
    return np.stack([gpu.read(pointer + row * pitch, dtype, count) for row in rows])


def _bound(launch: Callable[..., None], *arguments: int) -> Callable[[], None]:
    return lambda: launch(*arguments)
