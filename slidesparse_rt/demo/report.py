"""What the demo found: the measures, the rows, and the table that a person reads."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..errors import ShapeError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["Accuracy", "DemoReport", "Exactness", "Row", "average_ranks", "compare", "spearman"]

Floats = npt.NDArray[np.floating[Any]]


def average_ranks(values: Floats) -> npt.NDArray[np.float64]:
    """Ranks 1..n of a 1-D array; equal values share the mean of the ranks that they occupy."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    mean: npt.NDArray[np.float64] = (last - (counts - 1) / 2)[inverse.reshape(-1)]
    return mean


def spearman(a: Floats, b: Floats) -> float:
    """Spearman's rank correlation of two 1-D arrays: Pearson's, of the average ranks.

    NaN where either array has only one distinct value, or holds a NaN: no order, no correlation.

    Raises
    ------
    ShapeError
        Unless both are 1-D, of one length.
    """
    if a.ndim != 1 or a.shape != b.shape:
        raise ShapeError(
            f"rank correlation is of two 1-D arrays of one length; seen {a.shape} and {b.shape}"
        )
    if np.isnan(a).any() or np.isnan(b).any():
        return math.nan
    ranks_a, ranks_b = average_ranks(a), average_ranks(b)
    # The mean of all ranks is (n + 1) / 2, ties or not, and exact: so is a constant array's zero.
    middle = (a.size + 1) / 2
    da, db = ranks_a - middle, ranks_b - middle
    spread = math.sqrt(float(da @ da) * float(db @ db))
    return float(da @ db) / spread if spread else math.nan


@dataclass(frozen=True, kw_only=True, slots=True)
class Accuracy:
    """How far one run's results are from the dense float32 model's.

    Attributes
    ----------
    output_error:
        ``|H - H0| / |H0|`` (Frobenius norms) of the last layer's token embeddings.
    cosine_mean, cosine_min:
        Cosine between a sentence's embedding and the dense model's, over the sentences.
    rank_correlation:
        Spearman's, of the similarities of all pairs of different sentences.
    """

    output_error: float
    cosine_mean: float
    cosine_min: float
    rank_correlation: float


