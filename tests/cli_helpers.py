"""What the tests of the command line share."""

from __future__ import annotations

import io

import ml_dtypes
import numpy as np

from slidesparse_rt.cli import main
from slidesparse_rt.packing import TensorFile, prune, write_file

#: The command line as a program for ``python -c``.
PROGRAM = "import sys; from slidesparse_rt.cli import main; sys.exit(main())"

#: A name that would turn a terminal red, or look like markup.
HOSTILE = "[red]\x1b[31mx\n.weight"

#: What ``prune`` prunes in the checkpoint below unless told otherwise.
PRUNED = ("layers.0.q.weight", "layers.0.k.weight", "layers.0.v.weight", HOSTILE)


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def random(*shape, dtype=np.float32, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def make_checkpoint(path):
    """A checkpoint with something of every kind."""
    tensors = {
        "model.Embed_tokens.weight": random(10, 16, seed=1),
        "layers.0.q.weight": random(24, 40, seed=2),
        "layers.0.k.weight": random(16, 35, dtype=ml_dtypes.bfloat16, seed=3),
        "layers.0.v.weight": prune(random(8, 30, dtype=np.float16, seed=4), "4:6"),
        "layers.0.LayerNorm.weight": random(24, 24, seed=5),
        "layers.0.q.bias": random(24, seed=6),
        "layers.0.conv.weight": random(4, 4, 3, seed=7),
        "lm_head": random(6, 20, seed=8),
        "empty.weight": np.empty((0, 8), np.float32),
        "scale.weight": np.float32(2.5).reshape(()),
        "ids": np.arange(5, dtype=np.int64),
        HOSTILE: random(8, 8, seed=9),
    }
    write_file(path, tensors, {"format": "pt", "note": "as it was"})
    return path


def in_process(capsys):
    """The command line, run in this process: arguments -> (exit code, stdout, stderr)."""

    def run(*arguments):
        code = main([str(argument) for argument in arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def read(path):
    """Every tensor of a file, by name."""
    with TensorFile(path) as file:
        return {name: np.array(file.read(name)) for name in file.keys()}  # noqa: SIM118


def same_bytes(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.tobytes() == b.tobytes()


def leftovers(folder):
    """Files whose names begin with a dot: temporary ones."""
    return [path.name for path in folder.iterdir() if path.name.startswith(".")]
