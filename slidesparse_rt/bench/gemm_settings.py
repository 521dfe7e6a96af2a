"""What ``slidesparse bench gemm`` and ``pipeline`` measure, with what, and for how long."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from ..arrays import Device
from ..backends import Problem, choose
from ..dtypes import operand
from ..errors import BackendUnavailable, OptionError
from ..pattern import Pattern
from .shapes import Layer, Model, Square, expanded, model
from .sides import DENSE, SPARSE, WORKSPACE

__all__ = ["STAGES", "GemmSettings", "estimate", "usable_backends"]

STAGES = ("gemm", "op")
#: For estimates alone: operations a second of a dense product with 8-bit operands, the least
#: seconds that a round of a burst takes a side, and the seconds around the measuring: of a case,
#: and of the plans of a format.
_FLOPS = 1e15
_ROUND_SECONDS = 2.5e-4
_CASE_SECONDS = 1.0
_GROUP_SECONDS = 4.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GemmSettings:
    """What to measure.

    Attributes
    ----------
    models, tokens, dtypes, patterns:
        As in the command's options.  "squares" among the models becomes every square, whose number
        of tokens is its own.
    backends:
        The sparse sides; dense is always measured beside them.
    stages:
        Of :data:`STAGES`.
    layers:
        Names of layers; empty: all.
    layer_times:
        Also time the layers one by one.
    rounds:
        Rounds of a burst, at least 20 for a figure to be quoted.
    sustained:
        Also measure sustained.
    seconds, sustained_rounds:
        Length and number of sustained rounds.
    """

    #: Whether there is something to compare with dense even without a sparse backend.
    alone: ClassVar[bool] = False

    models: tuple[str, ...] = ("qwen2.5-7b",)
    tokens: tuple[int, ...] = (16, 64, 256, 1024, 4096, 16384)
    dtypes: tuple[str, ...] = ("int8", "fp8_e4m3", "bf16")
    patterns: tuple[str, ...] = ("6:8", "4:6", "2:4", "8:10")
    backends: tuple[str, ...] = SPARSE
    stages: tuple[str, ...] = STAGES
    layers: tuple[str, ...] = ()
    layer_times: bool = True
    rounds: int = 20
    sustained: bool = False
    seconds: float = 1.0
    sustained_rounds: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "models", expanded(self.models))
        for name in self.models:
            self.layers_of(model(name))
        for dtype in self.dtypes:
            operand(dtype)
        for pattern in self.patterns:
            Pattern.parse(pattern)
        if not self.tokens or min(self.tokens) < 1:
            raise OptionError(f"tokens is {list(self.tokens)}; allowed are numbers from 1 on")
        if self.rounds < 1 or self.sustained_rounds < 1 or self.seconds <= 0:
            raise OptionError("rounds and seconds must be positive")
        for what, chosen, allowed in (
            ("backends", self.backends, SPARSE),
            ("stages", self.stages, STAGES),
        ):
            few = not chosen and not (what == "backends" and self.alone)
            if few or set(chosen) - set(allowed) or len(set(chosen)) < len(chosen):
                raise OptionError(
                    f"{what} is {list(chosen)}; allowed are one or more of {', '.join(allowed)}, "
                    f"each once"
                )

    def layers_of(self, shape: Model | Square) -> tuple[Layer, ...]:
        """The chosen layers of a model; OptionError for a name that is none."""
        names = [layer.name for layer in shape.layers]
        wrong = [name for name in self.layers if name not in names]
        if wrong:
            raise OptionError(f"layer {wrong[0]!r} is unknown; allowed are {', '.join(names)}")
        return tuple(row for row in shape.layers if not self.layers or row.name in self.layers)

    def tokens_of(self, shape: Model | Square) -> tuple[int, ...]:
        """The numbers of tokens that a model is measured with; a square's are its size."""
        return (shape.size,) if isinstance(shape, Square) else self.tokens

    def to_json(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return {
            "models": list(self.models),
            "tokens": list(self.tokens),
            "dtypes": list(self.dtypes),
            "patterns": list(self.patterns),
            "backends": list(self.backends),
            "stages": list(self.stages),
            "layers": list(self.layers),
            "layer_times": self.layer_times,
            "rounds": self.rounds,
            "sustained": self.sustained,
            "seconds": self.seconds,
            "sustained_rounds": self.sustained_rounds,
            "x": "bfloat16, normal",
            "weight": "bfloat16, normal, pruned by magnitude; dense runs the same pruned weight",
            "out": "bfloat16",
            "workspace_limit": self.workspace_limit,
        }

    @property
    def workspace_limit(self) -> int:
        """Of the plans, in bytes: large enough that none is run in parts up to 32,768 tokens."""
        return WORKSPACE

    @property
    def tuning_seconds(self) -> float:
        """For estimates: seconds that a plan takes to measure backends when it is made."""
        return 0.0

    @property
    def sides(self) -> tuple[str, ...]:
        """The backends that are compared, dense the last."""
        return (*self.backends, DENSE)

    def weights(self) -> list[tuple[str, str]]:
        """(model, pattern), in the order of measuring; weights are made once for each."""
        return [(name, pattern) for name in self.models for pattern in self.patterns]

    @property
    def cases(self) -> int:
        """How many (model, pattern, operand format, number of tokens) there are."""
        return len(self.dtypes) * sum(
            len(self.tokens_of(model(name))) for name, _ in self.weights()
        )


def usable_backends(
    settings: GemmSettings, index: int, *, asked: bool
) -> tuple[tuple[str, ...], dict[str, str]]:
    """The sparse sides that GPU ``index`` can run, and why it cannot run the others.

    A side is usable that supports any of the operand formats.

    Parameters
    ----------
    settings:
        What is to be measured.
    index:
        CUDA's number of the GPU; its driver is there.
    asked:
        Whether each of ``settings.backends`` was asked for by name.

    Raises
    ------
    BackendUnavailable
        If dense, one that was asked for, or every sparse side cannot run.
    """
    pattern = Pattern.parse(settings.patterns[0])
    layer = settings.layers_of(model(settings.models[0]))[0]
    usable, refused = [], {}
    for name in (*settings.backends, DENSE):
        why = ""
        for dtype in settings.dtypes:
            try:
                choose(
                    name, Problem(layer.n, layer.k, pattern, operand(dtype)), Device("cuda", index)
                )
            except BackendUnavailable as error:
                why = str(error)
            else:
                usable.append(name)
                break
        else:
            if asked or name == DENSE:
                raise BackendUnavailable(why)
            refused[name] = why
    sparse = tuple(name for name in usable if name != DENSE)
    if not sparse and not settings.alone:
        raise BackendUnavailable("\n".join(refused.values()))
    return sparse, refused


def estimate(settings: GemmSettings) -> float:
    """About how many seconds the measuring takes on a large GPU, first-time compiling aside."""
    sides, total = len(settings.sides), 0.0
    for name, _ in settings.weights():
        layers = settings.layers_of(model(name))
        for dtype in settings.dtypes:
            total += _GROUP_SECONDS + settings.tuning_seconds * len(layers)
            for tokens in settings.tokens_of(model(name)):
                flops = sum(layer.flops(tokens) for layer in layers)
                once = flops / _FLOPS * operand(dtype).bits / 8
                stage = 0.05 + settings.rounds * sides * max(_ROUND_SECONDS, once)
                if settings.layer_times:
                    stage += settings.rounds * sides * max(len(layers) * _ROUND_SECONDS, once)
                if settings.sustained:
                    stage += sides * settings.sustained_rounds * (settings.seconds + 0.06)
                total += _CASE_SECONDS + stage * len(settings.stages)
    return total
