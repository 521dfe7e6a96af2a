"""Measured dispatch on a GPU: the same bits on both sides of a boundary, graphs, and the cache."""

from __future__ import annotations

import json
import threading

import numpy as np
import pytest

import slidesparse_rt as ss
from slidesparse_rt.arrays import Device
from slidesparse_rt.backends import GPU_BACKENDS, Problem, able
from slidesparse_rt.backends.gpu_device import gpu_device
from slidesparse_rt.cli import main
from slidesparse_rt.dtypes import operand
from slidesparse_rt.tuning import BUCKETS, Table, measure, select
from slidesparse_rt.tuning.cache import TableCache, bias_kind, tuning_key

from .common import (
    BACKENDS_HERE,
    assert_near,
    assert_same,
    data,
    reference,
    to_host,
    to_torch,
    weight,
)

pytestmark = pytest.mark.gpu

N, K = 320, 512


@pytest.fixture(autouse=True)
def tables(monkeypatch, tmp_path):
    """An empty cache; the user's own is left alone."""
    made = TableCache(tmp_path / "tuning")
    monkeypatch.setattr(select, "default_cache", lambda: made)
    return made


def turns(names=BACKENDS_HERE):
    """A table by which each backend has its turn: at 16, 64, 256, ... tokens."""
    return Table(
        {
            16 * 4**turn: {name: 1.0 if index == turn else 10.0 for index, name in enumerate(names)}
            for turn in range(len(names))
        }
    )


def keep(tables, table, dtype="int8", *, bias=None, x_scale=None, pattern="6:8"):
    """Make believe that a table was measured."""
    problem = Problem(N, K, ss.Pattern.parse(pattern), operand(dtype))
    key = tuning_key(
        problem,
        gpu_device(0),
        ss.PlanOptions(),
        bias=bias_kind(problem, bias),
        static=x_scale is not None,
    )
    assert tables.save(key, table)[1] is not None


def boundaries(table):
    """Numbers of tokens around each change of backend, and far from it."""
    starts = [max(1, start) for start in table.dispatch().starts]
    near = {start + more for start in starts for more in (-1, 0, 1)} - {0}
    return sorted({*near, *table.tokens, 33, 1000, 20_000})


def test_the_bits_are_the_same_across_boundaries(tables):
    keep(tables, turns())
    w = weight(0, N, K, "6:8")
    for source in (w, to_torch(w), ss.SparseWeight.from_array(w, "6:8", dtype="int8")):
        pattern = None if isinstance(source, ss.SparseWeight) else "6:8"
        with ss.SparseGemmPlan(source, pattern, device="cuda") as plan:
            assert set(plan.backends) == set(BACKENDS_HERE)
            seen = set()
            for m in boundaries(turns()):
                x = data(m, (m, K), "bfloat16")
                assert_same(to_host(plan.run(to_torch(x))), reference(w, "6:8", x, "int8"))
                seen.add(plan.backend_for(m))
            assert seen == set(BACKENDS_HERE)


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16"])
def test_bias_scales_and_formats(tables, dtype):
    w, bias = weight(1, N, K, "6:8"), data(2, (N,))
    x_scale = None if dtype == "bf16" else 0.03
    keep(tables, turns(), dtype, bias=bias, x_scale=x_scale)
    with ss.SparseGemmPlan(
        w, "6:8", dtype=dtype, bias=bias, x_scale=x_scale, device="cuda", out_dtype="float32"
    ) as plan:
        assert set(plan.backends) == set(BACKENDS_HERE)
        for m in (1, 16, 64, 300, 1024):
            x = data(3 + m, (m, K), "bfloat16")
            y = to_host(plan.run(to_torch(x)))
            if dtype == "int8":
                expected = reference(
                    w, "6:8", x, dtype, bias=bias, x_scale=x_scale, out_dtype="float32"
                )
                assert_same(y, expected)
            else:
                sums = (
                    "bfloat16"
                    if (dtype, plan.backend_for(m)) == ("bf16", "cusparselt")
                    else ("float32")
                )
                assert_near(y, w, x, dtype, bias, sums=sums, x_scale=x_scale)


