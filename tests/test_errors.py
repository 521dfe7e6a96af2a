"""The error classes: one root, the built-in kinds, and attributes that survive pickling."""

from __future__ import annotations

import copy
import pickle

import pytest

from slidesparse_rt import errors
from slidesparse_rt.errors import SlideSparseError

BUILT_IN = {
    "PatternError": ValueError,
    "ShapeError": ValueError,
    "DTypeError": TypeError,
    "NonFiniteError": ValueError,
    "OptionError": ValueError,
    "ArrayError": TypeError,
    "DeviceError": ValueError,
    "FormatError": ValueError,
    "BackendUnavailable": RuntimeError,
    "LibraryError": RuntimeError,
    "MissingPackage": ImportError,
    "DeviceMemoryError": MemoryError,
    "CompileError": RuntimeError,
    "PlanClosed": RuntimeError,
    "CaptureError": RuntimeError,
}
ALL = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, Exception)
]


def test_every_class_is_listed_here() -> None:
    assert {kind.__name__ for kind in ALL} == {"SlideSparseError", *BUILT_IN}


@pytest.mark.parametrize("name", BUILT_IN)
def test_one_root_and_the_expected_built_in(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, SlideSparseError)
    assert issubclass(kind, BUILT_IN[name])
    assert issubclass(errors.DeviceMemoryError, errors.LibraryError)


@pytest.mark.parametrize("kind", ALL, ids=lambda kind: kind.__name__)
@pytest.mark.parametrize(
    "again",
    [
        copy.copy,
        copy.deepcopy,
        *(
            lambda error, p=protocol: pickle.loads(pickle.dumps(error, p))
            for protocol in range(pickle.HIGHEST_PROTOCOL + 1)
        ),
    ],
)
def test_errors_survive_pickle_and_copy(kind: type[Exception], again: object) -> None:
    extra = {
        "PatternError": {"row": 3, "group": 2, "found": 7, "allowed": 6, "violations": 9},
        "LibraryError": {"function": "f", "status": 7, "status_name": "BAD"},
        "DeviceMemoryError": {"function": "f", "status": 2, "status_name": "OOM"},
        "CompileError": {"log": "line 1", "options": ("-a", "-b")},
    }.get(kind.__name__, {})
    error = kind("what was seen", **extra)
    copied = again(error)  # type: ignore[operator]
    assert type(copied) is kind
    assert str(copied) == "what was seen"
    for name, value in extra.items():
        assert getattr(copied, name) == value


def test_defaults_of_the_attributes() -> None:
    assert errors.PatternError("m").row is None
    assert errors.LibraryError("m").status == -1
    assert errors.CompileError("m", options=["-x"]).options == ("-x",)
    assert errors.CompileError("m").log == ""


def test_the_first_line_of_an_error() -> None:
    assert errors.first_line(ValueError("a\nb")) == "a"
    assert errors.first_line(ValueError()) == "ValueError"
