"""Measured times of backends by number of tokens, and which of them runs at which M.

No GPU is needed for any of it.  docs/tuning.md derives the rule.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations, permutations
from types import MappingProxyType

from ..backends.buckets import TOKEN_BUCKETS
from ..backends.cold import COLD_TOKENS
from ..errors import OptionError

__all__ = ["BUCKETS", "DENSE", "FAILED", "Dispatch", "Table", "buckets_up_to", "coarse_first"]

#: Numbers of tokens that fill no tile of the libraries: their products may be slower than for the
#: next one that does, and times are no straight lines between those.
_PARTIAL = (120, 184, 208, 248, 328, 456, 648, 904, 1288, 1800)
#: Numbers of tokens that are measured: one, which decoding has, and those for which backends choose
#: how to multiply; where a tile more or less tells, others between these.
BUCKETS = tuple(sorted((1, *TOKEN_BUCKETS, *_PARTIAL)))
#: The backend that uses no zeros.
DENSE = "dense"
#: How the reason begins for which a backend that could run is not measured.
FAILED = "it failed: "
#: Up to so many tokens a product takes as long as the bucket above: tiles are as large as that, and
#: tokens that are missing in one save nothing.  Larger products have many tiles.
_WHOLE_TILES = 256
#: How much slower than the fastest backend at some M the plan may be, so that it holds one form of
#: the weight less, or that what needs less power runs.  Below the 2 % that is promised, for a
#: second measurement differs.
_SLACK = 1.01
#: Which of several backends that are equally fast, to the slack, runs: those that need less power
#: first.  A GPU at its power limit is faster with these than bursts show.
_ORDER = ("hopper", "cusparselt", DENSE)


def buckets_up_to(most: int) -> tuple[int, ...]:
    """The :data:`BUCKETS` up to ``most`` tokens, which is one of them; OptionError otherwise."""
    if isinstance(most, bool) or not isinstance(most, int) or most not in BUCKETS:
        raise OptionError(
            f"the largest number of tokens to measure is {most!r}; allowed are "
            f"{', '.join(map(str, BUCKETS))}"
        )
    return BUCKETS[: BUCKETS.index(most) + 1]


def coarse_first(buckets: Sequence[int]) -> list[int]:
    """The same numbers in an order of which every beginning is spread over their whole range.

    A measurement that a time budget cuts short has then seen few and many tokens.  Numbers that
    fill no tile come last.
    """
    whole = [tokens for tokens in buckets if tokens not in _PARTIAL]
    left, found = list(range(len(whole))), []
    for step in (len(whole) - 1, 4, 2, 1):
        for index in [index for index in left if index % max(1, step) == 0]:
            found.append(whole[index])
            left.remove(index)
    return found + [tokens for tokens in buckets if tokens in _PARTIAL]


@dataclass(frozen=True, slots=True)
class Dispatch:
    """Which backend runs for how many tokens.

    Attributes
    ----------
    starts, names:
        From ``starts[i]`` tokens on ``names[i]`` runs, up to the next start.  The first start is 0,
        and neighbours differ.
    """

    starts: tuple[int, ...]
    names: tuple[str, ...]

    def at(self, tokens: int) -> str:
        """The backend that runs for ``tokens`` tokens, at least 0."""
        return self.names[bisect_right(self.starts, tokens) - 1]

    @property
    def backends(self) -> tuple[str, ...]:
        """Every backend that runs for some number of tokens, each once."""
        return tuple(dict.fromkeys(self.names))


@dataclass(frozen=True)
class Table:
    """Times of one weight's pipeline on one GPU.

    Attributes
    ----------
    times:
        Tokens -> backend -> microseconds of one run, bfloat16 in and out.  Every number of tokens
        has the same backends: one that was not measured everywhere is left out.
    refused:
        Backend -> why it was not measured.
    cold_tokens:
        Up to so many tokens the level-2 cache was emptied before each run.
    taken:
        When, as UTC in ISO 8601; "" where nobody knows.

    Raises
    ------
    OptionError
        Where no backend was measured for all of the tokens, and for numbers that are no times.
    """

    times: Mapping[int, Mapping[str, float]]
    refused: Mapping[str, str] = field(default_factory=dict)
    cold_tokens: int = COLD_TOKENS
    taken: str = ""

    def __post_init__(self) -> None:
        for tokens, row in self.times.items():
            if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
                raise OptionError(f"{tokens!r} is no number of tokens; allowed are those from 1 on")
            for name, us in row.items():
                number = isinstance(us, (int, float)) and not isinstance(us, bool)
                if not number or not 0 < us < math.inf:
                    raise OptionError(
                        f"{name} at {tokens} tokens took {us!r}; allowed are positive microseconds"
                    )
        rows = list(self.times.values())
        common = set(rows[0]).intersection(*rows[1:]) if rows else set()
        if not common:
            raise OptionError("no backend was measured for every number of tokens")
        names = sorted(common, key=_rank)
        plain = {
            tokens: MappingProxyType({name: float(self.times[tokens][name]) for name in names})
            for tokens in sorted(self.times)
        }
        object.__setattr__(self, "times", MappingProxyType(plain))
        object.__setattr__(self, "refused", MappingProxyType(dict(self.refused)))

    @property
    def tokens(self) -> tuple[int, ...]:
        """The numbers of tokens that were measured, rising."""
        return tuple(self.times)

    @property
    def backends(self) -> tuple[str, ...]:
        """The backends that were measured."""
        return tuple(self.times[self.tokens[0]])

    def estimate(self, tokens: int) -> dict[str, float]:
        """Microseconds of each backend for ``tokens`` tokens.

        Between buckets that of the upper one where tokens are few, else on a straight line.  Below
        the first bucket and above the last one it is that one's: their order is what counts.
        """
        if tokens in self.times:
            return dict(self.times[tokens])
        measured = self.tokens
        index = bisect_left(measured, tokens)
        if index == 0:
            return dict(self.times[measured[0]])
        if index == len(measured):
            return dict(self.times[measured[-1]])
        low, high = measured[index - 1], measured[index]
        if high <= _WHOLE_TILES:
            return dict(self.times[high])
        part = (tokens - low) / (high - low)
        below, above = self.times[low], self.times[high]
        return {name: below[name] + part * (above[name] - below[name]) for name in below}

    def dispatch(self, *, keep_dense: bool = True, able: Iterable[str] | None = None) -> Dispatch:
        """Choose a backend for every number of tokens, and few backends in all.

        Parameters
        ----------
        keep_dense:
            Whether "dense" may be chosen although another backend could run instead.
        able:
            The backends that can be used; ``None``: all that were measured.

        Raises
        ------
        OptionError
            Where none of them was measured.

        Notes
        -----
        Of the sets of backends with which no M is more than 1 % slower than its fastest backend the
        smallest is taken, and of those the fastest.  For each M the first of hopper, cusparselt and
        dense runs that is in the set and at most 1 % slower than the fastest backend.  What is true
        of straight lines so compared changes only where one crosses another or 1.01 times another,
        so looking at the buckets, where steps begin and beside each crossing is looking at every M.
        """
        names = self._allowed(keep_dense, able)
        points = {point: self.estimate(point) for point in self._points(names)}
        chosen = _fewest(names, points)
        starts, winners = [0], [_first(points[self.tokens[0]], chosen, names)]
        for point, times in points.items():
            winner = _first(times, chosen, names)
            if winner != winners[-1]:
                starts.append(point)
                winners.append(winner)
        return Dispatch(tuple(starts), tuple(winners))

    def alone(
        self, *, keep_dense: bool = True, able: Iterable[str] | None = None
    ) -> list[Dispatch]:
        """Each backend for every number of tokens, that first which is nowhere far behind the best.

        The arguments are those of :meth:`dispatch`, and so is what is raised.
        """

        def behind(name: str) -> float:
            return max(row[name] / min(row.values()) for row in self.times.values())

        names = sorted(
            self._allowed(keep_dense, able), key=lambda name: (behind(name), _rank(name))
        )
        return [Dispatch((0,), (name,)) for name in names]

    def merged(self, older: Table) -> Table:
        """Return this table with what only an older one has; this one where they do not fit."""
        if older.cold_tokens != self.cold_tokens:
            return self
        try:
            return Table(
                {**older.times, **self.times},
                {**older.refused, **self.refused},
                self.cold_tokens,
                self.taken,
            )
        except OptionError:
            return self

    def _allowed(self, keep_dense: bool, able: Iterable[str] | None) -> list[str]:
        """The backends that may be chosen; OptionError where there are none."""
        names = [name for name in self.backends if able is None or name in set(able)]
        if not keep_dense and names != [DENSE]:
            names = [name for name in names if name != DENSE]
        if not names:
            raise OptionError(
                f"none of the backends that can run was measured; measured are "
                f"{', '.join(self.backends)}"
            )
        return names

    def _points(self, names: Sequence[str]) -> list[int]:
        """Numbers of tokens between which no backend passes another, or its slack; rising."""
        found = set(self.tokens)
        for low, high in zip(self.tokens, self.tokens[1:], strict=False):
            if high <= _WHOLE_TILES:
                found.add(low + 1)
                continue
            below, above = self.times[low], self.times[high]
            pairs = [(one, other, 1.0) for one, other in combinations(names, 2)]
            pairs += [(one, other, _SLACK) for one, other in permutations(names, 2)]
            for one, other, by in pairs:
                before, after = below[one] - by * below[other], above[one] - by * above[other]
                if before * after <= 0 and before != after:  # crossed, or equal at one end
                    crossing = low + int((high - low) * (before / (before - after)))
                    found.update(
                        point for point in range(crossing - 1, crossing + 3) if low < point < high
                    )
        return sorted(found)


def _rank(name: str) -> tuple[int, str]:
    return (_ORDER.index(name) if name in _ORDER else len(_ORDER), name)


def _first(times: Mapping[str, float], chosen: Iterable[str], names: Iterable[str]) -> str:
    """The first of the chosen that is fast enough among all; the fastest where rounding hid it."""
    enough = _SLACK * min(times[name] for name in names)
    return min(chosen, key=lambda name: (max(times[name], enough), _rank(name)))


def _fewest(names: Sequence[str], points: Mapping[int, Mapping[str, float]]) -> tuple[str, ...]:
    """The smallest set that is fast enough at every point; the fastest of several."""
    best = {point: min(times[name] for name in names) for point, times in points.items()}
    for size in range(1, len(names)):
        found: list[tuple[float, tuple[str, ...]]] = []
        for some in combinations(names, size):
            ratios = [
                min(times[name] for name in some) / best[point] for point, times in points.items()
            ]
            if max(ratios) <= _SLACK:
                found.append((sum(map(math.log, ratios)), some))
        if found:
            return min(found)[1]
    return tuple(names)
