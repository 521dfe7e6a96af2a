"""Three ways to check, prune and pack a weight on the CPU, for ``slidesparse bench packing``.

Ours, through the library's public functions; the same steps in plain NumPy; and in PyTorch, which
prunes with ``torch.topk``.  :func:`compare` holds their outputs against each other, to the bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from ..dtypes import operand
from ..errors import PatternError
from ..packing import SparseWeight, check_pattern
from ..packing import prune as prune_weight
from ..pattern import Pattern
from .record import WrongOutput

__all__ = ["DTYPES", "OURS", "Matrix", "Packed", "Version", "all_versions", "compare"]

Matrix = npt.NDArray[Any]
#: Slid bits (N, K') uint8, and scales (N,) float32.
Packed = tuple[Matrix, Matrix]

DTYPES = ("int8", "fp8_e4m3")
OURS = "slidesparse_rt"


@dataclass(frozen=True)
class Version:
    """One way to do all steps; ``fits`` is the check's verdict, False instead of an error."""

    name: str
    fits: Callable[[Matrix], bool]
    prune: Callable[[Matrix], Matrix]
    pack: Callable[[Matrix, str], Packed]


def our_version(pattern: Pattern, threads: int) -> Version:
    """The library, through its public functions."""

    def fits(weight: Matrix) -> bool:
        try:
            check_pattern(weight, pattern, threads=threads)
        except PatternError:
            return False
        return True

    def prune(weight: Matrix) -> Matrix:
        pruned: Matrix = prune_weight(weight, pattern, threads=threads)
        return pruned

    def pack(weight: Matrix, dtype: str) -> Packed:
        packed = SparseWeight.from_array(prune(weight), pattern, dtype=dtype, threads=threads)
        assert packed.scales is not None
        return packed.slide(threads=threads).view(np.uint8), packed.scales

    return Version(OURS, fits, prune, pack)


def numpy_version(pattern: Pattern) -> Version:
    """The same steps as one writes them in NumPy, on whole arrays; NumPy runs them on one core."""
    keep, group, windows = pattern.keep, pattern.group, pattern.windows

    def grouped(array: Matrix) -> Matrix:
        rows, columns = array.shape
        if columns % group:
            array = np.pad(array, ((0, 0), (0, pattern.padded_k(columns) - columns)))
        return array.reshape(rows, -1, group)

    def fits(weight: Matrix) -> bool:
        few = np.count_nonzero(grouped(weight), axis=2) <= keep
        return bool(few.all() and np.isfinite(weight).all())

    def prune(weight: Matrix) -> Matrix:
        pruned = grouped(weight).copy()
        drop = group - keep
        if drop:
            smallest = np.argpartition(np.abs(pruned), drop - 1, axis=2)[..., :drop]
            np.put_along_axis(pruned, smallest, 0, axis=2)
        return pruned.reshape(weight.shape[0], -1)[:, : weight.shape[1]]

    def quantize(weight: Matrix, dtype: str) -> Packed:
        limit = np.float32(operand(dtype).q_max)
        largest = np.abs(weight).max(axis=1)
        scaled = weight * (limit / largest)[:, None]
        if dtype == "int8":
            values = np.clip(np.rint(scaled), -limit, limit).astype(np.int8).view(np.uint8)
        else:
            limited = np.clip(scaled, -limit, limit)
            values = limited.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            values[values == 0x80] = 0
        return values, largest / limit

    def slide(values: Matrix) -> Matrix:
        left = grouped(values).copy()
        slid = np.zeros((*left.shape[:2], windows, 4), np.uint8)
        for w in range(windows):
            window = left[..., 2 * w : 2 * w + 4]
            nonzero = window != 0
            taken = nonzero & (np.cumsum(nonzero, axis=2) <= 2)
            slid[:, :, w, : window.shape[2]] = np.where(taken, window, 0)
            window[taken] = 0
        if left.any():
            raise WrongOutput("the NumPy version could not place every weight")
        return slid.reshape(values.shape[0], -1)

    def pack(weight: Matrix, dtype: str) -> Packed:
        values, scales = quantize(prune(weight), dtype)
        return slide(values), scales

    return Version("numpy", fits, prune, pack)


