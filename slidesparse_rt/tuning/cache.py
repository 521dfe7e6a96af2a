"""Tables on disk, for the next process: one file for each thing that was measured.

A file is named after a digest of everything that the times depend on (:func:`tuning_key`), holds
that in words as well, and carries a digest of its content.  A file that is damaged, of another
version or about something else is the same as none, and is warned about.  Writers write aside and
rename, so none of them ever sees, or leaves, half a file.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from .._version import __version__
from ..arrays import NDArray
from ..backends.base import Problem
from ..backends.gpu_weight import exact_types
from ..errors import OptionError
from ..ffi.libraries import Loaded, find, version_text
from ..kernels.compiler import read_source
from ..options import PlanOptions
from ..user_cache import cache_folder, write_whole
from .table import Table

__all__ = ["TableCache", "bias_kind", "default_cache", "tuning_key"]

_LOG = logging.getLogger(__name__)

_SCHEMA, _VERSION = "slidesparse_rt.tuning", 1
_LIBRARIES = ("cusparseLt", "cublasLt", "nvrtc")
#: Changes with rules that times depend on and no kernel's source shows: which caches are emptied
#: (2: not for weights below 1 MiB), when a kernel may start early (2: not where much is shared),
#: how products are cut (3: blocks share tiles in two ways, by the number of tokens; 4: or as
#: clusters), for how many tokens backends choose (5: one and a half times powers of two, too; 6:
#: from 128 on) and by which times (6: balanced ones; 7: replayed as graphs, with weights out of a
#: cache that is read and not written, and more tiles; 8: few tokens behind their quantize kernel;
#: 9: tiles of 64 channels for more products).
_RULES = 9
#: Sources of the kernels that are in what is measured.
_SOURCES = ("quantize_lift.cu", "dequantize.cu", "hopper_gemm.cu")


class _Gpu(Protocol):
    """What a key takes from :class:`~slidesparse_rt.backends.gpu_device.GpuDevice`."""

    name: str
    sm_count: int
    driver_version: str


def bias_kind(problem: Problem, bias: NDArray | None) -> str:
    """How a bias, float32 (N,), changes what is measured: "none", "exact" or "rounded".

    int8 results are always scaled in float32, where adding a bias costs nothing.  For other formats
    a library may write bfloat16 results itself only if every bias value is exact in that type.
    """
    if bias is None or problem.dtype.name == "int8":
        return "none"
    return "exact" if "bfloat16" in exact_types(bias) else "rounded"


def tuning_key(
    problem: Problem, gpu: _Gpu, options: PlanOptions, *, bias: str, static: bool
) -> dict[str, str | int | bool | None]:
    """Everything that the times of a weight depend on, in words.

    Parameters
    ----------
    problem:
        N, K, pattern and operand format.
    gpu:
        Its name, multiprocessors (a MIG slice has fewer) and driver.
    options:
        ``workspace_limit`` says from how many tokens on a run is split.
    bias:
        As :func:`bias_kind` returns it.
    static:
        Whether all tokens share one activation scale.
    """
    versions: dict[str, str | None] = {}
    for name in _LIBRARIES:
        found = find(name)
        versions[name] = version_text(found.version) if isinstance(found, Loaded) else None
    return {
        "gpu": gpu.name,
        "sm_count": gpu.sm_count,
        "driver": gpu.driver_version,
        **versions,
        "package": __version__,
        "kernels": _sources_digest(),
        "rules": _RULES,
        "pattern": problem.pattern.name,
        "dtype": problem.dtype.name,
        "n": problem.n,
        "k": problem.k,
        "bias": bias,
        "static": static,
        "x": "bfloat16",
        "out": "bfloat16",
        "workspace_limit": options.workspace_limit,
    }


@functools.cache
def _sources_digest() -> str:
    """Digest of the kernels' sources: they change between versions of a checkout."""
    digest = hashlib.sha256()
    for name in _SOURCES:
        source = read_source(name)
        for part in (source.text, *(source.headers[key] for key in sorted(source.headers))):
            digest.update(hashlib.sha256(part.encode()).digest())
    return digest.hexdigest()[:16]


