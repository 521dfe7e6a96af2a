"""``slidesparse doctor``: what this machine can run, what is missing, what mends it."""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._version import __version__
from ..ffi.driver import DriverReport, probe
from ..ffi.libraries import LIBRARIES, Loaded, Missing, find, version_text
from .console import printable, show_table, size_text, styled

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from ..dtypes import Operand

__all__ = ["Diagnosis", "Gap", "Verdict", "diagnose"]

#: Compute capability from which cuSPARSELt multiplies each operand format (its release notes).
_CUSPARSELT_NEEDS: Mapping[str, tuple[int, int]] = {
    "int8": (8, 0),
    "fp8_e4m3": (8, 9),
    "bf16": (8, 0),
    "fp16": (8, 0),
}
#: cuSPARSELt before this knows fp8 on sm_90 only.
_CUSPARSELT_ADA_FP8 = (0, 8)

#: What people call a package -> the distributions that may hold it.
_PACKAGES: Mapping[str, tuple[str, ...]] = {
    "numpy": ("numpy",),
    "ml_dtypes": ("ml_dtypes",),
    "numba": ("numba",),
    "safetensors": ("safetensors",),
    "cuda-pathfinder": ("cuda-pathfinder",),
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "cuda-python": ("cuda-python", "cuda-bindings"),
    "torch": ("torch",),
    "jax": ("jax",),
    "tokenizers": ("tokenizers",),
}
#: Packages of that table that only the GPU extras bring, and what brings them.
_GPU_PACKAGES: Mapping[str, Mapping[int, str]] = {
    "cupy": {12: "cupy-cuda12x", 13: "cupy-cuda13x"},
    "cuda-python": {12: "'cuda-python>=12.8,<13'", 13: "'cuda-python>=13,<14'"},
}


