"""One weight on a GPU in the forms of several backends, packed from one upload."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from ..arrays import Device, NDArray
from ..errors import BackendUnavailable, CompileError, LibraryError
from ..options import PlanOptions
from ..packing.weight import SparseWeight
from .base import RawWeight
from .gpu_device import GpuDevice, gpu_device, working_on
from .gpu_gemm import GpuBackend, GpuPrepared, to_gpu
from .gpu_weight import GpuWeight

__all__ = ["BROKEN", "GpuForms", "pack_forms"]

#: What a backend raises that cannot do what it said it could.
BROKEN = (LibraryError, BackendUnavailable, CompileError)


class GpuForms(Mapping[str, GpuPrepared]):
    """A weight in the forms of several backends, by their names; scales and bias are shared.

    Attributes
    ----------
    weight:
        What all forms were packed from; it owns scales and bias.
    failed:
        Backends that could not pack it, and the error of each.
    """

    def __init__(self, weight: GpuWeight) -> None:
        self.weight = weight
        self.failed: dict[str, Exception] = {}
        self._forms: dict[str, GpuPrepared] = {}

    def __getitem__(self, name: str) -> GpuPrepared:
        return self._forms[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._forms)

    def __len__(self) -> int:
        return len(self._forms)

    @property
    def device(self) -> GpuDevice:
        """Where they are."""
        return self.weight.device

    @property
    def shared_bytes(self) -> int:
        """Device memory of scales and bias."""
        return self.weight.vector_bytes

    @property
    def nbytes(self) -> int:
        """Device memory held: every form, scales and bias."""
        return self.shared_bytes + sum(form.nbytes for form in self._forms.values())

    def pack(self, backend: GpuBackend, options: PlanOptions) -> None:
        """Bring the weight into the form of one more backend, before its values are dropped."""
        lent = self.weight.lend()
        try:
            self._forms[backend.name] = backend.pack(lent, options, self.device.packing_stream)
        except BaseException:
            lent.close()
            raise

    def drop(self, name: str) -> None:
        """Give the memory of one form back; nothing may be using it."""
        self._forms.pop(name).close()

    def close(self) -> None:
        """Give everything back."""
        for name in list(self._forms):
            self.drop(name)
        self.weight.close()


def pack_forms(
    backends: Sequence[GpuBackend],
    weight: SparseWeight | RawWeight,
    bias: NDArray | None,
    device: Device,
    options: PlanOptions,
    *,
    x_scale: np.float32 | None = None,
    strict: bool = True,
) -> GpuForms:
    """Bring a weight to the GPU once and pack it for each backend.

    Parameters
    ----------
    backends:
        Those that support it.
    weight, bias, device, options, x_scale:
        As of :meth:`~slidesparse_rt.backends.base.Backend.prepare`.
    strict:
        Whether a backend that cannot pack it raises; otherwise it is noted in
        :attr:`GpuForms.failed`, unless it is the last one.

    Raises
    ------
    PatternError, NonFiniteError, ShapeError, DTypeError, ArrayError, DeviceError
        If the weight is not as described.
    LibraryError, BackendUnavailable, CompileError, DeviceMemoryError
        If no backend, or with ``strict`` one of them, could pack it; nothing stays allocated.
    """
    gpu = gpu_device(device.index)
    with working_on(gpu.index):
        forms = GpuForms(to_gpu(weight, bias, gpu, x_scale))
        try:
            for backend in backends:
                try:
                    forms.pack(backend, options)
                except BROKEN as error:
                    forms.failed[backend.name] = error
                    if strict or len(forms.failed) == len(backends):
                        raise
            forms.weight.drop_values()
        except BaseException:
            forms.close()
            raise
    return forms
