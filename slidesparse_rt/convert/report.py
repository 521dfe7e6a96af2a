"""What a conversion did, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..pattern import Pattern
from .blocks import Tally
from .layers import Choice, Layer, Settings, Skipped
from .layout import Shard, converted_bytes, source_bytes

__all__ = ["ConvertReport", "LayerReport", "layer_reports", "losses_of", "tensor_bytes"]


def losses_of(tally: Tally) -> dict[str, Any]:
    """The numbers of one layer that the manifest keeps.

    Relative errors and shares of nothing are those of a perfect layer.
    """
    return {
        "relative_error": math.sqrt(tally.error / tally.energy) if tally.energy > 0 else 0.0,
        "kept_energy": tally.kept / tally.energy if tally.energy > 0 else 1.0,
        "clamped": tally.clamped,
    }


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerReport:
    """One converted layer.

    Attributes
    ----------
    module, shape, dtype:
        Its name, (N, K), and the type of the weight in the checkpoint, as safetensors spells it.
    relative_error:
        Frobenius norm of ``weight - values * scales`` over that of ``weight``.
    kept_energy:
        Share of the sum of squares that pruning kept.
    bytes_before, bytes_after:
        Bytes of weight and scales in the checkpoint and in the result.
    padded:
        Inputs that are added (as zeros, when the layer is loaded) to fill the last group.
    clamped:
        Values of -128 in an int8 checkpoint that became -127.
    """

    module: str
    shape: tuple[int, int]
    dtype: str
    relative_error: float
    kept_energy: float
    bytes_before: int
    bytes_after: int
    padded: int
    clamped: int

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "module": self.module,
            "shape": list(self.shape),
            "dtype": self.dtype,
            "relative_error": self.relative_error,
            "kept_energy": self.kept_energy,
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "padded_inputs": self.padded,
            "clamped": self.clamped,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ConvertReport:
    """What :func:`~slidesparse_rt.convert.convert_checkpoint` did.

    Attributes
    ----------
    source, target:
        The two folders.
    settings:
        What was asked for.
    layers:
        Every converted layer, in the order of the checkpoint.
    skipped:
        Matrices that stayed as they were, and why.
    left_out:
        Files of the checkpoint's folder that were not copied: weights in further forms.
    bytes_before, bytes_after:
        Bytes of all tensors.
    shards, resumed:
        Files of weights, and how many of them an earlier run had finished.
    seconds, weights_done:
        What this run took, and how many weights it converted (not those of resumed files).
    """

    source: Path
    target: Path
    settings: Settings
    layers: tuple[LayerReport, ...]
    skipped: tuple[Skipped, ...]
    left_out: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    shards: int
    resumed: int
    seconds: float
    weights_done: int

    @property
    def pattern(self) -> Pattern:
        """The pattern of every converted layer."""
        return self.settings.pattern

    def totals(self) -> dict[str, Any]:
        """Sums over the layers, and bytes of the whole checkpoint."""
        return {
            "layers": len(self.layers),
            "weights": sum(math.prod(layer.shape) for layer in self.layers),
            "layer_bytes_before": sum(layer.bytes_before for layer in self.layers),
            "layer_bytes_after": sum(layer.bytes_after for layer in self.layers),
            "bytes_before": self.bytes_before,
            "bytes_after": self.bytes_after,
            "largest_relative_error": max(layer.relative_error for layer in self.layers),
            "smallest_kept_energy": min(layer.kept_energy for layer in self.layers),
        }

    def lasting(self) -> dict[str, Any]:
        """What report.json holds: the same for every run that gives the same files."""
        return {
            "settings": self.settings.to_json(),
            "totals": self.totals(),
            "layers": [layer.to_json() for layer in self.layers],
            "dense": [
                {
                    "module": one.module,
                    "shape": list(one.weight.shape),
                    "dtype": one.weight.dtype,
                    "bytes": one.weight.nbytes,
                    "reason": one.reason,
                }
                for one in self.skipped
            ],
            "left_out": list(self.left_out),
        }

    def to_json(self) -> dict[str, Any]:
        """The report as plain values: :meth:`lasting` and what is of this run alone."""
        return {
            "input": str(self.source),
            "output": str(self.target),
            "shards": self.shards,
            "resumed_shards": self.resumed,
            "seconds": self.seconds,
            "weights_converted": self.weights_done,
            **self.lasting(),
        }


def layer_reports(
    choice: Choice, settings: Settings, losses: Mapping[str, Mapping[str, Any]]
) -> tuple[LayerReport, ...]:
    """Reports of all layers from the numbers that the manifest keeps."""
    return tuple(_report(layer, settings, losses[layer.module]) for layer in choice.layers.values())


def _report(layer: Layer, settings: Settings, losses: Mapping[str, Any]) -> LayerReport:
    return LayerReport(
        module=layer.module,
        shape=(layer.n, layer.k),
        dtype=layer.weight.dtype,
        relative_error=losses["relative_error"],
        kept_energy=losses["kept_energy"],
        bytes_before=source_bytes(layer),
        bytes_after=converted_bytes(layer, settings.dtype),
        padded=settings.pattern.padded_k(layer.k) - layer.k,
        clamped=losses["clamped"],
    )


def tensor_bytes(shards: tuple[Shard, ...]) -> int:
    """Bytes of all tensors of the files."""
    return sum(shard.tensor_bytes for shard in shards)
