"""Sparse linear layers for PyTorch; importing this module imports PyTorch.

::

    import slidesparse_rt.torch

    report = slidesparse_rt.torch.sparsify(model, pattern="6:8", dtype="int8")
    print(report)

Not to be confused with PyTorch's own ``torch``, which ``import torch`` always means.
"""

from .integrations.torch import (
    SlideSparseLinear,
    SparsifiedLayer,
    SparsifyReport,
    configure,
    fuse,
    prepare,
    release_weights,
    sparsify,
)

__all__ = [
    "SlideSparseLinear",
    "SparsifiedLayer",
    "SparsifyReport",
    "configure",
    "fuse",
    "prepare",
    "release_weights",
    "sparsify",
]
