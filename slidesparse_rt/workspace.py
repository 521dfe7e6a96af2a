"""Scratch memory on a GPU that the plans of one model share.

::

    with Workspace("cuda") as workspace:
        options = PlanOptions(workspace=workspace)
        plans = [SparseGemmPlan(w, "6:8", device="cuda", options=options) for w in weights]
"""

from __future__ import annotations

import threading
from typing import Any

from .arrays import CPU, Device
from .backends import workspace as blocks
from .backends.gpu_device import gpu_device, working_on
from .errors import DeviceError, PlanClosed

__all__ = ["Workspace"]


class Workspace:
    """Scratch memory for quantized tokens and sums, shared by plans that take turns.

    Without one each plan has its own, as large as its largest run: for a whole model many times
    what a layer needs at a time.  There is a block for each stream, as large as the largest run on
    it by any of the plans.

    Plans that share one launch one after the other, whatever thread they are called from.  A CUDA
    graph keeps using the block of the stream that it was captured on, wherever it is replayed: do
    not replay it on one stream while its plans, or others that share the workspace, run on another.

    Parameters
    ----------
    device:
        A GPU: "cuda", "cuda:1", or anything that names one.

    Raises
    ------
    DeviceError
        If ``device`` is not a GPU.
    """

    def __init__(self, device: Any = "cuda") -> None:
        self.device = Device.parse(device)
        if self.device == CPU:
            raise DeviceError(f"device is {device!r}; a workspace is memory of a GPU: pass 'cuda'")
        self._lock = threading.Lock()
        self._held: blocks.Workspace | None = None
        self._closed = False

    def memory(self, device: Device) -> blocks.Workspace:
        """The blocks, made when a plan first asks; for plans.

        Raises
        ------
        DeviceError
            If ``device`` is another one.
        PlanClosed
            After :meth:`close`.
        """
        if device != self.device:
            raise DeviceError(
                f"the plan is on {device}, its workspace on {self.device}; make a Workspace for "
                f"each device"
            )
        with self._lock:
            if self._closed:
                raise PlanClosed("this workspace is closed; make a new Workspace")
            if self._held is None:
                self._held = blocks.Workspace(gpu_device(device.index))
            return self._held

    @property
    def nbytes(self) -> int:
        """Bytes held for all streams."""
        held = self._held
        return 0 if held is None else held.nbytes

    def close(self) -> None:
        """Give the memory back; plans that use it raise PlanClosed from then on.

        No launch may be using it, and no graph that was captured with it may run again.  Closing
        twice is fine.
        """
        with self._lock:
            self._closed = True
            held = self._held
        if held is not None:
            with working_on(self.device.index):
                held.close()

    def __enter__(self) -> Workspace:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else f"{self.nbytes:,} bytes"
        return f"Workspace({self.device}, {state})"
