"""The driver's report and the diagnosis, on machines of every kind, all of them made up."""

from __future__ import annotations

import importlib.metadata
import io
import json
import subprocess
import sys
import uuid
from types import SimpleNamespace

import pytest
from rich.console import Console

from slidesparse_rt import packing, plan
from slidesparse_rt.cli import doctor, main
from slidesparse_rt.cli.doctor import Gap, backend_refusal, cpu_path_problem, diagnose
from slidesparse_rt.dtypes import OPERANDS, operand
from slidesparse_rt.ffi.driver import DeviceInfo, DriverReport, driver_release, probe
from slidesparse_rt.ffi.libraries import LIBRARIES, Loaded, Missing, library

UUID = uuid.UUID("3ac8c9c0-1e59-4bd5-9a3b-90d6a0a3f3a1")


# ------------------------------------------------------------------------------------ the driver


class FakeDriver:
    """libcuda with some GPUs; ``failing`` maps a function to the CUresult it returns."""

    def __init__(self, count=1, failing=None, names=True):
        self.count = count
        self.failing = failing or {}
        if not names:
            self.cuGetErrorName = self._unknown_error

    def _unknown_error(self, status, text):
        return 1

    def cuGetErrorName(self, status, text):  # noqa: N802
        text._obj.value = b"CUDA_ERROR_SYSTEM_DRIVER_MISMATCH"
        return 0

    def cuInit(self, flags):  # noqa: N802
        assert flags == 0
        return self.failing.get("cuInit", 0)

    def cuDeviceGetCount(self, count):  # noqa: N802
        count._obj.value = self.count
        return self.failing.get("cuDeviceGetCount", 0)

    def cuDeviceGet(self, device, index):  # noqa: N802
        device._obj.value = 40 + index
        return 0

    def cuDeviceGetName(self, buffer, size, device):  # noqa: N802
        assert size == len(buffer)
        buffer.value = f"NVIDIA Test {device}".encode()
        return self.failing.get("cuDeviceGetName", 0)

    def cuDeviceTotalMem_v2(self, memory, device):  # noqa: N802
        memory._obj.value = 80 << 30
        return 0

    def cuDeviceGetUuid(self, buffer, device):  # noqa: N802
        buffer.raw = UUID.bytes
        return 0

    def cuDeviceGetAttribute(self, value, attribute, device):  # noqa: N802
        value._obj.value = {75: 9, 76: 0, 16: 132}[attribute]
        return 0


def loaded(name, version, handle=None):
    return Loaded(library(name), handle, f"/lib/{name}.so", "site-packages", version)


def absent(name):
    row = library(name)
    return Missing(row, "not found", f"{row.title} was not found", "no such file", ("/lib",))


def test_probe_describes_every_gpu():
    report = probe(loaded("cuda", (12, 8), FakeDriver(count=2)))
    assert report.driver_version == "12.8"
    assert report.cuda_major == 12
    assert report.problem is None
    assert report.devices == (
        DeviceInfo(0, "NVIDIA Test 40", (9, 0), 132, 80 << 30, f"GPU-{UUID}"),
        DeviceInfo(1, "NVIDIA Test 41", (9, 0), 132, 80 << 30, f"GPU-{UUID}"),
    )
    assert report.devices[0].architecture == "sm_90"


@pytest.mark.parametrize(
    ("text", "release"),
    [
        (
            "NVRM version: NVIDIA UNIX x86_64 Kernel Module  580.159.04  Tue Nov  4 2026\n"
            "GCC version:  gcc version 12.3.0 (Ubuntu 12.3.0-1ubuntu1)\n",
            "580.159.04",
        ),
        (
            "NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  535.54  Release Build",
            "535.54",
        ),
        ("NVRM version: unknown", None),
        (None, None),
    ],
)
def test_the_release_of_the_driver(tmp_path, text, release):
    path = tmp_path / "version"
    if text is not None:
        path.write_text(text)
    assert driver_release(path) == release


def test_probe_without_a_driver():
    report = probe(absent("cuda"))
    assert report.driver_version is None
    assert report.cuda_major is None
    assert report.devices == ()
    assert "the CUDA driver was not found" in report.problem
    assert "install or update the NVIDIA driver" in report.problem


