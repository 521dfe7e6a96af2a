"""``slidesparse bench pipeline``: what a user gets, bf16 in and bf16 out, beside dense alone.

The sides are ``SparseGemmPlan(backend="auto")``, which runs for each number of tokens what was
measured to be fastest there (docs/tuning.md), every sparse backend that supports the GPU, and
dense.  Cases, checks and both ways of timing are those of :mod:`~slidesparse_rt.bench.gemm`, stage
"op"; the plans have default options.  ``layer_how`` of a row says which backend ran each layer, and
``tuned`` what the choice went by: times measured in this run, times kept before it, or the rule.

The promises that this measures (:func:`promises`): with no number of tokens and no pattern is auto
below :data:`FLOOR` times the speed of dense, nor of the fastest single backend.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from ..errors import OptionError
from ..options import PlanOptions
from ..tuning.select import TUNINGS
from .clocks import Clocks
from .gemm import run_gemm
from .gemm_settings import GemmSettings
from .record import Budget, Record
from .sides import AUTO, DENSE, GpuSide, utc_now
from .timing import Gpu

__all__ = ["FLOOR", "PipelineSettings", "Promise", "noise", "promises", "run_pipeline"]

#: Least speed of "auto" over dense that is promised.
FLOOR = 0.98
#: For estimates alone: seconds in which a plan measures the backends of one layer.
_TUNE_SECONDS = 3.0


@dataclass(frozen=True, kw_only=True, slots=True)
class PipelineSettings(GemmSettings):
    """What to measure: as of ``bench gemm``, but whole operators alone, and "auto" beside them.

    Attributes
    ----------
    tuning:
        As of :class:`~slidesparse_rt.SparseGemmPlan`: "measure" measures what is not kept yet,
        "cached" reads what is kept, "heuristic" goes by the rule.
    """

    alone: ClassVar[bool] = True

    tokens: tuple[int, ...] = (1, 16, 48, 64, 200, 256, 1024, 3000, 4096, 16384)
    stages: tuple[str, ...] = ("op",)
    layer_times: bool = False
    tuning: str = "measure"

    def __post_init__(self) -> None:
        # Not super(): a dataclass with slots is another class than the one that is written here.
        GemmSettings.__post_init__(self)
        if self.stages != ("op",):
            raise OptionError(f"stages is {list(self.stages)}; a pipeline is measured whole: 'op'")
        if self.tuning not in TUNINGS:
            raise OptionError(
                f"tuning is {self.tuning!r}; allowed are {', '.join(map(repr, TUNINGS))}"
            )

    def to_json(self) -> dict[str, Any]:
        """Plain values for the result file."""
        return GemmSettings.to_json(self) | {"tuning": self.tuning, "floor": FLOOR}

    @property
    def sides(self) -> tuple[str, ...]:
        """What is compared: auto, the sparse backends, dense."""
        return (AUTO, *self.backends, DENSE)

    @property
    def workspace_limit(self) -> int:
        """The default of a plan."""
        return PlanOptions().workspace_limit

    @property
    def tuning_seconds(self) -> float:
        """For estimates: seconds that a plan takes to measure backends when it is made."""
        return _TUNE_SECONDS if self.tuning == "measure" else 0.0


def run_pipeline(
    gpu: Gpu,
    settings: PipelineSettings,
    record: Record,
    *,
    budget: Budget,
    clocks: Clocks,
    say: Callable[[str], None],
    done: Callable[[], None],
) -> None:
    """Measure every case; arguments as of :func:`~slidesparse_rt.bench.gemm.run_gemm`.

    What fails the check has no numbers, and fails the run.
    """
    run_gemm(
        gpu,
        settings,
        record,
        budget=budget,
        clocks=clocks,
        say=say,
        done=done,
        make_side=partial(
            GpuSide,
            tuning=settings.tuning,
            since=utc_now(),
            workspace_limit=settings.workspace_limit,
        ),
    )


@dataclass(frozen=True, slots=True)
class Promise:
    """What is promised of "auto", and where it comes closest to being broken.

    Attributes
    ----------
    against:
        What auto is compared with, for people.
    least:
        Its speed over that, where it is lowest.
    row:
        The row in which it is.
    """

    against: str
    least: float
    row: Mapping[str, Any]

    def __str__(self) -> str:
        row = self.row
        case = f"{row['model']} {row['pattern']} {row['dtype']} M={row['m']} {row['mode']}"
        verdict = "kept" if self.least >= FLOOR else "BROKEN"
        return (
            f"auto is at least {self.least:.3f} x as fast as {self.against} ({case}); promised is "
            f"{FLOOR}: {verdict}"
        )


def promises(rows: Iterable[Mapping[str, Any]]) -> list[Promise]:
    """Auto against dense, and against the fastest single backend of each row; none without rows.

    A backend that auto ran in every layer is left out: these are the same kernels twice, and what
    they differ by is in :func:`noise`.
    """
    dense: list[tuple[float, Mapping[str, Any]]] = []
    single: list[tuple[float, Mapping[str, Any]]] = []
    for row in rows:
        us = dict(row["us"])
        auto = us.pop(AUTO, None)
        if auto is None:
            continue
        us.pop(_alone(row), None)
        if DENSE in us:
            dense.append((us[DENSE] / auto, row))
        if us:
            single.append((min(us.values()) / auto, row))
    against = {"dense": dense, "the fastest single backend": single}
    return [
        Promise(name, *min(found, key=lambda pair: pair[0]))
        for name, found in against.items()
        if found
    ]


def noise(rows: Iterable[Mapping[str, Any]]) -> str:
    """How auto compares with the backend that it ran in every layer, for people; "" without rows.

    These are the same kernels on the same numbers at other addresses, not a choice that was wrong.
    """
    found = [
        row["us"][alone] / row["us"][AUTO]
        for row in rows
        if (alone := _alone(row)) in row["us"] and AUTO in row["us"]
    ]
    if not found:
        return ""
    return (
        f"auto is {min(found):.3f} to {max(found):.3f} x as fast as the backend that it ran in "
        f"every layer, measured beside it ({len(found)} cases, not counted above: the same kernels "
        "at other addresses)"
    )


def _alone(row: Mapping[str, Any]) -> str:
    """The backend that auto ran in every layer of a row; "" where there are several."""
    ran = set(row.get("layer_how", {}).get(AUTO, {}).values())
    return ran.pop() if len(ran) == 1 else ""
