"""The ``quantization_config`` of a converted model: everything that loading needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..dtypes import Operand, operand
from ..errors import DTypeError, FormatError, PatternError
from ..packing.prune import METHODS
from ..pattern import Pattern
from .checkpoint import CONFIG, Checkpoint, read_json
from .layers import Choice, Settings
from .layout import SCALE_SUFFIX

__all__ = ["CONFIG_VERSION", "QUANT_METHOD", "ModelConfig", "converted_config"]

#: ``quant_method`` of a converted model.
QUANT_METHOD = "slidesparse"
#: Version of the layout; a reader refuses newer ones.
CONFIG_VERSION = 1


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """What a converted model's config says.

    Attributes
    ----------
    pattern, dtype, method:
        Of every layer in ``layers``.
    layers:
        Modules whose ``<module>.weight`` (N, K) fits the pattern, with ``<module>.weight_scale``
        (N, 1), F32, where the dtype has scales: ``weight ~= values * scales``.
    ignore:
        Modules with a two-dimensional weight that stayed as it was.
    static_inputs:
        Whether layers have an ``<module>.input_scale``: one activation scale for all tokens.
    """

    pattern: Pattern
    dtype: Operand
    method: str
    layers: tuple[str, ...]
    ignore: tuple[str, ...]
    static_inputs: bool

    @classmethod
    def read(cls, folder: Path) -> ModelConfig | None:
        """The part for this package of ``config.json``; ``None`` if the model is not converted.

        Raises FormatError for one that is not understood, and OSError where it cannot be read.
        """
        path = folder / CONFIG
        return cls.from_json(read_json(path).get("quantization_config"), path)

    @classmethod
    def from_json(cls, content: Any, where: Path | str = CONFIG) -> ModelConfig | None:
        """:meth:`read` for a ``quantization_config`` that is loaded already."""
        if not isinstance(content, Mapping) or content.get("quant_method") != QUANT_METHOD:
            return None
        version = content.get("version")
        if version != CONFIG_VERSION:
            raise FormatError(
                f"{where} has quantization_config version {version!r}; slidesparse_rt "
                f"{__version__} reads version {CONFIG_VERSION}; upgrade it, or convert again"
            )
        try:
            pattern = Pattern.parse(content.get("pattern", ""))
            dtype = operand(content.get("dtype", ""))
        except (PatternError, DTypeError) as error:
            raise FormatError(f"{where} is not understood: {error}") from error
        layers, ignore = content.get("layers"), content.get("ignore")
        for key, names in (("layers", layers), ("ignore", ignore)):
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise FormatError(f"{where} has no list of module names under {key!r}")
        method = content.get("method")
        if method not in METHODS:
            raise FormatError(f"{where} has method {method!r}; allowed are {', '.join(METHODS)}")
        activations = content.get("activations")
        static = isinstance(activations, Mapping) and activations.get("dynamic") is False
        return cls(pattern, dtype, method, tuple(layers or ()), tuple(ignore or ()), static)


def converted_config(checkpoint: Checkpoint, choice: Choice, settings: Settings) -> dict[str, Any]:
    """The model's config with a ``quantization_config`` that describes the converted layers."""
    config = {key: value for key, value in checkpoint.config.items() if key != "compression_config"}
    static = any(f"{module}.input_scale" in checkpoint.tensors for module in choice.layers)
    scaled = settings.dtype.scaled
    config["quantization_config"] = {
        "quant_method": QUANT_METHOD,
        "version": CONFIG_VERSION,
        "writer": f"slidesparse_rt {__version__}",
        "pattern": settings.pattern.name,
        "dtype": settings.dtype.name,
        "method": settings.method,
        "weights": {
            "values": "weight",
            "scales": SCALE_SUFFIX if scaled else None,
            "scale_dtype": "F32" if scaled else None,
            "scale_shape": "(N, 1)" if scaled else None,
            "strategy": "channel" if scaled else None,
            "symmetric": True,
            "compressed": False,
        },
        "activations": {
            "dynamic": not static,
            "strategy": "tensor" if static else ("token" if scaled else None),
            "scales": "input_scale" if static else None,
        },
        "layers": list(choice.layers),
        "ignore": [one.module for one in choice.skipped],
        "include": list(settings.include),
        "exclude": list(settings.exclude),
        "converted_from": choice.source_method,
    }
    return config