def compare(hidden: Floats, embedded: Floats, hidden0: Floats, embedded0: Floats) -> Accuracy:
    """Measure a run against the dense one (``...0``).

    ``hidden`` is (tokens, hidden); ``embedded`` is (sentences, hidden) with rows of length 1.
    """
    h, h0, e, e0 = (part.astype(np.float64) for part in (hidden, hidden0, embedded, embedded0))
    cosine = np.sum(e * e0, axis=1) / (np.linalg.norm(e, axis=1) * np.linalg.norm(e0, axis=1))
    pairs = np.triu_indices(len(e), k=1)
    return Accuracy(
        output_error=float(np.linalg.norm(h - h0) / np.linalg.norm(h0)),
        cosine_mean=float(cosine.mean()),
        cosine_min=float(cosine.min()),
        rank_correlation=spearman((e @ e.T)[pairs], (e0 @ e0.T)[pairs]),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class Exactness:
    """What checking every linear layer of one run found.

    Attributes
    ----------
    layers:
        Layers checked, each on the activations that it met.
    restored:
        Layers whose slid weight, unslid, is the weight again, value by value.
    same_product:
        Layers where slide(W) @ lift(X) equals W @ X in exact arithmetic on the operands.
    same_result:
        Layers where the plan returned, to the bit, what scaling that product gives.
    difference:
        Largest difference between the plan's result and that, over the largest magnitude in it;
        the worst of all layers.
    """

    layers: int
    restored: int
    same_product: int
    same_result: int
    difference: float

    @property
    def lossless(self) -> bool:
        """Whether every layer was restored and gave the same product."""
        return self.layers == self.restored == self.same_product


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One run of the model: a pattern and an arithmetic.

    ``kept`` is the share of the linear layers' weights that pruning left nonzero.  ``exactness``
    is ``None`` for float32 rows, where nothing was packed.  ``backend`` is what multiplied.
    ``pack_seconds`` is pruning, quantizing and preparing all layers; ``run_seconds`` one forward
    pass over all sentences; each the better of two.
    """

    pattern: str
    dtype: str
    kept: float
    accuracy: Accuracy
    exactness: Exactness | None
    pack_seconds: float
    run_seconds: float
    backend: str


@dataclass(frozen=True, kw_only=True, slots=True)
class DemoReport:
    """All runs of the demo, the dense float32 model first; see ``docs/demo.md``.

    ``machine`` says what it ran on, ``seconds`` how long the demo took in all.
    """

    model: str
    linears: int
    sentences: int
    tokens: int
    rows: tuple[Row, ...]
    machine: str
    seconds: float

    @property
    def lossless(self) -> bool:
        """Whether packing changed no product in any run."""
        return all(row.exactness.lossless for row in self.rows if row.exactness is not None)

    def to_json(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and numbers (NaN becomes None)."""
        rows = []
        for row in self.rows:
            plain = asdict(row)
            for part in (plain["accuracy"], plain["exactness"] or {}):
                part.update({key: None for key, value in part.items() if math.isnan(value)})
            plain["lossless"] = None if row.exactness is None else row.exactness.lossless
            rows.append(plain)
        return {
            "model": self.model,
            "linear_layers": self.linears,
            "sentences": self.sentences,
            "tokens": self.tokens,
            "machine": self.machine,
            "seconds": self.seconds,
            "lossless": self.lossless,
            "rows": rows,
            "conclusion": self.conclusion(),
        }

    def conclusion(self) -> list[str]:
        """What the numbers say, in sentences; derived from the rows, however they came out."""
        return [*_say_lossless(self.rows), *_say_accuracy(self.rows)]

    def render(self, console: Console) -> None:
        """Print the table, and below it what its numbers say; fits 80 columns."""
        from rich import box
        from rich.table import Table

        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
        table.add_column("pattern")
        table.add_column("type")
        for title in ("kept", "loss-\nless", "output\nerror", "cosine\nmean", "cosine\nmin"):
            table.add_column(title, justify="right")
        for title in ("rank\ncorr.", "pack\nms", "run\nms"):
            table.add_column(title, justify="right")
        previous = None
        for row in self.rows:
            if previous is not None and previous != row.pattern:
                table.add_section()
            exact = row.exactness
            table.add_row(
                row.pattern if previous != row.pattern else "",
                row.dtype,
                f"{row.kept:.1%}",
                "-" if exact is None else ("yes" if exact.lossless else "[bold red]NO[/]"),
                _number(row.accuracy.output_error),
                _number(row.accuracy.cosine_mean),
                _number(row.accuracy.cosine_min),
                _number(row.accuracy.rank_correlation),
                f"{1e3 * row.pack_seconds:.0f}" if exact is not None else "-",
                f"{1e3 * row.run_seconds:.0f}",
            )
            previous = row.pattern
        console.print(
            f"{self.model}: {self.linears} linear layers, pruned by magnitude, not retrained;\n"
            f"{self.sentences} sentences, {self.tokens} tokens; compared with the dense float32 "
            f"model.",
            highlight=False,
        )
        console.print(table)
        for sentence in self.conclusion():
            console.print(sentence, highlight=False)
        packed = sorted({row.backend for row in self.rows if row.exactness is not None})
        ran = f"Packed layers ran on: {', '.join(packed)}; the rest in NumPy. " if packed else ""
        slow = (
            "The reference backend is there to be exact: its times say nothing about a GPU's. "
            if "reference" in packed
            else ""
        )
        console.print(f"{ran}{slow}{self.machine}. {self.seconds:.0f} s in all.", highlight=False)


def _number(value: float) -> str:
    return "n/a" if math.isnan(value) else f"{value:.4f}"


def _say_lossless(rows: Sequence[Row]) -> Iterable[str]:
    """One sentence about the check of every layer; names what failed if anything did."""
    packed = [(row, row.exactness) for row in rows if row.exactness is not None]
    if not packed:
        return
    failed = [f"{row.pattern} {row.dtype}" for row, exact in packed if not exact.lossless]
    layers = sum(exact.layers for _, exact in packed)
    if failed:
        yield f"NOT LOSSLESS: packing changed weights or products in {', '.join(failed)}."
        return
    same = sum(exact.same_result for _, exact in packed)
    worst = max(exact.difference for _, exact in packed)
    told = (
        "and the plans returned that product, scaled, to the bit"
        if same == layers
        else f"and the plans returned that product, scaled, to the bit in {same} of them, and "
        f"elsewhere within {worst:.1e} of the largest value"
    )
    yield (
        f"Lossless: in all {layers} layer runs ({len(packed)} packed models) the slid weight times "
        f"the lifted activations was the unslid product exactly, {told}."
    )


def _say_accuracy(rows: Sequence[Row]) -> Iterable[str]:
    """Whether milder patterns kept more accuracy, and what pruning and quantizing cost alone."""
    ladders: dict[str, list[Row]] = {}
    for row in sorted(rows, key=lambda row: row.kept):
        if row.pattern != "dense":
            ladders.setdefault(row.dtype, []).append(row)
    if not ladders:
        return
    every = list(ladders.values())
    strictest, mildest = every[0][0], every[0][-1]
    if strictest is not mildest:
        steps = [all(_better(b, a) for a, b in pairwise(ladder)) for ladder in every]
        ends = [_better(ladder[-1], ladder[0]) for ladder in every]
        if all(steps):
            yield (
                f"Milder patterns keep accuracy that {strictest.pattern} loses: the more weights "
                f"a pattern keeps, the smaller the output error and the larger the rank "
                f"correlation, in every type."
            )
        elif all(ends):
            yield (
                f"{mildest.pattern} keeps accuracy that {strictest.pattern} loses, but not every "
                f"pattern in between beats the next stricter one in both error and ranks."
            )
        else:
            yield (
                f"{mildest.pattern} keeps more weights than {strictest.pattern}, but here not "
                f"more accuracy: output error and rank correlation are not both better in every "
                f"type."
            )
    pruning = ", ".join(
        f"{_number(row.accuracy.output_error)} ({row.pattern})"
        for row in ladders.get("float32", ())
    )
    quantizing = ", ".join(
        f"{_number(row.accuracy.output_error)} ({row.dtype})"
        for row in rows
        if row.pattern == "dense" and row.dtype != "float32"
    )
    if pruning and quantizing:
        yield (
            f"Output error of pruning alone, in float32: {pruning}; of quantizing alone, without "
            f"pruning: {quantizing}."
        )


def _better(a: Row, b: Row) -> bool:
    """Whether ``a`` has both the smaller output error and the larger rank correlation."""
    return (
        a.accuracy.output_error < b.accuracy.output_error
        and a.accuracy.rank_correlation > b.accuracy.rank_correlation
    )
