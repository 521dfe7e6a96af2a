"""Which tensors become sparse, which stay as they are and why; nothing is read but headers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..dtypes import Operand
from ..errors import DTypeError, FormatError, OptionError
from ..pattern import Pattern
from .checkpoint import Checkpoint, Tensor, listed
from .names import first_fit, is_embedding
from .quantized import QUANTIZED, scale_of, source_method

__all__ = ["FLOATS", "Choice", "Layer", "Settings", "Skipped", "by_reason", "choose"]

#: Types of weights that are pruned and quantized, as safetensors spells them.
FLOATS = ("F32", "F16", "BF16")
#: Models whose layers named so are transformers' Conv1D, which stores (inputs, outputs).
_CONV1D_MODELS = ("gpt2", "openai-gpt", "imagegpt", "decision_transformer")
_CONV1D_LAYERS = ("c_attn", "c_proj", "c_fc", "q_attn")


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """What a conversion was asked for; two runs with equal settings give equal files.

    ``include`` is empty for every layer; ``norms_sha256`` is of the norms' file, for "wanda".
    """

    pattern: Pattern
    dtype: Operand
    method: str
    include: tuple[str, ...]
    exclude: tuple[str, ...]
    norms_sha256: str | None = None

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "pattern": self.pattern.name,
            "dtype": self.dtype.name,
            "method": self.method,
            "include": list(self.include),
            "exclude": list(self.exclude),
            "norms_sha256": self.norms_sha256,
        }


@dataclass(frozen=True, slots=True)
class Layer:
    """A linear layer to convert; ``scale`` is set where its weight is quantized already."""

    module: str
    weight: Tensor
    scale: Tensor | None

    @property
    def n(self) -> int:
        """Output channels."""
        return self.weight.shape[0]

    @property
    def k(self) -> int:
        """Inputs."""
        return self.weight.shape[1]


@dataclass(frozen=True, slots=True)
class Skipped:
    """A matrix that stays as it is, and why."""

    module: str
    weight: Tensor
    reason: str


@dataclass(frozen=True, slots=True)
class Choice:
    """Layers to convert, by module name, and matrices that stay, in the order of the checkpoint.

    ``source_method`` is how the checkpoint is quantized already, ``None`` if it is not.
    """

    layers: dict[str, Layer]
    skipped: tuple[Skipped, ...]
    source_method: str | None


def choose(checkpoint: Checkpoint, settings: Settings) -> Choice:
    """Decide about every tensor.

    Raises
    ------
    OptionError
        If no layer is left to convert (the message lists what there is, and why not), or the
        checkpoint is quantized in a way that does not go with the settings.
    DTypeError
        For a chosen weight of a type that cannot be converted.
    FormatError
        For a quantized weight without its scales.
    """
    method = source_method(checkpoint)
    layers: dict[str, Layer] = {}
    skipped: list[Skipped] = []
    unknown: list[str] = []
    for weight in checkpoint.tensors.values():
        module, _, leaf = weight.name.rpartition(".")
        if leaf != "weight" or not module or len(weight.shape) != 2 or 0 in weight.shape:
            continue
        reason = _reason(module, weight, checkpoint, settings, method)
        quantized = weight.dtype in QUANTIZED
        if reason:
            if quantized and f"{module}.weight_scale" in checkpoint.tensors:
                raise OptionError(
                    f"{module} is quantized ({weight.dtype}) but left out ({reason}); a converted "
                    f"model has no layers that are quantized and not sparse; convert it too, or "
                    f"begin with a checkpoint where it is not quantized"
                )
            skipped.append(Skipped(module, weight, reason))
        elif quantized:
            scale = scale_of(module, weight, checkpoint.tensors)
            if QUANTIZED[weight.dtype] != settings.dtype.name:
                raise OptionError(
                    f"{module} is quantized to {QUANTIZED[weight.dtype]} already, and dtype is "
                    f"{settings.dtype.name!r}; its values are kept, not quantized again: use "
                    f"dtype {QUANTIZED[weight.dtype]!r}"
                )
            layers[module] = Layer(module, weight, scale)
        elif weight.dtype not in FLOATS:
            unknown.append(f"{weight.name} ({weight.dtype})")
        elif f"{module}.weight_scale" in checkpoint.tensors:
            raise FormatError(
                f"tensor {module}.weight_scale is there, but {weight.name} is {weight.dtype}, not "
                f"quantized; leave the layer dense with --exclude"
            )
        else:
            layers[module] = Layer(module, weight, None)
    if unknown:
        raise DTypeError(
            f"{len(unknown)} weights are of a type that cannot be converted: {listed(unknown)}; "
            f"allowed are {', '.join((*FLOATS, *QUANTIZED))}; leave them dense with --exclude"
        )
    if not layers:
        raise OptionError(_nothing_chosen(checkpoint, skipped))
    return Choice(layers, tuple(skipped), method)


def _reason(
    module: str, weight: Tensor, checkpoint: Checkpoint, settings: Settings, method: str | None
) -> str:
    """Why a matrix stays as it is; empty if it does not."""
    n, k = weight.shape
    if is_embedding(module):
        return "an embedding"
    excluded = first_fit(module, settings.exclude)
    if excluded is not None:
        return f"fits exclude {excluded!r}"
    if settings.include and first_fit(module, settings.include) is None:
        return f"fits no include ({', '.join(settings.include)})"
    vocabulary = n in checkpoint.setting("vocab_size")
    if vocabulary and True in checkpoint.setting("tie_word_embeddings"):
        return "tied to the embedding, which stays dense"
    if vocabulary and not settings.include:
        return "as many rows as the vocabulary: an embedding or output head"
    if _is_conv1d(module, weight, checkpoint):
        return "a Conv1D, which stores (inputs, outputs); only Linear weights can be converted"
    if method is not None and weight.dtype in FLOATS and not settings.include:
        return "not quantized in this quantized checkpoint"
    longest = settings.dtype.max_k
    if longest is not None and k > longest:
        return f"K = {k}; {settings.dtype.name} sums are exact up to K = {longest}"
    return ""


def _is_conv1d(module: str, weight: Tensor, checkpoint: Checkpoint) -> bool:
    last = module.rpartition(".")[2]
    if last in _CONV1D_LAYERS and checkpoint.config.get("model_type") in _CONV1D_MODELS:
        return True
    bias = checkpoint.tensors.get(f"{module}.bias")
    n, k = weight.shape
    return bias is not None and bias.shape == (k,) and n != k


def _nothing_chosen(checkpoint: Checkpoint, skipped: list[Skipped]) -> str:
    if not skipped:
        return (
            f"{checkpoint.folder} has no linear layer: no two-dimensional tensor is named "
            f"<module>.weight"
        )
    rows = [f"{one.module} ({one.weight.shape_text}): {one.reason}" for one in skipped]
    return (
        f"{checkpoint.folder} has no layer to convert; choose with include and exclude; it has:\n  "
        + "\n  ".join(rows[:12])
        + (f"\n  and {len(rows) - 12} more" if len(rows) > 12 else "")
    )


def by_reason(skipped: tuple[Skipped, ...]) -> Mapping[str, list[str]]:
    """Reason -> modules."""
    found: dict[str, list[str]] = {}
    for one in skipped:
        found.setdefault(one.reason, []).append(one.module)
    return found
