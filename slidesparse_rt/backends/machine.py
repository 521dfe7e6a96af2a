"""What a machine lacks for a GPU backend, in words."""

from __future__ import annotations

import importlib.util

from ..arrays import Device
from ..ffi.driver import probe
from ..ffi.libraries import Missing, find

__all__ = ["gpu_refusal"]


def gpu_refusal(libraries: tuple[str, ...], device: Device) -> str:
    """Why a backend that needs ``libraries`` cannot run on a CUDA ``device``; "" if it can.

    Names everything that is missing at once: the GPU, the driver, and each library with the places
    where it was looked for and the command that brings it.
    """
    reasons: list[str] = []
    report = probe()
    if report.problem is not None:
        reasons.append(report.problem)
    elif device.index >= len(report.devices):
        reasons.append(f"{device} does not exist; there are {len(report.devices)} CUDA devices")
    if importlib.util.find_spec("cupy") is None:
        reasons.append(
            "CuPy is not installed: pip install 'slidesparse-rt[cu13]' (CUDA 13) or "
            "'slidesparse-rt[cu12]' (CUDA 12) brings it"
        )
    for name in libraries:
        found = find(name)
        if isinstance(found, Missing):
            reasons.append(found.message)
    return "; ".join(reasons)
