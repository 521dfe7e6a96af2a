"""``slidesparse bench overhead``: what a call costs on the host, whatever the GPU does.

Calls are made in batches on an idle GPU, and the host's clock is read before and after a batch;
then the GPU is waited for.  A batch is short enough that its launches fit the queue, so a slow GPU
does not hold the host up, and the problem is small.  A figure is the median (or the minimum) over
batches of the time of one call.  Garbage collection is off meanwhile, as in ``timeit``.

``SparseGemmPlan.run`` quantizes, multiplies and scales, and so does what ``SparseGemmPlan.bind``
returns; PyTorch's own calls, measured in the same run for scale, only multiply operands that are
quantized already.  Bare launches of a kernel that has nothing to do tell what is the driver's share
of all that: a run of the backend "hopper" launches two kernels, the second as here, and a bound run
launches them as one graph.
"""

from __future__ import annotations

import cProfile
import gc
import itertools
import pstats
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..arrays import NDArray
from ..dtypes import array_type, operand
from ..errors import OptionError, first_line
from ..pattern import Pattern
from .checks import check_result, exact, sample
from .overhead_calls import Calls, driver_calls, drop_last, torch_calls
from .record import FAILURES, Budget, Record, reason_of
from .sides import DENSE, SPARSE
from .timing import Gpu

__all__ = [
    "LIBRARIES",
    "HostTime",
    "OverheadSettings",
    "host_time",
    "profile_rows",
    "run_overhead",
]

#: Libraries without which nothing can be measured.
LIBRARIES = ("nvrtc",)
_BF16 = "bfloat16"
#: Rows of a profile that are kept.
_TOP = 15
_AUTO = "auto"
#: What measures nothing but a launch is of no backend.
_DRIVER = "driver"


