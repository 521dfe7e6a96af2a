"""Measuring the backends of one weight against each other on a GPU.

What is timed is what a run costs the GPU: quantize and lift, multiply, and the second pass where
there is one, from bfloat16 to bfloat16.  It is captured as a CUDA graph, so that the host's speed
plays no part, and replayed in shuffled rounds (:func:`~slidesparse_rt.backends.timing.balanced`).
Where tokens are few the level-2 cache is emptied before every replay
(:mod:`~slidesparse_rt.backends.cold`).
"""

from __future__ import annotations

import contextlib
import datetime
import logging
import random
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from ..backends.cold import COLD_TOKENS, cold_cache, is_cold
from ..backends.gpu_device import working_on
from ..backends.gpu_forms import BROKEN, GpuForms
from ..backends.gpu_gemm import GpuPrepared, parts_of
from ..backends.gpu_step import Step
from ..backends.timing import balanced, captured, repeats_of, shuffled_rounds
from ..backends.workspace import Workspace
from ..dtypes import array_type, operand
from ..errors import DeviceMemoryError, OptionError, first_line
from .table import BUCKETS, FAILED, Table, buckets_up_to, coarse_first

__all__ = ["MeasureOptions", "Progress", "measure"]

_LOG = logging.getLogger(__name__)

#: Told what is measured next, how many numbers of tokens are done, and how many there are.
Progress = Callable[[str, int, int], None]

