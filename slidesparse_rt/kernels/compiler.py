"""From a :class:`~slidesparse_rt.kernels.catalog.KernelSpec` to machine code, by NVRTC.

NVRTC needs neither a GPU nor a CUDA toolkit, and the sources include no CUDA header, so the tests
compile every kernel for every architecture on a machine without a GPU.

The compiled code is for one architecture (a cubin, no PTX): the driver only loads it.  The key
under which it is kept covers the source, the headers that it includes, all options, the
architecture and the compiler's version.

Sources: nvrtc.h; the resource report is ptxas' (``--ptxas-options=-v``).
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import re
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar

from ..errors import CompileError
from ..ffi.checked import CLibrary, Function, declare, functions
from ..ffi.libraries import load, version_text
from ..user_cache import cache_folder, write_whole
from .catalog import KernelSpec

__all__ = [
    "CompiledKernel",
    "Compiler",
    "Nvrtc",
    "Source",
    "cache_key",
    "compile_cubin",
    "default_directory",
    "read_source",
]

#: Options that every kernel gets.  IEEE division, subnormals kept, nothing contracted: the numbers
#: must be those of NumPy.
_OPTIONS = (
    "--std=c++17",
    "--fmad=false",
    "--ftz=false",
    "--prec-div=true",
    "--prec-sqrt=true",
    "--ptxas-options=-v",
)

#: The NVRTC that came with a cache of its own.
_HAS_CACHE = (12, 9)

_INCLUDE = re.compile(r'^[ \t]*#[ \t]*include[ \t]*"([^"\n]+)"', re.MULTILINE)


class NvrtcStatus(IntEnum):
    """``nvrtcResult``."""

    SUCCESS = 0
    ERROR_OUT_OF_MEMORY = 1
    ERROR_PROGRAM_CREATION_FAILURE = 2
    ERROR_INVALID_INPUT = 3
    ERROR_INVALID_PROGRAM = 4
    ERROR_INVALID_OPTION = 5
    ERROR_COMPILATION = 6
    ERROR_BUILTIN_OPERATION_FAILURE = 7
    ERROR_INTERNAL_ERROR = 11


class Nvrtc(CLibrary):
    """The functions of NVRTC that are used."""

    FUNCTIONS: ClassVar[Mapping[str, Function]] = functions(
        declare("nvrtcCreateProgram", "prog src name numHeaders:int headers includeNames"),
        declare("nvrtcDestroyProgram", "prog"),
        declare("nvrtcCompileProgram", "prog numOptions:int options"),
        declare("nvrtcGetProgramLogSize", "prog logSizeRet"),
        declare("nvrtcGetProgramLog", "prog log"),
        declare("nvrtcGetCUBINSize", "prog cubinSizeRet"),
        declare("nvrtcGetCUBIN", "prog cubin"),
        declare("nvrtcGetNumSupportedArchs", "numArchs"),
        declare("nvrtcGetSupportedArchs", "supportedArchs"),
        declare("nvrtcGetErrorString", "result:int", returns=ctypes.c_char_p),
    )
    STATUS: ClassVar[type[IntEnum]] = NvrtcStatus
    STATUS_PREFIX: ClassVar[str] = "NVRTC_"
    OUT_OF_MEMORY: ClassVar[int] = NvrtcStatus.ERROR_OUT_OF_MEMORY
    ADVICE: ClassVar[Mapping[int, str]] = {}
    DESCRIBE: ClassVar[str] = "nvrtcGetErrorString"

    def architectures(self) -> tuple[int, ...]:
        """Return the compute capabilities that it compiles for, as 80, 90, 120."""
        count = ctypes.c_int(0)
        self.nvrtcGetNumSupportedArchs(ctypes.byref(count))
        numbers = (ctypes.c_int * count.value)()
        self.nvrtcGetSupportedArchs(numbers)
        return tuple(numbers)


# --- sources --------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Source:
    """One source file and everything that it includes, directly or not.

    ``headers`` maps the name in ``#include "name"`` to the text.
    """

    name: str
    text: str
    headers: Mapping[str, str]


def source_folder() -> Any:
    """Return where the sources are: in the installed package, or beside it in the repository."""
    packaged = resources.files("slidesparse_rt").joinpath("kernels_cu")
    if packaged.is_dir():
        return packaged
    beside = Path(__file__).resolve().parents[2] / "kernels_cu"
    if beside.is_dir():
        return beside
    raise CompileError(
        f"the CUDA sources are missing: neither {packaged} nor {beside} exists; install "
        "slidesparse-rt again, from a wheel or a complete checkout"
    )


def read_source(name: str, folder: Any = None) -> Source:
    """Read a source of ``kernels_cu/`` with its headers.

    Parameters
    ----------
    name:
        File name, such as "quantize_lift.cu".
    folder:
        Where to look instead: a directory path.

    Raises
    ------
    CompileError
        If the file, or one that it includes, is not there.
    """
    folder = source_folder() if folder is None else folder
    text = _read(folder, name, "")
    headers: dict[str, str] = {}
    waiting = [(name, text)]
    while waiting:
        includer, content = waiting.pop()
        for header in _INCLUDE.findall(content):
            if header not in headers:
                headers[header] = _read(folder, header, f", which {includer} includes,")
                waiting.append((header, headers[header]))
    return Source(name, text, headers)


def _read(folder: Any, name: str, why: str) -> str:
    try:
        text: str = folder.joinpath(name).read_text(encoding="utf-8")
    except OSError as error:
        raise CompileError(
            f"the CUDA source {name}{why} cannot be read from {folder}: {error.strerror}; "
            "install slidesparse-rt again"
        ) from error
    return text


def cache_key(
    source: Source, options: tuple[str, ...], architecture: str, version: tuple[int, ...]
) -> str:
    """Return the key of the code compiled from all this, 64 hexadecimal digits.

    Parameters
    ----------
    source:
        Text and headers.
    options:
        Compiler options, in order.
    architecture:
        Such as "sm_90a".
    version:
        The compiler's.
    """
    parts = [source.name, source.text, architecture, version_text(version), *options]
    for name in sorted(source.headers):
        parts += [name, source.headers[name]]
    digest = hashlib.sha256()
    for part in (str(len(source.headers)), *parts):
        data = part.encode()
        digest.update(len(data).to_bytes(8, "little") + data)
    return digest.hexdigest()


# --- compiling ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Resources:
    """What ptxas says about one entry point: registers of a thread, bytes beside them."""

    registers: int
    spill_stores: int
    spill_loads: int
    stack: int


@dataclass(frozen=True, slots=True)
class CompiledKernel:
    """Machine code of one source with one set of options.

    ``cubin`` is what the driver loads, ``entries`` the resources of each entry point, ``log`` the
    compiler's log, ``key`` that of :func:`cache_key`.
    """

    key: str
    cubin: bytes
    log: str
    entries: Mapping[str, Resources]

    @classmethod
    def from_log(cls, key: str, cubin: bytes, log: str) -> CompiledKernel:
        """Make one, reading the resources from the log; CompileError if the log has none."""
        entries: dict[str, Resources] = {}
        for part in log.split("Compiling entry function ")[1:]:
            name = re.match(r"'([^']+)'", part)
            frame = re.search(
                r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part
            )
            used = re.search(r"Used (\d+) registers", part)
            if name and frame and used:
                stack, stores, loads = (int(number) for number in frame.groups())
                entries[name[1]] = Resources(int(used[1]), stores, loads, stack)
        if not entries:
            raise CompileError(
                "the compiler's log names no kernel with its registers; report this with the log",
                log=log,
            )
        return cls(key, cubin, log, entries)


def default_directory() -> Path | None:
    """Return where compiled kernels are kept: in the user's cache; ``None`` without a home."""
    return cache_folder("kernels")


