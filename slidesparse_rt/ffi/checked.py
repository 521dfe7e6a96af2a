"""Calling a C library through ctypes: declared functions, checked statuses, typed values.

- :class:`Function` declares one C function; :class:`CLibrary` binds it when it is first called and
  checks every status, so that an error names the function, the status and the arguments.
- :class:`Attribute` is an enumeration of attribute codes that also says how wide each value is.
- :class:`HostScalar` is a number that a library reads where it lies.

Nothing here knows which library it serves, and nothing is loaded at import.  What such calls make
has an owner in :mod:`slidesparse_rt.ffi.objects`.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from functools import partial
from typing import Any, ClassVar, TypeVar

from ..dtypes import array_type, operand
from ..errors import BackendUnavailable, DeviceMemoryError, LibraryError, OptionError
from .libraries import Loaded, version_text

__all__ = [
    "Attribute",
    "AttributeT",
    "CLibrary",
    "DataType",
    "Function",
    "HostScalar",
    "declare",
    "functions",
]


class DataType(IntEnum):
    """``cudaDataType`` (library_types.h); dtypes.py has the codes of the package's own formats."""

    F32 = array_type("float32").cuda_data_type
    F16 = array_type("float16").cuda_data_type
    BF16 = array_type("bfloat16").cuda_data_type
    I8 = operand("int8").cuda_data_type
    I32 = 10
    E4M3 = operand("fp8_e4m3").cuda_data_type
    E2M1 = 33


# --- functions ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Function:
    """One C function.

    Attributes
    ----------
    name:
        Its symbol.
    arguments:
        Argument name -> ctypes type, in order.
    returns:
        ctypes type of the result; ``None`` is a status, which is checked.
    since:
        Version of the library that brought it, where the oldest supported one lacks it.
    """

    name: str
    arguments: Mapping[str, Any]
    returns: Any = None
    since: tuple[int, ...] | None = None


#: How :func:`declare` spells the C types; an enumeration is an int.
_C_TYPES: Mapping[str, Any] = {
    "int": ctypes.c_int,
    "i32": ctypes.c_int32,
    "u32": ctypes.c_uint32,
    "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64,
    "size": ctypes.c_size_t,
    "ptr": ctypes.c_void_p,
}


def declare(
    name: str, arguments: str, *, returns: Any = None, since: tuple[int, ...] | None = None
) -> Function:
    """Return the :class:`Function` with these arguments.

    ``arguments`` lists ``name:type`` in order, separated by spaces; the types are int, i32, u32,
    i64, u64, size and ptr, and a name without a type is a pointer.
    """
    pairs = (word.partition(":")[::2] for word in arguments.split())
    return Function(name, {key: _C_TYPES[kind or "ptr"] for key, kind in pairs}, returns, since)


def functions(*declared: Function) -> Mapping[str, Function]:
    """Return the table of ``declared`` functions by name."""
    return {function.name: function for function in declared}


