"""The main job on real input: a pretrained model's layers pruned, packed and run through plans.

:func:`run_demo` takes the sentence encoder all-MiniLM-L6-v2, prunes all its linear layers to each
pattern, packs them for each operand type, runs the model over real sentences with every linear
layer computed by a :class:`~slidesparse_rt.plan.SparseGemmPlan`, and measures what each step cost
against the dense float32 model.  Rows with pattern "dense" show what the operand type costs
without pruning, rows with type "float32" what pruning costs without quantization.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import TypeVar

import numpy as np

from ..arrays import Device
from ..backends.machine import gpu_refusal
from ..dtypes import Operand, operand
from ..errors import OptionError
from ..options import PlanOptions, worker_count
from ..packing import SparseWeight, prune
from ..packing.quantize import quantize_tokens
from ..packing.slide import lift_rows, slide_rows, unslide_rows
from ..pattern import Pattern
from ..plan import SparseGemmPlan
from .minilm import Float32, MiniLM, Tokens
from .report import DemoReport, Exactness, Row, compare
from .sentences import SENTENCES

__all__ = ["DemoReport", "run_demo"]

T = TypeVar("T")
Progress = Callable[[str, int, int], None]

#: Times are the best of so many: what else runs on the machine only ever makes one longer.
_REPEATS = 2

_DENSE = Pattern.parse("dense")


def run_demo(
    *,
    patterns: Sequence[str] = ("2:4", "4:6", "6:8", "8:10"),
    dtypes: Sequence[str] = ("int8", "fp8_e4m3"),
    threads: int | None = None,
    progress: Progress | None = None,
    device: str | None = None,
) -> DemoReport:
    """Prune, pack and run the pretrained model for every pattern and dtype, and check the results.

    Parameters
    ----------
    patterns:
        Patterns to prune to; "dense" is always run as the control and need not be named.
    dtypes:
        Operand formats with scales: "int8", "fp8_e4m3".
    threads:
        CPU threads for packing; ``None`` takes every core.
    progress:
        Called as ``progress(label, done, total)``: before each run with the run's name, and once
        at the end with ``done == total``.
    device:
        Where the plans run, as :class:`~slidesparse_rt.plan.SparseGemmPlan` takes it; ``None``
        takes the first GPU, or the CPU where there is none that can be used.

    Returns
    -------
    DemoReport
        Rows in the order: dense model, then each pattern in the order given; in each float32,
        then the dtypes.

    Raises
    ------
    BackendUnavailable
        When the weights, the tokenizer library or the device are not there; says how to get them.
    FormatError
        When the weights' files are damaged.
    PatternError, DTypeError, OptionError
        For a pattern, dtype or number of threads that does not exist, or a dtype without scales.
    """
    began = time.perf_counter()
    operands = _operands(dtypes)
    # Each once, in the order given; the control first.
    wanted = list(dict.fromkeys([_DENSE, *(Pattern.parse(name) for name in patterns)]))
    workers = worker_count(threads)
    report = progress if progress is not None else _silent
    total = len(wanted) * (1 + len(operands))

    report("load", 0, total)
    model = MiniLM.load()
    tokens = model.tokenize(SENTENCES)
    bench = _Bench(model, tokens, PlanOptions(threads=workers), device)
    bench.warm_up(wanted, operands)
    rows: list[Row] = []
    for pattern in wanted:
        report(f"{pattern} float32", len(rows), total)
        rows.append(bench.run_float32(pattern))
        for row in operands:
            report(f"{pattern} {row.name}", len(rows), total)
            rows.append(bench.run_packed(pattern, row))
    report("done", total, total)
    return DemoReport(
        model="all-MiniLM-L6-v2",
        linears=len(model.linears),
        sentences=len(SENTENCES),
        tokens=int(tokens.ids.size),
        rows=tuple(rows),
        machine=(
            f"{platform.system()} {platform.machine()}, {workers} CPU threads, "
            f"Python {platform.python_version()}, NumPy {np.__version__}"
        ),
        seconds=time.perf_counter() - began,
    )


def _silent(label: str, done: int, total: int) -> None:
    """The progress callback of a caller who wants none."""


def _operands(dtypes: Sequence[str]) -> list[Operand]:
    rows = list(dict.fromkeys(operand(name) for name in dtypes))
    for row in rows:
        if not row.scaled:
            raise OptionError(
                f"the demo has no dtype {row.name!r}: it checks that products are exact, which "
                f"only the scaled types are; allowed are 'int8' and 'fp8_e4m3'"
            )
    return rows


class _Bench:
    """The model, its dense results, and the runs that are measured against them."""

    def __init__(
        self, model: MiniLM, tokens: Tokens, options: PlanOptions, device: str | None
    ) -> None:
        self._model = model
        self._tokens = tokens
        self._options = options
        self._device = _usable() if device is None else str(Device.parse(device))
        self._hidden = model.hidden(tokens)
        self._embedded = model.pool(self._hidden, tokens)
        self._pruned: dict[str, Float32] = {}
        self._pruned_for: Pattern | None = None
        self._prune_seconds = 0.0
        self._kept = 1.0

    def warm_up(self, patterns: Sequence[Pattern], operands: Sequence[Operand]) -> None:
        """Prune and pack one layer for everything that will be timed, so that code is compiled."""
        name = self._model.linears[0]
        for pattern in patterns:
            weight = self._prune_one(name, pattern)
            for row in operands:
                self._plan(name, self._pack(weight, pattern, row)).close()

    def run_float32(self, pattern: Pattern) -> Row:
        """The pruned model in plain float32: what pruning costs by itself."""
        self._prune(pattern)
        model = self._model

        def linear(name: str, x: Float32) -> Float32:
            result: Float32 = x @ self._pruned[name].T + model.tensors[f"{name}.bias"]
            return result

        hidden, seconds = _timed(lambda: model.hidden(self._tokens, linear))
        return self._row(
            pattern,
            "float32",
            hidden=hidden,
            exactness=None,
            pack_seconds=self._prune_seconds,
            run_seconds=seconds,
            backend="NumPy",
        )

    def run_packed(self, pattern: Pattern, row: Operand) -> Row:
        """The pruned model with every linear layer packed and computed by a plan, and the check."""
        self._prune(pattern)
        model = self._model
        calls: list[tuple[str, Float32, Float32]] = []
        with ExitStack() as stack:
            weights, pack_seconds = _timed(
                lambda: {n: self._pack(self._pruned[n], pattern, row) for n in model.linears}
            )
            plans, plan_seconds = _timed(
                lambda: {n: stack.enter_context(self._plan(n, weights[n])) for n in model.linears}
            )

            def linear(name: str, x: Float32) -> Float32:
                y = _multiply(plans[name], x)
                calls.append((name, x, y))
                return y

            hidden, seconds = _timed(lambda: model.hidden(self._tokens, linear))
            backends = sorted({plan.backend for plan in plans.values()})
        checks = [
            check_layer(weights[name], model.tensors[f"{name}.bias"], x, y)
            for name, x, y in calls[-len(model.linears) :]  # those of the pass that is measured
        ]
        exactness = Exactness(
            layers=len(checks),
            restored=sum(check.restored for check in checks),
            same_product=sum(check.same_product for check in checks),
            same_result=sum(check.same_result for check in checks),
            difference=max(check.difference for check in checks),
        )
        return self._row(
            pattern,
            row.name,
            hidden=hidden,
            exactness=exactness,
            pack_seconds=self._prune_seconds + pack_seconds + plan_seconds,
            run_seconds=seconds,
            backend=", ".join(backends),
        )

    def _prune_one(self, name: str, pattern: Pattern) -> Float32:
        weight = self._model.tensors[f"{name}.weight"]
        if pattern == _DENSE:
            return weight
        pruned: Float32 = prune(weight, pattern, threads=self._options.threads)
        return pruned

    def _prune(self, pattern: Pattern) -> None:
        """Prune all layers, unless that was the last thing done."""
        if self._pruned_for == pattern:
            return
        self._pruned, self._prune_seconds = _timed(
            lambda: {name: self._prune_one(name, pattern) for name in self._model.linears}
        )
        self._pruned_for = pattern
        size = sum(weight.size for weight in self._pruned.values())
        self._kept = sum(np.count_nonzero(weight) for weight in self._pruned.values()) / size

    def _pack(self, weight: Float32, pattern: Pattern, row: Operand) -> SparseWeight:
        return SparseWeight.from_array(
            weight, pattern, dtype=row.name, threads=self._options.threads
        )

    def _plan(self, name: str, weight: SparseWeight) -> SparseGemmPlan:
        bias = self._model.tensors[f"{name}.bias"]
        return SparseGemmPlan(weight, bias=bias, device=self._device, options=self._options)

    def _row(
        self,
        pattern: Pattern,
        dtype: str,
        *,
        hidden: Float32,
        exactness: Exactness | None,
        pack_seconds: float,
        run_seconds: float,
        backend: str,
    ) -> Row:
        embedded = self._model.pool(hidden, self._tokens)
        return Row(
            pattern=pattern.name,
            dtype=dtype,
            kept=self._kept,
            accuracy=compare(hidden, embedded, self._hidden, self._embedded),
            exactness=exactness,
            pack_seconds=pack_seconds,
            run_seconds=run_seconds,
            backend=backend,
        )


def _usable() -> str:
    """The first GPU, if this machine has all that a plan needs there; else the CPU."""
    gpu = Device("cuda")
    return "cpu" if gpu_refusal(("cublasLt", "nvrtc"), gpu) else str(gpu)


def _multiply(plan: SparseGemmPlan, x: Float32) -> Float32:
    """Run the plan where it is; the rest of the model is NumPy's, so arrays travel both ways."""
    if plan.device == "cpu":
        y: Float32 = plan.run(x)
        return y
    import cupy

    index = Device.parse(plan.device).index
    with cupy.cuda.Device(index):
        back: Float32 = plan.run(cupy.asarray(x)).get()
    return back


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    """What ``work`` returned the last time, and the seconds of its fastest time."""
    seconds = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        result = work()
        seconds.append(time.perf_counter() - start)
    return result, min(seconds)


