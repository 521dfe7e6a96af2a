"""``slidesparse bench``: measure on a GPU, check the outputs, and write a result file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..bench.clocks import Clocks
    from ..bench.gemm import GemmSettings
    from ..bench.record import Budget, Record
    from ..bench.timing import Gpu

__all__ = ["bench"]

bench = typer.Typer(add_completion=False)

_OUTPUT = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="The result file; replaced if it exists. Default: benchmarks/results/"
        "<what>-<gpu>-<date>.json in a checkout, else the current folder.",
    ),
]
_JSON = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON instead, errors included.")
]
_QUICK = Annotated[bool, typer.Option("--quick", help="A few small cases, to see that it works.")]
_BUDGET = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="SECONDS", help="Begin no further case after this; the file says which."
    ),
]
_DEVICE = Annotated[int, typer.Option(min=0, help="CUDA's number of the GPU.")]
_COMMIT = Annotated[
    str | None,
    typer.Option(help="The commit that runs, for a copy of the sources without git's record."),
]
_TOKENS_HELP = "Numbers of tokens (M), separated by commas"


@bench.callback(
    invoke_without_command=True,
    help="Measure products, kernels and host cost on a GPU, beside the strongest alternatives.\n\n"
    "Outputs are checked before anything is reported; a wrong one is left out and the exit code is "
    "1. The result file is written again after every case.",
)
def root(context: typer.Context) -> None:
    """Show the help where no benchmark is named."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command()
def gemm(
    models: Annotated[
        str | None,
        typer.Option(
            help="Models whose layers are run, separated by commas: qwen2.5-7b (the default), "
            "qwen2.5-14b, llama-3.2-1b, llama-3.2-3b."
        ),
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Only these layers: qkv, o, gate_up, down.")
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help=f"{_TOKENS_HELP} (default: 16,64,256,1024,4096,16384).")
    ] = None,
    dtypes: Annotated[
        str | None, typer.Option(help="Operand formats (default: int8,fp8_e4m3,bf16).")
    ] = None,
    patterns: Annotated[
        str | None, typer.Option(help="Patterns, in this order (default: 6:8,4:6,2:4,8:10).")
    ] = None,
    backends: Annotated[
        list[str] | None,
        typer.Option(
            "--backend",
            help="A sparse backend to compare with dense: hopper or cusparselt; may be repeated. "
            "Default: every one that supports the GPU.",
        ),
    ] = None,
    stages: Annotated[
        str | None, typer.Option(help="gemm (products alone), op (operators); default: both.")
    ] = None,
    no_layers: Annotated[
        bool, typer.Option("--no-layers", help="Do not time the layers one by one as well.")
    ] = False,
    sustained: Annotated[
        bool,
        typer.Option("--sustained", help="Also measure each side alone, for seconds: see --help."),
    ] = False,
    seconds: Annotated[
        float, typer.Option(min=0.1, help="Length of one sustained round of one side.")
    ] = 1.0,
    sustained_rounds: Annotated[
        int, typer.Option(min=1, help="Sustained rounds of each side.")
    ] = 2,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of a burst.")] = 20,
    output: _OUTPUT = None,
    quick: _QUICK = False,
    time_budget: _BUDGET = None,
    device: _DEVICE = 0,
    commit: _COMMIT = None,
    as_json: _JSON = False,
) -> None:
    """Compare sparse products with dense ones (cuBLASLt), alone and as operators.

    Times are summed over a model's layers. In a burst both sides take turns, warm; sustained, each
    side runs alone for a while and the last half counts: that is the figure to quote.
    """
    from ..bench.gemm import GemmSettings, run_gemm

    small: dict[str, Any] = {}
    if quick:
        small = {
            "layers": ("qkv", "o"),
            "tokens": (16, 256, 4096),
            "dtypes": ("int8", "fp8_e4m3"),
            "patterns": ("6:8",),
        }
    settings = GemmSettings(
        **small
        | _given(
            models=_words(models, "--models"),
            layers=_words(layers, "--layers"),
            tokens=_numbers(tokens, "--tokens"),
            dtypes=_words(dtypes, "--dtypes"),
            patterns=_words(patterns, "--patterns"),
            backends=tuple(backends) if backends else None,
            stages=_words(stages, "--stages"),
        ),
        layer_times=not no_layers,
        rounds=rounds,
        sustained=sustained,
        seconds=seconds,
        sustained_rounds=sustained_rounds,
    )
    settings, refused = _usable(settings, output, device, asked=bool(backends))
    plain = settings.to_json() | {"quick": quick, "time_budget": time_budget}
    with (
        _session("gemm", (), plain, output, device, commit, time_budget) as now,
        now.progress(settings.cases) as (say, done),
    ):
        for name, why in refused.items():
            now.record.leave_out(name, "unavailable", why)
        say(_expected(settings, time_budget))
        run_gemm(
            now.gpu,
            settings,
            now.record,
            budget=now.budget,
            clocks=now.clocks,
            say=say,
            done=done,
        )
    _finish(now.record, as_json)


