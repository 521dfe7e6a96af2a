"""Sparsity patterns of the (2N-2):2N family and their sliding-window geometry.

Source: SlideSparse, arXiv 2603.05232.  A pattern keeps at most ``keep = 2N-2`` of every
``group = 2N`` consecutive weights along K.  Each group is rewritten as ``windows = N-1`` windows of
four inputs; window ``w`` of group ``g`` covers inputs ``g*group + 2*w + j`` for ``j`` in 0..3, and
each nonzero weight is stored in exactly one window, at most two per window, so that the result is
2:4 sparse.  ``docs/patterns.md`` has the proof that this always works.

``"dense"`` is the limit N -> infinity: windows that hold two weights each, at stride two, so that
K doubles.  It is group 2 with one window; the window's last two slots never hold a weight.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

from .errors import PatternError

__all__ = ["MAX_GROUP", "PATTERNS", "WINDOW", "Pattern"]

#: Slots of one window: the hardware's 2:4 block.
WINDOW = 4
#: Inputs by which one window is ahead of the window before it.
STRIDE = 2
#: Widest group that is offered ("30:32").
MAX_GROUP = 32


@dataclass(frozen=True, slots=True)
class Pattern:
    """One sparsity pattern; make it with :meth:`parse` (or take it from :data:`PATTERNS`).

    Attributes
    ----------
    keep:
        Most nonzeros allowed in one group.
    group:
        Consecutive inputs along K that form one group (the ``2N`` of ``(2N-2):2N``).
    """

    keep: int
    group: int

    @classmethod
    def parse(cls, spec: str | Pattern) -> Pattern:
        """Return the pattern that ``spec`` names.

        Parameters
        ----------
        spec:
            ``"2:4"``, ``"4:6"``, ... ``"30:32"`` (keep first), ``"dense"``, or a Pattern.

        Raises
        ------
        PatternError
            For anything else; the message says what to type instead.
        """
        if isinstance(spec, Pattern):
            if spec in _BY_NAME.values():
                return spec
            raise PatternError(_refusal(f"{spec.keep}:{spec.group}", spec.keep, spec.group))
        if not isinstance(spec, str):
            raise PatternError(
                f"a pattern is a string such as '6:8' (keep 6 of every 8), not {spec!r} of type "
                f"{type(spec).__name__}"
            )
        found = _BY_NAME.get(spec.strip().lower())
        if found is not None:
            return found
        numbers = re.fullmatch(r"\s*(\d{1,9})\s*\D{1,3}?\s*(\d{1,9})\s*", spec)
        if numbers is None:
            raise PatternError(_refusal(spec, None, None))
        keep, group = int(numbers[1]), int(numbers[2])
        if f"{keep}:{group}" in _BY_NAME:
            raise PatternError(
                f"pattern {spec!r} is spelled with a colon and nothing else: type '{keep}:{group}'"
            )
        raise PatternError(_refusal(spec, keep, group))

    @property
    def name(self) -> str:
        """The spelling that :meth:`parse` accepts."""
        return "dense" if self.keep == self.group else f"{self.keep}:{self.group}"

    @property
    def windows(self) -> int:
        """Windows per group (the paper's N-1)."""
        return max(1, self.group // STRIDE - 1)

    @property
    def slots(self) -> int:
        """Slots that one group occupies after sliding: ``WINDOW * windows``."""
        return WINDOW * self.windows

    @property
    def expansion(self) -> Fraction:
        """K' / K for a K that is a whole number of groups: ``2 - 2/N``, and 2 for ``dense``."""
        return Fraction(self.slots, self.group)

    @property
    def speed_bound(self) -> Fraction:
        """Most speed over a dense GEMM that 2x sparse tensor cores allow: ``N / (N-1)``."""
        return 2 / self.expansion

    def groups(self, k: int) -> int:
        """Groups in a row of ``k`` inputs; the last one may be incomplete."""
        return -(-k // self.group)

    def padded_k(self, k: int) -> int:
        """``k`` rounded up to whole groups; the added inputs are zeros."""
        return self.groups(k) * self.group

    def slid_k(self, k: int) -> int:
        """K', the row length after sliding (or lifting) a row of ``k`` inputs."""
        return self.groups(k) * self.slots

    def windows_of(self, position: int) -> tuple[int, ...]:
        """Windows that cover input ``position`` (0-based, within its group), in ascending order."""
        if not 0 <= position < self.group:
            raise PatternError(
                f"position {position} is outside a group of {self.name!r}: allowed is "
                f"0 to {self.group - 1}"
            )
        last = self.windows - 1
        pair = position // STRIDE
        return tuple(w for w in (pair - 1, pair) if 0 <= w <= last)

    def __str__(self) -> str:
        return self.name


#: Every pattern that exists, mildest last; ``dense`` (nothing pruned) closes the list.
PATTERNS: tuple[Pattern, ...] = (
    *(Pattern(group - 2, group) for group in range(4, MAX_GROUP + 1, 2)),
    Pattern(2, 2),
)
_BY_NAME = {pattern.name: pattern for pattern in PATTERNS}


def _refusal(spec: str, keep: int | None, group: int | None) -> str:
    """What is wrong with ``spec``, and what to type."""
    allowed = (
        f"allowed are '2:4', '4:6', '6:8', ... '{MAX_GROUP - 2}:{MAX_GROUP}' (keep K of every G "
        f"consecutive weights, G even, K = G - 2) and 'dense'"
    )
    if not spec.strip():
        return f"the pattern is empty; type for example '6:8'; {allowed}"
    if keep is None or group is None:
        return f"pattern {spec!r} is not understood; type for example '6:8'; {allowed}"
    if keep % 2 == 0 and keep == group + 2 and 4 <= keep <= MAX_GROUP:
        return f"pattern {spec!r} is reversed; type '{group}:{keep}'; {allowed}"
    if group % 2 == 0 and 4 <= group <= MAX_GROUP:
        meant = f"{group - 2}:{group}"
        if keep == 2:
            return (
                f"pattern {spec!r} would keep 2 of every {group}; if it is meant as 'prune 2 of "
                f"{group}', type {meant!r} (the first number is what is kept); {allowed}"
            )
        if keep == group:
            return (
                f"pattern {spec!r} prunes nothing; type 'dense' for that, or {meant!r}; {allowed}"
            )
        return f"pattern {spec!r} is not of the (2N-2):2N family; type {meant!r}; {allowed}"
    return f"pattern {spec!r} does not exist; type for example '6:8'; {allowed}"
