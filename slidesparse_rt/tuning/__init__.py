"""Which backend runs for how many tokens: measured, kept for the next process, and chosen.

``table`` chooses from times, ``measure`` takes them on a GPU, ``cache`` keeps them on disk, and
``select`` is what a plan asks.  docs/tuning.md describes it all.
"""

from __future__ import annotations

from .table import BUCKETS, Dispatch, Table

__all__ = ["BUCKETS", "Dispatch", "Table"]
