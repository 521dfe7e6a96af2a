"""Measure packing on the CPU: check, prune, and prune + quantize + slide.

Each step of slidesparse_rt runs beside a straightforward NumPy version and, where PyTorch is
installed, a PyTorch version that prunes with ``torch.topk``.  All versions work on one weight of
normally distributed float32 numbers, take turns in shuffled order within each round, and are
ranked by their medians.  Their outputs are compared first: if they differ, nothing is reported.

    python benchmarks/packing.py
    python benchmarks/packing.py --rows 512 --pattern 8:10 --rounds 3 --output result.json
"""

from __future__ import annotations

import argparse
import datetime
import hashlib
import json
import os
import platform
import random
import shlex
import statistics
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import slidesparse_rt as ss
from slidesparse_rt.dtypes import operand
from slidesparse_rt.options import worker_count

Matrix = npt.NDArray[Any]
#: Slid bits (N, K') uint8, and scales (N,) float32.
Packed = tuple[Matrix, Matrix]

ROOT = Path(__file__).resolve().parents[1]
SEED = 20260305
DTYPES = ("int8", "fp8_e4m3")
OURS = "slidesparse_rt"
#: Seconds before each timed run: OpenMP's threads spin for a while after PyTorch's work is done.
PAUSE = 0.1
#: Where Linux tells a process about its memory; peak memory is not measured elsewhere.
STATUS = Path("/proc/self/status")
#: What this project wants on two cores: weights per second, and peak memory over the input's size.
TARGET_RATES = {"check": 1e9, "prune": 300e6, "prune+quantize+slide": 150e6}
TARGET_MEMORY = 2.5
#: Where a page quotes the results.
BEGIN = "<!-- measured: begin (benchmarks/packing.py --page) -->"
END = "<!-- measured: end -->"


class Mismatch(Exception):
    """Two versions of one step gave different outputs."""


@dataclass(frozen=True)
class Version:
    """One way to do all steps; ``fits`` is the check's verdict, False instead of an error."""

    name: str
    fits: Callable[[Matrix], bool]
    prune: Callable[[Matrix], Matrix]
    pack: Callable[[Matrix, str], Packed]


def our_version(pattern: ss.Pattern, threads: int) -> Version:
    """The library, through its public functions."""

    def fits(weight: Matrix) -> bool:
        try:
            ss.check_pattern(weight, pattern, threads=threads)
        except ss.PatternError:
            return False
        return True

    def prune(weight: Matrix) -> Matrix:
        pruned: Matrix = ss.prune(weight, pattern, threads=threads)
        return pruned

    def pack(weight: Matrix, dtype: str) -> Packed:
        packed = ss.SparseWeight.from_array(prune(weight), pattern, dtype=dtype, threads=threads)
        assert packed.scales is not None
        return packed.slide(threads=threads).view(np.uint8), packed.scales

    return Version(OURS, fits, prune, pack)


def numpy_version(pattern: ss.Pattern) -> Version:
    """The same steps as one writes them in NumPy, on whole arrays; NumPy runs them on one core."""
    keep, group, windows = pattern.keep, pattern.group, pattern.windows

    def grouped(array: Matrix) -> Matrix:
        rows, columns = array.shape
        if columns % group:
            array = np.pad(array, ((0, 0), (0, pattern.padded_k(columns) - columns)))
        return array.reshape(rows, -1, group)

    def fits(weight: Matrix) -> bool:
        few = np.count_nonzero(grouped(weight), axis=2) <= keep
        return bool(few.all() and np.isfinite(weight).all())

    def prune(weight: Matrix) -> Matrix:
        pruned = grouped(weight).copy()
        drop = group - keep
        if drop:
            smallest = np.argpartition(np.abs(pruned), drop - 1, axis=2)[..., :drop]
            np.put_along_axis(pruned, smallest, 0, axis=2)
        return pruned.reshape(weight.shape[0], -1)[:, : weight.shape[1]]

    def quantize(weight: Matrix, dtype: str) -> Packed:
        limit = np.float32(operand(dtype).q_max)
        largest = np.abs(weight).max(axis=1)
        scaled = weight * (limit / largest)[:, None]
        if dtype == "int8":
            values = np.clip(np.rint(scaled), -limit, limit).astype(np.int8).view(np.uint8)
        else:
            limited = np.clip(scaled, -limit, limit)
            values = limited.astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
            values[values == 0x80] = 0
        return values, largest / limit

    def slide(values: Matrix) -> Matrix:
        left = grouped(values).copy()
        slid = np.zeros((*left.shape[:2], windows, 4), np.uint8)
        for w in range(windows):
            window = left[..., 2 * w : 2 * w + 4]
            nonzero = window != 0
            taken = nonzero & (np.cumsum(nonzero, axis=2) <= 2)
            slid[:, :, w, : window.shape[2]] = np.where(taken, window, 0)
            window[taken] = 0
        if left.any():
            raise Mismatch("the NumPy version could not place every weight")
        return slid.reshape(values.shape[0], -1)

    def pack(weight: Matrix, dtype: str) -> Packed:
        values, scales = quantize(prune(weight), dtype)
        return slide(values), scales

    return Version("numpy", fits, prune, pack)


