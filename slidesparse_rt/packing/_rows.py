"""Work over the rows of a matrix, on several threads.

The kernels release the GIL, so plain threads use every core.  Numba's own ``parallel=True`` is not
used: its default threading layer aborts the process when two Python threads enter it at once, and
OpenMP's dies after a fork.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from ..options import worker_count

T = TypeVar("T")

#: Elements per block: small enough that a block's temporaries stay in a core's caches.
_BLOCK = 1 << 18


def over_rows(
    rows: int, columns: int, work: Callable[[int, int], T], threads: int | None
) -> list[T]:
    """Call ``work(start, stop)`` for blocks that cover ``range(rows)``; results in row order.

    The first exception in row order is raised, whatever order the threads met them in.
    """
    workers = worker_count(threads)
    step = max(1, _BLOCK // max(1, columns))
    blocks = [(start, min(start + step, rows)) for start in range(0, rows, step)]
    if workers == 1 or len(blocks) == 1:
        return [work(start, stop) for start, stop in blocks]
    with ThreadPoolExecutor(min(workers, len(blocks))) as pool:
        return list(pool.map(lambda block: work(*block), blocks))
