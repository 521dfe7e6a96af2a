"""What a plan on a GPU does with each array: read it, launch on its stream, return the result."""

from __future__ import annotations

from collections import deque
from collections.abc import Hashable, Sequence
from threading import get_ident
from typing import Any, NamedTuple

from .arrays import Device, device_of, refuse_autograd
from .backends import Problem
from .backends.gpu_device import gpu_device, is_capturing, working_on
from .backends.gpu_gemm import GpuPrepared, Step
from .backends.workspace import Workspace
from .device_arrays import (
    Adapter,
    DeviceArray,
    adapter_of,
    byte_range,
    checked_out,
    collapse_rows,
    cupy_stream,
    current_device,
    order_streams,
    refuse_overlap,
    refuse_per_thread_stream,
    same_device,
    set_device,
    stream_pointer,
)
from .dtypes import ArrayType
from .errors import (
    ArrayError,
    CaptureError,
    DeviceError,
    DeviceMemoryError,
    OptionError,
    PlanClosed,
    ShapeError,
)
from .kernels.loader import kernels_of, relaxed_capture
from .options import PlanOptions
from .tuning import Dispatch
from .workspace import Workspace as SharedWorkspace

__all__ = ["GpuRunner"]

#: Kinds of x and out that a plan remembers how to read.
_ROUTES = 128
#: Steps that a route remembers; a thread has one or two.
_STEPS = 8


class _Form:
    """The weight in the form of one backend, and the most tokens that it takes at a time."""

    __slots__ = ("most", "prepared")

    def __init__(self, prepared: GpuPrepared, limit: int) -> None:
        self.prepared = prepared
        self.most = prepared.most_tokens(limit)


class _Route(NamedTuple):
    """What follows from the kind of an x, whatever its address.

    ``first`` and ``last`` are the offsets of the first byte that it touches and of the one after
    the last, seen from its address.
    """

    rows: int
    stride: int
    kind: ArrayType
    first: int
    last: int
    out_shape: tuple[int, ...]
    out_kind: ArrayType
    #: What each thread launches: (thread, whether the library writes the result) -> step.
    steps: dict[tuple[int, bool], Step]
    form: _Form


