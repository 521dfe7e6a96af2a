"""What is missing on a machine that has a GPU, and what doctor says of one."""

from __future__ import annotations

import json

import pytest

import slidesparse_rt as ss
from slidesparse_rt.backends import machine
from slidesparse_rt.cli import main
from slidesparse_rt.ffi.driver import DriverReport, probe
from slidesparse_rt.ffi.libraries import examine, library

from .common import ON_HOPPER, assert_same, data, reference, to_host, to_torch, weight

pytestmark = pytest.mark.gpu

N, K = 64, 96


def hide(monkeypatch, *names):
    """Make libraries look absent, by the search that really looks for them."""
    from cuda.pathfinder import DynamicLibNotFoundError

    def search(name):
        raise DynamicLibNotFoundError("hidden by this test")

    def open_file(name):
        raise OSError(f"{name}: cannot open shared object file: No such file or directory")

    real = machine.find
    monkeypatch.setattr(
        machine,
        "find",
        lambda name: (
            examine(library(name), search=search, open_file=open_file)
            if name in names
            else real(name)
        ),
    )


@pytest.mark.parametrize(
    ("backend", "name", "title"),
    [
        ("cusparselt", "cusparseLt", "cuSPARSELt"),
        ("dense", "cublasLt", "cuBLASLt"),
        ("cusparselt", "nvrtc", "NVRTC"),
        ("dense", "nvrtc", "NVRTC"),
        ("hopper", "nvrtc", "NVRTC"),
    ],
)
def test_a_missing_library_is_named(monkeypatch, backend, name, title):
    hide(monkeypatch, name)
    for source in (weight(0, N, K, "6:8"), to_torch(weight(0, N, K, "6:8"))):
        with pytest.raises(ss.BackendUnavailable, match=f"{title} was not found") as caught:
            ss.SparseGemmPlan(source, "6:8", backend=backend, device="cuda")
        assert "pip install" in str(caught.value)
        assert "looked for lib" in str(caught.value)


@pytest.mark.parametrize(("hidden", "left"), [("cusparseLt", "dense"), ("cublasLt", "cusparselt")])
def test_auto_takes_what_is_there_and_says_so(monkeypatch, hidden, left):
    hide(monkeypatch, hidden)
    w, x = weight(0, N, K, "2:4"), data(1, (20, K))
    with ss.SparseGemmPlan(w, "2:4", device="cuda") as plan:
        assert plan.backend not in {"cusparselt", "dense"} - {left}
        assert_same(to_host(plan.run(to_torch(x))), reference(w, "2:4", x, "int8"))
        if plan.backend == "dense":
            assert "refused cusparselt: cuSPARSELt was not found" in plan.explain()


def test_a_driver_that_fails_is_named(monkeypatch):
    says = "the driver is installed, but does not work: cuInit returned 999"
    monkeypatch.setattr(machine, "probe", lambda: DriverReport("12.0", (), says))
    with pytest.raises(ss.BackendUnavailable, match="cuInit returned 999"):
        ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", backend="dense", device="cuda")


def test_fp4_is_refused_on_every_gpu():
    for source in (weight(0, N, K, "6:8"), to_torch(weight(0, N, K, "6:8"))):
        with pytest.raises(ss.DTypeError, match="4:8 pairwise"):
            ss.SparseGemmPlan(source, "6:8", dtype="fp4_e2m1", device="cuda")


def test_doctor_reports_the_gpus(capsys):
    assert main(["doctor", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    found = probe()
    assert [gpu["name"] for gpu in report["gpus"]] == [gpu.name for gpu in found.devices]
    runs = {
        (verdict["backend"], verdict["dtype"])
        for verdict in report["support"]
        if verdict["device"] == "cuda:0" and verdict["ok"]
    }
    assert {("dense", "int8"), ("cusparselt", "int8")} <= runs
    assert {dtype for backend, dtype in runs if backend == "hopper"} == (
        {"int8", "fp8_e4m3", "bf16", "fp16"} if ON_HOPPER else set()
    )
    assert main(["doctor"]) == 0
    assert found.devices[0].name in capsys.readouterr().out
