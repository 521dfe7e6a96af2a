"""Runs with fixed buffers on a GPU: right to the bit, on any stream and thread, and in graphs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import slidesparse_rt as ss

from .common import BACKENDS, assert_same, data, reference, to_host, to_torch, weight

pytestmark = pytest.mark.gpu

N, K, M = 192, 256, 48
#: Calls of a recorded run: the first records.
CALLS = 3


@pytest.fixture(params=BACKENDS)
def plan(request):
    with ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", backend=request.param) as made:
        yield made


def expected_for(x):
    return reference(weight(0, N, K, "6:8"), "6:8", x, "int8")


def is_recorded(bound):
    return bound._replay_stream >= 0


def buffers(tokens=M):
    import torch

    x = torch.zeros((tokens, K), dtype=torch.bfloat16, device="cuda")
    return x, torch.full((tokens, N), 7, dtype=torch.bfloat16, device="cuda")


@pytest.mark.parametrize("tokens", [1, 7, 48, 300])
def test_int8_to_the_bit_with_the_data_of_now(plan, tokens):
    x, out = buffers(tokens)
    bound = plan.bind(x, out, graph=True)
    made = plan.bind(x, graph=True)
    for seed in range(CALLS):
        values = data(seed, (tokens, K), "bfloat16")
        x.copy_(to_torch(values))
        out.fill_(7)
        assert bound() is out
        assert_same(to_host(out), expected_for(values))
        assert_same(to_host(made()), expected_for(values))
        assert_same(to_host(plan.run(x)), expected_for(values))


@pytest.mark.parametrize("dtype", ["int8", "fp8_e4m3", "bf16"])
@pytest.mark.parametrize("backend", [*BACKENDS, "auto"])
def test_it_computes_what_a_run_computes(backend, dtype):
    import torch

    with ss.SparseGemmPlan(
        weight(0, N, K, "6:8"),
        "6:8",
        dtype=dtype,
        backend=backend,
        bias=data(8, (N,)),
        device="cuda:0",
    ) as plan:
        for tokens in (3, 64):
            x = to_torch(data(tokens, (tokens, K), "bfloat16"))
            wide = torch.full((tokens, N + 3), 7, dtype=torch.bfloat16, device="cuda")
            # Alike in address and stride, by which libraries choose how they write.
            pairs = (
                [buffers(tokens)[1] for _ in range(2)],
                [whole[:, 1 : N + 1] for whole in (wide, wide.clone())],
            )
            for out, other in pairs:
                bound = plan.bind(x, out, graph=True)
                plan.run(x, out=other)
                for _ in range(CALLS):
                    assert torch.equal(bound(), other)
                    out.fill_(7)
                assert is_recorded(bound)
                bound()
            assert (wide[:, 0] == 7).all()
            assert (wide[:, N + 1 :] == 7).all()


def test_a_run_in_parts():
    values = data(1, (2500, K), "bfloat16")
    for backend in ("dense", "cusparselt"):
        with ss.SparseGemmPlan(
            weight(0, N, K, "6:8"),
            "6:8",
            backend=backend,
            options=ss.PlanOptions(workspace_limit=1 << 20),
        ) as plan:
            bound = plan.bind(to_torch(values), graph=True)
            assert len(bound._parts) > 1
            for _ in range(CALLS):
                bound.out.fill_(7)
                assert_same(to_host(bound()), expected_for(values))
            assert is_recorded(bound)


def test_a_graph_of_a_bound_run(plan):
    import torch

    x, out = buffers()
    stream = torch.cuda.Stream()
    bound = plan.bind(x, out, stream=stream, graph=True)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # Its very first launch is captured.
    with torch.cuda.graph(graph, stream=stream, capture_error_mode="global"):
        bound()
    for seed in range(3):
        values = data(seed, (M, K), "bfloat16")
        x.copy_(to_torch(values))
        out.fill_(7)
        graph.replay()
        torch.cuda.synchronize()
        assert_same(to_host(out), expected_for(values))
    # A larger run on the same stream moves the workspace, but not the graph's.
    with torch.cuda.stream(stream):
        plan.run(torch.randn((5000, K), dtype=torch.bfloat16, device="cuda"))
    stream.synchronize()
    out.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    assert_same(to_host(out), expected_for(values))
    out.fill_(7)
    with torch.cuda.stream(stream):
        bound()
    stream.synchronize()
    assert_same(to_host(out), expected_for(values))


def test_captures_that_are_not_prepared_say_so(plan):
    import torch

    x, out = buffers()
    bound = plan.bind(x, out)
    stream = torch.cuda.Stream()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.warns(UserWarning, match="empty"),
        pytest.raises(ss.CaptureError, match=rf"prepare\(tokens=\[{M}\]"),
        torch.cuda.graph(graph, stream=stream),
    ):
        bound()
    graph = torch.cuda.CUDAGraph()
    with (
        pytest.warns(UserWarning, match="empty"),
        pytest.raises(ss.CaptureError, match="bind"),
        torch.cuda.graph(graph, stream=stream),
    ):
        plan.bind(x, out)
    plan.prepare([M], stream=stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        bound()
    values = data(4, (M, K), "bfloat16")
    x.copy_(to_torch(values))
    graph.replay()
    torch.cuda.synchronize()
    assert_same(to_host(out), expected_for(values))


def test_two_streams_at_once(plan):
    """Each call goes to the stream that is current then, with workspace of its own."""
    import torch

    streams = [torch.cuda.Stream() for _ in range(2)]
    values = [data(seed, (M, K), "bfloat16") for seed in range(2)]
    inputs = [to_torch(array) for array in values]
    torch.cuda.synchronize()
    bound = [plan.bind(x, graph=True) for x in inputs]
    for _ in range(50):
        for stream, call in zip(streams, bound, strict=True):
            with torch.cuda.stream(stream):
                call()
    torch.cuda.synchronize()
    for call, array in zip(bound, values, strict=True):
        assert_same(to_host(call.out), expected_for(array))
    # A stream that is given waits for the current one at each call.
    x, out = buffers()
    given = plan.bind(x, out, stream=streams[0], graph=True)
    for seed in range(CALLS):
        fresh = data(seed, (M, K), "bfloat16")
        x.copy_(to_torch(fresh))
        given()
        streams[0].synchronize()
        assert_same(to_host(out), expected_for(fresh))


def test_threads(plan):
    """Also threads that made no call of CUDA before, on the default stream and on their own."""
    import torch

    inputs = [data(seed, (8 + seed % 3, K), "bfloat16") for seed in range(12)]
    wanted = [expected_for(x) for x in inputs]
    bound = [plan.bind(to_torch(x), graph=True) for x in inputs]
    torch.cuda.synchronize()
    problems: list[str] = []

    def work(index: int) -> None:
        try:
            if index % 2:
                with torch.cuda.stream(torch.cuda.Stream()):
                    for _ in range(20):
                        bound[index]()
                    torch.cuda.current_stream().synchronize()
            else:
                for _ in range(20):
                    bound[index]()
        except BaseException as error:
            problems.append(f"{index}: {error!r}")

    for _ in range(2):  # the second time thread identifiers come again
        threads = [threading.Thread(target=work, args=(index,)) for index in range(12)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        torch.cuda.synchronize()
        assert not problems
        for call, y in zip(bound, wanted, strict=True):
            assert_same(to_host(call.out), y)
            call.out.fill_(7)


def test_a_new_thread_may_run_first_of_all(plan):
    """On the default stream nothing but the launches needs the thread to have a context."""
    values = data(2, (M, K), "bfloat16")
    x, out = to_torch(values), buffers()[1]
    plan.run(x, out=out)
    out.fill_(7)
    thread = threading.Thread(target=lambda: plan.run(x, out=out))
    thread.start()
    thread.join()
    assert_same(to_host(out), expected_for(values))


def test_after_close():
    x, out = buffers()
    for backend in ("dense", "cusparselt"):
        with ss.SparseGemmPlan(weight(0, N, K, "6:8"), "6:8", backend=backend) as plan:
            bound = plan.bind(x, out, graph=True)
            for _ in range(CALLS):
                bound()
        out.fill_(7)
        with pytest.raises(ss.PlanClosed):
            bound()
        assert (out == 7).all()


def test_recordings_follow_the_workspace(plan):
    """A larger run on the stream moves it; what was recorded before is not launched again."""
    import torch

    x, out = buffers()
    bound = plan.bind(x, out, graph=True)
    for seed in range(3):
        for _ in range(CALLS):
            values = data(seed, (M, K), "bfloat16")
            x.copy_(to_torch(values))
            out.fill_(7)
            bound()
            assert_same(to_host(out), expected_for(values))
        assert is_recorded(bound)
        # On the same stream, with recordings still to run.
        for _ in range(20):
            bound()
        plan.run(torch.ones((3000 << seed, K), dtype=torch.bfloat16, device="cuda"))
        trash = torch.full((1 << 24,), 7, dtype=torch.uint8, device="cuda")
        bound()
        assert_same(to_host(out), expected_for(values))
        del trash


def test_recordings_beside_a_capture_of_another_thread(plan):
    """In PyTorch's global mode, in which much of what any thread does would spoil the capture."""
    import torch

    x, out = buffers()
    values = data(6, (M, K), "bfloat16")
    x.copy_(to_torch(values))
    mine, theirs = torch.cuda.Stream(), torch.cuda.Stream()
    bounds = []
    with torch.cuda.stream(theirs):
        for calls in (0, 1):  # records then, or only launches
            bound = plan.bind(x, torch.full_like(out, 7), stream=theirs, graph=True)
            for _ in range(calls):
                bound()
            bounds.append(bound)
    captured = plan.bind(x, out, stream=mine)
    plan.prepare([M], stream=mine)
    torch.cuda.synchronize()
    begun, done = threading.Event(), threading.Event()
    problems = []

    def work():
        begun.wait()
        try:
            with torch.cuda.stream(theirs):
                for bound in bounds:
                    for _ in range(CALLS):
                        bound()
        except BaseException as error:
            problems.append(repr(error))
        done.set()

    thread = threading.Thread(target=work)
    thread.start()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=mine, capture_error_mode="global"):
        captured()
        begun.set()
        done.wait()
        captured()
    thread.join()
    assert not problems
    out.fill_(7)
    graph.replay()
    torch.cuda.synchronize()
    for found in (out, *(bound.out for bound in bounds)):
        assert_same(to_host(found), expected_for(values))
    assert all(is_recorded(bound) for bound in bounds)