def test_probe_with_a_driver_that_is_too_old():
    old = Missing(library("cuda"), "too old", "the CUDA driver is too old", "", (), "/x", (11, 8))
    report = probe(old)
    assert report.driver_version == "11.8"
    assert "too old" in report.problem


def test_probe_without_a_gpu():
    report = probe(loaded("cuda", (12, 8), FakeDriver(failing={"cuInit": 100})))
    assert report.driver_version == "12.8"
    assert report.devices == ()
    assert "sees no NVIDIA GPU" in report.problem
    assert "CUDA_VISIBLE_DEVICES" in report.problem


def test_probe_with_no_devices_but_no_error():
    report = probe(loaded("cuda", (12, 8), FakeDriver(count=0)))
    assert report.devices == ()
    assert report.problem == "the driver is installed, but reports no GPU"


@pytest.mark.parametrize(
    ("names", "called"),
    [(True, "CUDA_ERROR_SYSTEM_DRIVER_MISMATCH (803)"), (False, "CUresult 803")],
)
def test_probe_with_a_driver_that_does_not_start(names, called):
    report = probe(loaded("cuda", (12, 8), FakeDriver(failing={"cuInit": 803}, names=names)))
    assert report.problem == f"the driver is installed, but does not work: cuInit returned {called}"


def test_probe_with_a_driver_that_lacks_functions():
    report = probe(loaded("cuda", (12, 8), SimpleNamespace(cuInit=lambda flags: 0)))
    assert "it has no function cuDeviceGetCount" in report.problem
    bare = SimpleNamespace(cuInit=lambda flags: 3)
    assert "cuInit returned CUresult 3" in probe(loaded("cuda", (12, 8), bare)).problem


def test_probe_keeps_the_gpus_before_a_failing_one():
    class Second(FakeDriver):
        def cuDeviceGetName(self, buffer, size, device):  # noqa: N802
            super().cuDeviceGetName(buffer, size, device)
            return 0 if device == 40 else 46

    report = probe(loaded("cuda", (12, 8), Second(count=2)))
    assert [gpu.index for gpu in report.devices] == [0]
    assert "cuDeviceGetName returned" in report.problem


def test_probe_of_this_machine_does_not_raise():
    report = probe()
    assert (report.problem is None) == bool(report.devices)


# --------------------------------------------------------------------------------- the diagnosis


def gpu(capability, index=0, name="NVIDIA Test"):
    return DeviceInfo(index, name, capability, 132, 80 << 30, f"GPU-{UUID}")


def machine(
    *gpus,
    cuda="12.8",
    cusparselt=(0, 8, 1),
    cublaslt=(12, 9, 3),
    nvrtc=(12, 9),
    packages="all",
    cpu=None,
    problem=None,
    ask=lambda backend, row, index: "",
):
    """Diagnose a machine; a version of None is a library that is missing."""
    versions = {"cusparseLt": cusparselt, "cublasLt": cublaslt, "nvrtc": nvrtc}
    versions["cuda"] = None if cuda is None else tuple(map(int, cuda.split(".")))

    def find_library(name):
        version = versions[name]
        return absent(name) if version is None else loaded(name, version)

    def package_version(name):
        if packages != "all" and name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return "1.2.3"

    return diagnose(
        ask_driver=lambda: DriverReport(cuda, gpus, problem),
        find_library=find_library,
        package_version=package_version,
        check_cpu=lambda: cpu,
        ask_backend=ask,
    )


def shown(diagnosis, width=200):
    screen = Console(file=io.StringIO(), width=width, markup=False, highlight=False)
    diagnosis.render(screen)
    return screen.file.getvalue()


def verdicts(diagnosis, backend):
    return {row.dtype: (row.ok, row.reason) for row in diagnosis.verdicts if row.backend == backend}


def test_a_machine_with_everything():
    diagnosis = machine(gpu((9, 0), name="NVIDIA H200"))
    assert all(row.ok for row in diagnosis.verdicts)
    assert {row.dtype for row in diagnosis.verdicts} == {row.name for row in OPERANDS}
    assert {(row.backend, row.device) for row in diagnosis.verdicts} == {
        ("hopper", "cuda:0"),
        ("cusparselt", "cuda:0"),
        ("dense", "cuda:0"),
        ("reference", "cpu"),
    }
    assert diagnosis.gaps == ()
    text = shown(diagnosis)
    assert "GPU 0: NVIDIA H200, sm_90, 132 SMs, 85.9 GB, GPU-3ac8c9c0" in text
    assert "CUDA driver: up to CUDA 12.8" in text
    assert "CPU path: works" in text
    assert "/lib/cusparseLt.so" in text
    assert "Nothing is missing." in text
    assert "no (" not in text