class Compiler:
    """Compiles kernels, each once; safe to share between threads.

    Parameters
    ----------
    directory:
        Where compiled kernels are kept for the next process; ``None`` keeps them in memory only.
        A directory that cannot be written to is the same as none.
    library:
        NVRTC; ``None`` is this process's, loaded on first use.
    folder:
        Directory of the sources; ``None`` is the package's own.
    """

    def __init__(
        self,
        directory: Path | None = None,
        *,
        library: Nvrtc | None = None,
        folder: Any = None,
    ) -> None:
        self._directory = directory
        self._library = library
        self._folder = folder
        # Each kernel is compiled by one thread, different ones at a time.
        self._lock = threading.Lock()
        self._sources: dict[str, Source] = {}
        self._started: dict[str, threading.Lock] = {}
        self._done: dict[str, CompiledKernel] = {}

    @property
    def library(self) -> Nvrtc:
        """NVRTC; BackendUnavailable, with every place looked at, if there is none."""
        if self._library is None:
            self._library = Nvrtc(load("nvrtc"))
        return self._library

    def architecture(self, capability: tuple[int, int], *, exact: bool = False) -> str:
        """Return the architecture to compile for.

        Parameters
        ----------
        capability:
            The GPU's compute capability, such as ``(9, 0)``.
        exact:
            Whether the kernel needs the instructions of that GPU alone.

        Raises
        ------
        CompileError
            If this NVRTC compiles nothing that runs there.
        """
        major, minor = capability
        known = self.library.architectures()
        fitting = [number for number in known if number // 10 == major and number % 10 <= minor]
        if not fitting or (exact and max(fitting) != 10 * major + minor):
            raise CompileError(
                f"NVRTC {version_text(self.library.version)} compiles nothing for a GPU of compute "
                f"capability {major}.{minor} (it knows {', '.join(map(str, known))}); install a "
                "newer NVRTC (nvidia-cuda-nvrtc, or nvidia-cuda-nvrtc-cu12)"
            )
        return f"sm_{max(fitting)}{'a' if exact else ''}"

    def compile(self, spec: KernelSpec, architecture: str) -> CompiledKernel:
        """Return the compiled kernel, from memory, from the directory, or from NVRTC.

        Raises
        ------
        CompileError
            If NVRTC refuses it; the error has the log and the options.
        BackendUnavailable
            If there is no NVRTC.
        """
        with self._lock:
            source = self._sources.get(spec.source)
            if source is None:
                source = self._sources[spec.source] = read_source(spec.source, self._folder)
            options = (*_OPTIONS, *spec.options)
            if self.library.version >= _HAS_CACHE:
                # NVRTC's own cache forgets the log, which has the registers and spills.
                options += ("--no-cache",)
            key = cache_key(source, options, architecture, self.library.version)
            started = self._started.setdefault(key, threading.Lock())
        with started:
            found = self._done.get(key)
            if found is None:
                found = self._kept(key)
                if found is None:
                    library = self.library
                    found = _build(library, source, options, architecture, key, spec.title)
                    self._keep(found)
                self._done[key] = found
            return found

    def compile_ahead(self, specs: Iterable[tuple[KernelSpec, str]]) -> None:
        """Compile kernels, each for its architecture, side by side.

        Returns when all are done.  What NVRTC refuses is left to :meth:`compile`, which says so.
        """

        def try_one(wanted: tuple[KernelSpec, str]) -> None:
            with contextlib.suppress(CompileError):
                self.compile(*wanted)

        all_of_them = list(specs)
        if len(all_of_them) > 1:
            with ThreadPoolExecutor(min(len(all_of_them), _threads())) as threads:
                list(threads.map(try_one, all_of_them))

    def _kept(self, key: str) -> CompiledKernel | None:
        """Read what an earlier process compiled; ``None`` if there is nothing or it is damaged."""
        if self._directory is None:
            return None
        try:
            header, cubin = (self._directory / f"{key}.cubin").read_bytes().split(b"\n", 1)
            facts = json.loads(header)
            if facts["sha256"] != hashlib.sha256(cubin).hexdigest():
                return None
            return CompiledKernel.from_log(key, cubin, facts["log"])
        except (OSError, ValueError, KeyError, TypeError, CompileError):
            return None

    def _keep(self, compiled: CompiledKernel) -> None:
        """Keep a compiled kernel for the next process, where that is possible."""
        if self._directory is None:
            return
        facts = {"sha256": hashlib.sha256(compiled.cubin).hexdigest(), "log": compiled.log}
        with contextlib.suppress(OSError):
            write_whole(
                self._directory / f"{compiled.key}.cubin",
                json.dumps(facts).encode() + b"\n" + compiled.cubin,
            )


def _threads() -> int:
    """How many kernels are compiled at a time: as CPUs that this process may use, at most 16."""
    allowed = getattr(os, "sched_getaffinity", None)
    return min(16, len(allowed(0)) if allowed else os.cpu_count() or 1)


def compile_cubin(
    spec: KernelSpec, architecture: str, *, library: Nvrtc | None = None, folder: Any = None
) -> CompiledKernel:
    """Compile one kernel, with no cache; arguments and errors as for :class:`Compiler`."""
    return Compiler(library=library, folder=folder).compile(spec, architecture)


def _build(
    library: Nvrtc,
    source: Source,
    options: tuple[str, ...],
    architecture: str,
    key: str,
    title: str,
) -> CompiledKernel:
    options = (f"--gpu-architecture={architecture}", *options)
    names = tuple(source.headers)
    count = len(names)
    texts = (ctypes.c_char_p * count)(*(source.headers[name].encode() for name in names))
    includes = (ctypes.c_char_p * count)(*(name.encode() for name in names))
    program = ctypes.c_void_p(None)
    library.nvrtcCreateProgram(
        ctypes.byref(program), source.text.encode(), source.name.encode(), count, texts, includes
    )
    try:
        given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        status = library.raw("nvrtcCompileProgram")(program, len(options), given)
        log = _text(library, program)
        if status:
            raise CompileError(
                f"NVRTC {version_text(library.version)} cannot compile {title} for {architecture}: "
                f"{library.status_name(status)}\n{log}",
                log=log,
                options=options,
            )
        size = ctypes.c_size_t(0)
        library.nvrtcGetCUBINSize(program, ctypes.byref(size))
        cubin = ctypes.create_string_buffer(size.value)
        library.nvrtcGetCUBIN(program, cubin)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))
    return CompiledKernel.from_log(key, cubin.raw, log)


def _text(library: Nvrtc, program: ctypes.c_void_p) -> str:
    size = ctypes.c_size_t(0)
    library.nvrtcGetProgramLogSize(program, ctypes.byref(size))
    log = ctypes.create_string_buffer(max(1, size.value))
    library.nvrtcGetProgramLog(program, log)
    return log.value.decode(errors="replace").strip()