_BF16 = array_type("bfloat16")
_BF16_BYTES = _BF16.bits // 8
#: Microseconds that the rounds of one number of tokens take together, within these bounds.
_ROUNDS_US, _FEWEST_ROUNDS, _MOST_ROUNDS = 40_000.0, 7, 41
#: Microseconds of emptying the cache, roughly.
_FLUSH_US = 40.0
#: Microseconds of running ahead of what is timed, and at the very start, where clocks rise from
#: idle; and most replays.
_WARM_US, _START_US, _MOST_WARM = 3_000.0, 50_000.0, 5_000
#: Seconds of reading memory where fewer tokens come after more: long products bring clocks down to
#: what power allows, and for some 60 ms what comes next runs at these, some of it much slower.
_RECOVERY_S, _READS = 0.1, 100
_FIRST = 3
#: Numbers of tokens that are measured whatever the time: times of few tokens alone would decide for
#: many, and the first two are the smallest and the largest.
_LEAST = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class MeasureOptions:
    """How to measure.

    Attributes
    ----------
    most_tokens:
        The largest number of tokens, one of 1, 16, 32, 64, ... 32768.
    cold_tokens:
        Up to so many tokens the level-2 cache is emptied before each replay, for weights of
        :data:`~slidesparse_rt.backends.cold.COLD_BYTES` and more; 0: never; ``None``: as times that
        are kept were taken, or :data:`~slidesparse_rt.backends.cold.COLD_TOKENS`.
    rounds:
        Replays of each backend that are timed; ``None``: 7 to 41, as many as take 40 ms.
    seconds:
        After so long no further number of tokens is begun, but the smallest and the largest are
        always measured; ``None``: any time.
    """

    most_tokens: int = BUCKETS[-1]
    cold_tokens: int | None = None
    rounds: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        buckets_up_to(self.most_tokens)
        for name, value, least in (
            ("cold_tokens", self.emptied_up_to, 0),
            ("rounds", 1 if self.rounds is None else self.rounds, 1),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise OptionError(f"{name} is {value!r}; allowed is a whole number from {least} on")
        seconds = 0.0 if self.seconds is None else self.seconds
        number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
        if not number or not seconds >= 0:
            raise OptionError(f"seconds is {seconds!r}; allowed is None or a number from 0 on")

    @property
    def buckets(self) -> tuple[int, ...]:
        """The numbers of tokens to measure."""
        return buckets_up_to(self.most_tokens)

    @property
    def emptied_up_to(self) -> int:
        """``cold_tokens``, or what it is where nothing is kept."""
        return COLD_TOKENS if self.cold_tokens is None else self.cold_tokens


def measure(
    forms: GpuForms,
    workspace_limit: int,
    settings: MeasureOptions,
    *,
    buckets: Sequence[int] | None = None,
    progress: Progress | None = None,
) -> Table:
    """Time every form of a weight; waits until it is done.

    Parameters
    ----------
    forms:
        The weight, packed for each backend.  It stays so; algorithms are searched on the way.
    workspace_limit:
        As of :class:`~slidesparse_rt.PlanOptions`: longer runs are split, as a plan splits them.
    settings:
        How.
    buckets:
        Those of the numbers of tokens in ``settings`` to measure; ``None``: all.
    progress:
        Called before each number of tokens, and once at the end.

    Returns
    -------
    Table
        A backend that failed is in its ``refused``.  Numbers of tokens for which there was no
        memory, or no time, are left out.

    Raises
    ------
    DeviceMemoryError
        If there is no memory even for one token.
    LibraryError, BackendUnavailable, CompileError
        If every backend failed: the last one's.
    """
    with working_on(forms.device.index), contextlib.ExitStack() as held:
        wanted = settings.buckets
        if buckets is not None:
            wanted = tuple(tokens for tokens in wanted if tokens in set(buckets))
        return _Bench(forms, workspace_limit, settings, wanted, held).run(progress)


class _Bench:
    """Arrays, a stream, and everything that is timed on it."""

    def __init__(
        self,
        forms: GpuForms,
        workspace_limit: int,
        settings: MeasureOptions,
        buckets: tuple[int, ...],
        held: contextlib.ExitStack,
    ) -> None:
        import cupy

        self._cuda: Any = cupy.cuda
        self._stream: Any = cupy.cuda.Stream(non_blocking=True)
        self._pointer = int(self._stream.ptr)
        self._forms = forms
        self._limit = workspace_limit
        self._settings = settings
        self._shuffle = random.Random(0).shuffle
        self._ahead_us = _START_US
        self._able = list(forms)
        self._refused = {name: FAILED + first_line(error) for name, error in forms.failed.items()}
        self._n, self._k = forms.weight.n, forms.weight.k
        self._empty: Callable[[int], None] | None = None
        if self._cold(min(buckets)):
            self._empty = held.enter_context(cold_cache(forms.device))
        # Whatever goes wrong, nothing is given back that is in use.
        self._buckets, self._x, self._y = self._arrays(buckets, held)
        held.callback(self._stream.synchronize)

    def _arrays(
        self, buckets: tuple[int, ...], held: contextlib.ExitStack
    ) -> tuple[tuple[int, ...], int, int]:
        """The buckets for which there is memory, and the addresses of x and y."""
        device = self._forms.device
        while True:
            most = buckets[-1]
            try:
                with contextlib.ExitStack() as trial:
                    x = trial.enter_context(
                        device.filled(most * self._k * _BF16_BYTES, operand("bf16"), self._pointer)
                    )
                    y = trial.enter_context(device.allocate(most * self._n * _BF16_BYTES))
                    held.push(trial.pop_all())
                return buckets, x.pointer, y.pointer
            except DeviceMemoryError as error:
                if len(buckets) == 1:
                    raise
                _skipped(most, error)
                buckets = buckets[:-1]

    def run(self, progress: Progress | None) -> Table:
        """Measure bucket after bucket, while there is time."""
        started = time.monotonic()
        seconds = self._settings.seconds
        found: dict[int, dict[str, float]] = {}
        memory: DeviceMemoryError | None = None
        order = [m for m in coarse_first(self._settings.buckets) if m in self._buckets]
        compiled = 0
        for done, tokens in enumerate(order):
            spent = seconds is not None and time.monotonic() - started >= seconds
            if spent and len(found) >= _LEAST:
                break
            if progress is not None:
                progress(f"{self._n} x {self._k}, M = {tokens}", done, len(self._buckets))
            if done == compiled:
                # As many again as are done: where time runs out little is compiled for nothing.
                compiled = max(_LEAST, 2 * done)
                self._compile(order[done:compiled])
            if done and tokens < order[done - 1]:
                self._recover()
            try:
                found[tokens] = self._bucket(tokens)
            except DeviceMemoryError as error:
                _skipped(tokens, error)
                memory = error
        if progress is not None:
            progress("", len(self._buckets), len(self._buckets))
        if not found and memory is not None:
            raise memory
        now = datetime.datetime.now(datetime.timezone.utc)
        # What failed at some number of tokens is out for all.
        return Table(
            {
                tokens: {name: us for name, us in row.items() if name in self._able}
                for tokens, row in found.items()
            },
            self._refused,
            self._settings.emptied_up_to,
            now.isoformat(timespec="seconds"),
        )

    def _compile(self, numbers: Sequence[int]) -> None:
        """Compile what runs of so many tokens may need, side by side."""

        def compile_one(name: str) -> None:
            form = self._forms[name]
            most = form.most_tokens(self._limit)
            parts = set().union(*(parts_of(tokens, most) for tokens in numbers))
            form.compile_ahead(parts, _BF16)

        self._each(self._able, compile_one)

    def _recover(self) -> None:
        """Let clocks rise again: the GPU reads, which needs less power than multiplying."""
        until = time.monotonic() + _RECOVERY_S
        while self._empty is not None and time.monotonic() < until:
            for _ in range(_READS):
                self._empty(self._pointer)
            self._stream.synchronize()

    def _bucket(self, tokens: int) -> dict[str, float]:
        """Microseconds of every backend that can run so many tokens."""
        with contextlib.ExitStack() as held:
            workspace = Workspace(self._forms.device)
            held.callback(workspace.close)
            held.callback(self._stream.synchronize)
            launches = self._each(self._able, lambda name: self._launch(name, tokens, workspace))
            with workspace.lock:
                # Once and for all: it must not grow below what is captured.
                workspace.address(
                    max(nbytes for _, nbytes in launches.values()), self._pointer, tokens
                )
            graphs = self._each(launches, lambda name: self._capture(launches[name][0]))
            return self._times(graphs, self._empty if self._cold(tokens) else None)

    def _cold(self, tokens: int) -> bool:
        return is_cold(self._forms.weight, tokens, self._settings.emptied_up_to)

    def _each(self, names: Any, make: Callable[[str], Any]) -> dict[str, Any]:
        """What ``make`` returns for each backend; one that breaks is refused from now on."""
        made: dict[str, Any] = {}
        for name in list(names):
            try:
                made[name] = make(name)
            except DeviceMemoryError:
                raise
            except BROKEN as error:
                self._refused[name] = FAILED + first_line(error)
                self._able.remove(name)
                if not self._able:
                    raise
        return made

    def _launch(
        self, name: str, tokens: int, workspace: Workspace
    ) -> tuple[Callable[[], None], int]:
        """What a run launches, and the workspace that it needs."""
        form: GpuPrepared = self._forms[name]
        most = form.most_tokens(self._limit)
        steps: list[tuple[Step, int, int]] = []
        for start in range(0, tokens, most):
            part = min(most, tokens - start)
            x = self._x + start * self._k * _BF16_BYTES
            y = self._y + start * self._n * _BF16_BYTES
            direct = form.can_write(_BF16, y, self._n, part)
            step = form.step(part, _BF16, _BF16, direct, self._pointer)
            if not step.chosen:  # so slow it need not be
                raise DeviceMemoryError(f"there is no memory to choose how {name} multiplies them")
            steps.append((step, x, y))

        def launch() -> None:
            with workspace.lock:
                for step, x, y in steps:
                    step.launch(x, self._k, y, self._n, workspace, self._pointer)

        return launch, max(step.nbytes for step, _, _ in steps)

    def _capture(self, launch: Callable[[], None]) -> Any:
        launch()  # the first one may load code
        self._stream.synchronize()
        return captured(self._stream, launch)

    def _times(
        self, graphs: Mapping[str, Any], empty: Callable[[int], None] | None
    ) -> dict[str, float]:
        """Microseconds of each graph, balanced over shuffled rounds."""
        replays, round_us = {}, 0.0
        for name, graph in graphs.items():
            us = self._warm(graph)
            count = 1 if empty else repeats_of(us / 1e3)
            replays[name] = count
            round_us += count * us + (_FLUSH_US if empty else 0)
        rounds = self._settings.rounds or int(
            min(_MOST_ROUNDS, max(_FEWEST_ROUNDS, _ROUNDS_US / round_us))
        )
        works = {
            name: partial(self._replay, graph, replays[name]) for name, graph in graphs.items()
        }
        found = balanced(
            shuffled_rounds(
                works,
                self._stream,
                rounds,
                self._shuffle,
                before=partial(empty, self._pointer) if empty else None,
            )
        )
        return {name: 1e3 * milliseconds / replays[name] for name, milliseconds in found.items()}

    def _replay(self, graph: Any, count: int) -> None:
        for _ in range(count):
            graph.launch(self._stream)

    def _warm(self, graph: Any) -> float:
        """Run a graph for a while; roughly how many microseconds it takes."""
        graph.launch(self._stream)
        begin = self._event()
        for _ in range(_FIRST):
            graph.launch(self._stream)
        end = self._event()
        self._stream.synchronize()
        us = max(0.5, self._us(begin, end) / _FIRST)
        for _ in range(min(_MOST_WARM, int(self._ahead_us / us))):
            graph.launch(self._stream)
        self._ahead_us = _WARM_US
        return us

    def _event(self) -> Any:
        event = self._cuda.Event()
        event.record(self._stream)
        return event

    def _us(self, begin: Any, end: Any) -> float:
        return float(self._cuda.get_elapsed_time(begin, end)) * 1e3


def _skipped(tokens: int, error: Exception) -> None:
    _LOG.warning("%d tokens are not measured: %s", tokens, error)
