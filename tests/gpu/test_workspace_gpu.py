"""Plans that share a workspace: right results in turns, from threads and streams, and in graphs."""

from __future__ import annotations

import threading

import numpy as np
import pytest

import slidesparse_rt as ss

from .common import BACKENDS, assert_same, data, reference, to_host, to_torch, weight

pytestmark = pytest.mark.gpu

#: (N, K) of plans that share, so that blocks grow and are used in part.
SHAPES = ((64, 96), (320, 512), (128, 2048))
TOKENS = (1, 40, 700)


@pytest.fixture
def workspace():
    with ss.Workspace("cuda") as made:
        yield made


def plans_of(backend, workspace):
    options = ss.PlanOptions(workspace=workspace)
    weights = [weight(seed, n, k, "6:8") for seed, (n, k) in enumerate(SHAPES)]
    plans = [ss.SparseGemmPlan(w, "6:8", backend=backend, options=options) for w in weights]
    inputs = {
        (i, m): data(10 * i + m, (m, k), "bfloat16")
        for i, (_, k) in enumerate(SHAPES)
        for m in TOKENS
    }
    wanted = {key: reference(weights[key[0]], "6:8", x, "int8") for key, x in inputs.items()}
    return plans, {key: to_torch(x) for key, x in inputs.items()}, wanted


@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_in_turns(backend, workspace):
    plans, inputs, wanted = plans_of(backend, workspace)
    own = sum(plan.nbytes for plan in plans)
    for _ in range(2):
        for (i, m), x in inputs.items():
            assert_same(to_host(plans[i].run(x)), wanted[i, m])
    assert workspace.nbytes > 0
    assert sum(plan.nbytes for plan in plans) == own
    plans[0].close()
    assert_same(to_host(plans[1].run(inputs[1, 40])), wanted[1, 40])
    with pytest.raises(ss.PlanClosed):
        plans[0].run(inputs[0, 1])
    workspace.close()
    with pytest.raises(ss.PlanClosed, match="this workspace is closed"):
        plans[1].run(inputs[1, 40])


@pytest.mark.parametrize("backend", BACKENDS)
def test_plans_from_several_threads_and_streams(backend, workspace):
    import torch

    plans, inputs, wanted = plans_of(backend, workspace)
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    found: list[tuple[tuple[int, int], object]] = []
    faults: list[BaseException] = []

    def work(number):
        try:
            with torch.cuda.stream(streams[number % 2]):
                for turn in range(12):
                    key = list(inputs)[(turn + 2 * number) % len(inputs)]
                    found.append((key, plans[key[0]].run(inputs[key])))
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.cuda.synchronize()
    assert not faults
    assert len(found) == 48
    for key, y in found:
        assert_same(to_host(y), wanted[key])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_graph_of_several_plans(backend, workspace):
    import torch

    plans, inputs, wanted = plans_of(backend, workspace)
    stream = torch.cuda.Stream()
    m = 40
    for plan in plans:
        plan.prepare([m], x_dtype="bfloat16", stream=stream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        results = [plan.run(inputs[i, m]) for i, plan in enumerate(plans)]
    # A larger run makes the block grow; the graph keeps the one that it was captured with.
    with torch.cuda.stream(stream):
        plans[2].run(torch.zeros((5000, SHAPES[2][1]), dtype=torch.bfloat16, device="cuda"))
    torch.cuda.synchronize()
    for seed in range(2):
        for i, (_, k) in enumerate(SHAPES):
            fresh = data(100 + seed, (m, k), "bfloat16")
            inputs[i, m].copy_(to_torch(fresh))
            wanted[i, m] = reference(weight(i, *SHAPES[i], "6:8"), "6:8", fresh, "int8")
        graph.replay()
        torch.cuda.synchronize()
        for i, y in enumerate(results):
            assert_same(to_host(y), np.asarray(wanted[i, m]))


def test_a_workspace_of_another_gpu_is_refused():
    options = ss.PlanOptions(workspace=ss.Workspace("cuda:7"))
    with pytest.raises(ss.DeviceError, match=r"the plan is on cuda:0, its workspace on cuda:7"):
        ss.SparseGemmPlan(weight(0, 64, 96, "6:8"), "6:8", device="cuda", options=options)
