"""The one table of dynamic libraries that the package uses, and how they are found.

``cuda.pathfinder`` does the searching (pip wheels, conda, the system's loader, a CUDA toolkit).
This module adds what each library is for, the oldest version that will do, a version check, and
errors that list every place looked at and the command that mends them.  Import loads nothing.

Sources: ``cusparseLtGetProperty`` from cusparseLt.h, ``cublasLtGetVersion`` from cublasLt.h,
``nvrtcVersion`` from nvrtc.h, ``cuDriverGetVersion`` from cuda.h.  None of them needs a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import site
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, Protocol

from ..errors import BackendUnavailable, LibraryError, OptionError

__all__ = [
    "LIBRARIES",
    "Library",
    "Loaded",
    "Located",
    "Missing",
    "Trouble",
    "examine",
    "find",
    "library",
    "load",
    "version_text",
]

#: Why a library cannot be used.
Trouble = Literal["not found", "cannot be loaded", "too old"]

#: The oldest cuda.pathfinder that knows every library of the table.
_PATHFINDER = "1.4.4"


class Located(Protocol):
    """What a search returns; ``cuda.pathfinder.LoadedDL`` is one."""

    @property
    def abs_path(self) -> str | None:
        """Where the file lies."""

    @property
    def found_via(self) -> str:
        """How it was found, in cuda.pathfinder's words."""


@dataclass(frozen=True, slots=True)
class Library:
    """One dynamic library of the table.

    Attributes
    ----------
    name:
        The name that cuda.pathfinder knows it by.
    title:
        The name that people know it by.
    purpose:
        What this package does with it.
    minimum:
        Oldest version that will do.
    why_minimum:
        What is missing in older ones.
    wheels:
        CUDA major version -> pip package that brings it; empty for the driver.
    folders:
        Where those packages put it, below site-packages.
    sonames:
        The file names that the system's loader is asked for.
    read_version:
        Asks the loaded library for its version; raises LibraryError if the library refuses, and
        AttributeError if it lacks the function.
    """

    name: str
    title: str
    purpose: str
    minimum: tuple[int, ...]
    why_minimum: str
    wheels: Mapping[int, str]
    folders: tuple[str, ...]
    sonames: tuple[str, ...]
    read_version: Callable[[Any], tuple[int, ...]]

    def mend(self, cuda: int | None = None, *, flag: str = "") -> str:
        """Return the command that brings this library.

        Parameters
        ----------
        cuda:
            CUDA major version of the driver (12 or 13); ``None`` if it is not known, and then the
            answer names both.
        flag:
            An option for pip, such as "--upgrade".
        """
        if not self.wheels:
            return (
                "install or update the NVIDIA driver: 525 or newer for CUDA 12, 580 or newer for "
                "CUDA 13 (it does not come from pip)"
            )
        command = f"pip install {flag} " if flag else "pip install "
        if cuda is not None and cuda in self.wheels:
            return command + self.wheels[cuda]
        return " or ".join(
            f"{command}{package} (CUDA {major})" for major, package in self.wheels.items()
        )


@dataclass(frozen=True, slots=True)
class Loaded:
    """A library that is loaded and new enough.

    ``handle`` is the ``ctypes.CDLL``; the library stays loaded until the process ends.
    """

    library: Library
    handle: Any
    path: str
    found_via: str
    version: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Missing:
    """A library that cannot be used, and why.

    Attributes
    ----------
    headline:
        One line: what is wrong.
    detail:
        What the finder, the loader or the library itself said.
    looked:
        Every place that was looked at; empty if none was.
    path, version:
        Those of the unusable file, where there is one.
    """

    library: Library
    trouble: Trouble
    headline: str
    detail: str
    looked: tuple[str, ...]
    path: str | None = None
    version: tuple[int, ...] | None = None
    instead: str | None = None

    def remedy(self, cuda: int | None = None) -> str:
        """Return what to do about it; ``cuda`` as in :meth:`Library.mend`."""
        if self.instead is not None:
            return self.instead
        flags: dict[Trouble, str] = {
            "not found": "",
            "cannot be loaded": "--force-reinstall",
            "too old": "--upgrade",
        }
        return self.library.mend(cuda, flag=flags[self.trouble])

    @property
    def message(self) -> str:
        """All of it, in lines: what is wrong, where was looked, what to do."""
        lines = [self.headline]
        if self.looked:
            lines.append(f"  looked for {' or '.join(self.library.sonames)} in:")
            lines.extend(f"    - {place}" for place in self.looked)
            if self.trouble == "not found":
                lines.append(f"  cuda.pathfinder said: {self.detail}")
        lines.append(f"  to mend it: {self.remedy()}")
        if self.library.wheels and self.instead is None:
            lines.append(
                "  slidesparse-rt[cu12] and slidesparse-rt[cu13] bring all of them at once"
            )
        return "\n".join(lines)


