"""Who owns what in the bindings: destruction, threads, handles, the end of a process."""

from __future__ import annotations

import gc
import textwrap
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from ffi_fake import POINTERS, dense_matmul, fake, fake_pool, python, sparse_parts
from hypothesis import given
from hypothesis import strategies as st

from slidesparse_rt.errors import BackendUnavailable, DeviceMemoryError, OptionError, PlanClosed
from slidesparse_rt.ffi import cusparselt, handles
from slidesparse_rt.ffi.checked import DataType
from slidesparse_rt.ffi.cublaslt import CublasLt
from slidesparse_rt.ffi.cusparselt import CuSparseLt
from slidesparse_rt.ffi.objects import Gate, Resource

# --- life and death -------------------------------------------------------------------------------

PARTS = ("handle", "a", "b", "d", "matmul", "selection", "plan")
#: What each was made from; nothing may be destroyed before what was made from it.
MADE_FROM = {
    "a": ("handle",),
    "b": ("handle",),
    "d": ("handle",),
    "selection": ("a", "b", "d", "handle"),
    "plan": ("selection", "a", "b", "d", "handle"),
}


@given(order=st.permutations(PARTS), closing=st.sets(st.sampled_from(PARTS)))
def test_nothing_is_destroyed_before_what_was_made_from_it(
    order: list[str], closing: set[str]
) -> None:
    """In whatever order they are given up, and whether closed or just dropped."""
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    names = {part.address: name for name, part in parts.items()}
    for name in order:
        part = parts.pop(name)
        if name in closing:
            part.close()
            part.close()
            assert part.closed
        del part
    destroyed = [names[address] for _, address in dll.destroyed()]
    assert sorted(destroyed) == sorted(name for name in PARTS if name != "matmul")
    for child, parents in MADE_FROM.items():
        for parent in parents:
            assert destroyed.index(child) < destroyed.index(parent)


def test_destructors_that_a_version_lacks_are_not_called() -> None:
    lib, dll = fake(CuSparseLt, lacks=("cusparseLtMatmulAlgSelectionDestroy",))
    sparse_parts(lib)
    assert sorted(name for name, _ in dll.destroyed()) == [
        "cusparseLtDestroy",
        *["cusparseLtMatDescriptorDestroy"] * 3,
        "cusparseLtMatmulPlanDestroy",
    ]


def test_use_after_close() -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    with parts["plan"] as plan:
        plan.matmul(*POINTERS, 0)
    before = len(dll.calls)
    for use in (
        lambda: plan.matmul(*POINTERS, 0),
        lambda: plan.search(*POINTERS, 0),
        plan.workspace_bytes,
        lambda: plan.address,
    ):
        with pytest.raises(PlanClosed, match=r"cusparselt\.MatmulPlan was used after close"):
            use()
    parts["a"].close()
    with pytest.raises(PlanClosed, match=r"cusparselt\.MatDescriptor"):
        parts["a"].set(cusparselt.MatAttribute.NUM_BATCHES, 2)
    parts["handle"].close()
    with pytest.raises(PlanClosed, match=r"cusparselt\.Handle"):
        cusparselt.MatDescriptor(parts["handle"], 64, 32, 64, DataType.I8)
    assert len(dll.calls) == before


def test_what_lives_works_on_after_its_handle_was_closed() -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    for name in ("handle", "a", "b", "d", "matmul", "selection"):
        parts[name].close()
    plan = parts["plan"]
    plan.matmul(*POINTERS, 0)
    assert plan.workspace_bytes() == 4096
    assert dll.destroyed() == []
    plan.close()
    assert dll.destroyed()[0][0] == "cusparseLtMatmulPlanDestroy"
    assert dll.destroyed()[-1][0] == "cusparseLtDestroy"


def test_matrices_of_two_handles_do_not_mix() -> None:
    lib, _ = fake(CuSparseLt)
    one, two = sparse_parts(lib), sparse_parts(lib)
    with pytest.raises(OptionError, match="one handle"):
        cusparselt.MatmulDescriptor(
            (cusparselt.Operation.T, cusparselt.Operation.N),
            (one["a"], one["b"], two["d"], two["d"]),
            cusparselt.Compute.I32,
        )


