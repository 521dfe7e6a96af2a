"""What the CUDA driver says about itself and the GPUs, for reports; needs no CuPy.

Only a handful of driver calls, through ctypes.  Nothing here creates a CUDA context, so asking
costs no device memory.  Source of names and numbers: cuda.h (``CUresult``, ``CUdevice_attribute``).
"""

from __future__ import annotations

import ctypes
import re
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import LibraryError
from .libraries import Loaded, Missing, find, version_text

__all__ = ["DeviceInfo", "DriverReport", "driver_release", "probe"]

#: Where the kernel module of Linux says which one it is.
_RELEASE = Path("/proc/driver/nvidia/version")

# CUdevice_attribute
_SM_COUNT = 16
_CAPABILITY_MAJOR = 75
_CAPABILITY_MINOR = 76
# CUresult
_NO_DEVICE = 100


@dataclass(frozen=True, slots=True)
class DeviceInfo:
    """One GPU as the driver describes it.

    ``index`` is CUDA's device number, ``compute_capability`` such as ``(9, 0)``, ``memory_bytes``
    the device memory in bytes, ``uuid`` such as ``"GPU-..."`` as nvidia-smi prints it.
    """

    index: int
    name: str
    compute_capability: tuple[int, int]
    sm_count: int
    memory_bytes: int
    uuid: str

    @property
    def architecture(self) -> str:
        """The compiler's name for the compute capability, such as ``"sm_90"``."""
        major, minor = self.compute_capability
        return f"sm_{major}{minor}"


@dataclass(frozen=True, slots=True)
class DriverReport:
    """Everything that :func:`probe` found.

    ``driver_version`` is the newest CUDA that the driver runs ("12.8"), ``None`` without a driver;
    ``problem`` says in words why GPUs are missing from ``devices``, ``None`` if none is.
    """

    driver_version: str | None
    devices: tuple[DeviceInfo, ...]
    problem: str | None

    @property
    def cuda_major(self) -> int | None:
        """The driver's CUDA major version, which decides between the extras cu12 and cu13."""
        return None if self.driver_version is None else int(self.driver_version.split(".")[0])


def probe(driver: Loaded | Missing | None = None) -> DriverReport:
    """Ask the driver for its version and its GPUs; never raises.

    Parameters
    ----------
    driver:
        What the search for the driver found; ``None`` searches (``find("cuda")``).
    """
    if driver is None:
        driver = find("cuda")
    if isinstance(driver, Missing):
        version = None if driver.version is None else version_text(driver.version)
        return DriverReport(version, (), f"{driver.headline}; {driver.remedy()}")
    version = version_text(driver.version)
    calls = _Calls(driver.handle)
    devices: list[DeviceInfo] = []
    try:
        calls.check("cuInit", 0)
        count = calls.number("cuDeviceGetCount")
        for index in range(count):
            devices.append(_describe(calls, index))
    except LibraryError as error:
        if error.status == _NO_DEVICE:
            problem = (
                "the driver sees no NVIDIA GPU; in a container, start it with access to the GPU; "
                "CUDA_VISIBLE_DEVICES may also hide it"
            )
        else:
            problem = f"the driver is installed, but does not work: {error}"
        return DriverReport(version, tuple(devices), problem)
    if not devices:
        return DriverReport(version, (), "the driver is installed, but reports no GPU")
    return DriverReport(version, tuple(devices), None)


def _describe(calls: _Calls, index: int) -> DeviceInfo:
    device = calls.number("cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    calls.check("cuDeviceGetName", name, len(name), device)
    memory = ctypes.c_size_t(0)
    calls.check("cuDeviceTotalMem_v2", ctypes.byref(memory), device)
    identity = ctypes.create_string_buffer(16)
    calls.check("cuDeviceGetUuid", identity, device)
    major, minor, sm_count = (
        calls.number("cuDeviceGetAttribute", attribute, device)
        for attribute in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _SM_COUNT)
    )
    return DeviceInfo(
        index=index,
        name=name.value.decode(errors="replace"),
        compute_capability=(major, minor),
        sm_count=sm_count,
        memory_bytes=memory.value,
        uuid=f"GPU-{uuid.UUID(bytes=identity.raw)}",
    )


def driver_release(path: Path = _RELEASE) -> str | None:
    """The driver's release, such as "580.159.04"; ``None`` where the system does not tell.

    :attr:`DriverReport.driver_version` is the same for many releases.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    found = re.search(r"\b\d{3,}\.\d+(?:\.\d+)?\b", text)
    return None if found is None else found[0]


class _Calls:
    """Driver functions that return a CUresult, each checked."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle

    def number(self, function: str, *arguments: int) -> int:
        """Call a function whose first parameter is an ``int*`` for the result."""
        value = ctypes.c_int(0)
        self.check(function, ctypes.byref(value), *arguments)
        return value.value

    def check(self, function: str, *arguments: Any) -> None:
        """Call ``function``; LibraryError unless it returns CUDA_SUCCESS."""
        try:
            status = int(getattr(self._handle, function)(*arguments))
        except AttributeError as error:
            raise LibraryError(f"it has no function {function}", function=function) from error
        if status != 0:
            name = self._name_of(status)
            raise LibraryError(
                f"{function} returned {name}", function=function, status=status, status_name=name
            )

    def _name_of(self, status: int) -> str:
        text = ctypes.c_char_p()
        try:
            known = self._handle.cuGetErrorName(status, ctypes.byref(text)) == 0
        except AttributeError:
            known = False
        if not known or text.value is None:
            return f"CUresult {status}"
        return f"{text.value.decode(errors='replace')} ({status})"
