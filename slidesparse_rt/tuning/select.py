"""What a plan runs: one form of its weight, or several and a rule which of them runs when."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..arrays import Device, NDArray
from ..backends import GPU_BACKENDS, Choice, Problem, able, unavailable
from ..backends.base import RawWeight
from ..backends.cold import COLD_BYTES
from ..errors import DeviceMemoryError, OptionError, first_line
from ..options import PlanOptions
from ..packing.weight import SparseWeight
from .cache import TableCache, bias_kind, default_cache, tuning_key
from .table import BUCKETS, DENSE, FAILED, Dispatch, Table

if TYPE_CHECKING:
    from ..backends.gpu_forms import GpuForms
    from .measure import MeasureOptions, Progress

__all__ = ["TUNINGS", "Selected", "Tuned", "check_tuning", "select", "tune"]

_LOG = logging.getLogger(__name__)

#: What ``tuning=`` takes.
TUNINGS = ("cached", "measure", "heuristic")
#: Seconds after which a plan that measures begins no further number of tokens.
_PLAN_SECONDS = 30.0
#: The workspace limit that `slidesparse tune` measures with.
_COMMON_LIMIT = PlanOptions().workspace_limit
_ONLY_DENSE = "keep_dense is False, but no other backend can run this weight here"


@dataclass(frozen=True)
class Tuned:
    """A weight that was measured.

    Attributes
    ----------
    forms:
        The weight on the GPU in every form that was measured, which the caller closes; ``None``
        where all times were kept already.
    table:
        The times, those of earlier measurements included.
    path:
        Where they are kept; ``None``: nowhere.
    """

    forms: GpuForms | None
    table: Table
    path: Path | None


@dataclass(frozen=True)
class Selected:
    """What a plan runs.

    Attributes
    ----------
    prepared:
        The weight in the form of one backend; with ``dispatch`` a mapping of several.
    backends:
        Names of the backends that it is packed for.
    why:
        Why these, for people.
    refused:
        Every other backend, and why it is not used.
    dispatch, table:
        Which runs for how many tokens, and the times that say so; ``None``: a rule chose.
    """

    prepared: Any
    backends: tuple[str, ...]
    why: str
    refused: Mapping[str, str]
    dispatch: Dispatch | None = None
    table: Table | None = None
    hints: tuple[str, ...] = field(default=())

    def at(self, tokens: int) -> str:
        """The backend that runs for so many tokens."""
        return self.backends[0] if self.dispatch is None else self.dispatch.at(tokens)

    def lines(self, *, closed: bool) -> list[str]:
        """Choices, times and memory, for people."""
        found: list[str] = []
        if self.dispatch is not None and self.table is not None:
            found += _choices(self.dispatch, self.table)
            if not closed:
                found += [
                    f"  memory of {name}: {self.prepared[name].nbytes:,} bytes"
                    for name in self.backends
                ]
                found.append(f"  memory of scales and bias: {self.prepared.shared_bytes:,} bytes")
        found += [f"  {hint}" for hint in self.hints]
        found += [f"  refused {name}: {why}" for name, why in self.refused.items()]
        return found


def check_tuning(tuning: object, backend: str, options: PlanOptions) -> None:
    """Raise OptionError for an unknown ``tuning`` and for options that leave nothing to choose."""
    if tuning not in TUNINGS:
        raise OptionError(
            f"tuning {tuning!r} is unknown; allowed are {', '.join(map(repr, TUNINGS))}"
        )
    if tuning == "measure":
        if backend != "auto":
            raise OptionError(
                f"tuning='measure' chooses among backends, but backend={backend!r} names one; pass "
                f"backend='auto', or leave tuning= out"
            )
        if options.fuse_channel_scales:
            raise OptionError(
                "tuning='measure' chooses among backends, but fuse_channel_scales exists for "
                "cusparselt alone; leave one of them out"
            )
    if backend == DENSE and not options.keep_dense:
        raise OptionError(
            "keep_dense is False, but the backend is dense; pass backend='auto', or leave "
            "keep_dense out"
        )


def select(
    source: SparseWeight | RawWeight,
    bias: NDArray | None,
    problem: Problem,
    device: Device,
    options: PlanOptions,
    x_scale: np.float32 | None,
    *,
    choice: Choice,
    asked: str,
    tuning: str,
) -> Selected:
    """Prepare a weight for the backends that are to run it.

    Parameters
    ----------
    source, bias, problem, device, options, x_scale:
        As the plan has them.
    choice:
        What the rule chooses; taken where nothing is measured.
    asked:
        The ``backend=`` of the plan.
    tuning:
        One of :data:`TUNINGS`, checked.

    Raises
    ------
    PatternError, NonFiniteError, ShapeError, DTypeError, ArrayError, DeviceError
        If the weight is not as described.
    DeviceMemoryError, LibraryError, BackendUnavailable, CompileError
        If a backend that was chosen cannot prepare it; nothing stays allocated.
    """
    hints: list[str] = []
    if asked == "auto" and device.kind == "cuda" and not options.fuse_channel_scales:
        found = None
        if tuning == "measure":
            found = _measured(source, bias, problem, device, options, x_scale)
        elif tuning == "cached":
            found = _kept(source, bias, problem, device, options, x_scale)
            hints.append(_advice(problem, bias, options, x_scale))
        if found is not None:
            return found
    if not options.keep_dense and choice.backend.name == DENSE:
        hints.append(_ONLY_DENSE)
    prepared = choice.backend.prepare(source, bias, device, options, x_scale=x_scale)
    return Selected(
        prepared, (choice.backend.name,), choice.why, choice.refused, hints=tuple(hints)
    )


def tune(
    source: SparseWeight | RawWeight,
    bias: NDArray | None,
    problem: Problem,
    device: Device,
    options: PlanOptions,
    x_scale: np.float32 | None,
    settings: MeasureOptions,
    *,
    cache: TableCache | None = None,
    again: bool = False,
    progress: Progress | None = None,
) -> Tuned:
    """Measure every backend that supports a weight, and keep the times.

    What is kept already is not measured again, unless ``again``; a run that a time budget cut short
    is so continued by the next.

    Parameters
    ----------
    source, bias, problem, device, options, x_scale:
        As of a plan.
    settings:
        How to measure.
    cache:
        Where the times are kept; ``None``: in the user's cache.
    again:
        Whether to forget what is kept.
    progress:
        See :data:`~slidesparse_rt.tuning.measure.Progress`.

    Raises
    ------
    BackendUnavailable
        If no backend supports the weight.
    OptionError
        Where times are kept that were taken with another ``cold_tokens`` than ``settings`` ask for,
        unless ``again``.
    PatternError, NonFiniteError, ShapeError, DTypeError, ArrayError, DeviceError
        If the weight is not as described.
    DeviceMemoryError, LibraryError, CompileError
        If every backend failed, and no times are kept.
    """
    from ..backends.gpu_device import gpu_device
    from ..backends.gpu_forms import BROKEN, pack_forms
    from .measure import measure

    if cache is None:
        cache = default_cache()
    backends, refused = able(GPU_BACKENDS, problem, device)
    if not backends:
        raise unavailable("auto", problem, device, refused)
    key = _key(bias, problem, device, options, x_scale)
    older = None if again else cache.load(key)
    if older is not None and not _missing(older, settings):
        return _nothing_left(older, settings, cache.path(key), progress)
    with gpu_device(device.index).measuring:
        # Whoever waited finds what was measured meanwhile.
        older = None if again else cache.load(key)
        missing = _missing(older, settings)
        if older is not None:
            if not missing:
                return _nothing_left(older, settings, cache.path(key), progress)
            settings = replace(settings, cold_tokens=older.cold_tokens)
        forms: GpuForms | None = None
        try:
            forms = pack_forms(
                list(backends.values()),
                source,
                bias,
                device,
                options,
                x_scale=x_scale,
                strict=False,
            )
            found = measure(
                forms, options.workspace_limit, settings, buckets=missing, progress=progress
            )
            table = Table(found.times, {**refused, **found.refused}, found.cold_tokens, found.taken)
            if any(isinstance(error, DeviceMemoryError) for error in forms.failed.values()):
                # A GPU that was full says nothing about the next time.
                return Tuned(forms, table if older is None else table.merged(older), None)
            table, path = cache.save(key, table, replace=older is None)
            return Tuned(forms, table, path)
        except BaseException as error:
            if forms is not None:
                forms.close()
            if older is None or not isinstance(error, BROKEN):
                raise
            # What is kept makes nothing fail.
            _LOG.warning("%d numbers of tokens are not measured: %s", len(missing), error)
            return Tuned(None, older, cache.path(key))


def _missing(older: Table | None, settings: MeasureOptions) -> list[int]:
    """The numbers of tokens that a table lacks; OptionError if it was taken in another way."""
    if older is None:
        return list(settings.buckets)
    if settings.cold_tokens not in (None, older.cold_tokens):
        raise OptionError(
            f"cold_tokens is {settings.cold_tokens}, but times are kept for "
            f"{len(older.tokens)} numbers of tokens that were taken with {older.cold_tokens}; "
            f"leave cold_tokens out, or measure all again (again=True, `slidesparse tune --again`)"
        )
    return [tokens for tokens in settings.buckets if tokens not in older.tokens]


def _nothing_left(
    table: Table, settings: MeasureOptions, path: Path | None, progress: Progress | None
) -> Tuned:
    """The outcome where all times are kept."""
    if progress is not None:
        progress("", len(settings.buckets), len(settings.buckets))
    return Tuned(None, table, path)


def _advice(
    problem: Problem, bias: NDArray | None, options: PlanOptions, x_scale: np.float32 | None
) -> str:
    """How to measure a weight of which nothing is kept."""
    words = "tuning: nothing is measured for this weight here; tuning='measure' measures it"
    kind = bias_kind(problem, bias)
    if kind == "rounded" or x_scale is not None or options.workspace_limit != _COMMON_LIMIT:
        return words  # the command has no options for these
    return (
        f"{words}, and so does `slidesparse tune {problem.n} {problem.k} "
        f"--pattern {problem.pattern.name} --dtype {problem.dtype.name}"
        f"{'' if kind == 'none' else ' --bias'}`"
    )


def _key(
    bias: NDArray | None,
    problem: Problem,
    device: Device,
    options: PlanOptions,
    x_scale: np.float32 | None,
) -> dict[str, Any]:
    from ..backends.gpu_device import gpu_device

    return tuning_key(
        problem,
        gpu_device(device.index),
        options,
        bias=bias_kind(problem, bias),
        static=x_scale is not None,
    )


def _measured(
    source: SparseWeight | RawWeight,
    bias: NDArray | None,
    problem: Problem,
    device: Device,
    options: PlanOptions,
    x_scale: np.float32 | None,
) -> Selected:
    """Measured now, as far as it is not measured yet."""
    from .measure import MeasureOptions

    settings = MeasureOptions(seconds=_PLAN_SECONDS)
    tuned = tune(source, bias, problem, device, options, x_scale, settings)
    forms, table = tuned.forms, tuned.table
    where = "kept nowhere" if tuned.path is None else f"kept in {tuned.path}"
    if forms is None:
        backends, refused = able(table.backends, problem, device)
        return _packed(table, where, backends, refused, source, bias, device, options, x_scale)
    try:
        dispatch = table.dispatch(keep_dense=options.keep_dense, able=forms)
        for name in list(forms):
            if name not in dispatch.backends:
                forms.drop(name)
    except BaseException:
        forms.close()
        raise
    return _selected(forms, table, dispatch, options, where, {})


def _kept(
    source: SparseWeight | RawWeight,
    bias: NDArray | None,
    problem: Problem,
    device: Device,
    options: PlanOptions,
    x_scale: np.float32 | None,
) -> Selected | None:
    """As an earlier measurement says; ``None`` where there is none that can be used."""
    cache = default_cache()
    if cache.empty:
        return None
    key = _key(bias, problem, device, options, x_scale)
    table = cache.load(key)
    if table is None:
        return None
    where = f"kept in {cache.path(key)}"
    backends, refused = able(table.backends, problem, device)
    if not backends:
        _LOG.warning(
            "measured times, %s, are ignored: %s cannot run here any more",
            where,
            ", ".join(table.backends),
        )
        return None
    return _packed(table, where, backends, refused, source, bias, device, options, x_scale)


def _packed(
    table: Table,
    where: str,
    backends: Mapping[str, Any],
    refused: Mapping[str, str],
    source: SparseWeight | RawWeight,
    bias: NDArray | None,
    device: Device,
    options: PlanOptions,
    x_scale: np.float32 | None,
) -> Selected:
    """The weight in the forms that a table chooses among those that can run.

    Where these cannot be held together, or one cannot be packed, the best alone that can.
    """
    from ..backends.gpu_forms import BROKEN, pack_forms

    wanted = table.dispatch(keep_dense=options.keep_dense, able=backends)
    alone = table.alone(keep_dense=options.keep_dense, able=backends)
    failed: Exception | None = None
    for dispatch in dict.fromkeys((wanted, *alone)):
        try:
            forms = pack_forms(
                [backends[name] for name in dispatch.backends],
                source,
                bias,
                device,
                options,
                x_scale=x_scale,
            )
        except BROKEN as error:
            _LOG.warning(
                "%s cannot be packed as measured times say: %s",
                " and ".join(dispatch.backends),
                error,
            )
            failed = failed or error
        else:
            made = _selected(forms, table, dispatch, options, where, refused)
            if failed is None:
                return made
            hint = f"tuning: {' and '.join(wanted.backends)} would run, but {first_line(failed)}"
            return replace(made, hints=(*made.hints, hint))
    assert failed is not None  # there is one dispatch at least
    raise failed


def _selected(
    forms: GpuForms,
    table: Table,
    dispatch: Dispatch,
    options: PlanOptions,
    where: str,
    refused: Mapping[str, str],
) -> Selected:
    others = {**table.refused, **refused}
    hints = [f"tuning: {where}"]
    missing, most = set(BUCKETS) - set(table.tokens), table.tokens[-1]
    if missing:
        between = "" if min(missing) > most else "times between are guessed from those beside, "
        above = "above that runs what was fastest there, " if most < BUCKETS[-1] else ""
        hints.append(
            f"tuning: {len(table.tokens)} of {len(BUCKETS)} numbers of tokens are measured, up to "
            f"{most:,}; {between}{above}and tuning='measure' goes on"
        )
    if any(why.startswith(FAILED) for why in table.refused.values()):
        hints.append("tuning: `slidesparse tune --again` tries again what failed")
    for name in table.backends:
        if name in dispatch.backends or name in others:
            continue
        ratio = max(row[dispatch.at(tokens)] / row[name] for tokens, row in table.times.items())
        if name == DENSE and not options.keep_dense:
            others[name] = (
                f"keep_dense is False; it would be up to {ratio:.2f} x as fast as what runs"
            )
        else:
            others[name] = f"measured, and at most {ratio:.3f} x as fast as what runs"
    if not options.keep_dense and DENSE in dispatch.backends:
        hints.append(_ONLY_DENSE)
    return Selected(
        forms,
        dispatch.backends,
        "by measured times" + (f" of {table.taken}" if table.taken else ""),
        others,
        dispatch,
        table,
        tuple(hints),
    )


def _choices(dispatch: Dispatch, table: Table) -> list[str]:
    """A row for each number of tokens that was measured, and where the choice changes."""
    names = table.backends
    width = max(10, *(len(name) + 2 for name in names))
    cache = (
        f"level-2 cache emptied up to {table.cold_tokens} tokens from {COLD_BYTES >> 20} MiB of "
        "weight on"
    )
    rows = [f"  measured microseconds of a run, bfloat16 in and out, {cache}:"]
    rows.append(
        f"    {'tokens':>8}  {'runs':<{width}}" + "".join(f"{name:>{width}}" for name in names)
    )
    for tokens, times in table.times.items():
        cells = "".join(f"{times[name]:>{width}.1f}" for name in names)
        rows.append(f"    {tokens:>8}  {dispatch.at(tokens):<{width}}{cells}")
    starts = [
        f"{name} from {max(1, start)} tokens on"
        for start, name in zip(dispatch.starts, dispatch.names, strict=True)
    ]
    rows.append(f"  dispatch: {', '.join(starts)}")
    return rows
