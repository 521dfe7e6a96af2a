"""The protocol that every backend implements, and the words it uses.

A plan asks ``supports`` once, calls ``prepare`` once, and ``launch`` for every run.  ``launch``
neither allocates, synchronizes nor copies between host and device, so that a GPU backend's launch
can be captured in a CUDA graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from ..arrays import Device, NDArray
from ..dtypes import ArrayType, Operand
from ..options import PlanOptions
from ..packing.weight import SparseWeight
from ..pattern import Pattern

__all__ = ["Backend", "Config", "Prepared", "Problem", "RawWeight", "Support"]


@dataclass(frozen=True, slots=True)
class Problem:
    """One kind of GEMM, for any M: ``y (M, N) = x (M, K) @ weight (N, K).T + bias``."""

    n: int
    k: int
    pattern: Pattern
    dtype: Operand


@dataclass(frozen=True, slots=True)
class Support:
    """Whether a backend can run a problem on a device, and if not, why not."""

    ok: bool
    why_not: str = ""


@dataclass(frozen=True, slots=True)
class Config:
    """One way in which a backend can run a problem; ``name`` is for people."""

    name: str


@dataclass(frozen=True, slots=True)
class RawWeight:
    """A weight (N, K) of any library that is still to be checked and quantized."""

    array: Any
    pattern: Pattern
    operand: Operand


class Prepared(Protocol):
    """A weight in a backend's own form, on its device."""

    @property
    def nbytes(self) -> int:
        """Bytes held beyond the SparseWeight itself."""
        ...

    def close(self) -> None:
        """Give everything back; called once."""
        ...


class Backend(Protocol):
    """What a backend offers; implementations hold no state of their own."""

    @property
    def name(self) -> str:
        """The name that ``backend=`` takes."""
        ...

    def supports(self, problem: Problem, device: Device) -> Support:
        """Whether ``problem`` can run on ``device``."""
        ...

    def prepare(
        self,
        weight: SparseWeight | RawWeight,
        bias: NDArray | None,
        device: Device,
        options: PlanOptions,
        *,
        x_scale: np.float32 | None = None,
    ) -> Any:
        """Bring the weight (and the float32 bias, shape (N,)) into the backend's form, once.

        ``x_scale`` is the scale of all activations (static quantization), as
        :func:`~slidesparse_rt.options.checked_x_scale` returns it; ``None``: each token's own.
        A backend on the CPU gets a SparseWeight; one on a GPU may get a RawWeight, to check and
        quantize there.
        """
        ...

    def candidates(self, problem: Problem) -> Sequence[Config]:
        """Configurations worth measuring for ``problem``, the default first."""
        ...

    def launch(
        self,
        prepared: Any,
        x: Any,
        out: Any,
        out_type: ArrayType,
        workspace: Any,
        stream: int,
        config: Config,
    ) -> None:
        """Compute ``out = x @ weight.T + bias`` for x (M, K) and out (M, N)."""
        ...