def torch_version(pattern: Pattern, threads: int) -> Version | None:
    """The same steps with PyTorch on the CPU; ``None`` where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    keep, group, windows = pattern.keep, pattern.group, pattern.windows

    def grouped(tensor: torch.Tensor) -> torch.Tensor:
        rows, columns = tensor.shape
        if columns % group:
            missing = pattern.padded_k(columns) - columns
            tensor = torch.nn.functional.pad(tensor, (0, missing))
        return tensor.reshape(rows, -1, group)

    def fits(weight: Matrix) -> bool:
        tensor = torch.from_numpy(weight)
        few = torch.count_nonzero(grouped(tensor), dim=2) <= keep
        return bool(few.all() and torch.isfinite(tensor).all())

    def pruned(weight: torch.Tensor) -> torch.Tensor:
        groups = grouped(weight)
        kept = groups.abs().topk(keep, dim=2, sorted=False).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, kept, True)
        whole = torch.where(mask, groups, 0).reshape(weight.shape[0], -1)
        return whole[:, : weight.shape[1]]

    def prune(weight: Matrix) -> Matrix:
        result: Matrix = pruned(torch.from_numpy(weight)).numpy()
        return result

    def quantize(weight: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        limit = operand(dtype).q_max
        assert limit is not None
        largest = weight.abs().amax(dim=1)
        # Tensor over tensor: number / tensor is computed as number * (1 / tensor), rounded twice.
        whole = torch.full_like(largest, limit)
        scaled = weight * (whole / largest)[:, None]
        if dtype == "int8":
            values = scaled.round().clamp(-limit, limit).to(torch.int8).view(torch.uint8)
        else:
            values = scaled.clamp(-limit, limit).to(torch.float8_e4m3fn).view(torch.uint8)
            values[values == 0x80] = 0
        return values, largest / whole

    def slide(values: torch.Tensor) -> torch.Tensor:
        left = grouped(values).clone()
        slid = torch.zeros((*left.shape[:2], windows, 4), dtype=torch.uint8)
        for w in range(windows):
            window = left[..., 2 * w : 2 * w + 4]
            nonzero = window != 0
            taken = nonzero & (torch.cumsum(nonzero, dim=2) <= 2)
            slid[:, :, w, : window.shape[2]] = torch.where(taken, window, 0)
            window[taken] = 0
        if left.any():
            raise WrongOutput("the PyTorch version could not place every weight")
        return slid.reshape(values.shape[0], -1)

    def pack(weight: Matrix, dtype: str) -> Packed:
        values, scales = quantize(pruned(torch.from_numpy(weight)), dtype)
        return slide(values).numpy(), scales.numpy()

    return Version("torch", fits, prune, pack)


def all_versions(pattern: Pattern, threads: int) -> list[Version]:
    """The versions that this machine can run, ours first."""
    candidates = (
        our_version(pattern, threads),
        numpy_version(pattern),
        torch_version(pattern, threads),
    )
    return [found for found in candidates if found is not None]


def groups_of(array: Matrix, width: int) -> Matrix:
    """(N, groups, width), padded with zeros."""
    missing = -array.shape[1] % width
    return np.pad(array, ((0, 0), (0, missing))).reshape(array.shape[0], -1, width)


def tied_groups(ours: Matrix, other: Matrix, pattern: Pattern, name: str) -> Matrix:
    """Groups (N, groups) in which two versions kept different weights of equal magnitude.

    Raises WrongOutput where they kept different magnitudes.
    """
    a, b = groups_of(ours, pattern.group), groups_of(other, pattern.group)
    differ = (a != b).any(axis=2)
    if not np.array_equal(np.sort(np.abs(a[differ])), np.sort(np.abs(b[differ]))):
        raise WrongOutput(f"prune: {name} keeps other magnitudes than {OURS}")
    result: Matrix = differ
    return result


def compare(versions: Sequence[Version], weight: Matrix, pattern: Pattern) -> dict[str, int]:
    """Run every step of every version once, and compare the outputs with ours, bit by bit.

    Where weights of one group are equally large, versions may keep different ones; those groups
    are left out, and their number is returned for each version.  Raises WrongOutput for any other
    difference.
    """
    ours, *others = versions
    pruned = ours.prune(weight)
    packed = {dtype: ours.pack(weight, dtype) for dtype in DTYPES}
    ties = {}
    for one in versions:
        if not one.fits(pruned) or (pattern.name != "dense" and one.fits(weight)):
            raise WrongOutput(f"check: {one.name} has another verdict than {OURS}")
    for other in others:
        tied = tied_groups(pruned, other.prune(weight), pattern, other.name)
        ties[other.name] = int(np.count_nonzero(tied))
        for dtype in DTYPES:
            slid, scales = other.pack(weight, dtype)
            differ = groups_of(packed[dtype][0] != slid, pattern.slots).any(axis=2)
            if (differ & ~tied).any() or not np.array_equal(packed[dtype][1], scales):
                raise WrongOutput(f"prune+quantize+slide: {other.name} differs in {dtype}")
    return ties
