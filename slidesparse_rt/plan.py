"""SparseGemmPlan: prepare a weight once, multiply by it often."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Any

import numpy as np

from .arrays import (
    CPU,
    Device,
    NDArray,
    device_of,
    library_of,
    refuse_autograd,
    to_numpy,
    wrap_numpy,
    writable_numpy,
)
from .backends import Choice, check_options, choose, needs_gpu
from .backends.base import RawWeight
from .bound import BoundOnCpu, BoundRun
from .dtypes import ArrayType, Operand, array_type
from .errors import ArrayError, DeviceError, OptionError, PlanClosed, ShapeError
from .intake import checked_bias, intake, problem_of, readable
from .options import PlanOptions, checked_x_scale
from .packing.weight import SparseWeight
from .pattern import Pattern
from .tuning.select import Selected, check_tuning, select

__all__ = ["SparseGemmPlan", "sparse_matmul"]


class SparseGemmPlan:
    """A weight, checked, quantized and packed, ready to multiply: ``y = x @ weight.T + bias``.

    Parameters
    ----------
    weight:
        Shape (N, K), float32, float16 or bfloat16, of any library, on the CPU (any strides) or on
        the plan's GPU (contiguous rows), fitting ``pattern``; or a
        :class:`~slidesparse_rt.SparseWeight`, which brings pattern and dtype.
    pattern:
        "2:4", "4:6", "6:8", ... or "dense"; see :class:`~slidesparse_rt.Pattern`.
    dtype:
        Operand format: "int8" (the default), "fp8_e4m3", "bf16" or "fp16".
    bias:
        Shape (N,), added in float32; or ``None``.
    out_dtype:
        "float32", "float16" or "bfloat16"; ``None`` takes the type of each ``x``.
    x_scale:
        One scale for the activations of every token (static quantization), as calibration found it
        offline; a positive number that float32 holds, for "int8" and "fp8_e4m3".  ``None``: each
        token's own, measured in every run.
    backend:
        "auto", or the name of one backend, which then runs or raises: nothing is substituted.
    tuning:
        How "auto" chooses on a GPU (docs/tuning.md).  "cached": by times that were measured on such
        a GPU before, by ``slidesparse tune`` or a plan with "measure"; the plan may then hold the
        weight in several forms, one for few tokens and one for many.  By a rule where there are
        none.  "measure": measures now what is not yet, for seconds, and keeps the times.
        "heuristic": by the rule.
    device:
        Where the plan runs: "cpu", "cuda", "cuda:1"; ``None`` takes the weight's device, or the
        first GPU if ``backend`` needs one.
    options:
        :class:`~slidesparse_rt.PlanOptions`.

    Raises
    ------
    PatternError
        If the weight does not fit its pattern, or the pattern does not exist.
    NonFiniteError
        If weight or bias hold a NaN or an infinity.
    BackendUnavailable
        If no backend, or not the one asked for, can run this weight here; says why.
    DeviceMemoryError
        If the GPU is out of memory; nothing stays allocated.
    ShapeError, DTypeError, ArrayError, DeviceError, OptionError
        For arguments that are not as described.

    Notes
    -----
    Numerics are defined in docs/numerics.md and are the same for every backend; int8 results are
    identical to the bit, unless ``fuse_channel_scales`` is set in the options.  A plan may be used
    from several threads.  It is a context manager.
    """

    def __init__(
        self,
        weight: Any,
        pattern: str | Pattern | None = None,
        *,
        dtype: str | Operand | None = None,
        bias: Any = None,
        out_dtype: str | None = None,
        x_scale: float | None = None,
        backend: str = "auto",
        tuning: str = "cached",
        device: Any = None,
        options: PlanOptions | None = None,
    ) -> None:
        self._closed = True
        self._options = PlanOptions() if options is None else options
        if not isinstance(self._options, PlanOptions):
            raise OptionError(f"options is {options!r}; allowed is a PlanOptions or None")
        check_tuning(tuning, backend, self._options)
        self._out_type = None if out_dtype is None else array_type(out_dtype)
        home, source = intake(weight, pattern, dtype)
        target = source.dtype if isinstance(source, SparseWeight) else source.operand
        self._x_scale = None if x_scale is None else checked_x_scale(x_scale, target)
        if device is not None:
            self._device = Device.parse(device)
        else:
            # A GPU backend asked for by name runs on the first GPU, wherever the weight was.
            self._device = Device("cuda") if needs_gpu(backend) and home == CPU else home
        if home not in (CPU, self._device):
            raise DeviceError(
                f"weight is on {home}, but the plan is to run on {self._device}; move it"
            )
        self._requested = backend
        source = readable(source, home)
        self._problem = problem_of(source)
        choice: Choice = choose(backend, self._problem, self._device, self._options.keep_dense)
        check_options(self._options, self._problem, choice.backend.name)
        self._weight: SparseWeight | None = None
        if self._device == CPU and isinstance(source, RawWeight):
            source = SparseWeight.from_array(
                source.array, source.pattern, dtype=source.operand, threads=self._options.threads
            )
        if isinstance(source, SparseWeight):
            self._weight = source
        self._bias = checked_bias(bias, self._problem.n)
        self._selected: Selected = select(
            source,
            self._bias,
            self._problem,
            self._device,
            self._options,
            self._x_scale,
            choice=choice,
            asked=backend,
            tuning=tuning,
        )
        self._backend = choice.backend  # what runs on the CPU
        self._prepared = self._selected.prepared
        self._lock = threading.Lock()
        self._on_gpu = self._device != CPU
        if self._on_gpu:
            from .gpu_run import GpuRunner

            try:
                self._runner: Any = GpuRunner(
                    self._prepared,
                    self._problem,
                    self._device,
                    self._options,
                    self._selected.dispatch,
                )
            except BaseException:
                self._prepared.close()
                raise
        self._closed = False

    @property
    def weight(self) -> SparseWeight | None:
        """The quantized weight; ``None`` where it was quantized on a GPU and only packed there."""
        return self._weight

    @property
    def pattern(self) -> Pattern:
        """The weight's pattern."""
        return self._problem.pattern

    @property
    def dtype(self) -> str:
        """The operand format's name."""
        return self._problem.dtype.name

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K): output channels and inputs."""
        return self._problem.n, self._problem.k

    @property
    def device(self) -> str:
        """Where the plan runs: "cpu" or "cuda:<index>"."""
        return str(self._device)

    @property
    def backend(self) -> str:
        """Name of the backend that runs; where several take turns, their names joined by "+"."""
        return "+".join(self.backends)

    @property
    def backends(self) -> tuple[str, ...]:
        """Names of the backends for which the plan holds the weight."""
        return self._selected.backends

    def backend_for(self, tokens: int) -> str:
        """Name of the backend that runs for ``tokens`` tokens (M); OptionError for less than 0."""
        _check_tokens("tokens is", tokens, 0)
        return self._selected.at(tokens)

    @property
    def timings(self) -> Mapping[int, Mapping[str, float]] | None:
        """The measured times that the choice was made by; ``None`` where a rule chose.

        Tokens -> backend -> microseconds of a run, bfloat16 in and out.
        """
        table = self._selected.table
        return None if table is None else table.times

    @property
    def nbytes(self) -> int:
        """Bytes that the plan holds: packed weight, scales, bias, and a workspace of its own."""
        if self._closed:
            return 0
        if self._device == CPU:
            return int(self._prepared.nbytes) + (0 if self._weight is None else self._weight.nbytes)
        return int(self._prepared.nbytes) + int(self._runner.nbytes)

    def run(self, x: Any, *, out: Any = None, stream: Any = None) -> Any:
        """Multiply: ``y = x @ weight.T + bias``.

        Parameters
        ----------
        x:
            Shape (..., K), float32, float16 or bfloat16, on the plan's device.  On the CPU with any
            strides; on a GPU each row must be contiguous and rows evenly apart.
            A token (a row of K) that holds a NaN or an infinity gives a row of NaN, and changes no
            other row.
        out:
            Shape (..., N), of the result's type, writable, not overlapping x; ``None`` allocates
            one of x's kind, from its own library.
        stream:
            CUDA stream for a plan on a GPU: an address, or an object with ``__cuda_stream__``;
            ``None`` takes the current stream of x's library.  It waits for that one; what reads the
            result on another stream must wait for it.  Must be ``None`` on the CPU.

        Returns
        -------
        array
            ``out``, or a new array of x's kind, shape (..., N).

        Raises
        ------
        PlanClosed
            After :meth:`close`.
        CaptureError
            If a CUDA graph is being captured and the plan was not prepared for this many tokens.
        DeviceMemoryError
            If there is no memory for workspace or result; the plan stays usable.
        ShapeError, DTypeError, ArrayError, DeviceError, OptionError
            For arguments that are not as described.

        Notes
        -----
        On a GPU the call returns when the work is launched.  The first run for a number of tokens
        may search for the fastest algorithm, which takes a moment; :meth:`prepare` does it ahead.
        """
        if self._closed:
            raise PlanClosed("this plan is closed; make a new SparseGemmPlan")
        if self._on_gpu:
            return self._runner.run(x, self._out_type, out, stream)
        if stream is not None:
            raise _stream_on_cpu()
        return self._run_on_cpu(x, out)

    def bind(self, x: Any, out: Any = None, *, stream: Any = None, graph: bool = False) -> BoundRun:
        """Check and look up everything for runs with fixed buffers; nothing is launched yet.

        ::

            step = plan.bind(x, y)
            step()    # as plan.run(x, out=y), with what is in x by then; returns y

        For decoding loops and captured graphs, where the same buffers come again and again: on a
        GPU a call is a lock and the launches; with ``graph=True`` one launch of all kernels.

        Parameters
        ----------
        x, stream:
            As in :meth:`run`.  ``None`` takes the current stream of x's library at each call; any
            other waits for that one at each call.
        out:
            As in :meth:`run`; ``None`` makes one of x's kind, uninitialized until the first call.
        graph:
            Whether the first call that is not captured records the launches as a CUDA graph, which
            calls on its stream launch from then on: less than half of the host's time, the same
            work on the GPU.  It takes about 120 KB of device memory, and a profiler may show the
            graph instead of its kernels.  While it records, and again when a larger run has moved
            the workspace, no other thread may wait for the whole device
            (``torch.cuda.synchronize()``): CUDA refuses that during any capture.  On the CPU it
            changes nothing.

        Returns
        -------
        BoundRun
            A callable without arguments, with attributes ``x`` and ``out``.  It keeps both arrays
            alive, reads x's data of the time of the call, overwrites ``out`` and returns it.

        Raises
        ------
        ArrayError
            As :meth:`run`; also where ``out`` is ``None`` and x is a JAX array, whose kind cannot
            be written twice.
        CaptureError
            If a CUDA graph is being captured: bind before that.
        PlanClosed, DeviceMemoryError, ShapeError, DTypeError, DeviceError, OptionError
            As :meth:`run`.

        Notes
        -----
        Calls may be captured in a CUDA graph, as runs may, and add their kernels to it: on the
        stream that was bound, or that :meth:`prepare` was called for; from any thread.  Several
        threads may call, and their calls are launched one after the other; all of them write the
        one ``out``.  What writes x and what
        reads ``out`` on other streams must be ordered by the caller.  The call raises PlanClosed
        once the plan is closed, and ArrayError once the memory of a tensor was exchanged.
        """
        if self._closed:
            raise PlanClosed("this plan is closed; make a new SparseGemmPlan")
        if not isinstance(graph, bool):
            raise OptionError(f"graph is {graph!r}; allowed are True and False")
        if self._on_gpu:
            bound: BoundRun = self._runner.bind(x, self._out_type, out, stream, graph=graph)
            return bound
        if stream is not None:
            raise _stream_on_cpu()
        view, shape, kind = self._read_on_cpu(x)
        if out is None:
            if library_of(x) == "jax":
                raise ArrayError(
                    "x is a JAX array, and a result of its kind is immutable, so no second call "
                    "could write it; pass an out= of another library, or call run()"
                )
            out = wrap_numpy(np.empty(shape, kind.dtype), x)
        writable_numpy(out, shape, kind, view)
        return BoundOnCpu(self.run, x, out)

    def prepare(
        self, tokens: Iterable[int], *, x_dtype: str = "bfloat16", stream: Any = None
    ) -> None:
        """Make everything ready for runs with these numbers of tokens; needed before a capture.

        Compiles kernels, searches algorithms and allocates workspace, for the calling thread and
        ``stream``, so that :meth:`run` with as many tokens neither allocates nor waits.  On the CPU
        there is nothing to prepare.

        Parameters
        ----------
        tokens:
            Numbers of tokens (M), each at least 1.
        x_dtype:
            Type of the activations to come.
        stream:
            As in :meth:`run`, and the one that will be captured; ``None`` is the legacy default
            stream, which cannot be.  Graphs that were captured on one stream share its workspace,
            with each other and with runs on it: let no two of them run at a time.

        Raises
        ------
        PlanClosed, DeviceMemoryError, OptionError, DTypeError, LibraryError
            As :meth:`run`.
        """
        if self._closed:
            raise PlanClosed("this plan is closed; make a new SparseGemmPlan")
        if not isinstance(tokens, Iterable):
            raise OptionError(
                f"tokens is {tokens!r}; allowed is a list of whole numbers from 1 on, such as "
                "tokens=[1, 64]"
            )
        wanted = list(tokens)
        for count in wanted:
            _check_tokens("tokens holds", count, 1)
        kind = array_type(x_dtype)
        if self._on_gpu:
            self._runner.prepare(wanted, kind, self._out_type or kind, stream)

    def explain(self) -> str:
        """What runs, where, why, and what was refused, for people.

        Where times were measured: for each number of tokens what runs and what each backend took,
        and the memory of each form of the weight.
        """
        n, k = self.shape
        pattern = self.pattern
        lines = [
            f"SparseGemmPlan {n} x {k}, pattern {pattern.name}, {self.dtype}, on {self._device}",
            f"  backend: {self.backend} (asked for: {self._requested}; {self._selected.why})",
            f"  K' = {pattern.slid_k(k)} after sliding, {float(pattern.expansion):.3f} x K; at "
            f"most {float(pattern.speed_bound):.3f} x dense speed on sparse tensor cores",
            f"  memory: {self.nbytes:,} bytes held",
        ]
        if self._x_scale is not None:
            lines.append(f"  activations: one scale for all tokens, {self._x_scale!s} (static)")
        if self._options.fuse_channel_scales:
            lines.append(
                "  channel scales: fused into the product, which rounds to bfloat16; results "
                "differ from the definition"
            )
        lines += self._selected.lines(closed=self._closed)
        if self._closed:
            lines.append("  closed")
        return "\n".join(lines)

    def close(self) -> None:
        """Give back what the plan holds; closing twice is allowed.

        On a GPU, runs that were launched are finished first; CUDA graphs that captured this plan
        must not run again, also once the plan is collected.
        """
        if self._closed:
            return
        with self._lock:
            if self._closed:
                return
            self._closed = True
        if self._on_gpu:
            self._runner.close()
        self._prepared.close()

    def __enter__(self) -> SparseGemmPlan:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        state = "closed" if self._closed else self.backend
        return (
            f"SparseGemmPlan({self.shape[0]} x {self.shape[1]}, {self.pattern.name}, "
            f"{self.dtype}, {self._device}, {state})"
        )

    def _read_on_cpu(self, x: Any) -> tuple[NDArray, tuple[int, ...], ArrayType]:
        """X as NumPy, and the result's shape and type."""
        refuse_autograd(x)
        device = device_of(x, "x")
        if device != CPU:
            raise DeviceError(
                f"x is on {device}, but the plan is on {self._device}; move x, or make the plan "
                f"with device={str(device)!r}"
            )
        view = to_numpy(x, "x")
        if view.ndim == 0 or view.shape[-1] != self._problem.k:
            raise ShapeError(
                f"x has shape {view.shape}; allowed is (..., {self._problem.k}): the last extent "
                f"is the weight's K"
            )
        shape = (*view.shape[:-1], self._problem.n)
        return view, shape, self._out_type or array_type(view.dtype)

    def _run_on_cpu(self, x: Any, out: Any) -> Any:
        view, shape, kind = self._read_on_cpu(x)
        target = None if out is None else writable_numpy(out, shape, kind, view)
        # A target that is no plain matrix is filled from one.
        direct = target is not None and target.flags.c_contiguous
        y = target if target is not None and direct else np.empty(shape, kind.dtype)
        rows = int(np.prod(shape[:-1], dtype=np.int64))
        self._launch(view.reshape(rows, self._problem.k), y.reshape(rows, self._problem.n), kind)
        if target is None:
            return wrap_numpy(y, x)
        if not direct:
            target[...] = y
        return out

    def _launch(self, x: NDArray, out: NDArray, kind: ArrayType) -> None:
        backend = self._backend
        config = backend.candidates(self._problem)[0]
        backend.launch(self._prepared, x, out, kind, None, 0, config)