@bench.command()
def quantize(
    columns: Annotated[
        str | None,
        typer.Option(help="Row lengths (K) of quantize+lift (default: 3584,18944,4096,14336)."),
    ] = None,
    outputs: Annotated[
        str | None, typer.Option(help="Row lengths (N) of dequantize (default: 3584,4608,37888).")
    ] = None,
    x_types: Annotated[
        str | None, typer.Option(help="Types of x (default: bfloat16,float16,float32).")
    ] = None,
    targets: Annotated[
        str | None, typer.Option(help="Operand formats (default: int8,fp8_e4m3,bf16).")
    ] = None,
    patterns: Annotated[
        str | None, typer.Option(help="Patterns, in this order (default: 6:8,4:6,2:4,8:10).")
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help=f"{_TOKENS_HELP}, or 'full': as many as make 64 M elements."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 20,
    output: _OUTPUT = None,
    quick: _QUICK = False,
    time_budget: _BUDGET = None,
    device: _DEVICE = 0,
    commit: _COMMIT = None,
    as_json: _JSON = False,
) -> None:
    """Compare quantize+lift and dequantize with a device-to-device copy of as many bytes."""
    from ..bench.quantize import LIBRARIES, QuantizeSettings, run_quantize

    small: dict[str, Any] = {}
    if quick:
        small = {
            "columns": (3584, 18944),
            "outputs": (3584,),
            "x_types": ("bfloat16",),
            "targets": ("int8", "fp8_e4m3"),
            "patterns": ("6:8",),
            "tokens": ("full", 16384, 256),
        }
    settings = QuantizeSettings(
        **small
        | _given(
            columns=_numbers(columns, "--columns"),
            outputs=_numbers(outputs, "--outputs"),
            x_types=_words(x_types, "--x-types"),
            targets=_words(targets, "--targets"),
            patterns=_words(patterns, "--patterns"),
            tokens=_numbers(tokens, "--tokens", word="full"),
        ),
        rounds=rounds,
    )
    plain = settings.to_json() | {"quick": quick, "time_budget": time_budget}
    with (
        _session("quantize", LIBRARIES, plain, output, device, commit, time_budget) as now,
        now.progress(len(settings.cases())) as (say, done),
    ):
        run_quantize(
            now.gpu,
            settings,
            now.record,
            budget=now.budget,
            clocks=now.clocks,
            say=say,
            done=done,
        )
    _finish(now.record, as_json)


@bench.command()
def overhead(
    dtypes: Annotated[
        str | None, typer.Option(help="Operand formats (default: int8,fp8_e4m3,bf16).")
    ] = None,
    tokens: Annotated[int, typer.Option(min=32, help="Tokens (M), a multiple of 32.")] = 32,
    batches: Annotated[int, typer.Option(min=1, help="Batches of 50 calls.")] = 60,
    profile: Annotated[
        bool, typer.Option("--profile", help="Also print where the host's time goes.")
    ] = False,
    output: _OUTPUT = None,
    quick: _QUICK = False,
    time_budget: _BUDGET = None,
    device: _DEVICE = 0,
    commit: _COMMIT = None,
    as_json: _JSON = False,
) -> None:
    """Measure the host time of SparseGemmPlan.run, beside PyTorch's own products."""
    from ..bench.overhead import LIBRARIES, OverheadSettings, run_overhead

    settings = OverheadSettings(
        **_given(dtypes=_words(dtypes, "--dtypes")),
        m=tokens,
        batches=min(batches, 10) if quick else batches,
    )
    plain = settings.to_json() | {"quick": quick, "time_budget": time_budget}
    with (
        _session("overhead", LIBRARIES, plain, output, device, commit, time_budget) as now,
        now.progress(len(settings.backends) * len(settings.dtypes)) as (say, done),
    ):
        run_overhead(now.gpu, settings, now.record, budget=now.budget, say=say, done=done)
    _finish(now.record, as_json, profile=profile)


def _usable(
    settings: GemmSettings, output: Path | None, device: int, *, asked: bool
) -> tuple[GemmSettings, dict[str, str]]:
    """The settings with the sparse backends that can run, and why the others cannot."""
    from ..bench.gemm import usable_backends
    from ..bench.timing import require_gpu

    _check_folder(output)
    require_gpu(("nvrtc",), device)
    backends, refused = usable_backends(settings, device, asked=asked)
    return replace(settings, backends=backends), refused


def _expected(settings: GemmSettings, budget: float | None) -> str:
    """What to expect, for people."""
    from ..bench.gemm import estimate

    minutes = estimate(settings) / 60
    words = f"{settings.cases} cases of {', '.join(settings.sides)}: about {minutes:.1f} minutes"
    if budget is not None and minutes * 60 > budget:
        words += f", of which the time budget allows {budget / 60:.1f}"
    return f"{words}, and up to a minute for compiling kernels the first time"


# --- what they share ------------------------------------------------------------------------------


class _Session:
    """What one benchmark runs with."""

    def __init__(self, gpu: Gpu, clocks: Clocks, record: Record, budget: Budget) -> None:
        self.gpu = gpu
        self.clocks = clocks
        self.record = record
        self.budget = budget

    @contextmanager
    def progress(self, cases: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
        """(say a line, one case is done); lines and the bar go to stderr."""
        from .console import meter, printable

        with meter(cases, cases, unit="cases") as shown:

            def say(line: str) -> None:
                shown.begin(line.partition(":")[0])
                shown.bar.console.print(printable(line), soft_wrap=True)

            yield say, lambda: shown.advance(1)


@contextmanager
def _session(
    what: str,
    libraries: tuple[str, ...],
    settings: Mapping[str, Any],
    output: Path | None,
    device: int,
    commit: str | None,
    seconds: float | None,
) -> Iterator[_Session]:
    """Open the GPU and the result file; refuse at once what would fail later."""
    from ..bench.clocks import Clocks
    from ..bench.record import Budget, Record, command_line, default_path, environment
    from ..bench.timing import Gpu, require_gpu

    _check_folder(output)
    require_gpu(libraries, device)
    budget = Budget(seconds)
    gpu = Gpu(device)
    path = default_path(what, gpu.name) if output is None else output
    path.parent.mkdir(parents=True, exist_ok=True)
    clocks = Clocks(gpu.bus_id())
    # A second thread would disturb what the host's time is measured for.
    with gpu.active(), nullcontext() if what == "overhead" else clocks:
        record = Record(
            what,
            settings,
            command=command_line(sys.argv),
            surroundings=environment(gpu.facts(), commit=commit),
            path=path,
        )
        record.save()
        try:
            yield _Session(gpu, clocks, record, budget)
        finally:
            # PyTorch is imported on the way, if at all.
            record.document["versions"] = environment(None)["versions"]
            record.save()
            gpu.close()


def _check_folder(output: Path | None) -> None:
    """Raise OptionError for a result file in a folder that does not exist."""
    from ..errors import OptionError

    if output is not None and not output.absolute().parent.is_dir():
        raise OptionError(f"{output.absolute().parent} is no folder; make it first, for --output")


def _finish(record: Record, as_json: bool, *, profile: bool = False) -> None:
    """Print the result; exit code 1 if an output was wrong or a case broke."""
    from .bench_tables import render
    from .console import console, print_json

    if as_json:
        print_json(record.document)
    else:
        screen = console()
        render(record.document, screen, profile=profile)
        screen.print(f"written to {record.path}", soft_wrap=True)
    if record.failed:
        raise typer.Exit(1)


def _words(text: str | None, option: str) -> tuple[str, ...] | None:
    """The parts of a comma-separated list; ``None`` where it was not given."""
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise typer.BadParameter("the list is empty", param_hint=option)
    return parts


def _numbers(text: str | None, option: str, *, word: str = "") -> tuple[int | str, ...] | None:
    """A list of whole numbers from 1 on; ``word`` may stand among them."""
    parts = _words(text, option)
    if parts is None:
        return None
    wrong = [p for p in parts if p != word and not (p.isascii() and p.isdigit() and int(p) > 0)]
    if wrong:
        also = f", or {word!r}" if word else ""
        raise typer.BadParameter(
            f"{wrong[0]!r} is no whole number from 1 on{also}", param_hint=option
        )
    return tuple(part if part == word else int(part) for part in parts)


def _given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
