"""``slidesparse bench packing`` and ``report``: what needs no GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .bench_session import AS_JSON, COMMIT, OUTPUT, QUICK, cpu_record, finish, given, progress

__all__ = ["packing", "report"]


def packing(
    rows: Annotated[int, typer.Option(min=1, help="Output channels, N.")] = 4096,
    columns: Annotated[int, typer.Option(min=1, help="Inputs, K.")] = 14336,
    pattern: Annotated[str, typer.Option(help="The pattern.")] = "6:8",
    threads: Annotated[
        int | None, typer.Option(min=1, max=1024, help="CPU threads; default: every core.")
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Rounds (default: 5).")] = None,
    no_memory: Annotated[
        bool, typer.Option("--no-memory", help="Do not measure peak memory as well.")
    ] = False,
    output: OUTPUT = None,
    quick: QUICK = False,
    commit: COMMIT = None,
    as_json: AS_JSON = False,
) -> None:
    """Measure packing on the CPU: check, prune, quantize and slide, beside NumPy and PyTorch.

    All versions' outputs are compared before anything is timed.
    """
    from ..bench.packing import PackingSettings, run_packing

    settings = PackingSettings(
        n=min(rows, 256) if quick else rows,
        k=min(columns, 1024) if quick else columns,
        pattern=pattern,
        threads=threads,
        memory=not (no_memory or quick),
        **given(rounds=2 if quick and rounds is None else rounds),
    )
    with (
        cpu_record("packing", settings.to_json() | {"quick": quick}, output, commit) as record,
        progress(settings.runs(3)) as (say, done),
    ):
        run_packing(settings, record, say=say, done=done)
    finish(record, as_json)


def report(
    files: Annotated[
        list[Path] | None,
        typer.Argument(
            metavar="[FILES]...",
            help="Result files, those of benchmarks/end_to_end.py and accuracy.py too. Without "
            "any, in a checkout: write docs/performance.md, docs/end-to-end.md, docs/accuracy.md, "
            "docs/packing-speed.md and docs/plots/ again from benchmarks/results/.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            file_okay=False,
            help="The folder for report.md and plots/; made if it is missing. Default: "
            "bench-report.",
        ),
    ] = None,
    formats: Annotated[
        list[str] | None,
        typer.Option("--format", help="Of plots: svg (the default) or png; may be repeated."),
    ] = None,
    no_plots: Annotated[bool, typer.Option("--no-plots", help="Tables alone.")] = False,
    check: Annotated[
        bool,
        typer.Option(
            "--check", help="Without FILES: write nothing; exit 1 if a page or plot is out of date."
        ),
    ] = False,
) -> None:
    """Turn result files into Markdown tables and plots.

    Several files of one kind are merged: of two measurements of one case the later one counts.
    """
    from ..errors import OptionError

    if files:
        if check:
            raise OptionError("--check compares this checkout's own pages; leave FILES out")
        from ..bench.report.page import write_report

        written = write_report(
            files,
            Path("bench-report") if output is None else output,
            formats=tuple(formats or ("svg",)),
            plots=not no_plots,
        )
    else:
        if output is not None or formats or no_plots:
            raise OptionError("--output, --format and --no-plots go with FILES; name result files")
        from ..bench.report.page import outdated, write_pages

        if check:
            stale = outdated()
            if stale:
                names = ", ".join(map(str, stale))
                typer.echo(f"out of date: {names}; type: slidesparse bench report", err=True)
                raise typer.Exit(1)
            return
        written = write_pages()
    for path in written:
        typer.echo(f"written: {path}")
