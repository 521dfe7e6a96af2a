"""Clocks, power and temperature of the GPU while something is measured, through NVML."""

from __future__ import annotations

import contextlib
import importlib
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

__all__ = ["Clocks", "mean"]


def mean(values: Sequence[float | None]) -> float | None:
    """The mean of what is known; ``None`` if nothing is."""
    known = [value for value in values if value is not None]
    return statistics.fmean(known) if known else None


class Clocks:
    """Samples clocks, power and temperature through NVML in a thread of its own.

    Without the module ``pynvml`` (nvidia-ml-py), or where NVML refuses, every value is ``None``.

    Parameters
    ----------
    bus_id:
        The GPU's PCI address.
    interval:
        Seconds between samples.
    """

    def __init__(self, bus_id: str, *, interval: float = 0.02) -> None:
        self._bus_id = bus_id
        self._interval = interval
        self._samples: list[tuple[float, dict[str, float]]] = []
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._read: Callable[[], dict[str, float]] | None = None

    @staticmethod
    def nothing() -> dict[str, float | None]:
        """What is known without NVML."""
        return {"sm_mhz": None, "power_w": None, "temperature_c": None}

    @staticmethod
    def facts(bus_id: str) -> dict[str, Any]:
        """The driver's version and the power limit; ``None`` without NVML."""
        found: dict[str, Any] = {"driver": None, "power_limit_w": None}
        nvml, handle = _nvml(bus_id)
        if nvml is not None:
            with contextlib.suppress(nvml.NVMLError):
                version = nvml.nvmlSystemGetDriverVersion()
                found["driver"] = version.decode() if isinstance(version, bytes) else version
            with contextlib.suppress(nvml.NVMLError):
                found["power_limit_w"] = nvml.nvmlDeviceGetEnforcedPowerLimit(handle) / 1e3
        return found

    def __enter__(self) -> Clocks:
        nvml, handle = _nvml(self._bus_id)
        if nvml is not None:
            self._read = partial(_sample, nvml, handle)
            self._thread = threading.Thread(target=self._run, args=(self._read,), daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def since(self, moment: float) -> dict[str, float | None]:
        """Means of the samples from ``moment`` (time.monotonic) on.

        What took less than the interval has none: then one is taken now, just after it.
        """
        samples = [values for when, values in list(self._samples) if when >= moment]
        if not samples and self._read is not None:
            samples = [self._read()]
        return {key: mean([values.get(key) for values in samples]) for key in self.nothing()}

    def _run(self, read: Callable[[], dict[str, float]]) -> None:
        while not self._stop.wait(self._interval):
            values = read()
            self._samples.append((time.monotonic(), values))


def _sample(nvml: Any, handle: Any) -> dict[str, float]:
    """What NVML tells now."""
    readers: dict[str, Callable[[], float]] = {
        "sm_mhz": lambda: nvml.nvmlDeviceGetClockInfo(handle, nvml.NVML_CLOCK_SM),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
        "temperature_c": lambda: nvml.nvmlDeviceGetTemperature(handle, nvml.NVML_TEMPERATURE_GPU),
    }
    values = {}
    for key, read in readers.items():
        with contextlib.suppress(nvml.NVMLError):
            values[key] = float(read())
    return values


def _nvml(bus_id: str) -> tuple[Any, Any]:
    """NVML and its handle of the GPU; ``(None, None)`` where it cannot be had."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # an older package of that name announces its end
            pynvml: Any = importlib.import_module("pynvml")
    except ImportError:
        return None, None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByPciBusId(bus_id)
    except pynvml.NVMLError:
        return None, None
