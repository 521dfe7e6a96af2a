"""Array libraries, streams, graphs, threads and devices."""

from __future__ import annotations

import threading

import ml_dtypes
import numpy as np
import pytest

import slidesparse_rt as ss
from slidesparse_rt.device_arrays import cupy_stream

from .common import (
    BACKENDS,
    BACKENDS_HERE,
    assert_same,
    data,
    reference,
    to_host,
    to_torch,
    weight,
)

pytestmark = pytest.mark.gpu

N, K = 192, 256


@pytest.fixture(params=BACKENDS)
def plan(request):
    with ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", backend=request.param) as made:
        assert made.device == "cuda:0"
        yield made


def expected_for(x):
    return reference(weight(0, N, K, "6:8"), "6:8", x, "int8")


def test_cupy_in_cupy_out(plan):
    import cupy

    for kind in (np.float32, np.float16):
        x = data(1, (30, K)).astype(kind)
        y = plan.run(cupy.asarray(x))
        assert isinstance(y, cupy.ndarray)
        assert_same(y.get(), expected_for(x))
        out = cupy.empty_like(y)
        assert plan.run(cupy.asarray(x), out=out) is out
        assert_same(out.get(), y.get())


def test_jax_in_jax_out(plan):
    import jax
    import jax.numpy as jnp

    for kind in (jnp.float32, jnp.bfloat16):
        x = jnp.asarray(data(2, (30, K)), dtype=kind)
        assert next(iter(x.devices())).platform == "gpu"
        y = plan.run(x)
        assert isinstance(y, jax.Array)
        assert y.dtype == kind
        assert_same(np.asarray(y), expected_for(np.asarray(x)))
        assert_same(np.asarray(plan.run(x * 2)), expected_for(np.asarray(x * 2)))
        with pytest.raises(ss.ArrayError, match="immutable"):
            plan.run(x, out=y)


def test_numba_in_numba_out(plan):
    from numba import cuda

    x = data(3, (30, K))
    y = plan.run(cuda.to_device(x))
    assert cuda.is_cuda_array(y)
    assert_same(y.copy_to_host(), expected_for(x))


def test_an_object_that_only_knows_dlpack(plan):
    import cupy

    class Producer:
        def __init__(self, array):
            self.array = array

        def __dlpack__(self, **options):
            return self.array.__dlpack__(**options)

        def __dlpack_device__(self):
            return self.array.__dlpack_device__()

    x = data(4, (30, K))
    y = plan.run(Producer(cupy.asarray(x)))
    assert_same(cupy.asarray(y).get(), expected_for(x))


def test_the_current_stream_is_used_and_another_waits_for_it(plan):
    import cupy
    import torch

    x = data(5, (64, K), "bfloat16")
    expected = expected_for(x)
    spin = cupy.RawKernel(
        'extern "C" __global__ void spin(long long n) {'
        " long long t = clock64(); while (clock64() - t < n) {} }",
        "spin",
    )
    plan.prepare([64])
    side = torch.cuda.Stream()
    plan.prepare([64], stream=side)
    source = to_torch(x)
    for stream in (None, side, side.cuda_stream, cupy_stream(side.cuda_stream)):
        current = torch.cuda.Stream()
        plan.prepare([64], stream=current)
        torch.cuda.synchronize()
        with torch.cuda.stream(current):
            tensor = torch.zeros_like(source)
            with cupy_stream(current.cuda_stream):
                spin((1,), (1,), (100_000_000,))
            tensor.copy_(source)  # comes late: run() must be ordered after it
            y = plan.run(tensor, stream=stream)
        (current if stream is None else side).synchronize()
        assert_same(to_host(y), expected)


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_torch_graph(backend, dtype):
    import torch

    w = weight(0, N, K, "6:8")
    with ss.SparseGemmPlan(w, "6:8", dtype=dtype, backend=backend) as plan:
        x = torch.zeros((48, K), dtype=torch.bfloat16, device="cuda")
        out = torch.empty((48, N), dtype=torch.bfloat16, device="cuda")
        stream = torch.cuda.Stream()
        plan.prepare([48], stream=stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            plan.run(x, out=out)
            made = plan.run(x)
        for seed in range(3):
            fresh = to_torch(data(seed, (48, K), "bfloat16"))
            x.copy_(fresh)
            out.fill_(7)
            graph.replay()
            torch.cuda.synchronize()
            eager = plan.run(fresh)
            assert torch.equal(out, eager)
            assert torch.equal(made, eager)
        # A larger run on the same stream moves the workspace, but not the graph's.
        with torch.cuda.stream(stream):
            plan.run(torch.randn((5000, K), dtype=torch.bfloat16, device="cuda"))
        stream.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, eager)


def test_cupy_capture(plan):
    import cupy

    stream = cupy.cuda.Stream(non_blocking=True)
    plan.prepare([32], x_dtype="float32", stream=stream)
    with stream:
        x, out = cupy.zeros((32, K), np.float32), cupy.empty((32, N), np.float32)
        stream.begin_capture()
        plan.run(x, out=out)
        graph = stream.end_capture()
        values = data(6, (32, K))
        x.set(values)
        graph.launch(stream)
        assert_same(out.get(), expected_for(values))


def test_capture_without_preparation(plan):
    import torch

    x = torch.zeros((77, K), dtype=torch.bfloat16, device="cuda")
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.warns(UserWarning, match="empty"),
        pytest.raises(ss.CaptureError, match=r"prepare\(tokens=\[77\]"),
        torch.cuda.graph(graph, stream=stream),
    ):
        plan.run(x)
    torch.cuda.synchronize()
    assert_same(to_host(plan.run(x)), np.zeros((77, N), ml_dtypes.bfloat16))


def test_many_threads_on_one_plan(plan):
    import torch

    inputs = [data(seed, (8 + seed, K), "bfloat16") for seed in range(16)]
    wanted = [expected_for(x) for x in inputs]
    problems: list[str] = []

    def work(index: int) -> None:
        try:
            own = torch.cuda.Stream() if index % 2 else torch.cuda.current_stream()
            with torch.cuda.stream(own):
                x = to_torch(inputs[index])
                for _ in range(20):
                    y = plan.run(x)
                own.synchronize()
                assert_same(to_host(y), wanted[index])
        except BaseException as error:
            problems.append(f"{index}: {error!r}")

    threads = [threading.Thread(target=work, args=(index,)) for index in range(16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not problems


def test_a_device_that_is_not_current():
    import torch

    if torch.cuda.device_count() < 2:
        # With one GPU the CPU is the only other place: the plan names it.
        with (
            ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", device="cuda") as plan,
            pytest.raises(ss.DeviceError, match="cpu"),
        ):
            plan.run(torch.zeros((4, K)))
        return
    x = data(9, (20, K), "bfloat16")
    for backend in BACKENDS_HERE:
        with ss.SparseGemmPlan(
            weight(0, N, K, "6:8"), "6:8", backend=backend, device="cuda:1"
        ) as plan:
            torch.cuda.set_device(0)
            y = plan.run(to_torch(x).to("cuda:1"))
            assert y.device.index == 1
            assert torch.cuda.current_device() == 0
            assert_same(to_host(y), expected_for(x))
            with pytest.raises(ss.DeviceError, match="cuda:0"):
                plan.run(to_torch(x))
