"""PyTorch: sparse linear layers, and turning those of a model into them.

Public as ``slidesparse_rt.torch``.  Inference only: where a gradient is asked for, layers raise
ArrayError.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..convert.names import DEFAULT_EXCLUDE, checked_globs, first_fit, is_embedding
from ..dtypes import Operand, operand
from ..errors import DeviceError, OptionError, SlideSparseError
from ..options import PlanOptions
from ..packing import SparseWeight, TensorFile
from ..packing.prune import METHODS
from ..pattern import Pattern
from .require import require
from .torch_model import configure, fuse, layers_of, prepare, release_weights
from .torch_module import SlideSparseLinear, packed_linear

torch = require("torch", "torch", (2, 4))

__all__ = [
    "SlideSparseLinear",
    "SparsifiedLayer",
    "SparsifyReport",
    "configure",
    "fuse",
    "layers_of",
    "prepare",
    "release_weights",
    "sparsify",
]


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsifiedLayer:
    """What became of one layer.

    Attributes
    ----------
    module:
        Its name in the model.
    n, k:
        Output channels and inputs.
    relative_error:
        Frobenius norm of (new weight - old weight) over that of the old one; pruning and
        quantization together.
    kept_energy:
        Share of the sum of squares that pruning kept, 0 to 1.
    bytes_before, bytes_after:
        Of the weight, and of values and scales.
    """

    module: str
    n: int
    k: int
    relative_error: float
    kept_energy: float
    bytes_before: int
    bytes_after: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsifyReport:
    """What :func:`sparsify` did.

    Attributes
    ----------
    pattern, dtype, method:
        Of every layer.
    layers:
        Those that were replaced, in the model's order.
    skipped:
        (module, reason) of linear layers that were not.
    unmatched:
        Globs of ``include`` and ``skip`` that fit no linear layer.
    """

    pattern: str
    dtype: str
    method: str
    layers: tuple[SparsifiedLayer, ...]
    skipped: tuple[tuple[str, str], ...]
    unmatched: tuple[str, ...]

    def __str__(self) -> str:
        before = sum(one.bytes_before for one in self.layers)
        after = sum(one.bytes_after for one in self.layers)
        lines = [
            f"{len(self.layers)} linear layers to {self.pattern} {self.dtype} ({self.method}), "
            f"{before:,} bytes to {after:,}"
        ]
        lines += [
            f"  {one.module} ({one.n} x {one.k}): error {one.relative_error:.4f}, kept "
            f"{one.kept_energy:.1%}"
            for one in self.layers
        ]
        lines += [f"  {name} stays dense: {reason}" for name, reason in self.skipped]
        lines += [f"  {glob!r} fits no linear layer" for glob in self.unmatched]
        return "\n".join(lines)


def sparsify(
    model: Any,
    pattern: str | Pattern,
    *,
    dtype: str | Operand = "int8",
    method: str = "magnitude",
    norms: Mapping[str, Any] | str | os.PathLike[str] | None = None,
    include: Iterable[str] = (),
    skip: Iterable[str] = DEFAULT_EXCLUDE,
    backend: str = "auto",
    tuning: str = "cached",
    options: PlanOptions | None = None,
) -> SparsifyReport:
    """Prune and quantize the ``torch.nn.Linear`` layers of a model, in place.

    Parameters
    ----------
    model:
        A module, on the CPU, a GPU or several; its weights float32, float16 or bfloat16.
    pattern, dtype:
        As for :class:`SlideSparseLinear`.
    method:
        "magnitude" or "wanda"; see :func:`~slidesparse_rt.prune`.
    norms:
        For "wanda": module name -> shape (K,), or the file that ``slidesparse calibrate`` wrote.
    include, skip:
        Globs over whole components of module names, as for ``slidesparse convert``: "q_proj",
        "layers.0", "layers.*.mlp".  Only what fits ``include`` (if any is given) and nothing of
        ``skip`` is replaced.  The default of ``skip`` is output heads and routers.
    backend, tuning, options:
        As for :class:`~slidesparse_rt.SparseGemmPlan`.

    Returns
    -------
    SparsifyReport
        Every linear layer: what it costs, or why it stays; ``print()`` it.

    Raises
    ------
    OptionError
        If no layer is left, if norms are missing or not wanted, or for unknown options.
    DeviceError
        If weights are on the meta device.
    NonFiniteError, PatternError, DTypeError, ShapeError
        As :meth:`SlideSparseLinear.from_linear`; the message begins with the layer's name.

    Notes
    -----
    If it raises, the model is as it was.  Embeddings, tied weights, subclasses of ``Linear``,
    layers with hooks and those that PyTorch's fused transformer layers read directly stay dense.
    The tensors of a replaced layer are freed once nothing else holds them.
    """
    parsed, row = Pattern.parse(pattern), operand(dtype)
    if isinstance(model, torch.nn.Linear):
        raise OptionError(
            "model is itself a Linear and cannot be replaced in place; use "
            "SlideSparseLinear.from_linear(model, ...)"
        )
    if not isinstance(model, torch.nn.Module):
        raise OptionError(f"model is a {type(model).__name__}; allowed is a torch.nn.Module")
    if method not in METHODS:
        raise OptionError(f"method {method!r} is unknown; allowed are {', '.join(METHODS)}")
    if (method == "wanda") != (norms is not None):
        raise OptionError(
            "method 'wanda' needs norms: module name -> l2 norm of each input (K,), or the file "
            "that 'slidesparse calibrate' wrote"
            if norms is None
            else f"norms are given, but method {method!r} ignores them; use 'wanda'"
        )
    included, skipping = checked_globs(include, "include"), checked_globs(skip, "skip")
    chosen, skipped = _choose(model, row, included, skipping)
    if not chosen:
        listed = "\n  ".join(f"{name}: {reason}" for name, reason in skipped) or "it has none"
        raise OptionError(f"model has no linear layer to replace:\n  {listed}")
    given = _norms(norms, chosen) if norms is not None else {}
    settings = {"backend": backend, "tuning": tuning, "options": options}

    made: dict[str, SlideSparseLinear] = {}
    layers = []
    for name, layer in chosen.items():
        try:
            packed, pruned = packed_linear(layer, parsed, row, method, given.get(name))
            bias = None if layer.bias is None else layer.bias.detach()
            made[name] = SlideSparseLinear.from_sparse_weight(
                packed, bias, device=layer.weight.device, **settings
            ).train(layer.training)
        except SlideSparseError as error:
            error.args = (f"{name}: {error}", *error.args[1:])
            raise
        layers.append(_measured(name, layer.weight.detach(), pruned, packed))
    # Nothing can fail from here on.  A layer may have several names.
    known = {id(chosen[name]): one for name, one in made.items()}
    for name, layer in list(model.named_modules(remove_duplicate=False)):
        if id(layer) in known:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, known[id(layer)])
    names = [*chosen, *(name for name, _ in skipped)]
    return SparsifyReport(
        pattern=parsed.name,
        dtype=row.name,
        method=method,
        layers=tuple(layers),
        skipped=skipped,
        unmatched=tuple(
            glob
            for glob in (*included, *skipping)
            if glob not in DEFAULT_EXCLUDE and not any(first_fit(one, (glob,)) for one in names)
        ),
    )


def _choose(
    model: Any, row: Operand, include: tuple[str, ...], skip: tuple[str, ...]
) -> tuple[dict[str, Any], tuple[tuple[str, str], ...]]:
    """Layers to replace, by name, and (name, reason) of the others."""
    shared = _shared_weights(model)
    fixed = {id(layer): reason for layer, reason in _read_directly(model)}
    chosen: dict[str, Any] = {}
    skipped: list[tuple[str, str]] = []
    for name, layer in model.named_modules():
        if not isinstance(layer, torch.nn.Linear):
            continue
        reason = fixed.get(id(layer), "") or _reason(name, layer, row, include, skip, shared)
        if reason:
            skipped.append((name, reason))
        elif layer.weight.device.type == "meta":
            raise DeviceError(f"{name}.weight is on the meta device; load the model's values first")
        else:
            chosen[name] = layer
    return chosen, tuple(skipped)


def _reason(
    name: str,
    layer: Any,
    row: Operand,
    include: tuple[str, ...],
    skip: tuple[str, ...],
    shared: Mapping[int, list[str]],
) -> str:
    """Why a linear layer stays dense; empty if it does not."""
    fit = first_fit(name, skip)
    if fit is not None:
        return f"fits skip {fit!r}"
    if include and first_fit(name, include) is None:
        return f"fits no include ({', '.join(include)})"
    if is_embedding(name):
        return "an embedding"
    if type(layer) is not torch.nn.Linear:
        return f"a {type(layer).__name__}, not a plain Linear"
    others = [one for one in shared[id(layer.weight)] if one != f"{name}.weight"]
    if others:
        return f"shares its weight with {others[0]}"
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    if any(getattr(layer, kind, None) for kind in hooks):
        return "has hooks, which would be lost; remove them first"
    if row.max_k is not None and layer.in_features > row.max_k:
        return f"K = {layer.in_features}; {row.name} sums are exact up to K = {row.max_k}"
    if 0 in layer.weight.shape:
        return "is empty"
    return ""


def _shared_weights(model: Any) -> dict[int, list[str]]:
    """Identity of each parameter -> its names, those of one module under several names once."""
    found: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for leaf, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            found.setdefault(id(parameter), []).append(f"{name}.{leaf}" if name else leaf)
    return found


def _read_directly(model: Any) -> Iterator[tuple[Any, str]]:
    """Layers whose weights PyTorch's own modules read without calling them."""
    for module in model.modules():
        if isinstance(module, (torch.nn.TransformerEncoderLayer, torch.nn.MultiheadAttention)):
            kind = type(module).__name__
            for child in module.modules():
                if isinstance(child, torch.nn.Linear):
                    yield child, f"in a {kind}, which reads weights without calling its layers"


