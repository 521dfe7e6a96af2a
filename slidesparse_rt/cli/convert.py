"""``slidesparse convert`` and ``slidesparse calibrate``: whole models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from ..convert import CalibrationReport, ConvertReport, LayerReport

__all__ = ["calibrate", "convert"]

_MODEL = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL_DIR",
        exists=True,
        file_okay=False,
        help="A Hugging Face model: config.json and safetensors.",
    ),
]
_INCLUDE = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Modules to take, by whole components of their names: q_proj, layers.0, "
        "layers.*.mlp; repeatable (default: every linear layer).",
    ),
]
_EXCLUDE = Annotated[
    list[str] | None,
    typer.Option(
        metavar="GLOB",
        help="Modules to leave dense; repeatable; replaces the default (lm_head and other output "
        "heads, routers of experts). Embeddings stay dense always.",
    ),
]
_JSON = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead, errors included.")
]


def convert(
    source: _MODEL,
    target: Annotated[
        Path,
        typer.Argument(
            metavar="OUT_DIR",
            help="The folder to write: new, empty, or an unfinished conversion to go on with.",
        ),
    ],
    pattern: Annotated[
        str, typer.Option(help="What to keep: 6:8 keeps 6 of every 8; 2:4, 4:6, ... 30:32.")
    ],
    dtype: Annotated[str, typer.Option(help="int8, fp8_e4m3, bf16 or fp16.")] = "int8",
    method: Annotated[
        str,
        typer.Option(help="'magnitude', or 'wanda', which also weighs inputs and needs --norms."),
    ] = "magnitude",
    norms: Annotated[
        Path | None,
        typer.Option(
            exists=True, dir_okay=False, help="For wanda: what 'slidesparse calibrate' wrote."
        ),
    ] = None,
    include: _INCLUDE = None,
    exclude: _EXCLUDE = None,
    workers: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="CPU threads; all of this process's cores if not given."
        ),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Remove an earlier conversion from OUT_DIR first.")
    ] = False,
    as_json: _JSON = False,
) -> None:
    """Convert one model and print what that did to its layers."""
    from ..convert import convert_checkpoint
    from ..convert.names import DEFAULT_EXCLUDE
    from .console import byte_meter, console, print_json

    with byte_meter() as progress:
        report = convert_checkpoint(
            source,
            target,
            pattern=pattern,
            dtype=dtype,
            method=method,
            norms=norms,
            include=include or (),
            exclude=exclude or DEFAULT_EXCLUDE,
            workers=workers,
            force=force,
            progress=progress,
        )
    if as_json:
        print_json(report.to_json())
    else:
        _render(report, console())


def calibrate(
    source: _MODEL,
    text: Annotated[
        list[Path],
        typer.Option(
            exists=True, dir_okay=False, help="A text to run the model on, UTF-8; repeatable."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="The file of norms to write (default: <MODEL_DIR>-norms.safetensors).",
        ),
    ] = None,
    sequences: Annotated[
        int, typer.Option(min=1, help="Most sequences to run; the texts may have fewer.")
    ] = 128,
    length: Annotated[int, typer.Option(min=1, help="Tokens in a sequence.")] = 2048,
    device: Annotated[str, typer.Option(help="PyTorch's name of the device to run on.")] = "cpu",
    include: _INCLUDE = None,
    exclude: _EXCLUDE = None,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the file of norms if it exists.")
    ] = False,
    as_json: _JSON = False,
) -> None:
    """Run a model over texts and write the norms of its layers' inputs."""
    from ..convert import calibrate as collect
    from ..convert.names import DEFAULT_EXCLUDE
    from .console import console, meter, print_json

    with meter(0, 0, unit="sequences") as progress:
        report = collect(
            source,
            text,
            output,
            sequences=sequences,
            length=length,
            device=device,
            include=include or (),
            exclude=exclude or DEFAULT_EXCLUDE,
            force=force,
            progress=progress.reached,
        )
    if as_json:
        print_json(report.to_json())
    else:
        _render_norms(report, console())


