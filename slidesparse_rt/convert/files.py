"""Files that exist whole or not at all, and the disk that they need."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from ..errors import OptionError

__all__ = [
    "CHUNK",
    "Output",
    "copy_whole",
    "flush_folder",
    "is_full",
    "locked",
    "part_of",
    "refuse_full_disk",
    "sha256_of",
    "write_whole",
]

#: Bytes that are copied at a time.
CHUNK = 1 << 22
#: Bytes after which the disk begins to write, so that little is left to wait for at the end.
_FLUSH = 1 << 26
#: Bytes for what is not counted: folders, the file system's own records.
_SPARE = 1 << 20


def part_of(path: Path) -> Path:
    """Where a file is written before it takes its name."""
    return path.with_name(f".{path.name}.part")


class Output:
    """A file being written, hashed on the way; a context manager.

    It lies under :func:`part_of` its name.  If the block raises, it is removed; if the block ends,
    it is complete, on the disk, and still has its temporary name.

    Raises OSError where the disk is full or the folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.nbytes = 0
        self._digest = hashlib.sha256()
        self._handle = os.open(part_of(path), os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
        self._flusher = ThreadPoolExecutor(1)
        self._flushing: Future[None] | None = None
        self._flushed = 0

    def write(self, data: Any) -> None:
        """Append the bytes of a buffer."""
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            done += os.write(self._handle, view[done:])
        self._digest.update(view)
        self.nbytes += len(view)
        busy = self._flushing is not None and not self._flushing.done()
        if not busy and self.nbytes - self._flushed >= _FLUSH:
            if self._flushing is not None:
                self._flushing.result()
            self._flushed = self.nbytes
            self._flushing = self._flusher.submit(os.fdatasync, self._handle)

    @property
    def sha256(self) -> str:
        """Digest of everything written."""
        return self._digest.hexdigest()

    def __enter__(self) -> Output:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        done = False
        try:
            self._flusher.shutdown()
            if kind is None:
                if self._flushing is not None:
                    self._flushing.result()
                os.fsync(self._handle)
                done = True
        finally:
            os.close(self._handle)
            if not done:
                part_of(self.path).unlink(missing_ok=True)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that its name never stands for half of it, not even after a power cut."""
    with Output(path) as out:
        out.write(data)
    part_of(path).replace(path)
    flush_folder(path.parent)


def copy_whole(source: Path, path: Path) -> None:
    """:func:`write_whole` with the content of another file; makes the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with source.open("rb") as file, Output(path) as out:
        while chunk := file.read(CHUNK):
            out.write(chunk)
    part_of(path).replace(path)
    flush_folder(path.parent)


def flush_folder(folder: Path) -> None:
    """Make a folder's names reach the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """Digest of a file's content."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def is_full(error: OSError) -> bool:
    """Whether the disk, or the user's share of it, is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def refuse_full_disk(folder: Path, needed: int) -> None:
    """Raise OSError (ENOSPC) where ``folder``, which need not exist yet, has too little room."""
    here = folder.absolute()
    while not here.exists():
        here = here.parent
    free = shutil.disk_usage(here).free
    if needed + _SPARE > free:
        raise OSError(
            errno.ENOSPC,
            f"the disk has {free / 1e9:.2f} GB free and {needed / 1e9:.2f} GB are needed; free "
            f"some, or write to another disk; nothing was written",
            str(folder),
        )


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold a folder against other conversions; the lock dies with the process.

    Raises OptionError if another one holds it.
    """
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OptionError(
                f"{folder} is being written by another conversion; wait for it, or write to "
                f"another folder"
            ) from None
        except OSError as error:
            # Some network file systems have no locks.
            if error.errno not in (errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS):
                raise
        yield
    finally:
        with suppress(OSError):
            os.close(handle)
