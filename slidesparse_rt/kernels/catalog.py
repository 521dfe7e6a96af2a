"""The one table of kernels: which source, which settings, which architectures.

A :class:`KernelSpec` names one entry point of one source in ``kernels_cu/`` with every setting that
is compiled into it.  :func:`catalogue` lists the specs that are compiled for every architecture in
the tests; any other combination of the same settings is made with the same functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from ..dtypes import ARRAY_TYPES, OPERANDS, array_type, operand
from ..errors import DTypeError, OptionError
from ..pattern import PATTERNS, WINDOW, Pattern
from .hopper_tiles import configurations

__all__ = [
    "ARCHITECTURES",
    "FORMATS",
    "QUANTIZE_VECTORS",
    "KernelSpec",
    "catalogue",
    "dequantize",
    "evict",
    "format_bytes",
    "hopper_gemm",
    "hopper_pack",
    "quantize_lift",
    "quantize_threads",
    "weights",
]

#: Architectures that every kernel compiles for.  The suffix "a" unlocks instructions of just that
#: one (wgmma); kernels that need none of them run on the plain one too.
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90a", "sm_100", "sm_120")

#: Number formats as kernels_cu/numbers.cuh numbers them: name -> (number, bytes).
FORMATS = {
    "float32": (0, 4),
    "float16": (1, 2),
    "bfloat16": (2, 2),
    "int8": (3, 1),
    "float8_e4m3fn": (4, 1),
    "int32": (5, 4),
}

#: Pieces of 16 bytes that a thread of quantize_lift may hold.
QUANTIZE_VECTORS = (1, 2, 4, 8)

#: Bytes of one load of quantize_lift.
_ACCESSES = (16, 8, 4, 2)


@dataclass(frozen=True, slots=True)
class KernelSpec:
    """One entry point with its settings.

    Attributes
    ----------
    source:
        File in ``kernels_cu/``.
    entry:
        Name of the ``extern "C"`` kernel.
    defines:
        Settings: macro name without ``SS_`` and value, in alphabetical order.
    hot:
        Whether it runs in every forward pass; such a kernel must not spill registers.
    max_threads:
        Largest block that it can be launched with.
    exact:
        Whether it needs the instructions of one architecture alone (``sm_90a``).
    """

    source: str
    entry: str
    defines: tuple[tuple[str, int], ...]
    hot: bool
    max_threads: int
    exact: bool = False

    @property
    def options(self) -> tuple[str, ...]:
        """The settings as compiler options."""
        return tuple(f"-DSS_{name}={value}" for name, value in self.defines)

    @property
    def title(self) -> str:
        """Entry point and settings, for messages."""
        settings = ", ".join(f"{name.lower()}={value}" for name, value in self.defines)
        return f"{self.entry}({settings})"


def format_bytes(name: str) -> int:
    """Bytes of one element of the format ``name``; OptionError for one that kernels do not know."""
    return _format(name)[1]


def quantize_lift(
    x_type: str,
    out: str,
    pattern: Pattern,
    *,
    vectors: int = 4,
    threads: int = 128,
    access: int = 16,
    given_scales: bool = False,
    weight: bool = False,
    warp_row: bool = False,
    tiled: bool = False,
) -> KernelSpec:
    """Return the kernel that quantizes and lifts.

    Parameters
    ----------
    x_type:
        "float32", "float16" or "bfloat16".
    out:
        Operand: "int8" or "fp8_e4m3" (quantize), "bf16" or "fp16" (lift only).
    pattern:
        How to lift; 2:4 leaves the order as it is.
    vectors:
        Pieces of 16 bytes that a thread holds, one of :data:`QUANTIZE_VECTORS`.
    threads:
        Threads of the block that it will be launched with.
    access:
        Bytes of one load: 16, 8, 4 or 2; at least one element.
    given_scales:
        Whether the scales are given, not measured.
    weight:
        Whether zeros lose their sign.
    warp_row:
        Whether each warp has a row of its own.
    tiled:
        Whether rows are longer than the block holds.
    """
    source_type = array_type(x_type)
    target = operand(out)
    if vectors not in QUANTIZE_VECTORS:
        raise OptionError(f"vectors is {vectors}; allowed are {QUANTIZE_VECTORS}")
    size = source_type.bits // 8
    if access not in _ACCESSES or access < size:
        raise OptionError(
            f"access is {access}; allowed for {source_type.name} are 16, 8, ... {size}"
        )
    if given_scales and not target.scaled:
        raise OptionError(f"given_scales is set, but {target.name} has no scales")
    if warp_row and tiled:
        raise OptionError("warp_row and tiled exclude each other; clear one of them")
    blocks = _TILED_BLOCKS[vectors] if tiled else _QUANTIZE_BLOCKS[vectors]
    max_threads, min_blocks = next((row for row in blocks if threads <= row[0]), (0, 0))
    if max_threads == 0:
        raise OptionError(f"threads is {threads}; allowed are at most {blocks[-1][0]}")
    return _spec(
        "quantize_lift.cu",
        "quantize_lift",
        hot=not weight,
        max_threads=max_threads,
        IN=_format(source_type.name)[0],
        OUT=_format(target.dtype.name)[0],
        GROUP=pattern.group,
        WINDOWS=pattern.windows,
        VECTORS=vectors,
        STATIC=int(given_scales),
        WEIGHT=int(weight),
        ACCESS=access,
        WARP_ROW=int(warp_row),
        TILED=int(tiled),
        MAX_THREADS=max_threads,
        MIN_BLOCKS=min_blocks,
    )


#: Blocks of quantize_lift by vectors: (most threads, how many such blocks a multiprocessor holds).
#: These leave enough registers on every architecture.
_QUANTIZE_BLOCKS = {
    1: ((640, 2), (1024, 1)),
    2: ((640, 2), (1024, 1)),
    4: ((640, 2), (1024, 1)),
    8: ((512, 2), (1024, 1)),
}


#: The same for rows that are tiled.
_TILED_BLOCKS = dict.fromkeys(QUANTIZE_VECTORS, ((512, 1),))


def quantize_threads(vectors: int, *, overlapping: bool = False, tiled: bool = False) -> int:
    """Return the largest block of quantize_lift, or the largest of which two run at a time."""
    rows = _TILED_BLOCKS[vectors] if tiled else _QUANTIZE_BLOCKS[vectors]
    return rows[0 if overlapping else -1][0]


def dequantize(
    acc_type: str,
    out_type: str,
    *,
    columns: int = 4,
    rows: int | None = None,
    batch: int | None = None,
    aligned: bool = True,
) -> KernelSpec:
    """Return the kernel that applies scales and bias to a GEMM's result.

    Parameters
    ----------
    acc_type:
        "int32", "float32", "bfloat16" or "float16".
    out_type:
        "float32", "float16" or "bfloat16".
    columns:
        Consecutive columns of a thread, 4 or 8.
    rows, batch:
        Rows of a thread, and how many of them are loaded at once (a divisor of ``rows``); ``None``
        takes what was fastest on an H200: 4 and 4, for 16-bit ``acc`` 8 and 8.
    aligned:
        Whether rows start at multiples of 16 bytes.
    """
    acc, acc_bytes = _format(acc_type)
    out = _format(array_type(out_type).name)[0]
    if acc_bytes == 1:
        allowed = "int32, float32, bfloat16, float16"
        raise DTypeError(f"a GEMM result of type {acc_type} is unknown; allowed are {allowed}")
    rows = 16 // acc_bytes if rows is None else rows
    batch = rows if batch is None else batch
    if columns not in (4, 8) or batch < 1 or rows % batch:
        raise OptionError(
            f"columns={columns}, rows={rows}, batch={batch}; allowed are 4 or 8 columns, and rows "
            "that are a multiple of batch"
        )
    return _spec(
        "dequantize.cu",
        "dequantize",
        hot=True,
        max_threads=256,
        ACC=acc,
        OUT=out,
        COLUMNS=columns,
        ROWS=rows,
        BATCH=batch,
        ALIGNED=int(aligned),
    )


#: Entry points of weights.cu, and whether they take array types (a) or operands (o).
_WEIGHT_ENTRIES = {
    "check": "ao",
    "prune_magnitude": "a",
    "prune_wanda": "a",
    "slide": "o",
    "unslide": "o",
}


def weights(entry: str, dtype: str, pattern: Pattern) -> KernelSpec:
    """Return a kernel that prepares weights.

    Parameters
    ----------
    entry:
        "check", "prune_magnitude", "prune_wanda", "slide" or "unslide".
    dtype:
        NumPy name of the weight's type; pruning takes "float32", "float16", "bfloat16"; sliding
        takes the operands' types; checking takes both.
    pattern:
        The pattern.
    """
    kinds = _WEIGHT_ENTRIES.get(entry)
    if kinds is None:
        raise OptionError(f"entry is {entry!r}; allowed are {', '.join(_WEIGHT_ENTRIES)}")
    allowed = [row.name for row in ARRAY_TYPES if "a" in kinds]
    allowed += [
        row.dtype.name for row in OPERANDS if "o" in kinds and row.dtype.name not in allowed
    ]
    if dtype not in allowed:
        raise DTypeError(f"{entry} does not take {dtype}; allowed are {', '.join(allowed)}")
    return _spec(
        "weights.cu",
        entry,
        hot=False,
        max_threads=256,
        TYPE=_format(dtype)[0],
        GROUP=pattern.group,
        KEEP=pattern.keep,
        WINDOWS=pattern.windows,
    )


def hopper_gemm(
    dtype: str,
    out_type: str,
    *,
    tokens: int,
    blocks: int,
    groups: int,
    k_groups: bool,
    stages: int,
    splits: bool,
    clusters: bool,
    each_lane: bool = False,
) -> KernelSpec:
    """Return the sparse GEMM for Hopper.

    Parameters
    ----------
    dtype:
        Operand: "int8", "fp8_e4m3", "bf16" or "fp16".
    out_type:
        "float32", "float16" or "bfloat16".
    tokens, blocks, groups, k_groups, splits, clusters:
        See :class:`slidesparse_rt.kernels.hopper_tiles.HopperConfig`; one kernel is for clusters of
        any size.
    stages:
        Stages of tokens in shared memory.
    each_lane:
        Stages are released by each lane instead of once a warp: slower, and the same otherwise.
        compute-sanitizer's racecheck does not see that the lanes of a warp meet.
    """
    threads = (groups + 1) * 128
    return _spec(
        "hopper_gemm.cu",
        "hopper_gemm",
        hot=True,
        max_threads=threads,
        exact=True,
        TYPE=_format(operand(dtype).dtype.name)[0],
        OUT=_format(array_type(out_type).name)[0],
        TOKENS=tokens,
        BLOCKS=blocks,
        GROUPS=groups,
        KGROUPS=int(k_groups),
        STAGES=stages,
        SPLITS=int(splits),
        CLUSTERS=int(clusters),
        EACHLANE=int(each_lane),
    )


def hopper_pack(dtype: str) -> KernelSpec:
    """Return the kernel that packs weights for :func:`hopper_gemm`; ``dtype`` as there."""
    return _spec(
        "hopper_pack.cu",
        "hopper_pack",
        hot=False,
        max_threads=128,
        TYPE=_format(operand(dtype).dtype.name)[0],
    )


def evict() -> KernelSpec:
    """Return the kernel that reads memory through the level-2 cache."""
    return _spec("evict.cu", "evict", hot=False, max_threads=256)


def catalogue(*, all_patterns: bool = False) -> Iterator[KernelSpec]:
    """Yield every kernel once for pattern 6:8, or (``all_patterns``) the lifting ones for each.

    Without ``all_patterns``: each entry point with each type, and each variant of the hot ones; of
    hopper_gemm every kernel that a plan can ask for.
    """
    if all_patterns:
        for pattern in PATTERNS:
            yield quantize_lift("bfloat16", "int8", pattern)
            yield weights("slide", "int8", pattern)
        return
    pattern = Pattern.parse("6:8")
    for target in OPERANDS:
        for source in ARRAY_TYPES:
            yield quantize_lift(source.name, target.name, pattern)
        yield quantize_lift("bfloat16", target.name, pattern, threads=1024)
        yield quantize_lift("bfloat16", target.name, pattern, vectors=8, threads=512)
        yield quantize_lift("float32", target.name, pattern, vectors=8, threads=1024)
        yield quantize_lift("bfloat16", target.name, pattern, tiled=True)
        yield quantize_lift("float32", target.name, pattern, vectors=1, warp_row=True)
        yield quantize_lift("float16", target.name, pattern, access=2)
    yield quantize_lift("float16", "int8", pattern, access=8)
    yield quantize_lift("float32", "int8", pattern, access=4)
    for out in ("int8", "fp8_e4m3"):
        for source in ARRAY_TYPES:
            yield quantize_lift(source.name, out, pattern, given_scales=True)
        yield quantize_lift("bfloat16", out, pattern, given_scales=True, vectors=8, threads=512)
        yield quantize_lift("float32", out, pattern, given_scales=True, vectors=8, threads=1024)
        yield quantize_lift("bfloat16", out, pattern, given_scales=True, tiled=True)
        yield quantize_lift("bfloat16", out, pattern, given_scales=True, vectors=1, warp_row=True)
        yield quantize_lift("float32", out, pattern, weight=True, vectors=2)
    for acc in ("int32", "float32", "bfloat16"):
        for out_type in ARRAY_TYPES:
            yield dequantize(acc, out_type.name)
        yield dequantize(acc, "bfloat16", columns=8)
        yield dequantize(acc, "bfloat16", aligned=False)
    for entry, kinds in _WEIGHT_ENTRIES.items():
        for kind in (
            ("float32", "bfloat16") if "a" in kinds else ("int8", "float8_e4m3fn", "float16")
        ):
            yield weights(entry, kind, pattern)
    yield evict()
    for target in OPERANDS:
        yield hopper_pack(target.name)
        for source in ARRAY_TYPES:
            for settings in _hopper_settings():
                yield hopper_gemm(target.name, source.name, **settings)


def _hopper_settings() -> list[dict[str, Any]]:
    """How hopper_gemm is compiled for each configuration that is timed for some product."""
    found: dict[tuple[object, ...], dict[str, Any]] = {}
    # From few tokens to those of prefills; few channels and a long K', so that nothing is ruled out
    # and K' is worth sharing.
    for tokens in (1 << power for power in range(4, 15)):
        for config in configurations(128, 1 << 16, tokens, 132):
            settings = config.settings
            found[tuple(settings.values())] = settings
    return list(found.values())


def _format(name: str) -> tuple[int, int]:
    if name not in FORMATS:
        raise OptionError(f"kernels know no format {name!r}; allowed are {', '.join(FORMATS)}")
    return FORMATS[name]


def _spec(
    source: str, entry: str, *, hot: bool, max_threads: int, exact: bool = False, **defines: int
) -> KernelSpec:
    return KernelSpec(source, entry, tuple(sorted(defines.items())), hot, max_threads, exact)


# The sources are written for windows of four.
assert WINDOW == 4
