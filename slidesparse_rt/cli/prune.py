"""``slidesparse prune``: the linear layers of one safetensors file."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import FormatError, OptionError, SlideSparseError
from ..packing import TensorFile, write_file
from ..packing import prune as prune_weight
from ..packing._rows import over_rows
from ..packing.prune import METHODS
from ..packing.weight import FORMAT
from ..pattern import Pattern
from .console import meter, printable, share, show_table, size_text
from .files import Entry, entries_of, render_skipped

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console

__all__ = ["DEFAULT_EXCLUDE", "DEFAULT_INCLUDE", "Change", "PruneReport", "prune_file"]

DEFAULT_INCLUDE = ("*.weight",)
DEFAULT_EXCLUDE = ("*embed*", "*norm*")

#: Names that a message lists before it says "and more".
_LISTED = 12


@dataclass(frozen=True, slots=True)
class Change:
    """What pruning did to one tensor; energies are sums of squares in float64."""

    entry: Entry
    energy_before: float
    energy_after: float
    zeros_before: int
    zeros_after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class PruneReport:
    """What :func:`prune_file` did; ``entries`` are all tensors of the file."""

    source: Path
    target: Path
    pattern: Pattern
    method: str
    changes: tuple[Change, ...]
    entries: tuple[Entry, ...]
    seconds: float

    def totals(self) -> dict[str, Any]:
        """Sums over the pruned tensors."""
        return {
            "tensors": len(self.changes),
            "weights": sum(change.entry.size for change in self.changes),
            "bytes": sum(change.entry.nbytes for change in self.changes),
            "kept_energy": _kept(
                sum(change.energy_before for change in self.changes),
                sum(change.energy_after for change in self.changes),
            ),
            "zeros_before": sum(change.zeros_before for change in self.changes),
            "zeros_after": sum(change.zeros_after for change in self.changes),
            "seconds": self.seconds,
        }

    def to_json(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and numbers."""
        return {
            "input": str(self.source),
            "output": str(self.target),
            "pattern": self.pattern.name,
            "method": self.method,
            "pruned": [
                {
                    **change.entry.to_json(),
                    "kept_energy": _kept(change.energy_before, change.energy_after),
                    "zeros_before": change.zeros_before,
                    "zeros_after": change.zeros_after,
                }
                for change in self.changes
            ],
            "copied": [
                {**entry.to_json(), "reason": entry.skip} for entry in self.entries if entry.skip
            ],
            "totals": self.totals(),
        }

    def render(self, screen: Console) -> None:
        """Print the report for people."""
        rows = [
            (
                printable(change.entry.name),
                change.entry.shape_text,
                change.entry.dtype,
                f"{_kept(change.energy_before, change.energy_after):.2%}",
                share(change.zeros_before, change.entry.size),
                share(change.zeros_after, change.entry.size),
            )
            for change in self.changes
        ]
        titles = ("pruned tensor", "shape", "type", "kept energy", "zeros before", "zeros after")
        show_table(screen, titles, rows, left=3)
        totals = self.totals()
        screen.print(
            f"{totals['tensors']} tensors pruned to {self.pattern.name} by {self.method}: "
            f"{totals['kept_energy']:.2%} of the energy (sum of squares) kept; zeros "
            f"{share(totals['zeros_before'], totals['weights'])} -> "
            f"{share(totals['zeros_after'], totals['weights'])} of {totals['weights']:,} weights.",
            soft_wrap=True,
        )
        render_skipped(screen, self.entries, "copied unchanged")
        screen.print(
            f"Wrote {self.target} ({size_text(self.target.stat().st_size)}) in "
            f"{self.seconds:.1f} s. Zeros are stored like other numbers: pruning alone makes no "
            f"file smaller.",
            soft_wrap=True,
        )


def prune_file(
    source: Path,
    target: Path,
    *,
    pattern: str,
    method: str = "magnitude",
    norms: Path | None = None,
    include: Sequence[str] = DEFAULT_INCLUDE,
    exclude: Sequence[str] = DEFAULT_EXCLUDE,
    threads: int | None = None,
    force: bool = False,
) -> PruneReport:
    """Prune the weights of ``source`` into ``target``; the parameters are the command's options.

    Raises
    ------
    OptionError
        For options that contradict each other or the files, and where no tensor is chosen.
    FormatError
        For norms that do not fit their weight, and for files that are not intact.
    SlideSparseError, OSError
        Whatever reading, pruning or writing raises; ``target`` is then as it was before.
    """
    began = time.perf_counter()
    parsed = Pattern.parse(pattern)
    _check_method(method, norms)
    _check_target(source, target, norms, force)
    with TensorFile(source) as file:
        if file.metadata.get("format") == FORMAT:
            raise OptionError(
                f"{source} is a packed SparseWeight of pattern {file.metadata.get('pattern')!r}; "
                f"prune the checkpoint that it was made from"
            )
        entries = _chosen(entries_of(file), include, exclude)
        todo = [entry for entry in entries if not entry.skip]
        if not todo:
            raise OptionError(_nothing_chosen(source, entries))
        weighing = _read_norms(norms, todo)
        tensors = {entry.name: file.read(entry.name) for entry in entries}
        changes = []
        with meter(len(todo), sum(entry.nbytes for entry in todo)) as progress:
            for entry in todo:
                progress.begin(entry.name)
                before = tensors[entry.name]
                after = _prune_one(
                    entry.name, before, parsed, method, weighing.get(entry.name), threads
                )
                changes.append(Change(entry, *_measure(before, after, threads)))
                tensors[entry.name] = after
                progress.advance(entry.nbytes)
            progress.finish(f"writing {target.name}")
            write_file(target, tensors, file.metadata)
    return PruneReport(
        source=source,
        target=target,
        pattern=parsed,
        method=method,
        changes=tuple(changes),
        entries=tuple(entries),
        seconds=time.perf_counter() - began,
    )