@dataclass(frozen=True, kw_only=True, slots=True)
class OverheadSettings:
    """What to measure.

    Attributes
    ----------
    backends, dtypes, pattern:
        Of the plans.
    auto:
        Whether plans with ``backend="auto"`` are measured too, tuned, so that they find what runs
        for so many tokens as plans of users do.
    m, n, k:
        The problem, small.
    batches, calls:
        Batches, and calls of one batch.
    """

    backends: tuple[str, ...] = (*SPARSE, DENSE)
    dtypes: tuple[str, ...] = ("int8", "fp8_e4m3", "bf16")
    pattern: str = "6:8"
    auto: bool = True
    m: int = 32
    n: int = 1024
    k: int = 1024
    batches: int = 60
    calls: int = 50

    def __post_init__(self) -> None:
        for dtype in self.dtypes:
            operand(dtype)
        Pattern.parse(self.pattern)
        numbers = (self.m, self.n, self.k, self.batches, self.calls)
        if min(numbers) < 1 or self.calls > 100:
            raise OptionError(
                "sizes, batches and calls must be at least 1, and calls at most 100: more would "
                "fill the GPU's queue"
            )
        if self.k % 32 or self.n % 32 or self.m % 32:
            raise OptionError(
                f"m, n and k are {self.m}, {self.n} and {self.k}; allowed are multiples of 32, "
                "which PyTorch's calls ask for"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return {
            "backends": list(self.backends),
            "dtypes": list(self.dtypes),
            "pattern": self.pattern,
            "auto": self.auto,
            "m": self.m,
            "n": self.n,
            "k": self.k,
            "batches": self.batches,
            "calls": self.calls,
            "x": _BF16,
        }


@dataclass(frozen=True, slots=True)
class HostTime:
    """Microseconds of one call on the host, over batches."""

    median: float
    minimum: float


def host_time(
    call: Callable[[], object], wait: Callable[[], object], *, batches: int, calls: int
) -> HostTime:
    """Time ``call`` on the host; ``wait`` waits for the GPU between batches."""
    for _ in range(2 * calls):
        call()
    wait()
    found = []
    collecting = gc.isenabled()
    gc.disable()
    try:
        for _ in range(batches):
            begin = time.perf_counter_ns()
            for _ in range(calls):
                call()
            end = time.perf_counter_ns()
            wait()
            found.append((end - begin) / calls / 1e3)
    finally:
        if collecting:
            gc.enable()
    return HostTime(statistics.median(found), min(found))


def profile_rows(
    call: Callable[[], object], wait: Callable[[], object], *, batches: int, calls: int
) -> list[dict[str, Any]]:
    """Where the host's time goes, by function: the :data:`_TOP` with the most time of their own.

    Times are microseconds for one call; the profiler makes each Python function slower, so read
    them against each other.
    """
    profile = cProfile.Profile()
    for _ in range(batches):
        profile.enable()
        for _ in range(calls):
            call()
        profile.disable()
        wait()
    runs = batches * calls
    stats: Any = pstats.Stats(profile)
    entries = sorted(stats.stats.items(), key=lambda item: -item[1][2])[:_TOP]
    return [
        {
            "function": _function(*key),
            "calls": counts[1] / runs,
            "own_us": counts[2] / runs * 1e6,
            "total_us": counts[3] / runs * 1e6,
        }
        for key, counts in entries
    ]


def _function(file: str, line: int, name: str) -> str:
    """A function for people, without the folders of this machine."""
    if file == "~":
        return name
    parts = Path(file).parts
    if "slidesparse_rt" in parts:
        begin = len(parts) - 1 - parts[::-1].index("slidesparse_rt")
        return f"{'/'.join(parts[begin:])}:{line} {name}"
    return f"{'/'.join(parts[-2:])}:{line} {name}"


# --- arrays of the calling library ----------------------------------------------------------------


class TorchArrays:
    """PyTorch's arrays on one GPU."""

    name = "torch"

    def __init__(self, index: int) -> None:
        import torch

        self._torch = torch
        self._device = torch.device("cuda", index)

    def array(self, values: NDArray) -> Any:
        """A bfloat16 NumPy array on the GPU."""
        torch = self._torch
        bits = torch.from_numpy(np.ascontiguousarray(values).view(np.int16))
        return bits.to(self._device).view(torch.bfloat16)

    def host(self, array: Any) -> NDArray:
        """A bfloat16 GPU array as NumPy."""
        bits = array.cpu().contiguous().view(self._torch.int16).numpy()
        return np.asarray(bits).view(array_type(_BF16).dtype)

    def wait(self) -> None:
        """Wait for the GPU."""
        self._torch.cuda.synchronize(self._device)


class CupyArrays:
    """CuPy's arrays, where PyTorch is not installed or cannot use the GPU."""

    name = "cupy"

    def __init__(self, index: int) -> None:
        import cupy

        self._cupy = cupy
        self._device = cupy.cuda.Device(index)

    def array(self, values: NDArray) -> Any:
        """A bfloat16 NumPy array on the GPU."""
        made = self._cupy.empty(values.shape, values.dtype)
        made.set(np.ascontiguousarray(values))
        return made

    def host(self, array: Any) -> NDArray:
        """A bfloat16 GPU array as NumPy."""
        return np.asarray(array.get())

    def wait(self) -> None:
        """Wait for the GPU."""
        self._device.synchronize()


def arrays_on(index: int) -> TorchArrays | CupyArrays:
    """PyTorch's arrays if it can use the GPU, else CuPy's."""
    try:
        import torch
    except ImportError:
        return CupyArrays(index)
    return TorchArrays(index) if torch.cuda.is_available() else CupyArrays(index)


# --- the benchmark --------------------------------------------------------------------------------


def run_overhead(
    gpu: Gpu,
    settings: OverheadSettings,
    record: Record,
    *,
    budget: Budget,
    say: Callable[[str], None],
    done: Callable[[], None],
    arrays: Any = None,
    make_plan: Callable[..., Any] | None = None,
    others: Callable[..., Calls] | None = None,
    launches: Callable[[int], Calls] | None = None,
) -> None:
    """Measure every call and add its rows to ``record``.

    ``arrays``, ``make_plan``, ``others`` and ``launches`` stand in for the caller's library,
    SparseGemmPlan, :func:`~slidesparse_rt.bench.overhead_calls.torch_calls` and
    :func:`~slidesparse_rt.bench.overhead_calls.driver_calls` in tests; the rest is as for
    :func:`~slidesparse_rt.bench.gemm.run_gemm`.
    """
    if arrays is None:
        arrays = arrays_on(gpu.index)
    record.document["settings"]["library"] = arrays.name
    rng = np.random.default_rng(3)
    kind = array_type(_BF16).dtype
    x_host = rng.standard_normal((settings.m, settings.k), dtype=np.float32).astype(kind)
    w_host = rng.standard_normal((settings.n, settings.k), dtype=np.float32).astype(kind)
    drop_last(w_host, Pattern.parse(settings.pattern))
    x = arrays.array(x_host)
    backends = (*settings.backends, *((_AUTO,) if settings.auto else ()))
    for backend, dtype in itertools.product(backends, settings.dtypes):
        case = f"{backend} {dtype}"
        if budget.spent:
            record.leave_out(case, "time budget", "no time left")
        else:
            try:
                _measure_plan(
                    settings, record, backend, dtype, arrays, x, x_host, w_host, gpu, say, make_plan
                )
            except FAILURES as error:
                reason, why = reason_of(error)
                record.leave_out(case, reason, why)
                say(f"{case}: not reported, {reason}: {why}")
            record.save()
        if backend != _AUTO:  # whoever counts counts the backends
            done()
    for call, dtype, run in (launches or driver_calls)(gpu.index):
        _measure_other(settings, record, call, _DRIVER, dtype, run, arrays.wait, say)
    if arrays.name == "torch":
        for call, dtype, run in (others or torch_calls)(
            settings.m, settings.n, settings.k, gpu.index
        ):
            _measure_other(settings, record, call, "torch", dtype, run, arrays.wait, say)
    else:
        record.leave_out("PyTorch's calls", "unavailable", "PyTorch with CUDA is not installed")
    record.finish()


def _measure_plan(
    settings: OverheadSettings,
    record: Record,
    backend: str,
    dtype: str,
    arrays: Any,
    x: Any,
    x_host: NDArray,
    w_host: NDArray,
    gpu: Gpu,
    say: Callable[[str], None],
    make_plan: Callable[..., Any] | None,
) -> None:
    """One plan: runs with and without ``out=``, and a bound one; the output checked first."""
    from ..plan import SparseGemmPlan

    with (make_plan or SparseGemmPlan)(
        w_host,
        settings.pattern,
        dtype=dtype,
        backend=backend,
        device=f"cuda:{gpu.index}",
        tuning="measure" if backend == _AUTO else "cached",
    ) as plan:
        y = plan.run(x)
        bound, recorded = (
            plan.bind(x, arrays.array(np.zeros((settings.m, settings.n), x_host.dtype)), **options)
            for options in ({}, {"graph": True})
        )
        rows, channels = sample(settings.m, 8), sample(settings.n, 64)
        row = operand(dtype)
        sums = _BF16 if (backend, dtype) == ("cusparselt", "bf16") else "float32"
        wanted = exact(x_host[rows], w_host[channels], row)
        for case, found in (
            (f"{backend} {dtype}", y),
            (f"{backend} {dtype} bound", bound()),
            (f"{backend} {dtype} recorded", recorded()),
        ):
            check_result(arrays.host(found)[np.ix_(rows, channels)], wanted, case, sums_type=sums)
        calls: tuple[tuple[str, Callable[[], object]], ...] = (
            ("SparseGemmPlan.run out=None", lambda: plan.run(x)),
            ("SparseGemmPlan.run out=y", lambda: plan.run(x, out=y)),
            ("SparseGemmPlan.bind, each call", bound),
            ("SparseGemmPlan.bind graph=True, each call", recorded),
        )
        ran: dict[str, Any] = {}
        if backend == _AUTO:
            ran = {"ran": plan.backend_for(settings.m), "forms": list(plan.backends)}
        for call, run in calls:
            times = host_time(run, arrays.wait, batches=settings.batches, calls=settings.calls)
            profile = profile_rows(
                run,
                arrays.wait,
                batches=max(1, settings.batches // 3),
                calls=settings.calls,
            )
            record.add(_row(call, backend, dtype, times) | ran | {"profile": profile})
            say(
                f"{backend} {dtype} {call}: {times.median:.1f} us a call, at best "
                f"{times.minimum:.1f} us"
            )


def _measure_other(
    settings: OverheadSettings,
    record: Record,
    call: str,
    side: str,
    dtype: str,
    run: Callable[[], object],
    wait: Callable[[], object],
    say: Callable[[str], None],
) -> None:
    try:
        times = host_time(run, wait, batches=settings.batches, calls=settings.calls)
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        # A private call of PyTorch: not every version takes every type.
        why = first_line(error)
        record.leave_out(f"{call} {dtype}", "unavailable", f"{type(error).__name__}: {why}")
        say(f"{call} {dtype}: not available: {why}")
    else:
        record.add(_row(call, side, dtype, times))
        say(f"{call} {dtype}: {times.median:.1f} us a call, at best {times.minimum:.1f} us")
    record.save()


def _row(call: str, backend: str, dtype: str, times: HostTime) -> dict[str, Any]:
    return {
        "call": call,
        "backend": backend,
        "dtype": dtype,
        "median_us": times.median,
        "minimum_us": times.minimum,
    }