def test_a_failed_creation_destroys_nothing_and_leaves_the_rest_usable() -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    dll.statuses["cusparseLtMatmulPlanInit"] = 2
    with pytest.raises(DeviceMemoryError):
        cusparselt.MatmulPlan(parts["selection"])
    assert dll.destroyed() == []
    dll.statuses.clear()
    assert cusparselt.MatmulPlan(parts["selection"]).workspace_bytes() == 4096


def test_a_destruction_that_fails_is_logged_not_raised(caplog: pytest.LogCaptureFixture) -> None:
    lib, dll = fake(CuSparseLt)
    plan = sparse_parts(lib)["plan"]
    dll.statuses["cusparseLtMatmulPlanDestroy"] = 7
    plan.close()
    assert "cusparseLtMatmulPlanDestroy" in caplog.text
    assert "INTERNAL_ERROR" in caplog.text
    del plan
    assert dll.destroyed()[-1][0] == "cusparseLtDestroy"  # the parents go all the same


def test_destructions_run_with_the_device_current() -> None:
    lib, dll = fake(CuSparseLt)
    current: list[int] = []
    seen: list[tuple[str, list[int]]] = []

    @contextmanager
    def around() -> Iterator[None]:
        current.append(5)
        yield
        current.pop()

    for name in ("cusparseLtInit", "cusparseLtMatDescriptorDestroy", "cusparseLtDestroy"):
        dll.during[name] = lambda *_, name=name: seen.append((name, list(current)))
    handle = cusparselt.Handle(5, lib=lib, around=around)
    matrix = cusparselt.MatDescriptor(handle, 64, 32, 64, DataType.I8)
    handle.close()
    matrix.close()
    assert seen == [
        ("cusparseLtInit", [5]),
        ("cusparseLtMatDescriptorDestroy", [5]),
        ("cusparseLtDestroy", [5]),
    ]


def test_a_destruction_waits_for_the_call_under_way() -> None:
    """Another thread gives a plan up while its handle is busy; nothing blocks, nothing overlaps."""
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    other = cusparselt.MatmulPlan(parts["selection"])
    address = other.address

    def busy(*_: Any) -> None:
        nonlocal other
        helper = threading.Thread(target=other.close)
        helper.start()
        helper.join(timeout=10)
        assert not helper.is_alive()
        assert dll.destroyed() == []

    dll.during["cusparseLtMatmul"] = busy
    parts["plan"].matmul(*POINTERS, 0)
    assert dll.destroyed() == []
    assert other.closed
    parts["plan"].workspace_bytes()
    assert dll.destroyed() == [("cusparseLtMatmulPlanDestroy", address)]


def test_what_was_parked_goes_with_the_handle() -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    plan = parts.pop("plan")
    dll.during["cusparseLtMatmul"] = lambda *_: parts.clear()
    plan.matmul(*POINTERS, 0)
    plan.close()
    del plan
    assert len(dll.destroyed()) == len(set(dll.destroyed())) == 6
    assert dll.destroyed()[-1][0] == "cusparseLtDestroy"


def test_one_call_at_a_time_through_a_handle() -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    inside, worst = 0, 0

    def enter(*_: Any) -> None:
        nonlocal inside, worst
        inside += 1
        worst = max(worst, inside)
        threading.Event().wait(0.0005)
        inside -= 1

    for name in ("cusparseLtMatmul", "cusparseLtMatmulGetWorkspace", "cusparseLtMatmulPlanDestroy"):
        dll.during[name] = enter
    faults: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                parts["plan"].matmul(*POINTERS, 0)
                cusparselt.MatmulPlan(parts["selection"]).workspace_bytes()
        except BaseException as error:
            faults.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert faults == []
    assert worst == 1
    made = dll.names().count("cusparseLtMatmulPlanInit")
    parts.clear()
    assert dll.names().count("cusparseLtMatmulPlanDestroy") == made == 81
    assert dll.destroyed()[-1][0] == "cusparseLtDestroy"


def test_cublaslt_objects_are_destroyed_once() -> None:
    lib, dll = fake(CublasLt)
    product = dense_matmul(lib)
    assert dll.destroyed() == []
    product.close()
    del product
    gc.collect()
    names = [name for name, _ in dll.destroyed()]
    assert len(set(dll.destroyed())) == len(names)
    assert sorted(names) == [
        "cublasLtDestroy",
        "cublasLtMatmulDescDestroy",
        *["cublasLtMatrixLayoutDestroy"] * 4,
    ]


