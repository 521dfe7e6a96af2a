"""transformers: ``from_pretrained`` of what ``slidesparse convert`` wrote.

Public as ``slidesparse_rt.transformers``, whose import registers the quantizer "slidesparse".
Source: transformers, "Contribute new quantization method" (HfQuantizer, register_quantizer).
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import Any

from ..convert import ModelConfig
from ..convert.config import QUANT_METHOD
from ..convert.layout import SCALE_SUFFIX, value_type
from ..errors import FormatError, OptionError, SlideSparseError
from ..packing import TensorFile
from .require import require

torch = require("torch", "transformers", (2, 4))
transformers = require("transformers", "transformers", (5, 0))

# Below the errors that say how to get the two.
from transformers.quantizers import (  # noqa: E402
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.quantization_config import QuantizationConfigMixin  # noqa: E402

from .torch_model import fuse, layers_of  # noqa: E402
from .torch_module import SlideSparseLinear  # noqa: E402

__all__ = ["SlideSparseConfig", "SlideSparseQuantizer", "runtime_config"]

#: Model types whose attention and MLP give one x to all layers of a group, one after the other.
_FUSED_MODELS = ("llama", "mistral", "qwen2", "qwen3")
_GROUPS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
#: How a model runs, not what it is: not written by save_pretrained.
_RUNTIME = {"fuse": True, "backend": "auto", "tuning": "cached"}


@register_quantization_config(QUANT_METHOD)
class SlideSparseConfig(QuantizationConfigMixin):  # type: ignore[misc]  # seen as Any
    """The ``quantization_config`` of a converted model; see docs/convert.md.

    Parameters
    ----------
    content:
        What ``slidesparse convert`` wrote.  Besides: ``fuse`` (share one plan among layers with the
        same input, where the architecture is known for it), ``backend`` and ``tuning`` (as for
        :class:`~slidesparse_rt.SparseGemmPlan`); see :func:`runtime_config`.

    Raises FormatError for a config that is not understood.
    """

    def __init__(self, **content: Any) -> None:
        # transformers keeps its own notes here, too.
        self.quant_method = QUANT_METHOD
        for key, default in _RUNTIME.items():
            setattr(self, key, content.pop(key, default))
        if not isinstance(self.fuse, bool):
            raise OptionError(f"fuse is {self.fuse!r}; allowed are True and False")
        self._content = content
        model = ModelConfig.from_json({**content, "quant_method": QUANT_METHOD})
        assert model is not None  # only without a quant_method
        self._model = model

    @property
    def model(self) -> ModelConfig:
        """The checked content."""
        return self._model

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds: how the model was made, not how it runs."""
        return {**self._content, "quant_method": QUANT_METHOD}

    def __iter__(self) -> Any:
        return iter(self.to_dict().items())


def runtime_config(
    folder: str | os.PathLike[str],
    *,
    fuse: bool = True,
    backend: str = "auto",
    tuning: str = "cached",
    **config: Any,
) -> Any:
    """The config of a converted model with a say in how it runs.

    For ``from_pretrained(folder, config=runtime_config(folder, backend="hopper"))``.

    Parameters
    ----------
    folder:
        What ``slidesparse convert`` wrote.
    fuse:
        Whether layers with the same input share one plan, for model types that are known to call
        them together: llama, mistral, qwen2, qwen3.
    backend, tuning:
        As for :class:`~slidesparse_rt.SparseGemmPlan`.
    config:
        Passed on to ``transformers.AutoConfig.from_pretrained``.

    Raises
    ------
    OptionError
        If the model is not a converted one.
    """
    found = transformers.AutoConfig.from_pretrained(os.fspath(folder), **config)
    content = getattr(found, "quantization_config", None)
    if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD:
        raise OptionError(
            f"{folder} is not converted: its config.json has no quantization_config of "
            f"slidesparse; run 'slidesparse convert' on it first"
        )
    found.quantization_config = {**content, "fuse": fuse, "backend": backend, "tuning": tuning}
    return found