def test_a_machine_without_anything():
    diagnosis = machine(
        cuda=None, cusparselt=None, cublaslt=None, nvrtc=None, packages=(), problem="no driver"
    )
    for backend in ("cusparselt", "dense"):
        assert set(verdicts(diagnosis, backend).values()) == {(False, "there is no usable GPU")}
    assert set(verdicts(diagnosis, "reference").values()) == {(True, "")}
    mends = {gap.what: gap.mend for gap in diagnosis.gaps}
    assert mends["cuSPARSELt (not found)"] == (
        "pip install nvidia-cusparselt-cu12 (CUDA 12) or "
        "pip install nvidia-cusparselt-cu13 (CUDA 13)"
    )
    assert mends["cupy"] == (
        "pip install cupy-cuda12x (CUDA 12) or pip install cupy-cuda13x (CUDA 13)"
    )
    assert "install or update the NVIDIA driver" in mends["the CUDA driver (not found)"]
    text = shown(diagnosis)
    assert "CUDA driver: none" in text
    assert "no usable GPU: the CUDA driver was not found" in text
    assert "  not installed: numpy, ml_dtypes" in text
    assert "slidesparse-rt[cu12]" in text
    assert "slidesparse-rt[cu13]" in text


@pytest.mark.parametrize("major", [12, 13])
def test_the_driver_decides_the_command(major):
    diagnosis = machine(
        gpu((9, 0)), cuda=f"{major}.0", cusparselt=None, cublaslt=None, nvrtc=None, packages=()
    )
    assert diagnosis.everything == f"pip install 'slidesparse-rt[cu{major}]'"
    for row in LIBRARIES:
        if row.wheels:
            assert (
                Gap(f"{row.title} (not found)", f"pip install {row.wheels[major]}")
                in diagnosis.gaps
            )
    mends = {gap.what: gap.mend for gap in diagnosis.gaps}
    assert mends["cupy"] == f"pip install cupy-cuda{major}x"
    assert mends["cuda-python"].endswith(f"<{major + 1}'")


@pytest.mark.parametrize(
    ("capability", "version", "able"),
    [
        ((7, 5), (0, 8, 1), set()),
        ((8, 0), (0, 8, 1), {"int8", "bf16", "fp16"}),
        ((8, 6), (0, 8, 1), {"int8", "bf16", "fp16"}),
        ((8, 9), (0, 7, 1), {"int8", "bf16", "fp16"}),
        ((8, 9), (0, 8, 0), {"int8", "bf16", "fp16", "fp8_e4m3"}),
        ((9, 0), (0, 7, 1), {"int8", "bf16", "fp16", "fp8_e4m3"}),
        ((10, 0), (0, 8, 1), {"int8", "bf16", "fp16", "fp8_e4m3"}),
        ((12, 0), (0, 8, 1), {"int8", "bf16", "fp16", "fp8_e4m3"}),
    ],
)
def test_what_cusparselt_multiplies_where(capability, version, able):
    found = verdicts(machine(gpu(capability), cusparselt=version), "cusparselt")
    assert {dtype for dtype, (ok, _) in found.items() if ok} == able
    for ok, reason in found.values():
        assert ok == (reason == "")
        if not ok:
            assert f"this GPU is sm_{capability[0]}{capability[1]}" in reason


def test_cusparselt_is_missing_on_a_gpu():
    found = verdicts(machine(gpu((9, 0)), cusparselt=None), "cusparselt")
    assert set(found.values()) == {(False, "cuSPARSELt was not found")}


def test_a_backend_refuses():
    diagnosis = machine(
        gpu((9, 0)), ask=lambda backend, row, index: f"{backend} needs tea\nand more"
    )
    assert verdicts(diagnosis, "dense")["int8"] == (False, "dense needs tea\nand more")
    text = shown(diagnosis)
    assert "(1) hopper needs tea" in text
    assert "(2) cusparselt needs tea" in text
    assert "(3) dense needs tea" in text
    assert "and more" not in text


