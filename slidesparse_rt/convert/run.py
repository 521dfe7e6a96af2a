"""Converting a checkpoint: everything is validated, then written shard by shard."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._version import __version__
from ..dtypes import Operand, operand
from ..errors import OptionError
from ..options import worker_count
from ..pattern import Pattern
from .checkpoint import CONFIG, INDEX, Checkpoint
from .config import CONFIG_VERSION, converted_config
from .files import (
    copy_whole,
    is_full,
    locked,
    part_of,
    refuse_full_disk,
    sha256_of,
    write_whole,
)
from .layers import Choice, Settings, choose
from .layout import Shard, plan_shards
from .manifest import MANIFEST, Manifest
from .names import DEFAULT_EXCLUDE, checked_globs
from .norms import check_method, check_norms
from .report import ConvertReport, layer_reports, losses_of, tensor_bytes
from .write import write_shard

__all__ = ["REPORT", "Progress", "convert_checkpoint"]

REPORT = "report.json"
#: Called as bytes are written: (name of the tensor or file, bytes done, bytes in all).
Progress = Callable[[str, int, int], None]
#: Pieces begun ahead of the one that is written, for each worker.
_AHEAD = 3


@dataclass(frozen=True, slots=True)
class _Work:
    """A conversion that is validated: what it reads and what it will write."""

    checkpoint: Checkpoint
    target: Path
    settings: Settings
    norms: Path | None
    choice: Choice
    shards: tuple[Shard, ...]
    copied: tuple[Path, ...]
    left_out: tuple[Path, ...]
    #: What another run must have in common with this one.
    identity: dict[str, Any]

    @property
    def outputs(self) -> list[str]:
        index = [] if self.checkpoint.index is None else [INDEX]
        copied = [str(path) for path in self.copied]
        return [CONFIG, *(shard.name for shard in self.shards), *index, *copied, REPORT]


def convert_checkpoint(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    pattern: str | Pattern,
    dtype: str | Operand = "int8",
    method: str = "magnitude",
    norms: str | os.PathLike[str] | None = None,
    include: Iterable[str] = (),
    exclude: Iterable[str] = DEFAULT_EXCLUDE,
    workers: int | None = None,
    force: bool = False,
    progress: Progress | None = None,
) -> ConvertReport:
    """Prune and quantize the linear layers of a Hugging Face checkpoint.

    Nothing is written before everything that can be known is checked.  A run that ends at any
    moment, by a kill or a full disk, is continued by the next one with the same arguments: shards
    that are finished are checked and kept.  ``config.json`` comes last, so that a folder that is
    not complete cannot be loaded by mistake.

    Parameters
    ----------
    source:
        Folder with ``config.json`` and ``model.safetensors``, or shards and their index.  Weights
        are (N, K), float32, float16 or bfloat16, or W8A8 of compressed-tensors, whose values are
        pruned and whose scales are kept.
    target:
        Folder to write; new, empty, or with an unfinished conversion of the same settings.
    pattern:
        "2:4", "4:6", "6:8", ...; "dense" prunes nothing.
    dtype:
        "int8", "fp8_e4m3", "bf16" or "fp16".
    method:
        "magnitude", or "wanda" with ``norms``.
    norms:
        A file that :func:`~slidesparse_rt.convert.calibrate` wrote.
    include, exclude:
        Globs over module names (:mod:`slidesparse_rt.convert.names`).  No include: every linear
        layer.  Embeddings are never converted.
    workers:
        CPU threads; ``None`` takes every core.
    force:
        Remove an earlier conversion from ``target`` first; nothing else is ever removed.
    progress:
        Called with (name, bytes done, bytes in all) as files grow.

    Returns
    -------
    ConvertReport
        Error, kept energy and size of each layer; ``report.json`` in ``target`` has the same.

    Raises
    ------
    OptionError
        For options that contradict each other or the folders, and where no layer is chosen.
    FormatError
        For checkpoints, norms and manifests that are damaged or contradict themselves.
    DTypeError, PatternError
        For types and patterns that do not exist, and weights of a type that cannot be converted.
    NonFiniteError
        For a NaN or an infinity in a weight, and numbers too large for the dtype.
    OSError
        If a file cannot be read or written; ENOSPC, also up front, where the disk is too small.
    """
    began = time.perf_counter()
    count = worker_count(workers)
    work = _validated(
        Path(source),
        Path(target),
        pattern=Pattern.parse(pattern),
        dtype=operand(dtype),
        method=method,
        norms=None if norms is None else Path(norms),
        include=checked_globs(include, "include"),
        exclude=checked_globs(exclude, "exclude"),
    )
    if not work.target.exists():
        refuse_full_disk(work.target, _needed(work, ()))
        work.target.mkdir(parents=True)
    with locked(work.target):
        manifest = _earlier(work, count, force)
        resumed = len(manifest.shards)
        done = {layer for entry in manifest.shards.values() for layer in entry["layers"]}
        refuse_full_disk(work.target, _needed(work, manifest.shards))
        manifest.save()
        try:
            _write_shards(work, manifest, count, progress)
            report = _finish(work, manifest, resumed, done, began)
        except OSError as error:
            if not is_full(error):
                raise
            raise OSError(
                error.errno,
                f"{os.strerror(error.errno or 0)}; {len(manifest.shards)} of {len(work.shards)} "
                f"files of weights are finished and kept; free some space and run the same command "
                f"again",
                error.filename or str(work.target),
            ) from error
    return report


def _validated(
    source: Path,
    target: Path,
    *,
    pattern: Pattern,
    dtype: Operand,
    method: str,
    norms: Path | None,
    include: tuple[str, ...],
    exclude: tuple[str, ...],
) -> _Work:
    check_method(method, norms)
    checkpoint = Checkpoint.open(source)
    _refuse_overlap(source, target)
    settings = Settings(
        pattern=pattern,
        dtype=dtype,
        method=method,
        include=include,
        exclude=exclude,
        norms_sha256=None if norms is None else sha256_of(norms),
    )
    choice = choose(checkpoint, settings)
    fingerprint = checkpoint.fingerprint()
    if norms is not None:
        check_norms(norms, checkpoint, choice, fingerprint)
    copied, left_out = checkpoint.other_files()
    ours = {REPORT, MANIFEST}
    return _Work(
        checkpoint=checkpoint,
        target=target,
        settings=settings,
        norms=norms,
        choice=choice,
        shards=plan_shards(checkpoint, choice, settings, CONFIG_VERSION),
        copied=tuple(path for path in copied if str(path) not in ours),
        left_out=tuple(sorted({*left_out, *(path for path in copied if str(path) in ours)})),
        identity={
            **settings.to_json(),
            "fingerprint": fingerprint,
            "writer": f"slidesparse_rt {__version__}",
        },
    )


def _refuse_overlap(source: Path, target: Path) -> None:
    """Raise OptionError for a target that is no new folder apart from the source."""
    here, there = source.resolve(), target.resolve()
    if here == there:
        raise OptionError(
            f"OUT_DIR ({target}) and MODEL_DIR ({source}) are the same folder; pruning cannot be "
            f"undone, so give OUT_DIR another name"
        )
    for inner, outer, words in ((there, here, "OUT_DIR"), (here, there, "MODEL_DIR")):
        if outer in inner.parents:
            raise OptionError(
                f"{words} ({inner}) lies inside the other folder ({outer}); give OUT_DIR a place "
                f"of its own"
            )
    if target.exists() and not target.is_dir():
        raise OptionError(f"{target} is a file; OUT_DIR is a folder, so give it another name")


def _earlier(work: _Work, workers: int, force: bool) -> Manifest:
    """The state that the target is in, after what cannot be trusted is gone."""
    found = Manifest.read(work.target)
    if found is None:
        strangers = sorted(path.name for path in work.target.iterdir())
        leftover = {part_of(work.target / MANIFEST).name}
        if set(strangers) - leftover:
            raise OptionError(
                f"{work.target} holds files and no conversion to go on with "
                f"({', '.join(strangers[:4])}{', ...' if len(strangers) > 4 else ''}); give "
                f"OUT_DIR a new or empty folder"
            )
    elif force:
        found.remove_outputs()
        found = None
    if found is None:
        return Manifest(work.target, work.identity, work.outputs)
    found.refuse_other(work.identity)
    found.verify({shard.name: shard.nbytes for shard in work.shards}, workers)
    found.outputs = work.outputs
    for name in (*work.outputs, MANIFEST):
        part_of(work.target / name).unlink(missing_ok=True)
    return found


def _needed(work: _Work, finished: Iterable[str]) -> int:
    """Bytes of the files that are not written yet."""
    have = set(finished)
    shards = sum(shard.nbytes for shard in work.shards if shard.name not in have)
    files = sum((work.checkpoint.folder / path).stat().st_size for path in work.copied)
    return shards + files


def _write_shards(work: _Work, manifest: Manifest, workers: int, progress: Progress | None) -> None:
    todo = [shard for shard in work.shards if shard.name not in manifest.shards]
    total = sum(shard.tensor_bytes for shard in todo)
    done = 0

    def advance(name: str, count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(name, done, total)

    if todo:  # what is not complete has no config
        (work.target / CONFIG).unlink(missing_ok=True)
    with ThreadPoolExecutor(workers) as pool:
        for shard in todo:
            # A shard that was found damaged must not keep its name while it is written again.
            (work.target / shard.name).unlink(missing_ok=True)
            written = write_shard(
                shard, work.target, work.settings, work.norms, pool, _AHEAD * workers, advance
            )
            layers = {module: losses_of(tally) for module, tally in written.tallies.items()}
            manifest.finish(shard.name, nbytes=written.nbytes, sha256=written.sha256, layers=layers)


def _finish(
    work: _Work, manifest: Manifest, resumed: int, done: set[str], began: float
) -> ConvertReport:
    """Write everything beside the weights, config.json last."""
    target, checkpoint = work.target, work.checkpoint
    for path in work.copied:
        copy_whole(checkpoint.folder / path, target / path)
    if checkpoint.index is not None:
        _write_json(target / INDEX, _index(work, checkpoint.index))
    losses = {
        module: found
        for entry in manifest.shards.values()
        for module, found in entry["layers"].items()
    }
    layers = layer_reports(work.choice, work.settings, losses)
    report = ConvertReport(
        source=checkpoint.folder,
        target=target,
        settings=work.settings,
        layers=layers,
        skipped=work.choice.skipped,
        left_out=tuple(map(str, work.left_out)),
        bytes_before=sum(tensor.nbytes for tensor in checkpoint.tensors.values()),
        bytes_after=tensor_bytes(work.shards),
        shards=len(work.shards),
        resumed=resumed,
        seconds=time.perf_counter() - began,
        weights_done=sum(math.prod(one.shape) for one in layers if one.module not in done),
    )
    _write_json(target / REPORT, report.lasting())
    _write_json(target / CONFIG, converted_config(checkpoint, work.choice, work.settings))
    return report


def _index(work: _Work, index: dict[str, Any]) -> dict[str, Any]:
    weight_map = {slot.name: shard.name for shard in work.shards for slot in shard.slots}
    metadata = index.get("metadata")
    return {
        "metadata": {
            **(metadata if isinstance(metadata, dict) else {}),
            "total_size": tensor_bytes(work.shards),
        },
        "weight_map": {name: weight_map[name] for name in sorted(weight_map)},
    }


def _write_json(path: Path, content: dict[str, Any]) -> None:
    write_whole(path, (json.dumps(content, indent=2) + "\n").encode())
