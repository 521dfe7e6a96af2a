"""All integrations: nothing heavy without them, and clear words when a framework is missing."""

from __future__ import annotations

import importlib
import re
import subprocess
import sys
from typing import Any

import pytest
from test_import import loaded_after

import slidesparse_rt as ss
from slidesparse_rt.integrations.require import require

NAMES = ("torch", "transformers", "jax")


def run(code: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)


@pytest.mark.parametrize("name", NAMES)
def test_a_missing_framework_is_named(name: str) -> None:
    code = f"""
import sys
sys.modules[{name!r}] = None  # import raises ModuleNotFoundError
import slidesparse_rt as ss
try:
    import slidesparse_rt.{name}
except ss.MissingPackage as error:
    assert isinstance(error, ImportError) and isinstance(error, ss.BackendUnavailable)
    print(error.name, "|", error)
try:
    ss.{name}
except ImportError as error:
    print("again")
print(ss.sparse_matmul.__name__)
"""
    found = run(code)
    assert found.returncode == 0, found.stderr
    first, again, rest = found.stdout.splitlines()
    assert first == (
        f"{name} | slidesparse_rt.{name} needs {name}, which is not installed; "
        f"pip install 'slidesparse-rt[{name}]'"
    )
    assert (again, rest) == ("again", "sparse_matmul")


def test_transformers_without_torch() -> None:
    found = run("import sys; sys.modules['torch'] = None; import slidesparse_rt.transformers")
    assert "slidesparse_rt.transformers needs torch, which is not installed" in found.stderr
    assert "slidesparse-rt[transformers]" in found.stderr


def test_versions_that_are_too_old(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch, "__version__", "2.3.1+cpu")
    with pytest.raises(
        ss.MissingPackage, match=r"needs torch 2\.4 or newer and found 2\.3\.1\+cpu"
    ):
        require("torch", "torch", (2, 4))
    monkeypatch.setattr(torch, "__version__", "2.10.0")
    assert require("torch", "torch", (2, 4)) is torch


def test_a_framework_that_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, words in (
        ("torch._C", "libfoo.so: cannot open shared object file"),
        ("numpy.extra", "No module named 'numpy.extra'"),
    ):

        def broken(module: str, name: str = name, words: str = words) -> Any:
            raise ImportError(words, name=name)

        with monkeypatch.context() as patch:
            patch.setattr(importlib, "import_module", broken)
            with pytest.raises(ss.MissingPackage, match=f"whose import failed: {re.escape(words)}"):
                require("torch", "torch", (2, 4))


def test_the_package_alone_loads_none_of_them() -> None:
    loaded = loaded_after("import slidesparse_rt as ss; dir(ss); from slidesparse_rt import *")
    assert loaded.isdisjoint(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_one_integration_does_not_load_the_others(name: str) -> None:
    loaded = loaded_after(
        f"import warnings; warnings.simplefilter('default')\nimport slidesparse_rt.{name}"
    )
    others = {"torch": {"transformers", "jax"}, "transformers": {"jax"}, "jax": {"torch"}}
    assert name in loaded
    assert loaded.isdisjoint(others[name])
