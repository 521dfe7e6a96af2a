"""Activation norms for Wanda: a model runs over given texts, hooks collect what its layers see.

Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models"
(arXiv 2306.11695): the importance of a weight is its magnitude times the l2 norm of its input over
the calibration tokens.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from .._version import __version__
from ..arrays import NDArray
from ..dtypes import operand
from ..errors import BackendUnavailable, NonFiniteError, OptionError
from ..packing import write_file
from ..pattern import Pattern
from .checkpoint import Checkpoint, listed
from .layers import Layer, Settings, choose
from .names import DEFAULT_EXCLUDE, checked_globs
from .norms import NORMS_FORMAT, NORMS_VERSION

__all__ = ["CalibrationReport", "calibrate"]

#: Called as sequences are run: (what is being done, sequences done, sequences in all).
Progress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True, slots=True)
class CalibrationReport:
    """What :func:`calibrate` did.

    Attributes
    ----------
    output:
        The file of norms.
    layers:
        How many have norms.
    tokens, sequences:
        What the model ran over.
    texts:
        Name and SHA-256 of each text.
    unseen:
        Layers that no token reached (experts): their norms are zeros.
    seconds:
        How long it took.
    """

    output: Path
    layers: int
    tokens: int
    sequences: int
    texts: tuple[dict[str, str], ...]
    unseen: tuple[str, ...]
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return {
            "output": str(self.output),
            "layers": self.layers,
            "tokens": self.tokens,
            "sequences": self.sequences,
            "texts": list(self.texts),
            "unseen": list(self.unseen),
            "seconds": self.seconds,
        }


def calibrate(
    source: str | os.PathLike[str],
    texts: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str] | None = None,
    *,
    sequences: int = 128,
    length: int = 2048,
    device: str = "cpu",
    include: Iterable[str] = (),
    exclude: Iterable[str] = DEFAULT_EXCLUDE,
    force: bool = False,
    progress: Progress | None = None,
) -> CalibrationReport:
    """Run a model over texts and write the l2 norm of each input of its linear layers.

    Squares are summed in float64.  The model runs in the type of its checkpoint, all of it in the
    memory of ``device``.

    Parameters
    ----------
    source:
        Folder of a Hugging Face causal language model with its tokenizer, not quantized.
    texts:
        UTF-8 files, at least one.  Their tokens, joined in order, are cut into sequences.
    output:
        The file to write; ``None``: ``<source>-norms.safetensors`` beside the folder.
    sequences, length:
        Most sequences, and tokens in each (no more than the model has positions).  The last one is
        shorter where the texts end.
    device:
        PyTorch's name of a device.
    include, exclude:
        As for :func:`~slidesparse_rt.convert.convert_checkpoint`.
    force:
        Replace ``output`` if it exists.
    progress:
        Called with ("calibrating", sequences done, sequences in all).

    Returns
    -------
    CalibrationReport
        How much was run, and layers that no token reached.

    Raises
    ------
    BackendUnavailable
        If PyTorch or transformers is not installed.
    OptionError
        For options out of range, texts without tokens, models that transformers cannot load, and an
        output that exists.
    NonFiniteError
        If the model produces a NaN or an infinity.
    FormatError, DTypeError, OSError
        For a damaged checkpoint, and where files cannot be read or written.
    """
    began = time.perf_counter()
    root = Path(source)
    target = root.resolve().with_name(f"{root.resolve().name}-norms.safetensors")
    if output is not None:
        target = Path(output)
    for name, value in (("sequences", sequences), ("length", length)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise OptionError(f"{name} is {value!r}; allowed is a whole number from 1 on")
    if isinstance(texts, (str, os.PathLike)) or not texts:
        raise OptionError(f"texts is {texts!r}; give a list of at least one file")
    if target.exists() and not force:
        raise OptionError(f"{target} exists; give another output, or --force to replace it")
    if not target.absolute().parent.is_dir():
        raise OptionError(f"{target.absolute().parent} is no folder; make it first")
    checkpoint = Checkpoint.open(root)
    settings = Settings(
        pattern=Pattern.parse("dense"),
        dtype=operand("bf16"),
        method="wanda",
        include=checked_globs(include, "include"),
        exclude=checked_globs(exclude, "exclude"),
    )
    layers = choose(checkpoint, settings).layers
    contents = [_text(Path(path)) for path in texts]
    torch, transformers = _frameworks()

    model, tokens = _loaded(transformers, checkpoint, [text for _, text in contents], device)
    length = min([length, *checkpoint.setting("max_position_embeddings")])
    pieces = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    pieces = pieces[:sequences]
    squares = _run(torch, model, _modules(model, layers), pieces, device, progress)

    norms: dict[str, NDArray] = {}
    for module, layer in layers.items():
        values = np.sqrt(squares[module])
        if not np.isfinite(values).all():
            raise NonFiniteError(
                f"inputs of {module} hold a NaN or an infinity; check that the model works on "
                f"these texts, for instance in another type"
            )
        norms[layer.weight.name] = values.astype(np.float32)
    described = tuple(
        {"name": Path(path).name, "sha256": digest}
        for path, (digest, _) in zip(texts, contents, strict=True)
    )
    count = sum(map(len, pieces))
    write_file(
        target,
        norms,
        {
            "format": NORMS_FORMAT,
            "format_version": str(NORMS_VERSION),
            "fingerprint": checkpoint.fingerprint(),
            "tokens": str(count),
            "sequences": str(len(pieces)),
            "length": str(length),
            "texts": json.dumps(described),
            "writer": f"slidesparse_rt {__version__}",
        },
    )
    return CalibrationReport(
        output=target,
        layers=len(layers),
        tokens=count,
        sequences=len(pieces),
        texts=described,
        unseen=tuple(module for module in layers if not squares[module].any()),
        seconds=time.perf_counter() - began,
    )


def _text(path: Path) -> tuple[str, str]:
    """SHA-256 and content of a text."""
    raw = path.read_bytes()
    try:
        return hashlib.sha256(raw).hexdigest(), raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise OptionError(f"{path} is no UTF-8 text ({error}); convert it first") from error


def _frameworks() -> tuple[Any, Any]:
    try:
        import torch
        import transformers
    except ImportError as error:
        raise BackendUnavailable(
            f"calibration runs the model with PyTorch and transformers, and {error.name} is not "
            f"installed: pip install 'slidesparse-rt[convert]'"
        ) from error
    return torch, transformers


def _loaded(
    transformers: Any, checkpoint: Checkpoint, texts: Sequence[str], device: str
) -> tuple[Any, list[int]]:
    """The model, ready to run, and the tokens of the texts."""
    folder = str(checkpoint.folder)
    try:
        with _quiet(transformers):
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            model, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder, torch_dtype="auto", output_loading_info=True
            )
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise OptionError(
            f"transformers cannot load {folder} as a causal language model with its tokenizer: "
            f"{error}"
        ) from error
    missing = sorted(found["missing_keys"])
    if missing:
        raise OptionError(
            f"{folder} lacks {len(missing)} weights of transformers' {type(model).__name__}: "
            f"{listed(missing)}; it would run with random numbers instead, so get an intact "
            f"checkpoint"
        )
    tokens: list[int] = []
    for text in texts:
        tokens += tokenizer(text, verbose=False)["input_ids"]
    if not tokens:
        raise OptionError("the texts hold no token; give longer ones")
    try:
        return model.to(device).eval(), tokens
    except (RuntimeError, AssertionError) as error:
        raise OptionError(f"PyTorch cannot use device {device!r}: {error}") from error


@contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    """Without transformers' own progress bars, which are a setting of the whole process."""
    logging = transformers.utils.logging
    if not logging.is_progress_bar_enabled():
        yield
        return
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.enable_progress_bar()


