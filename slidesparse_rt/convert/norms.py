"""Files of activation norms for the method "wanda".

A safetensors file: for each layer one tensor under the name of its weight (``<module>.weight``),
shape (K,), F32: the l2 norm of each input over all calibration tokens.  ``slidesparse prune
--norms`` reads the same.  Metadata: ``format``, ``format_version``, ``fingerprint`` of the
checkpoint, ``tokens``, and ``texts`` (JSON: name and SHA-256 of each text).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import FormatError, NonFiniteError, OptionError
from ..packing import TensorFile
from ..packing.prune import METHODS
from .checkpoint import Checkpoint, listed
from .layers import Choice

__all__ = ["NORMS_FORMAT", "NORMS_VERSION", "check_method", "check_norms"]

NORMS_FORMAT = "slidesparse_rt.activation_norms"
NORMS_VERSION = 1


def check_method(method: str, norms: Path | None) -> None:
    """Raise OptionError unless the method exists and goes with the file of norms."""
    if method not in METHODS:
        raise OptionError(f"method {method!r} is unknown; allowed are {', '.join(METHODS)}")
    if method == "wanda" and norms is None:
        raise OptionError(
            "method 'wanda' weighs each input by its norm over calibration tokens; make a file of "
            "norms with 'slidesparse calibrate' and give it with --norms, or use method 'magnitude'"
        )
    if method != "wanda" and norms is not None:
        raise OptionError(f"norms are given, but method {method!r} ignores them; use 'wanda'")


def check_norms(path: Path, checkpoint: Checkpoint, choice: Choice, fingerprint: str) -> None:
    """Raise unless the file has sound norms of every layer, of this checkpoint.

    Raises
    ------
    OptionError
        For norms of another checkpoint, and where layers have none.
    FormatError, NonFiniteError
        For norms of another type or shape, and for negative or infinite ones.
    OSError
        If the file cannot be read.
    """
    with TensorFile(path) as file:
        known = file.metadata.get("fingerprint")
        # Norms of the unquantized model are what a quantized one is pruned with.
        if known not in (None, fingerprint) and choice.source_method is None:
            raise OptionError(
                f"{path} was made from another checkpoint (fingerprint {known[:12]}) than "
                f"{checkpoint.folder} (fingerprint {fingerprint[:12]}); run "
                f"'slidesparse calibrate' on this one"
            )
        names = set(file.keys())
        absent = [
            layer.module for layer in choice.layers.values() if layer.weight.name not in names
        ]
        if absent:
            raise OptionError(
                f"{path} has no norms for {len(absent)} of {len(choice.layers)} layers: "
                f"{listed(absent)}; calibrate again with the same include and exclude, or leave "
                f"these layers out with --exclude"
            )
        for layer in choice.layers.values():
            name = layer.weight.name
            if file.shape(name) != (layer.k,) or file.dtype_name(name) != "F32":
                raise FormatError(
                    f"norms {name!r} in {path} are {file.dtype_name(name)} of shape "
                    f"{file.shape(name)}; needed is F32 of shape ({layer.k},), one for each input"
                )
            values = file.read(name)
            bad = ~(np.isfinite(values) & (values >= 0))
            if bad.any():
                index = int(np.argmax(bad))
                raise NonFiniteError(
                    f"norms {name!r} in {path} hold {values[index]} at index {index}; norms are "
                    f"finite and not negative; calibrate again"
                )
