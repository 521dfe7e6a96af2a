"""What is done to all sparse layers of a model, and to several layers at once."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ..errors import OptionError
from ..options import PlanOptions
from .torch_call import Shared
from .torch_module import SlideSparseLinear

__all__ = ["configure", "fuse", "layers_of", "prepare", "release_weights"]


def fuse(*layers: SlideSparseLinear) -> None:
    """Let layers that are called with the same x share one plan, which quantizes it once.

    Output channels do not depend on each other, so results are those of the layers alone; to the
    bit for "int8".  State dicts, names and modules stay as they are.  The first layer that is
    called computes for all of them, and keeps the others' outputs until they are called with the
    same tensor: use it for layers that are always called together, and do not write to x in
    between.

    Parameters
    ----------
    layers:
        Two or more, alike in K, pattern, dtype, bias or none, static input scale, device and
        settings; in none of which others take part already.

    Raises
    ------
    OptionError
        If they are not; says in what they differ.
    """
    if len(layers) < 2 or not all(isinstance(one, SlideSparseLinear) for one in layers):
        kinds = ", ".join(type(one).__name__ for one in layers) or "nothing"
        raise OptionError(f"fuse() was given {kinds}; allowed are two SlideSparseLinear or more")
    if len({id(one) for one in layers}) != len(layers):
        raise OptionError("fuse() was given one layer twice; name each once")
    for one in layers:
        if one._shared is not None:
            raise OptionError("fuse() was given a layer that is fused already; leave it out")
    first = layers[0]
    for one in layers[1:]:
        for what, read in _ALIKE.items():
            if read(one) != read(first):
                raise OptionError(
                    f"layers that are fused must be alike in {what}; found {read(first)} and "
                    f"{read(one)}"
                )
    shared = Shared(layers)
    for place, one in enumerate(layers):
        one._forget()
        one._shared, one._place = shared, place


#: In what layers must be alike to be fused -> how it is read.
_ALIKE: dict[str, Callable[[SlideSparseLinear], Any]] = {
    "K": lambda one: one.in_features,
    "pattern": lambda one: one.pattern.name,
    "dtype": lambda one: one.operand.name,
    "having a bias": lambda one: one.bias is not None,
    "device": lambda one: str(one.weight.device),
    "static input scale": lambda one: (
        None
        if one.input_scale is None or one.input_scale.device.type == "meta"
        else float(one.input_scale)
    ),
    "backend, tuning and options": lambda one: one._settings,
}


def layers_of(model: Any) -> Iterator[tuple[str, SlideSparseLinear]]:
    """(name, layer) of every sparse layer in a model, each once."""
    for name, module in model.named_modules():
        if isinstance(module, SlideSparseLinear):
            yield name, module


def prepare(
    model: Any, tokens: Iterable[int], *, x_dtype: str = "bfloat16", stream: Any = None
) -> None:
    """Make everything ready for runs with these numbers of tokens; needed before a CUDA graph.

    Makes the plan of every sparse layer in ``model`` and calls its
    :meth:`~slidesparse_rt.SparseGemmPlan.prepare`; ``stream`` is the one that will be captured.
    Raises their errors.
    """
    counts = list(tokens)
    seen: set[int] = set()
    for _, layer in layers_of(model):
        plan = layer.plan()
        if id(plan) not in seen:
            seen.add(id(plan))
            plan.prepare(counts, x_dtype=x_dtype, stream=stream)


def release_weights(model: Any) -> int:
    """Call :meth:`SlideSparseLinear.release_weight` on every layer; returns the GPU bytes freed."""
    freed = 0
    for _, layer in layers_of(model):
        held = layer.weight.untyped_storage().nbytes()
        layer.release_weight()
        freed += held - layer.weight.untyped_storage().nbytes()
    return freed


def configure(
    model: Any,
    *,
    backend: str = "auto",
    tuning: str = "cached",
    options: PlanOptions | None = None,
) -> None:
    """Set how every sparse layer in ``model`` runs; its plan is made anew when it next does.

    Parameters are those of :class:`~slidesparse_rt.SparseGemmPlan`, as are the errors, which come
    when a plan is made.
    """
    for _, layer in layers_of(model):
        layer._forget()
        layer._set_backend(backend, tuning, options)
