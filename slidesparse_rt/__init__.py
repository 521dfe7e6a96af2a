"""Run (2N-2):2N sparse weights on 2:4 sparse tensor cores, from any array library.

::

    import slidesparse_rt as ss

    w = ss.prune(dense_weight, "6:8")            # keep the largest 6 of every 8 weights
    plan = ss.SparseGemmPlan(w, pattern="6:8")   # check, quantize, pack: once
    y = plan.run(x)                              # torch in, torch out; jax in, jax out; ...

Importing this package imports nothing else of weight: names are resolved on first use.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from ._version import __version__

if TYPE_CHECKING:
    from .bound import BoundRun as BoundRun
    from .errors import ArrayError as ArrayError
    from .errors import BackendUnavailable as BackendUnavailable
    from .errors import CaptureError as CaptureError
    from .errors import CompileError as CompileError
    from .errors import DeviceError as DeviceError
    from .errors import DeviceMemoryError as DeviceMemoryError
    from .errors import DTypeError as DTypeError
    from .errors import FormatError as FormatError
    from .errors import LibraryError as LibraryError
    from .errors import MissingPackage as MissingPackage
    from .errors import NonFiniteError as NonFiniteError
    from .errors import OptionError as OptionError
    from .errors import PatternError as PatternError
    from .errors import PlanClosed as PlanClosed
    from .errors import ShapeError as ShapeError
    from .errors import SlideSparseError as SlideSparseError
    from .options import PlanOptions as PlanOptions
    from .packing import SparseWeight as SparseWeight
    from .packing import lift as lift
    from .packing import quantize as quantize
    from .packing import slide as slide
    from .packing import unslide as unslide
    from .pattern import PATTERNS as PATTERNS
    from .pattern import Pattern as Pattern
    from .plan import SparseGemmPlan as SparseGemmPlan
    from .plan import sparse_matmul as sparse_matmul
    from .weights import check_pattern as check_pattern
    from .weights import prune as prune
    from .workspace import Workspace as Workspace

# Public name -> module that holds it.
_HOMES = {
    **dict.fromkeys(
        (
            "ArrayError",
            "BackendUnavailable",
            "CaptureError",
            "CompileError",
            "DTypeError",
            "DeviceError",
            "DeviceMemoryError",
            "FormatError",
            "LibraryError",
            "MissingPackage",
            "NonFiniteError",
            "OptionError",
            "PatternError",
            "PlanClosed",
            "ShapeError",
            "SlideSparseError",
        ),
        "errors",
    ),
    "BoundRun": "bound",
    "PATTERNS": "pattern",
    "Pattern": "pattern",
    "PlanOptions": "options",
    **dict.fromkeys(
        ("SparseWeight", "lift", "quantize", "slide", "unslide"),
        "packing",
    ),
    "SparseGemmPlan": "plan",
    "sparse_matmul": "plan",
    "check_pattern": "weights",
    "prune": "weights",
    "Workspace": "workspace",
}

# Modules that import a framework: not in __all__, so that nothing but their own name loads them.
_INTEGRATIONS = ("jax", "torch", "transformers")

__all__ = ["__version__", *sorted(_HOMES)]  # noqa: PLE0604  (the table above is the list)


def __getattr__(name: str) -> object:
    home = _HOMES.get(name)
    if name in _INTEGRATIONS:
        return importlib.import_module(f"{__name__}.{name}")
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
