"""The operator ``slidesparse::linear``, which ``torch.compile`` and ``torch.export`` trace.

Its arguments are the tensors of a layer and strings, never a handle: an exported program is whole,
and layers of one shape share one compiled graph.  Plans are found by the identity of those tensors
and go when one of the tensors does; a tensor that was written since has its plan made anew.
"""

from __future__ import annotations

import json
import threading
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from ..arrays import NDArray, refuse_autograd, to_numpy
from ..dtypes import ARRAY_TYPES, OPERANDS, Operand
from ..errors import CaptureError, DeviceError, DTypeError, ShapeError
from ..options import PlanOptions
from ..packing.weight import SparseWeight
from ..pattern import Pattern
from ..plan import SparseGemmPlan
from .require import require

torch = require("torch", "torch", (2, 4))

__all__ = [
    "decode_options",
    "encode_options",
    "forget",
    "linear",
    "operand_of",
    "plan_for",
    "run",
    "same_values",
]

# Tensors of several layers make one product: their outputs stand side by side.
_SCHEMA = (
    "linear(Tensor x, Tensor[] weights, Tensor[] weight_scales, Tensor[] biases, "
    "Tensor? input_scale, str pattern, str backend, str tuning, str options) -> Tensor"
)
_LIBRARY = torch.library.Library("slidesparse", "FRAGMENT")
_LIBRARY.define(_SCHEMA, tags=(torch.Tag.pt2_compliant_tag,))

_OPERANDS: dict[Any, Operand] = {
    getattr(torch, row.dtype.name): row for row in OPERANDS if hasattr(torch, row.dtype.name)
}
_FLOATS = tuple(getattr(torch, row.name) for row in ARRAY_TYPES)


def operand_of(dtype: Any) -> Operand:
    """The operand format of a tensor's values; DTypeError for other types."""
    found = _OPERANDS.get(dtype)
    if found is None:
        allowed = ", ".join(str(one) for one in _OPERANDS)
        raise DTypeError(f"weight is {dtype}; allowed are {allowed}")
    return found


def encode_options(options: PlanOptions | None) -> str:
    """Plan options as an operator takes them; empty for the default ones."""
    if options is None or options == PlanOptions():
        return ""
    return json.dumps(asdict(options), sort_keys=True)


def decode_options(text: str) -> PlanOptions:
    """What :func:`encode_options` was given."""
    return PlanOptions(**json.loads(text)) if text else PlanOptions()


class _Entry:
    """One plan, the tensors that it was made of, and the state that they had."""

    __slots__ = ("lock", "made", "refs")

    def __init__(self, tensors: Sequence[Any], forget: Any) -> None:
        self.lock = threading.Lock()
        #: (state of the tensors, plan): replaced as one, so that readers need no lock.
        self.made: tuple[object, SparseGemmPlan] | None = None
        self.refs = [weakref.ref(tensor, forget) for tensor in tensors]

    def is_of(self, tensors: Sequence[Any]) -> bool:
        return all(ref() is one for ref, one in zip(self.refs, tensors, strict=True))


#: Plans by the identities of their tensors and the settings.  Read without a lock: looking up and
#: removing are atomic.
_ENTRIES: dict[tuple[Any, ...], _Entry] = {}
_LOCK = threading.Lock()


def _state(tensors: Sequence[Any]) -> object:
    """Differs once one of the tensors has been written or has other memory."""
    try:
        return [one._version for one in tensors], [one.data_ptr() for one in tensors]
    except RuntimeError:  # tensors made in inference mode count no versions
        versions = [-1 if one.is_inference() else one._version for one in tensors]
        return versions, [one.data_ptr() for one in tensors]


def _tensors(
    weights: Sequence[Any], weight_scales: Sequence[Any], biases: Sequence[Any], input_scale: Any
) -> list[Any]:
    found = [*weights, *weight_scales, *biases]
    if input_scale is not None:
        found.append(input_scale)
    return found


