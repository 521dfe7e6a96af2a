"""What the tests of the Hopper GEMM share: every kernel that is shipped, and 2:4 matrices."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from slidesparse_rt.backends.buckets import TOKEN_BUCKETS
from slidesparse_rt.dtypes import operand
from slidesparse_rt.kernels import catalog, hopper_tiles
from slidesparse_rt.kernels.catalog import KernelSpec
from slidesparse_rt.kernels.compiler import Compiler, default_directory
from slidesparse_rt.kernels.hopper_tiles import HopperConfig, configurations

DTYPES = ("int8", "fp8_e4m3", "bf16", "fp16")
OUT_TYPES = ("float32", "float16", "bfloat16")
#: Multiprocessors of an H100 SXM; of its smaller kin; of what a MIG slice may have.
SM_COUNTS = (132, 114, 16)


def shipped() -> list[HopperConfig]:
    """One configuration for each way in which `configurations` lets the kernel be compiled."""
    found: dict[HopperConfig, None] = {}
    for tokens in sorted({size + more for size in (1, *TOKEN_BUCKETS) for more in (0, 1)}):
        for n in (1, 256, 1024, 4096, 1 << 17):
            for slid_bytes in (256, 512, 1024, 2048, 1 << 16):
                for sm_count in SM_COUNTS:
                    for config in configurations(n, slid_bytes, tokens, sm_count):
                        # One kernel is for clusters of any size.
                        size = 3 if config.cluster else 0
                        found[replace(config, tile_group=8, cluster=size)] = None
    return list(found)


def spec_of(config: HopperConfig, dtype: str, out_type: str) -> KernelSpec:
    """The kernel of a configuration."""
    return catalog.hopper_gemm(dtype, out_type, **config.settings)


def pairs() -> list[tuple[HopperConfig, str, str]]:
    """Every pair of configuration, operand format and type of results, not every triple."""
    return [
        (config, dtype, OUT_TYPES[(i + j) % len(OUT_TYPES)])
        for i, config in enumerate(shipped())
        for j, dtype in enumerate(DTYPES)
    ]


def share_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let tiles be shared wherever they can be, though it would not be worth it."""
    monkeypatch.setattr(hopper_tiles, "_TILE_CLOCKS", 1 << 40)


def keep_compiled(spec: KernelSpec) -> str:
    """Compile a kernel for this user's next process; what went wrong, or ""."""
    try:
        Compiler(default_directory()).compile(spec, "sm_90a")
    except Exception as error:
        return f"{spec.title}: {error}"
    return ""


def sparse_bits(
    rng: np.random.Generator, rows: int, columns: int, dtype: str, *, filled: float = 0.8
) -> np.ndarray:
    """A 2:4 matrix of any bit patterns, a part ``filled`` of its places nonzero.

    Some zeros are negative where the format has them.
    """
    kind = operand(dtype).dtype
    size = kind.itemsize
    values = rng.integers(0, 1 << (8 * size), (rows, columns), dtype=f"u{size}")
    kept = np.argsort(rng.random((rows, columns // 4, 4)), axis=2)[:, :, :2]
    mask = np.zeros((rows, columns // 4, 4), bool)
    np.put_along_axis(mask, kept, rng.random(kept.shape) < filled, axis=2)
    zeros = np.zeros_like(values)
    if dtype != "int8":
        zeros[rng.random(values.shape) < 0.1] = 1 << (8 * size - 1)
    found: np.ndarray = np.where(mask.reshape(rows, columns), values, zeros).view(kind)
    return found


def plain_bits(values: np.ndarray) -> np.ndarray:
    """The bits of a matrix, those of -0 as those of 0."""
    raw = values.view(f"u{values.itemsize}")
    if values.dtype == np.int8:
        return raw
    found: np.ndarray = np.where(raw << 1 & (2 ** (8 * raw.itemsize) - 1) == 0, 0, raw)
    return found