def _check_method(method: str, norms: Path | None) -> None:
    if method not in METHODS:
        raise OptionError(f"method {method!r} is unknown; allowed are {', '.join(METHODS)}")
    if method == "wanda" and norms is None:
        raise OptionError(
            "method 'wanda' weighs each input by its norm over calibration tokens; give --norms, a "
            "safetensors file with one tensor of shape (K,) for each weight, or use --method "
            "magnitude"
        )
    if method != "wanda" and norms is not None:
        raise OptionError(f"--norms is given, but method {method!r} ignores norms; use 'wanda'")


def _check_target(source: Path, target: Path, norms: Path | None, force: bool) -> None:
    if not target.exists():
        folder = target.absolute().parent
        if not folder.is_dir():
            raise OptionError(f"{folder} is no folder; make it first, or give another OUT")
        return
    for role, path in (("IN", source), ("--norms", norms)):
        if path is not None and target.samefile(path):
            raise OptionError(
                f"OUT ({target}) and {role} ({path}) are the same file; pruning cannot be undone, "
                f"so give OUT another name"
            )
    if not force:
        raise OptionError(f"{target} exists; give another OUT, or --force to replace it")


def _chosen(
    entries: Iterable[Entry], include: Sequence[str], exclude: Sequence[str]
) -> list[Entry]:
    """The same entries; ``skip`` is left empty for those to prune."""
    chosen = []
    for entry in entries:
        excluded = _first_fit(entry.name, exclude)
        skip = entry.skip
        if _first_fit(entry.name, include) is None:
            skip = f"does not fit --include {' '.join(include)}"
        elif excluded is not None:
            skip = f"fits --exclude {excluded}"
        chosen.append(replace(entry, skip=skip))
    return chosen


def _first_fit(name: str, globs: Iterable[str]) -> str | None:
    """The first glob that fits ``name``, upper and lower case alike."""
    return next((glob for glob in globs if fnmatchcase(name.lower(), glob.lower())), None)


def _nothing_chosen(source: Path, entries: Sequence[Entry]) -> str:
    if not entries:
        return f"{source} holds no tensor at all"
    lines = [f"{source} has no tensor to prune; choose with --include and --exclude; it has:"]
    lines += [
        f"  {printable(entry.name)} ({entry.shape_text}, {entry.dtype}): {entry.skip}"
        for entry in entries[:_LISTED]
    ]
    if len(entries) > _LISTED:
        lines.append(f"  and {len(entries) - _LISTED} more")
    return "\n".join(lines)


def _read_norms(path: Path | None, todo: Sequence[Entry]) -> dict[str, NDArray[Any]]:
    """The input norms of every tensor to prune; empty without a file."""
    if path is None:
        return {}
    with TensorFile(path) as file:
        known = set(file.keys())
        absent = [entry.name for entry in todo if entry.name not in known]
        if absent:
            more = f" and {len(absent) - _LISTED} more" if len(absent) > _LISTED else ""
            raise OptionError(
                f"{path} has no norms for {', '.join(map(repr, absent[:_LISTED]))}{more}; add them "
                f"under these names, or leave these tensors out with --exclude"
            )
        for entry in todo:
            shape, dtype = file.shape(entry.name), file.dtype_name(entry.name)
            if shape != entry.shape[1:] or dtype != "F32":
                raise FormatError(
                    f"norms {entry.name!r} in {path} are {dtype} of shape {shape}; needed is F32 "
                    f"of shape ({entry.shape[1]},), one for each input of the weight"
                )
        return {entry.name: file.read(entry.name) for entry in todo}


def _prune_one(
    name: str,
    weight: NDArray[Any],
    pattern: Pattern,
    method: str,
    norms: NDArray[Any] | None,
    threads: int | None,
) -> NDArray[Any]:
    """Prune one tensor; errors say which one it was."""
    try:
        pruned: NDArray[Any] = prune_weight(
            weight, pattern, method=method, norms=norms, threads=threads
        )
    except SlideSparseError as error:
        error.args = (f"tensor {name!r}: {error}",)
        raise
    return pruned


def _measure(
    before: NDArray[Any], after: NDArray[Any], threads: int | None
) -> tuple[float, float, int, int]:
    """(energy before, energy after, zeros before, zeros after)."""

    def work(start: int, stop: int) -> tuple[float, float, int, int]:
        old, new = (array[start:stop].astype(np.float64).reshape(-1) for array in (before, after))
        return (
            float(old @ old),
            float(new @ new),
            old.size - int(np.count_nonzero(old)),
            new.size - int(np.count_nonzero(new)),
        )

    rows, columns = before.shape
    parts = over_rows(rows, columns, work, threads)
    return (
        sum(part[0] for part in parts),
        sum(part[1] for part in parts),
        sum(part[2] for part in parts),
        sum(part[3] for part in parts),
    )


def _kept(before: float, after: float) -> float:
    """Share of the energy that is left; from nothing, nothing can be lost."""
    return after / before if before > 0 else 1.0
