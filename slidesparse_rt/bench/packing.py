"""``slidesparse bench packing``: packing on the CPU, beside NumPy and PyTorch.

Three steps: check a weight, prune it, and prune + quantize + slide it.  All versions work on one
weight of normally distributed float32 numbers, take turns in shuffled order within each round, and
are ranked by their medians.  Their outputs are compared first: if they differ, nothing is reported.
Peak memory is that of a process of its own, the input counted as 1.
"""

from __future__ import annotations

import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import OptionError
from ..options import worker_count
from ..pattern import Pattern
from .packing_versions import DTYPES, OURS, Matrix, Version, all_versions, compare
from .record import Record, WrongOutput

__all__ = ["PackingSettings", "host_facts", "print_peak", "run_packing", "targets"]

_SEED = 20260305
#: Seconds before each timed run: OpenMP's threads spin for a while after PyTorch's work is done.
_PAUSE = 0.1
#: Where Linux tells a process about its memory; peak memory is not measured elsewhere.
_STATUS = Path("/proc/self/status")
_PACK = "prune+quantize+slide"
#: What is wanted of two cores: weights per second, and peak memory over the input's size.
TARGET_RATES = {"check": 1e9, "prune": 300e6, _PACK: 150e6}
TARGET_MEMORY = 2.5


