"""Times that are kept from one plan to the next, on stand-ins: no GPU is needed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import threading
from typing import Any

import numpy as np
import pytest
from fake_gpu import Memory
from fake_tuning import PACKED, SCALES, WEIGHT, K, Machine, N, x_of
from fake_tuning import make_plan as plan

import slidesparse_rt as ss
from slidesparse_rt.backends import Problem
from slidesparse_rt.dtypes import operand
from slidesparse_rt.tuning import BUCKETS, measure, select
from slidesparse_rt.tuning.measure import MeasureOptions


def test_a_second_plan_takes_what_is_kept(gpu_machine: Machine) -> None:
    with plan(tuning="measure") as first:
        table = first.timings
    for tuning in ("cached", "measure"):
        gpu_machine.packs.clear()
        gpu_machine.ran()
        with plan(**({} if tuning == "cached" else {"tuning": tuning})) as made:
            assert made.timings == table
            assert gpu_machine.ran() == []  # nothing was measured
            assert gpu_machine.packs == ["dense", "hopper"]
            assert made.backends == ("dense", "hopper")
            assert made.nbytes == PACKED["dense"] + PACKED["hopper"] + SCALES


def test_what_was_cut_short_goes_on(gpu_machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(select, "_PLAN_SECONDS", 0.0)
    seen = []
    for _ in range(4):
        with plan(tuning="measure") as made:
            assert made.timings is not None
            seen.append(tuple(made.timings))
    assert [len(tokens) for tokens in seen] == [2, 4, 6, 8]
    assert seen[0] == (1, 32_768)
    assert all(set(some) < set(more) for some, more in itertools.pairwise(seen))
    with plan() as made:
        assert (
            f"tuning: 8 of {len(BUCKETS)} numbers of tokens are measured, up to 32,768; times "
            "between are guessed from those beside, and tuning='measure' goes on"
        ) in made.explain()


@pytest.mark.parametrize("reason", ["memory", "one backend's memory", "broken", "unpackable"])
def test_what_cannot_go_on_leaves_what_is_kept(
    gpu_machine: Machine,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    reason: str,
) -> None:
    if reason == "memory":
        gpu_machine.gpu.room = 5000 * K * 2
    elif reason == "one backend's memory":
        gpu_machine.unchosen = {("cusparselt", m) for m in BUCKETS if m >= 1024}
    else:
        monkeypatch.setattr(select, "_PLAN_SECONDS", 0.0)
    with plan(tuning="measure") as made:
        first = made.timings
        assert first is not None
        assert 0 < len(first) < len(BUCKETS)
    if reason == "broken":
        gpu_machine.broken = dict.fromkeys(gpu_machine.names, 16)
    elif reason == "unpackable":
        gpu_machine.unpackable = {
            name: ss.DeviceMemoryError("full") for name in ("cusparselt", "hopper", "dense")
        }
    caplog.clear()
    if reason == "unpackable":  # not even what is kept can run
        with pytest.raises(ss.DeviceMemoryError, match="full"):
            plan(tuning="measure")
    else:
        with plan(tuning="measure") as made:
            assert made.timings == first
    assert f"{len(BUCKETS) - len(first)} numbers of tokens are not measured: " in caplog.text
    with contextlib.ExitStack() as held:  # and nothing was lost
        gpu_machine.unpackable = {}
        assert held.enter_context(plan()).timings == first


def test_up_to_how_many_tokens_it_is_measured(gpu_machine: Machine) -> None:
    gpu_machine.gpu.room = 5000 * K * 2
    with plan(tuning="measure") as made:
        assert (
            f"tuning: 25 of {len(BUCKETS)} numbers of tokens are measured, up to 4,096; above that "
            "runs what was fastest there, and tuning='measure' goes on"
        ) in made.explain()


def test_threads_measure_one_after_the_other(
    gpu_machine: Machine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And find what others have measured, for which nobody waits."""
    lock = gpu_machine.gpu.measuring = threading.Lock()
    measured: list[bool] = []
    take = measure.measure

    def counted(*arguments: Any, **options: Any) -> Any:
        measured.append(lock.locked())
        return take(*arguments, **options)

    monkeypatch.setattr(measure, "measure", counted)
    made: list[ss.SparseGemmPlan] = []
    with lock:
        threads = [
            threading.Thread(target=lambda: made.append(plan(tuning="measure"))) for _ in range(2)
        ]
        for thread in threads:
            thread.start()
        threads[0].join(0.2)
        assert all(thread.is_alive() for thread in threads)  # they wait
        assert gpu_machine.packs == []
    for thread in threads:
        thread.join()
    assert measured == [True]
    with lock:  # while somebody measures something else
        late = threading.Thread(target=lambda: made.append(plan(tuning="measure")))
        late.start()
        late.join(30)
        assert not late.is_alive()
    assert measured == [True]
    assert len({str(one.timings) for one in made}) == 1
    for one in made:
        one.close()
    assert not lock.locked()


@pytest.mark.parametrize(
    "change",
    [{"bias": np.full(N, 0.1, np.float32), "dtype": "bf16"}, {"x_scale": 0.5}, {"dtype": "bf16"}],
    ids=str,
)
def test_what_is_measured_for_another_weight_is_not_taken(
    gpu_machine: Machine, change: dict[str, Any]
) -> None:
    with plan(tuning="measure"):
        pass
    if "bias" in change:
        with plan(tuning="measure", dtype="bf16"):
            pass
    with plan(**change) as made:
        assert made.timings is None
        assert made.backend == "hopper"
        assert "by rule" in made.explain()
    with plan(bias=np.ones(N, np.float32)) as made:  # costs an int8 product nothing
        assert made.timings is not None