def _norms(
    norms: Mapping[str, Any] | str | os.PathLike[str], chosen: Mapping[str, Any]
) -> dict[str, Any]:
    """Norms of each chosen layer; OptionError where some have none."""
    if isinstance(norms, Mapping):
        found = {name: norms[name] for name in chosen if name in norms}
    else:
        with TensorFile(norms) as file:
            keys = set(file.keys())
            found = {
                name: np.array(file.read(f"{name}.weight"))
                for name in chosen
                if f"{name}.weight" in keys
            }
    absent = [name for name in chosen if name not in found]
    if absent:
        raise OptionError(
            f"there are no norms for {len(absent)} of {len(chosen)} layers, such as {absent[0]}; "
            f"add them, or leave these layers out with skip="
        )
    return found


def _measured(name: str, old: Any, pruned: Any, packed: SparseWeight) -> SparsifiedLayer:
    dense = old.cpu().float()
    wide = torch.from_numpy(packed.dequantize())
    energy = float(dense.square().sum(dtype=torch.float64))
    kept = float(pruned.float().square().sum(dtype=torch.float64))
    lost = float((wide - dense).square().sum(dtype=torch.float64))
    return SparsifiedLayer(
        module=name,
        n=packed.n,
        k=packed.k,
        relative_error=(lost / energy) ** 0.5 if energy else 0.0,
        kept_energy=kept / energy if energy else 1.0,
        bytes_before=old.nbytes,
        bytes_after=packed.nbytes,
    )