def test_forms_share_one_upload_and_are_given_back(tables):
    """Memory is what the forms need alone, less the scales that they share; none after close."""
    import cupy

    keep(tables, turns())
    w = weight(4, N, K, "6:8")
    alone = {}
    for name in BACKENDS_HERE:
        with ss.SparseGemmPlan(w, "6:8", backend=name, device="cuda") as plan:
            alone[name] = plan.nbytes
    x = to_torch(data(5, (100, K), "bfloat16"))
    free = 0
    for turn in range(101):
        with ss.SparseGemmPlan(w, "6:8", device="cuda") as plan:
            held = sum(alone.values()) - (len(alone) - 1) * 4 * N
            assert plan.nbytes == held
            plan.run(x)
            assert plan.nbytes > held
            text = plan.explain()
        assert plan.nbytes == 0
        if turn == 0:  # the first one loads code and makes handles
            free = cupy.cuda.runtime.memGetInfo()[0]
    for name in BACKENDS_HERE:
        assert f"memory of {name}: " in text
    assert abs(cupy.cuda.runtime.memGetInfo()[0] - free) < 16 << 20
    with pytest.raises(ss.PlanClosed):
        plan.run(x)


def test_every_form_is_captured(tables):
    """One graph with a run of each form, in PyTorch's global mode."""
    import torch

    keep(tables, turns())
    w = weight(6, N, K, "6:8")
    sizes = list(turns().tokens)
    values = [data(7 + m, (m, K), "bfloat16") for m in sizes]
    xs = [to_torch(x) for x in values]
    outs = [torch.empty((m, N), dtype=torch.bfloat16, device="cuda") for m in sizes]
    other = torch.zeros((48, K), dtype=torch.bfloat16, device="cuda")
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with ss.SparseGemmPlan(w, "6:8", device="cuda") as plan:
        plan.prepare(sizes, stream=stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="global"):
            for x, out in zip(xs, outs, strict=True):
                plan.run(x, out=out)
            with pytest.raises(ss.CaptureError, match=r"prepare\(tokens=\[48\]"):
                plan.run(other)
        for _ in range(3):
            for out in outs:
                out.fill_(7)
            graph.replay()
            torch.cuda.synchronize()
            for x, out in zip(values, outs, strict=True):
                assert_same(to_host(out), reference(w, "6:8", x, "int8"))


def test_threads_and_streams(tables):
    import torch

    keep(tables, turns())
    w = weight(8, N, K, "6:8")
    sizes = (1, 16, 50, 64, 200, 256)
    values = {m: data(m, (m, K), "bfloat16") for m in sizes}
    expected = {m: reference(w, "6:8", x, "int8") for m, x in values.items()}
    xs = {m: to_torch(x) for m, x in values.items()}
    torch.cuda.synchronize()
    wrong = []
    with ss.SparseGemmPlan(w, "6:8", device="cuda") as plan:

        def work(m):
            try:
                stream = torch.cuda.Stream()
                with torch.cuda.stream(stream):
                    found = [plan.run(xs[m]) for _ in range(30)]
                stream.synchronize()
                for y in found:
                    assert_same(to_host(y), expected[m])
            except BaseException as error:
                wrong.append((m, error))

        threads = [threading.Thread(target=work, args=(m,)) for m in sizes]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


# --------------------------------------------------------------------------------- real times


