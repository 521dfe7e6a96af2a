"""Reading and writing safetensors files: memory-mapped, checked, and replaced atomically.

The safetensors library validates the header; its NumPy reader does not know fp8 and copies every
tensor, so tensors are mapped here at the offsets that the validated header gives.
Source: the safetensors format (8 bytes of header length, little-endian; JSON header; data).
"""

from __future__ import annotations

import errno
import json
import os
import secrets
import stat
import struct
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import ml_dtypes
import numpy as np

from ..arrays import NDArray
from ..errors import DTypeError, FormatError

__all__ = ["TensorFile", "write_file"]

_DTYPES: dict[str, np.dtype[Any]] = {
    name: np.dtype(kind)
    for name, kind in {
        "F64": np.float64,
        "F32": np.float32,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "I64": np.int64,
        "I32": np.int32,
        "I16": np.int16,
        "I8": np.int8,
        "U64": np.uint64,
        "U32": np.uint32,
        "U16": np.uint16,
        "U8": np.uint8,
        "BOOL": np.bool_,
        "C64": np.complex64,
    }.items()
}


class TensorFile:
    """One safetensors file, open for reading; a context manager.

    Raises FormatError where the file is truncated, foreign, or contradicts itself, and OSError
    where it cannot be opened.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        from safetensors import SafetensorError, safe_open

        self.path = Path(path)
        _refuse_folder(self.path)
        try:
            with safe_open(self.path, framework="np") as checked:
                names = set(checked.keys())
                metadata = checked.metadata()
        except SafetensorError as error:
            raise FormatError(
                f"{self.path} is no intact safetensors file ({error}); copy or download it again"
            ) from error
        with self.path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        self._data_start = 8 + length
        self._entries: dict[str, dict[str, Any]] = {
            name: entry for name, entry in header.items() if name != "__metadata__"
        }
        if set(self._entries) != names:
            raise FormatError(f"{self.path} names its tensors ambiguously; write it again")
        #: The file's own metadata, text to text; empty where it has none.
        self.metadata: dict[str, str] = dict(metadata or {})
        self._closed = False

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Refuse further reads.  Arrays already read stay valid."""
        self._closed = True

    def keys(self) -> list[str]:
        """Names of all tensors, in the order of their data in the file."""
        return sorted(self._entries, key=lambda name: (self._entries[name]["data_offsets"], name))

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        return tuple(self._entry(name)["shape"])

    def dtype_name(self, name: str) -> str:
        """Data type of one tensor as safetensors spells it ("F32", "BF16", "F8_E4M3", ...)."""
        return str(self._entry(name)["dtype"])

    def nbytes(self, name: str) -> int:
        """Bytes of one tensor."""
        start, stop = self._entry(name)["data_offsets"]
        return int(stop - start)

    def span(self, name: str) -> tuple[int, int]:
        """Where one tensor's bytes lie in the file: (first, one past the last)."""
        start, stop = self._entry(name)["data_offsets"]
        return self._data_start + int(start), self._data_start + int(stop)

    def read(self, name: str) -> NDArray:
        """Map one tensor into memory, read-only.

        Raises FormatError for a name the file does not have and for a shape that NumPy cannot have,
        DTypeError for a data type that NumPy and ml_dtypes do not have.
        """
        entry = self._entry(name)
        dtype = _DTYPES.get(entry["dtype"])
        if dtype is None:
            raise DTypeError(
                f"tensor {name!r} in {self.path} has dtype {entry['dtype']}; readable are "
                f"{', '.join(_DTYPES)}"
            )
        start, stop = entry["data_offsets"]
        shape = tuple(entry["shape"])
        try:
            if start == stop:
                return np.empty(shape, dtype)
            flat = np.memmap(
                self.path,
                np.uint8,
                mode="r",
                offset=self._data_start + start,
                shape=(stop - start,),
            )
            return np.asarray(flat).view(dtype).reshape(shape)
        except ValueError as error:  # a shape beyond NumPy's limits
            raise FormatError(
                f"tensor {name!r} in {self.path} cannot be an array: {error}"
            ) from error

    def _entry(self, name: str) -> dict[str, Any]:
        if self._closed:
            raise FormatError(f"{self.path} is closed; open it again to read from it")
        entry = self._entries.get(name)
        if entry is None:
            known = ", ".join(repr(key) for key in self.keys()[:8])
            more = f" and {len(self._entries) - 8} more" if len(self._entries) > 8 else ""
            raise FormatError(f"{self.path} has no tensor {name!r}; it has {known or 'none'}{more}")
        return entry


def write_file(
    path: str | os.PathLike[str], tensors: Mapping[str, NDArray], metadata: Mapping[str, str]
) -> None:
    """Write a safetensors file so that ``path`` never names a half-written one.

    Everything goes to a new file in the same folder, reaches the disk, and takes the name in one
    step.  On any error the new file is removed and what ``path`` named before is untouched.
    A symbolic link is followed, so that it stays a link.  A file that is replaced keeps its
    permissions; a new one has those of any new file.

    Raises
    ------
    OSError
        If the disk is full or the folder cannot be written.
    DTypeError
        If safetensors has no name for a tensor's data type.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    target = Path(os.path.realpath(path))
    _refuse_folder(target)
    temporary = target.parent / f".{target.name}.{secrets.token_hex(6)}.tmp"
    known = set(_DTYPES.values())
    for name, value in tensors.items():
        if value.dtype not in known:
            raise DTypeError(
                f"tensor {name!r} has dtype {value.dtype}; writable are "
                f"{', '.join(kind.name for kind in _DTYPES.values())}"
            )
    try:
        mode = _permissions(target, temporary)
        contiguous = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
        # ascontiguousarray makes 0-d arrays 1-d; the shape is given back.
        shaped = {name: array.reshape(tensors[name].shape) for name, array in contiguous.items()}
        try:
            save_file(shaped, temporary, metadata=dict(metadata) or None)
        except SafetensorError as error:
            raise OSError(f"{target} could not be written: {error}") from error
        temporary.chmod(mode)  # safetensors makes its files private
        _flush(temporary)
        temporary.replace(target)
        _flush(target.parent)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def _refuse_folder(path: Path) -> None:
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))


def _permissions(target: Path, temporary: Path) -> int:
    """Mode bits that ``target`` has or, if there is none yet, that a new file gets here.

    Creates ``temporary`` for that: asking for the umask without changing it is not possible.
    """
    try:
        return stat.S_IMODE(target.stat().st_mode)
    except FileNotFoundError:
        pass
    try:
        temporary.touch(exist_ok=False)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(target)) from error
    return stat.S_IMODE(temporary.stat().st_mode)


def _flush(path: Path) -> None:
    """Make the file's (or folder's) content reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