def _check_tokens(what: str, count: object, least: int) -> None:
    """Raise OptionError for a number of tokens that there cannot be."""
    if isinstance(count, bool) or not isinstance(count, int) or count < least:
        raise OptionError(f"{what} {count!r}; allowed are whole numbers from {least} on")


def _stream_on_cpu() -> OptionError:
    return OptionError("stream is given, but this plan runs on the CPU; omit stream=")


def sparse_matmul(
    x: Any,
    weight: Any,
    pattern: str | Pattern | None = None,
    *,
    dtype: str | Operand | None = None,
    bias: Any = None,
    out_dtype: str | None = None,
    x_scale: float | None = None,
    out: Any = None,
    backend: str = "auto",
    options: PlanOptions | None = None,
    stream: Any = None,
) -> Any:
    """Multiply once: ``x @ weight.T + bias``; make a :class:`SparseGemmPlan` to multiply often.

    Takes the arguments of :class:`SparseGemmPlan`, save ``device`` (it runs where x is) and
    ``tuning`` ("auto" goes by the rule: measured times pay off for weights that are packed once),
    and those of :meth:`SparseGemmPlan.run`; raises their errors, and returns what ``run`` returns.
    """
    with SparseGemmPlan(
        weight,
        pattern,
        dtype=dtype,
        bias=bias,
        out_dtype=out_dtype,
        x_scale=x_scale,
        backend=backend,
        tuning="heuristic",
        device=None if needs_gpu(backend) and device_of(x, "x") == CPU else device_of(x, "x"),
        options=options,
    ) as plan:
        return plan.run(x, out=out, stream=stream)
