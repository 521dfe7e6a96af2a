"""Whether cuSPARSELt multiplies fp16 correctly on a GPU, found out in a process of its own.

Some versions end in an illegal instruction on some GPUs, which spoils the CUDA context for good; so
the products run in a child process.  The answer is kept on disk by GPU, driver and library version.

Run as a module it is that child: it multiplies, compares, and exits with 0 if all is well.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import subprocess
import sys
from pathlib import Path

from ..kernels.compiler import default_directory
from ..user_cache import write_whole

__all__ = ["fp16_problem"]

_TIMEOUT_S = 120
#: Exit status of the child for a product that is wrong.
_WRONG = 3
#: (N, K, M) that are tried; square ones from 128 on were seen to fail.
_SHAPES = ((64, 128, 16), (128, 128, 128), (256, 512, 64), (1024, 1024, 1024))


@functools.cache
def fp16_problem(device: int, identity: tuple[str, ...]) -> str:
    """Return what is wrong with fp16 products on a GPU; an empty text if nothing is.

    Parameters
    ----------
    device:
        CUDA's number of the device.
    identity:
        What the answer depends on: GPU, driver and library versions.
    """
    kept = _kept(identity)
    if kept is not None:
        return kept
    command = [sys.executable, "-m", __name__, str(device)]
    try:
        child = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"its test could not be run: {error}"
    if child.returncode == 0:
        _keep(identity, "")
        return ""
    lines = (child.stderr or child.stdout).strip().splitlines() or [f"exit {child.returncode}"]
    answer = lines[-1][:300]
    # A GPU that was full, or a package that was not found, says nothing about the products.
    if child.returncode == _WRONG or "illegal" in answer.lower():
        _keep(identity, answer)
    return answer


def _file(identity: tuple[str, ...]) -> Path | None:
    folder = default_directory()
    if folder is None:
        return None
    digest = hashlib.sha256("\n".join(identity).encode()).hexdigest()[:32]
    return folder / f"fp16-{digest}.json"


def _kept(identity: tuple[str, ...]) -> str | None:
    path = _file(identity)
    try:
        found = json.loads(path.read_text()) if path is not None else None
    except (OSError, ValueError):
        return None
    if not isinstance(found, dict) or found.get("identity") != list(identity):
        return None
    answer = found.get("answer")
    return answer if isinstance(answer, str) else None


def _keep(identity: tuple[str, ...], answer: str) -> None:
    path = _file(identity)
    if path is None:
        return
    with contextlib.suppress(OSError):
        write_whole(path, json.dumps({"identity": list(identity), "answer": answer}).encode())


def _child(device: int) -> None:
    """Multiply each shape and compare with NumPy."""
    import cupy
    import numpy as np

    from ..backends.cusparselt import CusparseltBackend
    from ..device_arrays import on_device
    from ..dtypes import array_type, operand
    from ..options import PlanOptions
    from ..packing import prune
    from ..packing.weight import SparseWeight
    from ..pattern import Pattern
    from .gpu_device import gpu_device
    from .gpu_weight import GpuWeight
    from .workspace import Workspace

    backend, gpu, half = CusparseltBackend(), gpu_device(device), array_type("float16")
    pattern, row = Pattern.parse("2:4"), operand("fp16")
    with on_device(device):
        workspace = Workspace(gpu)
        for n, k, m in _SHAPES:
            rng = np.random.default_rng(0)
            weight = prune(rng.standard_normal((n, k)).astype(np.float16), pattern)
            x = rng.standard_normal((m, k)).astype(np.float16)
            held = GpuWeight.from_sparse(
                SparseWeight.from_array(weight, pattern, dtype=row), None, gpu, 0
            )
            prepared = backend.pack(held, PlanOptions(), 0)
            x_gpu, y_gpu = cupy.asarray(x), cupy.empty((m, n), np.float16)
            step = prepared.step(m, half, half, False, 0)
            step.launch(x_gpu.data.ptr, k, y_gpu.data.ptr, n, workspace, 0)
            y = y_gpu.get().astype(np.float64)
            wanted = x.astype(np.float64) @ weight.astype(np.float64).T
            error = np.abs(y - wanted).max() / np.abs(wanted).max()
            if not error < 2.0**-9:
                print(f"{m} x {n} x {k} is wrong by {error:.3g} of the largest result")
                raise SystemExit(_WRONG)
            prepared.close()


if __name__ == "__main__":
    _child(int(sys.argv[1]))
