"""What ``SparseGemmPlan.bind`` returns: a run whose buffers are fixed, checked once."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

__all__ = ["BoundOnCpu", "BoundRun"]


class BoundRun(ABC):
    """A run with fixed buffers; :meth:`slidesparse_rt.SparseGemmPlan.bind` makes it.

    Attributes
    ----------
    x:
        The activations that every call reads.
    out:
        The array that every call writes and returns.
    """

    __slots__ = ("out", "x")

    x: Any
    out: Any

    @abstractmethod
    def __call__(self) -> Any:
        """Multiply what is in :attr:`x` now into :attr:`out`, and return that.

        Raises
        ------
        PlanClosed
            After the plan's close().
        ArrayError
            If the memory of x or out was exchanged after it was bound.
        CaptureError, DeviceMemoryError
            As :meth:`slidesparse_rt.SparseGemmPlan.run`, on a stream that is new to the plan.
        """

    def __repr__(self) -> str:
        return f"{type(self).__name__}({_shape(self.x)} -> {_shape(self.out)})"


def _shape(array: Any) -> str:
    return "x".join(map(str, getattr(array, "shape", ()))) or "?"


class BoundOnCpu(BoundRun):
    """A run on the CPU, where there is nothing to save but the typing."""

    __slots__ = ("_run",)

    def __init__(self, run: Callable[..., Any], x: Any, out: Any) -> None:
        self._run = run
        self.x, self.out = x, out

    def __call__(self) -> Any:
        """See :meth:`BoundRun.__call__`."""
        return self._run(self.x, out=self.out)
