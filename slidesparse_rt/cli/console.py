"""What the commands share: consoles, tables, progress bars and the one JSON document.

Results go to stdout; progress and errors go to stderr, so that stdout can be piped.
"""

from __future__ import annotations

import json
import os
import secrets
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, TaskID
    from rich.text import Text

__all__ = [
    "Meter",
    "byte_meter",
    "console",
    "meter",
    "print_error",
    "print_json",
    "printable",
    "share",
    "show_table",
    "size_text",
    "styled",
    "to_json_text",
    "write_text",
]

#: Columns assumed where there is no terminal to ask: wide enough that no table is squeezed.
_WIDE = 200
#: A width that no table needs.
_UNBOUNDED = 100_000
#: Characters that are left to the first column of a table that does not fit the screen.
_FOLDED = 24


def console(*, stderr: bool = False, markup: bool = False) -> Console:
    """Return a console for the current stdout (or stderr).

    Text is printed as it is: tensor names may hold what looks like markup.  ``markup=True`` is for
    text of our own that uses it.
    """
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    return Console(
        file=stream,
        markup=markup,
        emoji=False,
        highlight=False,
        width=None if stream.isatty() else _WIDE,
    )


def printable(text: str) -> str:
    """Return ``text`` with control characters as escapes, so that no file moves the cursor."""
    return "".join(
        sign if sign.isprintable() else sign.encode("unicode_escape").decode() for sign in text
    )


def styled(text: str, style: str) -> Text:
    """A piece of text in a style such as "bold red"."""
    from rich.text import Text

    return Text(text, style=style)


def show_table(
    screen: Console,
    titles: Sequence[str],
    rows: Sequence[Sequence[str | Text]],
    *,
    left: int = 1,
) -> None:
    """Print rows under titles; the first ``left`` columns are text, the others numbers.

    Nothing is ever cut: the first column is folded where it is too long, and on a screen too narrow
    even for that, each row is printed as a paragraph.
    """
    from rich import box
    from rich.measure import Measurement
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0))
    for index, title in enumerate(titles):
        table.add_column(
            title,
            justify="left" if index < left else "right",
            overflow="fold",
            no_wrap=index > 0,
        )
    for row in rows:
        table.add_row(*row)
    unbounded = screen.options.update(width=_UNBOUNDED, max_width=_UNBOUNDED)
    natural = Measurement.get(screen, unbounded, table).maximum
    longest = max(len(text) for text in (titles[0], *(str(row[0]) for row in rows)))
    if natural - max(0, longest - _FOLDED) <= screen.width:
        screen.print(table)
        return
    for row in rows:
        screen.print(row[0], soft_wrap=True)
        pairs = zip(titles[1:], row[1:], strict=True)
        words = ", ".join(f"{' '.join(title.split())} {cell}".strip() for title, cell in pairs)
        screen.print(f"  {words}", soft_wrap=True)


def size_text(count: int) -> str:
    """Bytes for people: ``1500`` -> ``"1.5 kB"``."""
    from rich.filesize import decimal

    return decimal(count)


def share(part: int, whole: int) -> str:
    """``part`` of ``whole`` as a percentage that never rounds to a false 0 or 100."""
    if whole == 0:
        return "-"
    percent = 100 * part / whole
    if 0 < percent < 0.1:
        return "<0.1%"
    if 99.9 < percent < 100:
        return ">99.9%"
    return f"{percent:.1f}%"


def print_json(document: Mapping[str, Any]) -> None:
    """Print the one JSON document of a ``--json`` run on stdout."""
    sys.stdout.write(to_json_text(document))


def to_json_text(document: Mapping[str, Any]) -> str:
    """The document as indented ASCII JSON that ends with a newline; refuses NaN."""
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write a file so that ``path`` never names a half-written one."""
    target = Path(os.path.realpath(path))
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(target)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def print_error(message: str, *, kind: str, as_json: bool) -> None:
    """Report why a command failed: one JSON document on stdout, or red text on stderr."""
    if as_json:
        print_json({"error": {"type": kind, "message": message}})
    else:
        console(stderr=True).print(styled(f"error: {message}", "red"), soft_wrap=True)


@dataclass(slots=True)
class Meter:
    """A progress bar over tensors and their bytes; on anything but a terminal it shows nothing."""

    bar: Progress
    task: TaskID
    _steps: int = field(default=0)

    def begin(self, name: str) -> None:
        """Say what is being worked on."""
        self.bar.update(self.task, description=printable(name))

    def advance(self, count: int) -> None:
        """One step of ``count`` bytes is done."""
        self._steps += 1
        self.bar.update(self.task, advance=count, steps=self._steps)

    def reached(self, name: str, done: int, total: int) -> None:
        """``done`` of ``total`` steps are done, ``name`` is next; for steps without a size."""
        self.bar.update(
            self.task,
            description=printable(name),
            completed=done,
            total=total,
            steps=done,
            of=total,
        )

    def finish(self, what: str) -> None:
        """Everything is counted; show a last job of unknown length, such as writing a file."""
        self.bar.update(self.task, visible=False)
        self.bar.add_task(what, total=None, steps=None, of=None, unit="")


@contextmanager
def meter(steps: int, size: int, *, unit: str = "tensors") -> Iterator[Meter]:
    """A :class:`Meter` over ``steps`` tensors of ``size`` bytes in all, on stderr.

    The bar is removed at the end, so that only the result stays on the screen.
    """
    from rich.progress import (
        BarColumn,
        Progress,
        ProgressColumn,
        Task,
        TextColumn,
        TimeElapsedColumn,
    )
    from rich.table import Column
    from rich.text import Text

    class Counts(ProgressColumn):
        """Steps and bytes done, out of all."""

        def render(self, task: Task) -> Text:
            of = task.fields["of"]
            if of is None or task.total is None:
                return Text("")
            words = f"{task.fields['steps']}/{of} {task.fields['unit']}"
            if task.total > of:
                words += f", {size_text(int(task.completed))}/{size_text(int(task.total))}"
            return Text(words, no_wrap=True)

    screen = console(stderr=True)
    name = Column(no_wrap=True, overflow="ellipsis", max_width=28)
    bar = Progress(
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=12),
        Counts(),
        TimeElapsedColumn(),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    # Without a terminal it is not even started: some versions of rich print a line when it stops.
    with bar if screen.is_terminal else nullcontext():
        yield Meter(bar, bar.add_task("", total=size, steps=0, of=steps, unit=unit))


@contextmanager
def byte_meter() -> Iterator[Callable[[str, int, int], None]]:
    """A progress bar over bytes with the time that is left, on stderr; shown on terminals only.

    Yields what moves it: (what is being worked on, bytes done, bytes in all).
    """
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.table import Column

    screen = console(stderr=True)
    name = Column(no_wrap=True, overflow="ellipsis", max_width=28)
    bar = Progress(
        TextColumn("{task.description}", markup=False, table_column=name),
        BarColumn(bar_width=12),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(elapsed_when_finished=True),
        console=screen,
        transient=True,
        disable=not screen.is_terminal,
    )
    with bar if screen.is_terminal else nullcontext():
        task = bar.add_task("checking", total=None)

        def reached(what: str, done: int, total: int) -> None:
            bar.update(task, description=printable(what), completed=done, total=total)

        yield reached
