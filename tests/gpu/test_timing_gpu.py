"""Timing launches on a GPU: that memory is read to empty the cache, and which launch is faster."""

from __future__ import annotations

import statistics

import pytest

from slidesparse_rt.backends.cold import cold_cache
from slidesparse_rt.backends.gpu_device import gpu_device, working_on
from slidesparse_rt.backends.timing import fastest, launch_times
from slidesparse_rt.kernels import catalog
from slidesparse_rt.kernels.launch import Launch
from slidesparse_rt.kernels.loader import kernels_of

pytestmark = pytest.mark.gpu

#: Faster than any GPU reads its memory, in bytes a millisecond.
_BEYOND = 16e9


class Reader:
    """Reads a part of some memory."""

    def __init__(self, nbytes: int) -> None:
        kernels = kernels_of(0)
        self.memory = gpu_device(0).allocate(nbytes)
        self.launch = Launch(kernels.cuda, kernels.load(catalog.evict()), "Qq")

    def part(self, nbytes: int):
        def run(stream: int) -> None:
            self.launch(8 * 132, 256, 1, 0, stream, self.memory.pointer, nbytes // 16)

        return run


@pytest.fixture
def stream():
    import cupy

    with working_on(0):
        made = cupy.cuda.Stream(non_blocking=True)
        yield made.ptr
        made.synchronize()


def test_what_is_to_be_read_is_read(stream) -> None:
    nbytes = 1 << 30
    reader = Reader(nbytes)
    with reader.memory:
        assert launch_times([reader.part(nbytes)], stream)[0] > nbytes / _BEYOND


def test_the_cache_is_emptied(stream) -> None:
    device = gpu_device(0)
    nbytes = device.l2_bytes // 3
    reader = Reader(nbytes)
    with reader.memory, cold_cache(device) as empty:
        warm, cold = [], []
        for _ in range(5):
            warm.append(launch_times([reader.part(nbytes)], stream)[0])
            cold.append(launch_times([reader.part(nbytes)], stream, before=empty)[0])
        assert statistics.median(cold) > 1.2 * statistics.median(warm)


@pytest.mark.parametrize("order", [1, -1])
@pytest.mark.parametrize("mebibytes", [1, 64])
def test_less_is_faster(stream, order: int, mebibytes: int) -> None:
    """Also where the host takes longer to launch than the GPU to run."""
    nbytes = mebibytes << 20
    reader = Reader(4 * nbytes)
    with reader.memory:
        parts = [reader.part(nbytes), reader.part(nbytes * 4), reader.part(nbytes * 4)][::order]
        assert fastest(parts, stream) == (0 if order == 1 else 2)
        with cold_cache(gpu_device(0)) as empty:
            assert fastest(parts, stream, before=empty) == (0 if order == 1 else 2)
