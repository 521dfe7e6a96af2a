"""Options as frozen, keyword-only dataclasses, checked when they are made."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import OptionError

__all__ = ["BACKENDS", "PlanOptions", "worker_count"]

#: Names that ``backend=`` takes; "auto" chooses among the others.
BACKENDS = ("auto", "cusparselt", "dense", "reference")


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How a plan prepares and runs.

    Attributes
    ----------
    threads:
        CPU threads for packing; ``None`` takes every core that this process may use.
    """

    threads: int | None = None

    def __post_init__(self) -> None:
        worker_count(self.threads)


def worker_count(threads: int | None) -> int:
    """CPU threads to use for ``threads`` (``None``: every core this process may run on).

    Raises OptionError for anything but ``None`` or a whole number from 1 to 1024.
    """
    if threads is None:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise OptionError(f"threads is {threads!r}; allowed is None or a whole number from 1 to 1024")
    return threads
