"""``slidesparse inspect`` on a converted model: is every layer what its config says?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..convert import Checkpoint, ModelConfig
from ..convert.layout import SCALE_SUFFIX, value_type
from ..convert.manifest import MANIFEST, Manifest
from ..errors import OptionError
from ..packing import TensorFile
from ..pattern import Pattern
from .console import meter, printable, share, show_table, size_text, styled
from .files import Entry, kind_of
from .inspect import Finding, look

if TYPE_CHECKING:
    from rich.console import Console

    from ..convert.checkpoint import Tensor

__all__ = ["ModelReport", "inspect_model"]


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelReport:
    """What :func:`inspect_model` found.

    Attributes
    ----------
    folder, config:
        The model and what it says of itself.
    nbytes, dense_bytes:
        Bytes of all tensors, and of those that are no part of a converted layer.
    patterns:
        Those that were checked, the config's own first.
    findings:
        Each converted layer, by module name.
    problems:
        Everything that is not as the config or the manifest says; empty for a sound model.
    """

    folder: Path
    config: ModelConfig
    nbytes: int
    dense_bytes: int
    patterns: tuple[Pattern, ...]
    findings: dict[str, Finding]
    problems: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """The report as plain dictionaries, lists, strings and numbers."""
        return {
            "folder": str(self.folder),
            "pattern": self.config.pattern.name,
            "dtype": self.config.dtype.name,
            "method": self.config.method,
            "bytes": self.nbytes,
            "dense_bytes": self.dense_bytes,
            "layers": [
                {"module": module, **finding.to_json()} for module, finding in self.findings.items()
            ],
            "ignore": list(self.config.ignore),
            "problems": list(self.problems),
        }

    def render(self, screen: Console) -> None:
        """Print the report for people: layers that differ in numbers only share a row."""
        config = self.config
        screen.print(
            f"{printable(str(self.folder))}: a converted model, {len(config.layers)} layers of "
            f"pattern {config.pattern.name}, {config.dtype.name}, by {config.method}; "
            f"{size_text(self.nbytes)} of tensors, {size_text(self.dense_bytes)} of them dense",
            soft_wrap=True,
        )
        kinds: dict[str, list[Finding]] = {}
        for module, finding in self.findings.items():
            kinds.setdefault(kind_of(module), []).append(finding)
        rows = []
        for name, kind in kinds.items():
            sound = [finding for finding in kind if not finding.problem]
            fit = [
                sum(finding.reports[pattern.name].violations == 0 for finding in sound)
                for pattern in self.patterns
            ]
            rows.append(
                [
                    printable(name),
                    str(len(kind)),
                    kind[0].entry.shape_text,
                    kind[0].entry.dtype,
                    share(
                        sum(finding.zeros for finding in sound),
                        sum(finding.entry.size for finding in sound),
                    ),
                    *(f"{count} fit" for count in fit),
                    size_text(sum(finding.entry.nbytes for finding in kind)),
                ]
            )
        names = [pattern.name for pattern in self.patterns]
        if rows:
            titles = ("layer", "layers", "shape", "type", "zeros", *names, "in files")
            show_table(screen, titles, rows)
        if config.ignore:
            words = ", ".join(map(printable, config.ignore[:4]))
            more = ", ..." if len(config.ignore) > 4 else ""
            screen.print(f"{len(config.ignore)} matrices are dense: {words}{more}", soft_wrap=True)
        for problem in self.problems:
            screen.print(styled(printable(problem), "red"), soft_wrap=True)
        if not self.problems:
            screen.print("every layer is what the config says")


def inspect_model(
    folder: Path, *, patterns: Sequence[str] = (), threads: int | None = None
) -> ModelReport:
    """Check every layer of a converted model.

    Parameters
    ----------
    folder:
        What ``slidesparse convert`` wrote.
    patterns:
        Further patterns to check beside the model's own.
    threads:
        CPU threads; ``None`` takes every core.

    Raises
    ------
    OptionError
        If the folder is no converted model.
    FormatError, PatternError, OSError
        If its config or files are damaged, for patterns that do not exist, and if it cannot be
        read.
    """
    manifest = Manifest.read(folder)
    if manifest is not None and not (folder / "config.json").is_file():
        raise OptionError(
            f"{folder} is an unfinished conversion: {len(manifest.shards)} files of weights are "
            f"done; run 'slidesparse convert' again to go on with it"
        )
    checkpoint = Checkpoint.open(folder)
    config = ModelConfig.read(folder)
    if config is None:
        raise OptionError(
            f"{folder} is no converted model: its config has no quantization_config of "
            f"slidesparse; inspect one of its files, or run 'slidesparse convert'"
        )
    wanted = tuple(dict.fromkeys((config.pattern, *map(Pattern.parse, patterns))))
    tensors = checkpoint.tensors
    problems = _size_problems(folder, manifest)
    findings: dict[str, Finding] = {}
    used = 0
    todo = [
        tensors[f"{module}.weight"] for module in config.layers if f"{module}.weight" in tensors
    ]
    with meter(len(todo), sum(tensor.nbytes for tensor in todo)) as progress:
        for module in config.layers:
            weight = tensors.get(f"{module}.weight")
            scale = tensors.get(f"{module}.{SCALE_SUFFIX}")
            used += sum(part.nbytes for part in (weight, scale) if part is not None)
            progress.begin(module)
            problem = _header_problem(module, weight, scale, config)
            if problem or weight is None:
                problems.append(problem)
                continue
            entry = Entry(weight.name, weight.shape, weight.dtype, weight.nbytes)
            with TensorFile(weight.path) as file:
                finding = look(entry, file.read(weight.name), wanted, threads)
            findings[module] = finding
            problems += _problems(module, finding, config)
            if scale is not None:
                problems += _scale_problems(scale)
            progress.advance(weight.nbytes)
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    return ModelReport(
        folder=folder,
        config=config,
        nbytes=nbytes,
        dense_bytes=nbytes - used,
        patterns=wanted,
        findings=findings,
        problems=tuple(problems),
    )


def _size_problems(folder: Path, manifest: Manifest | None) -> list[str]:
    if manifest is None:
        return [f"{MANIFEST} is missing, so that sizes of files are not checked"]
    found = []
    for name, entry in manifest.shards.items():
        path = folder / name
        size = path.stat().st_size if path.is_file() else None
        if size != entry.get("bytes"):
            found.append(f"{name} has {size} bytes; {MANIFEST} says {entry.get('bytes')}")
    return found


def _header_problem(
    module: str, weight: Tensor | None, scale: Tensor | None, config: ModelConfig
) -> str:
    """What is wrong with the names, types and shapes of a layer; empty if nothing is."""
    if weight is None:
        return f"{module}.weight is missing"
    kind = value_type(config.dtype)
    if weight.dtype != kind or len(weight.shape) != 2 or 0 in weight.shape:
        return f"{module}.weight is {weight.dtype} of shape {weight.shape}; expected {kind} (N, K)"
    if not config.dtype.scaled:
        return ""
    expected = (weight.shape[0], 1)
    if scale is None or scale.dtype != "F32" or scale.shape != expected:
        found = "missing" if scale is None else f"{scale.dtype} of shape {scale.shape}"
        return f"{module}.{SCALE_SUFFIX} is {found}; expected F32 of shape {expected}"
    return ""


def _problems(module: str, finding: Finding, config: ModelConfig) -> list[str]:
    if finding.problem:
        return [f"{module}: {finding.problem}"]
    bad = finding.reports[config.pattern.name].violations
    return [f"{module}: {bad:,} groups do not fit {config.pattern.name}"] if bad else []


def _scale_problems(scale: Tensor) -> list[str]:
    with TensorFile(scale.path) as file:
        values = file.read(scale.name)
        bad = ~(np.isfinite(values) & (values > 0))
    return [f"{scale.name}: {int(bad.sum())} scales are not finite and positive"] * bool(bad.any())
