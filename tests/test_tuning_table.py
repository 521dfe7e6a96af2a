"""Which backend runs for how many tokens, from recorded times and from any times."""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_rt.backends.buckets import TOKEN_BUCKETS
from slidesparse_rt.errors import OptionError
from slidesparse_rt.tuning import BUCKETS, Dispatch, Table
from slidesparse_rt.tuning.table import buckets_up_to, coarse_first

RECORDED = json.loads((Path(__file__).parent / "data" / "tuning-recorded.json").read_text())
RESULTS = Path(__file__).resolve().parents[1]
NAMES = ("hopper", "cusparselt", "dense")
#: What rounding may hide where two times are compared.
EPS = 1 + 1e-9


@st.composite
def tables(draw: st.DrawFn) -> Table:
    """Times of two or three backends at some of the buckets, often close to each other."""
    names = draw(st.sampled_from((NAMES, NAMES[:2], NAMES[1:], ("hopper", "dense"))))
    tokens = draw(st.lists(st.sampled_from(BUCKETS), unique=True, min_size=1))
    base = draw(st.floats(0.5, 1e4))
    ratio = st.one_of(st.floats(0.97, 1.03), st.floats(0.2, 5.0))
    return Table({m: {name: base * m * draw(ratio) for name in names} for m in tokens})


def recorded(dtype: str, pattern: str, gpu: str) -> Table:
    (found,) = (
        row
        for row in RECORDED["tables"]
        if (row["dtype"], row["pattern"]) == (dtype, pattern) and gpu in row["gpu"]
    )
    return Table({int(tokens): row for tokens, row in found["us"].items()})


# ------------------------------------------------------------------------------- recorded times


def test_the_recorded_times_are_those_of_the_result_files() -> None:
    for table in RECORDED["tables"]:
        rows = json.loads((RESULTS / table["file"]).read_text())["rows"]
        for tokens, times in table["us"].items():
            wanted: list[Any] = [
                row["us"]
                for row in rows
                if (row["dtype"], row["pattern"], row["m"], row["stage"], row["mode"])
                == (table["dtype"], table["pattern"], int(tokens), table["stage"], table["mode"])
            ]
            assert [{name: round(us, 2) for name, us in row.items()} for row in wanted] == [times]


def test_recorded_times_choose_what_was_faster() -> None:
    """On an H200 cuSPARSELt wins where fp8 tokens are few, and loses where they are many."""
    mild = recorded("fp8_e4m3", "6:8", "H200").dispatch()
    assert [mild.at(tokens) for tokens in (1, 16, 64, 256, 1024, 4096, 16384)] == (
        ["cusparselt"] * 3 + ["dense"] * 4
    )
    assert mild.backends == ("cusparselt", "dense")
    # Between 64 and 256, which were measured, products are whole tiles of 256.
    assert (mild.at(64), mild.at(65)) == ("cusparselt", "dense")
    for dtype in ("int8", "fp8_e4m3"):
        # One form is enough for all.
        assert recorded(dtype, "2:4", "H200").dispatch() == Dispatch((0,), ("cusparselt",))
        assert recorded(dtype, "6:8", "H100").dispatch() == Dispatch((0,), ("hopper",))
    # On an H100 bf16 has fewer bytes to read where tokens are few, and more to lift where not.
    mixed = recorded("bf16", "6:8", "H100").dispatch()
    assert [mixed.at(tokens) for tokens in (1, 16, 64, 256, 1024, 4096, 16384)] == (
        ["hopper"] * 3 + ["dense"] * 4
    )
    assert recorded("bf16", "8:10", "H200").dispatch() == Dispatch((0,), ("dense",))
    assert recorded("bf16", "2:4", "H200").dispatch().backends == ("dense", "cusparselt")


@pytest.mark.parametrize("table", RECORDED["tables"], ids=lambda row: row["dtype"] + row["pattern"])
def test_the_promise_holds_on_recorded_times(table: dict[str, Any]) -> None:
    made = Table({int(tokens): row for tokens, row in table["us"].items()})
    dispatch = made.dispatch()
    for tokens, times in made.times.items():
        taken = times[dispatch.at(tokens)]
        assert taken <= 1.02 * min(times.values())
        assert times["dense"] / taken >= 0.98


