"""Whole passes of a model, from files of benchmarks/end_to_end.py, as Markdown.

A file measures its sides pattern by pattern, bf16 and dense with the sparse ones, in turns.  So
every ratio here is taken within one file and pattern: a :class:`Group`.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...pattern import PATTERNS, Pattern
from ..pipeline import FLOOR
from ..sides import DENSE
from .markdown import DTYPES, short, table
from .results import Result, asked

__all__ = [
    "BF16",
    "GOAL",
    "GOAL_PATTERN",
    "GOAL_TOKENS",
    "PHASES",
    "Group",
    "breakdown",
    "conditions",
    "groups",
    "memory",
    "speeds",
]

BF16 = "bf16"
PHASES = ("prefill", "decode")
#: What was wanted before anything was measured: prefill over dense fp8, for so many tokens or more.
GOAL, GOAL_PATTERN, GOAL_TOKENS = 1.20, "6:8", 8192

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Group:
    """The passes of one pattern in one file, within which sides may be compared.

    Attributes
    ----------
    model, pattern:
        What ran.
    result:
        The file.
    rows:
        By phase, M and side: "bf16", "dense", and :meth:`side` of each operand format.
    """

    model: str
    pattern: Pattern
    result: Result
    rows: Mapping[tuple[str, int, str], Row]

    @property
    def dtypes(self) -> list[str]:
        """Operand formats of the sparse sides, those that were asked for and have not run too."""
        seen = {side for _, _, side in self.rows}
        wanted = asked(self.result, "dtypes")
        return [dtype for dtype in DTYPES if dtype in wanted or self.side(dtype) in seen]

    def side(self, dtype: str) -> str:
        """The sparse side of an operand format."""
        return f"{self.pattern} {dtype}"

    def tokens(self, phase: str) -> list[int]:
        """Every M of a phase, those included that were asked for and have not run."""
        known = {m for of, m, _ in self.rows if of == phase}
        return sorted(known | {int(m) for m in asked(self.result, phase)})

    def cases(self) -> Iterator[tuple[str, int]]:
        """Every phase and M."""
        return ((phase, m) for phase in PHASES for m in self.tokens(phase))

    def ratio(self, phase: str, m: int, side: str, over: str = DENSE) -> float | None:
        """How many times as fast as ``over`` a side is; ``None`` where one has not run."""
        row = self.rows.get((phase, m, side))
        value = None if row is None else row["ratio"].get(over)
        return None if value is None else float(value)

    def linear_ratio(self, phase: str, m: int, side: str) -> float | None:
        """The same of the linear layers alone, over dense."""
        row, dense = (self.rows.get((phase, m, one)) for one in (side, DENSE))
        if row is None or dense is None:
            return None
        return float(dense["linear_us"]) / float(row["linear_us"])

    def bound(self, phase: str, m: int) -> float | None:
        """Speed over dense if linear layers took 1/bound of dense's time, all else as it is.

        Amdahl's law with the pattern's N/(N-1), which counts operations: ``None`` for decoding,
        whose linear layers wait for memory instead, and where dense has not run.
        """
        dense = self.rows.get((phase, m, DENSE))
        if dense is None or phase != "prefill":
            return None
        whole, linear = float(dense["us"]), float(dense["linear_us"])
        return whole / (whole - linear + linear / float(self.pattern.speed_bound))

    def needed(self, m: int, goal: float) -> float | None:
        """How many times as fast as dense the linear layers of a prefill must be to reach ``goal``.

        ``None`` where no speed is enough, or dense has not run.
        """
        dense = self.rows.get(("prefill", m, DENSE))
        if dense is None:
            return None
        left = dense["us"] / goal - (dense["us"] - dense["linear_us"])
        return float(dense["linear_us"] / left) if left > 0 else None


def groups(results: Sequence[Result]) -> list[Group]:
    """The groups of "end-to-end" results: each model, 2:4 first.

    Where two files have a pattern, all of it is taken from the one that is named last.
    """
    found: dict[tuple[str, str], Group] = {}
    for result in results:
        if result.what != "end-to-end":
            continue
        model = str(result.document["model"])
        for name in dict.fromkeys(row["pattern"] for row in result.rows):
            rows = {
                (row["phase"], row["m"], row["side"]): row
                for row in result.rows
                if row["pattern"] == name
            }
            found[model, name] = Group(model, Pattern.parse(name), result, rows)
    order = [pattern.name for pattern in PATTERNS]
    models = list(dict.fromkeys(model for model, _ in found))
    return [
        found[key]
        for key in sorted(found, key=lambda key: (models.index(key[0]), order.index(key[1])))
    ]


def _cell(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


# --- tokens a second ------------------------------------------------------------------------------


def speeds(results: Sequence[Result]) -> str:
    """What was wanted, and tokens a second of every pattern; "" without "end-to-end" results."""
    found = groups(results)
    if not found:
        return ""
    parts = [_unfinished(results), _wanted(found), _lowest(found)]
    parts += [f"**{group.model} at {group.pattern}**\n\n{_speeds(group)}" for group in found]
    return "\n\n".join(part for part in parts if part)


def _unfinished(results: Sequence[Result]) -> str:
    """What incomplete files have not."""
    lines = []
    for result in results:
        if result.what != "end-to-end" or result.document["complete"]:
            continue
        seen = {row["pattern"] for row in result.rows}
        none = [name for name in asked(result, "patterns") if name not in seen]
        more = f" Not begun: {', '.join(none)}." if none else ""
        lines.append(
            f'`{result.name}` is **not complete**: its run ended early, and "-" has not run.{more}'
        )
    return "\n\n".join(lines)


def _speeds(group: Group) -> str:
    lines = []
    for phase, m in group.cases():
        line = [phase, str(m), *(_rate(group, phase, m, side) for side in (BF16, DENSE))]
        for dtype in group.dtypes:
            side = group.side(dtype)
            line.append(_rate(group, phase, m, side))
            line += [_cell(group.ratio(phase, m, side, over)) for over in (DENSE, BF16)]
        lines.append(line)
    head = ["phase", "M", "bf16 tokens/s", "dense fp8 tokens/s"]
    for dtype in group.dtypes:
        head += [f"{short(dtype)} tokens/s", "over dense fp8", "over bf16"]
    return table(head, lines)


def _rate(group: Group, phase: str, m: int, side: str) -> str:
    row = group.rows.get((phase, m, side))
    return "-" if row is None else f"{row['tokens_per_s']:,.0f}"


def _wanted(found: Sequence[Group]) -> str:
    """What was wanted over dense fp8, and what came out."""
    lines = []
    for group in found:
        if group.pattern.name != GOAL_PATTERN:
            continue
        for dtype in group.dtypes:
            reached = {
                m: group.ratio("prefill", m, group.side(dtype))
                for m in group.tokens("prefill")
                if m >= GOAL_TOKENS
            }
            if not reached:
                continue
            shown = ", ".join(f"{_cell(value, 3)} (M={m})" for m, value in reached.items())
            words = f"prefill at {group.pattern}, M of {GOAL_TOKENS} or more, {short(dtype)}"
            lines.append([words, f"{GOAL:.2f}", shown, _met(list(reached.values()), GOAL)])
    decoded = list(_ratios(found, "decode"))
    if decoded:
        value, case = min(decoded)
        words = "decode, every pattern and format"
        shown = f"{value:.3f} ({case}), the lowest of {len(decoded)}"
        lines.append([words, f"{FLOOR:.2f}", shown, _met([value], FLOOR)])
    head = ["wanted, over dense fp8", "at least", "measured", "met"]
    return table(head, lines) if lines else ""


def _met(values: Sequence[float | None], least: float) -> str:
    known = [value for value in values if value is not None]
    if any(value < least for value in known):
        return "no"
    return "yes" if len(known) == len(values) else "not known"


def _ratios(found: Sequence[Group], phase: str) -> Iterator[tuple[float, str]]:
    """Every ratio of a phase over dense, and its case in words."""
    for group in found:
        for m, dtype in itertools.product(group.tokens(phase), group.dtypes):
            value = group.ratio(phase, m, group.side(dtype))
            if value is not None:
                yield value, f"{group.pattern} {short(dtype)} M={m}"


def _lowest(found: Sequence[Group]) -> str:
    """Where prefill is slowest, what the goal needs, and how well all this is known."""
    lines = []
    filled = list(_ratios(found, "prefill"))
    if filled:
        value, case = min(filled)
        lines.append(f"Prefill, lowest of {len(filled)}: {value:.3f} ({case}).")
    for group in found:
        for m in group.tokens("prefill"):
            needed = group.needed(m, GOAL)
            if group.pattern.name != GOAL_PATTERN or m < GOAL_TOKENS or needed is None:
                continue
            alone = ", ".join(
                f"{_cell(group.linear_ratio('prefill', m, group.side(dtype)))} in {short(dtype)}"
                for dtype in group.dtypes
            )
            lines.append(
                f"For {GOAL:.2f} at {group.pattern} and M={m} the linear layers would have to be "
                f"{needed:.2f} x as fast as dense ones; alone they are {alone}."
            )
    lines += _spread(found)
    return "\n".join(f"- {line}" for line in lines)


def _spread(found: Sequence[Group]) -> list[str]:
    """How far measurements of the same thing are apart."""
    lines = []
    rounds = [
        (max(row["rounds_us"]) / min(row["rounds_us"]), group, phase, m, side)
        for group in found
        for (phase, m, side), row in group.rows.items()
        if row["rounds_us"]
    ]
    if rounds:
        most, group, phase, m, side = max(rounds, key=lambda one: one[0])
        name = "dense fp8" if side == DENSE else side
        lines.append(
            f"Rounds of one side are up to {100 * (most - 1):.1f} % apart "
            f"({name}, {phase} M={m}, pattern {group.pattern})."
        )
    times: dict[tuple[str, str, int], list[float]] = {}
    for group in found:
        for (phase, m, side), row in group.rows.items():
            if side == DENSE:
                times.setdefault((group.model, phase, m), []).append(row["us"])
    apart = {key: max(own) / min(own) for key, own in times.items() if len(own) > 1}
    if apart:
        key = max(apart, key=lambda one: apart[one])
        lines.append(
            f"Dense fp8 was measured anew with each pattern: its figures are up to "
            f"{100 * (apart[key] - 1):.1f} % apart ({key[1]} M={key[2]})."
        )
    return lines


# --- where the time goes --------------------------------------------------------------------------


def breakdown(results: Sequence[Result]) -> str:
    """Linear layers and the rest of every pass; "" without "end-to-end" results."""
    found = groups(results)
    if not found:
        return ""
    words = (
        "Linear layers alone + rest = pass, in milliseconds. Linear layers, on random inputs of "
        "their own, and pass are measured, the rest is what is left. Share: of the linear layers "
        "in the dense fp8 pass. Linear layers: dense fp8 over sparse. At most: the pass over dense "
        "fp8 if its linear layers were N/(N-1) times as fast and the rest took as long as in the "
        "dense pass; for prefill, where operations are what counts."
    )
    rests = [
        (max(own) / min(own), case, own)
        for group in found
        for case, own in _rests(group).items()
        if min(own) > 0
    ]
    if rests:
        most, case, own = max(rests)
        words += (
            f"\n\nThe rest is the same work on every side. As a difference of two measurements it "
            f"comes out up to {100 * (most - 1):.0f} % apart ({case}: {min(own) / 1e3:.1f} to "
            f"{max(own) / 1e3:.1f} ms); shares and bounds are known no better than that."
        )
    parts = [f"**{group.model} at {group.pattern}**\n\n{_breakdown(group)}" for group in found]
    return "\n\n".join([words, *parts])


def _rests(group: Group) -> dict[str, list[float]]:
    """Microseconds of every side that are not linear layers, by case."""
    found: dict[str, list[float]] = {}
    for (phase, m, _), row in group.rows.items():
        case = f"{group.pattern}, {phase} M={m}"
        found.setdefault(case, []).append(float(row["us"]) - float(row["linear_us"]))
    return found


def _breakdown(group: Group) -> str:
    sides = [BF16, DENSE, *map(group.side, group.dtypes)]
    lines = []
    for phase, m in group.cases():
        dense = group.rows.get((phase, m, DENSE))
        lines.append(
            [
                phase,
                str(m),
                *(_sum(group.rows.get((phase, m, side))) for side in sides),
                "-" if dense is None else f"{100 * dense['linear_us'] / dense['us']:.0f} %",
                *(_cell(group.linear_ratio(phase, m, side)) for side in sides[2:]),
                _cell(group.bound(phase, m)),
            ]
        )
    head = ["phase", "M", "bf16", "dense fp8", *map(short, group.dtypes), "share"]
    head += [f"linear layers {short(dtype)}" for dtype in group.dtypes]
    return table([*head, "at most"], lines)


def _sum(row: Row | None) -> str:
    """A pass as the sum of its parts."""
    if row is None:
        return "-"
    whole, linear = row["us"] / 1e3, row["linear_us"] / 1e3
    sign = "+" if whole >= linear else "-"
    return f"{linear:.2f} {sign} {abs(whole - linear):.2f} = {whole:.2f}"


# --- memory ---------------------------------------------------------------------------------------


def memory(results: Sequence[Result]) -> str:
    """What the plans of every side hold; "" without "end-to-end" results."""
    text = ""
    found = groups(results)
    for model in dict.fromkeys(group.model for group in found):
        own = [group for group in found if group.model == model]
        weights = int(own[-1].result.document["linear_weights"])
        plain = 2 * weights
        dense = max((_held(group, DENSE) or 0.0 for group in own), default=0.0) or None
        dtypes = [one for one in DTYPES if any(one in group.dtypes for group in own)]
        lines, head = [], ["pattern"]
        for dtype in dtypes:
            head += [f"{short(dtype)} GB", "over dense fp8", "over bf16"]
        for group in own:
            line = [group.pattern.name]
            for dtype in dtypes:
                held = _held(group, group.side(dtype))
                line.append(_cell(held and held / 1e9))
                line += [_cell(held and over and held / over) for over in (dense, plain)]
            lines.append(line)
        text += (
            f"{model}: {weights:,} weights in linear layers, {plain / 1e9:.2f} GB in bf16, two "
            f"bytes each. Plans of dense fp8 hold {_cell(dense and dense / 1e9)} GB; those of "
            f"`auto`, which may hold a weight in several forms, each for a range of M:\n\n"
            f"{table(head, lines)}\n\n"
        )
    return text.rstrip()


def _held(group: Group, side: str) -> float | None:
    """Bytes that the plans of a side hold, the most of any row."""
    held = [float(row["bytes"]) for (_, _, of), row in group.rows.items() if of == side]
    return max(held, default=None)


# --- how it was measured --------------------------------------------------------------------------


def conditions(result: Result) -> str:
    """The settings of a file in words, and how its outputs were checked."""
    settings = result.document["settings"]
    shown = [
        f"{words} {settings[key]}"
        for key, words in (
            ("blocks", "blocks:"),
            ("sequence", "tokens of a sequence at prefill: at most"),
            ("context", "tokens behind each sequence at decode:"),
            ("rounds", "rounds:"),
            ("seconds", "seconds of a round: at least"),
            ("tuning", "tuning:"),
        )
        if key in settings
    ]
    cosines = [row["cosine"] for row in result.rows if row["cosine"] is not None]
    if cosines:
        shown.append(
            "cosine of two blocks' logits with those of the same pruned weights in bf16: at least "
            f"{min(cosines):.4f}"
        )
    text = "; ".join(shown)
    return f"{text[:1].upper()}{text[1:]}." if text else ""
