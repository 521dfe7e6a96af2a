"""Measure what runs of a SparseGemmPlan, bound ones and bare launches cost on the host, and where
that time goes.

The same as ``slidesparse bench overhead --profile``; it takes that command's options
(``--help`` lists them) and needs a GPU.
"""

from __future__ import annotations

import sys

from slidesparse_rt.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "overhead", "--profile", *sys.argv[1:]]))
