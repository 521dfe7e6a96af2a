"""``slidesparse bench``: measure, check the outputs, and write a result file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from .bench_report import packing, report
from .bench_session import (
    AS_JSON,
    BUDGET,
    COMMIT,
    DEVICE,
    OUTPUT,
    QUICK,
    TOKENS_HELP,
    check_folder,
    finish,
    given,
    numbers,
    progress,
    session,
    words,
)

if TYPE_CHECKING:
    from ..bench.gemm import GemmSettings

    Settings = TypeVar("Settings", bound=GemmSettings)

__all__ = ["bench"]

bench = typer.Typer(add_completion=False)

_MODELS = Annotated[
    str | None,
    typer.Option(
        help="Models whose layers are run, separated by commas: qwen2.5-7b (the default), "
        "qwen2.5-14b, llama-3.2-1b, llama-3.2-3b, bitnet-2b; squares: products with M = N = K = "
        "64, 128, ... 16384, each alone."
    ),
]
_LAYERS = Annotated[str | None, typer.Option(help="Only these layers: qkv, o, gate_up, down.")]
_DTYPES = Annotated[
    str | None,
    typer.Option(help="Operand formats: int8, fp8_e4m3, bf16, fp16 (default: the first three)."),
]
_PATTERNS = Annotated[
    str | None,
    typer.Option(
        help="Patterns, in this order: 2:4, 4:6, ... 30:32, dense (default: 6:8,4:6,2:4,8:10)."
    ),
]
_BACKENDS = Annotated[
    list[str] | None,
    typer.Option(
        "--backend",
        help="A sparse backend to compare with dense: hopper or cusparselt; may be repeated. "
        "Default: every one that supports the GPU.",
    ),
]
_SUSTAINED = Annotated[
    bool,
    typer.Option("--sustained", help="Also measure each side alone, for seconds: see above."),
]
_SECONDS = Annotated[
    float, typer.Option(min=0.1, help="Length of one sustained round of one side.")
]
_SUSTAINED_ROUNDS = Annotated[int, typer.Option(min=1, help="Sustained rounds of each side.")]
_ROUNDS = Annotated[int, typer.Option(min=1, help="Rounds of a burst.")]
#: What --quick measures of products and operators.
_QUICK_CASES: dict[str, Any] = {
    "layers": ("qkv", "o"),
    "tokens": (16, 256, 4096),
    "dtypes": ("int8", "fp8_e4m3"),
    "patterns": ("6:8",),
}


def _quick_cases(models: str | None) -> dict[str, Any]:
    """Those of --quick; a square has no layers to choose from."""
    square = "square" in (models or "")
    return {key: value for key, value in _QUICK_CASES.items() if not (square and key == "layers")}


@bench.callback(
    invoke_without_command=True,
    help="Measure products, operators, kernels and host cost on a GPU, and packing on the CPU, "
    "beside the strongest alternatives; turn results into tables and plots.\n\n"
    "Outputs are checked before anything is reported; a wrong one is left out and the exit code is "
    "1. The result file is written again after every case.",
)
def root(context: typer.Context) -> None:
    """Show the help where no benchmark is named."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command()
def gemm(
    models: _MODELS = None,
    layers: _LAYERS = None,
    tokens: Annotated[
        str | None, typer.Option(help=f"{TOKENS_HELP} (default: 16,64,256,1024,4096,16384).")
    ] = None,
    dtypes: _DTYPES = None,
    patterns: _PATTERNS = None,
    backends: _BACKENDS = None,
    stages: Annotated[
        str | None, typer.Option(help="gemm (products alone), op (operators); default: both.")
    ] = None,
    no_layers: Annotated[
        bool, typer.Option("--no-layers", help="Do not time the layers one by one as well.")
    ] = False,
    sustained: _SUSTAINED = False,
    seconds: _SECONDS = 1.0,
    sustained_rounds: _SUSTAINED_ROUNDS = 2,
    rounds: _ROUNDS = 20,
    output: OUTPUT = None,
    quick: QUICK = False,
    time_budget: BUDGET = None,
    device: DEVICE = 0,
    commit: COMMIT = None,
    as_json: AS_JSON = False,
) -> None:
    """Compare sparse products with dense ones (cuBLASLt), alone and as operators.

    Times are summed over a model's layers. In a burst both sides take turns, warm; sustained, each
    side runs alone for a while and the last half counts: that is the figure to quote.
    """
    from ..bench.gemm import GemmSettings, run_gemm

    settings = GemmSettings(
        **(_quick_cases(models) if quick else {})
        | given(
            models=words(models, "--models"),
            layers=words(layers, "--layers"),
            tokens=numbers(tokens, "--tokens"),
            dtypes=words(dtypes, "--dtypes"),
            patterns=words(patterns, "--patterns"),
            backends=tuple(backends) if backends else None,
            stages=words(stages, "--stages"),
        ),
        layer_times=not no_layers,
        rounds=rounds,
        sustained=sustained,
        seconds=seconds,
        sustained_rounds=sustained_rounds,
    )
    _products(
        "gemm", settings, run_gemm, backends, output, quick, time_budget, device, commit, as_json
    )


