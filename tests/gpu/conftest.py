"""GPU tests are skipped only where the driver reports no GPU, those of Hopper on other GPUs."""

from __future__ import annotations

import os
from collections.abc import Iterator
from functools import partial

import pytest

from slidesparse_rt.ffi.driver import DeviceInfo, probe
from slidesparse_rt.kernels import catalog

# JAX would take three quarters of the GPU's memory, and other tests need tens of gigabytes.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stress-seconds",
        type=float,
        default=20,
        help="how long the stress test of the Hopper kernel runs",
    )
    parser.addoption(
        "--each-lane",
        action="store_true",
        help="Hopper kernels whose stages are released lane by lane, for racecheck",
    )


@pytest.fixture(scope="session", autouse=True)
def _each_lane(request: pytest.FixtureRequest) -> Iterator[None]:
    """What "--each-lane" says; the kernels have the same source."""
    if not request.config.getoption("--each-lane"):
        yield
        return
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(catalog, "hopper_gemm", partial(catalog.hopper_gemm, each_lane=True))
        yield


def _spoiled_by_jax(item: pytest.Item) -> bool:
    """Whether another thread's capture is what the test is about."""
    return "test_captures_gpu" in item.nodeid or "beside_a_capture" in item.name


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # Once JAX has used the GPU, now and then a thread of its own spoils what PyTorch captures in
    # its global mode.
    items.sort(key=_spoiled_by_jax, reverse=True)
    report = probe()
    if report.devices:
        _skip_hopper(items, report.devices[0])
        return
    skip = pytest.mark.skip(reason=f"no NVIDIA GPU here: {report.problem}")
    for item in items:
        if item.get_closest_marker("gpu") is not None:
            item.add_marker(skip)


def _skip_hopper(items: list[pytest.Item], gpu: DeviceInfo) -> None:
    """Skip what is parametrized or marked with the backend "hopper" on any other GPU."""
    if gpu.compute_capability == (9, 0):
        return
    found = ".".join(map(str, gpu.compute_capability))
    skip = pytest.mark.skip(reason=f"needs compute capability 9.0, {gpu.name} has {found}")
    for item in items:
        values = item.callspec.params.values() if hasattr(item, "callspec") else ()
        if "hopper" in (value for value in values if isinstance(value, str)):
            item.add_marker(skip)
