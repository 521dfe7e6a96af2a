"""Options as frozen, keyword-only dataclasses, checked when they are made."""

from __future__ import annotations

import os
from dataclasses import dataclass

from .errors import OptionError

__all__ = ["PlanOptions", "worker_count"]

_LEAST_WORKSPACE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How a plan prepares and runs.

    Attributes
    ----------
    threads:
        CPU threads for packing; ``None`` takes every core that this process may use.
    workspace_limit:
        Bytes of GPU workspace that quantized tokens and sums of one launch may take, at least 1
        MiB.  A product that would need more is done in several launches over tokens, each of 256
        tokens at least.  What a library needs besides (some megabytes) is not counted.
    """

    threads: int | None = None
    workspace_limit: int = 2 << 30

    def __post_init__(self) -> None:
        worker_count(self.threads)
        limit = self.workspace_limit
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < _LEAST_WORKSPACE:
            raise OptionError(
                f"workspace_limit is {limit!r}; allowed is a whole number of bytes from "
                f"{_LEAST_WORKSPACE} (1 MiB) on"
            )


def worker_count(threads: int | None) -> int:
    """CPU threads to use for ``threads`` (``None``: every core this process may run on).

    Raises OptionError for anything but ``None`` or a whole number from 1 to 1024.
    """
    if threads is None:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise OptionError(
            f"threads is {threads!r}; allowed is None or a whole number from 1 to 1024"
        )
    return threads
