"""Calling layers: directly, through the operator, or several that share one product."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

from ..arrays import refuse_autograd
from .require import require
from .torch_op import linear, plan_for, run

torch = require("torch", "torch", (2, 4))

__all__ = ["Shared", "arguments", "product"]


def arguments(layers: tuple[Any, ...]) -> tuple[Any, ...]:
    """What the operator takes after ``x``."""
    # Not by attribute: nn.Module looks those up slowly.
    buffers = [one._buffers for one in layers]
    first = buffers[0]
    return (
        [one["weight"] for one in buffers],
        [one["weight_scale"] for one in buffers] if first["weight_scale"] is not None else [],
        [one["bias"] for one in buffers] if first["bias"] is not None else [],
        first["input_scale"],
        *layers[0]._settings,
    )


def product(layers: tuple[Any, ...], x: Any) -> Any:
    """Through the operator where something traces or transforms it; else without that detour."""
    if not torch.compiler.is_compiling() and _is_plain(x):
        return linear(x, *arguments(layers))
    return torch.ops.slidesparse.linear.default(x, *arguments(layers))


def _is_plain(x: Any) -> bool:
    """Whether nothing but memory is behind a tensor, and nothing listens to operators."""
    return (
        type(x) in _PLAIN
        and x.device.type in ("cpu", "cuda")
        and not torch._C._len_torch_dispatch_stack()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


# PyTorch 2.7; before that a strict export takes the way of torch.compile.
_exporting = getattr(torch.compiler, "is_exporting", bool)
_PLAIN = (torch.Tensor, torch.nn.Parameter)


class Shared:
    """Layers that multiply the same x: one plan makes all their outputs, side by side.

    The first layer that is called with an x computes for all; the others take their part if they
    are called with that same x, and compute for all otherwise.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self.layers = tuple(layers)
        ends = accumulate((one.out_features for one in self.layers), initial=0)
        self._spans = tuple(pairwise(ends))
        # Threads that run one model have outputs of their own.  A tracer has one thread, and what
        # it puts here is gone from the graph that it makes.
        self._local = threading.local()
        self._traced: tuple[Any, Any, tuple[int, ...]] | None = None
        self._all = tuple(range(len(self.layers)))

    def output(self, index: int, x: Any) -> Any:
        """What the layer at ``index`` makes of ``x``."""
        if torch.compiler.is_compiling():
            if _exporting() and torch.compiler.is_dynamo_compiling():
                # A strict export warns of everything that outlives the call.
                return product((self.layers[index],), x)
            y = self._while_tracing(index, x)
        elif _is_plain(x):
            y = self._now(index, x)
        else:
            y = product(self.layers, x)
        start, stop = self._spans[index]
        return y.narrow(-1, start, stop - start)

    def _while_tracing(self, index: int, x: Any) -> Any:
        held = self._traced
        if held is not None and held[0] is x and index in held[2]:
            y, left = held[1], held[2]
        else:
            y, left = product(self.layers, x), self._all
        left = tuple(one for one in left if one != index)
        self._traced = (x, y, left) if left else None
        return y

    def _now(self, index: int, x: Any) -> Any:
        plan = plan_for(*arguments(self.layers))
        # Tensors made in inference mode count no versions.
        key = (plan, -1 if x.is_inference() else x._version)
        held = getattr(self._local, "held", None)
        if held is not None and held[0] is x and held[3] == key and index in held[2]:
            refuse_autograd(x)
            y, left = held[1], held[2]
        else:
            y, left = run(plan, x), self._all
        left = tuple(one for one in left if one != index)
        self._local.held = (x, y, left, key) if left else None
        return y

    def __getstate__(self) -> dict[str, Any]:
        return {"layers": self.layers, "_spans": self._spans, "_all": self._all}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._local = threading.local()
        self._traced = None
