"""What is finished of a conversion: the file by which an interrupted one goes on.

Order of events for each shard: its bytes reach the disk under a temporary name; the manifest, which
has their number and SHA-256, is replaced; the shard takes its name.  A kill between any two steps
leaves a shard that is either proved finished or not trusted.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..errors import FormatError, OptionError
from .checkpoint import CONFIG, listed, read_json
from .files import flush_folder, part_of, sha256_of, write_whole

__all__ = ["MANIFEST", "Manifest"]

MANIFEST = "slidesparse-manifest.json"
_FORMAT = "slidesparse_rt.conversion"
_FORMAT_VERSION = 1


@dataclass(slots=True)
class Manifest:
    """State of the conversion into ``folder``.

    Attributes
    ----------
    folder:
        Where the conversion writes.
    settings:
        What must be equal for one run to go on with another's work: settings, the checkpoint's
        fingerprint and the version of this package.
    outputs:
        Names of all files that the conversion writes, in ``folder``.
    shards:
        Finished ones: name -> {"bytes", "sha256", "layers"}.
    """

    folder: Path
    settings: dict[str, Any]
    outputs: list[str]
    shards: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """The manifest in ``folder``; ``None`` if there is none.

        Raises FormatError for one that is damaged, foreign or newer.
        """
        path = folder / MANIFEST
        if not path.is_file():
            return None
        content = read_json(path)
        version = content.get("format_version")
        if content.get("format") != _FORMAT or version != _FORMAT_VERSION:
            raise FormatError(
                f"{path} has format {content.get('format')!r}, version {version!r}; slidesparse_rt "
                f"{__version__} reads {_FORMAT!r}, version {_FORMAT_VERSION}; write to another "
                f"folder"
            )
        parts = (content.get("settings"), content.get("outputs"), content.get("shards"))
        settings, outputs, shards = parts
        if (
            not isinstance(settings, dict)
            or not isinstance(outputs, list)
            or not isinstance(shards, dict)
            or not all(map(_is_inside, outputs))
            or not all(map(_is_inside, shards))
        ):
            raise FormatError(f"{path} is damaged; remove {folder} and begin anew")
        return cls(folder, settings, outputs, shards)

    def save(self) -> None:
        """Replace the file; it reaches the disk."""
        content = {
            "format": _FORMAT,
            "format_version": _FORMAT_VERSION,
            "settings": self.settings,
            "outputs": self.outputs,
            "shards": {name: self.shards[name] for name in sorted(self.shards)},
        }
        write_whole(self.folder / MANIFEST, (json.dumps(content, indent=1) + "\n").encode())

    def finish(self, name: str, *, nbytes: int, sha256: str, layers: Mapping[str, Any]) -> None:
        """Record a shard whose bytes are on the disk, and give it its name."""
        self.shards[name] = {"bytes": nbytes, "sha256": sha256, "layers": dict(layers)}
        self.save()
        path = self.folder / name
        part_of(path).replace(path)
        flush_folder(self.folder)

    def refuse_other(self, settings: Mapping[str, Any]) -> None:
        """Raise OptionError unless the work in the folder was done with the same settings."""
        differences = [
            f"{key} {self.settings.get(key)!r} (now {settings.get(key)!r})"
            for key in (*settings, *(key for key in self.settings if key not in settings))
            if self.settings.get(key) != settings.get(key)
        ]
        if differences:
            raise OptionError(
                f"{self.folder} holds a conversion with other settings: {listed(differences)}; "
                f"write to another folder, or replace it with --force"
            )

    def verify(self, planned: Mapping[str, int], workers: int) -> None:
        """Forget shards that are not on the disk exactly as recorded.

        ``planned`` is the size of each shard.  A shard that lacks only its name gets it.
        """

        def sound(name: str) -> bool:
            entry, path = self.shards[name], self.folder / name
            if planned.get(name) != entry.get("bytes"):
                return False
            for candidate in (path, part_of(path)):
                if (
                    candidate.is_file()
                    and candidate.stat().st_size == entry["bytes"]
                    and sha256_of(candidate) == entry.get("sha256")
                ):
                    if candidate != path:
                        candidate.replace(path)
                        flush_folder(self.folder)
                    return True
            return False

        names = list(self.shards)
        with ThreadPoolExecutor(workers) as pool:
            good = list(pool.map(sound, names))
        self.shards = {name: self.shards[name] for name, ok in zip(names, good, strict=True) if ok}

    def remove_outputs(self) -> None:
        """Remove every file that the conversion wrote, config first, and nothing else."""
        names: Sequence[str] = [
            CONFIG,
            *(name for name in self.outputs if name != CONFIG),
            MANIFEST,
        ]
        for name in names:
            for path in (self.folder / name, part_of(self.folder / name)):
                path.unlink(missing_ok=True)


def _is_inside(name: Any) -> bool:
    """Whether a name from a file stays within its folder."""
    if not isinstance(name, str) or not name:
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts
