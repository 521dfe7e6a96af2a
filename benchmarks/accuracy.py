"""What pruning costs a language model: bits per byte of a small decoder, trained here.

    python benchmarks/accuracy.py OUT.json

Trains a Llama-style decoder (decoder.py) on bytes of real text, the Python sources, documentation
and licences that are installed beside this Python, for --minutes; then measures it on files that it
has not seen: in bf16, and with every linear layer but the head run by SparseGemmPlan with each
pattern, operand format and way of pruning.  Nothing is trained after pruning.

"wanda" scores a weight by its size times the norm of its input over --calibration bytes of the
training files (slidesparse_rt.prune(..., method="wanda")); "magnitude" by its size alone.

Runs on a GPU through its kernels, and on a CPU through the exact reference, where it is slow.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import sys
import sysconfig
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from decoder import LAYERS, Decoder, Linear, Sizes

import slidesparse_rt as ss
from slidesparse_rt.bench.record import command_line, environment, write_json
from slidesparse_rt.packing.prune import METHODS

#: 75 million weights in linear layers; the vocabulary is the bytes.
SIZES = Sizes(768, 12, 4, 64, 2048, 12, 256, rope_theta=1e4)
SUFFIXES = (".py", ".pyi", ".md", ".rst", ".txt")
#: Of how many files one is kept for measuring.
_HELD_OUT = 40


# --- text -----------------------------------------------------------------------------------------


def text_files(folders: Iterable[Path], most_bytes: int) -> list[tuple[str, bytes]]:
    """(package, content) of different text files, in an order that follows from their content."""
    found: dict[str, tuple[str, bytes]] = {}
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.suffix not in SUFFIXES or not path.is_file():
                continue
            content = path.read_bytes()
            if 200 <= len(content) <= 1_000_000 and b"\0" not in content:
                digest = hashlib.sha256(content).hexdigest()
                found[digest] = (path.relative_to(folder).parts[0], content)
    chosen, total = [], 0
    for digest in sorted(found):
        package, content = found[digest]
        if total + len(content) > most_bytes:
            break
        chosen.append((package, content))
        total += len(content)
    return chosen


def default_folders() -> list[Path]:
    """The standard library's folder and that of installed packages."""
    names = ("stdlib", "purelib", "platlib")
    return sorted({Path(sysconfig.get_path(name)) for name in names})


def split(files: Sequence[tuple[str, bytes]]) -> tuple[np.ndarray, np.ndarray]:
    """Bytes to train on, and bytes of other files to measure on."""
    kinds: tuple[list[bytes], list[bytes]] = ([], [])
    for number, (_, content) in enumerate(files):
        kinds[number % _HELD_OUT == 0].append(content)
    train, held_out = (np.frombuffer(b"\n".join(parts), np.uint8) for parts in kinds)
    return train, held_out


def batches(data: np.ndarray, batch: int, length: int, seed: int) -> Iterator[torch.Tensor]:
    """Random pieces of ``data`` for ever: (batch, length + 1)."""
    draw = np.random.default_rng(seed)
    while True:
        starts = draw.integers(0, len(data) - length - 1, batch)
        pieces = np.stack([data[start : start + length + 1] for start in starts])
        yield torch.from_numpy(pieces.astype(np.int64))


# --- the model ------------------------------------------------------------------------------------


class Weights:
    """A decoder's parameters in float32, used in bf16."""

    def __init__(self, sizes: Sizes, device: str, seed: int = 0) -> None:
        self.sizes = sizes
        draw = torch.Generator(device=device).manual_seed(seed)

        def parameter(shape: tuple[int, int], scale: float) -> torch.Tensor:
            made = torch.empty(shape, device=device).normal_(0.0, scale, generator=draw)
            return made.requires_grad_()

        depth = (2 * sizes.blocks) ** -0.5
        self.blocks = [
            {
                name: parameter(
                    sizes.layer(name),
                    sizes.layer(name)[1] ** -0.5 * (depth if name in ("o", "down") else 1.0),
                )
                for name in LAYERS
            }
            for _ in range(sizes.blocks)
        ]
        self.embedding = parameter((sizes.vocabulary, sizes.hidden), 1.0)
        self.head = parameter((sizes.vocabulary, sizes.hidden), sizes.hidden**-0.5)

    @property
    def parameters(self) -> list[torch.Tensor]:
        """All of them."""
        return [w for block in self.blocks for w in block.values()] + [self.embedding, self.head]

    def decoder(self, linears: list[dict[str, Linear]], length: int) -> Decoder:
        """A decoder with these tables and the given linear layers."""
        tables = (self.embedding.bfloat16(), self.head.bfloat16())
        return Decoder(self.sizes, linears, *tables, longest=length)

    def linears(self) -> list[dict[str, Linear]]:
        """The linear layers in bf16."""

        def linear(w: torch.Tensor) -> Linear:
            return lambda x: F.linear(x, w.bfloat16())

        return [{name: linear(w) for name, w in block.items()} for block in self.blocks]