def test_a_form_is_not_held_for_one_percent() -> None:
    close = {16: {"hopper": 10.0, "dense": 9.92}, 32: {"hopper": 10.0, "dense": 12.0}}
    assert Table(close).dispatch() == Dispatch((0,), ("hopper",))
    close[16]["dense"] = 9.8
    assert Table(close).dispatch().backends == ("dense", "hopper")


def test_a_form_is_held_for_what_lies_between_buckets() -> None:
    """A backend that is best at neither of two buckets may be best between them."""
    table = Table(
        {
            16: {"hopper": 1.0, "cusparselt": 10.0, "dense": 1.005},
            32: {"hopper": 10.0, "cusparselt": 1.0, "dense": 1.005},
        }
    )
    dispatch = table.dispatch()
    assert dispatch == Dispatch((0,), ("dense",))
    without = table.dispatch(keep_dense=False)
    assert without.backends == ("hopper", "cusparselt")


def test_backends_that_are_equal_at_a_bucket_part_behind_it() -> None:
    table = Table({256: {"hopper": 2.0, "dense": 2.0}, 512: {"hopper": 4.0, "dense": 3.0}})
    assert table.dispatch() == Dispatch((0,), ("dense",))
    table = Table({1: {"hopper": 1.0, "dense": 2.0}, **table.times})
    assert table.dispatch() == Dispatch((0, 262), ("hopper", "dense"))


# ------------------------------------------------------------------------------------- any times


@given(tables(), st.lists(st.integers(0, 40_000)))
def test_whatever_the_times_the_promise_holds_for_every_m(table: Table, some: list[int]) -> None:
    dispatch = table.dispatch()
    edges = [start + more for start in dispatch.starts for more in (-1, 0, 1)]
    for tokens in {*some, *edges, *table.tokens} - {-1}:
        times = table.estimate(tokens)
        taken = times[dispatch.at(tokens)]
        assert taken <= 1.02 * min(times.values())
        if "dense" in times:
            assert times["dense"] / taken >= 0.98
        # Of the forms that are held the first runs that is as good as the fastest of all.
        enough = 1.01 * min(times.values())
        held = [name for name in NAMES if name in dispatch.backends]
        surely = [name for name in held if times[name] < enough / EPS]
        assert taken < enough * EPS
        assert not surely or NAMES.index(dispatch.at(tokens)) <= NAMES.index(surely[0])


@given(tables())
def test_only_what_runs_is_held(table: Table) -> None:
    dispatch = table.dispatch()
    assert dispatch.starts[0] == 0
    assert list(dispatch.starts) == sorted(set(dispatch.starts))
    assert all(a != b for a, b in zip(dispatch.names, dispatch.names[1:], strict=False))
    assert {dispatch.at(start) for start in dispatch.starts} == set(dispatch.backends)
    assert set(dispatch.backends) <= set(table.backends)


@given(tables())
def test_dense_is_dropped_where_another_can_run(table: Table) -> None:
    without = table.dispatch(keep_dense=False)
    assert "dense" not in without.backends
    rest = {
        tokens: {name: us for name, us in row.items() if name != "dense"}
        for tokens, row in table.times.items()
    }
    assert without == Table(rest).dispatch()
    only = {tokens: {"dense": 1.0} for tokens in table.tokens}
    assert Table(only).dispatch(keep_dense=False) == Dispatch((0,), ("dense",))


@given(tables(), st.integers(1, 1 << 20))
def test_every_m_has_a_backend(table: Table, tokens: int) -> None:
    assert table.dispatch().at(tokens) in table.backends
    nearest = table.estimate(tokens)
    assert set(nearest) == set(table.backends)
    below = [table.times[m] for m in table.tokens if m <= tokens] or [table.times[table.tokens[0]]]
    above = [table.times[m] for m in table.tokens if m >= tokens] or [table.times[table.tokens[-1]]]
    for name, us in nearest.items():
        low, high = sorted((below[-1][name], above[0][name]))
        assert low * (1 - 1e-9) <= us <= high * (1 + 1e-9)