@dataclass(frozen=True, kw_only=True, slots=True)
class PackingSettings:
    """What to measure.

    Attributes
    ----------
    n, k:
        The weight (N, K), float32.
    pattern:
        Its pattern.
    threads:
        CPU threads; ``None``: every core of this process.
    rounds:
        Rounds.
    memory:
        Whether to measure peak memory too, where the system is Linux.
    """

    n: int = 4096
    k: int = 14336
    pattern: str = "6:8"
    threads: int | None = None
    rounds: int = 5
    memory: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "threads", worker_count(self.threads))
        object.__setattr__(self, "pattern", Pattern.parse(self.pattern).name)
        if min(self.n, self.k, self.rounds) < 1:
            raise OptionError(
                f"rows, columns and rounds are {self.n}, {self.k} and {self.rounds}; allowed are "
                f"numbers from 1 on"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return {
            "n": self.n,
            "k": self.k,
            "pattern": self.pattern,
            "threads": self.threads,
            "rounds": self.rounds,
            "memory": self.memory,
            "input": "float32, standard normal",
        }

    def runs(self, versions: int) -> int:
        """How many runs there are with so many versions, those for memory included."""
        steps = len(TARGET_RATES) - 1 + len(DTYPES)
        memory = len(DTYPES) if self.memory and _STATUS.exists() else 0
        return versions * (steps * self.rounds + memory)


def host_facts() -> dict[str, Any]:
    """The machine, for the result file."""
    return {
        "cpu": _cpu_model(),
        "cores": worker_count(None),
        "system": f"{platform.system()} {platform.machine()}",
    }


def run_packing(
    settings: PackingSettings,
    record: Record,
    *,
    say: Callable[[str], None],
    done: Callable[[], None],
    versions: Sequence[Version] | None = None,
) -> None:
    """Measure every step of every version and add its rows to ``record``, which is saved.

    Parameters
    ----------
    settings, record:
        What, and whereto.
    say, done:
        Take a line for people, and the end of one run.
    versions:
        Stand in for the real ones in tests; ours is the first.
    """
    pattern = Pattern.parse(settings.pattern)
    threads = worker_count(settings.threads)
    host = record.document.setdefault("host", host_facts())
    host["load_average_before"] = _load()
    made = all_versions(pattern, threads) if versions is None else list(versions)
    weight = _weight(settings.n, settings.k)
    say(f"comparing the outputs of {', '.join(one.name for one in made)}")
    try:
        ties = compare(made, weight, pattern)
    except WrongOutput as error:
        record.leave_out("packing", "wrong output", str(error))
        say(f"not measured, because outputs differ: {error}")
    else:
        pruned = made[0].prune(weight)
        seconds = _measure(made, weight, pruned, settings.rounds, done)
        memory: dict[tuple[str, str], float] = {}
        for one in made if settings.memory and _STATUS.exists() else ():
            for dtype in DTYPES:
                memory[f"{_PACK} {dtype}", one.name] = _measure_memory(settings, one.name, dtype)
                done()
        record.add(*_rows(seconds, memory, ties, weight.size))
    host["load_average_after"] = _load()
    record.finish()


def _weight(n: int, k: int) -> Matrix:
    """Normal float32 numbers, the same for every run, made without a copy in double precision."""
    return np.random.default_rng(_SEED).standard_normal((n, k), dtype=np.float32)


def _steps(one: Version, weight: Matrix, pruned: Matrix) -> dict[str, Callable[[], object]]:
    """The measured steps of one version, by name."""
    return {
        "check": partial(one.fits, pruned),
        "prune": partial(one.prune, weight),
        **{f"{_PACK} {dtype}": partial(one.pack, weight, dtype) for dtype in DTYPES},
    }


def _measure(
    versions: Sequence[Version],
    weight: Matrix,
    pruned: Matrix,
    rounds: int,
    done: Callable[[], None],
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round, by step and version; all of them take turns in shuffled order."""
    runs = [
        (step, one.name, call)
        for one in versions
        for step, call in _steps(one, weight, pruned).items()
    ]
    seconds: dict[str, dict[str, list[float]]] = {}
    order = random.Random(_SEED)
    for _ in range(rounds):
        order.shuffle(runs)
        for step, name, call in runs:
            time.sleep(_PAUSE)
            began = time.perf_counter()
            result = call()
            took = time.perf_counter() - began
            del result
            seconds.setdefault(step, {}).setdefault(name, []).append(took)
            done()
    return seconds


def _rows(
    seconds: Mapping[str, Mapping[str, list[float]]],
    memory: Mapping[tuple[str, str], float],
    ties: Mapping[str, int],
    weights: int,
) -> list[dict[str, Any]]:
    """One row for each step and version, ours first."""
    rows = []
    for step in sorted(seconds):
        ours = statistics.median(seconds[step][OURS])
        for name in sorted(seconds[step], key=lambda name: (name != OURS, name)):
            median = statistics.median(seconds[step][name])
            rows.append(
                {
                    "step": step,
                    "version": name,
                    "seconds": seconds[step][name],
                    "median_seconds": median,
                    "weights_per_second": weights / median,
                    "time_over_ours": median / ours,
                    "peak_memory_over_input": memory.get((step, name)),
                    "groups_with_ties": ties.get(name, 0),
                }
            )
    return rows


def targets(rows: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What is wanted on two cores, what was measured, and whether that is enough."""
    found = []
    for row in rows:
        if row["version"] != OURS:
            continue
        want = TARGET_RATES[row["step"].split()[0]]
        rate = row["weights_per_second"]
        what = f"{row['step']}, weights per second"
        found.append({"what": what, "at_least": want, "measured": rate, "met": rate >= want})
        peak = row["peak_memory_over_input"]
        if peak is not None:
            what, most = f"{row['step']}, peak memory over input", TARGET_MEMORY
            found.append({"what": what, "at_most": most, "measured": peak, "met": peak <= most})
    return found


# --- memory ---------------------------------------------------------------------------------------


def _measure_memory(settings: PackingSettings, name: str, dtype: str) -> float:
    """Peak memory of one version's prune + quantize + slide, as a multiple of the input's size."""
    arguments = (settings.n, settings.k, settings.pattern, settings.threads, name, dtype)
    code = f"from slidesparse_rt.bench.packing import print_peak; print_peak(*{arguments!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    return float(done.stdout)


def print_peak(n: int, k: int, pattern: str, threads: int, name: str, dtype: str) -> None:
    """In a process of its own: pack once, and print the peak memory over the input's size.

    The baseline is taken after a small warm-up (imports, compiled code) and with the input loaded;
    the input itself is counted as 1.  Linux only.
    """
    found = Pattern.parse(pattern)
    (one,) = [each for each in all_versions(found, threads) if each.name == name]
    one.pack(_weight(64, 4 * found.group), dtype)
    weight = _weight(n, k)
    # proc(5): 5 sets VmHWM back to the memory that is occupied now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _memory_bytes("VmRSS")
    result = one.pack(weight, dtype)
    print((_memory_bytes("VmHWM") - before + weight.nbytes) / weight.nbytes)
    del result


def _memory_bytes(field: str) -> int:
    """One field of this process's memory status: "VmRSS" (now) or "VmHWM" (the most so far).

    Not getrusage: its ru_maxrss begins at what the parent process occupied.
    """
    for line in _STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{_STATUS} has no {field}")


def _cpu_model() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _load() -> float | None:
    """The load average of the last minute, where the system has one."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else None