def _modules(model: Any, layers: dict[str, Layer]) -> dict[str, Any]:
    """The model's module of each layer; a checkpoint may lack the prefix of the base model."""
    known = dict(model.named_modules())
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    found: dict[str, Any] = {}
    for name, layer in layers.items():
        for candidate in (name, prefix + name, name.removeprefix(prefix)):
            weight = getattr(known.get(candidate), "weight", None)
            if weight is not None and tuple(weight.shape) == layer.weight.shape:
                found[name] = known[candidate]
                break
    absent = [name for name in layers if name not in found]
    if absent:
        raise OptionError(
            f"transformers' {type(model).__name__} has no module for {len(absent)} of "
            f"{len(layers)} layers: {listed(absent)}; leave them out with --exclude"
        )
    return found


def _run(
    torch: Any,
    model: Any,
    modules: dict[str, Any],
    pieces: Sequence[Sequence[int]],
    device: str,
    progress: Progress | None,
) -> dict[str, NDArray]:
    """Sums of squares of each module's inputs, (K,) float64, over all tokens."""
    sums = {
        name: torch.zeros(module.weight.shape[1], dtype=torch.float64, device=device)
        for name, module in modules.items()
    }

    def collect(total: Any, module: Any, inputs: tuple[Any, ...]) -> None:
        del module
        rows = inputs[0].detach().reshape(-1, total.shape[0])
        total += rows.to(torch.float64).square().sum(dim=0)

    with ExitStack() as stack, torch.inference_mode():
        for name, module in modules.items():
            hook = module.register_forward_pre_hook(partial(collect, sums[name]))
            stack.callback(hook.remove)
        for done, piece in enumerate(pieces):
            if progress is not None:
                progress("calibrating", done, len(pieces))
            model(input_ids=torch.tensor([list(piece)], device=device), use_cache=False)
    return {name: total.cpu().numpy() for name, total in sums.items()}
