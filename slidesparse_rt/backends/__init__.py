"""The backends, by name, and how one is chosen."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

from ..arrays import Device
from ..errors import BackendUnavailable, OptionError
from ..ffi.driver import probe
from ..options import PlanOptions
from .base import Backend, Config, Problem, Support
from .machine import gpu_refusal

__all__ = [
    "BACKENDS",
    "GPU_BACKENDS",
    "Backend",
    "Choice",
    "Config",
    "Problem",
    "Support",
    "able",
    "check_options",
    "choose",
    "needs_gpu",
    "unavailable",
]


@dataclass(frozen=True, slots=True)
class _Row:
    """Where a backend lives, where it runs, and the libraries without which it is not imported."""

    module: str
    name: str
    runs_on: str
    libraries: tuple[str, ...] = ()


#: Every backend; "auto" takes the first that can run, in the order of :func:`_order`.
_ROWS = {
    "hopper": _Row("hopper", "HopperBackend", "cuda", ("nvrtc",)),
    "cusparselt": _Row("cusparselt", "CusparseltBackend", "cuda", ("cusparseLt", "nvrtc")),
    "dense": _Row("dense", "DenseBackend", "cuda", ("cublasLt", "nvrtc")),
    "reference": _Row("reference", "ReferenceBackend", "cpu"),
}
#: Major compute capability of the H100 and the H200.
_HOPPER = 9
#: The least N/(N-1) of patterns with which "hopper" was faster than "dense" for most numbers of
#: tokens on such a GPU, of operand formats where that is not every pattern (docs/performance.md).
_HOPPER_GAINS = {"bf16": Fraction(3, 2)}
#: The backend and the operand format for which ``PlanOptions(fuse_channel_scales=True)`` exists.
_FUSING = ("cusparselt", "int8")
#: What ``backend=`` takes.
BACKENDS = ("auto", *_ROWS)
#: Those that run on a GPU, and can be measured against each other there.
GPU_BACKENDS = tuple(name for name, row in _ROWS.items() if row.runs_on == "cuda")
#: The one that uses no zeros; ``PlanOptions(keep_dense=False)`` puts it last.
_DENSE = "dense"


@dataclass(frozen=True, slots=True)
class Choice:
    """The outcome of :func:`choose`: a backend, why it, and why each other one was refused."""

    backend: Backend
    refused: dict[str, str]
    why: str


def needs_gpu(name: str) -> bool:
    """Whether the backend ``name`` runs on a GPU; OptionError for a name that does not exist."""
    if name == "auto":
        return False
    return _row(name).runs_on == "cuda"


def choose(name: str, problem: Problem, device: Device, keep_dense: bool = True) -> Choice:
    """The backend that ``name`` asks for, able to run ``problem`` on ``device``.

    Without ``keep_dense`` "auto" takes "dense" only where nothing else can run.  Raises
    BackendUnavailable with every backend's reason if there is none, and OptionError for a name that
    does not exist.
    """
    wanted, why = _order(problem, device) if name == "auto" else ([name], "it was asked for")
    if not keep_dense and device.kind == "cuda":
        wanted = sorted(wanted, key=_DENSE.__eq__)
    refused: dict[str, str] = {}
    for place, candidate in enumerate(wanted):
        backend, why_not = _able(_row(candidate), problem, device)
        if backend is None:
            refused[candidate] = why_not
            continue
        for other in wanted[place + 1 :]:
            lean = other == _DENSE and not keep_dense
            by_rule = f"not tried: by rule {candidate} goes first"
            refused[other] = "keep_dense is False" if lean else by_rule
        return Choice(backend, refused, why)
    raise unavailable(name, problem, device, refused)


def able(
    names: Iterable[str], problem: Problem, device: Device
) -> tuple[dict[str, Any], dict[str, str]]:
    """Those of the backends ``names`` that can run ``problem`` on ``device``; why not the others.

    A name that does not exist is such a reason, too: names may come from a file.
    """
    found: dict[str, Any] = {}
    refused: dict[str, str] = {}
    for name in names:
        if name not in _ROWS:
            refused[name] = "there is no such backend"
            continue
        backend, why_not = _able(_ROWS[name], problem, device)
        if backend is None:
            refused[name] = why_not
        else:
            found[name] = backend
    return found, refused


def unavailable(
    name: str, problem: Problem, device: Device, refused: Mapping[str, str]
) -> BackendUnavailable:
    """The error for a problem that no backend that ``name`` stands for can run."""
    reasons = "\n".join(f"  {key}: {why}" for key, why in refused.items())
    return BackendUnavailable(
        f"no backend can run a {problem.pattern.name} {problem.dtype.name} weight on {device} "
        f"(backend={name!r}):\n{reasons}\n`slidesparse doctor` shows what is missing"
    )


def check_options(options: PlanOptions, problem: Problem, name: str) -> None:
    """Raise OptionError for an option that the backend ``name`` would have to ignore."""
    if not options.fuse_channel_scales:
        return
    backend, dtype = _FUSING
    wrong, mend = "", ""
    if problem.dtype.name != dtype:
        wrong, mend = f"the weight is {problem.dtype.name}", f"use dtype={dtype!r}"
    elif name != backend:
        wrong, mend = f"the backend is {name}", f"pass backend={backend!r}"
    if wrong:
        raise OptionError(
            f"fuse_channel_scales is set, but {wrong}; allowed is {dtype} on {backend}: {mend}, or "
            f"leave fuse_channel_scales out"
        )


def _order(problem: Problem, device: Device) -> tuple[list[str], str]:
    """The order in which "auto" tries the backends, and the reason.

    A rule for where nothing is measured (docs/performance.md has the measurements that it was made
    from, docs/tuning.md what takes its place): the kernel written for a GPU first.  On a Hopper GPU
    the lifted cuSPARSELt pipeline is slower than the dense one for patterns milder than 2:4, and in
    bf16 so is our own for those milder than 4:6, but for few tokens.
    """
    pattern, dtype = problem.pattern, problem.dtype.name
    first: list[str] = []
    why = "the first that can run"
    if device.kind == "cuda" and pattern.speed_bound <= 1:
        first = [_DENSE]
        why = f"dense goes first for the pattern {pattern.name}, as there are no zeros to skip"
    elif device.kind == "cuda" and pattern.expansion > 1 and _on_hopper(device):
        first, of_format = ["hopper", _DENSE], ""
        if pattern.speed_bound < _HOPPER_GAINS.get(dtype, 1):
            first, of_format = first[::-1], f" in {dtype}"
        why = (
            f"on a Hopper GPU {first[0]}, then {first[1]}, go before cusparselt for {pattern.name}"
            f"{of_format} (docs/performance.md)"
        )
    return [*first, *(name for name in _ROWS if name not in first)], f"by rule: {why}"


def _on_hopper(device: Device) -> bool:
    """Whether a device is a GPU that the driver knows as a Hopper one."""
    known = [row for row in probe().devices if row.index == device.index]
    return bool(known) and known[0].compute_capability[0] == _HOPPER


def _row(name: str) -> _Row:
    row = _ROWS.get(name) if isinstance(name, str) else None
    if row is None:
        raise OptionError(
            f"backend {name!r} is unknown; allowed are {', '.join(map(repr, BACKENDS))}"
        )
    return row


def _able(row: _Row, problem: Problem, device: Device) -> tuple[Backend | None, str]:
    """The backend, if it can run ``problem`` on ``device``; why not, otherwise."""
    if device.kind != row.runs_on:
        where = "a GPU" if row.runs_on == "cuda" else "the CPU"
        return None, f"it runs on {where}, and the plan is on {device}"
    if row.runs_on == "cuda":
        missing = gpu_refusal(row.libraries, device)
        if missing:
            return None, missing
    module: Any = importlib.import_module(f"{__name__}.{row.module}")
    backend: Backend = getattr(module, row.name)()
    support = backend.supports(problem, device)
    return (backend, "") if support.ok else (None, support.why_not)