def test_recordings_give_their_memory_back(plan):
    """Of the device and of the host, whether they have run or are still running."""
    import psutil
    import torch

    x, out = buffers()

    def use(times):
        for _ in range(times):
            bound = plan.bind(x, out, graph=True)
            for _ in range(CALLS):
                bound()
            assert is_recorded(bound)
        torch.cuda.synchronize()
        return torch.cuda.mem_get_info()[0], psutil.Process().memory_info().rss

    use(200)
    before, host = use(50)
    after, host_after = use(300)
    assert before - after < 1 << 20
    assert host_after - host < 4 << 20


def test_memory_that_was_exchanged(plan):
    import torch

    x, out = buffers()
    bound = plan.bind(x, out)
    x.data = torch.ones_like(x)
    with pytest.raises(ss.ArrayError, match="x lies elsewhere"):
        bound()


def test_arrays_of_other_libraries(plan):
    import cupy

    values = data(3, (M, K))
    x, out = cupy.asarray(values), cupy.empty((M, N), np.float32)
    expected = expected_for(values)
    assert plan.bind(x, out)() is out
    assert_same(to_host(out), expected)
    assert_same(to_host(plan.bind(x)()), expected)
    # What is read through DLPack stays alive, and is there whatever stream a call comes on.
    jax = pytest.importorskip("jax")
    y = to_torch(np.zeros((M, N), np.float32))
    bound = plan.bind(jax.numpy.asarray(values), y)
    with cupy.cuda.Stream(non_blocking=True) as stream:
        bound()
        stream.synchronize()
    assert_same(to_host(y), expected)
    with pytest.raises(ss.ArrayError, match="immutable"):
        plan.bind(jax.numpy.asarray(values))