@given(tables(), st.sets(st.sampled_from(NAMES)))
def test_backends_that_cannot_run_are_not_chosen(table: Table, able: set[str]) -> None:
    if able.isdisjoint(table.backends):
        with pytest.raises(OptionError, match="none of the backends that can run was measured"):
            table.dispatch(able=able)
    else:
        assert set(table.dispatch(able=able).backends) <= able


# ---------------------------------------------------------------------------------------- tables


def test_backends_that_were_not_measured_everywhere_are_left_out() -> None:
    table = Table({32: {"hopper": 1, "dense": 2, "cusparselt": 3}, 16: {"dense": 2, "hopper": 4}})
    assert table.tokens == (16, 32)
    assert table.backends == ("hopper", "dense")
    assert table == Table({16: {"hopper": 4.0, "dense": 2.0}, 32: {"hopper": 1.0, "dense": 2.0}})


@pytest.mark.parametrize(
    ("times", "says"),
    [
        ({}, "no backend was measured for every number of tokens"),
        ({1: {}}, "no backend was measured"),
        ({1: {"dense": 1.0}, 16: {"hopper": 1.0}}, "no backend was measured"),
        ({0: {"dense": 1.0}}, "0 is no number of tokens"),
        ({True: {"dense": 1.0}}, "True is no number"),
        ({"16": {"dense": 1.0}}, "'16' is no number"),
        *(
            ({1: {"dense": us}}, r"dense at 1 tokens took .*; allowed are positive microseconds")
            for us in (0.0, -1.0, math.inf, math.nan, "1", None, True)
        ),
    ],
)
def test_tables_that_are_refused(times: Any, says: str) -> None:
    with pytest.raises(OptionError, match=says):
        Table(times)


def test_older_times_fill_the_gaps() -> None:
    older = Table({1: {"dense": 1.0}, 16: {"dense": 9.0, "hopper": 2.0}}, {"x": "old"})
    newer = Table({16: {"dense": 3.0}}, {"x": "new"}, taken="now")
    both = newer.merged(older)
    assert both == Table({1: {"dense": 1.0}, 16: {"dense": 3.0}}, {"x": "new"}, taken="now")
    # Measured otherwise, or others measured.
    warm = Table(newer.times, cold_tokens=0)
    assert warm.merged(older) is warm
    other = Table({32: {"cusparselt": 1.0}})
    assert other.merged(older) is other


def test_the_buckets_are_those_that_backends_choose_for_and_some_that_fill_no_tile() -> None:
    assert BUCKETS[0] == 1
    assert list(BUCKETS) == sorted(BUCKETS)
    others = set(BUCKETS[1:]) - set(TOKEN_BUCKETS)
    assert set(BUCKETS) - others == {1, *TOKEN_BUCKETS}
    # Whole vectors of 16-bit results, but no multiples of a library's tile.
    assert not any(tokens % 8 for tokens in others)
    assert all(tokens % 32 for tokens in others)
    # Where a tile more tells, some in each gap.
    for low, high in pairwise(TOKEN_BUCKETS):
        assert any(low < tokens < high for tokens in others) == (64 <= low < 2048)
    assert buckets_up_to(64) == (1, 16, 32, 64)
    for most in (0, 2, 100, 65_536, True, "16"):
        with pytest.raises(OptionError, match="allowed are 1, 16, 32"):
            buckets_up_to(most)  # type: ignore[arg-type]


@given(st.lists(st.sampled_from(BUCKETS), unique=True).map(sorted))
def test_a_cut_measurement_is_spread_over_all_tokens(buckets: list[int]) -> None:
    order = coarse_first(buckets)
    assert sorted(order) == buckets
    # Those that fill no tile come last.
    whole = [tokens for tokens in buckets if tokens in {1, *TOKEN_BUCKETS}]
    assert set(order[: len(whole)]) == set(whole)
    assert not whole or set(order[:2][: len(whole)]) == {whole[0], whole[-1]}


def test_the_order_of_all_buckets() -> None:
    assert coarse_first(BUCKETS)[:5] == [1, 32_768, 128, 512, 2048]