def check_layer(weight: SparseWeight, bias: Float32, x: Float32, y: Float32) -> Exactness:
    """Check one layer on the activations that it met.

    Parameters
    ----------
    weight:
        The packed layer, (N, K).
    bias:
        (N,) float32.
    x, y:
        (M, K) float32 that the plan was given, and (M, N) float32 that it returned.

    Sums of int8 and fp8 products are exact in float64 in any order: see ``max_k`` in
    :mod:`slidesparse_rt.dtypes`.  So they are compared for equality, with no tolerance.  The slid
    product is computed here because the reference backend, the definition that others are held
    against, multiplies the weight as it was before sliding.
    """
    values, pattern = weight.values, weight.pattern
    quantized, token_scales = quantize_tokens(x, weight.dtype)
    slid = slide_rows(values, pattern, "weight")
    restored = unslide_rows(slid, pattern, weight.k)
    product = quantized.astype(np.float64) @ values.astype(np.float64).T
    lifted = lift_rows(quantized, pattern)
    slid_product = lifted.astype(np.float64) @ slid.astype(np.float64).T
    # docs/numerics.md: float32, in this order.
    expected = product.astype(np.float32)
    if token_scales is not None and weight.scales is not None:
        expected = expected * token_scales[:, None] * weight.scales
    expected += bias
    largest = float(np.abs(expected).max())
    return Exactness(
        layers=1,
        # Bits, so that a zero that changed its sign is seen too.
        restored=int(np.array_equal(restored.view(np.uint8), values.view(np.uint8))),
        same_product=int(np.array_equal(slid_product, product)),
        same_result=int(np.array_equal(y, expected)),
        difference=float(np.abs(y - expected).max()) / (largest or 1.0),
    )
