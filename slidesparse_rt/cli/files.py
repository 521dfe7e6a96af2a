"""What ``prune`` and ``inspect`` share: the tensors of a safetensors file."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .console import printable

if TYPE_CHECKING:
    from rich.console import Console

    from ..packing import TensorFile

__all__ = ["FLOATS", "Entry", "entries_of", "kind_of", "render_skipped"]

#: How safetensors spells the types of dtypes.ARRAY_TYPES, the ones that can be pruned.
FLOATS = ("F32", "F16", "BF16")


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a file.

    ``dtype`` is safetensors' spelling, ``nbytes`` its bytes in the file; ``skip`` says why it is
    left alone, and is empty if it is not.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    skip: str = ""

    @property
    def shape_text(self) -> str:
        """Such as ``"384 x 1536"``."""
        return " x ".join(map(str, self.shape)) or "scalar"

    @property
    def size(self) -> int:
        """Elements of a matrix."""
        return self.shape[0] * self.shape[1]

    def to_json(self) -> dict[str, Any]:
        """What identifies the tensor."""
        return {
            "name": self.name,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "bytes": self.nbytes,
        }


def entries_of(file: TensorFile) -> list[Entry]:
    """Every tensor in the order of the file; ``skip`` is set for what is no matrix of floats."""
    entries = []
    for name in file.keys():  # noqa: SIM118  (a TensorFile is no mapping)
        shape, dtype = file.shape(name), file.dtype_name(name)
        skip = ""
        if dtype not in FLOATS:
            skip = f"type {dtype}, not {', '.join(FLOATS)}"
        elif len(shape) != 2:
            skip = f"{len(shape)} dimensions, not 2"
        elif 0 in shape:
            skip = "no elements"
        entries.append(Entry(name, shape, dtype, file.nbytes(name), skip))
    return entries


def kind_of(module: str) -> str:
    """The module's name without its numbers: the same for one projection of every block."""
    return ".".join("*" if part.isdigit() else part for part in module.split("."))


def render_skipped(screen: Console, entries: Sequence[Entry], what: str) -> None:
    """Print how many tensors were left alone, by reason, with examples."""
    reasons: dict[str, list[str]] = {}
    for entry in entries:
        if entry.skip:
            reasons.setdefault(entry.skip, []).append(printable(entry.name))
    for reason, names in reasons.items():
        examples = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        screen.print(f"{len(names)} {what} ({reason}): {examples}", soft_wrap=True)