@bench.command()
def pipeline(
    models: _MODELS = None,
    layers: _LAYERS = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            help=f"{TOKENS_HELP} (default: 1,16,48,64,200,256,1024,3000,4096,16384): those that "
            "tuning measures, and some between them."
        ),
    ] = None,
    dtypes: _DTYPES = None,
    patterns: _PATTERNS = None,
    backends: _BACKENDS = None,
    tuning: Annotated[
        str,
        typer.Option(
            help='How "auto" chooses. measure: by times that are kept, and measured first where '
            "they are not; cached: by kept times; heuristic: by the rule."
        ),
    ] = "measure",
    by_layer: Annotated[
        bool, typer.Option("--layer-times", help="Also time the layers one by one.")
    ] = False,
    sustained: _SUSTAINED = False,
    seconds: _SECONDS = 1.0,
    sustained_rounds: _SUSTAINED_ROUNDS = 2,
    rounds: _ROUNDS = 20,
    output: OUTPUT = None,
    quick: QUICK = False,
    time_budget: BUDGET = None,
    device: DEVICE = 0,
    commit: COMMIT = None,
    as_json: AS_JSON = False,
) -> None:
    """Compare SparseGemmPlan.run with backend="auto", bf16 in and out, with dense alone.

    Every sparse backend runs beside them. Promised is that auto is never below 0.98 times the speed
    of dense, nor of the fastest single backend; the last lines say where it came closest.
    """
    from ..bench.pipeline import PipelineSettings, run_pipeline

    settings = PipelineSettings(
        **(_quick_cases(models) if quick else {})
        | given(
            models=words(models, "--models"),
            layers=words(layers, "--layers"),
            tokens=numbers(tokens, "--tokens"),
            dtypes=words(dtypes, "--dtypes"),
            patterns=words(patterns, "--patterns"),
            backends=tuple(backends) if backends else None,
        ),
        tuning=tuning,
        layer_times=by_layer,
        rounds=rounds,
        sustained=sustained,
        seconds=seconds,
        sustained_rounds=sustained_rounds,
    )
    _products(
        "pipeline", settings, run_pipeline, backends, output, quick, time_budget, device, commit,
        as_json,
    )  # fmt: skip


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
        typer.Option(help=f"{TOKENS_HELP}, or 'full': as many as make 64 M elements."),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds.")] = 20,
    output: OUTPUT = None,
    quick: QUICK = False,
    time_budget: BUDGET = None,
    device: DEVICE = 0,
    commit: COMMIT = None,
    as_json: AS_JSON = False,
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
        | given(
            columns=numbers(columns, "--columns"),
            outputs=numbers(outputs, "--outputs"),
            x_types=words(x_types, "--x-types"),
            targets=words(targets, "--targets"),
            patterns=words(patterns, "--patterns"),
            tokens=numbers(tokens, "--tokens", word="full"),
        ),
        rounds=rounds,
    )
    plain = settings.to_json() | {"quick": quick, "time_budget": time_budget}
    with (
        session("quantize", LIBRARIES, plain, output, device, commit, time_budget) as now,
        progress(len(settings.cases())) as (say, done),
    ):
        now.measure(run_quantize, settings, say, done)
    finish(now.record, as_json)


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
    output: OUTPUT = None,
    quick: QUICK = False,
    time_budget: BUDGET = None,
    device: DEVICE = 0,
    commit: COMMIT = None,
    as_json: AS_JSON = False,
) -> None:
    """Measure the host time of SparseGemmPlan.run, beside PyTorch's own products."""
    from ..bench.overhead import LIBRARIES, OverheadSettings, run_overhead

    settings = OverheadSettings(
        **given(dtypes=words(dtypes, "--dtypes")),
        m=tokens,
        batches=min(batches, 10) if quick else batches,
    )
    plain = settings.to_json() | {"quick": quick, "time_budget": time_budget}
    with (
        session("overhead", LIBRARIES, plain, output, device, commit, time_budget) as now,
        progress(len(settings.backends) * len(settings.dtypes)) as (say, done),
    ):
        run_overhead(now.gpu, settings, now.record, budget=now.budget, say=say, done=done)
    finish(now.record, as_json, profile=profile)


bench.command()(packing)
bench.command()(report)


def _products(
    what: str,
    settings: Settings,
    run: Callable[..., None],
    backends: Sequence[str] | None,
    output: Path | None,
    quick: bool,
    time_budget: float | None,
    device: int,
    commit: str | None,
    as_json: bool,
) -> None:
    """Measure with every backend that can run, of those asked for."""
    settings, refused = _usable(settings, output, device, asked=bool(backends))
    plain = settings.to_json() | {"quick": quick, "time_budget": time_budget}
    with (
        session(what, (), plain, output, device, commit, time_budget) as now,
        progress(settings.cases) as (say, done),
    ):
        for name, why in refused.items():
            now.record.leave_out(name, "unavailable", why)
        say(_expected(settings, time_budget))
        now.measure(run, settings, say, done)
    finish(now.record, as_json)


def _usable(
    settings: Settings, output: Path | None, device: int, *, asked: bool
) -> tuple[Settings, dict[str, str]]:
    """The settings with the sparse backends that can run, and why the others cannot."""
    from ..bench.gemm import usable_backends
    from ..bench.timing import require_gpu

    check_folder(output)
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
