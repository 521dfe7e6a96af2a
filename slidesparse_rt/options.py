"""Options as frozen, keyword-only dataclasses, checked when they are made; scales likewise."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from numbers import Real
from typing import Any

import numpy as np

from .dtypes import OPERANDS, SCALE_FLOOR, Operand
from .errors import OptionError

__all__ = ["PlanOptions", "checked_x_scale", "worker_count"]

_LEAST_WORKSPACE = 1 << 20


@dataclass(frozen=True, kw_only=True, slots=True)
class PlanOptions:
    """How a plan prepares and runs.

    Attributes
    ----------
    threads:
        CPU threads for packing; ``None`` takes every core that this process may use.
    workspace_limit:
        Bytes of GPU workspace that quantized tokens and sums of one launch may take, at least 1
        MiB.  A product that would need more is done in several launches over tokens, each of 256
        tokens at least.  What a library needs besides (some megabytes) is not counted.
    workspace:
        A :class:`slidesparse_rt.Workspace` that the plan shares with others, on the plan's device;
        ``None`` gives it one of its own.  Plans on the CPU use none.
    fuse_channel_scales:
        For int8 on the backend "cusparselt", OptionError with any other: the product itself applies
        the channel scales and writes bfloat16, so the second pass reads half the bytes.  Results
        are rounded once more than the definition says, by up to 2**-8 of their size before the bias
        is added, and differ from those of other backends (docs/numerics.md#fused-channel-scales).
    keep_dense:
        Whether a plan with ``backend="auto"`` may also hold the weight in dense form, to be never
        slower than dense; ``False`` saves that memory, and takes dense only where nothing else can
        run.  OptionError with ``backend="dense"``.
    """

    threads: int | None = None
    workspace_limit: int = 2 << 30
    workspace: Any = None
    fuse_channel_scales: bool = False
    keep_dense: bool = True

    def __post_init__(self) -> None:
        worker_count(self.threads)
        limit = self.workspace_limit
        if isinstance(limit, bool) or not isinstance(limit, int) or limit < _LEAST_WORKSPACE:
            raise OptionError(
                f"workspace_limit is {limit!r}; allowed is a whole number of bytes from "
                f"{_LEAST_WORKSPACE} (1 MiB) on"
            )
        for name in ("fuse_channel_scales", "keep_dense"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                raise OptionError(f"{name} is {value!r}; allowed are True and False")


def worker_count(threads: int | None) -> int:
    """CPU threads to use for ``threads`` (``None``: every core this process may run on).

    Raises OptionError for anything but ``None`` or a whole number from 1 to 1024.
    """
    if threads is None:
        affinity = getattr(os, "sched_getaffinity", None)
        return len(affinity(0)) if affinity is not None else (os.cpu_count() or 1)
    if isinstance(threads, bool) or not isinstance(threads, int) or not 1 <= threads <= 1024:
        raise OptionError(
            f"threads is {threads!r}; allowed is None or a whole number from 1 to 1024"
        )
    return threads


def checked_x_scale(x_scale: object, target: Operand) -> np.float32:
    """The activation scale ``x_scale`` rounded to float32, fit to quantize to ``target`` with.

    Raises OptionError for a format that has no scales, and for anything but a number from
    ``SCALE_FLOOR`` to the largest float32.
    """
    seen, value = f"of type {type(x_scale).__name__}", np.nan
    if isinstance(x_scale, (bool, str)):
        seen = repr(x_scale)
    elif isinstance(x_scale, Real):
        with suppress(OverflowError):  # an int that no float can hold
            value = float(x_scale)
            seen = repr(x_scale)
    if target.q_max is None:
        scaled = " or ".join(f"dtype={row.name!r}" for row in OPERANDS if row.scaled)
        raise OptionError(
            f"x_scale is {seen}, but {target.name} activations have no scales; omit x_scale=, or "
            f"use {scaled}"
        )
    if not float(SCALE_FLOOR) <= value <= float(np.finfo(np.float32).max):
        raise OptionError(
            f"x_scale is {seen}; allowed is None (each token's own scale, measured in every run) "
            f"or one number from 2**-126 to 3.4028e38 for all tokens; take the largest magnitude "
            f"that calibration saw in x, divided by {target.q_max:g}"
        )
    return np.float32(value)