def torch_version(pattern: ss.Pattern, threads: int) -> Version | None:
    """The same steps with PyTorch on the CPU; ``None`` where it is not installed."""
    try:
        import torch
    except ImportError:
        return None
    torch.set_num_threads(threads)
    keep, group, windows = pattern.keep, pattern.group, pattern.windows

    def grouped(tensor: torch.Tensor) -> torch.Tensor:
        rows, columns = tensor.shape
        if columns % group:
            missing = pattern.padded_k(columns) - columns
            tensor = torch.nn.functional.pad(tensor, (0, missing))
        return tensor.reshape(rows, -1, group)

    def fits(weight: Matrix) -> bool:
        tensor = torch.from_numpy(weight)
        few = torch.count_nonzero(grouped(tensor), dim=2) <= keep
        return bool(few.all() and torch.isfinite(tensor).all())

    def pruned(weight: torch.Tensor) -> torch.Tensor:
        groups = grouped(weight)
        kept = groups.abs().topk(keep, dim=2, sorted=False).indices
        mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, kept, True)
        whole = torch.where(mask, groups, 0).reshape(weight.shape[0], -1)
        return whole[:, : weight.shape[1]]

    def prune(weight: Matrix) -> Matrix:
        result: Matrix = pruned(torch.from_numpy(weight)).numpy()
        return result

    def quantize(weight: torch.Tensor, dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
        limit = operand(dtype).q_max
        assert limit is not None
        largest = weight.abs().amax(dim=1)
        # Tensor over tensor: number / tensor is computed as number * (1 / tensor), rounded twice.
        whole = torch.full_like(largest, limit)
        scaled = weight * (whole / largest)[:, None]
        if dtype == "int8":
            values = scaled.round().clamp(-limit, limit).to(torch.int8).view(torch.uint8)
        else:
            values = scaled.clamp(-limit, limit).to(torch.float8_e4m3fn).view(torch.uint8)
            values[values == 0x80] = 0
        return values, largest / whole

    def slide(values: torch.Tensor) -> torch.Tensor:
        left = grouped(values).clone()
        slid = torch.zeros((*left.shape[:2], windows, 4), dtype=torch.uint8)
        for w in range(windows):
            window = left[..., 2 * w : 2 * w + 4]
            nonzero = window != 0
            taken = nonzero & (torch.cumsum(nonzero, dim=2) <= 2)
            slid[:, :, w, : window.shape[2]] = torch.where(taken, window, 0)
            window[taken] = 0
        if left.any():
            raise Mismatch("the PyTorch version could not place every weight")
        return slid.reshape(values.shape[0], -1)

    def pack(weight: Matrix, dtype: str) -> Packed:
        values, scales = quantize(pruned(torch.from_numpy(weight)), dtype)
        return slide(values).numpy(), scales.numpy()

    return Version("torch", fits, prune, pack)


def all_versions(pattern: ss.Pattern, threads: int) -> list[Version]:
    """The versions that this machine can run, ours first."""
    candidates = (
        our_version(pattern, threads),
        numpy_version(pattern),
        torch_version(pattern, threads),
    )
    return [found for found in candidates if found is not None]


def make_weight(rows: int, columns: int) -> Matrix:
    """Normal float32 numbers, the same for every run, made without a copy in double precision."""
    return np.random.default_rng(SEED).standard_normal((rows, columns), dtype=np.float32)


def groups_of(array: Matrix, width: int) -> Matrix:
    """(N, groups, width), padded with zeros."""
    missing = -array.shape[1] % width
    return np.pad(array, ((0, 0), (0, missing))).reshape(array.shape[0], -1, width)


def tied_groups(ours: Matrix, other: Matrix, pattern: ss.Pattern, name: str) -> Matrix:
    """Groups (N, groups) in which two versions kept different weights of equal magnitude.

    Raises Mismatch where they kept different magnitudes.
    """
    a, b = groups_of(ours, pattern.group), groups_of(other, pattern.group)
    differ = (a != b).any(axis=2)
    if not np.array_equal(np.sort(np.abs(a[differ])), np.sort(np.abs(b[differ]))):
        raise Mismatch(f"prune: {name} keeps other magnitudes than {OURS}")
    result: Matrix = differ
    return result


def compare(versions: Sequence[Version], weight: Matrix, pattern: ss.Pattern) -> dict[str, int]:
    """Run every step of every version once, and compare the outputs with ours, bit by bit.

    Where weights of one group are equally large, versions may keep different ones; those groups
    are left out, and their number is returned for each version.  Raises Mismatch for any other
    difference.
    """
    ours, *others = versions
    pruned = ours.prune(weight)
    packed = {dtype: ours.pack(weight, dtype) for dtype in DTYPES}
    ties = {}
    for one in versions:
        if not one.fits(pruned) or (pattern.name != "dense" and one.fits(weight)):
            raise Mismatch(f"check: {one.name} has another verdict than {OURS}")
    for other in others:
        tied = tied_groups(pruned, other.prune(weight), pattern, other.name)
        ties[other.name] = int(np.count_nonzero(tied))
        for dtype in DTYPES:
            slid, scales = other.pack(weight, dtype)
            differ = groups_of(packed[dtype][0] != slid, pattern.slots).any(axis=2)
            if (differ & ~tied).any() or not np.array_equal(packed[dtype][1], scales):
                raise Mismatch(f"prune+quantize+slide: {other.name} differs in {dtype}")
    return ties


def steps_of(one: Version, weight: Matrix, pruned: Matrix) -> dict[str, Callable[[], object]]:
    """The measured steps of one version, by name."""
    return {
        "check": partial(one.fits, pruned),
        "prune": partial(one.prune, weight),
        **{f"prune+quantize+slide {dtype}": partial(one.pack, weight, dtype) for dtype in DTYPES},
    }


def measure(
    versions: Sequence[Version],
    weight: Matrix,
    pruned: Matrix,
    rounds: int,
    advance: Callable[[], None],
) -> dict[str, dict[str, list[float]]]:
    """Seconds of every round, by step and version; all of them take turns in shuffled order."""
    runs = [
        (step, one.name, call)
        for one in versions
        for step, call in steps_of(one, weight, pruned).items()
    ]
    seconds: dict[str, dict[str, list[float]]] = {}
    order = random.Random(SEED)
    for _ in range(rounds):
        order.shuffle(runs)
        for step, name, call in runs:
            time.sleep(PAUSE)
            began = time.perf_counter()
            result = call()
            took = time.perf_counter() - began
            del result
            seconds.setdefault(step, {}).setdefault(name, []).append(took)
            advance()
    return seconds


def memory_bytes(field: str) -> int:
    """One field of this process's memory status: "VmRSS" (now) or "VmHWM" (the most so far).

    Not getrusage: its ru_maxrss begins at what the parent process occupied.
    """
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise LookupError(f"{STATUS} has no {field}")


def memory_child(arguments: argparse.Namespace, pattern: ss.Pattern) -> None:
    """In a process of its own: pack once, and print the peak memory over the input's size.

    The baseline is taken after a small warm-up (imports, compiled code) and with the input loaded;
    the input itself is counted as 1.
    """
    name, dtype = arguments.memory_of.split(",")
    (one,) = [v for v in all_versions(pattern, arguments.threads) if v.name == name]
    one.pack(make_weight(64, 4 * pattern.group), dtype)
    weight = make_weight(arguments.rows, arguments.columns)
    # proc(5): 5 sets VmHWM back to the memory that is occupied now.
    Path("/proc/self/clear_refs").write_text("5")
    before = memory_bytes("VmRSS")
    result = one.pack(weight, dtype)
    print((memory_bytes("VmHWM") - before + weight.nbytes) / weight.nbytes)
    del result


def measure_memory(arguments: argparse.Namespace, name: str, dtype: str) -> float:
    """Peak memory of one version's prune + quantize + slide, as a multiple of the input's size."""
    command = [
        sys.executable,
        __file__,
        f"--rows={arguments.rows}",
        f"--columns={arguments.columns}",
        f"--pattern={arguments.pattern}",
        f"--threads={arguments.threads}",
        f"--memory-of={name},{dtype}",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return float(done.stdout)


def cpu_model() -> str:
    """What the system calls its processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def git(*words: str) -> str | None:
    """Output of one git command in this repository; ``None`` where there is none."""
    try:
        done = subprocess.run(["git", *words], cwd=ROOT, check=True, capture_output=True, text=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def source_digest() -> str:
    """SHA-256 over the modules that were measured: it names them where a commit does not."""
    digest = hashlib.sha256()
    for path in sorted((ROOT / "slidesparse_rt" / "packing").glob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def circumstances(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    versions = {"python": platform.python_version()}
    for name in ("slidesparse-rt", "numpy", "numba", "ml_dtypes", "torch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "benchmark": "packing",
        "command": shlex.join(["python", "benchmarks/packing.py", *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(git("status", "--porcelain", "slidesparse_rt", "benchmarks")),
        "packing_sources_sha256": source_digest(),
        "cpu": cpu_model(),
        "cores": worker_count(None),
        "threads": arguments.threads,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "rows": arguments.rows,
        "columns": arguments.columns,
        "pattern": arguments.pattern,
        "input": "float32, standard normal",
        "rounds": arguments.rounds,
    }


def summarize(
    seconds: Mapping[str, Mapping[str, list[float]]],
    memory: Mapping[tuple[str, str], float],
    weights: int,
) -> list[dict[str, Any]]:
    """One entry for each step and version, in the order of measurement."""
    entries = []
    for step in sorted(seconds):
        ours = statistics.median(seconds[step][OURS])
        for name in sorted(seconds[step], key=lambda name: (name != OURS, name)):
            median = statistics.median(seconds[step][name])
            entries.append(
                {
                    "step": step,
                    "version": name,
                    "seconds": seconds[step][name],
                    "median_seconds": median,
                    "weights_per_second": weights / median,
                    "time_over_ours": median / ours,
                    "peak_memory_over_input": memory.get((step, name)),
                }
            )
    return entries


def targets(entries: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """What was wanted, what was measured, and whether that is enough."""
    found = []
    for entry in entries:
        if entry["version"] != OURS:
            continue
        want = TARGET_RATES[entry["step"].split()[0]]
        rate = entry["weights_per_second"]
        found.append(
            {
                "what": f"{entry['step']}, weights per second",
                "at_least": want,
                "measured": rate,
                "met": rate >= want,
            }
        )
        peak = entry["peak_memory_over_input"]
        if peak is not None:
            found.append(
                {
                    "what": f"{entry['step']}, peak memory over input",
                    "at_most": TARGET_MEMORY,
                    "measured": peak,
                    "met": peak <= TARGET_MEMORY,
                }
            )
    return found


def render(report: Mapping[str, Any], console: Console) -> None:
    """Print the table and the targets."""
    table = Table(
        title=f"{report['rows']} x {report['columns']} float32, {report['pattern']}, "
        f"{report['threads']} threads, median of {report['rounds']} rounds",
        caption="pack: prune + quantize + slide; time and peak memory in multiples, of the first "
        "version's time and of the input's size",
    )
    table.add_column("step", no_wrap=True)
    table.add_column("version", no_wrap=True)
    for title in ("ms", "M weights/s", "time", "memory"):
        table.add_column(title, justify="right")
    previous = None
    for entry in report["results"]:
        if previous not in (None, entry["step"]):
            table.add_section()
        peak = entry["peak_memory_over_input"]
        table.add_row(
            entry["step"].replace("prune+quantize+slide", "pack")
            if entry["step"] != previous
            else "",
            entry["version"],
            f"{1e3 * entry['median_seconds']:.1f}",
            f"{entry['weights_per_second'] / 1e6:.0f}",
            f"{entry['time_over_ours']:.1f}",
            "" if peak is None else f"{peak:.2f}",
        )
        previous = entry["step"]
    console.print(table)
    for target in report["targets"]:
        bound = (
            f"at least {target['at_least']:.3g}"
            if "at_least" in target
            else f"at most {target['at_most']}"
        )
        verdict = "met" if target["met"] else "MISSED"
        console.print(f"{verdict}: {target['what']}: {target['measured']:.3g}, wanted {bound}")


def markdown(report: Mapping[str, Any]) -> str:
    """The report as the part of a page that lies between :data:`BEGIN` and :data:`END`."""
    versions = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    commit = report["commit"] or "none yet"
    facts = [
        f"weight: {report['rows']} x {report['columns']}, {report['input']}, {report['pattern']}",
        f"machine: {report['cpu']}, {report['cores']} cores, {report['system']}; "
        f"{report['threads']} threads",
        f"versions: {versions}",
        f"commit: {commit}{' with changes' if report['uncommitted_changes'] else ''}; SHA-256 of "
        f"the packing modules: {report['packing_sources_sha256'][:16]}",
        f"time: {report['time']}; load average {report['load_average_before']:.2f} before, "
        f"{report['load_average_after']:.2f} after; {report['rounds']} rounds",
    ]
    lines = ["```sh", report["command"], "```", ""]
    for fact in facts:
        lines += textwrap.wrap(
            fact, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False
        )
    lines += [
        "",
        "| step | version | ms | M weights/s | time over ours | peak memory over input |",
        "|---|---|---|---|---|---|",
    ]
    for entry in report["results"]:
        peak = entry["peak_memory_over_input"]
        cells = (
            entry["step"],
            entry["version"],
            f"{1e3 * entry['median_seconds']:.0f}",
            f"{entry['weights_per_second'] / 1e6:.0f}",
            f"{entry['time_over_ours']:.1f}",
            "-" if peak is None else f"{peak:.2f}",
        )
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| wanted on two cores | bound | measured | met |", "|---|---|---|---|"]
    for target in report["targets"]:
        if "at_least" in target:
            bound = f"at least {target['at_least'] / 1e6:.0f} M"
            measured = f"{target['measured'] / 1e6:.0f} M"
        else:
            bound = f"at most {target['at_most']}"
            measured = f"{target['measured']:.2f}"
        met = "yes" if target["met"] else "no"
        lines.append(f"| {target['what']} | {bound} | {measured} | {met} |")
    return "\n".join(lines)


def quote(page: str, report: Mapping[str, Any]) -> str:
    """The page with its part between the markers replaced."""
    head, begin, rest = page.partition(BEGIN)
    _, end, tail = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"the page has no {BEGIN} and {END}; put them where the results belong")
    return f"{head}{begin}\n\n{markdown(report)}\n\n{end}{tail}"


def write(path: Path, text: str) -> None:
    """Write a file so that its name never stands for half of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def pattern_name(text: str) -> str:
    try:
        return ss.Pattern.parse(text).name
    except ss.PatternError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=positive, default=4096, help="output channels, N")
    parser.add_argument("--columns", type=positive, default=14336, help="inputs, K")
    parser.add_argument("--pattern", type=pattern_name, default="6:8")
    parser.add_argument(
        "--threads", type=positive, default=worker_count(None), help="default: every core"
    )
    parser.add_argument("--rounds", type=positive, default=5)
    parser.add_argument("--output", type=Path, help="also write the report to this JSON file")
    parser.add_argument("--page", type=Path, help="also quote the results in this Markdown file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def main() -> int:
    arguments = parse()
    pattern = ss.Pattern.parse(arguments.pattern)
    if arguments.memory_of:
        memory_child(arguments, pattern)
        return 0
    console = Console()
    report = circumstances(arguments)
    report["load_average_before"] = os.getloadavg()[0]
    versions = all_versions(pattern, arguments.threads)
    weight = make_weight(arguments.rows, arguments.columns)
    try:
        with console.status("comparing the versions' outputs"):
            report["groups_with_ties"] = compare(versions, weight, pattern)
            pruned = versions[0].prune(weight)
    except Mismatch as error:
        console.print(f"not measured, because outputs differ: {error}")
        return 1
    steps = len(TARGET_RATES) - 1 + len(DTYPES)
    with Progress(console=console) as progress:
        task = progress.add_task(
            "measuring", total=len(versions) * (steps * arguments.rounds + len(DTYPES))
        )
        seconds = measure(
            versions, weight, pruned, arguments.rounds, lambda: progress.advance(task)
        )
        memory: dict[tuple[str, str], float] = {}
        for one in versions if STATUS.exists() else ():
            for dtype in DTYPES:
                key = (f"prune+quantize+slide {dtype}", one.name)
                memory[key] = measure_memory(arguments, one.name, dtype)
                progress.advance(task)
    report["load_average_after"] = os.getloadavg()[0]
    report["results"] = summarize(seconds, memory, weight.size)
    report["targets"] = targets(report["results"])
    render(report, console)
    if arguments.page is not None:
        write(arguments.page, quote(arguments.page.read_text(encoding="utf-8"), report))
    if arguments.output is not None:
        write(arguments.output, json.dumps(report, indent=2) + "\n")
        console.print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
