"""Every error that slidesparse_rt raises on purpose.

One root, :class:`SlideSparseError`, so that a server can catch the library's own errors with one
clause.  Each class also derives from the built-in exception that Python programmers expect for that
kind of mistake (``ValueError``, ``TypeError``, ``RuntimeError``), so that generic handlers keep
working.  A message says what was seen, what is allowed, and what to do.
"""

from __future__ import annotations

from collections.abc import Sequence


class SlideSparseError(Exception):
    """Root of all errors raised by slidesparse_rt."""


class PatternError(SlideSparseError, ValueError):
    """A pattern that does not exist, or a weight that does not fit its pattern.

    For a weight that does not fit, the attributes say where: ``row`` and ``group`` of the first
    violation, ``found`` and ``allowed`` nonzeros in it, and ``violations`` groups in all.
    They are ``None`` for a pattern that could not be parsed.
    """

    def __init__(
        self,
        message: str,
        *,
        row: int | None = None,
        group: int | None = None,
        found: int | None = None,
        allowed: int | None = None,
        violations: int | None = None,
    ) -> None:
        super().__init__(message)
        self.row = row
        self.group = group
        self.found = found
        self.allowed = allowed
        self.violations = violations


class ShapeError(SlideSparseError, ValueError):
    """An array whose rank or extents do not fit the operation."""


class DTypeError(SlideSparseError, TypeError):
    """An array or option of a data type that the operation does not take."""


class NonFiniteError(SlideSparseError, ValueError):
    """A NaN or an infinity where only finite numbers are meaningful (weights, norms, scales)."""


class OptionError(SlideSparseError, ValueError):
    """An option outside its allowed set, or options that contradict each other."""


class ArrayError(SlideSparseError, TypeError):
    """An object that is no array this library can read, or no output it can write."""


class DeviceError(SlideSparseError, ValueError):
    """Arrays, streams and plans that live on different devices."""


class FormatError(SlideSparseError, ValueError):
    """A file that is truncated, foreign, of a newer version, or that contradicts itself."""


class BackendUnavailable(SlideSparseError, RuntimeError):
    """A backend that cannot run here; the message lists what was looked for and where."""


class MissingPackage(BackendUnavailable, ImportError):
    """An optional package that an integration needs and that is not installed, or is too old.

    ``name`` is the package.
    """

    def __init__(self, message: str, *, name: str = "") -> None:
        super().__init__(message)
        self.name = name


class LibraryError(SlideSparseError, RuntimeError):
    """A call into a CUDA library that did not return success.

    ``status`` is the library's status code, ``status_name`` its name, ``function`` the C function.
    """

    def __init__(
        self, message: str, *, function: str = "", status: int = -1, status_name: str = ""
    ) -> None:
        super().__init__(message)
        self.function = function
        self.status = status
        self.status_name = status_name


class DeviceMemoryError(LibraryError, MemoryError):
    """The device (or the library's own pool) ran out of memory; the plan stays usable."""


class CompileError(SlideSparseError, RuntimeError):
    """NVRTC refused a kernel; ``log`` holds the compiler's log, ``options`` what it was given."""

    def __init__(self, message: str, *, log: str = "", options: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.log = log
        self.options = tuple(options)


class PlanClosed(SlideSparseError, RuntimeError):
    """A plan (or handle) used after ``close()``."""


class CaptureError(SlideSparseError, RuntimeError):
    """A call that would allocate or synchronize while a CUDA graph is being captured."""


def first_line(error: BaseException) -> str:
    """What an error says, without what follows in further lines; its name where it says nothing."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__
