"""slidesparse_rt.jax: eagerly and under jax.jit, by both routes; what is refused."""

from __future__ import annotations

import gc
import json
import threading
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from plans import fitted

import slidesparse_rt as ss
import slidesparse_rt.jax
from slidesparse_rt.integrations import jax as integration
from slidesparse_rt.integrations import jax_ffi
from slidesparse_rt.jax import sparse_matmul

N, K = 12, 40
ROUTES = ("ffi", "callback")
KINDS = ("float32", "float16", "bfloat16")


@pytest.fixture
def plan() -> Any:
    bias = np.linspace(-1, 1, N, dtype=np.float32)
    with ss.SparseGemmPlan(fitted("6:8", N, K), "6:8", bias=bias) as made:
        yield made


def tokens(*shape: int, kind: str = "float32", seed: int = 0) -> Any:
    values = np.random.default_rng(seed).standard_normal((*shape, K), dtype=np.float32)
    return jnp.asarray(values).astype(kind)


def expected(plan: Any, x: Any) -> Any:
    return plan.run(np.asarray(x))


def same(found: Any, wanted: Any) -> bool:
    assert isinstance(found, jax.Array)
    found = np.asarray(found)
    return (
        found.dtype == wanted.dtype
        and found.shape == wanted.shape
        and found.tobytes() == wanted.tobytes()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_eagerly(plan: Any, kind: str) -> None:
    x = tokens(2, 3, kind=kind)
    assert same(sparse_matmul(x, plan), expected(plan, x))
    weight = fitted("4:6", N, K)
    found = sparse_matmul(x, jnp.asarray(weight), "4:6", dtype="fp8_e4m3")
    assert same(found, ss.sparse_matmul(np.asarray(x), weight, "4:6", dtype="fp8_e4m3"))


@pytest.mark.parametrize("route", ["auto", *ROUTES])
@pytest.mark.parametrize("kind", KINDS)
def test_under_jit(plan: Any, kind: str, route: str) -> None:
    product = jax.jit(lambda x: sparse_matmul(x, plan, route=route))
    for shape in ((3,), (2, 3), (), (1, 0)):
        x = tokens(*shape, kind=kind)
        assert same(product(x), expected(plan, x))


def test_auto_is_the_foreign_function_interface_here(plan: Any) -> None:
    text = jax.jit(lambda x: sparse_matmul(x, plan)).lower(tokens(3)).as_text()
    assert f"@{jax_ffi.TARGET}" in text
    text = jax.jit(lambda x: sparse_matmul(x, plan, route="callback")).lower(tokens(3)).as_text()
    assert jax_ffi.TARGET not in text
    assert "callback" in text


@pytest.mark.parametrize("route", ROUTES)
def test_within_a_larger_program(plan: Any, route: str) -> None:
    """With work around it, in a loop, and with an input that is a transposed view in XLA."""

    @jax.jit
    def program(x: Any) -> Any:
        def step(total: Any, x: Any) -> Any:
            y = sparse_matmul((2 * x).T, plan, route=route)
            return total + y, y.sum()

        return jax.lax.scan(step, jnp.zeros((3, N)), x)

    x = jnp.moveaxis(tokens(4, 3), -1, 1)
    total, _ = program(x)
    wanted = np.zeros((3, N), np.float32)
    for part in np.asarray(x):
        wanted = wanted + plan.run(2 * part.T)
    assert same(total, wanted)


@pytest.mark.parametrize("route", ROUTES)
def test_results_of_another_type(route: str) -> None:
    with ss.SparseGemmPlan(fitted("6:8", N, K), "6:8", out_dtype="bfloat16") as plan:
        x = tokens(3)
        found = jax.jit(lambda x: sparse_matmul(x, plan, route=route))(x)
        assert found.dtype == jnp.bfloat16
        assert same(found, expected(plan, x))


@pytest.mark.parametrize("route", ROUTES)
def test_vmap_maps_over_tokens(plan: Any, route: str) -> None:
    x = tokens(4, 3)
    product = jax.vmap(lambda x: sparse_matmul(x, plan, route=route))
    assert same(product(x), expected(plan, x))
    assert same(jax.jit(product)(x), expected(plan, x))
    across = jax.vmap(lambda x: sparse_matmul(x, plan, route=route), in_axes=1, out_axes=1)
    assert same(across(x), expected(plan, x))


@pytest.mark.parametrize("route", ROUTES)
def test_derivatives_are_refused(plan: Any, route: str) -> None:
    def loss(x: Any) -> Any:
        return sparse_matmul(x, plan, route=route).sum()

    for transform in (jax.grad, lambda f: jax.jit(jax.grad(f)), jax.jacfwd):
        with pytest.raises(ss.ArrayError, match=r"derivative.*stop_gradient"):
            transform(loss)(tokens(3))
    stopped = jax.grad(lambda x: loss(jax.lax.stop_gradient(x)) + x.sum())(tokens(3))
    assert same(stopped, np.ones((3, K), np.float32))


def test_a_weight_in_a_traced_function_is_refused(plan: Any) -> None:
    weight = jnp.asarray(fitted("6:8", N, K))
    for traced in (
        jax.jit(lambda x: sparse_matmul(x, weight, "6:8")),
        jax.jit(lambda x: sparse_matmul(x, x, "6:8")),
    ):
        with pytest.raises(ss.ArrayError, match="outside the traced function"):
            traced(tokens(3))
    x = tokens(3)
    with pytest.raises(ss.ArrayError, match="tracer"):
        jax.jit(lambda w: sparse_matmul(x, w, "6:8"))(weight)


def test_arguments_are_checked_when_it_is_traced(plan: Any) -> None:
    with pytest.raises(ss.OptionError, match="'fast' is unknown; allowed are 'auto'"):
        sparse_matmul(tokens(3), plan, route="fast")
    with pytest.raises(ss.OptionError, match="pattern, bias given with a plan"):
        sparse_matmul(tokens(3), plan, "6:8", bias=None)
    with pytest.raises(ss.ShapeError, match=r"x has shape \(3, 8\); allowed is \(..., 40\)"):
        jax.jit(lambda x: sparse_matmul(x, plan))(jnp.ones((3, 8)))
    with pytest.raises(ss.DTypeError, match="int32"):
        jax.jit(lambda x: sparse_matmul(x, plan))(jnp.ones((3, K), jnp.int32))


@pytest.mark.parametrize("route", ROUTES)
def test_errors_while_it_runs_carry_the_message(route: str) -> None:
    plan = ss.SparseGemmPlan(fitted("6:8", N, K), "6:8")
    product = jax.jit(lambda x: sparse_matmul(x, plan, route=route))
    product(tokens(3)).block_until_ready()
    plan.close()
    with pytest.raises(Exception, match="this plan is closed"):
        product(tokens(3)).block_until_ready()


def test_a_compiled_program_does_not_keep_its_plan() -> None:
    plan = ss.SparseGemmPlan(fitted("6:8", N, K), "6:8")
    number = jax_ffi.handle_of(plan)
    assert jax_ffi.handle_of(plan) == number
    program = jax.jit(lambda x, plan=plan: sparse_matmul(x, plan)).lower(tokens(3)).compile()
    program(tokens(3))
    del plan
    jax.clear_caches()
    gc.collect()
    assert number not in jax_ffi._PLANS
    with pytest.raises(Exception, match="plan that this program was compiled with is gone"):
        program(tokens(3)).block_until_ready()


def test_a_plan_on_another_kind_of_device(plan: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    x = tokens(3)
    monkeypatch.setattr(ss.SparseGemmPlan, "device", "cuda:0")
    with pytest.raises(Exception, match=r"runs on cpu, but the plan is on cuda:0.*device='cpu'"):
        jax.jit(lambda x: sparse_matmul(x, plan))(x).block_until_ready()
    with pytest.raises(ss.DeviceError, match="host memory, and the plan is on cuda:0"):
        jax.jit(lambda x: sparse_matmul(x, plan, route="callback"))(x)


def test_many_threads_at_once(plan: Any) -> None:
    product = jax.jit(lambda x: sparse_matmul(x, plan))
    xs = [tokens(5, seed=seed) for seed in range(6)]
    wanted = [expected(plan, x) for x in xs]
    wrong: list[int] = []

    def work(number: int) -> None:
        for _ in range(30):
            if not same(product(xs[number]), wanted[number]):
                wrong.append(number)

    workers = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for one in workers:
        one.start()
    for one in workers:
        one.join()
    assert not wrong


class TestUnknownInterface:
    """A jaxlib whose foreign function interface is none of the known versions."""

    @pytest.fixture(autouse=True)
    def header(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Any) -> Any:
        integration._interface.cache_clear()
        folder = tmp_path / "xla" / "ffi" / "api"
        folder.mkdir(parents=True)
        path = folder / "c_api.h"
        path.write_text("#define XLA_FFI_API_MAJOR 1\n#define XLA_FFI_API_MINOR 0\n")
        monkeypatch.setattr(jax.ffi, "include_dir", lambda: str(tmp_path))
        yield path
        integration._interface.cache_clear()

    def test_auto_takes_the_other_route(self, plan: Any) -> None:
        product = jax.jit(lambda x: sparse_matmul(x, plan))
        assert jax_ffi.TARGET not in product.lower(tokens(3)).as_text()
        assert same(product(tokens(3)), expected(plan, tokens(3)))

    def test_a_route_that_is_named_is_taken_or_refused(self, plan: Any) -> None:
        with pytest.raises(ss.OptionError, match=r"version 1\.0; allowed is 0\.1 or a later 0"):
            jax.jit(lambda x: sparse_matmul(x, plan, route="ffi"))(tokens(3))

    def test_a_plan_on_a_gpu_has_no_other_route(
        self, plan: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(ss.SparseGemmPlan, "device", "cuda:0")
        with pytest.raises(ss.DeviceError, match=r"plan is on cuda:0; jaxlib's.*version 1\.0"):
            jax.jit(lambda x: sparse_matmul(x, plan))(tokens(3))

    def test_a_later_version_is_left_to_xla(self, plan: Any, header: Any) -> None:
        header.write_text("#define XLA_FFI_API_MAJOR 0\n#define XLA_FFI_API_MINOR 99\n")
        product = jax.jit(lambda x: sparse_matmul(x, plan))
        assert jax_ffi.TARGET in product.lower(tokens(3)).as_text()
        assert same(product(tokens(3)), expected(plan, tokens(3)))

    def test_without_a_description(self, plan: Any, header: Any) -> None:
        header.unlink()
        with pytest.raises(ss.OptionError, match="cannot be read"):
            jax.jit(lambda x: sparse_matmul(x, plan, route="ffi"))(tokens(3))


def test_structures_are_laid_out_as_the_header_says(tmp_path: Any) -> None:
    """A C compiler's offsets and sizes against ctypes'."""
    import ctypes
    import shutil
    import subprocess

    compiler = shutil.which("cc") or shutil.which("gcc") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C compiler here")
    fields = {
        "_CallFrame": (
            "XLA_FFI_CallFrame",
            ("extension_start", "api", "ctx", "stage", "args", "rets", "attrs"),
        ),
        "_Buffer": ("XLA_FFI_Buffer", ("extension_start", "dtype", "data", "rank", "dims")),
        "_Buffers": ("XLA_FFI_Args", ("extension_start", "size", "types", "args")),
        "_Attributes": ("XLA_FFI_Attrs", ("extension_start", "size", "types", "names", "attrs")),
        "_Scalar": ("XLA_FFI_Scalar", ("value",)),
        "_Metadata": ("XLA_FFI_Metadata", ("api_version", "traits")),
        "_MetadataExtension": ("XLA_FFI_Metadata_Extension", ("metadata",)),
        "_Version": ("XLA_FFI_Api_Version", ("extension_start", "major_version", "minor_version")),
        "_ErrorCreate": ("XLA_FFI_Error_Create_Args", ("extension_start", "message", "errc")),
        "_ErrorDestroy": ("XLA_FFI_Error_Destroy_Args", ("extension_start", "error")),
        "_StreamGet": ("XLA_FFI_Stream_Get_Args", ("extension_start", "ctx", "stream")),
        "_Api": (
            "XLA_FFI_Api",
            (
                "extension_start",
                "api_version",
                "internal_api",
                "XLA_FFI_Error_Create",
                "XLA_FFI_Error_GetMessage",
                "XLA_FFI_Error_Destroy",
                "XLA_FFI_Handler_Register",
                "XLA_FFI_Stream_Get",
            ),
        ),
    }
    prints = "".join(
        f'  printf("%zu ", offsetof({name}, {field}));\n'
        for name, members in fields.values()
        for field in members
    )
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdint.h>\n#include <stdio.h>\n"
        '#include "xla/ffi/api/c_api.h"\n' + f"int main() {{\n{prints}  return 0;\n}}\n"
    )
    program = tmp_path / "layout"
    subprocess.run(
        [compiler, f"-I{jax.ffi.include_dir()}", str(source), "-o", str(program)], check=True
    )
    found = subprocess.run([str(program)], capture_output=True, text=True, check=True).stdout
    offsets = []
    for name, (_, members) in fields.items():
        kind = getattr(jax_ffi, name)
        own = [field[0] for field in kind._fields_]
        first = 0 if len(own) == len(members) else 1
        if name == "_Scalar":
            first = 1
        assert len(own) - first == len(members), name
        offsets += [getattr(kind, field).offset for field in own[first:]]
    assert offsets == [int(one) for one in found.split()]
    assert ctypes.sizeof(jax_ffi._Extension) == 24


def test_the_public_module_is_not_jax() -> None:
    assert ss.jax is slidesparse_rt.jax
    assert slidesparse_rt.jax is not jax


def test_the_page_quotes_its_result_file() -> None:
    root = Path(__file__).resolve().parents[1]
    page = (root / "docs" / "pytorch.md").read_text(encoding="utf-8")
    result = json.loads((root / "benchmarks" / "results" / "jax-call-cpu.json").read_text())
    cases: dict[tuple[int, int, int], dict[str, Any]] = {}
    for row in result["results"]:
        cases.setdefault((row["tokens"], row["n"], row["k"]), {})[row["version"]] = row
    for (tokens_, n, k), row in cases.items():
        alone = row.pop("plan.run on NumPy")["median_us"]
        above = [
            f"+{row[name]['above_the_plan_us']:,.0f} us"
            for name in ("eager, DLPack", "jit, FFI", "jit, pure_callback")
        ]
        assert f"| {tokens_:,}, {n} x {k} | {alone:,.0f} us | {' | '.join(above)} |" in page
