"""``slidesparse inspect``: which tensors of a safetensors file fit which patterns."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..convert.quantized import QUANTIZED
from ..dtypes import operand, storage_bits
from ..errors import NonFiniteError
from ..packing import SparseWeight, TensorFile
from ..packing.check import values_report
from ..packing.weight import FORMAT
from ..pattern import PATTERNS, Pattern
from .console import meter, printable, share, show_table, size_text, styled
from .files import Entry, entries_of, render_skipped

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from rich.console import Console

    from ..packing import PatternReport

__all__ = ["Finding", "InspectReport", "inspect_file", "look"]


@dataclass(frozen=True, slots=True)
class Finding:
    """What inspecting one tensor found.

    Attributes
    ----------
    entry:
        The tensor.
    reports:
        One for each pattern asked for; empty where ``problem`` is set.
    sparsest:
        The sparsest of all patterns that it fits; ``None`` if that is only "dense".
    problem:
        Why it cannot be checked (a NaN or an infinity); empty if it can.
    """

    entry: Entry
    reports: Mapping[str, PatternReport]
    sparsest: Pattern | None = None
    problem: str = ""

    @property
    def zeros(self) -> int:
        """Elements that are zero."""
        report = next(iter(self.reports.values()))
        return report.size - report.nonzeros

    @property
    def int8_bytes(self) -> int:
        """Bytes as dense int8, with a float32 scale a row."""
        return self.entry.size + 4 * self.entry.shape[0]

    def packed_bytes(self, pattern: Pattern) -> int:
        """Bytes as int8 in 2:4-compressed windows (values and positions), with a scale a row."""
        n, k = self.entry.shape
        bits = storage_bits(operand("int8").bits, pattern.group, pattern.windows)[1]
        return -(-n * pattern.groups(k) * bits // 8) + 4 * n

    def to_json(self) -> dict[str, Any]:
        """The finding as plain dictionaries, lists, strings and numbers."""
        plain = {**self.entry.to_json(), "int8_bytes": self.int8_bytes}
        if self.problem:
            return plain | {"problem": self.problem}
        fits = {}
        for name, report in self.reports.items():
            first = report.first
            fits[name] = {
                "fits": report.violations == 0,
                "groups": report.groups,
                "violations": report.violations,
                "first_violation": None
                if first is None
                else {"row": first[0], "group": first[1], "nonzeros": first[2]},
                "int8_packed_bytes": self.packed_bytes(Pattern.parse(name)),
            }
        return plain | {
            "zeros": self.zeros,
            "sparsest": None if self.sparsest is None else self.sparsest.name,
            "patterns": fits,
        }

    def cells(self, patterns: Sequence[Pattern]) -> list[str]:
        """The tensor's row of the table."""
        entry = self.entry
        row = [printable(entry.name), entry.shape_text, entry.dtype]
        if self.problem:
            return row + ["-"] * (len(patterns) + 2) + [size_text(entry.nbytes)]
        row.append(share(self.zeros, entry.size))
        for pattern in patterns:
            bad = self.reports[pattern.name].violations
            row.append("fits" if bad == 0 else f"{bad:,} bad")
        sparsest = "none" if self.sparsest is None else self.sparsest.name
        return [*row, sparsest, size_text(entry.nbytes)]


