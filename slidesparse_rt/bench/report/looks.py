"""How every plot looks: colours, markers, style, and the axis of tokens."""

from __future__ import annotations

import itertools
from typing import Any

__all__ = ["COLOURS", "DASHES", "DOTS", "GREY", "MARKERS", "STYLE", "grid_below", "token_axis"]

#: Okabe and Ito's colours, which people with colour-blind eyes tell apart, the darker ones first.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")
GREY = "#666666"
DASHES = (0, (5, 4))
DOTS = (0, (1, 1.5))
STYLE: dict[str, Any] = {
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.labelsize": 9,
    "font.size": 9,
    "font.family": "DejaVu Sans",
    "legend.frameon": False,
    "svg.fonttype": "path",
    # Names inside the file are made from this instead of from chance.
    "svg.hashsalt": "slidesparse_rt",
}


def grid_below(axes: Any, axis: str = "y") -> None:
    """Faint lines behind what is drawn."""
    axes.grid(axis=axis, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)


def token_axis(axes: Any, tokens: list[int], label: str = "M (tokens)") -> None:
    """What was measured is labelled where it is little, else powers of two, not all if many."""
    low, high = min(tokens), max(tokens)
    axes.set_xscale("log", base=2)
    few = sorted(set(tokens))
    apart = all(2 * left <= right for left, right in itertools.pairwise(few))
    powers = [1 << power for power in range(0, 31) if low <= 1 << power <= high] or [low]
    step = 1 if len(powers) <= 6 else 2 if len(powers) <= 12 else 4
    ticks = few if len(few) <= 6 and apart else powers[::-1][::step][::-1]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(label)