@pytest.mark.parametrize("error", [ss.DeviceMemoryError("full\nof x"), ss.LibraryError("full")])
@pytest.mark.parametrize(("missing", "runs"), [("dense", "hopper"), ("hopper", "dense")])
def test_where_forms_cannot_be_held_together_the_best_alone_runs(
    gpu_machine: Machine,
    caplog: pytest.LogCaptureFixture,
    error: Exception,
    missing: str,
    runs: str,
) -> None:
    """Kept times make no plan fail, and nothing takes the place of a form in silence."""
    with plan(tuning="measure") as made:
        assert made.backends == ("dense", "hopper")
    assert Memory.held == set()
    gpu_machine.unpackable = {missing: error}
    for tuning in ("cached", "measure"):
        caplog.clear()
        with caplog.at_level(logging.WARNING), plan(tuning=tuning) as made:
            assert made.backends == (runs,)
            assert made.nbytes == PACKED[runs] + SCALES
            assert "tuning: dense and hopper would run, but full\n" in made.explain()
            made.run(x_of(3))
            assert gpu_machine.ran()[-1] == (runs, 3)
        assert "dense and hopper cannot be packed as measured times say: full" in caplog.text
        assert Memory.held == set()
    gpu_machine.unpackable["cusparselt"] = gpu_machine.unpackable[runs] = error
    with pytest.raises(type(error), match="full"):
        plan()
    assert Memory.held == set()


def test_without_dense_it_does_not_come_back_where_another_cannot_be_packed(
    gpu_machine: Machine,
) -> None:
    with plan(tuning="measure"):
        pass
    gpu_machine.unpackable = {"hopper": ss.LibraryError("no")}
    with plan(options=ss.PlanOptions(keep_dense=False)) as made:
        assert made.backends == ("cusparselt",)


def test_what_failed_once_says_how_it_is_tried_again(gpu_machine: Machine) -> None:
    gpu_machine.unpackable = {"hopper": ss.LibraryError("for once")}
    hint = "tuning: `slidesparse tune --again` tries again what failed"
    with plan(tuning="measure") as made:
        assert "refused hopper: it failed: for once" in made.explain()
        assert hint in made.explain()
    gpu_machine.unpackable = {}
    with plan(tuning="measure", dtype="bf16") as made:
        assert hint not in made.explain()


def test_times_with_another_cold_cache_are_not_lost(gpu_machine: Machine) -> None:
    def tune(**arguments: Any) -> Any:
        again = arguments.pop("again", False)
        made = select.tune(
            ss.SparseWeight.from_array(WEIGHT, "6:8", dtype="int8"),
            None,
            Problem(N, K, ss.Pattern.parse("6:8"), operand("int8")),
            ss.plan.Device("cuda"),
            ss.PlanOptions(),
            None,
            MeasureOptions(**arguments),
            cache=gpu_machine.tables,
            again=again,
        )
        if made.forms is not None:
            made.forms.close()
        return made.table

    assert tune(most_tokens=64, cold_tokens=32).cold_tokens == 32
    with pytest.raises(ss.OptionError, match="cold_tokens is 0, but times are kept for 4 numbers"):
        tune(most_tokens=16, cold_tokens=0)
    # What is not asked for goes by what is kept: a plan that measures goes on.
    assert tune(most_tokens=128).cold_tokens == 32
    with plan(tuning="measure") as made:
        assert made.timings is not None
        assert set(made.timings) == set(BUCKETS)
    assert tune(most_tokens=16, cold_tokens=0, again=True).tokens == (1, 16)
    with plan() as made:
        assert "tuning: 2 of" in made.explain()
        assert "up to 16; above that runs what was fastest there" in made.explain()


def test_a_full_gpu_is_not_remembered(gpu_machine: Machine) -> None:
    gpu_machine.unpackable = {"dense": ss.DeviceMemoryError("full")}
    with plan(tuning="measure") as made:
        assert made.backends == ("hopper",)
        text = made.explain()
        assert "kept nowhere" in text
        assert "refused dense: it failed: full" in text
    assert gpu_machine.tables.empty
    gpu_machine.unpackable = {"dense": ss.LibraryError("never")}
    with plan(tuning="measure"):
        pass
    assert not gpu_machine.tables.empty


def test_times_of_backends_that_are_gone_are_ignored(
    gpu_machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    with plan(tuning="measure"):
        pass
    gpu_machine.names = ("cusparselt", "hopper")
    with plan() as made:
        assert made.backends == ("hopper",)
        assert "refused dense: it is hidden" in made.explain()
    gpu_machine.names = ("other",)
    with caplog.at_level(logging.WARNING), plan() as made:
        assert made.timings is None
    assert "cannot run here any more" in caplog.text
    gpu_machine.names = ()
    with pytest.raises(ss.BackendUnavailable, match="hopper: it is hidden"):
        select.tune(
            WEIGHT,
            None,
            Problem(N, K + 1, ss.Pattern.parse("6:8"), operand("int8")),
            None,  # type: ignore[arg-type]
            ss.PlanOptions(),
            None,
            MeasureOptions(most_tokens=16),
        )


def test_a_cache_that_is_damaged_is_no_cache(
    gpu_machine: Machine, caplog: pytest.LogCaptureFixture
) -> None:
    with plan(tuning="measure"):
        pass
    assert gpu_machine.tables.folder is not None
    (path,) = gpu_machine.tables.folder.iterdir()
    path.write_bytes(path.read_bytes()[:-20])
    with plan() as made:
        assert (made.backend, made.timings) == ("hopper", None)
    assert "are ignored" in caplog.text
    with plan(tuning="measure") as made:
        assert made.backend == "dense+hopper"
    with plan() as made:
        assert made.backend == "dense+hopper"


# ------------------------------------------------------------------------------------- options
