"""Result files, read and merged: of two measurements of one case, the later one counts."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from ...errors import FormatError
from ..gemm import add_efficiency
from ..record import upgraded
from ..shapes import MODELS, SQUARES, expanded, model
from ..sides import DENSE

__all__ = [
    "BOTH",
    "CPU",
    "SCRIPTS",
    "Case",
    "Key",
    "Measured",
    "Result",
    "asked",
    "by_model",
    "machines",
    "merged",
    "newest_of",
    "operators",
    "products",
    "read_result",
    "stages",
    "title_of",
]

#: What :attr:`Result.machine` says where there is no GPU.
CPU = "CPU"
#: The stage of an operator around its product, where its parts were not measured.
BOTH = "quantize, lift and second pass"


#: What makes two rows the same case, of benchmarks whose rows have no sides.
_CASE_OF = {
    "quantize": ("kernel", "x", "out", "pattern", "m", "columns"),
    "overhead": ("call", "backend", "dtype"),
    "packing": ("step", "version"),
}
#: What rows have of scripts in benchmarks/, whose files have no schema.
SCRIPTS: Mapping[str, frozenset[str]] = {
    "end-to-end": frozenset(
        {"phase", "m", "side", "us", "rounds_us", "tokens_per_s", "linear_us", "ratio", "bytes"}
        | {"pattern", "cosine"}
    ),
    "accuracy": frozenset(
        {"pattern", "dtype", "method", "bits_per_byte", "perplexity", "more_bits", "backends"}
    ),
}
#: What these files have beside rows.
_SCRIPT_KEYS: dict[str, tuple[type, ...]] = {
    "command": (str,),
    "commit": (dict, type(None)),
    "gpu": (dict, type(None)),
    "versions": (dict,),
    "settings": (dict,),
    "linear_weights": (int,),
    "complete": (bool,),
    "rows": (list,),
}
_MORE_SCRIPT_KEYS: dict[str, dict[str, tuple[type, ...]]] = {
    "end-to-end": {"model": (str,)},
    "accuracy": {"text": (dict,), "training": (dict,)},
}


@dataclass(frozen=True, slots=True)
class Result:
    """One result file.

    Attributes
    ----------
    name:
        The file's name.
    document:
        What it holds, as :mod:`~slidesparse_rt.bench.record` describes it.
    """

    name: str
    document: Mapping[str, Any]

    @property
    def what(self) -> str:
        """Which benchmark it is."""
        return str(self.document["what"])

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The measurements."""
        rows: list[dict[str, Any]] = self.document["rows"]
        return rows

    @property
    def machine(self) -> str:
        """A short name of the GPU, such as "H100", or :data:`CPU`."""
        gpu = self.document["gpu"]
        if gpu is None:
            return CPU
        name = str(gpu["name"]).removeprefix("NVIDIA ")
        match = re.match(r"(?:GeForce )?[\w-]+(?: \d{4})?", name)
        return match[0] if match else name

    @property
    def commit(self) -> str:
        """The commit's first 7 digits, or "unknown"."""
        commit = self.document["commit"]
        return str(commit["id"])[:7] if commit else "unknown"


class Key(NamedTuple):
    """A case of ``bench gemm`` or ``bench pipeline``, without the side."""

    model: str
    pattern: str
    dtype: str
    m: int
    stage: str
    mode: str


class Case(NamedTuple):
    """One row, and the file that it is from."""

    row: Mapping[str, Any]
    result: Result

    def us(self, side: str) -> float:
        """Microseconds of a side."""
        return float(self.row["us"][side])


#: The cases of one side.
Measured = dict[Key, Case]


def read_result(path: Path) -> Result:
    """Read a result file of any version; FormatError, naming it, for anything else."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(document, dict):
            raise FormatError("this is no result of a benchmark: it is no JSON object")
        scripted = "schema" not in document and str(document.get("what")) in SCRIPTS
        document = _of_script(document) if scripted else upgraded(document)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise FormatError(f"{path} is no JSON file: {error}") from None
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from None
    if document["what"] in ("gemm", "pipeline"):
        add_efficiency(document["rows"])
    return Result(path.name, document)


def _of_script(document: Mapping[str, Any]) -> dict[str, Any]:
    """A document of :data:`SCRIPTS` with every key that reports read; FormatError for another."""
    what = str(document["what"])
    for key, kinds in (_SCRIPT_KEYS | _MORE_SCRIPT_KEYS[what]).items():
        if not isinstance(document.get(key, ...), kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise FormatError(f"a result of {what!r} has {key!r}, of type {names}; this has not")
    for index, row in enumerate(document["rows"]):
        missing = sorted(SCRIPTS[what] - set(row))
        if missing:
            raise FormatError(f"row {index} lacks {', '.join(missing)}")
    return {"left_out": []} | dict(document)


def asked(result: Result, setting: str) -> list[str]:
    """The values of a list among the settings of a script, which writes them as text."""
    return re.findall(r"[\w.:]+", str(result.document["settings"].get(setting, "")))


def machines(results: Iterable[Result]) -> dict[str, list[Result]]:
    """The results by machine, in the order of their first file."""
    found: dict[str, list[Result]] = {}
    for result in results:
        found.setdefault(result.machine, []).append(result)
    return found


def products(results: Iterable[Result], what: str) -> dict[str, Measured]:
    """The cases of "gemm" or "pipeline" results by side, dense left out.

    Of several measurements of a case the one of the file with the latest time counts; where files
    are equally old, the one that is named last.
    """
    found: dict[str, Measured] = {}
    for result in _oldest_first(results, what):
        for row in result.rows:
            key = Key(
                _model_name(row), row["pattern"], row["dtype"], row["m"], row["stage"], row["mode"]
            )
            for side in _sides(row):
                found.setdefault(side, {})[key] = Case(row, result)
    return found


def by_model(rows: Measured) -> dict[str, Measured]:
    """The cases of each model, in the order of :data:`.shapes.MODELS`; squares together, last."""
    found: dict[str, Measured] = {}
    squares = set(expanded((SQUARES,)))
    for key, case in rows.items():
        found.setdefault(SQUARES if key.model in squares else key.model, {})[key] = case
    order = list(MODELS)

    def place(name: str) -> tuple[bool, int]:
        known = name.partition(" (")[0]  # without its layers
        return name == SQUARES, order.index(known) if known in order else len(order)

    return dict(sorted(found.items(), key=lambda item: place(item[0])))


def title_of(model: str) -> str:
    """A name of :func:`by_model` as people read it."""
    return f"{SQUARES} (M = N = K)" if model == SQUARES else model


def newest_of(cases: Iterable[Case]) -> str:
    """The commit of the most recent of the files that cases are from; "" without any."""
    files = _by_age(case.result for case in cases)
    return files[-1].commit if files else ""


def merged(results: Iterable[Result], what: str) -> list[dict[str, Any]]:
    """The rows of "quantize", "overhead" or "packing" results, merged as :func:`products` does."""
    found: dict[tuple[Any, ...], dict[str, Any]] = {}
    for result in _oldest_first(results, what):
        for row in result.rows:
            found[tuple(row.get(part) for part in _CASE_OF[what])] = row
    return list(found.values())


def _oldest_first(results: Iterable[Result], what: str) -> list[Result]:
    return _by_age(result for result in results if result.what == what)


def _by_age(results: Iterable[Result]) -> list[Result]:
    return sorted(results, key=lambda result: str(result.document["time"]))


def operators(rows: Measured, pattern: str) -> Iterator[tuple[Key, Case, Case]]:
    """Products of a pattern in bursts, by M, each with the operator of the same run.

    Stages of different runs have no difference that means anything.
    """
    for key, product in sorted(rows.items(), key=lambda item: item[0].m):
        whole = rows.get(key._replace(stage="op"))
        wanted = (key.pattern, key.stage, key.mode) == (pattern, "gemm", "burst")
        if wanted and whole is not None and whole.result == product.result:
            yield key, product, whole


def stages(product: Case, whole: Case, side: str) -> tuple[tuple[str, float], ...]:
    """What an operator consists of, and the microseconds of each part.

    The product's time is its own measurement, and so is that of quantizing where the file has it;
    the rest is what is left of the operator, at least 0.
    """
    own = product.us(side)
    rest = max(0.0, whole.us(side) - own)
    quantized = (whole.row.get("quantize_us") or {}).get(side)
    if _fused(product, side):
        return (("product", own), ("quantize and lift", rest))
    if quantized is None:
        return (("product", own), (BOTH, rest))
    first = min(rest, float(quantized))
    return (("product", own), ("quantize and lift", first), ("second pass", rest - first))


def _fused(product: Case, side: str) -> bool:
    """Whether a side's product writes results, so that there is no second pass."""
    kernels = product.row.get("kernels") or {}
    return str(kernels.get(side)).startswith("bfloat16 results")


def _sides(row: Mapping[str, Any]) -> Iterator[str]:
    return (side for side in row["ratio"] if side != DENSE)


def _model_name(row: Mapping[str, Any]) -> str:
    """The model, and its layers where they are not all of them."""
    name, layers = str(row["model"]), row.get("layers")
    if layers is None:
        return name
    try:
        whole = [layer.name for layer in model(name).layers]
    except ValueError:  # a model that this version does not know
        return name
    return name if list(layers) == whole else f"{name} ({', '.join(layers)})"