def loss_of(decoder: Decoder, pieces: torch.Tensor) -> torch.Tensor:
    """Mean natural-log loss of the bytes of (B, S + 1), each from those before it."""
    hidden = decoder.hidden(pieces[:, :-1])
    logits = F.linear(hidden, decoder.head).float()
    return F.cross_entropy(logits.flatten(0, 1), pieces[:, 1:].flatten())


def train(
    weights: Weights,
    data: np.ndarray,
    *,
    minutes: float,
    batch: int,
    length: int,
    most_steps: int | None = None,
    rate: float = 1e-3,
    compiled: bool = True,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """Train for so long, or so many steps; the rate rises, then falls.  Returns what was done."""
    device = weights.head.device
    optimizer = torch.optim.AdamW(
        weights.parameters, rate, betas=(0.9, 0.95), weight_decay=0.1, fused=device.type == "cuda"
    )

    def step_loss(pieces: torch.Tensor) -> torch.Tensor:
        return loss_of(weights.decoder(weights.linears(), length), pieces)

    run = torch.compile(step_loss) if compiled else step_loss
    started, steps, losses = time.monotonic(), 0, [0.0]
    for pieces in batches(data, batch, length, seed=1):
        seconds = time.monotonic() - started
        share = seconds / (60 * minutes) if most_steps is None else steps / most_steps
        if share >= 1.0 and steps:
            break
        for group in optimizer.param_groups:
            # A rise over a twentieth, then half a cosine down to a tenth.
            fall = 0.55 + 0.45 * math.cos(math.pi * share)
            group["lr"] = rate * min(1.0, (share + 1e-3) * 20) * fall
        loss = run(pieces.to(device, non_blocking=True))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.parameters, 1.0)
        optimizer.step()
        steps += 1
        if steps % 200 == 0 or steps == 1:
            losses.append(float(loss.detach()))
            say(f"step {steps}, {seconds:.0f} s: {losses[-1] / math.log(2):.3f} bits")
    return {
        "steps": steps,
        "bytes_seen": steps * batch * length,
        "seconds": time.monotonic() - started,
        "last_bits": losses[-1] / math.log(2),
    }


# --- measuring ------------------------------------------------------------------------------------


def bits_per_byte(decoder: Decoder, data: np.ndarray, *, batch: int, length: int) -> float:
    """Over consecutive pieces of ``data``."""
    pieces = len(data) // (length + 1)
    rows = torch.from_numpy(data[: pieces * (length + 1)].astype(np.int64)).view(pieces, -1)
    total, count = 0.0, 0
    with torch.inference_mode():
        for start in range(0, pieces, batch):
            part = rows[start : start + batch].to(decoder.head.device)
            total += float(loss_of(decoder, part)) * part[:, 1:].numel()
            count += part[:, 1:].numel()
    return total / count / math.log(2)


