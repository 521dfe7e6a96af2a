"""A Hugging Face checkpoint on disk: one safetensors file or shards with an index, and its config.

Source: the layout that ``save_pretrained`` of transformers writes (``config.json``,
``model.safetensors``, ``model.safetensors.index.json`` with ``metadata`` and ``weight_map``).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import FormatError, OptionError
from ..packing import TensorFile

__all__ = ["CONFIG", "INDEX", "SINGLE", "Checkpoint", "Tensor", "listed", "read_json"]

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: Ends of names of files that hold weights in one form or another; they are not copied.
_WEIGHT_FILES = (
    ".safetensors",
    ".safetensors.index.json",
    ".bin",
    ".bin.index.json",
    ".pt",
    ".pth",
    ".ckpt",
    ".gguf",
    ".h5",
    ".msgpack",
    ".onnx",
    ".onnx_data",
    ".tflite",
    ".ot",
)
#: Names that a message lists before it says how many more there are.
_LISTED = 8
#: Bytes at either end of each tensor that go into a fingerprint.
_SAMPLE = 4096


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of a checkpoint: where it lies and what it is.

    ``dtype`` is safetensors' spelling; ``start`` is the offset of its first byte in ``path``.
    """

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    start: int
    nbytes: int

    @property
    def shape_text(self) -> str:
        """Such as ``"384 x 1536"``."""
        return " x ".join(map(str, self.shape)) or "scalar"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A checkpoint whose headers and index are read and agree; no weight has been read.

    Attributes
    ----------
    folder:
        Where it lies.
    config:
        The content of ``config.json``.
    shards:
        File name -> metadata of its header, in the order of names.
    tensors:
        Tensor name -> where it is, shard by shard, in the order of their bytes.
    index:
        The content of the index; ``None`` for a single file.
    """

    folder: Path
    config: dict[str, Any]
    shards: dict[str, dict[str, str]]
    tensors: dict[str, Tensor]
    index: dict[str, Any] | None

    @classmethod
    def open(cls, folder: str | os.PathLike[str]) -> Checkpoint:
        """Read config, index and headers.

        Raises
        ------
        OptionError
            If the folder is none, or holds no safetensors checkpoint.
        FormatError
            If a file is damaged or missing, or index and files contradict each other.
        OSError
            If a file cannot be read.
        """
        root = Path(folder)
        if not root.is_dir():
            raise OptionError(
                f"{root} is no folder; give one with {CONFIG} and {SINGLE} or {INDEX}"
            )
        config = _read_config(root)
        index = _read_index(root)
        names = [SINGLE] if index is None else sorted(set(index["weight_map"].values()))
        missing = [name for name in names if not (root / name).is_file()]
        if missing:
            raise FormatError(
                f"{root} lacks {len(missing)} of its {len(names)} shards: {listed(missing)}; "
                f"download the checkpoint again"
            )
        shards: dict[str, dict[str, str]] = {}
        tensors: dict[str, Tensor] = {}
        for name in names:
            with TensorFile(root / name) as file:
                shards[name] = file.metadata
                for key in file.keys():  # noqa: SIM118  (a TensorFile is no mapping)
                    if key in tensors:
                        raise FormatError(
                            f"tensor {key!r} is both in {tensors[key].path.name} and in {name}; "
                            f"remove the file that is left over, or save the checkpoint again"
                        )
                    start, stop = file.span(key)
                    tensors[key] = Tensor(
                        key,
                        root / name,
                        file.dtype_name(key),
                        file.shape(key),
                        start,
                        stop - start,
                    )
        if index is not None:
            _compare_with_index(root, index["weight_map"], tensors)
        return cls(root, config, shards, tensors, index)

    def setting(self, key: str) -> list[Any]:
        """Values of a key of the config, and of the configs of text and decoder inside it."""
        parts = [self.config, *(self.config.get(part) for part in ("text_config", "decoder"))]
        return [part[key] for part in parts if isinstance(part, dict) and key in part]

    def fingerprint(self) -> str:
        """SHA-256 of names, types, shapes and both ends of the data of all tensors.

        The same for the same weights, however they are distributed over files.  It reads a few
        kilobytes of each tensor: it tells checkpoints apart, it does not find damage.
        """
        digest = hashlib.sha256()
        handles: dict[Path, int] = {}
        try:
            for name in sorted(self.tensors):
                tensor = self.tensors[name]
                if tensor.path not in handles:
                    handles[tensor.path] = os.open(tensor.path, os.O_RDONLY)
                handle = handles[tensor.path]
                digest.update(json.dumps([name, tensor.dtype, tensor.shape]).encode())
                size = min(_SAMPLE, tensor.nbytes)
                digest.update(os.pread(handle, size, tensor.start))
                digest.update(os.pread(handle, size, tensor.start + tensor.nbytes - size))
        finally:
            for handle in handles.values():
                os.close(handle)
        return digest.hexdigest()

    def other_files(self) -> tuple[list[Path], list[Path]]:
        """Paths, relative to the folder, of files that are not weights, and of further weights.

        Without config and index, and without what is hidden (a name that begins with a dot).
        """
        copied: list[Path] = []
        left: list[Path] = []
        for path in sorted(_files_below(self.folder)):
            relative = path.relative_to(self.folder)
            if str(relative) in {CONFIG, INDEX, *self.shards}:
                continue
            weights = path.name.endswith(_WEIGHT_FILES)
            (left if weights else copied).append(relative)
        return copied, left


def listed(names: list[str]) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file; FormatError where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path} is no intact JSON: {error}; write it again") from error
    if not isinstance(content, dict):
        raise FormatError(f"{path} holds a {type(content).__name__}; expected a JSON object")
    return content


def _files_below(folder: Path) -> Iterator[Path]:
    """Files in the folder and in folders below; links to files count, links to folders do not."""
    for path in folder.iterdir():
        if path.name.startswith("."):
            continue
        if path.is_file():
            yield path
        elif path.is_dir() and not path.is_symlink():
            yield from _files_below(path)


def _read_config(root: Path) -> dict[str, Any]:
    path = root / CONFIG
    if not path.is_file():
        raise OptionError(
            f"{root} has no {CONFIG}; give the folder of a Hugging Face model, or use "
            f"'slidesparse prune' for a single file"
        )
    return read_json(path)


def _read_index(root: Path) -> dict[str, Any] | None:
    path = root / INDEX
    single = root / SINGLE
    if not path.is_file():
        if single.is_file():
            return None
        found = sorted(other.name for other in root.iterdir() if other.name.endswith(_WEIGHT_FILES))
        raise OptionError(
            f"{root} has neither {SINGLE} nor {INDEX}"
            + (f"; it has {listed(found)}" if found else "")
            + "; save the model with save_pretrained(folder, safe_serialization=True)"
        )
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{path} has no 'weight_map' from tensors to files; download it again")
    for name, file in weight_map.items():
        if (
            not isinstance(file, str)
            or Path(file).name != file
            or not file.endswith(".safetensors")
        ):
            raise FormatError(
                f"{path} says that {name!r} is in {file!r}; expected is the name of a safetensors "
                f"file in the same folder"
            )
    if single.is_file() and SINGLE not in weight_map.values():
        raise FormatError(
            f"{root} has both {SINGLE} and an index of other files; remove the one that is not the "
            f"model"
        )
    return index


def _compare_with_index(
    root: Path, weight_map: Mapping[str, str], tensors: Mapping[str, Tensor]
) -> None:
    absent = [
        f"{name} ({file})"
        for name, file in weight_map.items()
        if name not in tensors or tensors[name].path.name != file
    ]
    if absent:
        raise FormatError(
            f"{root / INDEX} names {len(absent)} tensors that are not in their files: "
            f"{listed(absent)}; download the checkpoint again"
        )
    unnamed = [f"{name} ({tensors[name].path.name})" for name in tensors if name not in weight_map]
    if unnamed:
        raise FormatError(
            f"{root} holds {len(unnamed)} tensors that {INDEX} does not name: {listed(unnamed)}; "
            f"save the checkpoint again, so that index and files agree"
        )
