"""Measured times on disk: what they are kept by, and what becomes of files that are not whole."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import slidesparse_rt as ss
from slidesparse_rt import user_cache
from slidesparse_rt.backends import Problem
from slidesparse_rt.dtypes import operand
from slidesparse_rt.ffi.libraries import Loaded, Missing, library
from slidesparse_rt.tuning import BUCKETS, Table, cache
from slidesparse_rt.tuning.cache import TableCache, bias_kind, default_cache, tuning_key
from slidesparse_rt.user_cache import cache_folder, write_whole

KEY = {"gpu": "a stand-in", "n": 4, "k": 16, "static": False, "cusparseLt": None}
TABLE = Table(
    {1: {"hopper": 3.25, "dense": 4.5}, 16: {"hopper": 0.1, "dense": 1e-3}},
    {"cusparselt": "it is not there: ß\n"},
    cold_tokens=64,
    taken="2026-11-25T00:00:00+00:00",
)

times = st.dictionaries(
    st.sampled_from(BUCKETS),
    st.fixed_dictionaries(
        {name: st.floats(1e-3, 1e9) for name in ("hopper", "dense")}  # any two that agree
    ),
    min_size=1,
)


@pytest.fixture
def kept(tmp_path: Path) -> TableCache:
    return TableCache(tmp_path / "tuning")


def path_of(tables: TableCache, key: dict[str, Any] = KEY) -> Path:
    path = tables.path(key)
    assert path is not None
    return path


# ------------------------------------------------------------------------------ there and back


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(times, st.dictionaries(st.text(), st.text()), st.integers(0, 1 << 20), st.text())
def test_what_is_kept_comes_back(
    kept: TableCache, us: dict[int, Any], refused: dict[str, str], cold: int, taken: str
) -> None:
    table = Table(us, refused, cold, taken)
    assert kept.save(KEY, table, replace=True) == (table, path_of(kept))
    assert kept.load(KEY) == table


def test_another_key_is_another_file(kept: TableCache) -> None:
    assert kept.empty
    assert kept.load(KEY) is None
    kept.save(KEY, TABLE)
    assert not kept.empty
    for name, value in (("n", 5), ("static", True), ("gpu", "another"), ("cusparseLt", "0.8.1")):
        assert kept.load({**KEY, name: value}) is None
    assert kept.load(dict(reversed(KEY.items()))) == TABLE
    assert [path.name for path in path_of(kept).parent.iterdir()] == [path_of(kept).name]


def test_a_later_measurement_adds_to_an_earlier_one(kept: TableCache) -> None:
    kept.save(KEY, TABLE)
    more = Table({32: {"hopper": 7.0, "dense": 8.0}}, cold_tokens=64)
    whole, _ = kept.save(KEY, more)
    assert whole.tokens == (1, 16, 32)
    assert kept.load(KEY) == whole
    assert kept.save(KEY, more, replace=True)[0] == more
    assert kept.load(KEY) == more


# -------------------------------------------------------------------------------- bad files


def document(tables: TableCache) -> dict[str, Any]:
    tables.save(KEY, TABLE)
    found: dict[str, Any] = json.loads(path_of(tables).read_text())
    return found


def signed(content: dict[str, Any]) -> bytes:
    """A file whose digest fits, whatever it says."""
    content.pop("sha256", None)
    return json.dumps(
        {**content, "sha256": cache.hashlib.sha256(cache._text(content)).hexdigest()}
    ).encode()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "someone.else"}, "'someone.else' of version 1"),
        ({"schema_version": 2}, "of version 2"),
        ({"key": {**KEY, "n": 5}}, "another weight or machine"),
        ({"us": {}}, "no backend was measured"),
        ({"us": {"1": {"dense": -1.0}}}, "positive microseconds"),
        ({"us": {"one": {"dense": 1.0}}}, "invalid literal"),
        ({"us": {"1": 5}}, ""),
        ({"us": []}, ""),
        ({"refused": 3}, ""),
        ({"cold_tokens": None}, ""),
        ({"cold_tokens": {}}, ""),
    ],
)
def test_files_that_are_whole_but_wrong(
    kept: TableCache, change: dict[str, Any], says: str, caplog: pytest.LogCaptureFixture
) -> None:
    path_of(kept).parent.mkdir(parents=True)
    path_of(kept).write_bytes(signed(document(kept) | change))
    assert kept.load(KEY) is None
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert str(path_of(kept)) in record.getMessage()
    assert says in record.getMessage()
    # It is replaced.
    assert kept.save(KEY, TABLE)[0] == TABLE
    assert kept.load(KEY) == TABLE


@pytest.mark.parametrize(
    "data",
    [b"", b"[]", b"3", b"null", b"{}", b'{"sha256": ""}', b"\xff\xfe", b"[" * 100_000, b"NaN"],
)
def test_files_of_something_else(
    kept: TableCache, data: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    kept.save(KEY, TABLE)
    path_of(kept).write_bytes(data)
    assert kept.load(KEY) is None
    assert "are ignored" in caplog.text


def test_a_changed_number_is_noticed(kept: TableCache, caplog: pytest.LogCaptureFixture) -> None:
    kept.save(KEY, TABLE)
    whole = path_of(kept).read_text()
    path_of(kept).write_text(whole.replace("3.25", "9.25"))
    assert kept.load(KEY) is None
    assert "its digest does not fit its content" in caplog.text


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_damage_is_survived(kept: TableCache, data: st.DataObject) -> None:
    """A file with bytes changed, cut off or put in is ignored, or says what it said before."""
    kept.save(KEY, TABLE, replace=True)
    path = path_of(kept)
    whole = path.read_bytes()
    at = data.draw(st.integers(0, len(whole)))
    length = data.draw(st.integers(0, 40))
    put = data.draw(st.binary(max_size=8))
    path.write_bytes(whole[:at] + put + whole[at + length :])
    assert kept.load(KEY) in (None, TABLE)


def test_a_folder_in_the_place_of_the_file(
    kept: TableCache, caplog: pytest.LogCaptureFixture
) -> None:
    path_of(kept).mkdir(parents=True)
    assert kept.load(KEY) is None
    assert kept.save(KEY, TABLE) == (TABLE, None)
    assert "measured times are not kept in" in caplog.text
    assert [path.name for path in path_of(kept).parent.iterdir()] == [path_of(kept).name]


# ------------------------------------------------------------------------------ nowhere to keep


def test_without_a_home_nothing_is_kept(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(user_cache.Path, "home", lambda: tmp_path)
    assert default_cache().folder == tmp_path / ".cache" / "slidesparse_rt" / "tuning"

    def homeless() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(user_cache.Path, "home", homeless)
    assert cache_folder("x") is None
    tables = default_cache()
    assert tables.empty
    assert tables.load(KEY) is None
    assert tables.save(KEY, TABLE) == (TABLE, None)
    assert "no home folder" in caplog.text


def test_a_folder_that_cannot_be_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tables = TableCache(tmp_path / "none")
    assert tables.empty
    assert caplog.text == ""

    def closed(folder: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache.os, "scandir", closed)
    assert tables.empty
    assert f"the measured times in {tables.folder} are ignored: Permission denied" in caplog.text


def test_a_folder_that_cannot_be_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    blocked = TableCache(tmp_path / "file" / "below")
    assert blocked.empty
    assert blocked.load(KEY) is None
    assert blocked.save(KEY, TABLE) == (TABLE, None)

    def full(self: Path, target: Path) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(user_cache.Path, "replace", full)
    assert TableCache(tmp_path / "full").save(KEY, TABLE) == (TABLE, None)
    assert "No space left on device" in caplog.text
    assert list((tmp_path / "full").iterdir()) == []


# ------------------------------------------------------------------------------- many writers


WRITER = """
import sys
from pathlib import Path
from slidesparse_rt.tuning import Table
from slidesparse_rt.tuning.cache import TableCache
tables, number = TableCache(Path(sys.argv[1])), int(sys.argv[2])
for turn in range(60):
    key = {"n": turn % 6 if turn % 2 else 100 + number}
    tables.save(key, Table({1: {"dense": 1.0 + number}, 16: {"dense": 2.0 + turn}}))
    assert tables.load(key) is not None
