"""What follows from the kinds of an x and an out, whatever their addresses: worked out once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from .arrays import Device
from .backends import Problem
from .backends.gpu_gemm import GpuPrepared
from .backends.gpu_step import Step
from .device_arrays import DeviceArray, byte_range, collapse_rows, refuse_overlap
from .dtypes import ArrayType
from .errors import ArrayError, DeviceMemoryError, ShapeError

__all__ = ["ALIGNMENT_BITS", "Form", "Route", "refuse_addresses", "refuse_memory", "route_of"]

#: The bits of an address by which a library may decide whether it can write there.
ALIGNMENT_BITS = 255


class Form:
    """The weight in the form of one backend, and the most tokens that it takes at a time."""

    __slots__ = ("always_direct", "most", "prepared")

    def __init__(self, prepared: GpuPrepared, limit: int) -> None:
        self.prepared = prepared
        self.always_direct = prepared.always_direct
        self.most = prepared.most_tokens(limit)


@dataclass(slots=True)
class Route:
    """What follows from the kinds of an x and an out, whatever their addresses.

    ``first`` and ``last`` are the offsets of the first byte that x touches and of the one after the
    last, seen from its address; ``out_first`` and ``out_last`` are those of out.
    """

    rows: int
    stride: int
    kind: ArrayType
    first: int
    last: int
    #: The type of result that was asked for, and the one that it has.
    asked: ArrayType | None
    out_kind: ArrayType
    out_shape: tuple[int, ...]
    form: Form
    #: Of the result: the caller's, or a new one, which :attr:`make` makes.
    out_stride: int
    out_first: int = 0
    out_last: int = 0
    make: Callable[[], Any] | None = None
    #: Lowest bits of the result's address -> whether the library writes it.
    direct: dict[int, bool] = field(default_factory=dict)
    #: What each thread launches: thread (its complement where the library does not write the
    #: result) -> step.
    steps: dict[int, Step] = field(default_factory=dict)

    def writes(self, out: int, rows: int) -> bool:
        """Whether the library writes ``rows`` rows of results at ``out`` itself."""
        found = self.form.prepared.can_write(self.out_kind, out, self.out_stride, rows)
        if rows == self.rows:
            self.direct[out & ALIGNMENT_BITS] = found
        return found

    def parts(self, x: int, out: int, stream: int) -> Iterator[tuple[Step, int, int]]:
        """(step, address of x, address of out) of each launch; hold the workspace's lock."""
        form, rows = self.form, self.rows
        x_bytes = self.stride * (self.kind.bits // 8)
        out_bytes = self.out_stride * (self.out_kind.bits // 8)
        while rows > 0:
            part = min(rows, form.most)
            direct = self.writes(out, part)
            yield form.prepared.step(part, self.kind, self.out_kind, direct, stream), x, out
            rows -= part
            x += part * x_bytes
            out += part * out_bytes


def route_of(
    view: DeviceArray,
    out_type: ArrayType | None,
    problem: Problem,
    form_for: Callable[[int], Form],
) -> Route:
    """The route of an x into a new result; ``form_for`` says which form runs for how many tokens.

    Raises ShapeError and ArrayError for an x that does not fit the weight.
    """
    shape = view.shape
    if not shape or shape[-1] != problem.k:
        raise ShapeError(
            f"x has shape {shape}; allowed is (..., {problem.k}): the last extent is the weight's K"
        )
    rows, stride = collapse_rows(view, "x")
    first, last = byte_range(view)
    return Route(
        rows,
        stride,
        view.kind,
        first - view.pointer,
        last - view.pointer,
        out_type,
        out_type or view.kind,
        (*shape[:-1], problem.n),
        form_for(rows),
        problem.n,
    )


def refuse_addresses(route: Route, x: int, out: int) -> None:
    """Raise ArrayError for an x without memory, and for an out that meets it.

    A new result lies elsewhere: its offsets are 0.
    """
    if x == 0 and route.rows:
        raise ArrayError("x has no memory (a fake or wrapper tensor?); pass a plain array")
    if route.out_first != route.out_last:
        refuse_overlap(x + route.first, x + route.last, out + route.out_first, out + route.out_last)


def refuse_memory(route: Route, device: Device, error: Exception) -> None:
    """Raise DeviceMemoryError if ``error`` is a library's for a result that finds no memory."""
    # Each library has a class of its own for this.
    if isinstance(error, MemoryError) or "out of memory" in str(error).lower():
        raise DeviceMemoryError(
            f"there is no memory on {device} for a result of shape {route.out_shape} and "
            f"type {route.out_kind.name}: {error}; free memory, or pass out="
        ) from error
