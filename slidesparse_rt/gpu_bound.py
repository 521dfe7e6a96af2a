"""A run on a GPU with fixed buffers: a lock, and one launch of a recording."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

from .arrays import Device
from .backends.gpu_device import is_capturing, working_on
from .backends.gpu_step import Step
from .backends.workspace import Block, Memory, Workspace
from .bound import BoundRun
from .device_adapters import Adapter
from .device_arrays import PER_THREAD_STREAM, set_device
from .errors import ArrayError, DeviceMemoryError, LibraryError
from .kernels.loader import kernels_of, relaxed_capture
from .kernels.recording import Recording

__all__ = ["NO_CONTEXT", "BoundArray", "BoundOnGpu", "Runner"]

#: CUDA_ERROR_INVALID_CONTEXT: a launch by a thread that made no call of the CUDA runtime yet.
NO_CONTEXT = 201
#: No stream.
_NONE = -1
#: CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED and ..._INVALIDATED: another thread waited for the device
#: just then.
_SPOILED = (900, 901)


class Runner(Protocol):
    """What a bound run needs of its plan's :class:`~slidesparse_rt.gpu_run.GpuRunner`."""

    device: Device
    #: CUDA's number of the calling thread's current device.
    current_device: Callable[[], int]
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
        self.pointer: Callable[[Any], int] = adapter.pointer or (lambda _: address)
        self.address = address
        self.stride = stride


class BoundOnGpu(BoundRun):
    """A run on a GPU with fixed buffers; :meth:`~slidesparse_rt.gpu_run.GpuRunner.bind` makes it.

    With ``graph`` the first call that is not captured records the launches, and calls on its stream
    launch the recording: :mod:`slidesparse_rt.kernels.recording`.

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
    graph:
        Whether launches may be recorded.
    """

    __slots__ = (
        "_block",
        "_current_device",
        "_current_stream",
        "_device",
        "_fresh",
        "_graph",
        "_index",
        "_kept",
        "_moves",
        "_out",
        "_out_address",
        "_out_pointer",
        "_parts",
        "_recording",
        "_replay",
        "_replay_stream",
        "_runner",
        "_stream",
        "_workspace",
        "_x",
        "_x_address",
        "_x_pointer",
    )

    def __init__(
        self,
        runner: Runner,
        x: BoundArray,
        out: BoundArray,
        parts: tuple[tuple[Step, int, int], ...],
        stream: tuple[int, object] | None,
        owner: object,
        *,
        graph: bool,
    ) -> None:
        self._runner, self._device, self._index = runner, runner.device, runner.device.index
        self._workspace = runner.workspace
        self._x, self._out = x, out
        self.x, self.out = x.array, out.array
        # A call reads these: each look-up less counts.
        self._x_pointer, self._x_address = x.pointer, x.address
        self._out_pointer, self._out_address = out.pointer, out.address
        self._current_device = runner.current_device
        self._current_stream = x.adapter.current_stream
        self._parts = parts
        self._stream = None if stream is None else stream[0]
        self._kept = (stream, owner)
        #: Whether nothing was launched yet.
        self._fresh = True
        #: Whether launches may be recorded.
        self._graph = graph and bool(parts)
        self._recording: Recording | None = None
        #: Where in the workspace the recording works.
        self._block: Block | None = None
        #: Launches the recording on this stream, while the workspace has moved so often.
        self._replay: Callable[[], int] = int
        self._replay_stream = self._moves = _NONE

    def __call__(self) -> Any:
        """See :meth:`BoundRun.__call__`."""
        if (
            self._x_pointer(self.x) != self._x_address
            or self._out_pointer(self.out) != self._out_address
        ):
            raise self._moved()
        index = self._index
        before = self._current_device()
        if before != index:
            set_device(index)
        try:
            current = pointer = self._current_stream(index)
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
                self._x.adapter.share(self.x, pointer, self._device)
                self._out.adapter.share(self.out, pointer, self._device)
        finally:
            if before != index:
                set_device(before)
        return self.out

    def _moved(self) -> ArrayError:
        """The error for memory that was exchanged (by ``resize_``, ``set_``, ``.data``)."""
        what = "out" if self._x_pointer(self.x) == self._x_address else "x"
        return ArrayError(f"{what} lies elsewhere in memory than when it was bound; bind it again")

    def _launch(self, stream: int) -> None:
        workspace = self._workspace
        with workspace.lock:
            if self._runner.closed or workspace.closed:
                self._runner.check_open()
            if (
                stream == self._replay_stream
                and workspace.moves == self._moves
                and not is_capturing(stream)
            ):
                self._repeat()
            elif self._fresh:
                with relaxed_capture():  # a first launch may load code
                    self._launch_unrecorded(stream)
                self._fresh = False
            else:
                self._launch_unrecorded(stream)

    def _repeat(self) -> None:
        """Launch the recording."""
        status = self._replay()
        if status:
            assert self._recording is not None
            raise self._recording.error(status)

    def _launch_unrecorded(self, stream: int) -> None:
        """Launch what is not recorded for ``stream``, or record it now and launch that."""
        wanted = self._graph and self._replay_stream in (_NONE, stream)
        if wanted and not is_capturing(stream) and self._record(stream):
            try:
                with relaxed_capture():  # a first launch brings the graph to the GPU
                    self._repeat()
            except DeviceMemoryError:
                self._give_up()  # the kernels need no more memory
            else:
                return
        self._launch_kernels(self._workspace, stream)

    def _launch_kernels(self, memory: Memory, stream: int) -> None:
        x_stride, out_stride = self._x.stride, self._out.stride
        for step, x, out in self._parts:
            step.launch(x, x_stride, out, out_stride, memory, stream)

    def _record(self, stream: int) -> bool:
        """Record the launches as they would be on ``stream``; False where that cannot be done."""
        kernels, workspace = kernels_of(self._index), self._workspace
        largest = max((step for step, _, _ in self._parts), key=lambda step: step.nbytes)
        before, self._replay_stream = self._replay_stream, _NONE
        try:
            if kernels.owns(stream):
                block = Block(workspace.address(largest.nbytes, stream, largest.tokens))
                if before != stream or block != self._block:  # else another stream's has moved
                    with working_on(self._index):
                        made = Recording(kernels.cuda, partial(self._launch_kernels, block))
                    self._recording, self._replay, self._block = made, made.on(stream), block
                self._replay_stream, self._moves = stream, workspace.moves
                return True
        except LibraryError as error:
            if error.status == NO_CONTEXT:
                raise
            # Launching each kernel may do, or tells what is wrong.
            if error.status in _SPOILED:
                return False  # the next call may record
        self._give_up()
        return False

    def _give_up(self) -> None:
        """Launch each kernel from now on."""
        self._graph, self._replay_stream = False, _NONE
        self._recording, self._replay = None, int
