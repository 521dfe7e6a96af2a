"""Pruning, checking, quantizing and sliding weights: NumPy and Numba, no GPU."""

from .check import PatternReport, check_pattern, pattern_report
from .prune import prune
from .quantize import quantize, quantize_tokens
from .slide import lift, slide, unslide
from .tensorfile import TensorFile, write_file
from .weight import SparseWeight

__all__ = [
    "PatternReport",
    "SparseWeight",
    "TensorFile",
    "check_pattern",
    "lift",
    "pattern_report",
    "prune",
    "quantize",
    "quantize_tokens",
    "slide",
    "unslide",
    "write_file",
]
