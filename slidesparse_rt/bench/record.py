"""What a result file holds: the numbers, and everything that is needed to trust or repeat them.

Layout (JSON), version 2::

    schema, schema_version, what     "slidesparse_rt.benchmark", 2, and a key of ROW_KEYS
    time, command, package           UTC, the command line, slidesparse_rt's version
    commit                           {id, dirty} or null: the state of the checkout that ran
    sources_sha256                   of the package's own files and kernels, whatever git says
    gpu                              name, architecture, memory, L2, driver; null without a GPU
    versions                         of the libraries that took part
    settings                         what was asked for
    complete                         false while the benchmark still runs, or if it was killed
    rows                             one for each measurement
    host                             "packing" alone: processor, cores, load
    left_out                         [{case, reason, why}]: everything asked for and not reported

The file is written again after every case, whole or not at all.

Version 1 differs in rows of "gemm": the one sparse side was cuSPARSELt, and ``ratio`` and
``ratio_best_8bit`` are its numbers; in version 2 they hold one for each sparse side.
:func:`upgraded` reads both.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import re
import secrets
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._version import __version__
from ..dtypes import operand
from ..errors import BackendUnavailable, FormatError, SlideSparseError
from ..ffi.driver import probe
from ..ffi.libraries import Loaded, find, version_text
from ..pattern import Pattern

__all__ = [
    "FAILURES",
    "LEFT_OUT",
    "SCHEMA",
    "SCHEMA_VERSION",
    "Budget",
    "Record",
    "WrongOutput",
    "check_document",
    "checkout",
    "command_line",
    "commit_of",
    "default_path",
    "environment",
    "reason_of",
    "sources_digest",
    "upgraded",
    "write_json",
]

SCHEMA = "slidesparse_rt.benchmark"
SCHEMA_VERSION = 2
#: Why something asked for is not reported.  The last two make the command fail.
LEFT_OUT = ("unavailable", "time budget", "wrong output", "error")
_FATAL = ("wrong output", "error")

#: Key -> type, of every document.
_KEYS: Mapping[str, tuple[type, ...]] = {
    "schema": (str,),
    "schema_version": (int,),
    "what": (str,),
    "time": (str,),
    "command": (str,),
    "package": (str,),
    "commit": (dict, type(None)),
    "sources_sha256": (str,),
    "gpu": (dict, type(None)),
    "versions": (dict,),
    "settings": (dict,),
    "complete": (bool,),
    "rows": (list,),
    "left_out": (list,),
}
_PRODUCT = frozenset(
    {"model", "m", "dtype", "pattern", "stage", "mode", "us", "ratio", "bound", "checked"}
)
#: What rows of each benchmark always have.
ROW_KEYS: Mapping[str, frozenset[str]] = {
    "gemm": _PRODUCT,
    "pipeline": _PRODUCT,
    "quantize": frozenset({"kernel", "m", "columns", "bytes", "us", "tb_per_s", "of_copy"}),
    "overhead": frozenset({"call", "dtype", "median_us", "minimum_us"}),
    "packing": frozenset({"step", "version", "seconds", "median_seconds", "weights_per_second"}),
}

#: Of these, whole numbers from 1 on, numbers above 0, and such numbers by side.
_COUNTS = {"gemm": ("m",), "pipeline": ("m",), "quantize": ("m", "columns")}
_NUMBERS = {
    "gemm": ("bound",),
    "pipeline": ("bound",),
    "quantize": ("us", "tb_per_s", "of_copy"),
    "overhead": ("median_us", "minimum_us"),
    "packing": ("median_seconds", "weights_per_second"),
}
_BY_SIDE = {"gemm": ("us", "ratio"), "pipeline": ("us", "ratio")}


class WrongOutput(SlideSparseError):
    """A benchmark whose output is not what it must be: it has no number to report."""


#: What makes a benchmark leave a case out and go on; CuPy's errors are RuntimeErrors.
FAILURES = (SlideSparseError, RuntimeError)


def reason_of(error: Exception) -> tuple[str, str]:
    """Why a case is left out: one of :data:`LEFT_OUT`, and the words."""
    if isinstance(error, WrongOutput):
        return "wrong output", str(error)
    if isinstance(error, BackendUnavailable):
        return "unavailable", str(error)
    own = isinstance(error, SlideSparseError)
    return "error", str(error) if own else f"{type(error).__name__}: {error}"


@dataclass(slots=True)
class Budget:
    """Seconds that a benchmark may take until it stops adding cases; ``None``: any number."""

    seconds: float | None = None
    _start: float = field(default_factory=time.monotonic)

    def restart(self) -> None:
        """Count from now."""
        self._start = time.monotonic()

    @property
    def spent(self) -> bool:
        """Whether no further case may begin."""
        return self.seconds is not None and time.monotonic() - self._start >= self.seconds


class Record:
    """A result document that grows row by row, and its file.

    Parameters
    ----------
    what:
        A key of :data:`ROW_KEYS`.
    settings:
        What was asked for; plain JSON values.
    command:
        The command line.
    surroundings:
        What :func:`environment` found.
    path:
        The file; ``None`` writes none.
    """

    def __init__(
        self,
        what: str,
        settings: Mapping[str, Any],
        *,
        command: str,
        surroundings: Mapping[str, Any],
        path: Path | None = None,
    ) -> None:
        now = datetime.datetime.now(datetime.timezone.utc)
        self.path = path
        self.document: dict[str, Any] = {
            "schema": SCHEMA,
            "schema_version": SCHEMA_VERSION,
            "what": what,
            "time": now.isoformat(timespec="seconds"),
            "command": command,
            **surroundings,
            "settings": dict(settings),
            "complete": False,
            "rows": [],
            "left_out": [],
        }
        check_document(self.document)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The measurements."""
        rows: list[dict[str, Any]] = self.document["rows"]
        return rows

    @property
    def failed(self) -> bool:
        """Whether an output was wrong or a case broke."""
        return any(entry["reason"] in _FATAL for entry in self.document["left_out"])

    def add(self, *rows: dict[str, Any]) -> None:
        """Add measurements."""
        self.rows.extend(rows)

    def leave_out(self, case: str, reason: str, why: str) -> None:
        """Note what is not reported; ``reason`` is one of :data:`LEFT_OUT`."""
        self.document["left_out"].append({"case": case, "reason": reason, "why": why})

    def save(self) -> None:
        """Write the file as it stands."""
        check_document(self.document)
        if self.path is not None:
            write_json(self.path, self.document)

    def finish(self) -> None:
        """Everything that was asked for is either reported or left out: write the last state."""
        self.document["complete"] = True
        self.save()


