"""Hypothesis profiles (``--hypothesis-profile=`` ci, the default, dev, thorough) and fixtures."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from pathlib import Path

    from fake_tuning import Machine

    from slidesparse_rt import SparseGemmPlan

# deadline=None: the first call of a kernel compiles it.
_COMMON = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

settings.register_profile("ci", max_examples=40, derandomize=True, **_COMMON)
settings.register_profile("dev", max_examples=100, **_COMMON)
settings.register_profile("thorough", max_examples=10_000, **_COMMON)
# pytest's option is applied after this file is imported, and wins.
settings.load_profile("ci")


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hides the GPU and its libraries."""
    from cuda.pathfinder import DynamicLibNotFoundError

    from slidesparse_rt.backends import machine
    from slidesparse_rt.ffi.driver import DriverReport
    from slidesparse_rt.ffi.libraries import examine, library

    def search(name: str) -> Any:
        raise DynamicLibNotFoundError("hidden by this test")

    def open_file(name: str) -> Any:
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    monkeypatch.setattr(
        machine, "probe", lambda: DriverReport(None, (), "the driver sees no NVIDIA GPU")
    )
    monkeypatch.setattr(
        machine, "find", lambda name: examine(library(name), search=search, open_file=open_file)
    )


@pytest.fixture
def small() -> Iterator[SparseGemmPlan]:
    """A 6:8 int8 plan of 4 x 16."""
    from plans import fitted

    from slidesparse_rt import SparseGemmPlan

    with SparseGemmPlan(fitted("6:8", 4, 16), "6:8") as made:
        yield made


@pytest.fixture
def gpu_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Machine]:
    """A GPU that only has a clock, with three backends; see fake_tuning.py."""
    from fake_tuning import make_machine

    yield from make_machine(monkeypatch, tmp_path)
