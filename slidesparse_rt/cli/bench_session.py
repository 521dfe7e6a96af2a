"""What the commands of ``slidesparse bench`` share: options, the GPU, the result file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from ..bench.clocks import Clocks
    from ..bench.record import Budget, Record
    from ..bench.timing import Gpu

__all__ = [
    "AS_JSON",
    "BUDGET",
    "COMMIT",
    "DEVICE",
    "OUTPUT",
    "QUICK",
    "TOKENS_HELP",
    "Session",
    "check_folder",
    "cpu_record",
    "finish",
    "given",
    "numbers",
    "progress",
    "session",
    "words",
]

OUTPUT = Annotated[
    Path | None,
    typer.Option(
        dir_okay=False,
        help="The result file; replaced if it exists. Default: benchmarks/results/"
        "<what>-<gpu>-<date>.json in a checkout, else the current folder.",
    ),
]
AS_JSON = Annotated[
    bool, typer.Option("--json", help="Print the result as JSON instead, errors included.")
]
QUICK = Annotated[bool, typer.Option("--quick", help="A few small cases, to see that it works.")]
BUDGET = Annotated[
    float | None,
    typer.Option(
        min=0, metavar="SECONDS", help="Begin no further case after this; the file says which."
    ),
]
DEVICE = Annotated[int, typer.Option(min=0, help="CUDA's number of the GPU.")]
COMMIT = Annotated[
    str | None,
    typer.Option(help="The commit that runs, for a copy of the sources without git's record."),
]
TOKENS_HELP = "Numbers of tokens (M), separated by commas"


class Session:
    """What one benchmark runs with."""

    def __init__(self, gpu: Gpu, clocks: Clocks, record: Record, budget: Budget) -> None:
        self.gpu = gpu
        self.clocks = clocks
        self.record = record
        self.budget = budget

    def measure(
        self,
        run: Callable[..., None],
        settings: Any,
        say: Callable[[str], None],
        done: Callable[[], None],
    ) -> None:
        """Let a benchmark measure with all of it."""
        run(
            self.gpu,
            settings,
            self.record,
            budget=self.budget,
            clocks=self.clocks,
            say=say,
            done=done,
        )


@contextmanager
def progress(cases: int) -> Iterator[tuple[Callable[[str], None], Callable[[], None]]]:
    """(say a line, one case is done); lines and the bar go to stderr."""
    from .console import meter, printable

    with meter(cases, cases, unit="cases") as shown:

        def say(line: str) -> None:
            shown.begin(line.partition(":")[0])
            shown.bar.console.print(printable(line), soft_wrap=True)

        yield say, lambda: shown.advance(1)


@contextmanager
def session(
    what: str,
    libraries: tuple[str, ...],
    settings: Mapping[str, Any],
    output: Path | None,
    device: int,
    commit: str | None,
    seconds: float | None,
) -> Iterator[Session]:
    """Open the GPU and the result file; refuse at once what would fail later."""
    from ..bench.clocks import Clocks
    from ..bench.record import Budget, Record, command_line, default_path, environment
    from ..bench.timing import Gpu, require_gpu

    check_folder(output)
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
            yield Session(gpu, clocks, record, budget)
        finally:
            # PyTorch is imported on the way, if at all.
            record.document["versions"] = environment(None)["versions"]
            record.save()
            gpu.close()


@contextmanager
def cpu_record(
    what: str, settings: Mapping[str, Any], output: Path | None, commit: str | None
) -> Iterator[Record]:
    """The result file of what needs no GPU."""
    from ..bench.record import Record, command_line, default_path, environment

    check_folder(output)
    path = default_path(what, "cpu") if output is None else output
    path.parent.mkdir(parents=True, exist_ok=True)
    record = Record(
        what,
        settings,
        command=command_line(sys.argv),
        surroundings=environment(None, commit=commit),
        path=path,
    )
    record.save()
    try:
        yield record
    finally:
        # PyTorch is imported on the way, if at all.
        record.document["versions"] = environment(None)["versions"]
        record.save()


def check_folder(output: Path | None) -> None:
    """Raise OptionError for a result file in a folder that does not exist."""
    from ..errors import OptionError

    if output is not None and not output.absolute().parent.is_dir():
        raise OptionError(f"{output.absolute().parent} is no folder; make it first, for --output")


def finish(record: Record, as_json: bool, *, profile: bool = False) -> None:
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


def words(text: str | None, option: str) -> tuple[str, ...] | None:
    """The parts of a comma-separated list; ``None`` where it was not given."""
    if text is None:
        return None
    parts = tuple(part.strip() for part in text.split(",") if part.strip())
    if not parts:
        raise typer.BadParameter("the list is empty", param_hint=option)
    return parts


def numbers(text: str | None, option: str, *, word: str = "") -> tuple[int | str, ...] | None:
    """A list of whole numbers from 1 on; ``word`` may stand among them."""
    parts = words(text, option)
    if parts is None:
        return None
    wrong = [p for p in parts if p != word and not (p.isascii() and p.isdigit() and int(p) > 0)]
    if wrong:
        also = f", or {word!r}" if word else ""
        raise typer.BadParameter(
            f"{wrong[0]!r} is no whole number from 1 on{also}", param_hint=option
        )
    return tuple(part if part == word else int(part) for part in parts)


def given(**options: Any) -> dict[str, Any]:
    """The options that were given."""
    return {name: value for name, value in options.items() if value is not None}
