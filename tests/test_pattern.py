"""Patterns: which exist, their geometry, and what a misspelled one is told."""

from __future__ import annotations

import copy
import pickle
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import patterns

from slidesparse_rt.errors import PatternError
from slidesparse_rt.pattern import PATTERNS, Pattern

NAMES = [
    *[
        "2:4",
        "4:6",
        "6:8",
        "8:10",
        "10:12",
        "12:14",
        "14:16",
        "16:18",
        "18:20",
        "20:22",
        "22:24",
        "24:26",
        "26:28",
        "28:30",
        "30:32",
    ],
    "dense",
]


def test_every_pattern_of_the_family_exists() -> None:
    assert [pattern.name for pattern in PATTERNS] == NAMES
    assert [str(pattern) for pattern in PATTERNS] == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_parse_takes_the_name_and_the_pattern(name: str) -> None:
    pattern = Pattern.parse(name)
    assert pattern.name == name
    assert Pattern.parse(pattern) is pattern
    assert Pattern.parse(f"  {name.upper()} ") is pattern
    assert pickle.loads(pickle.dumps(pattern)) == pattern
    assert copy.deepcopy(pattern) == pattern
    assert hash(Pattern.parse(name)) == hash(pattern)


def test_a_pattern_does_not_change() -> None:
    with pytest.raises(FrozenInstanceError):
        Pattern.parse("6:8").keep = 7  # type: ignore[misc]


@pytest.mark.parametrize("n", range(2, 17))
def test_geometry_is_that_of_the_paper(n: int) -> None:
    pattern = Pattern.parse(f"{2 * n - 2}:{2 * n}")
    assert (pattern.keep, pattern.group) == (2 * n - 2, 2 * n)
    assert pattern.windows == n - 1
    assert pattern.slots == 4 * (n - 1)
    assert pattern.expansion == 2 - Fraction(2, n)
    assert pattern.speed_bound == Fraction(n, n - 1)
    # The windows have room for exactly what is kept.
    assert 2 * pattern.windows == pattern.keep


def test_dense_keeps_all_and_doubles_k() -> None:
    dense = Pattern.parse("dense")
    assert (dense.keep, dense.group, dense.windows, dense.slots) == (2, 2, 1, 4)
    assert dense.expansion == 2
    assert dense.speed_bound == 1
    assert dense.windows_of(0) == dense.windows_of(1) == (0,)


@given(patterns, st.integers(1, 10**6))
def test_padding_rounds_up_to_groups(pattern: Pattern, k: int) -> None:
    padded = pattern.padded_k(k)
    assert k <= padded < k + pattern.group
    assert padded % pattern.group == 0
    assert padded == pattern.groups(k) * pattern.group
    assert pattern.slid_k(k) == pattern.groups(k) * pattern.slots
    assert pattern.slid_k(k) % 4 == 0
    assert pattern.slid_k(padded) == padded * pattern.expansion


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_windows_of_inverts_the_windows(pattern: Pattern) -> None:
    covered: dict[int, list[int]] = {position: [] for position in range(pattern.group)}
    for window in range(pattern.windows):
        for slot in range(4):
            if 2 * window + slot < pattern.group:  # dense windows reach past their group
                covered[2 * window + slot].append(window)
    for position, windows in covered.items():
        assert pattern.windows_of(position) == tuple(windows)
        assert 1 <= len(windows) <= 2


@pytest.mark.parametrize("position", [-1, 8, 100])
def test_windows_of_names_the_allowed_positions(position: int) -> None:
    with pytest.raises(PatternError, match=rf"position {position} .*'6:8'.* 0 to 7"):
        Pattern.parse("6:8").windows_of(position)


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("2:8", ("'2:8'", "prune 2 of 8", "type '6:8'", "first number is what is kept")),
        ("2:6", ("prune 2 of 6", "type '4:6'")),
        ("6/8", ("'6/8'", "colon", "type '6:8'")),
        ("6-8", ("colon", "type '6:8'")),
        ("6 of 8", ("colon", "type '6:8'")),
        ("7:8", ("'7:8'", "not of the (2N-2):2N family", "type '6:8'")),
        ("1:4", ("type '2:4'",)),
        ("8:6", ("'8:6'", "reversed", "type '6:8'")),
        ("4:2", ("reversed", "type '2:4'")),
        ("32:30", ("reversed", "type '30:32'")),
        ("0:4", ("'0:4'", "type '2:4'")),
        ("8:8", ("prunes nothing", "'dense'", "'6:8'")),
        ("06:08", ("'06:08'", "type '6:8'")),
        ("6 : 8", ("'6 : 8'", "type '6:8'")),
        ("34:32", ("not of the", "type '30:32'")),
        ("32:34", ("does not exist", "'30:32'")),
        ("3:5", ("does not exist", "type for example '6:8'")),
        ("2:2", ("does not exist", "'dense'")),
        ("", ("is empty", "type for example '6:8'")),
        (" \t", ("is empty",)),
        ("sparse", ("'sparse'", "not understood", "type for example '6:8'")),
        ("6:8:10", ("not understood",)),
        ("-6:8", ("not understood",)),
        ("10000000000:3", ("not understood",)),
        (None, ("None", "NoneType", "'6:8'")),
        (0.75, ("0.75", "float", "'6:8'")),
        (b"6:8", ("bytes",)),
        ((6, 8), ("tuple",)),
    ],
)
def test_a_wrong_pattern_is_told_what_to_type(spec: object, says: tuple[str, ...]) -> None:
    with pytest.raises(PatternError) as caught:
        Pattern.parse(spec)  # type: ignore[arg-type]
    message = str(caught.value)
    for fragment in says:
        assert fragment in message
    assert (caught.value.row, caught.value.found, caught.value.violations) == (None, None, None)


@pytest.mark.parametrize("spec", ["06:08", "6 : 8"])
def test_a_pattern_of_the_family_is_not_said_to_be_outside_it(spec: str) -> None:
    with pytest.raises(PatternError) as caught:
        Pattern.parse(spec)
    assert "not of the" not in str(caught.value)


@pytest.mark.parametrize("made", [Pattern(5, 8), Pattern(0, 0), Pattern(32, 34), Pattern(8, 6)])
def test_a_pattern_made_by_hand_is_checked(made: Pattern) -> None:
    with pytest.raises(PatternError, match=f"'{made.keep}:{made.group}'"):
        Pattern.parse(made)


@given(st.text(max_size=12))
def test_any_text_is_a_pattern_or_a_pattern_error(text: str) -> None:
    try:
        found = Pattern.parse(text)
    except PatternError as error:
        assert "type" in str(error)
    else:
        assert found.name == text.strip().lower()


@given(st.integers(0, 40), st.integers(0, 40), st.sampled_from(":/-x "))
def test_any_two_numbers_get_an_answer(keep: int, group: int, separator: str) -> None:
    spec = f"{keep}{separator}{group}"
    if separator == ":" and keep == group - 2 and group % 2 == 0 and 4 <= group <= 32:
        assert Pattern.parse(spec).name == spec
    else:
        with pytest.raises(PatternError, match="type "):
            Pattern.parse(spec)
