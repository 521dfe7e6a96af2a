"""Making a plan: weights, options, devices and backends, and what each refusal says."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from plans import fitted

import slidesparse_rt as ss
from slidesparse_rt import backends
from slidesparse_rt.arrays import Device
from slidesparse_rt.backends import machine
from slidesparse_rt.ffi.driver import DeviceInfo, DriverReport
from slidesparse_rt.packing import _rows

#: These tests are about machines without a GPU, also where there is one.
pytestmark = pytest.mark.usefixtures("no_gpu")

# Making a plan


def test_weights_that_are_refused() -> None:
    for weight in (np.zeros(8, np.float32), np.zeros((1, 2, 8), np.float32)):
        with pytest.raises(ss.ShapeError, match=r"weight has .* allowed is .*\(N, K\)|2, \(N, K\)"):
            ss.SparseGemmPlan(weight, "6:8")
    with pytest.raises(ss.ShapeError):
        ss.SparseGemmPlan(np.zeros((0, 8), np.float32), "6:8")
    with pytest.raises(ss.DTypeError, match="float64 is not supported"):
        ss.SparseGemmPlan(np.zeros((2, 8)), "6:8")
    with pytest.raises(ss.ArrayError, match="list is no array"):
        ss.SparseGemmPlan([[0.0] * 8], "6:8")
    with pytest.raises(ss.PatternError, match="has 8 nonzeros, allowed are 6") as caught:
        ss.SparseGemmPlan(np.ones((2, 8), np.float32), "6:8")
    assert (caught.value.row, caught.value.group, caught.value.violations) == (0, 0, 2)
    bad = np.zeros((2, 8), np.float32)
    bad[1, 3] = np.nan
    with pytest.raises(ss.NonFiniteError, match="weight holds nan at row 1, column 3"):
        ss.SparseGemmPlan(bad, "6:8")
    with pytest.raises(ss.ShapeError, match=r"K = 133145; .* up to K = 133144; split the layer"):
        ss.SparseGemmPlan(np.zeros((1, 133_145), np.float32), "6:8")
    with pytest.raises(ss.NonFiniteError, match="too large for fp16"):
        ss.SparseGemmPlan(np.full((1, 4), 1e6, np.float32), "dense", dtype="fp16")


@pytest.mark.parametrize(
    ("options", "error", "says"),
    [
        ({"pattern": None}, ss.OptionError, 'pattern is missing; type for example pattern="6:8"'),
        ({"pattern": "2:8"}, ss.PatternError, "type '6:8'"),
        ({"dtype": "int4"}, ss.DTypeError, "'int4' is no operand format; allowed are 'int8'"),
        ({"dtype": "fp8"}, ss.DTypeError, "type dtype='fp8_e4m3'"),
        ({"out_dtype": "float64"}, ss.DTypeError, "float64 .*allowed are float32, float16, bfl"),
        ({"out_dtype": "int8"}, ss.DTypeError, "int8"),
        ({"backend": "cuda"}, ss.OptionError, "backend 'cuda' is unknown; allowed are 'auto'"),
        ({"backend": None}, ss.OptionError, "backend None is unknown"),
        ({"backend": ["auto"]}, ss.OptionError, "backend .* is unknown"),
        ({"x_scale": -1.0}, ss.OptionError, r"x_scale is -1\.0; allowed is None .* divided by 127"),
        ({"x_scale": 1.0, "dtype": "bf16"}, ss.OptionError, "bf16 activations have no scales; om"),
        ({"device": "tpu"}, ss.DeviceError, "device 'tpu' is unknown; allowed are 'cpu'"),
        ({"options": {"threads": 1}}, ss.OptionError, "allowed is a PlanOptions or None"),
        ({"bias": np.zeros(3, np.float32)}, ss.ShapeError, r"bias has shape \(3,\); .*\(4,\)"),
        ({"bias": np.zeros((4, 1), np.float32)}, ss.ShapeError, r"bias has shape \(4, 1\)"),
        ({"bias": np.zeros(4)}, ss.DTypeError, "bias has dtype float64"),
        ({"bias": [0.0] * 4}, ss.ArrayError, "list is no array"),
        ({"bias": np.float32([0, 0, np.inf, 0])}, ss.NonFiniteError, "infinity at index 2"),
        ({"bias": np.float32([0, np.nan, 0, 0])}, ss.NonFiniteError, "bias holds a NaN .* index 1"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_options_that_are_refused(
    options: dict[str, Any], error: type[Exception], says: str
) -> None:
    with pytest.raises(error, match=says):
        ss.SparseGemmPlan(fitted("6:8", 4, 16), **({"pattern": "6:8"} | options))


@pytest.mark.parametrize("backend", backends.BACKENDS)
def test_fp4_is_refused_everywhere_with_the_true_reason(backend: str) -> None:
    """Before the machine is looked at: no GPU would change it."""
    weight = fitted("6:8", 4, 16)
    for call in (
        lambda: ss.SparseGemmPlan(weight, "6:8", dtype="fp4_e2m1", backend=backend),
        lambda: ss.SparseGemmPlan(weight, "2:4", dtype="fp4_e2m1", device="cuda"),
        lambda: ss.SparseWeight.from_array(weight, "6:8", dtype="fp4_e2m1"),
        lambda: ss.quantize(weight, "fp4_e2m1"),
    ):
        with pytest.raises(ss.DTypeError, match=r"4:8 pairwise.*use dtype='fp8_e4m3'"):
            call()


def test_why_fp4_is_refused_holds_for_windows() -> None:
    """Two windows may hold nonzeros in more pairs than the two of 4:8 pairwise."""
    weight = np.zeros((1, 16), np.float32)
    weight[0, ::2] = 1  # fits 6:8, and 2:4
    for pattern in ("2:4", "6:8"):
        slid = np.asarray(ss.slide(weight, pattern)).reshape(-1, 4, 2)
        assert ((slid != 0).any(-1).sum(-1) > 2).any()


def test_a_weight_on_another_gpu_than_the_plan_is_refused() -> None:
    class OnGpu:
        shape = (4, 16)

        def __dlpack__(self, **options: Any) -> Any:
            raise AssertionError("never read")

        def __dlpack_device__(self) -> tuple[int, int]:
            return (2, 1)

    for device in ("cpu", "cuda:0"):
        with pytest.raises(ss.DeviceError, match=f"weight is on cuda:1, .* {device}; move it"):
            ss.SparseGemmPlan(OnGpu(), "6:8", device=device)
    with pytest.raises(ss.BackendUnavailable, match="weight on cuda:1"):
        ss.SparseGemmPlan(OnGpu(), "6:8")


def test_a_sparse_weight_brings_its_own_pattern_and_dtype() -> None:
    packed = ss.SparseWeight.from_array(fitted("6:8", 4, 16), "6:8", dtype="fp8_e4m3")
    for arguments in ({}, {"pattern": "6:8"}, {"dtype": "fp8_e4m3"}, {"pattern": packed.pattern}):
        made = ss.SparseGemmPlan(packed, **arguments)
        assert (made.dtype, made.pattern.name) == ("fp8_e4m3", "6:8")
    with pytest.raises(
        ss.PatternError, match="pattern='4:6' contradicts the weight's own '6:8'; omit"
    ):
        ss.SparseGemmPlan(packed, "4:6")
    with pytest.raises(
        ss.OptionError, match="dtype='int8' contradicts the weight's own 'fp8_e4m3'"
    ):
        ss.SparseGemmPlan(packed, dtype="int8")
    with pytest.raises(ss.PatternError, match="type '6:8'"):
        ss.SparseGemmPlan(packed, "2:8")
    with pytest.raises(ss.DTypeError, match="no operand format"):
        ss.SparseGemmPlan(packed, dtype="int9")


def test_threads_are_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    worker_count = _rows.worker_count
    monkeypatch.setattr(
        _rows, "worker_count", lambda threads: asked.append(threads) or worker_count(threads)
    )
    ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8", options=ss.PlanOptions(threads=1))
    assert set(asked[1:]) == {1}  # the first is fitted()'s own


def test_a_misspelled_backend_is_refused_before_the_weight_is_packed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def packed(*arguments: object, **options: object) -> None:
        raise AssertionError("packed first")

    monkeypatch.setattr(ss.SparseWeight, "from_array", packed)
    with pytest.raises(ss.OptionError, match="backend 'cusparse' is unknown"):
        ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8", backend="cusparse")


@pytest.mark.parametrize(
    ("backend", "library"), [("cusparselt", "cuSPARSELt"), ("dense", "cuBLASLt")]
)
@pytest.mark.parametrize("device", [None, "cuda", "cuda:1"])
def test_a_gpu_backend_without_a_gpu_says_what_was_looked_for(
    backend: str, library: str, device: str | None
) -> None:
    with pytest.raises(ss.BackendUnavailable) as caught:
        ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8", backend=backend, device=device)
    message = str(caught.value)
    assert f"no backend can run a 6:8 int8 weight on {device or 'cuda'}" in message
    assert f"backend='{backend}'" in message
    assert "the driver sees no NVIDIA GPU" in message
    for missing in (library, "NVRTC"):
        assert f"{missing} was not found" in message
    assert message.count("looked for lib") == 2
    assert "pip install" in message
    assert "slidesparse doctor" in message


def test_a_machine_that_has_everything_is_not_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = DeviceInfo(0, "GPU", (9, 0), 132, 1 << 37, "GPU-0")
    found = {"cupy": object()}
    monkeypatch.setattr(machine, "probe", lambda: DriverReport("13.0", (gpu,), None))
    monkeypatch.setattr(machine, "find", lambda name: object())
    monkeypatch.setattr(machine.importlib.util, "find_spec", found.get)
    assert machine.gpu_refusal(("cusparseLt", "nvrtc"), Device("cuda", 0)) == ""
    assert "cuda:1 does not exist; there are 1" in machine.gpu_refusal((), Device("cuda", 1))
    del found["cupy"]
    without = machine.gpu_refusal((), Device("cuda", 0))
    assert without.startswith("CuPy is not installed: pip install 'slidesparse-rt[cu13]'")


def test_nothing_is_substituted_for_a_backend_asked_for() -> None:
    weight = fitted("6:8", 4, 16)
    with pytest.raises(ss.BackendUnavailable, match=r"cusparselt: .*on cpu"):
        ss.SparseGemmPlan(weight, "6:8", backend="cusparselt", device="cpu")
    with pytest.raises(ss.BackendUnavailable, match=r"reference: .*plan is on cuda:0"):
        ss.SparseGemmPlan(weight, "6:8", backend="reference", device="cuda")
    with pytest.raises(ss.BackendUnavailable) as caught:
        ss.SparseGemmPlan(weight, "6:8", device="cuda")
    for name in ("cusparselt", "dense", "reference"):
        assert f"  {name}: " in str(caught.value)
    assert ss.SparseGemmPlan(weight, "6:8", backend="reference").backend == "reference"


def test_a_device_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "probe", lambda: DriverReport("13.0", (), None))
    with pytest.raises(
        ss.BackendUnavailable, match="cuda:7 does not exist; there are 0 CUDA devices"
    ):
        ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8", backend="dense", device="cuda:7")


def test_making_a_plan_on_the_cpu_looks_for_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    def looked(*arguments: object) -> None:
        raise AssertionError("looked for a GPU")

    monkeypatch.setattr(machine, "probe", looked)
    monkeypatch.setattr(machine, "find", looked)
    assert ss.SparseGemmPlan(fitted("6:8", 4, 16), "6:8").backend == "reference"


def test_the_list_of_backends() -> None:
    assert backends.BACKENDS[0] == "auto"
    assert {"cusparselt", "dense", "reference"} <= set(backends.BACKENDS)
    assert not backends.needs_gpu("auto")
    assert not backends.needs_gpu("reference")
    assert backends.needs_gpu("cusparselt")
    assert backends.needs_gpu("dense")


def test_auto_orders_the_gpu_backends_by_pattern_and_architecture(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The rule of docs/performance.md, on machines that this one is not."""
    from slidesparse_rt.backends import Problem, _order
    from slidesparse_rt.dtypes import operand

    def order(pattern: str, capability: tuple[int, int], dtype: str = "int8") -> list[str]:
        gpu = DeviceInfo(0, "GPU", capability, 132, 1 << 37, "GPU-0")
        monkeypatch.setattr(backends, "probe", lambda: DriverReport("13.0", (gpu,), None))
        problem = Problem(64, 64, ss.Pattern.parse(pattern), operand(dtype))
        names, why = _order(problem, Device("cuda"))
        assert why.startswith("by rule")
        if pattern == "dense":
            assert "no zeros to skip" in why
        else:
            assert ("Hopper" in why) == (names.index("dense") < names.index("cusparselt"))
            assert (" in bf16" in why) == (names[0] == "dense")
        return names

    sparse_first = ["hopper", "cusparselt", "dense", "reference"]
    # Another GPU of the machine does not count.
    two = [DeviceInfo(i, "GPU", (9 - i, 0), 132, 1 << 37, f"GPU-{i}") for i in range(2)]
    monkeypatch.setattr(backends, "probe", lambda: DriverReport("13.0", tuple(two), None))
    problem = Problem(64, 64, ss.Pattern.parse("6:8"), operand("int8"))
    assert ["Hopper" in _order(problem, Device("cuda", i))[1] for i in range(2)] == [True, False]
    assert _order(problem, Device("cpu"))[1] == "by rule: the first that can run"

    ours_first = ["hopper", "dense", "cusparselt", "reference"]
    dense_first = ["dense", "hopper", "cusparselt", "reference"]
    others = ((8, 0), (8, 9), (10, 0), (12, 0))
    for dtype in ("int8", "fp8_e4m3", "bf16", "fp16"):
        assert order("2:4", (9, 0), dtype) == sparse_first
        assert order("4:6", (9, 0), dtype) == ours_first
        for pattern in ("6:8", "8:10", "30:32"):
            wanted = dense_first if dtype == "bf16" else ours_first
            assert order(pattern, (9, 0), dtype) == wanted
            for capability in others:
                assert order(pattern, capability, dtype) == sparse_first
        for capability in ((9, 0), *others):
            assert order("dense", capability, dtype) == dense_first
