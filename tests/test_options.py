"""Options are checked when they are made."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError

import pytest

from slidesparse_rt.errors import OptionError
from slidesparse_rt.options import PlanOptions, worker_count


def test_defaults() -> None:
    assert PlanOptions().threads is None
    assert worker_count(None) >= 1


@pytest.mark.parametrize("threads", [1, 2, 1024])
def test_threads(threads: int) -> None:
    assert PlanOptions(threads=threads).threads == threads
    assert worker_count(threads) == threads


@pytest.mark.parametrize("threads", [0, -1, 1025, 1.0, "2", True, False, [1]])
def test_other_threads_are_refused(threads: object) -> None:
    for make in (worker_count, lambda value: PlanOptions(threads=value)):
        with pytest.raises(OptionError) as caught:
            make(threads)  # type: ignore[operator]
        assert repr(threads) in str(caught.value)
        assert "from 1 to 1024" in str(caught.value)


@pytest.mark.parametrize("limit", [1 << 20, 1 << 40])
def test_workspace_limits(limit: int) -> None:
    assert PlanOptions(workspace_limit=limit).workspace_limit == limit


@pytest.mark.parametrize("limit", [0, -1, (1 << 20) - 1, 2.0**30, "1 GiB", True, None])
def test_other_workspace_limits_are_refused(limit: object) -> None:
    with pytest.raises(OptionError) as caught:
        PlanOptions(workspace_limit=limit)  # type: ignore[arg-type]
    assert f"workspace_limit is {limit!r}" in str(caught.value)
    assert "from 1048576 (1 MiB) on" in str(caught.value)


def test_options_are_frozen_and_keyword_only() -> None:
    with pytest.raises(FrozenInstanceError):
        PlanOptions().threads = 2  # type: ignore[misc]
    with pytest.raises(TypeError):
        PlanOptions(2)  # type: ignore[misc]


def test_none_counts_the_cores_this_process_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 3, 5}, raising=False)
    assert worker_count(None) == 3


def test_none_without_affinity_counts_all_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert worker_count(None) == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert worker_count(None) == 1