def check_table(plan):
    """The promise, by the plan's own measurements."""
    for tokens, times in plan.timings.items():
        taken = times[plan.backend_for(tokens)]
        assert taken <= 1.02 * min(times.values())
        if "dense" in times:
            assert times["dense"] / taken >= 0.98
        # Nothing takes less than a microsecond, nor this small layer as much as 20 ms.
        assert all(1.0 < us < 20_000.0 for us in times.values()), (tokens, dict(times))


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3"])
def test_a_plan_measures_and_the_next_one_need_not(monkeypatch, tables, dtype):
    monkeypatch.setattr(select, "_PLAN_SECONDS", None)
    w = weight(9, N, K, "6:8")
    with ss.SparseGemmPlan(w, "6:8", dtype=dtype, device="cuda", tuning="measure") as first:
        timings = first.timings
        assert tuple(timings) == BUCKETS
        backends, _ = able(
            GPU_BACKENDS, Problem(N, K, first.pattern, operand(dtype)), Device("cuda")
        )
        assert set(timings[1]) == set(backends)
        check_table(first)
        text = first.explain()
        assert "measured microseconds of a run" in text
        assert str(tables.folder) in text
        for m in (1, 17, 300, 5000):
            x = data(m, (m, K), "bfloat16")
            y = to_host(first.run(to_torch(x)))
            if dtype == "int8":
                assert_same(y, reference(w, "6:8", x, dtype))
            else:
                assert_near(y, w, x, dtype)

    def refuse(*arguments, **options):
        raise AssertionError("measured again")

    monkeypatch.setattr(measure, "measure", refuse)
    for tuning in ("cached", "measure"):
        with ss.SparseGemmPlan(w, "6:8", dtype=dtype, device="cuda", tuning=tuning) as plan:
            assert plan.timings == timings
            assert plan.backends == first.backends
    with ss.SparseGemmPlan(w, "6:8", dtype=dtype, device="cuda", tuning="heuristic") as plan:
        assert plan.timings is None
        assert len(plan.backends) == 1


def test_measuring_beside_a_capture_of_another_thread(monkeypatch, tables):
    import torch

    monkeypatch.setattr(select, "_PLAN_SECONDS", 0.0)
    w = weight(10, N, K, "6:8")
    values = data(11, (48, K), "bfloat16")
    x, stream, graph = to_torch(values), torch.cuda.Stream(), torch.cuda.CUDAGraph()
    out = torch.empty((48, N), dtype=torch.bfloat16, device="cuda")
    failed = []

    def work():
        try:
            with ss.SparseGemmPlan(w, "6:8", device="cuda", tuning="measure") as made:
                check_table(made)
        except BaseException as error:
            failed.append(error)

    with ss.SparseGemmPlan(w, "6:8", device="cuda", backend="dense") as plan:
        plan.prepare([48], stream=stream)
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="global"):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
            plan.run(x, out=out)
        assert failed == []
        graph.replay()
        torch.cuda.synchronize()
        assert_same(to_host(out), reference(w, "6:8", values, "int8"))


def test_without_dense(tables):
    keep(tables, turns())
    w = weight(12, N, K, "6:8")
    with ss.SparseGemmPlan(w, "6:8", device="cuda") as plan:
        full = plan.nbytes
    lean = ss.PlanOptions(keep_dense=False)
    with ss.SparseGemmPlan(w, "6:8", device="cuda", options=lean) as plan:
        assert "dense" not in plan.backends
        assert plan.nbytes < full
        assert "refused dense: keep_dense is False" in plan.explain()
        for m in (1, 16, 64, 256, 1000):
            x = data(m, (m, K), "bfloat16")
            assert_same(to_host(plan.run(to_torch(x))), reference(w, "6:8", x, "int8"))


def test_the_command_measures_and_plans_find_it(tables, capsys):
    arguments = ["tune", str(N), str(K), "--most-tokens", "64", "--json"]
    assert main(arguments) == 0
    report = json.loads(capsys.readouterr().out)
    (row,) = report["weights"]
    assert list(row["us"]) == ["1", "16", "32", "64"]
    assert row["path"].startswith(str(tables.folder))
    with ss.SparseGemmPlan(weight(13, N, K, "6:8"), "6:8", device="cuda") as plan:
        found = {str(tokens): dict(times) for tokens, times in plan.timings.items()}
        assert found == row["us"]
        assert [plan.backend_for(int(m)) for m in row["runs"]] == list(row["runs"].values())
    # In words, from what is kept.
    assert main(arguments[:-1]) == 0
    out = capsys.readouterr().out
    assert f"{N} x {K}, 6:8, int8" in out
    assert row["path"] in out


def test_times_do_not_depend_on_what_a_weight_holds(tables):
    """A table made with one weight serves every weight of its shape."""
    keep(tables, turns())
    for seed in (14, 15):
        w = weight(seed, N, K, "6:8")
        with ss.SparseGemmPlan(w, "6:8", device="cuda") as plan:
            assert plan.timings is not None
            x = np.ascontiguousarray(data(seed, (64, K), "bfloat16"))
            assert_same(to_host(plan.run(to_torch(x))), reference(w, "6:8", x, "int8"))
