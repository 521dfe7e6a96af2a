"""Calls that others make, which ``slidesparse bench overhead`` times beside those of plans."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import numpy as np

from ..arrays import NDArray
from ..packing.quantize import quantize_tokens
from ..pattern import Pattern

__all__ = ["Calls", "driver_calls", "drop_last", "torch_calls"]

#: (call, dtype, what makes it)
Calls: TypeAlias = Sequence[tuple[str, str, Callable[[], object]]]

_BF16 = "bfloat16"
#: What measures nothing but a launch is of no format.
_ANY = "any"


def drop_last(weight: NDArray, pattern: Pattern) -> None:
    """Make a weight fit its pattern in place: the last inputs of every group become zeros.

    Host time does not depend on which ones they are.
    """
    for position in range(pattern.keep, pattern.group):
        weight[:, position :: pattern.group] = 0


def driver_calls(index: int) -> Calls:
    """Launches of a kernel that finds nothing to do, on the legacy default stream.

    Through ctypes, as plans launch: with eleven arguments, with four that stay, and two of these
    of which the second may begin early, as the backend "hopper" launches its two kernels; and those
    two as one graph, as a bound run launches them.  A call that launches nothing tells how much of
    it is ctypes.
    """
    from ..kernels.fixed import FixedLaunch, starts_early
    from ..kernels.launch import QUANTIZE_ARGUMENTS, Launch, Quantizer
    from ..kernels.loader import kernels_of
    from ..kernels.recording import Recording

    kernels = kernels_of(index)
    quantizer = Quantizer(kernels, 64, _BF16, "int8", Pattern.parse("6:8"), 96)
    config, cuda = quantizer.config, kernels.cuda
    shape = (1, config.threads, 1, config.shared_bytes)
    # No rows: it reads and writes no array.
    nothing = (*[0] * 9, 64, config.stage_bytes, config.tile)
    packed = Launch(cuda, quantizer.kernel, QUANTIZE_ARGUMENTS)
    fixed, early = (
        FixedLaunch(cuda, quantizer.kernel, QUANTIZE_ARGUMENTS, shape, nothing, early=option)
        for option in (False, starts_early(cuda))
    )

    def checked(*launches: FixedLaunch) -> Callable[[], None]:
        def run() -> None:
            for one in launches:
                status = one.run()
                if status:
                    raise one.error(status)

        return run

    def set_stream(stream: int) -> None:
        for one in (fixed, early):
            one.set_stream(stream)

    def launch_both(stream: int) -> None:
        set_stream(stream)
        checked(fixed, early)()

    with kernels.current():
        recording = Recording(cuda, launch_both)
    set_stream(0)
    graph = recording.on(0)

    def repeat() -> None:
        status = graph()
        if status:
            raise recording.error(status)

    version = ctypes.c_int(0)
    ask = cuda.repeated("cuDriverGetVersion", ctypes.byref(version))
    return [
        ("cuDriverGetVersion", _ANY, ask),
        (
            "cuLaunchKernel",
            _ANY,
            lambda: packed(1, config.threads, 1, config.shared_bytes, 0, *nothing),
        ),
        ("cuLaunchKernelEx", _ANY, checked(fixed)),
        ("cuLaunchKernelEx twice, the second early", _ANY, checked(fixed, early)),
        ("cuGraphLaunch of these two", _ANY, repeat),
    ]


def torch_calls(m: int, n: int, k: int, index: int) -> Calls:
    """PyTorch's own products of the same size.

    ``torch._cslt_sparse_mm`` is cuSPARSELt with 2:4 weights, ``torch._scaled_mm`` is cuBLASLt's fp8
    with token and channel scales, ``torch.mm`` its bf16.
    """
    import torch

    device = torch.device("cuda", index)
    values = np.random.default_rng(4).standard_normal((n + m, k), dtype=np.float32)
    drop_last(values[:n], Pattern.parse("2:4"))
    numbers = torch.from_numpy(values).to(device)
    weight, x = numbers[:n].to(torch.bfloat16), numbers[n:].to(torch.bfloat16)
    y = torch.empty((m, n), dtype=torch.bfloat16, device=device)
    columns = weight.t()
    made: list[tuple[str, str, Callable[[], object]]] = [
        ("torch.mm", "bf16", lambda: torch.mm(x, columns)),
        ("torch.mm out=", "bf16", lambda: torch.mm(x, columns, out=y)),
    ]

    def later(make: Callable[[], Callable[[], object]]) -> Callable[[], object]:
        """Prepare at the first call, so that what a version lacks is seen where it is measured."""
        ready: list[Callable[[], object]] = []

        def call() -> object:
            if not ready:
                ready.append(make())
            return ready[0]()

        return call

    def quantized(target: str) -> tuple[Any, Any]:
        # Through NumPy, so that no kernel of PyTorch is needed for the conversion.
        rows, _ = quantize_tokens(values, target)
        bits = torch.from_numpy(np.ascontiguousarray(rows).view(np.int8)).to(device)
        typed = bits if target == "int8" else bits.view(torch.float8_e4m3fn)
        return typed[:n], typed[n:]

    def scaled_mm() -> Callable[[], object]:
        w8, x8 = quantized("fp8_e4m3")
        by_token = torch.ones((m, 1), dtype=torch.float32, device=device)
        by_channel = torch.ones((1, n), dtype=torch.float32, device=device)
        w8_columns = w8.t()
        return lambda: torch._scaled_mm(
            x8, w8_columns, scale_a=by_token, scale_b=by_channel, out_dtype=torch.bfloat16
        )

    made.append(("torch._scaled_mm", "fp8_e4m3", later(scaled_mm)))

    def sparse_mm(target: str) -> Callable[[], Callable[[], object]]:
        def make() -> Callable[[], object]:
            w2, x2 = (weight, x) if target == "bf16" else quantized(target)
            packed = torch._cslt_compress(w2)
            x_columns = x2.t()
            out = None if target == "bf16" else torch.bfloat16
            return lambda: torch._cslt_sparse_mm(
                packed, x_columns, out_dtype=out, transpose_result=True
            )

        return make

    for target in ("int8", "fp8_e4m3", "bf16"):
        made.append(("torch._cslt_sparse_mm", target, later(sparse_mm(target))))
    return made
