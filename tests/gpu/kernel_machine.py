"""A GPU as tests/kernel_checks.py wants it: memory with guards, kernels, a stream."""

from __future__ import annotations

from typing import Any

import numpy as np
from kernel_checks import POISON

from slidesparse_rt.kernels.loader import kernels_of

_GUARD = 4096


class Memory:
    """Device memory at a chosen offset from a 256-byte boundary, with guards around it.

    ``bytes`` is the memory as a tensor of uint8.
    """

    def __init__(self, nbytes: int, offset: int) -> None:
        import torch

        start = _GUARD + offset
        size = start + nbytes + _GUARD
        self._all = torch.full((size,), POISON, dtype=torch.uint8, device="cuda")
        self.bytes = self._all[start : start + nbytes]
        self._guards = self._all[:start], self._all[start + nbytes :]
        self.address = self._all.data_ptr() + start

    def write(self, values: np.ndarray) -> None:
        import torch

        flat = np.ascontiguousarray(values).view(np.uint8).reshape(-1)
        self.bytes.copy_(torch.from_numpy(flat.copy()))

    def read(self) -> np.ndarray:
        host: np.ndarray = self.bytes.cpu().numpy()  # waits for the kernels before it
        return host

    def check(self) -> None:
        assert all(bool((guard == POISON).all()) for guard in self._guards), "written outside"


class GpuMachine:
    """Device 0 and torch's current stream."""

    def __init__(self) -> None:
        import torch

        self.kernels: Any = kernels_of(0)
        self.stream = torch.cuda.current_stream().cuda_stream

    def memory(self, nbytes: int, offset: int = 0) -> Memory:
        return Memory(nbytes, offset)