def test_two_gpus_have_a_column_each():
    diagnosis = machine(gpu((9, 0)), gpu((7, 5), index=1))
    columns = {(row.backend, row.device): row.ok for row in diagnosis.verdicts}
    assert columns["cusparselt", "cuda:0"]
    assert not columns["cusparselt", "cuda:1"]
    assert "cuda:1" in shown(diagnosis)


def test_a_driver_without_a_gpu_is_a_gap():
    diagnosis = machine(problem="the driver sees no NVIDIA GPU")
    assert Gap("a usable GPU", "the driver sees no NVIDIA GPU") in diagnosis.gaps
    assert "no usable GPU: the driver sees no NVIDIA GPU" in shown(diagnosis)


def test_libraries_newer_than_the_driver():
    diagnosis = machine(gpu((9, 0)), cuda="12.4", nvrtc=(13, 0), cublaslt=(13, 0, 2))
    mends = {gap.what: gap.mend for gap in diagnosis.gaps}
    assert mends == {
        "NVRTC 13.0 is newer than the driver, which runs up to CUDA 12.4": (
            "update the driver, or pip install nvidia-cuda-nvrtc-cu12"
        ),
        "cuBLASLt 13.0.2 is newer than the driver, which runs up to CUDA 12.4": (
            "update the driver, or pip install nvidia-cublas-cu12"
        ),
    }


def test_a_library_that_is_too_old():
    old = Missing(
        library("cusparseLt"), "too old", "cuSPARSELt at /x is too old", "", (), "/x", (0, 6, 3)
    )
    diagnosis = diagnose(
        ask_driver=lambda: DriverReport("12.8", (gpu((9, 0)),), None),
        find_library=lambda name: old if name == "cusparseLt" else loaded(name, (12, 9)),
        check_cpu=lambda: None,
        ask_backend=lambda backend, row, index: "",
    )
    assert (
        Gap("cuSPARSELt (too old)", "pip install --upgrade nvidia-cusparselt-cu12")
        in diagnosis.gaps
    )
    text = shown(diagnosis)
    assert "0.6.3" in text
    assert "cuSPARSELt at /x is too old" in text


def test_json_holds_everything():
    diagnosis = machine(gpu((8, 0)), nvrtc=None, packages=("numpy", "cupy-cuda12x"))
    plain = json.loads(json.dumps(diagnosis.to_json(), allow_nan=False))
    assert plain["cpu_path"] == {"ok": True, "problem": None}
    assert plain["driver"] == {"cuda_version": "12.8", "problem": None}
    assert plain["gpus"][0]["architecture"] == "sm_80"
    assert plain["gpus"][0]["memory_bytes"] == 80 << 30
    by_name = {row["name"]: row for row in plain["libraries"]}
    assert by_name["cusparseLt"]["found_via"] == "site-packages"
    assert by_name["cusparseLt"]["version"] == "0.8.1"
    assert by_name["nvrtc"] == {
        "name": "nvrtc",
        "title": "NVRTC",
        "purpose": library("nvrtc").purpose,
        "minimum": "12.0",
        "found": False,
        "path": None,
        "version": None,
        "trouble": "not found",
        "detail": "no such file",
        "looked": ["/lib"],
    }
    assert plain["packages"]["numpy"] == "1.2.3"
    assert plain["packages"]["cupy"] == "1.2.3 (cupy-cuda12x)"
    assert plain["packages"]["torch"] is None
    support = {(row["dtype"], row["backend"]): row["ok"] for row in plain["support"]}
    assert support["int8", "cusparselt"]
    assert not support["fp8_e4m3", "cusparselt"]
    assert [row["what"] for row in plain["missing"]] == ["NVRTC (not found)", "cuda-python"]


def test_nothing_is_cut_on_a_narrow_screen():
    diagnosis = machine(gpu((9, 0)), nvrtc=None)
    narrow, wide = shown(diagnosis, width=30), shown(diagnosis)
    for word in ("cuSPARSELt", "site-packages", "reference", "fp8_e4m3", "12.9.3"):
        assert word in wide
        assert word in narrow


# ----------------------------------------------------------------------------------- the CPU path


