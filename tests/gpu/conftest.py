"""GPU tests are skipped only where the driver reports no GPU."""

from __future__ import annotations

import os

import pytest

from slidesparse_rt.ffi.driver import probe

# JAX would take three quarters of the GPU's memory, and other tests need tens of gigabytes.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    report = probe()
    if report.devices:
        return
    skip = pytest.mark.skip(reason=f"no NVIDIA GPU here: {report.problem}")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