def test_a_thousand_plans_leave_nothing_behind() -> None:
    lib, dll = fake(CuSparseLt)
    parts = sparse_parts(lib)
    gc.collect()
    before = sum(issubclass(type(thing), (Resource, Gate)) for thing in gc.get_objects())
    for _ in range(1000):
        cusparselt.MatmulPlan(parts["selection"])
    gc.collect()
    assert sum(issubclass(type(thing), (Resource, Gate)) for thing in gc.get_objects()) == before
    assert dll.names().count("cusparseLtMatmulPlanDestroy") == 1000


# --- handles of threads ---------------------------------------------------------------------------


def in_thread(work: Any) -> Any:
    """The result of ``work`` in a thread that has ended."""
    results: list[Any] = []
    thread = threading.Thread(target=lambda: results.append(work()))
    thread.start()
    thread.join()
    (result,) = results
    return result


def test_a_thread_has_one_handle_per_device_and_library() -> None:
    pool, sparse, dense = fake_pool()
    assert pool.cusparselt(0) is pool.cusparselt(0)
    assert pool.cublaslt(0) is pool.cublaslt(0)
    assert pool.cusparselt(1) is not pool.cusparselt(0)
    assert (pool.cusparselt(1).device, pool.cublaslt(0).device) == (1, 0)
    assert sparse.names() == ["cusparseLtInit"] * 2
    assert dense.names() == ["cublasLtCreate"]


def test_threads_that_live_at_once_do_not_share_handles() -> None:
    pool, _, _ = fake_pool()
    mine = pool.cusparselt(0)
    ready = threading.Barrier(4)
    addresses: list[int] = []

    def work() -> None:
        handle = pool.cusparselt(0)
        assert handle is not mine
        addresses.append(handle.address)
        ready.wait(timeout=10)  # all of them live at once
        assert pool.cusparselt(0) is handle

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({*addresses, mine.address}) == 5
    assert not mine.closed


def test_a_thread_that_ends_leaves_its_handles_to_the_next() -> None:
    """Destroying one would wait for the device, in the middle of another thread's capture."""
    pool, sparse, dense = fake_pool()

    def both() -> tuple[int, int, int]:
        return pool.cusparselt(0).address, pool.cusparselt(1).address, pool.cublaslt(0).address

    first = in_thread(both)
    assert sparse.destroyed() == dense.destroyed() == []
    for _ in range(3):
        assert in_thread(both) == first
    assert both() == first
    assert in_thread(both) != first  # this thread has them now
    assert (len(sparse.names()), len(dense.names())) == (4, 2)
    pool.close()
    assert (len(sparse.destroyed()), len(dense.destroyed())) == (4, 2)


def test_a_closed_handle_is_not_left_to_others() -> None:
    pool, sparse, _ = fake_pool()
    in_thread(lambda: pool.cusparselt(0).close())
    assert not pool.cusparselt(0).closed
    assert sparse.names() == ["cusparseLtInit", "cusparseLtDestroy", "cusparseLtInit"]


def test_what_a_thread_made_outlives_it() -> None:
    pool, sparse, _ = fake_pool()
    matrix = in_thread(
        lambda: cusparselt.MatDescriptor(pool.cusparselt(0), 64, 32, 64, DataType.I8)
    )
    pool.close()
    assert sparse.destroyed() == []
    assert matrix.compressed_size() == (5000, 6000)
    matrix.close()
    del matrix
    assert [name for name, _ in sparse.destroyed()] == [
        "cusparseLtMatDescriptorDestroy",
        "cusparseLtDestroy",
    ]


def test_closing_a_pool_gives_up_the_handles_of_all_threads() -> None:
    pool, sparse, dense = fake_pool()
    pool.cusparselt(0)
    pool.cublaslt(0)
    started, go_on = threading.Event(), threading.Event()

    def work() -> None:
        pool.cusparselt(0)
        started.set()
        go_on.wait(timeout=10)

    thread = threading.Thread(target=work)
    thread.start()
    started.wait(timeout=10)
    pool.close()
    pool.close()
    assert len(sparse.destroyed()) == 2
    assert len(dense.destroyed()) == 1
    go_on.set()
    thread.join()
    assert len(sparse.destroyed()) == 2
    for ask in (pool.cusparselt, pool.cublaslt):
        with pytest.raises(PlanClosed, match="pool of handles"):
            ask(0)


