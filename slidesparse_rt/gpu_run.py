"""What a plan on a GPU does with each array: read it, launch on its stream, return the result."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Hashable, Sequence
from threading import get_ident
from typing import Any

from .arrays import Device, device_of, library_of_type, refuse_autograd, refuse_out_gradient
from .backends import Problem
from .backends.gpu_device import gpu_device, is_capturing, working_on
from .backends.gpu_gemm import GpuPrepared, parts_of
from .backends.workspace import Workspace
from .bound import BoundRun
from .device_adapters import Adapter, adapter_of
from .device_arrays import (
    PER_THREAD_STREAM,
    byte_range,
    checked_out,
    collapse_rows,
    cuda_runtime,
    cupy_stream,
    order_streams,
    refuse_per_thread_stream,
    same_device,
    set_device,
    stream_pointer,
)
from .dtypes import ArrayType
from .errors import ArrayError, CaptureError, DeviceError, LibraryError, OptionError, PlanClosed
from .gpu_bound import NO_CONTEXT, BoundArray, BoundOnGpu
from .gpu_route import ALIGNMENT_BITS, Form, Route, refuse_addresses, refuse_memory, route_of
from .kernels.loader import kernels_of, relaxed_capture
from .options import PlanOptions
from .tuning import Dispatch
from .workspace import Workspace as SharedWorkspace

__all__ = ["GpuRunner"]

#: Kinds of x and out that a plan remembers how to read.
_ROUTES = 128
#: Steps that a route remembers; a thread has one or two.
_STEPS = 8


class GpuRunner:
    """Runs one prepared weight on one GPU; used by several threads at once.

    Parameters
    ----------
    prepared:
        The weight in the backend's form; with ``dispatch`` one in those of several.
    problem:
        Shape and formats.
    device:
        The GPU.
    options:
        The plan's.
    dispatch:
        Which of several forms runs for how many tokens.
    """

    def __init__(
        self,
        prepared: Any,
        problem: Problem,
        device: Device,
        options: PlanOptions,
        dispatch: Dispatch | None = None,
    ) -> None:
        limit = options.workspace_limit
        self._dispatch = dispatch
        self._forms: dict[str, Form] = (
            {"": Form(prepared, limit)}
            if dispatch is None
            else {name: Form(prepared[name], limit) for name in dispatch.backends}
        )
        self._problem = problem
        #: Where it runs.
        self.device = device
        self._index = device.index
        #: The runtime's own function: each call within a call counts.
        self.current_device: Callable[[], int] = cuda_runtime().getDevice
        # Threads may fill these at once: both would write the same.
        self._routes: dict[Hashable, Route] = {}
        self._adapters: dict[type, Adapter] = {}
        self._parked: deque[tuple[Any, object]] = deque()
        self._captured: list[object] = []
        shared = options.workspace
        if shared is not None and not isinstance(shared, SharedWorkspace):
            raise OptionError(
                f"workspace is {shared!r}; allowed are None and a slidesparse_rt.Workspace"
            )
        self._owned = shared is None
        #: Whether :meth:`close` was called; hold the workspace's lock to act on it.
        self.closed = False
        #: The plan's own, or the one that it shares.
        self.workspace: Workspace = (
            Workspace(gpu_device(device.index)) if shared is None else shared.memory(device)
        )

    def run(self, x: Any, out_type: ArrayType | None, out: Any, stream: Any) -> Any:
        """See :meth:`slidesparse_rt.SparseGemmPlan.run`.

        Arrays of a library with signatures are read alike from the second time on: one look-up
        finds everything but their addresses.
        """
        if getattr(x, "requires_grad", False):
            refuse_autograd(x)
        adapter = self._adapters.get(type(x)) or self._adapter(x)
        signature = adapter.signature
        key: Hashable = None
        if out is None:
            if signature is not None:
                key = signature(x)
        else:
            if getattr(out, "requires_grad", False):
                refuse_out_gradient()
            theirs = self._adapters.get(type(out)) or self._adapter(out)
            if theirs is adapter and signature is not None:
                key = signature(x, out)
        route = self._routes.get(key)
        if route is None or route.asked is not out_type:
            route = None
            same_device(device_of(x, "x"), self.device, "x")
        before = self.current_device()
        if before != self._index:
            set_device(self._index)
        try:
            current = pointer = adapter.current_stream(self._index)
            if stream is not None or current == PER_THREAD_STREAM:
                pointer = self.chosen(stream, current)
            owner: object = None
            if route is None:
                route, address, result, target, owner = self._read(
                    x, adapter, key, out_type, out, pointer
                )
            else:
                # Whoever has a signature has these too.
                address = adapter.pointer(x)  # type: ignore[misc]
                if out is None:
                    try:
                        result = route.make()  # type: ignore[misc]
                    except Exception as error:
                        refuse_memory(route, self.device, error)
                        raise
                else:
                    result = out
                target = adapter.pointer(result)  # type: ignore[misc]
                if address == 0 or (
                    out is not None
                    and target + route.out_first < address + route.last
                    and address + route.first < target + route.out_last
                ):
                    refuse_addresses(route, address, target)
            self._launch(route, address, target, pointer)
            if owner is not None:
                self._park(owner, pointer)
            if pointer != current:
                adapter.share(x, pointer, self.device)
                self._adapter(result).share(result, pointer, self.device)
            if out is None and adapter.finish is not None:
                return adapter.finish(result, pointer)
            return result
        finally:
            if before != self._index:
                set_device(before)

    def bind(
        self, x: Any, out_type: ArrayType | None, out: Any, stream: Any, *, graph: bool = False
    ) -> BoundRun:
        """See :meth:`slidesparse_rt.SparseGemmPlan.bind`."""
        if getattr(x, "requires_grad", False):
            refuse_autograd(x)
        if out is not None and getattr(out, "requires_grad", False):
            refuse_out_gradient()
        adapter = self._adapter(x)
        same_device(device_of(x, "x"), self.device, "x")
        if out is None and not adapter.writable:
            raise ArrayError(
                "x is a JAX array, and a result of its kind is immutable, so no second call could "
                "write it; pass an out= of another library, or call run()"
            )
        before = self.current_device()
        if before != self._index:
            set_device(self._index)
        try:
            current = adapter.current_stream(self._index)
            pointer = self.chosen(stream, current)
            if is_capturing(pointer):
                raise CaptureError(
                    "bind() cannot be called while a CUDA graph is being captured; call it before "
                    "the capture, and what it returns within"
                )
            route, address, result, target, owner = self._read(
                x, adapter, None, out_type, out, pointer
            )
            given = self._adapter(result)
            with working_on(self._index), self.workspace.lock:
                self.check_open()
                if adapter.signature is None or given.signature is None:
                    # Reading them may have made this one stream wait; calls may come on others.
                    self.workspace.device.synchronize(pointer)
                parts = tuple(route.parts(address, target, pointer))
                if parts:
                    nbytes = max(step.nbytes for step, _, _ in parts)
                    self.workspace.address(nbytes, pointer, route.rows)
            return BoundOnGpu(
                self,
                BoundArray(x, adapter, address, route.stride),
                BoundArray(result, given, target, route.out_stride),
                parts,
                None if stream is None else (pointer, stream),
                owner,
                graph=graph,
            )
        finally:
            if before != self._index:
                set_device(before)

    def prepare(
        self, tokens: Sequence[int], kind: ArrayType, out_type: ArrayType, stream: Any
    ) -> None:
        """See :meth:`slidesparse_rt.SparseGemmPlan.prepare`."""
        n = self._problem.n
        pointer = 0 if stream is None else stream_pointer(stream)
        refuse_per_thread_stream(pointer)
        self._refuse_foreign(pointer)
        with working_on(self._index), self.workspace.lock:
            self.check_open()
            if is_capturing(pointer):
                raise CaptureError("prepare() cannot run while a CUDA graph is being captured")
            parts: dict[GpuPrepared, set[int]] = {}
            for count in tokens:
                form = self._form(count)
                parts.setdefault(form.prepared, set()).update(parts_of(count, form.most))
            for prepared, counts in parts.items():
                prepared.compile_ahead(counts, out_type)
                prepared.pinned.update(counts)
                # The most first, which needs the largest workspace.
                for part in sorted(counts, reverse=True):
                    # A result of any alignment: with and without the library writing it.
                    able = prepared.can_write(out_type, _WELL_ALIGNED, n, part)
                    for direct in {able, prepared.always_direct}:
                        step = prepared.step(part, kind, out_type, direct, pointer)
                        self.workspace.address(step.nbytes, pointer, part)

    def close(self) -> None:
        """Give the workspace back, if it is the plan's own."""
        with self.workspace.lock:
            self.closed = True
        if self._owned:
            with working_on(self._index):
                self.workspace.close()
        self._routes.clear()
        self._adapters.clear()
        self._parked.clear()
        self._captured.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of workspace that are the plan's own."""
        return self.workspace.nbytes if self._owned else 0

    def check_open(self) -> None:
        """Raise PlanClosed once this plan or its workspace is closed; hold the workspace's lock."""
        if self.closed:
            raise PlanClosed("this plan is closed; make a new SparseGemmPlan")
        self.workspace.check_open()

    def _adapter(self, array: Any) -> Adapter:
        """The adapter for an array, remembered where its type alone decides."""
        adapter, kind = adapter_of(array), type(array)
        alone = library_of_type(kind) is not None  # type: ignore[arg-type]  # types are hashable
        if alone and len(self._adapters) < _ROUTES:
            self._adapters[kind] = adapter
        return adapter

    def chosen(self, stream: Any, current: int) -> int:
        """The stream to launch on, once it waits for the current one."""
        pointer = current if stream is None else stream_pointer(stream)
        refuse_per_thread_stream(pointer)
        refuse_per_thread_stream(current)
        if pointer != current:
            self._refuse_foreign(pointer)
            if is_capturing(pointer) != is_capturing(current):
                raise CaptureError(
                    "of stream= and the current stream of x's library one is being captured "
                    "and the other is not, so one cannot wait for the other; make the stream "
                    "that is captured current and omit stream="
                )
            order_streams(current, pointer)
        return pointer

    def _refuse_foreign(self, stream: int) -> None:
        """Raise DeviceError for a stream of another GPU: kernels of this one cannot run on it."""
        found = kernels_of(self._index).device_of_stream(stream)
        if found != self._index:
            raise DeviceError(
                f"stream is one of cuda:{found}, but the plan is on {self.device}; pass a stream "
                f"that was made on {self.device}"
            )

    def _new(self, adapter: Adapter, route: Route, stream: int) -> Any:
        """A new result from x's library; DeviceMemoryError where it has no memory for it."""
        route.make = make = adapter.maker(route.out_shape, route.out_kind, self.device, stream)
        try:
            if adapter.signature is not None:
                return make()
            # CuPy's pool may have to grow, also for JAX, which has no say in that.
            with relaxed_capture():
                return make()
        except Exception as error:
            refuse_memory(route, self.device, error)
            raise

    def _park(self, owner: object, stream: int) -> None:
        """Keep ``owner`` until the work under way on ``stream`` is done."""
        import cupy

        with self.workspace.lock:
            if is_capturing(stream):
                self._captured.append(owner)  # a graph reads it whenever it runs
                return
            event = cupy.cuda.Event(disable_timing=True)
            event.record(cupy_stream(stream))
            self._parked.append((event, owner))
            with relaxed_capture():
                while self._parked and self._parked[0][0].done:
                    self._parked.popleft()

    def _read(
        self,
        x: Any,
        adapter: Adapter,
        key: Hashable,
        out_type: ArrayType | None,
        out: Any,
        stream: int,
    ) -> tuple[Route, int, Any, int, object]:
        """(route, address of x, result, its address, what x must be kept by), all checked.

        The route is remembered under ``key``, unless that is ``None``.
        """
        view = adapter.view(x, "x", stream)
        route = route_of(view, out_type, self._problem, self._form)
        if out is None:
            result = self._new(adapter, route, stream)
            if adapter.pointer is not None:
                target = adapter.pointer(result)
            else:
                target = adapter.view(result, "the result", stream).pointer
        else:
            result, target = out, self._out_route(out, route, stream)
        refuse_addresses(route, view.pointer, target)
        if key is not None:
            if len(self._routes) >= _ROUTES:
                self._routes.clear()
            self._routes[key] = route
        return route, view.pointer, result, target, view.owner

    def _out_route(self, out: Any, route: Route, stream: int) -> int:
        """The address of the caller's ``out``, once it is found fit and noted in ``route``."""
        adapter = self._adapter(out)
        same_device(device_of(out, "out"), self.device, "out")
        if not adapter.writable:
            raise ArrayError(
                "out is a JAX array, which is immutable; omit out= and take the result"
            )
        view = adapter.view(out, "out", stream)
        checked_out(view, route.out_shape, route.out_kind)
        first, last = byte_range(view)
        route.out_stride = collapse_rows(view, "out")[1]
        route.out_first, route.out_last = first - view.pointer, last - view.pointer
        return view.pointer

    def _form(self, tokens: int) -> Form:
        """The form that runs for so many tokens."""
        return self._forms["" if self._dispatch is None else self._dispatch.at(tokens)]

    def _launch(self, route: Route, x: int, out: int, stream: int, *, again: bool = False) -> None:
        workspace, form, rows = self.workspace, route.form, route.rows
        try:
            # One thread at a time: what it launches must not be interleaved with another's.
            with workspace.lock:
                if self.closed or workspace.closed:
                    self.check_open()
                if not 0 < rows <= form.most:
                    for part, x_part, out_part in route.parts(x, out, stream):
                        with relaxed_capture():
                            part.launch(
                                x_part, route.stride, out_part, route.out_stride, workspace, stream
                            )
                    return
                direct = form.always_direct or route.direct.get(out & ALIGNMENT_BITS)
                if direct is None:
                    direct = route.writes(out, rows)
                thread = get_ident()
                step = route.steps.get(thread if direct else ~thread)
                if step is not None:
                    step.launch(x, route.stride, out, route.out_stride, workspace, stream)
                    return
                step = form.prepared.step(rows, route.kind, route.out_kind, direct, stream)
                if len(route.steps) >= _STEPS:
                    route.steps.clear()  # of threads that ended, most likely
                route.steps[thread if direct else ~thread] = step
                # Drivers and libraries may load code at a first launch, which would break a capture
                # of another thread.
                with relaxed_capture():
                    step.launch(x, route.stride, out, route.out_stride, workspace, stream)
        except LibraryError as error:
            if again or error.status != NO_CONTEXT:
                raise
        else:
            return
        # Nothing was launched: the runtime makes its context the thread's, and all is repeated.
        set_device(self._index)
        self._launch(route, x, out, stream, again=True)


#: An address that every library can write to with its widest stores.
_WELL_ALIGNED = 1 << 12
