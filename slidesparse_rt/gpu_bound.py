"""A run on a GPU with fixed buffers: a lock and the launches."""

from __future__ import annotations

from typing import Any, Protocol

from .arrays import Device
from .backends.gpu_gemm import Step
from .backends.workspace import Workspace
from .bound import BoundRun
from .device_arrays import PER_THREAD_STREAM, Adapter, current_device, set_device
from .errors import ArrayError, LibraryError
from .kernels.loader import relaxed_capture

__all__ = ["NO_CONTEXT", "BoundArray", "BoundOnGpu", "Runner"]

#: CUDA_ERROR_INVALID_CONTEXT: a launch by a thread that made no call of the CUDA runtime yet.
NO_CONTEXT = 201


class Runner(Protocol):
    """What a bound run needs of its plan's :class:`~slidesparse_rt.gpu_run.GpuRunner`."""

    device: Device
    workspace: Workspace
    closed: bool

    def check_open(self) -> None:
        """Raise PlanClosed once the plan or its workspace is closed; hold the workspace's lock."""
        ...

    def chosen(self, stream: Any, current: int) -> int:
        """The stream to launch on, once it waits for the current one."""
        ...


class BoundArray:
    """An array that is read or written where it lay when it was bound.

    ``stride`` counts elements from row to row; ``pointer`` reads where the array lies now, where
    that can change.
    """

    __slots__ = ("adapter", "address", "array", "pointer", "stride")

    def __init__(self, array: Any, adapter: Adapter, address: int, stride: int) -> None:
        self.array = array
        self.adapter = adapter
        self.pointer = adapter.pointer
        self.address = address
        self.stride = stride


class BoundOnGpu(BoundRun):
    """A run on a GPU with fixed buffers; :meth:`~slidesparse_rt.gpu_run.GpuRunner.bind` makes it.

    Parameters
    ----------
    runner:
        Whose run it is: a :class:`~slidesparse_rt.gpu_run.GpuRunner`.
    x, out:
        What it reads and writes, checked.
    parts:
        What it launches: (step, address of x, address of out).
    stream:
        ``None``: the current one of x's library at each call; otherwise an address, and what keeps
        that stream alive.
    owner:
        What keeps x's memory alive where x itself does not.
    """

    __slots__ = (
        "_current_stream",
        "_device",
        "_fresh",
        "_kept",
        "_out",
        "_parts",
        "_runner",
        "_stream",
        "_x",
    )

    def __init__(
        self,
        runner: Runner,
        x: BoundArray,
        out: BoundArray,
        parts: tuple[tuple[Step, int, int], ...],
        stream: tuple[int, object] | None,
        owner: object,
    ) -> None:
        self._runner, self._device = runner, runner.device
        self._x, self._out = x, out
        self.x, self.out = x.array, out.array
        self._current_stream = x.adapter.current_stream
        self._parts = parts
        self._stream = None if stream is None else stream[0]
        self._kept = (stream, owner)
        #: Whether nothing was launched yet.
        self._fresh = True

    def __call__(self) -> Any:
        """See :meth:`BoundRun.__call__`."""
        x, out = self._x, self._out
        if (x.pointer is not None and x.pointer(self.x) != x.address) or (
            out.pointer is not None and out.pointer(self.out) != out.address
        ):
            raise self._moved()
        device = self._device
        index = device.index
        before = current_device()
        if before != index:
            set_device(index)
        try:
            current = pointer = self._current_stream(device)
            if self._stream is not None or current == PER_THREAD_STREAM:
                pointer = self._runner.chosen(self._stream, current)
            try:
                self._launch(pointer)
            except LibraryError as error:
                if error.status != NO_CONTEXT:
                    raise
                # Nothing was launched; from here on the runtime's context is the thread's.
                set_device(index)
                self._launch(pointer)
            if pointer != current:
                x.adapter.share(self.x, pointer, device)
                out.adapter.share(self.out, pointer, device)
        finally:
            if before != index:
                set_device(before)
        return self.out

    def _moved(self) -> ArrayError:
        """The error for memory that was exchanged (by ``resize_``, ``set_``, ``.data``)."""
        x = self._x
        what = "out" if x.pointer is None or x.pointer(self.x) == x.address else "x"
        return ArrayError(f"{what} lies elsewhere in memory than when it was bound; bind it again")

    def _launch(self, stream: int) -> None:
        runner = self._runner
        workspace, x_stride, out_stride = runner.workspace, self._x.stride, self._out.stride
        with workspace.lock:
            if runner.closed or workspace.closed:
                runner.check_open()
            if not self._fresh:
                for step, x, out in self._parts:
                    step(x, x_stride, out, out_stride, workspace, stream)
                return
            with relaxed_capture():  # a first launch may load code
                for step, x, out in self._parts:
                    step(x, x_stride, out, out_stride, workspace, stream)
            self._fresh = False
