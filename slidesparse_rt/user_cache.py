"""The user's cache: where it is, and how a file gets there whole.

Nothing in it is needed: what is missing or damaged is made again.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "write_whole"]


def cache_folder(name: str) -> Path | None:
    """Return the folder ``name`` of the user's cache, whether or not it exists.

    ``None`` for a user without a home: then nothing is kept.
    """
    try:
        return Path.home() / ".cache" / "slidesparse_rt" / name
    except RuntimeError:
        return None


def write_whole(path: Path, data: bytes) -> None:
    """Write a file aside, then rename it: a reader sees all of it or what was there before.

    Makes the folder.  Raises OSError where that is not possible, and leaves nothing behind.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, aside = tempfile.mkstemp(dir=path.parent, suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
        Path(aside).replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(aside).unlink(missing_ok=True)
        raise
