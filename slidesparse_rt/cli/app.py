"""The commands and their options; what they do lives in the modules they import when called."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import typer

from .bench import bench
from .bench_session import COMMIT
from .convert import calibrate, convert

if TYPE_CHECKING:
    from rich.console import Console

__all__ = ["USAGE_ERROR", "app", "usage_message"]

#: Root of the errors that typer raises for wrong usage.  It lives in click or in typer's own copy
#: of it, depending on typer's version; typer.BadParameter descends from it in both.
USAGE_ERROR: type[Exception] = typer.BadParameter.__mro__[2]

app = typer.Typer(
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

app.add_typer(bench, name="bench")

_PATTERNS = "2:4,4:6,6:8,8:10"
_JSON = Annotated[
    bool, typer.Option("--json", help="Print one JSON document instead, errors included.")
]
_THREADS = Annotated[
    int | None,
    typer.Option(min=1, max=1024, help="CPU threads; all of this process's cores if not given."),
]


def usage_message(error: Exception) -> str:
    """What typer says is wrong, and which help to read."""
    words: Any = error
    message = str(words.format_message()).rstrip(".")
    context = getattr(error, "ctx", None)
    command = "slidesparse" if context is None else context.command_path
    return f"{message}; see: {command} --help"


def _show_version(value: bool) -> None:
    if value:
        from .._version import __version__

        typer.echo(f"slidesparse {__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def root(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option("--version", is_eager=True, callback=_show_version, help="Print the version."),
    ] = False,
) -> None:
    """Run (2N-2):2N sparse weights on 2:4 sparse tensor cores.

    Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted.
    """
    del version
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command(
    help="Show what this machine can run, what is missing, and the command that mends it.\n\n"
    "Looks at Python, the GPUs, the CUDA libraries and the optional packages, and runs a small "
    "check of the CPU path. Works without a GPU. The exit code is 1 only if the CPU path is broken."
)
def doctor(as_json: _JSON = False) -> None:
    """Examine this machine and print the diagnosis."""
    from .doctor import diagnose

    diagnosis = diagnose()
    _show(diagnosis, as_json)
    if diagnosis.cpu_problem is not None:
        raise typer.Exit(1)


@app.command()
def demo(
    patterns: Annotated[
        str, typer.Option(help="Patterns to try, separated by commas.")
    ] = _PATTERNS,
    dtypes: Annotated[
        str, typer.Option(help="Operand types to try, separated by commas.")
    ] = "int8,fp8_e4m3",
    threads: _THREADS = None,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:<index>; a GPU is used if there is one.")
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            dir_okay=False,
            help="Also write the report to this file, as JSON, with versions, commit and command; "
            "replaces it.",
        ),
    ] = None,
    commit: COMMIT = None,
    as_json: _JSON = False,
) -> None:
    """Prune, pack and run a pretrained sentence encoder, and measure what each pattern costs."""
    from ..errors import OptionError

    if output is not None and not output.absolute().parent.is_dir():
        raise OptionError(f"{output.absolute().parent} is no folder; make it first, for --output")

    from ..demo import run_demo
    from .console import meter, to_json_text, write_text

    with meter(0, 0, unit="runs") as progress:
        report = run_demo(
            patterns=_listed(patterns, "--patterns"),
            dtypes=_listed(dtypes, "--dtypes"),
            threads=threads,
            progress=progress.reached,
            device=device,
        )
    if output is not None:
        import sys

        from ..bench.record import command_line, environment

        surroundings = environment(None, commit=commit) | {"command": command_line(sys.argv)}
        write_text(output, to_json_text(surroundings | report.to_json()))
    _show(report, as_json, markup=True)


@app.command(
    help="Prune the linear layers of a safetensors file.\n\n"
    "Takes every two-dimensional float32, float16 or bfloat16 tensor whose name fits --include and "
    "not --exclude: by default every *.weight except embeddings (*embed*) and norms (*norm*). All "
    "other tensors and the metadata are copied unchanged. OUT appears whole or not at all."
)
def prune(
    source: Annotated[
        Path,
        typer.Argument(metavar="IN", exists=True, dir_okay=False, help="A safetensors file."),
    ],
    target: Annotated[
        Path, typer.Argument(metavar="OUT", dir_okay=False, help="The pruned file to write.")
    ],
    pattern: Annotated[
        str, typer.Option(help="What to keep: 6:8 keeps 6 of every 8; 2:4, 4:6, ... 30:32.")
    ],
    method: Annotated[
        str,
        typer.Option(help="'magnitude', or 'wanda', which also weighs inputs and needs --norms."),
    ] = "magnitude",
    norms: Annotated[
        Path | None,
        typer.Option(
            exists=True,
            dir_okay=False,
            help="For wanda: a safetensors file with the input norms of each pruned tensor, under "
            "the tensor's name, shape (K,), F32.",
        ),
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Tensors to prune, by name; repeatable; upper and lower case are the same "
            "(default: *.weight).",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Tensors to leave alone; repeatable; replaces the default (*embed* and *norm*).",
        ),
    ] = None,
    threads: _THREADS = None,
    force: Annotated[bool, typer.Option("--force", help="Replace OUT if it exists.")] = False,
    as_json: _JSON = False,
) -> None:
    """Prune one file and print what that did to each tensor."""
    from .prune import DEFAULT_EXCLUDE, DEFAULT_INCLUDE, prune_file

    report = prune_file(
        source,
        target,
        pattern=pattern,
        method=method,
        norms=norms,
        include=include or DEFAULT_INCLUDE,
        exclude=exclude or DEFAULT_EXCLUDE,
        threads=threads,
        force=force,
    )
    _show(report, as_json)


app.command(
    help="Prune and quantize the linear layers of a Hugging Face model.\n\n"
    "Everything is checked before anything is written. A run that was killed, or whose disk was "
    "full, is continued by the same command: finished files are checked and kept. OUT_DIR gets "
    "safetensors, config.json with a quantization_config, everything else that is no weight, and "
    "report.json."
)(convert)
app.command(
    help="Run a model over texts and collect the norms that 'convert --method wanda' needs.\n\n"
    "Needs PyTorch and transformers: pip install 'slidesparse-rt[convert]'."
)(calibrate)


@app.command(
    help="Show which tensors of a safetensors file fit which patterns, and their sizes when "
    "packed.\n\n"
    "For the folder of a converted model: whether every layer is what its config says."
)
def inspect(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", exists=True, help="A safetensors file, or a converted model's folder."
        ),
    ],
    pattern: Annotated[
        list[str] | None,
        typer.Option(help="A pattern to check; repeatable (default: 2:4, 4:6, 6:8, 8:10)."),
    ] = None,
    threads: _THREADS = None,
    as_json: _JSON = False,
) -> None:
    """Inspect a file or a folder."""
    if file.is_dir():
        from .inspect_model import inspect_model

        report = inspect_model(file, patterns=pattern or (), threads=threads)
        _show(report, as_json)
        if report.problems:
            raise typer.Exit(1)
        return
    from .inspect import inspect_file

    _show(inspect_file(file, patterns=pattern or _PATTERNS.split(","), threads=threads), as_json)


@app.command(
    help="Measure which backend is fastest for how many tokens, and keep the times.\n\n"
    "WHAT is a model (qwen2.5-7b, qwen2.5-14b, llama-3.2-1b, llama-3.2-3b, bitnet-2b), all of "
    "whose linear layers are measured, squares (N = K = 64, 128, ... 16384), or N K: outputs and "
    "inputs of one layer. Plans with "
    "backend='auto' on such a GPU take the fastest from then on (docs/tuning.md). What is kept "
    "already is not measured again, and what a time budget cut short goes on."
)
def tune(
    what: Annotated[list[str], typer.Argument(metavar="WHAT", help="A model, or N K.")],
    patterns: Annotated[
        str, typer.Option("--pattern", help="Patterns, separated by commas.")
    ] = "6:8",
    dtypes: Annotated[
        str, typer.Option("--dtype", help="Operand formats, separated by commas.")
    ] = "int8",
    layers: Annotated[
        str | None, typer.Option(help="Only these layers of the model: qkv, o, gate_up, down.")
    ] = None,
    bias: Annotated[bool, typer.Option("--bias", help="For plans with a bias.")] = False,
    keep_dense: Annotated[
        bool,
        typer.Option(
            "--keep-dense/--no-keep-dense",
            help="Show the choice of plans that may, or may not, also hold the dense weight.",
        ),
    ] = True,
    most_tokens: Annotated[
        int, typer.Option(help="The largest number of tokens: 1, 16, 32, ... 32768.")
    ] = 32768,
    cold_tokens: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Empty the level-2 cache before each run up to so many tokens; 0: never. If not "
            "given: 512, or as for what is kept.",
        ),
    ] = None,
    rounds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each backend; as many as take 40 ms if not given."),
    ] = None,
    time_budget: Annotated[
        float | None,
        typer.Option(min=0, metavar="SECONDS", help="Begin nothing further after this."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Measure what is kept already, too.")
    ] = False,
    device: Annotated[int, typer.Option(min=0, help="CUDA's number of the GPU.")] = 0,
    as_json: _JSON = False,
) -> None:
    """Measure the backends for the layers of a model."""
    from ..options import PlanOptions
    from ..tuning.measure import MeasureOptions
    from .console import meter
    from .tune import run_tune, wanted_layers

    settings = MeasureOptions(
        most_tokens=most_tokens, cold_tokens=cold_tokens, rounds=rounds, seconds=time_budget
    )
    chosen = wanted_layers(what, None if layers is None else _listed(layers, "--layers"))
    with meter(0, 0, unit="buckets") as progress:
        report = run_tune(
            chosen,
            _listed(patterns, "--pattern"),
            _listed(dtypes, "--dtype"),
            device=device,
            settings=settings,
            options=PlanOptions(keep_dense=keep_dense),
            bias=bias,
            again=again,
            progress=progress.reached,
        )
    _show(report, as_json)
    if report.failed:
        raise typer.Exit(1)


class _Report(Protocol):
    """What every command returns."""

    def to_json(self) -> dict[str, Any]:
        """Plain dictionaries, lists, strings and numbers."""

    def render(self, screen: Console, /) -> None:
        """Print for people."""


def _show(report: _Report, as_json: bool, *, markup: bool = False) -> None:
    """Print a command's result on stdout."""
    from .console import console, print_json

    if as_json:
        print_json(report.to_json())
    else:
        report.render(console(markup=markup))


def _listed(text: str, option: str) -> list[str]:
    """The parts of a comma-separated list."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if not parts:
        raise typer.BadParameter("the list is empty", param_hint=option)
    return parts
