"""The command ``slidesparse``.

Exit codes: 0 done, 1 error, 2 wrong usage, 130 interrupted by Ctrl-C, 143 by a termination signal.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import traceback
from collections.abc import Sequence

__all__ = ["main"]

#: Exit codes that shells give to a process that a signal ended.
_INTERRUPTED = 128 + signal.SIGINT
_TERMINATED = 128 + signal.SIGTERM


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; never raises.

    Parameters
    ----------
    argv:
        The arguments after the program's name; ``None`` takes the process's own.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    as_json = "--json" in arguments
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A tensor's name may hold characters that the terminal's encoding lacks.
            stream.reconfigure(errors="backslashreplace")
    # A terminated command cleans up like an interrupted one.
    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGTERM, _terminate) if in_main_thread else None
    code = 0
    try:
        code = _run(arguments, as_json)
        sys.stdout.flush()
    except BrokenPipeError:
        _silence_stdout()
        code = 1
    except OSError as error:
        # stdout cannot be written: stderr is all that is left to say so.
        _silence_stdout()
        if code == 0:
            from .console import print_error

            print_error(f"stdout: {error}", kind=type(error).__name__, as_json=False)
            code = 1
    finally:
        if before is not None:
            signal.signal(signal.SIGTERM, before)
    return code


def _run(arguments: list[str], as_json: bool) -> int:
    """Run the command line; every error becomes one report and an exit code."""
    from ..errors import SlideSparseError
    from .console import print_error

    try:
        from .app import USAGE_ERROR, app, usage_message

        try:
            result = app(args=arguments, prog_name="slidesparse", standalone_mode=False)
            code = result if isinstance(result, int) else 0
        except USAGE_ERROR as error:
            print_error(usage_message(error), kind="UsageError", as_json=as_json)
            return 2
    except BrokenPipeError:
        raise
    except SlideSparseError as error:
        print_error(str(error), kind=type(error).__name__, as_json=as_json)
        return 1
    except MemoryError:
        print_error(
            "this machine has too little free memory for it", kind="MemoryError", as_json=as_json
        )
        return 1
    except OSError as error:
        print_error(_os_words(error), kind=type(error).__name__, as_json=as_json)
        return 1
    except KeyboardInterrupt:
        code = _INTERRUPTED
    except SystemExit as error:
        # typer's answer to a closed pipe, or _terminate's.
        code = error.code if isinstance(error.code, int) else 1
    except Exception as error:
        traceback.print_exc()
        print_error(
            f"this is a fault in slidesparse_rt, please report it with the lines above: "
            f"{type(error).__name__}: {error}",
            kind=type(error).__name__,
            as_json=as_json,
        )
        return 1
    if code == _INTERRUPTED:
        print_error(
            "interrupted; nothing was left half-written", kind="Interrupted", as_json=as_json
        )
    return code


def _os_words(error: OSError) -> str:
    """What the system refused, without Python's number in brackets."""
    if error.strerror is None or error.filename is None:
        return str(error)
    return f"{os.fsdecode(error.filename)}: {error.strerror}"


def _terminate(number: int, frame: object) -> None:
    del number, frame
    sys.exit(_TERMINATED)


def _silence_stdout() -> None:
    """Nobody reads stdout any more: let what is still buffered go nowhere, without complaint."""
    try:
        target = sys.stdout.fileno()
    except (OSError, ValueError):
        return
    sink = os.open(os.devnull, os.O_WRONLY)
    os.dup2(sink, target)
    os.close(sink)
