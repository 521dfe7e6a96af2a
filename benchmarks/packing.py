"""Measure packing on the CPU: check, prune, and prune + quantize + slide.

The same as ``slidesparse bench packing``; it takes that command's options (``--help`` lists them).
"""

from __future__ import annotations

import sys

from slidesparse_rt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "packing", *sys.argv[1:]]))