def _forget(key: tuple[Any, ...], _: object) -> None:
    # A finalizer may run anywhere, also where the lock is held by this very thread.
    _ENTRIES.pop(key, None)


def plan_for(
    weights: Sequence[Any],
    weight_scales: Sequence[Any],
    biases: Sequence[Any],
    input_scale: Any,
    pattern: str,
    backend: str,
    tuning: str,
    options: str,
) -> SparseGemmPlan:
    """The plan of these tensors; made if there is none, or if one has been written since.

    Raises what :class:`~slidesparse_rt.SparseGemmPlan` raises, and CaptureError where it would have
    to be made while a CUDA graph is captured.
    """
    tensors = _tensors(weights, weight_scales, biases, input_scale)
    key = (pattern, backend, tuning, options, *map(id, tensors))
    entry = _ENTRIES.get(key)
    state = _state(tensors)
    if entry is not None:
        made = entry.made
        if made is not None and made[0] == state and entry.is_of(tensors):
            return made[1]
    with _LOCK:
        entry = _ENTRIES.get(key)
        if entry is None or not entry.is_of(tensors):
            entry = _ENTRIES[key] = _Entry(tensors, partial(_forget, key))
    # Plans of other tensors can be made meanwhile.
    with entry.lock:
        made = entry.made
        if made is None or made[0] != state:
            # Runs of other threads may be using the old plan, so it is not closed, but collected.
            made = entry.made = (
                state,
                _made(
                    weights,
                    weight_scales,
                    biases,
                    input_scale,
                    Pattern.parse(pattern),
                    backend=backend,
                    tuning=tuning,
                    options=decode_options(options),
                ),
            )
        return made[1]


def forget(
    weights: Sequence[Any],
    weight_scales: Sequence[Any],
    biases: Sequence[Any],
    input_scale: Any,
    *settings: str,
) -> None:
    """Let go of the plan of these tensors with these settings, if there is one."""
    tensors = _tensors(weights, weight_scales, biases, input_scale)
    _ENTRIES.pop((*settings, *map(id, tensors)), None)


@contextmanager
def same_values(
    weights: Sequence[Any],
    weight_scales: Sequence[Any],
    biases: Sequence[Any],
    input_scale: Any,
    *settings: str,
) -> Iterator[None]:
    """Within it these tensors' memory may move, and their plan stays; not one that is outdated."""
    tensors = _tensors(weights, weight_scales, biases, input_scale)
    entry = _ENTRIES.get((*settings, *map(id, tensors)))
    made = None if entry is None else entry.made
    current = made is not None and made[0] == _state(tensors)
    yield
    if entry is not None and made is not None and current:
        entry.made = (_state(tensors), made[1])


def _made(
    weights: Sequence[Any],
    weight_scales: Sequence[Any],
    biases: Sequence[Any],
    input_scale: Any,
    pattern: Pattern,
    *,
    backend: str,
    tuning: str,
    options: PlanOptions,
) -> SparseGemmPlan:
    device = weights[0].device
    for one in weights:
        if one.device.type == "meta":
            raise DeviceError(
                "the layer's weight is on the meta device and holds nothing yet; load a state_dict "
                "with assign=True, or call to_empty() and load one"
            )
        if one.numel() and not one.untyped_storage().nbytes():
            raise DeviceError(
                "the layer's weight was released, and a buffer or setting was changed since; call "
                "restore_weight() before changing it"
            )
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise CaptureError(
            "a CUDA graph is being captured, and the layer's plan is not made yet; call "
            "slidesparse_rt.torch.prepare(model, tokens=[...], stream=...) before the capture; "
            "torch.compile(backend='cudagraphs') captures copies of the weights, for which no plan "
            "can be made before: use mode='reduce-overhead'"
        )
    values = _joined(weights, "weight")
    assert values is not None
    packed = SparseWeight(
        values,
        _joined([one.reshape(-1) for one in weight_scales], "weight_scale"),
        pattern,
        operand_of(weights[0].dtype),
    )
    bias = _joined([one.float() for one in biases], "bias")
    return SparseGemmPlan(
        packed,
        bias=bias,
        x_scale=None if input_scale is None else float(input_scale),
        backend=backend,
        tuning=tuning,
        device=str(device),
        options=options,
    )


