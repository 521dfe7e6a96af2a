"""The bindings of cuSPARSELt and cuBLASLt on a GPU: exact products, algorithms, threads, leaks."""

from __future__ import annotations

import ctypes
import gc
import subprocess
import sys
import textwrap
import threading
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
import pytest

from slidesparse_rt.errors import LibraryError, PlanClosed
from slidesparse_rt.ffi import cublaslt, cusparselt
from slidesparse_rt.ffi.checked import DataType, HostScalar
from slidesparse_rt.ffi.driver import probe
from slidesparse_rt.ffi.handles import HandlePool

pytestmark = pytest.mark.gpu

N, K, M = 64, 256, 48
T_N = (cusparselt.Operation.T, cusparselt.Operation.N)
ONE, ZERO = HostScalar(ctypes.c_float, 1.0), HostScalar(ctypes.c_float, 0.0)


@pytest.fixture
def cupy() -> Any:
    """CuPy with device 0 current; where there is a GPU, CuPy must be there too."""
    if not probe().devices:
        pytest.skip("no NVIDIA GPU here")
    import cupy

    with cupy.cuda.Device(0):
        yield cupy


@pytest.fixture
def pool(cupy: Any) -> Any:
    made = HandlePool()
    yield made
    made.close()


class Operands(NamedTuple):
    """A 2:4 sparse int8 weight, activations, their product, and device copies."""

    w: np.ndarray
    x: np.ndarray
    y: np.ndarray
    w_device: Any
    x_device: Any


