"""Benchmarks that a sceptic would accept: both sides in one run, outputs checked, all recorded.

``gemm``, ``quantize`` and ``overhead`` measure; ``record`` says what surrounds the numbers and
writes them; ``checks`` refuses numbers whose outputs are wrong.  Nothing here runs on import.
"""

from __future__ import annotations