def version_text(version: tuple[int, ...]) -> str:
    """``(0, 8, 1)`` -> ``"0.8.1"``."""
    return ".".join(str(part) for part in version)


def _checked(function: str, status: int) -> None:
    if status != 0:
        raise LibraryError(
            f"{function} returned status {status} instead of 0", function=function, status=status
        )


def _cusparselt_version(handle: Any) -> tuple[int, ...]:
    parts = []
    for which in range(3):  # MAJOR_VERSION, MINOR_VERSION, PATCH_LEVEL of library_types.h
        value = ctypes.c_int(-1)
        _checked("cusparseLtGetProperty", handle.cusparseLtGetProperty(which, ctypes.byref(value)))
        parts.append(value.value)
    return tuple(parts)


def _cublaslt_version(handle: Any) -> tuple[int, ...]:
    function = handle.cublasLtGetVersion
    function.restype = ctypes.c_size_t
    number = int(function())
    return (number // 10000, number // 100 % 100, number % 100)


def _nvrtc_version(handle: Any) -> tuple[int, ...]:
    major, minor = ctypes.c_int(-1), ctypes.c_int(-1)
    _checked("nvrtcVersion", handle.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
    return (major.value, minor.value)


def _driver_version(handle: Any) -> tuple[int, ...]:
    number = ctypes.c_int(-1)
    _checked("cuDriverGetVersion", handle.cuDriverGetVersion(ctypes.byref(number)))
    return (number.value // 1000, number.value % 1000 // 10)


LIBRARIES: tuple[Library, ...] = (
    Library(
        name="cuda",
        title="the CUDA driver",
        purpose="talking to the GPU",
        minimum=(12, 0),
        why_minimum="the GPU packages of pip are built for CUDA 12 and 13",
        wheels=MappingProxyType({}),
        folders=(),
        sonames=("libcuda.so.1",),
        read_version=_driver_version,
    ),
    Library(
        name="cusparseLt",
        title="cuSPARSELt",
        purpose="2:4 sparse matrix products (backend 'cusparselt')",
        minimum=(0, 7),
        why_minimum="0.6 lays out its structures differently",
        wheels=MappingProxyType({12: "nvidia-cusparselt-cu12", 13: "nvidia-cusparselt-cu13"}),
        folders=("nvidia/cu13/lib", "nvidia/cusparselt/lib"),
        sonames=("libcusparseLt.so.0",),
        read_version=_cusparselt_version,
    ),
    Library(
        name="cublasLt",
        title="cuBLASLt",
        purpose="dense matrix products to compare with (backend 'dense')",
        minimum=(12, 0),
        why_minimum="the GPU packages of pip are built for CUDA 12 and 13",
        wheels=MappingProxyType({12: "nvidia-cublas-cu12", 13: "nvidia-cublas"}),
        folders=("nvidia/cu13/lib", "nvidia/cublas/lib"),
        sonames=("libcublasLt.so.13", "libcublasLt.so.12"),
        read_version=_cublaslt_version,
    ),
    Library(
        name="nvrtc",
        title="NVRTC",
        purpose="compiling this package's kernels for the GPU at hand",
        minimum=(12, 0),
        why_minimum="sm_90a, which Hopper's kernels need, came with 12.0",
        wheels=MappingProxyType({12: "nvidia-cuda-nvrtc-cu12", 13: "nvidia-cuda-nvrtc"}),
        folders=("nvidia/cu13/lib", "nvidia/cuda_nvrtc/lib"),
        sonames=("libnvrtc.so.13", "libnvrtc.so.12"),
        read_version=_nvrtc_version,
    ),
)


def library(name: str) -> Library:
    """Return the row of the table for ``name``; OptionError for a name that is not in it."""
    for row in LIBRARIES:
        if row.name == name:
            return row
    allowed = ", ".join(repr(row.name) for row in LIBRARIES)
    raise OptionError(f"{name!r} is no library that slidesparse_rt uses; allowed are {allowed}")


def load(name: str) -> Loaded:
    """Load a library of the table, once per process.

    Parameters
    ----------
    name:
        "cuda", "cusparseLt", "cublasLt" or "nvrtc".

    Raises
    ------
    BackendUnavailable
        It was not found, or was found and cannot be loaded, or is too old; the message says which,
        lists every place looked at and the command that mends it.
    OptionError
        ``name`` is not in the table.
    """
    found = find(name)
    if isinstance(found, Missing):
        raise BackendUnavailable(found.message)
    return found


@functools.cache
def find(name: str) -> Loaded | Missing:
    """Load a library of the table, or say why not; only an unknown name raises (OptionError).

    The answer holds for the life of the process, as cuda.pathfinder's own does: a library that is
    installed later is seen by the next process.
    """
    return examine(library(name))


def examine(
    wanted: Library,
    *,
    search: Callable[[str], Located] | None = None,
    open_file: Callable[[str], Any] | None = None,
) -> Loaded | Missing:
    """Search for ``wanted``, open it and check its version; what :func:`find` remembers.

    Parameters
    ----------
    wanted:
        A row of the table.
    search:
        Takes the name, returns where the library lies or raises RuntimeError; ``None`` is
        ``cuda.pathfinder.load_nvidia_dynamic_lib``.
    open_file:
        Takes a path or a soname, returns the handle or raises OSError; ``None`` is ``ctypes.CDLL``.
    """
    open_file = open_file or _open
    looked = _places(wanted)
    try:
        located = (search or _pathfinder())(wanted.name)
    except (RuntimeError, ImportError) as error:
        return _not_located(wanted, looked, error, open_file)
    path = located.abs_path
    if path is None:
        return _cannot_load(wanted, looked, None, "cuda.pathfinder did not say where the file lies")
    try:
        handle = open_file(path)
        version = wanted.read_version(handle)
    except OSError as error:
        return _cannot_load(wanted, looked, path, str(error))
    except AttributeError as error:
        return _cannot_load(wanted, looked, path, f"it is no {wanted.title}: {error}")
    except LibraryError as error:
        return _cannot_load(wanted, looked, path, str(error))
    if version < wanted.minimum:
        return _too_old(wanted, looked, path, version)
    return Loaded(wanted, handle, path, located.found_via, version)


def _open(name: str) -> Any:
    return ctypes.CDLL(name)


def _pathfinder() -> Callable[[str], Located]:
    from cuda import pathfinder

    search: Callable[[str], Located] = pathfinder.load_nvidia_dynamic_lib
    return search


def _places(wanted: Library) -> tuple[str, ...]:
    """Where cuda.pathfinder looks for ``wanted``, in its order."""
    loader = "the system's loader (ldconfig, LD_LIBRARY_PATH)"
    if not wanted.wheels:
        return (loader,)
    roots = list(site.getsitepackages())
    if site.ENABLE_USER_SITE:
        roots.append(site.getusersitepackages())
    return (
        *(str(Path(root, folder)) for root in roots for folder in wanted.folders),
        "the active conda environment (CONDA_PREFIX)",
        loader,
        "the CUDA toolkit (CUDA_PATH or CUDA_HOME)",
    )


def _not_located(
    wanted: Library, looked: tuple[str, ...], error: Exception, open_file: Callable[[str], Any]
) -> Missing:
    """Tell the ways of not being located apart: unknown to the finder, unopenable, absent."""
    said = " ".join(str(error).split())
    kind = type(error).__name__
    if isinstance(error, ImportError) or kind == "DynamicLibUnknownError":
        return Missing(
            wanted,
            "not found",
            f"{wanted.title} was not looked for, as cuda.pathfinder cannot do it: {said}",
            said,
            (),
            instead=f"pip install --upgrade 'cuda-pathfinder>={_PATHFINDER}'",
        )
    if kind == "DynamicLibNotAvailableError":
        return Missing(
            wanted,
            "not found",
            f"{wanted.title} does not exist for this platform: {said}",
            said,
            (),
            instead="use backend='reference' here, or a Linux machine with an NVIDIA GPU",
        )
    if kind != "DynamicLibNotFoundError":
        return _cannot_load(wanted, looked, None, said)
    # A file that the system's loader finds and then refuses is reported by cuda.pathfinder as not
    # found; the loader's own words tell the two apart.
    for soname in wanted.sonames:
        try:
            open_file(soname)
        except OSError as complaint:
            words = str(complaint)
            if not (soname in words and "No such file" in words):
                return _cannot_load(wanted, looked, None, words)
    return Missing(
        wanted,
        "not found",
        f"{wanted.title} was not found; it is needed for {wanted.purpose}",
        said,
        looked,
    )


def _cannot_load(
    wanted: Library, looked: tuple[str, ...], path: str | None, reason: str
) -> Missing:
    where = f" at {path}" if path is not None else ""
    return Missing(
        wanted,
        "cannot be loaded",
        f"{wanted.title} was found{where}, but cannot be loaded: {reason}",
        reason,
        looked,
        path,
    )


def _too_old(
    wanted: Library, looked: tuple[str, ...], path: str, version: tuple[int, ...]
) -> Missing:
    reason = (
        f"version {version_text(version)}, needed is {version_text(wanted.minimum)} or newer "
        f"({wanted.why_minimum})"
    )
    return Missing(
        wanted,
        "too old",
        f"{wanted.title} at {path} is too old: {reason}",
        reason,
        looked,
        path,
        version,
    )
