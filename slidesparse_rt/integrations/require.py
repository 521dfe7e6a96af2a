"""Importing a framework that an integration needs, with an error that says how to get it."""

from __future__ import annotations

import importlib
from typing import Any

from ..errors import MissingPackage

__all__ = ["require"]


def require(name: str, extra: str, least: tuple[int, int]) -> Any:
    """The module ``name``.

    Parameters
    ----------
    name:
        Top-level module of the framework.
    extra:
        Extra of this package that installs it.
    least:
        Oldest (major, minor) version that is taken.

    Raises
    ------
    MissingPackage
        If it is not installed, too old, or fails to import.
    """
    install = f"pip install 'slidesparse-rt[{extra}]'"
    try:
        module = importlib.import_module(name)
    except ImportError as error:
        if error.name == name:
            raise MissingPackage(
                f"slidesparse_rt.{extra} needs {name}, which is not installed; {install}",
                name=name,
            ) from error
        raise MissingPackage(
            f"slidesparse_rt.{extra} needs {name}, whose import failed: {error}; mend that "
            f"installation, or {install} in a fresh environment",
            name=name,
        ) from error
    found = str(getattr(module, "__version__", ""))
    numbers = tuple(int(part) for part in found.split(".")[:2] if part.isdigit())
    if len(numbers) < 2 or numbers < least:
        raise MissingPackage(
            f"slidesparse_rt.{extra} needs {name} {least[0]}.{least[1]} or newer and found "
            f"{found or 'no version'}; {install} --upgrade",
            name=name,
        )
    return module