def _joined(tensors: Sequence[Any], what: str) -> NDArray | None:
    """The rows of all tensors one after the other, on the host; ``None`` for no tensor.

    Shares memory with a single tensor on the CPU.
    """
    found = [to_numpy(one.detach().cpu(), what, quantized=True) for one in tensors]
    if not found:
        return None
    return found[0] if len(found) == 1 else np.concatenate(found)


def _readable(x: Any) -> Any:
    """``x`` as a plan on a GPU reads it: a copy only where its rows are not evenly apart."""
    if x.device.type == "cpu" or x.dim() == 0 or x.is_contiguous():
        return x
    if x.stride(-1) != 1:
        return x.contiguous()
    return x.flatten(0, -2) if x.dim() > 2 else x


def run(plan: SparseGemmPlan, x: Any) -> Any:
    """:meth:`slidesparse_rt.SparseGemmPlan.run` for an ``x`` of any strides."""
    rows = _readable(x)
    y = plan.run(rows)
    return y if rows.dim() == x.dim() else y.view(*x.shape[:-1], y.shape[-1])


def linear(
    x: Any,
    weights: Sequence[Any],
    weight_scales: Sequence[Any],
    biases: Sequence[Any],
    input_scale: Any,
    pattern: str,
    backend: str,
    tuning: str,
    options: str,
) -> Any:
    """What the operator computes; see :meth:`slidesparse_rt.SparseGemmPlan.run`."""
    plan = plan_for(weights, weight_scales, biases, input_scale, pattern, backend, tuning, options)
    return run(plan, x)


def _refuse_autograd(x: Any, *rest: Any) -> Any:
    """The operator under autograd: refuses where a gradient is asked for, else passes on."""
    refuse_autograd(x)
    with torch._C._AutoDispatchBelowAutograd():  # what torch.library itself does
        return torch.ops.slidesparse.linear.default(x, *rest)


def _shape_only(
    x: Any,
    weights: Sequence[Any],
    weight_scales: Sequence[Any],
    biases: Sequence[Any],
    input_scale: Any,
    pattern: str,
    backend: str,
    tuning: str,
    options: str,
) -> Any:
    """Shape and type of the result, for tracing and for the meta device."""
    del weight_scales, biases, input_scale, pattern, backend, tuning, options
    k = weights[0].shape[1]
    if x.dim() == 0 or x.shape[-1] != k:
        raise ShapeError(
            f"x has shape {tuple(x.shape)}; allowed is (..., {k}): the last extent is the "
            f"weight's K"
        )
    if x.dtype not in _FLOATS:
        allowed = ", ".join(map(str, _FLOATS))
        raise DTypeError(f"x has dtype {x.dtype}; allowed are {allowed}; convert it first")
    return x.new_empty((*x.shape[:-1], sum(one.shape[0] for one in weights)))


def _mapped(info: Any, in_dims: Any, x: Any, weights: Any, *rest: Any) -> tuple[Any, int]:
    """The operator under ``torch.vmap``: tokens do not depend on each other."""
    if any(one is not None for one in torch.utils._pytree.tree_leaves(list(in_dims[1:]))):
        raise ShapeError(
            "vmap maps over a sparse layer's weight, bias or scales; only x can be mapped over: "
            "use in_dims=None for the layer's own tensors"
        )
    del info
    return torch.ops.slidesparse.linear.default(x.movedim(in_dims[0], 0), weights, *rest), 0


_LIBRARY.impl("linear", linear, "CompositeExplicitAutograd")
_LIBRARY.impl("linear", _refuse_autograd, "Autograd")
torch.library.register_fake("slidesparse::linear", _shape_only, lib=_LIBRARY)
if hasattr(torch.library, "register_vmap"):  # PyTorch 2.5
    torch.library.register_vmap("slidesparse::linear", _mapped, lib=_LIBRARY)