class _OutRoute(NamedTuple):
    """What follows from the kind of an out."""

    stride: int
    first: int
    last: int


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
        self._forms: dict[str, _Form] = (
            {"": _Form(prepared, limit)}
            if dispatch is None
            else {name: _Form(prepared[name], limit) for name in dispatch.backends}
        )
        self._problem = problem
        self._device = device
        self._index = device.index
        # Threads may fill these at once: both would write the same.
        self._routes: dict[Hashable, _Route] = {}
        self._out_routes: dict[Hashable, _OutRoute] = {}
        self._parked: deque[tuple[Any, object]] = deque()
        self._captured: list[object] = []
        shared = options.workspace
        if shared is not None and not isinstance(shared, SharedWorkspace):
            raise OptionError(
                f"workspace is {shared!r}; allowed are None and a slidesparse_rt.Workspace"
            )
        self._owned = shared is None
        self._closed = False
        #: The plan's own, or the one that it shares.
        self.workspace: Workspace = (
            Workspace(gpu_device(device.index)) if shared is None else shared.memory(device)
        )

    def run(self, x: Any, out_type: ArrayType | None, out: Any, stream: Any) -> Any:
        """See :meth:`slidesparse_rt.SparseGemmPlan.run`."""
        if getattr(x, "requires_grad", False):
            refuse_autograd(x)
        adapter = adapter_of(x)
        signature = adapter.signature
        key: Hashable = None
        route = None
        if signature is not None:
            key = (signature(x), out_type)
            route = self._routes.get(key)
        if route is None:
            same_device(device_of(x, "x"), self._device, "x")
        before = current_device()
        if before != self._index:
            set_device(self._index)
        try:
            current = adapter.current_stream(self._device)
            pointer = current if stream is None else stream_pointer(stream)
            if pointer == 2 or current == 2:  # the common case costs no call
                refuse_per_thread_stream(2)
            if pointer != current:
                self._refuse_foreign(pointer)
                if is_capturing(pointer) != is_capturing(current):
                    raise CaptureError(
                        "of stream= and the current stream of x's library one is being captured "
                        "and the other is not, so one cannot wait for the other; make the stream "
                        "that is captured current and omit stream="
                    )
                order_streams(current, pointer)
            owner: object = None
            if route is None or adapter.pointer is None:
                view = adapter.view(x, "x", pointer)
                route = self._route(view, out_type)
                _remember(self._routes, key, route)
                address, owner = view.pointer, view.owner
            else:
                address = adapter.pointer(x)
            if address == 0 and route.rows:
                raise ArrayError("x has no memory (a fake or wrapper tensor?); pass a plain array")
            result = out
            if out is None:
                result = self._new(adapter, route, pointer)
                if adapter.pointer is not None:
                    target = adapter.pointer(result)
                else:
                    target = adapter.view(result, "the result", pointer).pointer
                out_stride = self._problem.n
            else:
                target, out_stride = self._written(out, key, route, address, pointer)
            self._launch(route, address, target, out_stride, pointer)
            if owner is not None:
                self._park(owner, pointer)
            if pointer != current:
                adapter.share(x, pointer, self._device)
                adapter_of(result).share(result, pointer, self._device)
            return adapter.finish(result, pointer) if out is None else out
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
            self._check_open()
            if is_capturing(pointer):
                raise CaptureError("prepare() cannot run while a CUDA graph is being captured")
            for count in tokens:
                form = self._form(count)
                prepared, most = form.prepared, form.most
                for part in {min(count, most), count % most} - {0}:
                    prepared.pinned.add(part)
                    # A result of any alignment: with and without the library writing it.
                    able = prepared.can_write(out_type, _WELL_ALIGNED, n, part)
                    for direct in {able, prepared.always_direct}:
                        step = prepared.step(part, kind, out_type, direct, pointer)
                        self.workspace.address(step.nbytes, pointer, part)

    def close(self) -> None:
        """Give the workspace back, if it is the plan's own."""
        with self.workspace.lock:
            self._closed = True
        if self._owned:
            with working_on(self._index):
                self.workspace.close()
        self._routes.clear()
        self._out_routes.clear()
        self._parked.clear()
        self._captured.clear()

    @property
    def nbytes(self) -> int:
        """Bytes of workspace that are the plan's own."""
        return self.workspace.nbytes if self._owned else 0

    def _check_open(self) -> None:
        """Raise PlanClosed once this plan or its workspace is closed; hold the workspace's lock."""
        if self._closed:
            raise PlanClosed("this plan is closed; make a new SparseGemmPlan")
        self.workspace.check_open()

    def _refuse_foreign(self, stream: int) -> None:
        """Raise DeviceError for a stream of another GPU: kernels of this one cannot run on it."""
        found = kernels_of(self._index).device_of_stream(stream)
        if found != self._index:
            raise DeviceError(
                f"stream is one of cuda:{found}, but the plan is on {self._device}; pass a stream "
                f"that was made on {self._device}"
            )

    def _new(self, adapter: Adapter, route: _Route, stream: int) -> Any:
        """A new result from x's library; DeviceMemoryError where it has no memory for it."""
        try:
            if adapter.signature is not None:
                return adapter.empty(route.out_shape, route.out_kind, self._device, stream)
            # CuPy's pool may have to grow, also for JAX, which has no say in that.
            with relaxed_capture():
                return adapter.empty(route.out_shape, route.out_kind, self._device, stream)
        except Exception as error:
            # Each library has a class of its own for this.
            known = isinstance(error, MemoryError) or "out of memory" in str(error).lower()
            if not known:
                raise
            raise DeviceMemoryError(
                f"there is no memory on {self._device} for a result of shape {route.out_shape} and "
                f"type {route.out_kind.name}: {error}; free memory, or pass out="
            ) from error

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

    def _route(self, view: DeviceArray, out_type: ArrayType | None) -> _Route:
        shape = view.shape
        if not shape or shape[-1] != self._problem.k:
            raise ShapeError(
                f"x has shape {shape}; allowed is (..., {self._problem.k}): the last extent is "
                f"the weight's K"
            )
        rows, stride = collapse_rows(view, "x")
        first, last = byte_range(view)
        return _Route(
            rows,
            stride,
            view.kind,
            first - view.pointer,
            last - view.pointer,
            (*shape[:-1], self._problem.n),
            out_type or view.kind,
            {},
            self._form(rows),
        )

    def _form(self, tokens: int) -> _Form:
        """The form that runs for so many tokens."""
        return self._forms["" if self._dispatch is None else self._dispatch.at(tokens)]

    def _written(
        self, out: Any, key: Hashable, route: _Route, x: int, stream: int
    ) -> tuple[int, int]:
        """Address and row stride of the caller's ``out``, once it is found fit to be written."""
        if getattr(out, "requires_grad", False):
            raise ArrayError(
                "out requires a gradient, and this product has none; pass out.detach()"
            )
        adapter = adapter_of(out)
        known = None
        if adapter.signature is not None and key is not None:
            key = (key, adapter.signature(out))
            known = self._out_routes.get(key)
        else:
            key = None
        if known is None or adapter.pointer is None:
            known, address = self._out_route(out, adapter, route, stream)
            _remember(self._out_routes, key, known)
        else:
            address = adapter.pointer(out)
        refuse_overlap(x + route.first, x + route.last, address + known.first, address + known.last)
        return address, known.stride

    def _out_route(
        self, out: Any, adapter: Adapter, route: _Route, stream: int
    ) -> tuple[_OutRoute, int]:
        same_device(device_of(out, "out"), self._device, "out")
        if not adapter.writable:
            raise ArrayError(
                "out is a JAX array, which is immutable; omit out= and take the result"
            )
        view = adapter.view(out, "out", stream)
        checked_out(view, route.out_shape, route.out_kind)
        first, last = byte_range(view)
        stride = collapse_rows(view, "out")[1]
        return _OutRoute(stride, first - view.pointer, last - view.pointer), view.pointer

    def _launch(self, route: _Route, x: int, out: int, out_stride: int, stream: int) -> None:
        workspace = self.workspace
        rows, stride, kind, _, _, _, out_kind, steps, form = route
        prepared, most = form.prepared, form.most
        # One thread at a time from here: what it launches must not be interleaved with another's.
        with workspace.lock:
            self._check_open()
            if 0 < rows <= most:
                direct = prepared.can_write(out_kind, out, out_stride, rows)
                key = (get_ident(), direct)
                step = steps.get(key)
                if step is not None:
                    step(x, stride, out, out_stride, workspace, stream)
                    return
                step = prepared.step(rows, kind, out_kind, direct, stream)
                if len(steps) >= _STEPS:
                    steps.clear()  # of threads that ended, most likely
                steps[key] = step
                # Drivers and libraries may load code at a first launch, which would break a capture
                # of another thread.
                with relaxed_capture():
                    step(x, stride, out, out_stride, workspace, stream)
                return
            while rows > 0:
                part = rows if rows < most else most
                direct = prepared.can_write(out_kind, out, out_stride, part)
                step = prepared.step(part, kind, out_kind, direct, stream)
                with relaxed_capture():
                    step(x, stride, out, out_stride, workspace, stream)
                rows -= part
                x += part * stride * (kind.bits // 8)
                out += part * out_stride * (out_kind.bits // 8)


#: An address that every library can write to with its widest stores.
_WELL_ALIGNED = 1 << 12


def _remember(routes: dict[Hashable, Any], key: Hashable, route: Any) -> None:
    if key is not None:
        if len(routes) >= _ROUTES:
            routes.clear()
        routes[key] = route