def check_document(document: Any) -> None:
    """Raise FormatError unless ``document`` is a result document of a version known here."""
    if not isinstance(document, dict) or document.get("schema") != SCHEMA:
        raise FormatError(f"this is no result of a benchmark: its schema is not {SCHEMA!r}")
    version = document.get("schema_version")
    if version != SCHEMA_VERSION:
        raise FormatError(
            f"schema_version is {version!r}; this slidesparse_rt reads {SCHEMA_VERSION}; "
            f"use the version that wrote the file, or upgrade"
        )
    for key, kinds in _KEYS.items():
        if key not in document or not isinstance(document[key], kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise FormatError(f"a result has {key!r}, of type {names}; this one has not")
    needed = ROW_KEYS.get(document["what"])
    if needed is None:
        raise FormatError(
            f"what is {document['what']!r}; allowed are {', '.join(map(repr, ROW_KEYS))}"
        )
    for index, row in enumerate(document["rows"]):
        missing = sorted(needed - set(row))
        if missing:
            raise FormatError(f"row {index} lacks {', '.join(missing)}")
        _check_row(document["what"], index, row)
    for entry in document["left_out"]:
        if entry.get("reason") not in LEFT_OUT:
            raise FormatError(f"left_out gives the reason {entry.get('reason')!r}")


def _check_row(what: str, index: int, row: Mapping[str, Any]) -> None:
    """Raise FormatError for a value of a row that no benchmark writes."""

    def refuse(key: str, allowed: str) -> FormatError:
        return FormatError(f"row {index} has {key} {row[key]!r}; allowed is {allowed}")

    for key in _COUNTS.get(what, ()):
        if not (_above_zero(row[key]) and isinstance(row[key], int)):
            raise refuse(key, "a whole number from 1 on")
    for key in _NUMBERS[what]:
        if not _above_zero(row[key]):
            raise refuse(key, "a number above 0")
    for key in _BY_SIDE.get(what, ()):
        sides = row[key]
        if not isinstance(sides, dict) or not all(map(_above_zero, sides.values())):
            raise refuse(key, "numbers above 0, by side")
    if what in _BY_SIDE:
        for key, read in (("pattern", Pattern.parse), ("dtype", operand)):
            try:
                read(row[key])
            except SlideSparseError as error:
                raise FormatError(f"row {index}: {error}") from None


def _above_zero(value: object) -> bool:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and 0 < value < math.inf  # type: ignore[operator]  # it is a number


def upgraded(document: Mapping[str, Any]) -> dict[str, Any]:
    """A result document of any version known here in the present one; it is not changed itself.

    Raises FormatError as :func:`check_document`.
    """
    made = dict(document)
    if made.get("schema_version") == 1:
        made["schema_version"] = SCHEMA_VERSION
        if made.get("what") == "gemm" and isinstance(made.get("rows"), list):
            made["rows"] = [_by_side(row) for row in made["rows"]]
    check_document(made)
    return made


def _by_side(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of version 1 with ratios by sparse side."""
    ratios = {
        key: None if row[key] is None else {"cusparselt": row[key]}
        for key in ("ratio", "ratio_best_8bit")
        if key in row
    }
    return dict(row) | ratios


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write ``document`` so that ``path`` never names half of it; refuses NaN.

    Raises OSError, with ``path`` in its words, where the disk is full or the folder not writable.
    """
    text = json.dumps(document, indent=1, allow_nan=False) + "\n"
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


# --- surroundings ---------------------------------------------------------------------------------


def environment(gpu: Mapping[str, Any] | None, *, commit: str | None = None) -> dict[str, Any]:
    """What surrounds a measurement.

    Parameters
    ----------
    gpu:
        Facts about the GPU that ran it (``timing.Gpu.facts``); ``None`` without.
    commit:
        The commit, where this is a copy without git's own record; ``None`` asks git.
    """
    root = checkout()
    told = None if commit is None else {"id": commit, "dirty": None, "source": "command line"}
    return {
        "package": __version__,
        "commit": told if told is not None or root is None else commit_of(root),
        "sources_sha256": sources_digest(),
        "gpu": None if gpu is None else dict(gpu),
        "versions": _versions(),
    }


def _versions() -> dict[str, str | None]:
    found: dict[str, str | None] = {
        "python": platform.python_version(),
        "driver_cuda": probe().driver_version,
    }
    for key, name in (("cusparselt", "cusparseLt"), ("cublaslt", "cublasLt"), ("nvrtc", "nvrtc")):
        library = find(name)
        found[key] = version_text(library.version) if isinstance(library, Loaded) else None
    for name in ("numpy", "cupy", "torch"):
        module = sys.modules.get(name)
        found[name] = None if module is None else str(module.__version__)
    for name in ("ml_dtypes", "numba"):
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    found["cuda_runtime"] = _cuda_runtime()
    return found


def _cuda_runtime() -> str | None:
    """Version of the CUDA runtime that CuPy uses, where CuPy is loaded."""
    cupy = sys.modules.get("cupy")
    if cupy is None:
        return None
    version = int(cupy.cuda.runtime.runtimeGetVersion())
    return f"{version // 1000}.{version % 1000 // 10}"


def checkout() -> Path | None:
    """The folder of the source checkout that this package runs from, if it does."""
    root = Path(__file__).resolve().parents[2]
    return root if (root / "pyproject.toml").is_file() and (root / "benchmarks").is_dir() else None


def commit_of(root: Path) -> dict[str, Any] | None:
    """The checkout's commit and whether tracked or new files differ from it, if git knows."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, check=True, timeout=30
        ).stdout.strip()

    try:
        # Another repository may lie around a copy that has none of its own.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root.resolve():
            return None
        commit = git("rev-parse", "HEAD")
        # A result file is no change of what was measured.
        dirty = bool(git("status", "--porcelain", "--", ".", ":(exclude)benchmarks/results"))
    except (OSError, subprocess.SubprocessError):
        return None
    return {"id": commit, "dirty": dirty, "source": "git"}


def sources_digest() -> str:
    """SHA-256 over names and contents of the package's Python files and its kernels."""
    package = Path(__file__).resolve().parents[1]
    folders = {"slidesparse_rt": package}
    beside = package.parent / "kernels_cu"
    if beside.is_dir():
        folders["slidesparse_rt/kernels_cu"] = beside
    files = {}
    for prefix, folder in folders.items():
        for path in folder.rglob("*"):
            if path.suffix in (".py", ".cu", ".cuh"):
                files[f"{prefix}/{path.relative_to(folder).as_posix()}"] = path
    digest = hashlib.sha256()
    for name in sorted(files):
        content = files[name].read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode())
        digest.update(content)
    return digest.hexdigest()


def default_path(what: str, gpu_name: str, *, folder: Path | None = None) -> Path:
    """Where a result goes if nobody says: a name that is not taken yet.

    In a checkout that is benchmarks/results/, else the current folder.
    """
    if folder is None:
        root = checkout()
        folder = Path.cwd() if root is None else root / "benchmarks" / "results"
    short = re.sub(r"[^a-z0-9]+", "-", gpu_name.lower()).strip("-").removeprefix("nvidia-")
    date = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d")
    stem = f"{what}-{short or 'gpu'}-{date}"
    names = [f"{stem}.json", *(f"{stem}-{number}.json" for number in range(2, 1000))]
    return next(
        (folder / name for name in names if not (folder / name).exists()), folder / names[0]
    )


def command_line(argv: Sequence[str]) -> str:
    """The command as a user would type it, without the folders of this machine's programs."""
    first = Path(argv[0]) if argv else Path("slidesparse")
    program = ["slidesparse"]
    if first.suffix == ".py" and first.name != "__main__.py":
        folder = first.resolve().parent.name
        program = ["python", f"{folder}/{first.name}" if folder == "benchmarks" else first.name]
    return shlex.join([*program, *argv[1:]])