def operands(cupy: Any, seed: int = 0) -> Operands:
    rng = np.random.default_rng(seed)
    w = rng.integers(-127, 128, (N, K), dtype=np.int8)
    dropped = np.argsort(rng.random((N, K // 4, 4)), axis=-1)[..., :2]
    np.put_along_axis(w.reshape(N, K // 4, 4), dropped, 0, axis=-1)
    x = rng.integers(-127, 128, (M, K), dtype=np.int8)
    y = x.astype(np.int32) @ w.astype(np.int32).T
    return Operands(w, x, y, cupy.asarray(w), cupy.asarray(x))


def selection(handle: cusparselt.Handle, out: DataType = DataType.I32) -> cusparselt.AlgSelection:
    w = cusparselt.MatDescriptor(handle, K, N, K, DataType.I8, structured=True)
    x = cusparselt.MatDescriptor(handle, K, M, K, DataType.I8)
    y = cusparselt.MatDescriptor(handle, N, M, N, out)
    return cusparselt.AlgSelection(
        cusparselt.MatmulDescriptor(T_N, (w, x, y, y), cusparselt.Compute.I32)
    )


class Sparse:
    """A cuSPARSELt product of :func:`operands`, ready to run."""

    def __init__(self, cupy: Any, handle: cusparselt.Handle, data: Operands) -> None:
        self.selection = selection(handle)
        self.plan = cusparselt.MatmulPlan(self.selection)
        size, buffer_size = self.plan.compressed_size()
        self.w = cupy.empty(size, np.uint8)
        self.x = data.x_device
        self.y = cupy.zeros((M, N), np.int32)
        buffer = cupy.empty(max(buffer_size, 16), np.uint8)
        stream = cupy.cuda.get_current_stream()
        self.plan.compress(data.w_device.data.ptr, self.w.data.ptr, buffer.data.ptr, stream.ptr)
        stream.synchronize()
        self.scratch = cupy.empty(max(self.plan.workspace_bytes(), 16), np.uint8)

    def pointers(self) -> tuple[int, ...]:
        y = self.y.data.ptr
        tail = (ZERO.address, y, y, self.scratch.data.ptr)
        return (ONE.address, self.w.data.ptr, self.x.data.ptr, *tail)


def test_version_through_a_handle(pool: HandlePool) -> None:
    handle = pool.cusparselt(0)
    number = ctypes.c_int()
    handle.library.cusparseLtGetVersion(handle.address, ctypes.byref(number))
    major, minor, patch = handle.library.version
    assert number.value == major * 1000 + minor * 100 + patch


def test_sparse_int8_product_is_exact(cupy: Any, pool: HandlePool) -> None:
    data = operands(cupy)
    product = Sparse(cupy, pool.cusparselt(0), data)
    stream = cupy.cuda.get_current_stream().ptr
    product.plan.matmul(*product.pointers(), stream)
    np.testing.assert_array_equal(product.y.get(), data.y)
    product.plan.search(*product.pointers(), stream)
    key = cusparselt.AlgAttribute
    assert 0 <= product.selection.get(key.CONFIG_ID) < product.selection.get(key.CONFIG_MAX_ID)
    product.scratch = cupy.empty(max(product.plan.workspace_bytes(), 16), np.uint8)
    product.y[...] = 0
    product.plan.matmul(*product.pointers(), stream)
    np.testing.assert_array_equal(product.y.get(), data.y)


def test_compressing_without_a_plan_is_the_same(cupy: Any, pool: HandlePool) -> None:
    data = operands(cupy)
    handle = pool.cusparselt(0)
    product = Sparse(cupy, handle, data)
    weight = cusparselt.MatDescriptor(handle, K, N, K, DataType.I8, structured=True)
    size, buffer_size = weight.compressed_size()
    assert size == product.w.size
    alone = cupy.empty(size, np.uint8)
    buffer = cupy.empty(max(buffer_size, 16), np.uint8)
    stream = cupy.cuda.get_current_stream().ptr
    weight.compress(
        data.w_device.data.ptr,
        alone.data.ptr,
        buffer.data.ptr,
        stream,
        operation=cusparselt.Operation.T,
    )
    product.w = alone
    product.plan.matmul(*product.pointers(), stream)
    np.testing.assert_array_equal(product.y.get(), data.y)


def test_pruning_makes_what_the_check_accepts(cupy: Any, pool: HandlePool) -> None:
    matmul = selection(pool.cusparselt(0)).matmul
    dense = cupy.asarray(np.random.default_rng(1).integers(1, 100, (N, K), dtype=np.int8))
    pruned, invalid = cupy.empty_like(dense), cupy.full(1, -1, np.int32)
    stream = cupy.cuda.get_current_stream().ptr
    matmul.prune_check(dense.data.ptr, invalid.data.ptr, stream)
    assert int(invalid[0]) != 0
    matmul.prune(dense.data.ptr, pruned.data.ptr, stream)
    invalid.fill(0)
    matmul.prune_check(pruned.data.ptr, invalid.data.ptr, stream)
    assert int(invalid[0]) == 0
    kept = np.count_nonzero(pruned.get().reshape(N, K // 4, 4), axis=-1)
    assert kept.max() <= 2


def test_attributes_have_the_width_of_the_table(pool: HandlePool) -> None:
    """What is set comes back; a width of one byte more is refused."""
    handle = pool.cusparselt(0)
    chosen = selection(handle)
    keys = cusparselt.MatmulAttribute
    for owner, key, value in (
        (chosen, cusparselt.AlgAttribute.SEARCH_ITERATIONS, 7),
        (chosen.matmul, keys.ACTIVATION_RELU, 1),
        (chosen.matmul, keys.ACTIVATION_RELU_UPPERBOUND, 6.0),
        (chosen.matmul, keys.BIAS_POINTER, 0x7F0000001000),
    ):
        owner.set(key, value)
        assert owner.get(key) == value
        cell = (ctypes.c_uint8 * 16)()
        name = {chosen: "cusparseLtMatmulAlg"}.get(owner, "cusparseLtMatmulDesc")
        with pytest.raises(LibraryError, match="INVALID_VALUE"):
            getattr(handle.library, f"{name}SetAttribute")(
                handle.address,
                owner.address,
                key,
                ctypes.byref(cell),
                ctypes.sizeof(key.ctype) + 1,
            )


def test_what_the_library_lacks_is_an_error_with_its_name(pool: HandlePool) -> None:
    handle = pool.cusparselt(0)
    with pytest.raises(LibraryError) as caught:
        cusparselt.MatmulPlan(selection(handle, DataType.F32))
    assert caught.value.status_name.startswith("CUSPARSE_STATUS_")
    # The handle is as good as before.
    assert cusparselt.MatmulPlan(selection(handle)).workspace_bytes() >= 0


def test_sparse_product_in_a_graph(cupy: Any, pool: HandlePool) -> None:
    data = operands(cupy)
    product = Sparse(cupy, pool.cusparselt(0), data)
    cupy.cuda.Device().synchronize()
    stream = cupy.cuda.Stream(non_blocking=True)
    with stream:
        stream.begin_capture()
        product.plan.matmul(*product.pointers(), stream.ptr)
        graph = stream.end_capture()
    other = operands(cupy, seed=5)
    product.x[...] = other.x_device
    cupy.cuda.Device().synchronize()
    graph.launch(stream)
    stream.synchronize()
    expected = other.x.astype(np.int32) @ data.w.astype(np.int32).T
    np.testing.assert_array_equal(product.y.get(), expected)


def dense_parts(
    lib: cublaslt.CublasLt, kind: DataType, out: DataType, compute: cublaslt.Compute
) -> tuple[cublaslt.MatmulDescriptor, cublaslt.Layouts]:
    scale = DataType.I32 if compute == cublaslt.Compute.I32 else DataType.F32
    matmul = cublaslt.MatmulDescriptor(lib, compute, scale)
    matmul.set(cublaslt.MatmulAttribute.TRANSA, cublaslt.Operation.T)
    w = cublaslt.MatrixLayout(lib, kind, K, N, K)
    x = cublaslt.MatrixLayout(lib, kind, K, M, K)
    y = cublaslt.MatrixLayout(lib, out, N, M, N)
    return matmul, cublaslt.Layouts(w, x, y, y)


def preference(lib: cublaslt.CublasLt) -> cublaslt.Preference:
    made = cublaslt.Preference(lib)
    made.set(cublaslt.PreferenceAttribute.MAX_WORKSPACE_BYTES, 32 << 20)
    return made


def test_dense_int8_product_is_exact_with_every_algorithm(cupy: Any, pool: HandlePool) -> None:
    handle = pool.cublaslt(0)
    lib = handle.library
    data = operands(cupy)
    matmul, layouts = dense_parts(lib, DataType.I8, DataType.I32, cublaslt.Compute.I32)
    found = cublaslt.heuristic(handle, matmul, layouts, preference(lib), count=8)
    assert found
    one, zero = HostScalar(ctypes.c_int32, 1), HostScalar(ctypes.c_int32, 0)
    y = cupy.empty((M, N), np.int32)
    scratch = cupy.empty(32 << 20, np.uint8)
    stream = cupy.cuda.get_current_stream().ptr
    for candidate in found:
        checked = cublaslt.check(handle, matmul, layouts, candidate.algorithm)
        assert checked.workspace_bytes == candidate.workspace_bytes <= 32 << 20
        configuration = cublaslt.describe(lib, candidate.algorithm)
        assert configuration[cublaslt.AlgorithmAttribute.ID] >= 0
        assert configuration[cublaslt.AlgorithmAttribute.SPLITK_NUM] >= -1
        y[...] = 0
        with cublaslt.Matmul(handle, matmul, layouts, candidate) as product:
            product.run(
                one.address,
                data.w_device.data.ptr,
                data.x_device.data.ptr,
                zero.address,
                y.data.ptr,
                y.data.ptr,
                scratch.data.ptr,
                candidate.workspace_bytes,
                stream,
            )
        np.testing.assert_array_equal(y.get(), data.y)


@pytest.mark.parametrize("out", [DataType.BF16, DataType.F32])
def test_dense_fp8_product_with_two_scale_vectors(
    cupy: Any, pool: HandlePool, out: DataType
) -> None:
    handle = pool.cublaslt(0)
    lib = handle.library
    capability = probe().devices[0].compute_capability
    supported = cublaslt.supports_outer_vector_scales(lib.version, capability)
    rng = np.random.default_rng(3)
    w = rng.normal(size=(N, K)).astype(ml_dtypes.float8_e4m3fn)
    x = rng.normal(size=(M, K)).astype(ml_dtypes.float8_e4m3fn)
    w_scale = rng.uniform(0.5, 2.0, N).astype(np.float32)
    x_scale = rng.uniform(0.5, 2.0, M).astype(np.float32)
    device = [cupy.asarray(part) for part in (w.view(np.uint8), x.view(np.uint8), w_scale, x_scale)]
    matmul, layouts = dense_parts(lib, DataType.E4M3, out, cublaslt.Compute.F32)
    keys = cublaslt.MatmulAttribute
    matmul.set(keys.A_SCALE_MODE, cublaslt.ScaleMode.OUTER_VEC_F32)
    matmul.set(keys.B_SCALE_MODE, cublaslt.ScaleMode.OUTER_VEC_F32)
    matmul.point(keys.A_SCALE_POINTER, device[2].data.ptr)
    matmul.point(keys.B_SCALE_POINTER, device[3].data.ptr)
    found = cublaslt.heuristic(handle, matmul, layouts, preference(lib))
    assert bool(found) is supported
    if not supported:
        return
    kind = ml_dtypes.bfloat16 if out == DataType.BF16 else np.float32
    y = cupy.empty(M * N * np.dtype(kind).itemsize, np.uint8)
    scratch = cupy.empty(max(found[0].workspace_bytes, 16), np.uint8)
    cublaslt.Matmul(handle, matmul, layouts, found[0]).run(
        ONE.address,
        device[0].data.ptr,
        device[1].data.ptr,
        ZERO.address,
        y.data.ptr,
        y.data.ptr,
        scratch.data.ptr,
        found[0].workspace_bytes,
        cupy.cuda.get_current_stream().ptr,
    )
    got = y.get().view(kind).reshape(M, N).astype(np.float64)
    scales = x_scale[:, None].astype(np.float64) * w_scale
    exact = x.astype(np.float64) @ w.astype(np.float64).T * scales
    magnitude = np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64)).T * scales
    # Tensor cores add fp8 products with 13 fraction bits or more; bfloat16 results round at 2^-9.
    bound = magnitude * 2.0**-11 + (np.abs(exact) * 2.0**-8 if out == DataType.BF16 else 0)
    assert np.all(np.abs(got - exact) <= bound)


def test_threads_have_their_own_handles(cupy: Any, pool: HandlePool) -> None:
    faults: list[BaseException] = []
    handles: set[int] = set()
    together = threading.Barrier(4)

    def work(seed: int) -> None:
        try:
            with cupy.cuda.Device(0), cupy.cuda.Stream(non_blocking=True) as stream:
                handles.add(pool.cusparselt(0).address)
                together.wait(timeout=60)
                data = operands(cupy, seed)
                product = Sparse(cupy, pool.cusparselt(0), data)
                for _ in range(50):
                    product.plan.matmul(*product.pointers(), stream.ptr)
                stream.synchronize()
                np.testing.assert_array_equal(product.y.get(), data.y)
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert len(handles) == 4


def test_a_plan_runs_on_another_thread_and_outlives_its_own(cupy: Any, pool: HandlePool) -> None:
    data = operands(cupy)
    made: list[Sparse] = []

    def work() -> None:
        with cupy.cuda.Device(0):
            made.append(Sparse(cupy, pool.cusparselt(0), data))
            cupy.cuda.Device().synchronize()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    (product,) = made
    product.plan.matmul(*product.pointers(), cupy.cuda.get_current_stream().ptr)
    np.testing.assert_array_equal(product.y.get(), data.y)
    product.plan.close()
    with pytest.raises(PlanClosed):
        product.plan.matmul(*product.pointers(), 0)


def test_plans_and_handles_leave_no_memory_behind(cupy: Any) -> None:
    def resident() -> int:
        with open("/proc/self/statm") as file:  # noqa: PTH123
            return int(file.read().split()[1]) * 4096

    def round_of_plans() -> None:
        with cusparselt.Handle(0) as handle, cublaslt.Handle(0):
            for _ in range(100):
                cusparselt.MatmulPlan(selection(handle)).close()
        gc.collect()

    round_of_plans()  # the first one loads kernels
    free, host = cupy.cuda.runtime.memGetInfo()[0], resident()
    for _ in range(10):
        round_of_plans()
    assert cupy.cuda.runtime.memGetInfo()[0] >= free
    assert resident() - host < 8 << 20


def test_a_process_that_leaves_everything_open_ends_well(cupy: Any) -> None:
    code = """
        import cupy
        from slidesparse_rt.ffi import cusparselt as c
        from slidesparse_rt.ffi.checked import DataType
        from slidesparse_rt.ffi.handles import cublaslt_handle, cusparselt_handle
        cupy.cuda.Device(0).use()
        dense, sparse = cublaslt_handle(0), cusparselt_handle(0)
        w = c.MatDescriptor(sparse, 64, 64, 64, DataType.I8, structured=True)
        x = c.MatDescriptor(sparse, 64, 64, 64, DataType.I8)
        y = c.MatDescriptor(sparse, 64, 64, 64, DataType.I32)
        matmul = c.MatmulDescriptor(
            (c.Operation.T, c.Operation.N), (w, x, y, y), c.Compute.I32)
        plan = c.MatmulPlan(c.AlgSelection(matmul))
        print(plan.workspace_bytes() >= 0)
    """
    ran = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "True\n", "")
