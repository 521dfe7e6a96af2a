"""Measure converting a checkpoint on the CPU, beside a straightforward PyTorch script.

The checkpoint is synthetic: some of the 32 blocks of a 7B Llama (hidden 4096, intermediate 11008)
and the same part of its embedding and head, bfloat16, normally distributed, one shard for each
block.  Versions take turns in shuffled order within each round and are ranked by their medians;
their outputs are compared first, and if they differ, nothing is reported.  Before each run what is
unwritten is flushed; "from disk" also drops the checkpoint from the page cache.  Every version
leaves its files on the disk (fsync), not in memory.

    python benchmarks/convert.py
    python benchmarks/convert.py --blocks 1 --rounds 1 --output result.json
    python benchmarks/convert.py --blocks 32 --ours    # a whole 7B: 21 GB of disk
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
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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
from slidesparse_rt.convert import convert_checkpoint
from slidesparse_rt.options import worker_count
from slidesparse_rt.packing import TensorFile, write_file

ROOT = Path(__file__).resolve().parents[1]
SEED = 20260305
OURS = "slidesparse_rt"
HIDDEN, INTERMEDIATE, VOCABULARY = 4096, 11008, 32000
#: Blocks of the model that the checkpoint is a part of.
ALL_BLOCKS = 32
SHAPES = {
    **{f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"},
    **{f"mlp.{name}_proj": (INTERMEDIATE, HIDDEN) for name in ("gate", "up")},
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
#: What this project wants on two cores: weights per second, int8 by magnitude.
TARGET_RATE = 150e6
STATUS = Path("/proc/self/status")
Matrix = npt.NDArray[Any]


class Mismatch(Exception):
    """Two versions gave different outputs."""


@dataclass(frozen=True)
class Case:
    """One way to convert; ``name`` is the version, ``step`` what it does."""

    step: str
    name: str
    run: Callable[[Path, Path], None]
    cold: bool = False


def make_checkpoint(folder: Path, blocks: int) -> Path:
    """Write the synthetic checkpoint and, beside it, norms of its inputs."""
    rng = np.random.default_rng(SEED)
    numbers = (rng.standard_normal(1 << 24, dtype=np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    def weight(n: int, k: int) -> Matrix:
        start = int(rng.integers(numbers.size))
        return np.resize(np.roll(numbers, start), (n, k))

    folder.mkdir(parents=True)
    rows = VOCABULARY * blocks // ALL_BLOCKS
    weight_map: dict[str, str] = {}
    norms: dict[str, Matrix] = {}
    for number in range(blocks):
        prefix = f"model.layers.{number}."
        tensors = {f"{prefix}{name}.weight": weight(*shape) for name, shape in SHAPES.items()}
        norms |= {
            name: np.abs(rng.standard_normal(tensor.shape[1], dtype=np.float32)) + 0.1
            for name, tensor in tensors.items()
        }
        tensors[f"{prefix}input_layernorm.weight"] = np.ones(HIDDEN, ml_dtypes.bfloat16)
        if number == 0:
            tensors["model.embed_tokens.weight"] = weight(rows, HIDDEN)
        if number == blocks - 1:
            tensors["lm_head.weight"] = weight(rows, HIDDEN)
        name = f"model-{number + 1:05d}-of-{blocks:05d}.safetensors"
        write_file(folder / name, tensors, {"format": "pt"})
        weight_map.update(dict.fromkeys(tensors, name))
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    config = {"model_type": "llama", "vocab_size": rows, "tie_word_embeddings": False}
    (folder / "config.json").write_text(json.dumps(config))
    write_file(norms_of(folder), norms, {})
    return folder


def norms_of(model: Path) -> Path:
    return model.with_name("norms.safetensors")


def ours(pattern: str, threads: int, dtype: str, method: str) -> Callable[[Path, Path], None]:
    """The library, through its public function."""

    def run(model: Path, out: Path) -> None:
        convert_checkpoint(
            model,
            out,
            pattern=pattern,
            dtype=dtype,
            method=method,
            norms=norms_of(model) if method == "wanda" else None,
            workers=threads,
        )

    return run


def with_torch(pattern: str, threads: int) -> Callable[[Path, Path], None] | None:
    """What one writes in PyTorch: load a shard, prune with topk, quantize, save."""
    try:
        import torch
        from safetensors.torch import load_file, save_file
    except ImportError:
        return None
    parsed = ss.Pattern.parse(pattern)

    def run(model: Path, out: Path) -> None:
        torch.set_num_threads(threads)
        out.mkdir()
        for shard in sorted(model.glob("*.safetensors")):
            result = {}
            for name, tensor in load_file(shard).items():
                if not name.endswith("_proj.weight"):
                    result[name] = tensor
                    continue
                weight = tensor.float()
                groups = weight.reshape(weight.shape[0], -1, parsed.group)
                kept = groups.abs().topk(parsed.keep, dim=2, sorted=False).indices
                mask = torch.zeros_like(groups, dtype=torch.bool).scatter_(2, kept, True)
                pruned = torch.where(mask, groups, 0).reshape(weight.shape)
                scales = pruned.abs().amax(dim=1, keepdim=True) / 127
                result[name] = (pruned / scales).round().clamp(-127, 127).to(torch.int8)
                result[f"{name}_scale"] = scales
            save_file(result, out / shard.name)
            handle = os.open(out / shard.name, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)

    return run


def compare(a: Path, b: Path, group: int) -> None:
    """Raise Mismatch unless both folders hold the same weights, but for what is a matter of taste.

    PyTorch does not say which of equal weights it keeps, and divides where the definition
    multiplies: sorted magnitudes in each group may differ by one step.
    """
    for path in sorted(b.glob("*.safetensors")):
        with TensorFile(a / path.name) as one, TensorFile(path) as other:
            if set(one.keys()) != set(other.keys()):
                raise Mismatch(f"{path.name} holds other tensors")
            for name in one.keys():  # noqa: SIM118  (a TensorFile is no mapping)
                x, y = one.read(name), other.read(name)
                if x.shape != y.shape or x.dtype != y.dtype:
                    raise Mismatch(f"{name} is {x.dtype} {x.shape} and {y.dtype} {y.shape}")
                if name.endswith("_proj.weight"):
                    for start in range(0, x.shape[0], 1024):
                        left, right = (
                            np.sort(
                                np.abs(part[start : start + 1024].astype(np.int16)).reshape(
                                    -1, group
                                )
                            )
                            for part in (x, y)
                        )
                        if np.abs(left - right).max() > 1:
                            raise Mismatch(f"{name} holds other weights")
                elif name.endswith("_scale"):
                    if not np.allclose(x, y, rtol=1e-6):
                        raise Mismatch(f"{name} holds other scales")
                elif x.tobytes() != y.tobytes():
                    raise Mismatch(f"{name} was not copied")


def forget(model: Path) -> None:
    """Drop the checkpoint from the page cache."""
    for path in model.iterdir():
        handle = os.open(path, os.O_RDONLY)
        os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(handle)


def remember(model: Path) -> None:
    """Bring the checkpoint into the page cache."""
    for path in model.iterdir():
        with path.open("rb", buffering=0) as file:
            while file.read(1 << 24):
                pass


def timed(case: Case, model: Path, out: Path) -> float:
    """Seconds of one run, from call to files on the disk."""
    shutil.rmtree(out, ignore_errors=True)
    os.sync()
    (forget if case.cold else remember)(model)
    start = time.perf_counter()
    case.run(model, out)
    return time.perf_counter() - start


def measure(
    cases: Sequence[Case], model: Path, out: Path, rounds: int, advance: Callable[[], object]
) -> dict[tuple[str, str], list[float]]:
    seconds: dict[tuple[str, str], list[float]] = {(case.step, case.name): [] for case in cases}
    order = random.Random(SEED)
    for _ in range(rounds):
        for case in order.sample(list(cases), len(cases)):
            seconds[case.step, case.name].append(timed(case, model, out))
            advance()
    return seconds


def memory_child(case: Case, model: Path, out: Path) -> None:
    """Print the peak memory of one run, in bytes, beyond what the process had before."""

    def read(key: str) -> int:
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
        raise SystemExit(f"{STATUS} has no {key}")

    before = read("VmRSS")
    case.run(model, out)
    print(read("VmHWM") - before)


def measure_memory(arguments: argparse.Namespace, model: Path, case: Case, out: Path) -> int:
    shutil.rmtree(out, ignore_errors=True)
    command = [
        sys.executable,
        __file__,
        f"--pattern={arguments.pattern}",
        f"--threads={arguments.threads}",
        f"--memory-of={case.name}",
        f"--model={model}",
        f"--folder={out}",
    ]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    return int(done.stdout)


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
    for room in ("convert", "packing"):
        for path in sorted((ROOT / "slidesparse_rt" / room).glob("*.py")):
            digest.update(f"{room}/{path.name}".encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()


def circumstances(arguments: argparse.Namespace) -> dict[str, Any]:
    """What a reader needs to judge or repeat the numbers."""
    versions = {"python": platform.python_version()}
    for name in ("slidesparse-rt", "numpy", "numba", "ml_dtypes", "safetensors", "torch"):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    weights = sum(n * k for n, k in SHAPES.values()) * arguments.blocks
    return {
        "benchmark": "convert",
        "command": shlex.join(["python", "benchmarks/convert.py", *sys.argv[1:]]),
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": git("rev-parse", "HEAD"),
        "uncommitted_changes": bool(
            git("status", "--porcelain", "slidesparse_rt/convert", "slidesparse_rt/packing")
        ),
        "convert_and_packing_sources_sha256": source_digest(),
        "cpu": cpu_model(),
        "cores": worker_count(None),
        "threads": arguments.threads,
        "system": f"{platform.system()} {platform.machine()}",
        "versions": versions,
        "blocks": arguments.blocks,
        "blocks_of_the_whole_model": ALL_BLOCKS,
        "weights": weights,
        "pattern": arguments.pattern,
        "input": "bfloat16, normal, one shard for each block; embedding and head, copied, in part",
        "rounds": arguments.rounds,
    }


def summarize(
    seconds: Mapping[tuple[str, str], list[float]],
    memory: Mapping[str, int],
    report: Mapping[str, Any],
) -> list[dict[str, Any]]:
    """One entry for each step and version, in the order of measurement."""
    entries = []
    first = statistics.median(next(iter(seconds.values())))
    for (step, name), times in seconds.items():
        median = statistics.median(times)
        rate = report["weights"] / median
        whole = report["weights"] * ALL_BLOCKS / report["blocks"]
        entries.append(
            {
                "step": step,
                "version": name,
                "seconds": times,
                "median_seconds": median,
                "weights_per_second": rate,
                "time_over_ours": median / first,
                "whole_model_seconds_extrapolated": whole / rate,
                "peak_memory_bytes": memory.get(name) if step == "int8" else None,
            }
        )
    return entries


def render(report: Mapping[str, Any], console: Console) -> None:
    """Print the table and the target."""
    table = Table(
        title=f"{report['blocks']} of {ALL_BLOCKS} blocks, "
        f"{report['weights'] / 1e6:.0f} M weights, "
        f"{report['pattern']}, {report['threads']} threads, median of {report['rounds']} rounds"
    )
    for title in ("step", "version"):
        table.add_column(title, no_wrap=True)
    for title in ("s", "M/s", "time", "peak memory", "7B (extrapolated)"):
        table.add_column(title, justify="right")
    for entry in report["results"]:
        peak = entry["peak_memory_bytes"]
        table.add_row(
            entry["step"],
            entry["version"],
            f"{entry['median_seconds']:.2f}",
            f"{entry['weights_per_second'] / 1e6:.0f}",
            f"{entry['time_over_ours']:.1f}",
            "" if peak is None else f"{peak / 1e6:.0f} MB",
            f"{entry['whole_model_seconds_extrapolated']:.0f} s",
        )
    console.print(table)
    for target in report["targets"]:
        verdict = "met" if target["met"] else "MISSED"
        console.print(
            f"{verdict}: {target['what']}: {target['measured']:.3g}, wanted at least "
            f"{target['at_least']:.3g}"
        )


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is below 1")
    return value


def parse(argv: Sequence[str] | None = None) -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--blocks", type=positive, default=4, help="0.2 G weights, 0.4 GB each")
    parser.add_argument("--pattern", default="6:8")
    parser.add_argument(
        "--threads", type=positive, default=worker_count(None), help="default: every core"
    )
    parser.add_argument("--ours", action="store_true", help="int8 of this library alone")
    parser.add_argument("--rounds", type=positive, default=3)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--output", type=Path, help="also write the report to this JSON file")
    parser.add_argument("--memory-of", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(argv)


def all_cases(pattern: str, threads: int) -> list[Case]:
    cases = [Case("int8", OURS, ours(pattern, threads, "int8", "magnitude"))]
    torch_run = with_torch(pattern, threads)
    if torch_run is not None:
        cases.append(Case("int8", "torch", torch_run))
    return [
        *cases,
        Case("int8, from disk", OURS, ours(pattern, threads, "int8", "magnitude"), cold=True),
        Case("int8, wanda", OURS, ours(pattern, threads, "int8", "wanda")),
        Case("fp8_e4m3", OURS, ours(pattern, threads, "fp8_e4m3", "magnitude")),
        Case("bf16", OURS, ours(pattern, threads, "bf16", "magnitude")),
    ]


def main() -> int:
    arguments = parse()
    cases = all_cases(arguments.pattern, arguments.threads)
    if arguments.ours:
        cases = [case for case in cases if case.name == OURS and case.step.startswith("int8")]
        cases = [case for case in cases if "wanda" not in case.step]
    if arguments.memory_of:
        case = next(case for case in cases if case.name == arguments.memory_of)
        memory_child(case, arguments.model, arguments.folder)
        return 0
    console = Console()
    report = circumstances(arguments)
    report["load_average_before"] = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        out = Path(folder) / "out"
        with console.status("writing the checkpoint"):
            model = make_checkpoint(Path(folder) / "model", arguments.blocks)
        direct = [case for case in cases if case.step == "int8"]
        try:
            with console.status("comparing outputs"):
                for case in direct:
                    case.run(model, Path(folder) / case.name)
                for case in direct[1:]:
                    group = ss.Pattern.parse(arguments.pattern).group
                    compare(Path(folder) / OURS, Path(folder) / case.name, group)
        except Mismatch as error:
            console.print(f"not measured, because outputs differ: {error}")
            return 1
        for case in direct:
            shutil.rmtree(Path(folder) / case.name)
        with Progress(console=console) as progress:
            task = progress.add_task("measuring", total=len(cases) * arguments.rounds)
            seconds = measure(cases, model, out, arguments.rounds, lambda: progress.advance(task))
        memory: dict[str, int] = {}
        for case in direct if STATUS.exists() else ():
            memory[case.name] = measure_memory(arguments, model, case, out)
    report["load_average_after"] = os.getloadavg()[0]
    report["results"] = summarize(seconds, memory, report)
    rate = report["results"][0]["weights_per_second"]
    report["targets"] = [
        {
            "what": "int8, weights per second",
            "at_least": TARGET_RATE,
            "measured": rate,
            "met": rate >= TARGET_RATE,
        }
    ]
    render(report, console)
    if arguments.output is not None:
        arguments.output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