@dataclass(frozen=True, slots=True)
class Verdict:
    """Whether one backend multiplies one operand format on one device ("cpu", "cuda:0", ...)."""

    dtype: str
    backend: str
    device: str
    ok: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Gap:
    """Something that is missing, and what to do about it."""

    what: str
    mend: str


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that the doctor found.

    ``cpu_problem`` is ``None`` if the CPU path works.  ``packages`` maps each package to
    "distribution version", or ``None`` where it is not installed.
    """

    cpu_problem: str | None
    driver: DriverReport
    libraries: tuple[Loaded | Missing, ...]
    packages: Mapping[str, str | None]
    verdicts: tuple[Verdict, ...]
    gaps: tuple[Gap, ...]
    everything: str

    def to_json(self) -> dict[str, Any]:
        """The diagnosis as plain dictionaries, lists, strings and numbers."""
        return {
            "slidesparse_rt": __version__,
            "python": {"version": platform.python_version(), "executable": sys.executable},
            "platform": platform.platform(),
            "cpu_path": {"ok": self.cpu_problem is None, "problem": self.cpu_problem},
            "driver": {"cuda_version": self.driver.driver_version, "problem": self.driver.problem},
            "gpus": [
                {
                    "index": gpu.index,
                    "name": gpu.name,
                    "architecture": gpu.architecture,
                    "sm_count": gpu.sm_count,
                    "memory_bytes": gpu.memory_bytes,
                    "uuid": gpu.uuid,
                }
                for gpu in self.driver.devices
            ],
            "libraries": [_library_json(row) for row in self.libraries],
            "packages": dict(self.packages),
            "support": [
                {
                    "dtype": row.dtype,
                    "backend": row.backend,
                    "device": row.device,
                    "ok": row.ok,
                    "reason": row.reason,
                }
                for row in self.verdicts
            ],
            "missing": [{"what": gap.what, "mend": gap.mend} for gap in self.gaps],
            "everything": self.everything,
        }

    def render(self, screen: Console) -> None:
        """Print the diagnosis for people."""
        screen.print(
            f"slidesparse_rt {__version__}, Python {platform.python_version()} "
            f"({sys.executable}), {platform.platform()}",
            soft_wrap=True,
        )
        if self.cpu_problem is None:
            screen.print("CPU path: works")
        else:
            screen.print(
                styled(f"CPU path: BROKEN: {self.cpu_problem}", "bold red"), soft_wrap=True
            )
        self._render_gpus(screen)
        self._render_libraries(screen)
        screen.print()
        screen.print(styled("Packages", "bold"))
        found = [f"{name} {text}" for name, text in self.packages.items() if text is not None]
        absent = [name for name, text in self.packages.items() if text is None]
        screen.print("  installed: " + (", ".join(found) or "none"), soft_wrap=True)
        if absent:
            screen.print("  not installed: " + ", ".join(absent), soft_wrap=True)
        self._render_verdicts(screen)
        screen.print()
        if not self.gaps:
            screen.print("Nothing is missing.")
            return
        screen.print(styled("Missing", "bold"))
        for gap in self.gaps:
            screen.print(f"  {gap.what}: {gap.mend}", soft_wrap=True)
        screen.print(f"All GPU packages at once: {self.everything}", soft_wrap=True)

    def _render_gpus(self, screen: Console) -> None:
        version = self.driver.driver_version
        screen.print(f"CUDA driver: {'none' if version is None else f'up to CUDA {version}'}")
        absent = [row for row in self.libraries if isinstance(row, Missing)]
        headline = next((row.headline for row in absent if row.library.name == "cuda"), None)
        if self.driver.problem is not None:
            screen.print(f"  no usable GPU: {headline or self.driver.problem}", soft_wrap=True)
        for gpu in self.driver.devices:
            screen.print(
                f"GPU {gpu.index}: {printable(gpu.name)}, {gpu.architecture}, {gpu.sm_count} SMs, "
                f"{size_text(gpu.memory_bytes)}, {gpu.uuid}",
                soft_wrap=True,
            )

    def _render_libraries(self, screen: Console) -> None:
        rows: list[tuple[str | Text, ...]] = []
        for row in self.libraries:
            least = version_text(row.library.minimum)
            if isinstance(row, Loaded):
                rows.append(
                    (row.library.title, "found", version_text(row.version), least, row.found_via)
                )
            else:
                seen = "-" if row.version is None else version_text(row.version)
                rows.append((row.library.title, styled(row.trouble, "yellow"), seen, least, "-"))
        show_table(screen, ("library", "", "version", "needed", "found by"), rows, left=5)
        for row in self.libraries:
            if isinstance(row, Loaded):
                screen.print(f"  {row.library.title}: {row.path}", soft_wrap=True)
            elif row.trouble != "not found":
                screen.print(f"  {row.headline}", soft_wrap=True)

    def _render_verdicts(self, screen: Console) -> None:
        if not self.verdicts:
            return
        columns = list(dict.fromkeys((row.backend, row.device) for row in self.verdicts))
        reasons: dict[str, int] = {}
        cells: dict[tuple[str, str, str], str] = {}
        for row in self.verdicts:
            if row.ok:
                cells[row.dtype, row.backend, row.device] = "yes"
                continue
            number = reasons.setdefault(row.reason.splitlines()[0], len(reasons) + 1)
            cells[row.dtype, row.backend, row.device] = f"no ({number})"
        dtypes = list(dict.fromkeys(row.dtype for row in self.verdicts))
        show_table(
            screen,
            ("what runs where", *(f"{backend}\n{device}" for backend, device in columns)),
            [(dtype, *(cells[(dtype, *column)] for column in columns)) for dtype in dtypes],
            left=1 + len(columns),
        )
        for reason, number in reasons.items():
            screen.print(f"  ({number}) {reason}", soft_wrap=True)


def diagnose(
    *,
    ask_driver: Callable[[], DriverReport] = probe,
    find_library: Callable[[str], Loaded | Missing] = find,
    package_version: Callable[[str], str] = importlib.metadata.version,
    check_cpu: Callable[[], str | None] | None = None,
    ask_backend: Callable[[str, Operand, int], str] | None = None,
) -> Diagnosis:
    """Examine this machine.

    Parameters
    ----------
    ask_driver, find_library, package_version, check_cpu, ask_backend:
        Stand in for :func:`probe`, :func:`find`, ``importlib.metadata.version``,
        :func:`cpu_path_problem` and :func:`backend_refusal`; for tests.
    """
    driver = ask_driver()
    libraries = tuple(find_library(row.name) for row in LIBRARIES)
    packages = {name: _installed(names, package_version) for name, names in _PACKAGES.items()}
    cpu_problem = (check_cpu or cpu_path_problem)()
    major = driver.cuda_major
    everything = (
        f"pip install 'slidesparse-rt[cu{major}]'"
        if major in (12, 13)
        else "pip install 'slidesparse-rt[cu12]' (CUDA 12) or "
        "pip install 'slidesparse-rt[cu13]' (CUDA 13)"
    )
    return Diagnosis(
        cpu_problem=cpu_problem,
        driver=driver,
        libraries=libraries,
        packages=packages,
        verdicts=_verdicts(cpu_problem, driver, libraries, ask_backend or backend_refusal),
        gaps=_gaps(driver, libraries, packages),
        everything=everything,
    )


def cpu_path_problem() -> str | None:
    """Import the CPU path and multiply something small; ``None`` if the result is right."""
    try:
        import numpy as np

        importlib.import_module("safetensors.numpy")  # what files are read and written with
        from ..packing import lift, prune, slide
        from ..plan import SparseGemmPlan

        # Integers whose rows reach 127, so that int8 holds them exactly, with scale 1.
        weight = (np.arange(192, dtype=np.float32) * 37 % 253 - 126).reshape(8, 24)
        weight[:, 5] = 127
        weight = prune(weight, "6:8")
        x = (np.arange(72, dtype=np.float32) * 31 % 253 - 126).reshape(3, 24)
        x[:, 7] = -127
        exact = x @ weight.T
        if not np.array_equal(lift(x, "6:8") @ slide(weight, "6:8").T, exact):
            return "sliding windows changed a product of small integers"
        with SparseGemmPlan(weight, "6:8", backend="reference") as plan:
            if not np.array_equal(plan.run(x), exact):
                return "the reference backend changed a product of small integers"
    except Exception as error:  # whatever it is, it is what the doctor is asked for
        return f"{type(error).__name__}: {error}"
    return None


def _installed(names: tuple[str, ...], package_version: Callable[[str], str]) -> str | None:
    """The first of these distributions that is installed, with its version."""
    for name in names:
        try:
            version = package_version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
        return version if name == names[0] and len(names) == 1 else f"{version} ({name})"
    return None


def backend_refusal(backend: str, row: Operand, index: int) -> str:
    """Ask a backend why it cannot multiply ``row`` on GPU ``index``; "" if it can."""
    from ..arrays import Device
    from ..backends import Problem, choose
    from ..pattern import Pattern

    try:
        choose(backend, Problem(128, 128, Pattern.parse("6:8"), row), Device("cuda", index))
    except Exception as error:  # a backend that cannot even be asked is refused, too
        lines = str(error).splitlines() or [type(error).__name__]
        mark = f"  {backend}: "
        own = [line.removeprefix(mark) for line in lines if line.startswith(mark)]
        return (own or lines)[0]
    return ""


def _verdicts(
    cpu_problem: str | None,
    driver: DriverReport,
    libraries: tuple[Loaded | Missing, ...],
    ask_backend: Callable[[str, Operand, int], str],
) -> tuple[Verdict, ...]:
    try:
        from ..backends import BACKENDS, needs_gpu
        from ..dtypes import OPERANDS
    except ImportError:
        return ()  # cpu_problem says which package is missing

    verdicts = []
    for row in OPERANDS:
        for backend in BACKENDS:
            if backend == "auto":
                continue
            if not needs_gpu(backend):
                reason = cpu_problem or ""
                verdicts.append(Verdict(row.name, backend, "cpu", not reason, reason))
            elif not driver.devices:
                verdicts.append(Verdict(row.name, backend, "gpu", False, "there is no usable GPU"))
            else:
                for gpu in driver.devices:
                    reason = (
                        _cusparselt_reason(row, gpu.compute_capability, libraries)
                        if backend == "cusparselt"
                        else ""
                    ) or ask_backend(backend, row, gpu.index)
                    device = f"cuda:{gpu.index}"
                    verdicts.append(Verdict(row.name, backend, device, not reason, reason))
    return tuple(verdicts)


def _cusparselt_reason(
    row: Operand, capability: tuple[int, int], libraries: tuple[Loaded | Missing, ...]
) -> str:
    """Why cuSPARSELt itself cannot multiply ``row`` on such a GPU; "" if it can."""
    library = next(entry for entry in libraries if entry.library.name == "cusparseLt")
    needed = _CUSPARSELT_NEEDS[row.name]
    have = f"this GPU is sm_{capability[0]}{capability[1]}"
    if capability < needed:
        return f"cuSPARSELt multiplies {row.name} from sm_{needed[0]}{needed[1]} on; {have}"
    if isinstance(library, Missing):
        return library.headline
    if row.name == "fp8_e4m3" and capability < (9, 0) and library.version < _CUSPARSELT_ADA_FP8:
        return (
            f"cuSPARSELt {version_text(library.version)} multiplies {row.name} from sm_90 on, "
            f"{version_text(_CUSPARSELT_ADA_FP8)} from sm_89 on; {have}"
        )
    return ""


def _gaps(
    driver: DriverReport,
    libraries: tuple[Loaded | Missing, ...],
    packages: Mapping[str, str | None],
) -> tuple[Gap, ...]:
    major = driver.cuda_major
    gaps = []
    for row in libraries:
        if isinstance(row, Missing):
            gaps.append(Gap(f"{row.library.title} ({row.trouble})", row.remedy(major)))
        elif major is not None and row.library.wheels and _too_new(row, major):
            gaps.append(
                Gap(
                    f"{row.library.title} {version_text(row.version)} is newer than the driver, "
                    f"which runs up to CUDA {driver.driver_version}",
                    f"update the driver, or {row.library.mend(major)}",
                )
            )
    driver_found = any(row.library.name == "cuda" for row in libraries if isinstance(row, Loaded))
    if driver.problem is not None and driver_found:
        gaps.append(Gap("a usable GPU", driver.problem))
    for name, wheels in _GPU_PACKAGES.items():
        if packages[name] is None:
            brings = (
                f"pip install {wheels[major]}"
                if major is not None and major in wheels
                else " or ".join(f"pip install {p} (CUDA {m})" for m, p in wheels.items())
            )
            gaps.append(Gap(name, brings))
    return tuple(gaps)


def _too_new(row: Loaded, major: int) -> bool:
    """Whether a library that carries CUDA's own version belongs to a newer CUDA than the driver."""
    return row.library.name in ("cublasLt", "nvrtc") and row.version[0] > major


def _library_json(row: Loaded | Missing) -> dict[str, Any]:
    plain: dict[str, Any] = {
        "name": row.library.name,
        "title": row.library.title,
        "purpose": row.library.purpose,
        "minimum": version_text(row.library.minimum),
        "found": isinstance(row, Loaded),
        "path": row.path,
        "version": None if row.version is None else version_text(row.version),
    }
    if isinstance(row, Loaded):
        return plain | {"found_via": row.found_via}
    return plain | {"trouble": row.trouble, "detail": row.detail, "looked": list(row.looked)}