@register_quantizer(QUANT_METHOD)
class SlideSparseQuantizer(HfQuantizer):  # type: ignore[misc]  # seen as Any
    """Puts :class:`~slidesparse_rt.torch.SlideSparseLinear` layers into a model before it loads.

    Every layer is checked as it is loaded: files that lack its values or scales raise FormatError,
    weights that do not fit their pattern PatternError, scales out of range NonFiniteError.
    """

    requires_calibration = False

    def __init__(self, quantization_config: SlideSparseConfig, **settings: Any) -> None:
        super().__init__(quantization_config, **settings)
        if not self.pre_quantized:
            raise OptionError(
                "the model is not converted: 'slidesparse convert MODEL_DIR OUT_DIR' makes a "
                "folder that from_pretrained loads, and slidesparse_rt.torch.sparsify(model, ...) "
                "turns a loaded model's layers; leave quantization_config out"
            )

    def get_new_dtype(self, converter: Any, param: Any, dtype: Any) -> Any:
        """No conversion of fp8 values, whatever type a model wants some of its layers in."""
        kind = param.get_dtype() if hasattr(param, "get_dtype") else param.dtype
        if kind in ("F8_E4M3", torch.float8_e4m3fn):
            return None
        return super().get_new_dtype(converter, param, dtype)

    def _process_model_before_weight_loading(self, model: Any, **details: Any) -> Any:
        config = self.quantization_config.model
        kind = type(model).__name__
        names = _modules(model, config.layers)
        absent = [name for name in config.layers if name not in names]
        if absent:
            raise OptionError(
                f"transformers' {kind} has no Linear for {len(absent)} of {len(config.layers)} "
                f"converted layers, such as {absent[0]}; load the class that config.json names "
                f"under 'architectures', or convert without these layers (--exclude)"
            )
        scales = _check_files(details.get("checkpoint_files") or (), config)
        runtime = {key: getattr(self.quantization_config, key) for key in ("backend", "tuning")}
        for layer, name in names.items():
            old = model.get_submodule(name)
            new = SlideSparseLinear(
                old.in_features,
                old.out_features,
                old.bias is not None,
                pattern=config.pattern,
                dtype=config.dtype,
                static_input=layer in scales,
                bias_dtype=None if old.bias is None else old.bias.dtype,
                device="meta",
                **runtime,
            )
            if layer in scales:
                new.input_scale = torch.ones(scales[layer], device="meta")
            _replace(model, name, new)
        return model

    def _process_model_after_weight_loading(self, model: Any, **details: Any) -> Any:
        del details
        kind = getattr(model.config, "model_type", None)
        if self.quantization_config.fuse and kind in _FUSED_MODELS:
            _fuse_groups(model)
        for name, layer in layers_of(model):
            if layer.weight.device.type == "meta":
                continue  # offloaded
            try:
                layer.sparse_weight()
                if layer.weight.device.type == "cuda":
                    layer.plan()
            except SlideSparseError as error:
                error.args = (f"{name}: {error}", *error.args[1:])
                raise
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        kind = getattr(torch, dtype) if isinstance(dtype, str) else dtype
        for name, layer in list(layers_of(model)):
            _replace(model, name, layer.to_linear(kind))
        return model

    def is_serializable(self) -> bool:
        """``save_pretrained`` writes what ``from_pretrained`` read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """There are no gradients."""
        return False

    @property
    def is_compileable(self) -> bool:
        """``torch.compile`` traces the layers."""
        return True


def _replace(model: Any, name: str, new: Any) -> None:
    parent, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


def _modules(model: Any, layers: Iterable[str]) -> dict[str, str]:
    """Name in the files -> name in the model; one may lack the prefix of the base model."""
    linear = {name for name, one in model.named_modules() if type(one) is torch.nn.Linear}
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, str] = {}
    for layer in layers:
        for name in (layer, prefix + layer, layer.removeprefix(prefix)):
            if name in linear:
                found[layer] = name
                break
    return found


def _check_files(paths: Iterable[Any], config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Layer -> shape of its static input scale, for those that have one.

    Raises FormatError where files lack a layer's values or scales, or have them in another type:
    transformers would make up what is missing.
    """
    found: dict[str, tuple[str, tuple[int, ...]]] = {}
    for path in paths:
        with TensorFile(path) as file:
            found.update({key: (file.dtype_name(key), file.shape(key)) for key in file.keys()})  # noqa: SIM118
    if not found:
        return {}
    for layer in config.layers:
        kind, shape = found.get(f"{layer}.weight", ("", ()))
        wanted = value_type(config.dtype)
        if kind != wanted or len(shape) != 2:
            raise FormatError(
                f"tensor {layer}.weight is {kind or 'not in the files'}"
                f"{f' of shape {shape}' if kind else ''}; config.json says that it is "
                f"{config.dtype.name}, {wanted} of shape (N, K); convert the model again"
            )
        if config.dtype.scaled:
            scale = found.get(f"{layer}.{SCALE_SUFFIX}")
            if scale != ("F32", (shape[0], 1)):
                seen = "not in the files" if scale is None else f"{scale[0]} of shape {scale[1]}"
                raise FormatError(
                    f"tensor {layer}.{SCALE_SUFFIX} is {seen}; "
                    f"needed is F32 of shape ({shape[0]}, 1); convert the model again"
                )
    names = {layer: f"{layer}.input_scale" for layer in config.layers}
    return {layer: found[name][1] for layer, name in names.items() if name in found}


def _fuse_groups(model: Any) -> None:
    """Let layers with the same input share a plan, where they are alike."""
    for module in model.modules():
        for group in _GROUPS:
            parts = [getattr(module, name, None) for name in group]
            sparse = [one for one in parts if isinstance(one, SlideSparseLinear)]
            if len(sparse) > 1:
                # Layers that differ, say in static scales, stay on their own: print(model) shows.
                with suppress(OptionError):
                    fuse(*sparse)