def test_the_cpu_path_works_here():
    assert cpu_path_problem() is None


def test_a_broken_slide_is_noticed(monkeypatch):
    original = packing.slide
    monkeypatch.setattr(packing, "slide", lambda weight, pattern: original(weight, pattern) * 0)
    assert cpu_path_problem() == "sliding windows changed a product of small integers"


def test_a_broken_backend_is_noticed(monkeypatch):
    original = plan.SparseGemmPlan.run
    monkeypatch.setattr(plan.SparseGemmPlan, "run", lambda self, x: original(self, x) + 1)
    assert cpu_path_problem() == "the reference backend changed a product of small integers"


def test_an_exception_in_the_cpu_path_is_noticed(monkeypatch):
    def prune(weight, pattern):
        raise OSError("libllvm went away")

    monkeypatch.setattr(packing, "prune", prune)
    assert cpu_path_problem() == "OSError: libllvm went away"


def test_without_the_package_s_own_imports_there_is_no_table(monkeypatch):
    monkeypatch.setitem(sys.modules, "slidesparse_rt.backends", None)
    diagnosis = machine(gpu((9, 0)), cpu="ImportError: no ml_dtypes")
    assert diagnosis.verdicts == ()
    text = shown(diagnosis)
    assert "BROKEN: ImportError: no ml_dtypes" in text
    assert "what runs where" not in text


def test_a_broken_cpu_path_is_shown():
    diagnosis = machine(gpu((9, 0)), cpu="ImportError: no numba")
    assert "CPU path: BROKEN: ImportError: no numba" in shown(diagnosis)
    assert set(verdicts(diagnosis, "reference").values()) == {(False, "ImportError: no numba")}


def test_backend_refusal_gives_the_backend_s_own_reason(monkeypatch):
    def choose(name, problem, device):
        assert (problem.dtype.name, str(device)) == ("int8", "cuda:3")
        raise RuntimeError("no backend can run it:\n  dense: it rains\n    - there\nsee doctor")

    monkeypatch.setattr("slidesparse_rt.backends.choose", choose)
    assert backend_refusal("dense", operand("int8"), 3) == "it rains"
    assert backend_refusal("cusparselt", operand("int8"), 3) == "no backend can run it:"

    def silent(name, problem, device):
        raise MemoryError

    monkeypatch.setattr("slidesparse_rt.backends.choose", silent)
    assert backend_refusal("dense", operand("int8"), 0) == "MemoryError"
    monkeypatch.setattr("slidesparse_rt.backends.choose", lambda name, problem, device: None)
    assert backend_refusal("dense", operand("int8"), 0) == ""


def test_a_backend_that_cannot_run_here_says_so():
    """The real backends, asked about a GPU that no machine has."""
    assert backend_refusal("cusparselt", operand("int8"), 99)
    assert backend_refusal("reference", operand("int8"), 0)


# ------------------------------------------------------------------------------------ the command


def test_the_command(capsys):
    assert main(["doctor"]) == 0
    out, err = capsys.readouterr()
    assert "CPU path: works" in out
    assert "what runs where" in out
    assert err == ""


def test_the_command_as_json(capsys):
    assert main(["doctor", "--json"]) == 0
    plain = json.loads(capsys.readouterr().out)
    assert plain["cpu_path"]["ok"]
    assert {row["name"] for row in plain["libraries"]} == {row.name for row in LIBRARIES}


def test_the_exit_code_of_a_broken_cpu_path(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "cpu_path_problem", lambda: "ImportError: no numba")
    assert main(["doctor"]) == 1
    assert "BROKEN: ImportError: no numba" in capsys.readouterr().out
    assert main(["doctor", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["cpu_path"] == {
        "ok": False,
        "problem": "ImportError: no numba",
    }


@pytest.mark.parametrize("package", ["numba", "ml_dtypes", "safetensors"])
def test_the_doctor_survives_a_missing_package(package):
    """In a fresh process, where nothing is imported yet."""
    program = (
        f"import sys; sys.modules[{package!r}] = None\n"
        "from slidesparse_rt.cli import main\n"
        "sys.exit(main(['doctor', '--json']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.stderr == ""
    assert done.returncode == 1
    problem = json.loads(done.stdout)["cpu_path"]["problem"]
    assert package in problem