@dataclass(slots=True)
class _Kind:
    """Layers that differ in numbers only, such as one projection of every block."""

    layers: list[LayerReport]

    def cells(self, name: str) -> tuple[str, ...]:
        from .console import size_text

        shapes = {layer.shape for layer in self.layers}
        errors = [layer.relative_error for layer in self.layers]
        kept = [layer.kept_energy for layer in self.layers]
        shape = "several" if len(shapes) > 1 else " x ".join(map(str, min(shapes)))
        return (
            name,
            str(len(self.layers)),
            shape,
            f"{sum(errors) / len(errors):.4f}",
            f"{max(errors):.4f}",
            f"{sum(kept) / len(kept):.2%}",
            f"{min(kept):.2%}",
            size_text(sum(layer.bytes_before for layer in self.layers)),
            size_text(sum(layer.bytes_after for layer in self.layers)),
        )


def _render(report: ConvertReport, screen: Console) -> None:
    """Print a conversion for people: layers of one kind share a row."""
    from ..convert.layers import by_reason
    from .console import printable, show_table, size_text
    from .files import kind_of

    kinds: dict[str, _Kind] = {}
    for layer in report.layers:
        kinds.setdefault(kind_of(layer.module), _Kind([])).layers.append(layer)
    titles = (
        "converted",
        "layers",
        "shape",
        "error",
        "worst",
        "kept energy",
        "worst",
        "before",
        "after",
    )
    show_table(screen, titles, [kind.cells(printable(name)) for name, kind in kinds.items()])
    totals = report.totals()
    screen.print(
        f"{totals['layers']} layers ({totals['weights']:,} weights) to {report.pattern.name} "
        f"{report.settings.dtype.name} by {report.settings.method}. Error: Frobenius norm of the "
        f"difference over that of the weight. {size_text(totals['bytes_before'])} -> "
        f"{size_text(totals['bytes_after'])} of tensors.",
        soft_wrap=True,
    )
    for layer in report.layers:
        if layer.padded:
            screen.print(
                f"{printable(layer.module)}: K = {layer.shape[1]} is no multiple of "
                f"{report.pattern.group}; {layer.padded} inputs of zeros are added when it is "
                f"loaded",
                soft_wrap=True,
            )
    clamped = sum(layer.clamped for layer in report.layers)
    if clamped:
        screen.print(f"{clamped:,} values of -128 became -127", soft_wrap=True)
    for reason, modules in by_reason(report.skipped).items():
        names = ", ".join(map(printable, modules[:3])) + (", ..." if len(modules) > 3 else "")
        screen.print(f"{len(modules)} left dense ({reason}): {names}", soft_wrap=True)
    if report.left_out:
        names = ", ".join(map(printable, report.left_out[:3]))
        more = ", ..." if len(report.left_out) > 3 else ""
        screen.print(f"{len(report.left_out)} files not copied: {names}{more}", soft_wrap=True)
    resumed = f", {report.resumed} of them from an earlier run" if report.resumed else ""
    rate = f" ({report.weights_done / report.seconds / 1e6:.0f} M weights/s)"
    screen.print(
        f"Wrote {printable(str(report.target))}, {report.shards} files of weights{resumed}, in "
        f"{report.seconds:.1f} s{rate if report.weights_done else ''}.",
        soft_wrap=True,
    )


def _render_norms(report: CalibrationReport, screen: Console) -> None:
    """Print a calibration for people."""
    from .console import printable

    plain: dict[str, Any] = report.to_json()
    screen.print(
        f"Wrote {printable(plain['output'])}: norms of the inputs of {plain['layers']} layers over "
        f"{plain['tokens']:,} tokens in {plain['sequences']} sequences, in {report.seconds:.1f} s.",
        soft_wrap=True,
    )
    if report.unseen:
        names = ", ".join(map(printable, report.unseen[:3]))
        more = ", ..." if len(report.unseen) > 3 else ""
        screen.print(
            f"{len(report.unseen)} layers saw no token, so their norms are zeros and Wanda keeps "
            f"the first weights of each group: {names}{more}. Calibrate on more text.",
            soft_wrap=True,
        )
