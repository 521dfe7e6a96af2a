"""Importing the package is quick, and imports nothing of weight."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys

import pytest

import slidesparse_rt as ss

HEAVY = (
    "cupy",
    "torch",
    "jax",
    "jaxlib",
    "numba",
    "llvmlite",
    "cuda",
    "safetensors",
    "typer",
    "rich",
)


def run(code: str) -> str:
    """What ``code`` prints in a process of its own."""
    found = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=False
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def loaded_after(code: str) -> set[str]:
    """Top-level modules that are loaded after ``code``."""
    listing = run(f"import sys, json\n{code}\nprint(json.dumps([*sys.modules]))")
    return {name.partition(".")[0] for name in json.loads(listing)}


def test_import_loads_nothing_of_weight() -> None:
    assert loaded_after("import slidesparse_rt").isdisjoint(HEAVY)


def test_every_public_name_resolves_without_a_framework() -> None:
    code = "import slidesparse_rt as ss\nfor name in ss.__all__: getattr(ss, name)"
    assert loaded_after(code).isdisjoint(HEAVY)


def test_numpy_in_numpy_out_loads_no_framework() -> None:
    code = """
import numpy as np
import slidesparse_rt as ss
w = ss.prune(np.ones((4, 8), np.float32), "6:8")
assert isinstance(ss.sparse_matmul(np.ones((2, 8), np.float32), w, "6:8"), np.ndarray)
"""
    assert loaded_after(code).isdisjoint({"torch", "jax", "jaxlib", "cupy"})


def test_import_takes_less_than_150_ms() -> None:
    code = """
import time
start = time.perf_counter()
import slidesparse_rt
print(time.perf_counter() - start)
"""
    seconds = [float(run(code)) for _ in range(5)]
    assert statistics.median(seconds) < 0.150, seconds


def test_every_name_in_all_is_what_it_says() -> None:
    assert len(set(ss.__all__)) == len(ss.__all__)
    for name in ss.__all__:
        value = getattr(ss, name)
        assert value is getattr(ss, name)
        if isinstance(value, type):
            assert value.__name__ == name
    assert issubclass(ss.PatternError, ss.SlideSparseError)
    assert ss.__version__


def test_all_error_classes_are_public() -> None:
    from slidesparse_rt import errors

    kinds = {
        name
        for name, value in vars(errors).items()
        if isinstance(value, type) and issubclass(value, Exception)
    }
    assert kinds <= set(ss.__all__)


def test_dir_lists_every_public_name() -> None:
    names = json.loads(run("import slidesparse_rt as ss, json\nprint(json.dumps(dir(ss)))"))
    assert set(ss.__all__) <= set(names)
    assert names == sorted(names)
    assert set(ss.__all__) <= set(dir(ss))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'slidesparse_rt' has no attribute 'slice'"):
        ss.slice  # type: ignore[attr-defined]  # noqa: B018
    with pytest.raises(ImportError):
        from slidesparse_rt import no_such_name  # type: ignore[attr-defined]  # noqa: F401


def test_star_import() -> None:
    assert run("from slidesparse_rt import *\nprint(prune.__name__, SparseGemmPlan.__name__)") == (
        "prune SparseGemmPlan\n"
    )
