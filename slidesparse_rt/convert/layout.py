"""What a converted file holds and where: sizes are known before a weight is read.

safetensors wants every tensor at a multiple of its item size and no holes between them.  Tensors
are ordered by the largest power of two (up to 8) that divides their size, so each begins aligned;
nearly every tensor's size is a multiple of 8, so the order is nearly that of the source.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass

from ..dtypes import Operand
from .checkpoint import Checkpoint, Tensor
from .layers import Choice, Layer, Settings

__all__ = [
    "METADATA_KEY",
    "SCALE_SUFFIX",
    "Shard",
    "Slot",
    "converted_bytes",
    "plan_shards",
    "source_bytes",
    "value_type",
]

#: What the metadata of a converted file has beside "format": the version of this layout.
METADATA_KEY = "slidesparse_version"
#: Scales of ``<module>.weight`` are ``<module>.weight_scale``, F32, (N, 1).
SCALE_SUFFIX = "weight_scale"

_VALUE_TYPES = {
    "int8": "I8",
    "fp8_e4m3": "F8_E4M3",
    "bf16": "BF16",
    "fp16": "F16",
}


@dataclass(frozen=True, slots=True)
class Slot:
    """One tensor of a converted file.

    ``role`` is "copy" (bytes of ``source``), "values" or "scales" of ``layer``.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    role: str
    source: Tensor
    layer: Layer | None = None


@dataclass(frozen=True, slots=True)
class Shard:
    """One converted file: its header and its tensors in the order of their bytes."""

    name: str
    header: bytes
    slots: tuple[Slot, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of the file."""
        return len(self.header) + self.tensor_bytes

    @property
    def tensor_bytes(self) -> int:
        """Bytes of its tensors."""
        return sum(slot.nbytes for slot in self.slots)


def value_type(dtype: Operand) -> str:
    """How safetensors spells the type of an operand's values."""
    return _VALUE_TYPES[dtype.name]


def plan_shards(
    checkpoint: Checkpoint, choice: Choice, settings: Settings, version: int
) -> tuple[Shard, ...]:
    """The files to write, one for each of the checkpoint's, under the same names."""
    by_shard: dict[str, list[Slot]] = {name: [] for name in checkpoint.shards}
    by_scale = {
        layer.scale.name: layer for layer in choice.layers.values() if layer.scale is not None
    }
    for tensor in checkpoint.tensors.values():
        slots = by_shard[tensor.path.name]
        layer = choice.layers.get(tensor.name.removesuffix(".weight"))
        if layer is not None and layer.weight is tensor:
            slots.append(_values_of(layer, settings.dtype))
            if layer.scale is None and settings.dtype.scaled:
                slots.append(_scales_of(layer, tensor))
        elif tensor.name in by_scale:
            slots.append(_scales_of(by_scale[tensor.name], tensor))
        else:
            slots.append(
                Slot(tensor.name, tensor.dtype, tensor.shape, tensor.nbytes, "copy", tensor)
            )
    shards = []
    for name, slots in by_shard.items():
        # sorted() is stable: among equals the source's order stays, and reading is sequential.
        ordered = tuple(sorted(slots, key=lambda slot: -math.gcd(slot.nbytes, 8)))
        metadata = {
            **checkpoint.shards[name],
            "format": checkpoint.shards[name].get("format", "pt"),
            METADATA_KEY: str(version),
            "slidesparse_pattern": settings.pattern.name,
            "slidesparse_dtype": settings.dtype.name,
        }
        shards.append(Shard(name, _header(ordered, metadata), ordered))
    return tuple(shards)


def _values_of(layer: Layer, dtype: Operand) -> Slot:
    weight = layer.weight
    nbytes = layer.n * layer.k * dtype.bits // 8
    return Slot(weight.name, value_type(dtype), weight.shape, nbytes, "values", weight, layer)


def _scales_of(layer: Layer, source: Tensor) -> Slot:
    name = f"{layer.module}.{SCALE_SUFFIX}"
    return Slot(name, "F32", (layer.n, 1), 4 * layer.n, "scales", source, layer)


def _header(slots: tuple[Slot, ...], metadata: dict[str, str]) -> bytes:
    """Length and JSON header of a safetensors file, padded so that the data begins at 8 bytes."""
    entries: dict[str, object] = {"__metadata__": metadata}
    at = 0
    for slot in slots:
        entries[slot.name] = {
            "dtype": slot.dtype,
            "shape": list(slot.shape),
            "data_offsets": [at, at + slot.nbytes],
        }
        at += slot.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def source_bytes(layer: Layer) -> int:
    """Bytes that the layer's weight and scales take in the checkpoint."""
    return layer.weight.nbytes + (0 if layer.scale is None else layer.scale.nbytes)


def converted_bytes(layer: Layer, dtype: Operand) -> int:
    """Bytes that the layer's weight and scales take when it is converted."""
    return layer.n * layer.k * dtype.bits // 8 + (4 * layer.n if dtype.scaled else 0)
