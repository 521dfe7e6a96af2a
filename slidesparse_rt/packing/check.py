"""Checking that a weight fits its pattern."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..arrays import NDArray, as_matrix
from ..errors import NonFiniteError, PatternError
from ..pattern import Pattern
from ._rows import over_rows
from .bits import bit_rule

__all__ = ["PatternReport", "check_pattern", "check_values", "pattern_report", "values_report"]


@dataclass(frozen=True, slots=True)
class PatternReport:
    """What :func:`pattern_report` found in a weight of ``size`` = N*K elements.

    Attributes
    ----------
    groups:
        Groups in all: N * ceil(K / group).
    violations:
        Groups with more than ``keep`` nonzeros.
    nonzeros:
        Elements that are neither +0 nor -0.
    size:
        N * K.
    first:
        (row, group, nonzeros found) of the first violation in row order, or ``None``.
    """

    groups: int
    violations: int
    nonzeros: int
    size: int
    first: tuple[int, int, int] | None


def check_pattern(weight: Any, pattern: str | Pattern, *, threads: int | None = None) -> None:
    """Raise unless ``weight`` fits ``pattern`` and is finite.

    Parameters
    ----------
    weight:
        Shape (N, K), float32, float16 or bfloat16, any library's host array, any strides.  A last
        group shorter than the pattern's is treated as if padded with zeros.
    pattern:
        "2:4", "4:6", "6:8", ..., or "dense".
    threads:
        CPU threads; ``None`` takes every core.

    Raises
    ------
    PatternError
        If a group holds too many nonzeros: names the first one, what it holds, what is allowed,
        and how many groups do not fit.
    NonFiniteError
        If there is a NaN or an infinity; names the first row that has one.
    ShapeError, DTypeError, ArrayError, DeviceError, OptionError
        For inputs that are not as described.
    """
    parsed = Pattern.parse(pattern)
    check_values(as_matrix(weight, "weight", "(N, K)"), parsed, "weight", threads=threads)


def pattern_report(
    weight: Any, pattern: str | Pattern, *, threads: int | None = None
) -> PatternReport:
    """Count what :func:`check_pattern` would refuse, without refusing it.

    Takes the same arguments.  NonFiniteError and errors about the array itself are still raised.
    """
    parsed = Pattern.parse(pattern)
    return values_report(as_matrix(weight, "weight", "(N, K)"), parsed, "weight", threads=threads)


def check_values(values: NDArray, pattern: Pattern, what: str, *, threads: int | None) -> None:
    """:func:`check_pattern` for a NumPy matrix of any type that packing knows."""
    refuse_misfit(
        values_report(values, pattern, what, threads=threads), pattern, values.shape[1], what
    )


def refuse_misfit(report: PatternReport, pattern: Pattern, columns: int, what: str) -> None:
    """Raise the PatternError for a report that has violations."""
    if report.first is None:
        return
    row, group, found = report.first
    start = group * pattern.group
    stop = min(start + pattern.group, columns)
    raise PatternError(
        f"{what} does not fit pattern {pattern.name}: row {row}, group {group} (columns {start} to "
        f"{stop - 1}) has {found} nonzeros, allowed are {pattern.keep}; {report.violations} of "
        f"{report.groups} groups have too many; prune it first: "
        f"slidesparse_rt.prune({what}, {pattern.name!r})",
        row=row,
        group=group,
        found=found,
        allowed=pattern.keep,
        violations=report.violations,
    )


def values_report(
    values: NDArray, pattern: Pattern, what: str, *, threads: int | None
) -> PatternReport:
    """:func:`pattern_report` for a NumPy matrix of any type that packing knows."""
    from ._kernels import scan

    rule = bit_rule(values.dtype, what)
    rows, columns = values.shape

    def work(start: int, stop: int) -> tuple[int, tuple[int, ...]]:
        block = rule.bits(values[start:stop])
        return start, scan(block, rule.mask, rule.limit, pattern.group, pattern.keep)

    violations = nonzeros = 0
    first: tuple[int, int, int] | None = None
    for start, found in over_rows(rows, columns, work, threads):
        count, filled, row, group, held, bad_row, bad_column = found
        if bad_row >= 0:
            at = (start + bad_row, bad_column)
            refuse_nonfinite(float(values[at]), *at, what)
        violations += count
        nonzeros += filled
        if first is None and row >= 0:
            first = (start + row, group, held)
    return PatternReport(
        groups=rows * pattern.groups(columns),
        violations=violations,
        nonzeros=nonzeros,
        size=values.size,
        first=first,
    )


def refuse_nonfinite(value: float, row: int, column: int, what: str) -> None:
    """Raise the NonFiniteError for one element."""
    raise NonFiniteError(
        f"{what} holds {value} at row {row}, column {column}; weights must be finite"
    )