def default_cache() -> TableCache:
    """The tables in the user's cache."""
    return TableCache(cache_folder("tuning"))


class TableCache:
    """Tables in a folder; safe to share between threads and processes.

    Parameters
    ----------
    folder:
        Where the files are; ``None`` keeps nothing.
    """

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder

    @property
    def empty(self) -> bool:
        """Whether there is no table at all; costs one look into the folder."""
        if self.folder is None:
            return True
        try:
            with os.scandir(self.folder) as entries:
                return not any(entry.name.endswith(".json") for entry in entries)
        except FileNotFoundError:
            return True
        except OSError as error:
            _LOG.warning("the measured times in %s are ignored: %s", self.folder, error.strerror)
            return True

    def path(self, key: Mapping[str, Any]) -> Path | None:
        """The file of a key, whether or not it exists."""
        if self.folder is None:
            return None
        return self.folder / f"{hashlib.sha256(_text(key)).hexdigest()[:32]}.json"

    def load(self, key: Mapping[str, Any]) -> Table | None:
        """The table of a key; ``None`` where there is none that can be used."""
        path = self.path(key)
        if path is None:
            return None
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _LOG.warning("the measured times in %s are ignored: %s", path, error.strerror)
            return None
        try:
            return _decode(data, key)
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            _LOG.warning(
                "the measured times in %s are ignored, and replaced when they are measured again: "
                "%s",
                path,
                error,
            )
            return None

    def save(
        self, key: Mapping[str, Any], table: Table, *, replace: bool = False
    ) -> tuple[Table, Path | None]:
        """Keep a table, with what an older one of the same key has besides unless ``replace``.

        Returns what is kept and its file, or ``None`` where nothing can be kept: that is warned
        about.
        """
        path = self.path(key)
        older = None if replace else self.load(key)
        whole = table if older is None else table.merged(older)
        if path is None:
            _LOG.warning("measured times are not kept: this user has no home folder")
            return whole, None
        try:
            write_whole(path, _encode(key, whole))
        except OSError as error:
            _LOG.warning("measured times are not kept in %s: %s", path, error.strerror)
            return whole, None
        return whole, path


def _text(document: Mapping[str, Any]) -> bytes:
    """The one way to write a document down, for digests."""
    return json.dumps(document, sort_keys=True, allow_nan=False, separators=(",", ":")).encode()


def _encode(key: Mapping[str, Any], table: Table) -> bytes:
    content = {
        "schema": _SCHEMA,
        "schema_version": _VERSION,
        "key": dict(key),
        "taken": table.taken,
        "cold_tokens": table.cold_tokens,
        "refused": dict(table.refused),
        "us": {str(tokens): dict(row) for tokens, row in table.times.items()},
    }
    whole = {**content, "sha256": hashlib.sha256(_text(content)).hexdigest()}
    return json.dumps(whole, indent=1, allow_nan=False).encode() + b"\n"


def _decode(data: bytes, key: Mapping[str, Any]) -> Table:
    """The table in a file; ValueError, KeyError or TypeError for anything else."""
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("it holds no table")
    digest = document.pop("sha256")
    if (document["schema"], document["schema_version"]) != (_SCHEMA, _VERSION):
        raise ValueError(
            f"it is {document['schema']!r} of version {document['schema_version']!r}, not "
            f"{_SCHEMA!r} of version {_VERSION}"
        )
    if digest != hashlib.sha256(_text(document)).hexdigest():
        raise ValueError("its digest does not fit its content")
    if document["key"] != dict(key):
        raise ValueError("it is about another weight or machine")
    refused = {str(name): str(why) for name, why in document["refused"].items()}
    try:
        times = {int(tokens): row for tokens, row in document["us"].items()}
        return Table(times, refused, int(document["cold_tokens"]), str(document["taken"]))
    except OptionError as error:
        raise ValueError(str(error)) from error
