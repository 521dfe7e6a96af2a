"""GPU tests are skipped only where the driver reports no GPU."""

from __future__ import annotations

import pytest

from slidesparse_rt.ffi.driver import probe


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    report = probe()
    if report.devices:
        return
    skip = pytest.mark.skip(reason=f"no NVIDIA GPU here: {report.problem}")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)