def input_norms(
    weights: Weights, data: np.ndarray, *, count: int, batch: int, length: int
) -> list[dict[str, torch.Tensor]]:
    """The norm of each input of each linear layer over ``count`` bytes: float32 (K)."""
    sums = [
        {name: torch.zeros(w.shape[1], dtype=torch.float64) for name, w in block.items()}
        for block in weights.blocks
    ]

    def watched(linear: Linear, held: dict[str, torch.Tensor], name: str) -> Linear:
        def run(x: torch.Tensor) -> torch.Tensor:
            held[name] += x.float().square().sum(dim=0).double().cpu()
            return linear(x)

        return run

    linears = [
        {name: watched(linear, held, name) for name, linear in block.items()}
        for block, held in zip(weights.linears(), sums, strict=True)
    ]
    decoder = weights.decoder(linears, length)
    rounds = -(-count // (batch * length))
    with torch.inference_mode():
        for _, pieces in zip(range(rounds), batches(data, batch, length, seed=2), strict=False):
            decoder.hidden(pieces[:, :-1].to(decoder.head.device))
    return [{name: held.sqrt().float() for name, held in block.items()} for block in sums]


def planned(
    weights: Weights, pattern: str, dtype: str, method: str, norms: Any, workspace: Any
) -> tuple[list[dict[str, Linear]], list[ss.SparseGemmPlan]]:
    """The linear layers pruned, quantized and run by plans."""
    plans: list[ss.SparseGemmPlan] = []
    linears = []
    options = ss.PlanOptions(workspace=workspace)
    for block, of_block in zip(weights.blocks, norms, strict=True):
        made: dict[str, Linear] = {}
        for name, w in block.items():
            held: Any = w.detach().bfloat16()
            if pattern != "dense":
                scores: Any = None
                if method == "wanda":
                    scores = of_block[name].to(held.device)
                held = ss.prune(held, pattern, method=method, norms=scores)
            plan = ss.SparseGemmPlan(
                held, pattern, dtype=dtype, device=str(w.device), options=options
            )
            plans.append(plan)
            made[name] = plan.run
        linears.append(made)
    return linears, plans


def cases(patterns: Sequence[str], dtypes: Sequence[str]) -> Iterator[tuple[str, str, str]]:
    """(pattern, operand format, method); "dense" is not pruned."""
    for dtype in dtypes:
        yield "dense", dtype, "none"
        for pattern in patterns:
            for method in METHODS:
                yield pattern, dtype, method


def measured(
    weights: Weights, data: np.ndarray, norms: Any, options: argparse.Namespace
) -> Iterator[dict[str, Any]]:
    """A row for bf16 without plans, and one for each case."""
    sizes = {"batch": options.batch, "length": options.length}
    plain = bits_per_byte(weights.decoder(weights.linears(), options.length), data, **sizes)

    def row(pattern: str, dtype: str, method: str, bits: float, backends: list[str]) -> Any:
        return {
            "pattern": pattern,
            "dtype": dtype,
            "method": method,
            "bits_per_byte": bits,
            "perplexity": 2.0**bits,
            "more_bits": bits - plain,
            "backends": backends,
        }

    yield row("dense", "bf16", "none", plain, ["torch"])
    gpu = weights.head.device.type == "cuda"
    workspace = ss.Workspace(str(weights.head.device)) if gpu else None
    tokens = options.batch * options.length
    for pattern, dtype, method in cases(options.patterns, options.dtypes):
        linears, plans = planned(weights, pattern, dtype, method, norms, workspace)
        bits = bits_per_byte(weights.decoder(linears, options.length), data, **sizes)
        yield row(pattern, dtype, method, bits, sorted({p.backend_for(tokens) for p in plans}))
        for plan in plans:
            plan.close()
    if workspace is not None:
        workspace.close()


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Bits per byte as Markdown: patterns down, formats and methods across."""
    columns = list(dict.fromkeys((r["dtype"], r["method"]) for r in rows if r["method"] != "none"))
    cells = {(r["pattern"], r["dtype"], r["method"]): r for r in rows if r["backends"] != ["torch"]}
    lines = ["| pattern | " + " | ".join(f"{d}, {m}" for d, m in columns) + " |"]
    lines.append("|---" * (len(columns) + 1) + "|")
    for pattern in dict.fromkeys(r["pattern"] for r in rows):
        found = []
        for dtype, method in columns:
            cell = cells[pattern, dtype, "none" if pattern == "dense" else method]
            found.append(f"{cell['bits_per_byte']:.4f} ({cell['more_bits']:+.4f})")
        lines.append(f"| {pattern} | " + " | ".join(found) + " |")
    return "\n".join(lines)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("output", type=Path)
    parser.add_argument("--folders", nargs="+", type=Path, default=None)
    parser.add_argument("--megabytes", type=float, default=300)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--steps", type=int, default=None, help="instead of --minutes")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--calibration", type=int, default=1 << 20)
    parser.add_argument("--held-out", type=int, default=1 << 21, help="bytes to measure on")
    parser.add_argument("--patterns", nargs="+", default=["8:10", "6:8", "4:6", "2:4"])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "int8", "fp8_e4m3"])
    parser.add_argument("--blocks", type=int, default=SIZES.blocks)
    parser.add_argument("--hidden", type=int, default=SIZES.hidden)
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--commit")
    return parser.parse_args(arguments)


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Train, measure, write the file."""
    torch.manual_seed(0)
    files = text_files(options.folders or default_folders(), int(options.megabytes * 1e6))
    train_data, held_out = split(files)
    held_out = held_out[: options.held_out]
    packages = Counter()
    for package, content in files:
        packages[package] += len(content)
    head = options.hidden // SIZES.heads
    sizes = Sizes(
        options.hidden,
        SIZES.heads,
        SIZES.kv_heads,
        head,
        options.hidden * 8 // 3,
        options.blocks,
        SIZES.vocabulary,
        rope_theta=SIZES.rope_theta,
    )
    weights = Weights(sizes, options.device)
    trained = train(
        weights,
        train_data,
        minutes=options.minutes,
        batch=options.batch,
        length=options.length,
        most_steps=options.steps,
        compiled=not options.no_compile,
    )
    gpu = None
    if options.device.startswith("cuda"):
        from slidesparse_rt.bench.timing import Gpu

        gpu = Gpu(0).facts()
    document: dict[str, Any] = environment(gpu, commit=options.commit) | {
        "what": "accuracy",
        "command": command_line(sys.argv),
        "settings": {key: str(value) for key, value in vars(options).items()},
        "linear_weights": sizes.linear_weights,
        "text": {
            "files": len(files),
            "train_bytes": len(train_data),
            "held_out_bytes": len(held_out),
            "largest": dict(packages.most_common(20)),
        },
        "training": trained,
        "complete": False,
        "rows": [],
    }
    norms = input_norms(
        weights, train_data, count=options.calibration, batch=options.batch, length=options.length
    )
    for row in measured(weights, held_out, norms, options):
        document["rows"].append(row)
        print(
            f"{row['pattern']} {row['dtype']} {row['method']}: {row['bits_per_byte']:.4f} bits per "
            f"byte ({row['more_bits']:+.4f}), {', '.join(row['backends'])}",
            flush=True,
        )
        write_json(options.output, document)
    document["complete"] = True
    write_json(options.output, document)
    print(table(document["rows"]))
    return document


if __name__ == "__main__":
    run(parse(sys.argv[1:]))
