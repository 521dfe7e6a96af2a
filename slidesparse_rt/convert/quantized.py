"""Checkpoints that are quantized already: which are understood, and what their scales mean.

Understood is W8A8 of compressed-tensors: ``weight`` in I8 or F8_E4M3 and ``weight_scale`` for each
output channel (N, 1), or one for the whole tensor, symmetric:
``weight ~= weight.float() * weight_scale``.
Source: the ``quantization_config`` that llm-compressor writes (compressed-tensors formats
"int-quantized", "float-quantized" and "naive-quantized").
"""

from __future__ import annotations

from collections.abc import Mapping

from ..errors import FormatError, OptionError
from .checkpoint import Checkpoint, Tensor

__all__ = ["QUANTIZED", "scale_of", "source_method"]

#: Types of quantized weights, as safetensors spells them -> the operand format they are.
QUANTIZED: Mapping[str, str] = {"I8": "int8", "F8_E4M3": "fp8_e4m3"}

_FORMATS = ("int-quantized", "float-quantized", "naive-quantized")
_SCALE_TYPES = ("F32", "BF16", "F16")
#: Tensors beside a weight that say that it is more than values times scales.
_FOREIGN = (
    ("weight_zero_point", "asymmetric quantization"),
    ("weight_scale_inv", "block-wise scales"),
    ("weight_g_idx", "reordered groups"),
    ("weight_packed", "packed values"),
    ("qweight", "packed values"),
    ("weight_shape", "packed values"),
    ("input_zero_point", "asymmetric activations"),
)
_ALLOWED = (
    "allowed are unquantized checkpoints and compressed-tensors W8A8 (int8 or fp8, symmetric, one "
    "scale for each output channel or tensor)"
)


def source_method(checkpoint: Checkpoint) -> str | None:
    """The checkpoint's quant_method; ``None`` if its config names none.

    Raises OptionError for one that is not understood, with what was found in it.
    """
    config = checkpoint.config.get(
        "quantization_config", checkpoint.config.get("compression_config")
    )
    if config is None:
        return None
    where = checkpoint.folder
    if not isinstance(config, dict):
        raise FormatError(f"{where}: quantization_config is {config!r}; expected a JSON object")
    method = config.get("quant_method")
    if method == "slidesparse":
        raise OptionError(
            f"{where} is converted already, to {config.get('pattern')} and {config.get('dtype')}; "
            f"convert the checkpoint that it was made from"
        )
    if method != "compressed-tensors":
        raise OptionError(f"{where} is quantized by {method!r}; {_ALLOWED}")
    layout = config.get("format")
    if layout not in _FORMATS:
        raise OptionError(f"{where} has compressed-tensors format {layout!r}; {_ALLOWED}")
    groups = config.get("config_groups") or {}
    for name, group in groups.items() if isinstance(groups, dict) else ():
        weights = group.get("weights") if isinstance(group, dict) else None
        if not isinstance(weights, dict):
            continue
        found = {key: weights.get(key) for key in ("num_bits", "symmetric", "strategy")}
        if found["num_bits"] != 8 or found["symmetric"] is False:
            raise OptionError(f"{where} quantizes weights of {name} with {found}; {_ALLOWED}")
        if found["strategy"] not in (None, "channel", "tensor"):
            raise OptionError(f"{where} quantizes weights of {name} with {found}; {_ALLOWED}")
    return "compressed-tensors"


def scale_of(module: str, weight: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
    """The scales of a quantized weight.

    Raises OptionError where the weight is quantized in another way, and FormatError where its
    scales are missing or misshapen.
    """
    for suffix, meaning in _FOREIGN:
        if f"{module}.{suffix}" in tensors:
            raise OptionError(f"tensor {module}.{suffix} means {meaning}; {_ALLOWED}")
    scale = tensors.get(f"{module}.weight_scale")
    n = weight.shape[0]
    if scale is None:
        raise FormatError(
            f"tensor {weight.name!r} is {weight.dtype}, but there is no {module}.weight_scale; "
            f"{_ALLOWED}"
        )
    if scale.shape not in ((n, 1), (n,), (1,), ()) or scale.dtype not in _SCALE_TYPES:
        raise FormatError(
            f"tensor {scale.name!r} is {scale.dtype} of shape {scale.shape}; allowed is "
            f"{', '.join(_SCALE_TYPES)} of shape ({n}, 1), ({n},), (1,) or ()"
        )
    return scale