class CLibrary:
    """A loaded C library; each C function is a method of the C function's name.

    A function is bound when it is first called.  One that returns a status returns ``None`` from
    here, or raises :class:`~slidesparse_rt.errors.LibraryError` (out of memory:
    :class:`~slidesparse_rt.errors.DeviceMemoryError`).  ctypes releases the interpreter lock for
    the time of the call.

    Parameters
    ----------
    loaded:
        What :func:`slidesparse_rt.ffi.libraries.load` returned.
    """

    #: The table of the library's functions.
    FUNCTIONS: ClassVar[Mapping[str, Function]]
    #: Its statuses; zero is success.
    STATUS: ClassVar[type[IntEnum]]
    #: What precedes a status name in the header.
    STATUS_PREFIX: ClassVar[str]
    #: The status that means out of memory.
    OUT_OF_MEMORY: ClassVar[int]
    #: Status -> what to do about it.
    ADVICE: ClassVar[Mapping[int, str]]
    #: The function that puts a status into words.
    DESCRIBE: ClassVar[str]
    #: Statuses by which a new handle says that this machine cannot run the library.
    NOT_HERE: ClassVar[frozenset[int]]
    #: The GPU that it needs.
    NEEDS: ClassVar[str]

    def __init__(self, loaded: Loaded) -> None:
        self.title = loaded.library.title
        self.path = loaded.path
        self.version = loaded.version
        self._handle = loaded.handle

    def __getattr__(self, name: str) -> Callable[..., Any]:
        function = type(self).FUNCTIONS.get(name)
        if function is None:
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}")
        bound = self.raw(name)
        checked = bound if function.returns is not None else self._checked(name, bound)
        self.__dict__[name] = checked
        return checked

    def has(self, name: str) -> bool:
        """Whether this copy of the library exports ``name``, a function of the table."""
        try:
            self._handle[self.FUNCTIONS[name].name]
        except AttributeError:
            return False
        return True

    def raw(self, name: str) -> Callable[..., Any]:
        """Return the typed but unchecked C function; BackendUnavailable if it is absent."""
        function = self.FUNCTIONS[name]
        try:
            # Indexing makes a new function object: the types set here touch no one else's.
            bound: Callable[..., Any] = self._handle[name]
        except AttributeError:
            since = f", which came with {version_text(function.since)}" if function.since else ""
            raise BackendUnavailable(
                f"{self.title} {version_text(self.version)} at {self.path} has no function "
                f"{name}{since}; install a newer {self.title}"
            ) from None
        bound.argtypes = tuple(function.arguments.values())  # type: ignore[attr-defined]
        restype = ctypes.c_int if function.returns is None else function.returns
        bound.restype = restype  # type: ignore[attr-defined]
        return bound

    def repeated(self, name: str, *arguments: Any) -> Callable[[], Any]:
        """Return a call of the unchecked function with ``arguments``, to be made many times.

        They are converted here, and not again at each call, where that is nearly half of what
        ctypes takes.
        """
        function: Any = self.raw(name)
        kinds = zip(function.argtypes, arguments, strict=True)
        converted = [kind.from_param(argument) for kind, argument in kinds]
        function.argtypes = None  # what is converted is passed as it is
        return partial(function, *converted)

    def _checked(self, name: str, bound: Callable[..., Any]) -> Callable[..., None]:
        def checked(*arguments: Any) -> None:
            status = bound(*arguments)
            if status:
                raise self.error(name, status, arguments)

        checked.__name__ = checked.__qualname__ = name
        return checked

    def start(self, name: str, handle: Any, device: int) -> None:
        """Call ``name(handle)``, which makes a handle; BackendUnavailable if no GPU will do."""
        try:
            getattr(self, name)(handle)
        except LibraryError as error:
            if error.status not in self.NOT_HERE:
                raise
            raise BackendUnavailable(
                f"{self.title} {version_text(self.version)} at {self.path} cannot start on device "
                f"{device}: {error}; it needs {self.NEEDS}, and a driver for the CUDA version that "
                "it was built for (slidesparse doctor shows both)"
            ) from error

    def status_name(self, status: int) -> str:
        """Return the header's name of ``status``."""
        try:
            return self.STATUS_PREFIX + self.STATUS(status).name
        except ValueError:
            return "unknown status"

    def error(self, name: str, status: int, arguments: tuple[Any, ...]) -> LibraryError:
        """Return the error for ``status`` from ``name``, called with ``arguments``."""
        shown = ", ".join(
            f"{key}={_show(value, kind)}"
            for (key, kind), value in zip(
                self.FUNCTIONS[name].arguments.items(), arguments, strict=True
            )
        )
        status_name = self.status_name(status)
        text = f"{name}({shown}) returned {status} ({status_name})"
        if self.has(self.DESCRIBE):
            words = getattr(self, self.DESCRIBE)(status)
            if words:
                text += f": {words.decode('ascii', 'replace')}"
        advice = self.ADVICE.get(status)
        if advice:
            text += f"; {advice}"
        text += f" [{self.title} {version_text(self.version)}]"
        kind = DeviceMemoryError if status == self.OUT_OF_MEMORY else LibraryError
        return kind(text, function=name, status=status, status_name=status_name)


def _show(value: Any, kind: Any) -> str:
    """One argument for an error message: enums by name, pointers in hexadecimal."""
    if isinstance(value, IntEnum):
        return value.name
    value = getattr(value, "value", value)
    if kind is ctypes.c_void_p:
        if value is None:
            return "NULL"
        return hex(value) if isinstance(value, int) else "&local"
    return str(value)


# --- values ---------------------------------------------------------------------------------------


class Attribute(IntEnum):
    """Attributes of one kind of C object: member = code in the header, ctypes type of the value.

    The enumeration is the table: nothing else says how wide an attribute is.
    """

    ctype: Any

    def __new__(cls, code: int, ctype: Any) -> Attribute:
        """Make a member that is its code and remembers its type."""
        member = int.__new__(cls, code)
        member._value_ = code
        member.ctype = ctype
        return member

    def cell(self, value: float | None = None) -> Any:
        """Return a ctypes value of this attribute's type; OptionError for one that does not fit."""
        if value is None:
            return self.ctype()
        cell = self.ctype(value)
        if self.ctype not in (ctypes.c_float, ctypes.c_double) and (cell.value or 0) != value:
            raise OptionError(
                f"{type(self).__name__}.{self.name} is {value}; it takes what fits "
                f"{8 * ctypes.sizeof(cell)} bits ({self.ctype.__name__})"
            )
        return cell


#: The attributes of one kind of object.
AttributeT = TypeVar("AttributeT", bound=Attribute)


class HostScalar:
    """A number in host memory at a fixed address: alpha and beta of a matrix product.

    Parameters
    ----------
    ctype:
        ctypes type that the library reads there (``c_float``; ``c_int32`` for int32 scaling).
    value:
        The number.
    """

    __slots__ = ("_cell", "address")

    def __init__(self, ctype: Any, value: float) -> None:
        self._cell = ctype(value)
        self.address: int = ctypes.addressof(self._cell)

    @property
    def value(self) -> float:
        """The number."""
        number: float = self._cell.value
        return number
