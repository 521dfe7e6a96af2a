"""Measuring on a GPU that has only a clock: what is timed, in which state, and what is left out."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import pytest
from fake_gpu import Memory
from fake_tuning import A_TOKEN, K, Machine, N

import slidesparse_rt as ss
from slidesparse_rt.arrays import Device
from slidesparse_rt.backends import cold
from slidesparse_rt.backends.base import RawWeight
from slidesparse_rt.backends.gpu_forms import GpuForms, pack_forms
from slidesparse_rt.dtypes import operand
from slidesparse_rt.tuning import BUCKETS, Table, measure
from slidesparse_rt.tuning.measure import MeasureOptions
from slidesparse_rt.tuning.table import buckets_up_to, coarse_first

RAW = RawWeight(None, ss.Pattern.parse("6:8"), operand("int8"))
LIMIT = 2 << 30


def packed(made: Machine, **options: Any) -> GpuForms:
    backends, _ = made.able(made.names, None, None)  # type: ignore[arg-type]
    return pack_forms(
        list(backends.values()), RAW, None, Device("cuda"), ss.PlanOptions(), **options
    )


@pytest.fixture
def forms(gpu_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[GpuForms]:
    # As if the weight were a large one.
    monkeypatch.setattr(cold, "COLD_BYTES", 0)
    made = packed(gpu_machine)
    yield made
    made.close()


def times(forms: GpuForms, **settings: Any) -> Table:
    progress = settings.pop("progress", None)
    limit = settings.pop("limit", LIMIT)
    return measure.measure(forms, limit, MeasureOptions(**settings), progress=progress)


def test_every_backend_is_timed_at_every_bucket(gpu_machine: Machine, forms: GpuForms) -> None:
    held = set(Memory.held)
    table = times(forms)
    assert table.tokens == BUCKETS
    assert table.backends == ("hopper", "cusparselt", "dense")
    for tokens, row in table.times.items():
        assert row == pytest.approx(
            {name: gpu_machine.price(name, tokens) for name in row}, rel=1e-9
        )
    assert table.cold_tokens == 512
    assert table.taken
    assert table.refused == {}
    # bf16 in, bf16 out, and nothing is kept.
    assert {row[2:] for row in gpu_machine.stepped} == {("bfloat16", "bfloat16")}
    assert Memory.held == held
    assert table.dispatch().backends == ("dense", "hopper")


def test_the_cache_is_emptied_before_each_run_where_tokens_are_few(
    gpu_machine: Machine, forms: GpuForms
) -> None:
    times(forms, most_tokens=1024, cold_tokens=32, rounds=5)
    ran = [tokens for _, tokens, _, _ in gpu_machine.cuda.events]
    # Buckets 1, 16 and 32; five rounds of three backends each, every one right after a flush.
    flushed = [ran[at] for at in gpu_machine.gpu.flushed]
    assert sorted(flushed) == sorted([1, 16, 32] * 15)
    assert len(set(gpu_machine.gpu.flushed)) == len(gpu_machine.gpu.flushed)
    gpu_machine.gpu.flushed.clear()
    times(forms, most_tokens=16, cold_tokens=0)
    assert gpu_machine.gpu.flushed == []


def test_clocks_recover_where_fewer_tokens_come_after_more(
    gpu_machine: Machine, forms: GpuForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measure, "_RECOVERY_S", 1e-3)
    times(forms, most_tokens=1024, rounds=5)
    events, flushed = gpu_machine.cuda.events, gpu_machine.gpu.flushed
    order = coarse_first(buckets_up_to(1024))
    falls = {m for before, m in pairwise(order) if m < before}
    assert 0 < len(falls) < len(order)
    # Before the first run of any backend at so many tokens, algorithms included.
    first = {m: next(at for at, event in enumerate(events) if event[1] == m) for m in order}
    for m in order[1:]:
        reads = flushed.count(first[m])
        assert reads % measure._READS == 0
        assert (reads > 0) == (m in falls)
    # Nothing to read where every weight stays in the cache.
    flushed.clear()
    times(forms, most_tokens=1024, cold_tokens=0)
    assert flushed == []


def test_weights_of_models_that_stay_in_the_cache_are_timed_there(
    gpu_machine: Machine, forms: GpuForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cold, "COLD_BYTES", N * K + 1)  # int8
    assert times(forms, most_tokens=16).cold_tokens == 512
    assert gpu_machine.gpu.flushed == []
    monkeypatch.setattr(cold, "COLD_BYTES", N * K)
    times(forms, most_tokens=16)
    assert gpu_machine.gpu.flushed != []


def test_short_warm_runs_are_timed_together(
    gpu_machine: Machine, forms: GpuForms, monkeypatch: pytest.MonkeyPatch
) -> None:
    timed: list[dict[str, float]] = []
    real = measure.shuffled_rounds

    def shuffled_rounds(*arguments: Any, **options: Any) -> Any:
        timed.extend(real(*arguments, **options))
        return timed

    monkeypatch.setattr(measure, "shuffled_rounds", shuffled_rounds)
    table = times(forms, most_tokens=1, cold_tokens=0, rounds=3)
    assert len(timed) == 3
    for times_of_round in timed:
        for name, milliseconds in times_of_round.items():
            # At least 100 us, in whole runs.
            assert 0.1 <= milliseconds < 0.2
            runs = 1e3 * milliseconds / gpu_machine.price(name, 1)
            assert runs == pytest.approx(round(runs))
    assert table.times[1] == pytest.approx({name: gpu_machine.price(name, 1) for name in timed[0]})


def test_rounds_follow_the_time_that_they_take(gpu_machine: Machine, forms: GpuForms) -> None:
    times(forms, most_tokens=16)
    assert len(gpu_machine.gpu.flushed) == 2 * 41 * 3
    gpu_machine.gpu.flushed.clear()
    gpu_machine.price = lambda name, tokens: 5_000.0
    times(forms, most_tokens=16)
    assert len(gpu_machine.gpu.flushed) == 2 * 7 * 3


def test_the_gpu_is_warm_before_anything_is_timed(gpu_machine: Machine, forms: GpuForms) -> None:
    times(forms, most_tokens=16, rounds=1)
    first = gpu_machine.cuda.events.index(("hopper", 16, *gpu_machine.cuda.events[0][2:]))
    spent = [gpu_machine.price(name, tokens) for name, tokens, _, _ in gpu_machine.cuda.events]
    assert sum(spent[:first]) >= 50_000
    assert sum(spent[first:]) < 3 * 3_000 + 20 * 132 + 1_000


def test_disturbed_runs_do_not_count_and_the_order_changes(
    gpu_machine: Machine, forms: GpuForms
) -> None:
    calls: list[str] = []

    def noisy(name: str, tokens: int) -> float:
        return 10.0

    gpu_machine.price = noisy
    real = gpu_machine.cuda.enqueue

    def enqueue(work: Any, us: float) -> None:
        if gpu_machine.cuda.capturing is None and us == 10.0:
            calls.append("run")
            us = 1_000.0 if len(calls) % 7 == 0 else us
        real(work, us)

    gpu_machine.cuda.enqueue = enqueue  # type: ignore[method-assign]
    table = times(forms, most_tokens=1, rounds=21)
    assert table.times[1] == pytest.approx({"hopper": 10.0, "cusparselt": 10.0, "dense": 10.0})
    tail = [name for name, *_ in gpu_machine.cuda.events[-63:]]
    rounds = [tuple(tail[i : i + 3]) for i in range(0, 63, 3)]
    assert all(len(set(row)) == 3 for row in rounds)
    assert len(set(rounds)) > 1


def test_long_runs_are_split_as_a_plan_splits_them(gpu_machine: Machine, forms: GpuForms) -> None:
    gpu_machine.most = {"dense": 256}
    table = times(forms, most_tokens=1024)
    assert table.times[1024]["dense"] == pytest.approx(4 * gpu_machine.price("dense", 256))
    assert table.times[1024]["hopper"] == pytest.approx(gpu_machine.price("hopper", 1024))
    x, y = zip(
        *[
            (x, y)
            for name, tokens, x, y in gpu_machine.cuda.events
            if (name, tokens) == ("dense", 256)
        ],
        strict=True,
    )
    assert {b - a for a, b in zip(sorted(set(x)), sorted(set(x))[1:], strict=False)} == {
        256 * K * 2
    }
    assert {b - a for a, b in zip(sorted(set(y)), sorted(set(y))[1:], strict=False)} == {
        256 * N * 2
    }


def test_a_backend_that_breaks_is_out_everywhere(gpu_machine: Machine, forms: GpuForms) -> None:
    gpu_machine.broken = {"cusparselt": 1000}
    table = times(forms)
    assert table.tokens == BUCKETS
    assert table.backends == ("hopper", "dense")
    assert table.refused == {"cusparselt": "it failed: cusparselt broke"}
    assert gpu_machine.cuda.capturing is None
    gpu_machine.broken = dict.fromkeys(gpu_machine.names, 0)
    with pytest.raises(ss.LibraryError, match="broke"):
        times(forms)


def test_kernels_are_compiled_together_before_they_are_measured(
    gpu_machine: Machine, forms: GpuForms
) -> None:
    """Of two numbers of tokens, and then of as many again as are done."""
    gpu_machine.most = {"dense": 300}
    times(forms)
    order, ahead = coarse_first(BUCKETS), iter(gpu_machine.ahead)
    starts = (0, 2, 4, 8, 16)
    for start, end in zip(starts, (*starts[1:], len(order)), strict=True):
        part = order[start:end]
        for name in gpu_machine.names:
            own = {300 if m > 300 else m for m in part} | {m % 300 for m in part if m > 300}
            wanted = sorted((own if name == "dense" else set(part)) - {0})
            assert next(ahead)[:3] == (name, wanted, "bfloat16")
    assert next(ahead, None) is None
    for name, tokens, _, stepped in gpu_machine.ahead:
        before = [row[1] for row in gpu_machine.stepped[:stepped] if row[0] == name]
        assert name == "dense" or not set(tokens) & set(before)


def test_little_is_compiled_where_there_is_no_time_to_measure_it(
    gpu_machine: Machine, forms: GpuForms
) -> None:
    times(forms, seconds=0.0)
    assert [row[:2] for row in gpu_machine.ahead] == [
        (name, [1, 32_768]) for name in gpu_machine.names
    ]


def test_a_backend_that_does_not_compile_is_out(gpu_machine: Machine, forms: GpuForms) -> None:
    gpu_machine.uncompilable = {"cusparselt"}
    table = times(forms, most_tokens=1024)
    assert table.backends == ("hopper", "dense")
    assert table.refused == {"cusparselt": "it failed: cusparselt does not compile"}
    gpu_machine.uncompilable = set(gpu_machine.names)
    with pytest.raises(ss.CompileError, match="does not compile"):
        times(forms)


def test_what_cannot_be_packed_is_out_unless_it_must_be(gpu_machine: Machine) -> None:
    gpu_machine.unpackable = {"cusparselt": ss.LibraryError("no kernel\nat all")}
    made = packed(gpu_machine, strict=False)
    assert list(made) == ["hopper", "dense"]
    assert times(made, most_tokens=1).refused == {"cusparselt": "it failed: no kernel"}
    made.close()
    assert Memory.held == set()
    with pytest.raises(ss.LibraryError, match="no kernel"):
        packed(gpu_machine)
    gpu_machine.unpackable = dict.fromkeys(gpu_machine.names, ss.CompileError("none"))
    with pytest.raises(ss.CompileError):
        packed(gpu_machine, strict=False)
    gpu_machine.unpackable = {"dense": ss.PatternError("a weight that does not fit")}
    with pytest.raises(ss.PatternError):
        packed(gpu_machine, strict=False)
    assert Memory.held == set()


def test_what_was_not_chosen_for_want_of_memory_is_not_measured(
    gpu_machine: Machine, forms: GpuForms, caplog: pytest.LogCaptureFixture
) -> None:
    gpu_machine.unchosen = {("dense", 384), ("hopper", 4096)}
    assert times(forms).tokens == tuple(m for m in BUCKETS if m not in (384, 4096))
    assert "384 tokens are not measured: there is no memory to choose how dense" in caplog.text


def test_without_memory_for_many_tokens_few_are_measured(
    gpu_machine: Machine,
    forms: GpuForms,
    caplog: pytest.LogCaptureFixture,
) -> None:
    held = set(Memory.held)
    flush = 2 * gpu_machine.gpu.l2_bytes
    gpu_machine.gpu.l2_bytes = 1 << 10
    gpu_machine.gpu.room = 1024 * K * 2  # of x
    assert times(forms).tokens == tuple(m for m in BUCKETS if m <= 768)  # A_TOKEN and counters
    assert "1024 tokens are not measured: no " in caplog.text
    assert A_TOKEN["cusparselt"] * 1024 < gpu_machine.gpu.room
    gpu_machine.gpu.room = 16
    with pytest.raises(ss.DeviceMemoryError):
        times(forms)
    gpu_machine.gpu.room = flush
    assert Memory.held == held


def test_a_time_budget_measures_few_and_many_tokens_first(
    gpu_machine: Machine,
    forms: GpuForms,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(measure.time, "monotonic", lambda: now[0])
    told: list[tuple[str, int, int]] = []

    def progress(name: str, done: int, total: int) -> None:
        told.append((name, done, total))
        now[0] += 1.0

    assert times(forms, seconds=3.0, progress=progress).tokens == (1, 128, 32_768)
    assert told == [
        ("8 x 16, M = 1", 0, len(BUCKETS)),
        ("8 x 16, M = 32768", 1, len(BUCKETS)),
        ("8 x 16, M = 128", 2, len(BUCKETS)),
        ("", len(BUCKETS), len(BUCKETS)),
    ]
    # What there is no memory for does not count as measured.
    gpu_machine.unchosen = {("dense", 32_768)}
    assert times(forms, seconds=0.0).tokens == (1, 128)
    gpu_machine.unchosen = set()
    # The smallest and the largest are always measured: few tokens say nothing about many.
    assert times(forms, seconds=0.0).tokens == (1, 32_768)
    assert times(forms, seconds=0.0, most_tokens=1).tokens == (1,)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"most_tokens": 100}, "the largest number of tokens to measure is 100; allowed are 1, 16"),
        ({"most_tokens": 16.0}, "largest number of tokens to measure is 16.0; allowed are 1, 16"),
        ({"cold_tokens": -1}, "cold_tokens is -1; allowed is a whole number from 0 on"),
        ({"cold_tokens": 1.0}, "cold_tokens is 1.0"),
        ({"rounds": 0}, "rounds is 0; allowed is a whole number from 1 on"),
        ({"rounds": True}, "rounds is True"),
        ({"seconds": -1.0}, "seconds is -1.0; allowed is None or a number from 0 on"),
        ({"seconds": float("nan")}, "seconds is nan"),
        ({"seconds": "1"}, "seconds is '1'"),
    ],
)
def test_settings_that_are_refused(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ss.OptionError, match=says):
        MeasureOptions(**settings)