def test_a_closed_handle_is_replaced() -> None:
    pool, sparse, _ = fake_pool()
    pool.cusparselt(0).close()
    assert not pool.cusparselt(0).closed
    assert sparse.names() == ["cusparseLtInit", "cusparseLtDestroy", "cusparseLtInit"]


@pytest.mark.parametrize("device", [-1, True, "0", None, 0.0])
def test_devices_are_numbers(device: Any) -> None:
    pool, *_ = fake_pool()
    with pytest.raises(OptionError, match="CUDA's index of a device"):
        pool.cusparselt(device)


def test_a_handle_that_cannot_start_is_tried_again() -> None:
    pool, sparse, _ = fake_pool()
    sparse.statuses["cusparseLtInit"] = 1
    for _ in range(2):
        with pytest.raises(BackendUnavailable, match="device 0"):
            pool.cusparselt(0)
    sparse.statuses.clear()
    assert pool.cusparselt(0).address


def test_the_shared_pool_serves_the_module_functions(monkeypatch: pytest.MonkeyPatch) -> None:
    pool, *_ = fake_pool()
    monkeypatch.setattr(handles, "SHARED", pool)
    assert handles.cusparselt_handle(2) is pool.cusparselt(2)
    assert handles.cublaslt_handle(2) is pool.cublaslt(2)


# --- the end of a process -------------------------------------------------------------------------

_AT_EXIT = """
    import os, sys, threading
    sys.path.insert(0, {folder!r})
    from ffi_fake import POINTERS, fake, fake_pool, sparse_parts
    from slidesparse_rt.ffi import cusparselt
    lib, dll = fake(cusparselt.CuSparseLt)
    def report(name):
        dll.during[name] = lambda *_: os.write(1, (name + "\\n").encode())
    for name in ("cusparseLtMatmulPlanDestroy", "cusparseLtMatmulAlgSelectionDestroy",
                 "cusparseLtMatDescriptorDestroy", "cusparseLtDestroy"):
        report(name)
    parts = sparse_parts(lib)
"""
_ONE_OF_EACH = [
    "cusparseLtMatmulPlanDestroy",
    "cusparseLtMatmulAlgSelectionDestroy",
    *["cusparseLtMatDescriptorDestroy"] * 3,
    "cusparseLtDestroy",
]


@pytest.mark.parametrize(
    "ending",
    [
        "",
        "sys.exit(0)",
        # A cycle that only the last collection would find.
        "loop = [parts]; loop.append(loop); del parts, loop",
        # Something that outlives the module's globals.
        "sys.kept = parts",
        # A thread that is still at work; nothing may be called after the destruction.
        """
    def work():
        while True:
            try:
                parts["plan"].matmul(*POINTERS, 0)
            except Exception as error:
                assert "PlanClosed" in type(error).__name__
                return
    threading.Thread(target=work, daemon=True).start()
        """,
    ],
)
def test_everything_is_destroyed_once_when_the_interpreter_exits(ending: str) -> None:
    code = textwrap.dedent(_AT_EXIT).format(folder=str(Path(__file__).parent))
    ran = python(code + textwrap.dedent(ending))
    assert ran.stderr == ""
    # A busy handle may be left to the operating system, but then whole, and nothing is done twice.
    got = ran.stdout.split()
    assert got == _ONE_OF_EACH or ("daemon" in ending and got == [])


def test_a_forked_child_leaves_its_parents_objects_alone() -> None:
    code = textwrap.dedent(_AT_EXIT).format(folder=str(Path(__file__).parent))
    ran = python(
        code
        + textwrap.dedent("""
            import gc
            child = os.fork()
            if child == 0:
                parts.clear()
                gc.collect()
                sys.exit(0)
            assert os.waitpid(child, 0)[1] == 0
        """)
    )
    assert ran.stderr == ""
    assert ran.stdout.split() == _ONE_OF_EACH