@dataclass(frozen=True, kw_only=True, slots=True)
class Tally:
    """One pattern over all tensors: how many fit, their bad groups, and bytes if all are packed."""

    pattern: Pattern
    fit: int
    tensors: int
    bad: int
    groups: int
    packed_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class InspectReport:
    """What :func:`inspect_file` found; ``packed`` is set if the file is a saved SparseWeight."""

    path: Path
    nbytes: int
    metadata: Mapping[str, str]
    packed: SparseWeight | None
    patterns: tuple[Pattern, ...]
    findings: tuple[Finding, ...]
    entries: tuple[Entry, ...]

    def tally(self, pattern: Pattern) -> Tally:
        """Sum up one pattern."""
        sound = [finding for finding in self.findings if not finding.problem]
        reports = [finding.reports[pattern.name] for finding in sound]
        return Tally(
            pattern=pattern,
            fit=sum(report.violations == 0 for report in reports),
            tensors=len(self.findings),
            bad=sum(report.violations for report in reports),
            groups=sum(report.groups for report in reports),
            packed_bytes=sum(finding.packed_bytes(pattern) for finding in self.findings),
        )

    def to_json(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and numbers."""
        packed = self.packed
        tallies = [self.tally(pattern) for pattern in self.patterns]
        return {
            "file": str(self.path),
            "bytes": self.nbytes,
            "metadata": dict(self.metadata),
            "sparse_weight": None
            if packed is None
            else {
                "shape": list(packed.shape),
                "pattern": packed.pattern.name,
                "dtype": packed.dtype.name,
                "bytes": packed.nbytes,
            },
            "tensors": [finding.to_json() for finding in self.findings],
            "skipped": [
                {**entry.to_json(), "reason": entry.skip} for entry in self.entries if entry.skip
            ],
            "totals": {
                "bytes": sum(finding.entry.nbytes for finding in self.findings),
                "int8_bytes": sum(finding.int8_bytes for finding in self.findings),
                "patterns": {
                    tally.pattern.name: {
                        "fit": tally.fit,
                        "tensors": tally.tensors,
                        "violations": tally.bad,
                        "groups": tally.groups,
                        "int8_packed_bytes": tally.packed_bytes,
                    }
                    for tally in tallies
                },
            },
        }

    def render(self, screen: Console) -> None:
        """Print the report for people."""
        screen.print(f"{self.path}: {size_text(self.nbytes)}", soft_wrap=True)
        packed = self.packed
        if packed is not None:
            screen.print(
                f"a packed SparseWeight: {packed.n} outputs x {packed.k} inputs, pattern "
                f"{packed.pattern.name}, {packed.dtype.name}, {size_text(packed.nbytes)}",
                soft_wrap=True,
            )
        if self.metadata:
            words = ", ".join(f"{key}={value}" for key, value in sorted(self.metadata.items()))
            screen.print(f"metadata: {printable(words)}", soft_wrap=True)
        if self.findings:
            titles = ["tensor", "shape", "type", "zeros"]
            titles += [pattern.name for pattern in self.patterns]
            titles += ["sparsest\nthat fits", "in file"]
            rows = [finding.cells(self.patterns) for finding in self.findings]
            show_table(screen, titles, rows, left=3)
            self._render_totals(screen)
        else:
            screen.print("no two-dimensional float tensor, so nothing that could fit a pattern")
        for finding in self.findings:
            if finding.problem:
                words = f"{printable(finding.entry.name)}: {finding.problem}"
                screen.print(styled(words, "yellow"), soft_wrap=True)
        render_skipped(screen, self.entries, "skipped")

    def _render_totals(self, screen: Console) -> None:
        dense = sum(finding.entry.nbytes for finding in self.findings)
        int8 = sum(finding.int8_bytes for finding in self.findings)
        rows = []
        for pattern in self.patterns:
            tally = self.tally(pattern)
            rows.append(
                (
                    pattern.name,
                    f"{tally.fit} of {tally.tensors}",
                    f"{tally.bad:,} ({share(tally.bad, tally.groups)})",
                    size_text(dense),
                    size_text(int8),
                    size_text(tally.packed_bytes),
                )
            )
        titles = ("pattern", "tensors that fit", "bad groups", "in file", "int8", "int8 packed")
        show_table(screen, titles, rows)
        screen.print(
            "bad: groups with more nonzeros than the pattern keeps. int8 packed: 2:4-compressed "
            "windows with one scale a row, for weights that fit.",
            soft_wrap=True,
        )


def inspect_file(
    path: Path, *, patterns: Sequence[str], threads: int | None = None
) -> InspectReport:
    """Check every matrix of floats, and every 8-bit weight with scales, against ``patterns``.

    Parameters
    ----------
    path:
        A safetensors file, a saved SparseWeight included.
    patterns:
        At least one.
    threads:
        CPU threads; ``None`` takes every core.

    Raises
    ------
    PatternError
        For a pattern that does not exist.
    FormatError
        If the file is not intact, or is a SparseWeight that contradicts itself.
    OSError
        If it cannot be read.
    """
    wanted = tuple(dict.fromkeys(Pattern.parse(spec) for spec in patterns))
    with TensorFile(path) as file:
        names = set(file.keys())
        entries = [_with_quantized(entry, names) for entry in entries_of(file)]
        todo = [entry for entry in entries if not entry.skip]
        packed = None
        if file.metadata.get("format") == FORMAT:
            packed = SparseWeight.load(path)
            todo = [entry for entry in entries if entry.name == "values"]
            entries = todo
        findings = []
        with meter(len(todo), sum(entry.nbytes for entry in todo)) as progress:
            for entry in todo:
                progress.begin(entry.name)
                # Only zeros matter, and dequantizing keeps them: scales are positive.
                values = file.read(entry.name) if packed is None else packed.dequantize()
                findings.append(look(entry, values, wanted, threads))
                progress.advance(entry.nbytes)
        return InspectReport(
            path=path,
            nbytes=path.stat().st_size,
            metadata=file.metadata,
            packed=packed,
            patterns=wanted,
            findings=tuple(findings),
            entries=tuple(entry for entry in entries if packed is None),
        )


def _with_quantized(entry: Entry, names: Set[str]) -> Entry:
    """The entry; an 8-bit weight that has scales is not skipped, and its scales are."""
    module, _, leaf = entry.name.rpartition(".")
    if leaf == "weight_scale" and f"{module}.weight" in names:
        return replace(entry, skip="scales of a weight")
    matrix = entry.dtype in QUANTIZED and len(entry.shape) == 2 and 0 not in entry.shape
    if matrix and leaf == "weight" and f"{entry.name}_scale" in names:
        return replace(entry, skip="")
    return entry


def look(
    entry: Entry, values: NDArray[Any], wanted: Sequence[Pattern], threads: int | None
) -> Finding:
    """Check one matrix of any type that packing knows."""
    try:
        reports = {
            pattern.name: values_report(values, pattern, "weight", threads=threads)
            for pattern in wanted
        }
    except NonFiniteError as error:
        return Finding(entry, {}, problem=str(error))
    return Finding(entry, reports, _sparsest(values, reports, threads))


def _sparsest(
    values: NDArray[Any], reports: Mapping[str, PatternReport], threads: int | None
) -> Pattern | None:
    """The sparsest pattern that ``values`` fits; ``None`` if that is only "dense"."""
    rows, columns = values.shape
    nonzeros = next(iter(reports.values())).nonzeros
    for pattern in PATTERNS[:-1]:
        rest = min(columns % pattern.group, pattern.keep)
        if nonzeros > rows * (columns // pattern.group * pattern.keep + rest):
            continue  # more nonzeros than the pattern has room for: no need to look
        report = reports.get(pattern.name) or values_report(
            values, pattern, "weight", threads=threads
        )
        if report.violations == 0:
            return pattern
    return None