"""


def test_processes_that_write_at_once_lose_no_file(tmp_path: Path) -> None:
    command = [sys.executable, "-W", "error", "-c", WRITER, str(tmp_path)]
    writers = [subprocess.Popen([*command, str(number)]) for number in range(4)]
    assert [writer.wait() for writer in writers] == [0] * 4
    tables = TableCache(tmp_path)
    keys = [*range(1, 6, 2), *(100 + number for number in range(4))]
    assert len(list(tmp_path.iterdir())) == len(keys)
    for n in keys:
        found = tables.load({"n": n})
        assert found is not None
        assert found.tokens == (1, 16)


def test_readers_never_see_half_a_file(tmp_path: Path) -> None:
    path, stop, seen = tmp_path / "file", threading.Event(), set()
    versions = [bytes([65 + i]) * (100_000 + i) for i in range(4)]
    write_whole(path, versions[0])

    def write(data: bytes) -> None:
        while not stop.is_set():
            write_whole(path, data)

    threads = [threading.Thread(target=write, args=(data,)) for data in versions]
    for thread in threads:
        thread.start()
    try:
        for _ in range(200):
            seen.add(path.read_bytes())
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert seen <= set(versions)
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


# ---------------------------------------------------------------------------------------- keys


GPU = {"name": "NVIDIA H100 80GB HBM3", "sm_count": 132, "driver_version": "13000"}


def problem(**changes: Any) -> Problem:
    row = {"n": 4, "k": 16, "pattern": "6:8", "dtype": "int8"} | changes
    return Problem(row["n"], row["k"], ss.Pattern.parse(row["pattern"]), operand(row["dtype"]))


def key(monkeypatch: pytest.MonkeyPatch, **changes: Any) -> dict[str, Any]:
    """The key of a weight on a machine of which something is different."""
    versions: dict[str, Any] = {"cusparseLt": (0, 8, 1), "cublasLt": (13, 1), "nvrtc": (13, 0)}
    versions |= {name: changes.pop(name) for name in list(versions) if name in changes}

    def find(name: str) -> Any:
        if versions[name] is None:
            return Missing(library(name), "not found", "", "", ())
        return Loaded(library(name), None, "", "", versions[name])

    monkeypatch.setattr(cache, "find", find)
    monkeypatch.setattr(cache, "__version__", changes.pop("package", "0.1.0"))
    digest = changes.pop("kernels", "0123")
    monkeypatch.setattr(cache, "_sources_digest", lambda: digest)
    gpu: Any = SimpleNamespace(**{name: changes.pop(name, GPU[name]) for name in GPU})
    options = ss.PlanOptions(workspace_limit=changes.pop("workspace_limit", 2 << 30))
    rest = {"bias": changes.pop("bias", "none"), "static": changes.pop("static", False)}
    return tuning_key(problem(**changes), gpu, options, **rest)


def test_everything_that_changes_the_times_is_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    changes: dict[str, Any] = {
        "name": "NVIDIA H200",
        "sm_count": 60,
        "driver_version": "12080",
        "cusparseLt": None,
        "cublasLt": (12, 9),
        "nvrtc": (12, 8),
        "package": "0.2.0",
        "kernels": "4567",
        "pattern": "4:6",
        "dtype": "fp8_e4m3",
        "n": 5,
        "k": 17,
        "bias": "exact",
        "static": True,
        "workspace_limit": 1 << 30,
    }
    found = [key(monkeypatch), *(key(monkeypatch, **{name: changes[name]}) for name in changes)]
    tables = TableCache(Path("/nowhere"))
    assert len({tables.path(one) for one in found}) == len(changes) + 1
    assert key(monkeypatch) == found[0]
    # The names of all that is kept, in words.
    assert set(found[0]) >= {"gpu", "driver", "package", "kernels", "x", "out"}
    json.dumps(found[0])


def test_the_digest_of_the_kernels_is_that_of_their_sources(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    plain = cache._sources_digest.__wrapped__
    first = plain()
    assert len(first) == 16
    real = cache.read_source
    monkeypatch.setattr(
        cache,
        "read_source",
        lambda name: SimpleNamespace(
            text=real(name).text + ("\n" if name == "hopper_gemm.cu" else ""),
            headers=real(name).headers,
        ),
    )
    assert plain() != first


def test_a_bias_counts_where_it_decides_who_adds_it() -> None:
    exact, rounded = np.ones(4, np.float32), np.full(4, 0.1, np.float32)
    for dtype in ("fp8_e4m3", "bf16", "fp16"):
        made = problem(dtype=dtype)
        assert [bias_kind(made, bias) for bias in (None, exact, rounded)] == [
            "none",
            "exact",
            "rounded",
        ]
    assert {bias_kind(problem(), bias) for bias in (None, exact, rounded)} == {"none"}
