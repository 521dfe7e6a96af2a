"""Options are checked when they are made."""

from __future__ import annotations

import os
from dataclasses import FrozenInstanceError
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from strategies import F32_MAX

from slidesparse_rt.dtypes import operand
from slidesparse_rt.errors import OptionError
from slidesparse_rt.options import PlanOptions, checked_x_scale, worker_count


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


@pytest.mark.parametrize("fuse", [0, 1, None, "yes"])
def test_fusing_is_true_or_false(fuse: Any) -> None:
    assert PlanOptions(fuse_channel_scales=True).fuse_channel_scales
    assert not PlanOptions().fuse_channel_scales
    with pytest.raises(OptionError) as caught:
        PlanOptions(fuse_channel_scales=fuse)
    assert str(caught.value) == f"fuse_channel_scales is {fuse!r}; allowed are True and False"


@pytest.mark.parametrize("keep", [0, 1, None, "no"])
def test_keeping_dense_is_true_or_false(keep: Any) -> None:
    assert PlanOptions().keep_dense
    assert not PlanOptions(keep_dense=False).keep_dense
    with pytest.raises(OptionError) as caught:
        PlanOptions(keep_dense=keep)
    assert str(caught.value) == f"keep_dense is {keep!r}; allowed are True and False"


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


@pytest.mark.parametrize(
    "x_scale",
    [0.1, 1, 2.0**-126, F32_MAX, np.float32(3), np.float64(0.3), np.int8(3), Fraction(1, 3)],
)
def test_activation_scales_are_rounded_to_float32(x_scale: Any) -> None:
    for name in ("int8", "fp8_e4m3"):
        found = checked_x_scale(x_scale, operand(name))
        assert type(found) is np.float32
        assert found == np.float32(float(x_scale))


@pytest.mark.parametrize(
    ("x_scale", "seen"),
    [
        *((bad, repr(bad)) for bad in (0, 0.0, -0.0, -1.5, np.nan, np.inf, -np.inf, True, "0.1")),
        *((bad, repr(bad)) for bad in (2.0**-127, 3.5e38, 1e300, Fraction(1, 2**2000))),
        (10**5000, "of type int"),
        ([0.1], "of type list"),
        (np.float32([0.1, 0.2]), "of type ndarray"),
        (1 + 2j, "of type complex"),
    ],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_other_activation_scales_are_refused(x_scale: Any, seen: str) -> None:
    with pytest.raises(OptionError) as caught:
        checked_x_scale(x_scale, operand("fp8_e4m3"))
    message = str(caught.value)
    assert message.startswith(f"x_scale is {seen}")
    assert "allowed is None (each token's own scale, measured in every run)" in message
    assert "one number from 2**-126 to 3.4028e38 for all tokens" in message
    assert message.endswith("divided by 448")


@pytest.mark.parametrize("name", ["bf16", "fp16"])
@pytest.mark.parametrize("x_scale", [1.0, "x"])
def test_formats_without_scales_take_no_activation_scale(name: str, x_scale: Any) -> None:
    with pytest.raises(OptionError) as caught:
        checked_x_scale(x_scale, operand(name))
    assert str(caught.value) == (
        f"x_scale is {x_scale!r}, but {name} activations have no scales; omit x_scale=, or use "
        f"dtype='int8' or dtype='fp8_e4m3'"
    )
