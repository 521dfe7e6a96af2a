"""What pruning costs a language model, from files of benchmarks/accuracy.py, as Markdown.

A file is one trained model: increases are over that model unpruned in bf16, never over another's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ...packing.prune import METHODS
from ...pattern import PATTERNS, Pattern
from .markdown import DTYPES, short, table
from .results import Result, asked

__all__ = ["METHODS", "PLAIN", "UNPRUNED", "Costs", "accuracy", "costs", "facts"]

#: The pattern and the method of rows with nothing pruned.
UNPRUNED, _NONE = "dense", "none"
#: The format that others are compared with.
PLAIN = "bf16"
#: Packages of the text that are named.
_NAMED = 5

Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Costs:
    """The rows of one file.

    Attributes
    ----------
    result:
        The file.
    plain:
        PyTorch's own row, in bf16 with nothing pruned; ``None`` where it has not run.
    rows:
        Those of plans, by pattern, operand format and method.
    """

    result: Result
    plain: Row | None
    rows: Mapping[tuple[str, str, str], Row]

    @property
    def dtypes(self) -> list[str]:
        """Operand formats, bf16 first, those included that were asked for and have not run."""
        seen = {dtype for _, dtype, _ in self.rows} | set(asked(self.result, "dtypes"))
        return sorted(seen & set(DTYPES), key=lambda one: (one != PLAIN, DTYPES.index(one)))

    @property
    def patterns(self) -> list[Pattern]:
        """Patterns, the mildest first, those included that were asked for and have not run."""
        seen = {pattern for pattern, _, _ in self.rows} | set(asked(self.result, "patterns"))
        return [one for one in reversed(PATTERNS) if one.name in seen | {UNPRUNED}]

    def row(self, pattern: str, dtype: str, method: str) -> Row | None:
        """A row; that of "dense" whatever the method."""
        return self.rows.get((pattern, dtype, _NONE if pattern == UNPRUNED else method))

    def more(self, pattern: str, dtype: str, method: str) -> float | None:
        """Bits per byte more than unpruned bf16; ``None`` where it has not run."""
        row = self.row(pattern, dtype, method)
        return None if row is None else float(row["more_bits"])


def costs(results: Sequence[Result]) -> list[Costs]:
    """One for each "accuracy" result."""
    found = []
    for result in results:
        if result.what != "accuracy":
            continue
        own = [row for row in result.rows if row["backends"] == ["torch"]]
        rows = {
            (row["pattern"], row["dtype"], row["method"]): row
            for row in result.rows
            if row["backends"] != ["torch"]
        }
        found.append(Costs(result, own[0] if own else None, rows))
    return found


def accuracy(found: Costs) -> str:
    """The facts, the table and what it comes to."""
    parts = [facts(found.result)]
    if not found.result.document["complete"]:
        parts.append(
            f'`{found.result.name}` is **not complete**: its run ended early, and "-" has not run.'
        )
    if found.plain is not None:
        parts.append(
            f"PyTorch in bf16, nothing pruned: {found.plain['bits_per_byte']:.4f} bits per byte, "
            f'perplexity {found.plain["perplexity"]:.4f}. "More" is counted from there.'
        )
    parts += [_table(found), _words(found)]
    return "\n\n".join(part for part in parts if part)


def facts(result: Result) -> str:
    """Model, text and training of a file."""
    document = result.document
    settings, text, training = document["settings"], document["text"], document["training"]
    packages = list(text["largest"])[:_NAMED]
    lines = [
        f"**Model**: {settings['blocks']} blocks, hidden size {settings['hidden']}, "
        f"{document['linear_weights'] / 1e6:.0f} M weights in linear layers.",
        f"**Text**: {text['files']:,} files, {text['train_bytes'] / 1e6:.0f} MB to train on, most "
        f"of {', '.join(packages)}; {text['held_out_bytes'] / 2**20:.2g} MiB of other files are "
        "measured.",
        f"**Training**: {training['steps']:,} steps in {training['seconds']:.0f} s, "
        f"{training['bytes_seen'] / 1e6:.0f} MB seen; wanda's norms are of "
        f"{int(settings['calibration']) / 2**20:.2g} MiB of the same text.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def _table(found: Costs) -> str:
    lines = []
    for dtype in found.dtypes:
        for pattern in found.patterns:
            line = [short(dtype), pattern.name]
            line.append(f"{100 * pattern.keep / pattern.group:.0f} %")
            for method in METHODS:
                row = found.row(pattern.name, dtype, method)
                if row is None:
                    line += ["-"] * 3
                    continue
                line += [f"{row['bits_per_byte']:.4f}", f"{row['more_bits']:+.4f}"]
                line.append(f"{row['perplexity']:.4f}")
            lines.append(line)
    head = ["type", "pattern", "kept"]
    for method in METHODS:
        head += [f"{method}: bits per byte", "more", "perplexity"]
    return table(head, lines)


def _words(found: Costs) -> str:
    """What formats add, what patterns cost beside 2:4, what wanda saves."""
    lines = []
    for dtype in found.dtypes:
        added = {
            (pattern, method): float(row["bits_per_byte"]) - float(base["bits_per_byte"])
            for (pattern, of, method), row in found.rows.items()
            if of == dtype != PLAIN and (base := found.rows.get((pattern, PLAIN, method)))
        }
        if added:
            most = max(added, key=lambda one: added[one])
            name = most[0] if most[0] == UNPRUNED else f"{most[0]}, {most[1]}"
            lines.append(
                f"{short(dtype)} adds {min(added.values()):.5f} to "
                f"{added[most]:.5f} bits to bf16 of the same pattern and method, most at {name}."
            )
    harshest = found.more("2:4", PLAIN, "magnitude")
    shares, saved = [], []
    for pattern in found.patterns:
        of_magnitude, of_wanda = (found.more(pattern.name, PLAIN, one) for one in METHODS)
        if pattern.name == UNPRUNED or not of_magnitude:
            continue
        if harshest and pattern.name != "2:4":
            shares.append(f"{pattern.name} {100 * of_magnitude / harshest:.1f} %")
        if of_wanda is not None:
            saved.append(f"{pattern.name} {100 * (1 - of_wanda / of_magnitude):.1f} %")
    if shares:
        lines.append(
            f"What the others cost of what 2:4 costs (bf16, magnitude): {', '.join(shares)}."
        )
    if saved:
        lines.append(
            f"What wanda saves of magnitude's increase (bf16): {', '.join(saved)}; below 0 it "
            "costs more."
        )
    return "\n".join(f"- {line}" for line in lines)
