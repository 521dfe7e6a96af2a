"""Every kernel compiles for every architecture, without a GPU; the compiler's caches and errors."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
from fake_cuda import CountingNvrtc
from hopper_cases import DTYPES, OUT_TYPES, shipped, spec_of

from slidesparse_rt.errors import (
    CompileError,
    DTypeError,
    OptionError,
)
from slidesparse_rt.ffi.libraries import load
from slidesparse_rt.kernels import catalog, compiler, weight_launch
from slidesparse_rt.kernels.catalog import ARCHITECTURES, KernelSpec, catalogue
from slidesparse_rt.kernels.compiler import (
    CompiledKernel,
    Compiler,
    Nvrtc,
    Source,
    cache_key,
    compile_cubin,
    read_source,
)
from slidesparse_rt.kernels.hopper_tiles import HopperConfig
from slidesparse_rt.pattern import PATTERNS, Pattern

SIX_OF_EIGHT = Pattern.parse("6:8")
WEIGHT = catalog.weights("check", "int8", SIX_OF_EIGHT)
#: Tests among which the kernels of Hopper are divided, for the sake of processes side by side: a
#: prime, so that each gets some of every size.
HOPPER_PARTS = 13


@pytest.fixture(scope="module")
def nvrtc():
    return Nvrtc(load("nvrtc"))


def examine(library: Nvrtc, specs: list[KernelSpec], architecture: str) -> None:
    kernels = Compiler(library=library)
    for spec in specs:
        compiled = kernels.compile(spec, architecture)
        assert compiled.cubin.startswith(b"\x7fELF"), spec.title
        assert "warning" not in compiled.log, compiled.log
        # "Potential Performance Loss: wgmma.mma_async instructions are serialized": C7508 to C7514.
        assert "C75" not in compiled.log, (spec.title, compiled.log)
        found = compiled.entries[spec.entry]
        # A report that was not understood would show as no registers.
        assert 8 <= found.registers <= 65536 // spec.max_threads, (spec.title, found)
        if spec.hot:
            assert (found.spill_stores, found.spill_loads, found.stack) == (0, 0, 0), (
                f"{spec.title} for {architecture}: {found}"
            )


@pytest.mark.parametrize("part", range(3))
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_kernel_compiles_for_every_architecture(nvrtc, architecture, part):
    examine(nvrtc, [spec for spec in catalogue() if not spec.exact][part::3], architecture)


@pytest.mark.parametrize("part", range(HOPPER_PARTS))
def test_every_kernel_of_one_architecture_compiles_for_it(nvrtc, part):
    """About a second each."""
    examine(nvrtc, [spec for spec in catalogue() if spec.exact][part::HOPPER_PARTS], "sm_90a")


@pytest.mark.parametrize("width", [128, 208])
def test_warpgroups_that_trade_registers_start_with_an_even_share(nvrtc, width):
    """168 for each of 384 threads are what 24 and twice 240 for 128 come to: fewer would hang."""
    config = HopperConfig(width, 2)
    spec = catalog.hopper_gemm("int8", "bfloat16", **config.settings)
    assert Compiler(library=nvrtc).compile(spec, "sm_90a").entries[spec.entry].registers == 168


@pytest.mark.parametrize("config", [HopperConfig(128, 2), HopperConfig(64, 1, 4, True, split=True)])
def test_what_racecheck_is_shown_compiles(nvrtc, config):
    spec = catalog.hopper_gemm("int8", "bfloat16", **config.settings, each_lane=True)
    examine(nvrtc, [spec], "sm_90a")


@pytest.mark.parametrize("part", range(4))
def test_every_pattern_compiles(nvrtc, part):
    examine(nvrtc, list(catalogue(all_patterns=True))[part::4], "sm_90a")


def test_the_catalogue_names_everything():
    specs = list(catalogue())
    assert len(specs) == len(set(specs))
    entries = {spec.entry for spec in specs}
    assert entries == {
        *("quantize_lift", "dequantize", "hopper_gemm", "hopper_pack", "evict"),
        *weight_launch.WEIGHT_ARGUMENTS,
    }
    assert {spec.entry for spec in specs if spec.exact} == {"hopper_gemm"}
    assert any(spec.hot for spec in specs)
    assert not all(spec.hot for spec in specs)
    groups = {dict(spec.defines)["GROUP"] for spec in catalogue(all_patterns=True)}
    assert groups == {pattern.group for pattern in PATTERNS}


def test_the_catalogue_has_every_kernel_that_a_plan_on_hopper_can_ask_for():
    wanted = {
        spec_of(config, dtype, out_type)
        for config in shipped()
        for dtype in DTYPES
        for out_type in OUT_TYPES
    }
    assert {spec for spec in catalogue() if spec.entry == "hopper_gemm"} == wanted


def test_a_spill_is_seen(nvrtc, tmp_path):
    """The report of registers and spills is read from the compiler, so it must be able to fail."""
    tmp_path.joinpath("spill.cu").write_text(
        """
        extern "C" __global__ void __launch_bounds__(1024) spill(float* x, int n) {
          float v[128];
          #pragma unroll
          for (int i = 0; i < 128; ++i) v[i] = x[i * 1024 + threadIdx.x];
          for (int round = 0; round < n; ++round) {
            #pragma unroll
            for (int i = 0; i < 128; ++i) v[i] = v[i] * v[(i * 37 + 11) % 128] + v[(i + 1) % 128];
          }
          #pragma unroll
          for (int i = 0; i < 128; ++i) x[i * 1024 + threadIdx.x] = v[i];
        }
        """
    )
    spec = KernelSpec("spill.cu", "spill", (), hot=True, max_threads=1024)
    compiled = compile_cubin(spec, "sm_90a", library=nvrtc, folder=tmp_path)
    found = compiled.entries["spill"]
    assert found.spill_stores > 0
    assert found.spill_loads > 0
    assert found.registers == 64


def test_a_broken_source_is_a_compile_error_with_the_log(nvrtc, tmp_path):
    tmp_path.joinpath("broken.cu").write_text("this is no C++;\n")
    spec = KernelSpec("broken.cu", "none", (("SIZE", 3),), hot=False, max_threads=32)
    with pytest.raises(CompileError, match=r"cannot compile none\(size=3\) for sm_90") as caught:
        compile_cubin(spec, "sm_90", library=nvrtc, folder=tmp_path)
    assert "broken.cu(1): error" in caught.value.log
    assert caught.value.log in str(caught.value)
    assert "-DSS_SIZE=3" in caught.value.options
    assert "--gpu-architecture=sm_90" in caught.value.options


def test_an_unknown_architecture_is_a_compile_error(nvrtc):
    with pytest.raises(CompileError, match="for sm_12345: NVRTC_ERROR_INVALID_OPTION"):
        compile_cubin(WEIGHT, "sm_12345", library=nvrtc)


def test_a_source_without_kernels_is_a_compile_error(nvrtc, tmp_path):
    tmp_path.joinpath("empty.cu").write_text("\n")
    spec = KernelSpec("empty.cu", "none", (), hot=False, max_threads=32)
    with pytest.raises(CompileError, match="names no kernel"):
        compile_cubin(spec, "sm_90", library=nvrtc, folder=tmp_path)


def test_missing_sources_and_headers_are_named(nvrtc, tmp_path, monkeypatch):
    with pytest.raises(CompileError, match=r"gone\.cu cannot be read from .*: No such file"):
        read_source("gone.cu", tmp_path)
    tmp_path.joinpath("a.cu").write_text('#include "b.cuh"\n')
    with pytest.raises(CompileError, match=r"b\.cuh, which a\.cu includes, cannot be read"):
        read_source("a.cu", tmp_path)
    module = tmp_path / "package" / "kernels" / "compiler.py"
    monkeypatch.setattr(compiler, "__file__", str(module))
    monkeypatch.setattr(compiler.resources, "files", lambda name: tmp_path)
    with pytest.raises(CompileError, match="the CUDA sources are missing: neither"):
        compiler.source_folder()
    tmp_path.joinpath("kernels_cu").mkdir()
    assert compiler.source_folder() == tmp_path / "kernels_cu"


def test_sources_are_read_with_all_their_headers():
    source = read_source("quantize_lift.cu")
    assert set(source.headers) == {"numbers.cuh", "windows.cuh", "primitives.cuh"}
    assert set(read_source("dequantize.cu").headers) == {"numbers.cuh", "primitives.cuh"}


def test_every_argument_changes_the_key():
    source = Source("a.cu", "text", {"a.cuh": "one", "b.cuh": "two"})
    options, architecture, version = ("-DX=1", "-DY=2"), "sm_90", (13, 0)
    first = cache_key(source, options, architecture, version)
    assert first == cache_key(
        Source("a.cu", "text", {"b.cuh": "two", "a.cuh": "one"}), options, architecture, version
    )
    keys = [
        first,
        cache_key(replace(source, name="b.cu"), options, architecture, version),
        cache_key(replace(source, text="text "), options, architecture, version),
        cache_key(replace(source, headers={}), options, architecture, version),
        cache_key(
            replace(source, headers={"a.cuh": "one", "b.cuh": "2"}), options, architecture, version
        ),
        cache_key(
            replace(source, headers={"a.cuh": "one", "c.cuh": "two"}),
            options,
            architecture,
            version,
        ),
        # The same characters, divided otherwise.
        cache_key(
            replace(source, headers={"a.cuh": "oneb.cuhtwo"}), options, architecture, version
        ),
        cache_key(source, ("-DX=1",), architecture, version),
        cache_key(source, ("-DX=1", "-DY=3"), architecture, version),
        cache_key(source, ("-DY=2", "-DX=1"), architecture, version),
        cache_key(source, ("-DX=1-DY=2",), architecture, version),
        cache_key(source, options, "sm_90a", version),
        cache_key(source, options, architecture, (13, 1)),
    ]
    assert len(set(keys)) == len(keys)
    assert all(len(key) == 64 for key in keys)


def test_every_setting_of_every_kernel_reaches_the_compiler():
    for spec in catalogue():
        sources = read_source(spec.source)
        text = sources.text + "".join(sources.headers.values())
        for name, value in spec.defines:
            assert f"SS_{name}" in text, spec.title
            assert f"-DSS_{name}={value}" in spec.options


def test_a_kernel_is_compiled_once_per_process_and_once_per_directory(tmp_path):
    library = CountingNvrtc()
    directory = tmp_path / "deep" / "cache"
    kernels = Compiler(directory, library=library)
    first = kernels.compile(WEIGHT, "sm_90")
    assert kernels.compile(WEIGHT, "sm_90") is first
    assert library.compiled == 1
    (kept,) = directory.iterdir()
    assert kept.name == f"{first.key}.cubin"
    assert Compiler(directory, library=library).compile(WEIGHT, "sm_90") == first
    assert library.compiled == 1
    assert Compiler(directory, library=library).compile(WEIGHT, "sm_80").key != first.key
    assert library.compiled == 2
    assert len(list(directory.iterdir())) == 2


def test_kernels_are_compiled_side_by_side_and_each_once(tmp_path, monkeypatch):
    monkeypatch.setattr(compiler, "_threads", lambda: 4)
    library = CountingNvrtc()
    kernels = Compiler(tmp_path, library=library)
    refused = replace(WEIGHT, defines=(("TYPE", 99),))
    wanted = [(WEIGHT, "sm_90"), (WEIGHT, "sm_80"), (refused, "sm_90"), (WEIGHT, "sm_89")]
    # However often one is asked for, by whichever threads.
    with ThreadPoolExecutor(3) as threads:
        list(threads.map(kernels.compile_ahead, [wanted * 2, wanted[::-1], wanted[:1]]))
    assert len(list(tmp_path.iterdir())) == 3
    done = [kernels.compile(spec, architecture) for spec, architecture in wanted if spec is WEIGHT]
    assert len({compiled.key for compiled in done}) == 3
    assert [compiled.cubin for compiled in done] == [
        compiler.compile_cubin(WEIGHT, architecture, library=library).cubin
        for architecture in ("sm_90", "sm_80", "sm_89")
    ]
    # What NVRTC refuses it is asked for again, and says why to who needs it.
    with pytest.raises(CompileError):
        kernels.compile(refused, "sm_90")


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:100],
        lambda data: b"",
        lambda data: b"[]\n" + data,
        lambda data: data.replace(b"registers", b"registerz"),
        lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    ],
)
def test_a_damaged_file_is_compiled_again(tmp_path, damage):
    library = CountingNvrtc()
    first = Compiler(tmp_path, library=library).compile(WEIGHT, "sm_90")
    (kept,) = tmp_path.iterdir()
    whole = kept.read_bytes()
    kept.write_bytes(damage(whole))
    again = Compiler(tmp_path, library=library).compile(WEIGHT, "sm_90")
    assert (again.key, again.cubin, again.entries) == (first.key, first.cubin, first.entries)
    assert library.compiled == 2
    # The log has the time that compiling took, and nothing else that changes.
    assert kept.read_bytes().split(b"\n", 1)[1] == whole.split(b"\n", 1)[1]


def test_a_directory_that_cannot_be_written_is_no_directory(nvrtc, tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    kernels = Compiler(blocked / "below", library=nvrtc)
    assert kernels.compile(WEIGHT, "sm_90").cubin

    def full(self, target):
        raise OSError("disk full")

    monkeypatch.setattr(compiler.Path, "replace", full)
    Compiler(tmp_path / "full", library=nvrtc).compile(WEIGHT, "sm_90")
    assert list((tmp_path / "full").iterdir()) == []


def test_threads_share_one_compilation(tmp_path):
    library = CountingNvrtc()
    kernels = Compiler(tmp_path, library=library)
    found = []
    threads = [
        threading.Thread(target=lambda: found.append(kernels.compile(WEIGHT, "sm_90")))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert library.compiled == 1
    assert len({id(one) for one in found}) == 1


def test_the_default_directory_needs_a_home(monkeypatch, tmp_path):
    monkeypatch.setattr(compiler.Path, "home", lambda: tmp_path)
    assert compiler.default_directory() == tmp_path / ".cache" / "slidesparse_rt" / "kernels"

    def homeless():
        raise RuntimeError("no home")

    monkeypatch.setattr(compiler.Path, "home", homeless)
    assert compiler.default_directory() is None


def test_the_architecture_follows_the_gpu(nvrtc, monkeypatch):
    kernels = Compiler(library=nvrtc)
    assert kernels.architecture((9, 0)) == "sm_90"
    assert kernels.architecture((9, 0), exact=True) == "sm_90a"
    monkeypatch.setattr(nvrtc, "architectures", lambda: (80, 86, 90))
    assert kernels.architecture((8, 9)) == "sm_86"
    for capability, exact in (((12, 0), False), ((7, 5), False), ((8, 9), True)):
        with pytest.raises(CompileError, match=r"compiles nothing for a GPU of compute capability"):
            kernels.architecture(capability, exact=exact)


def test_nvrtc_is_found_when_it_is_first_needed():
    assert Compiler().library.version >= (12, 0)


def test_settings_that_do_not_exist_are_refused():
    with pytest.raises(OptionError, match="vectors is 3"):
        catalog.quantize_lift("bfloat16", "int8", SIX_OF_EIGHT, vectors=3)
    with pytest.raises(OptionError, match="threads is 1056; allowed are at most 1024"):
        catalog.quantize_lift("bfloat16", "int8", SIX_OF_EIGHT, threads=1056)
    with pytest.raises(OptionError, match="access is 2; allowed for float32"):
        catalog.quantize_lift("float32", "int8", SIX_OF_EIGHT, access=2)
    with pytest.raises(OptionError, match="bf16 has no scales"):
        catalog.quantize_lift("float32", "bf16", SIX_OF_EIGHT, given_scales=True)
    with pytest.raises(OptionError, match="exclude each other"):
        catalog.quantize_lift("float32", "bf16", SIX_OF_EIGHT, warp_row=True, tiled=True)
    with pytest.raises(DTypeError, match="result of type int8 is unknown"):
        catalog.dequantize("int8", "bfloat16")
    with pytest.raises(OptionError, match="columns=5"):
        catalog.dequantize("int32", "bfloat16", columns=5)
    with pytest.raises(OptionError, match="entry is 'sort'"):
        catalog.weights("sort", "int8", SIX_OF_EIGHT)
    with pytest.raises(DTypeError, match="prune_wanda does not take int8"):
        catalog.weights("prune_wanda", "int8", SIX_OF_EIGHT)
    with pytest.raises(OptionError, match="kernels know no format 'int4'"):
        catalog.format_bytes("int4")


def test_a_log_is_read_entry_by_entry():
    log = (
        "ptxas info    : Compiling entry function 'a' for 'sm_90'\n"
        "ptxas         .     8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads\n"
        "ptxas info    : Used 255 registers, used 1 barriers\n"
        "ptxas info    : Compiling entry function 'b' for 'sm_90'\n"
        "ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads\n"
        "ptxas info    : Used 16 registers\n"
    )
    entries = CompiledKernel.from_log("", b"", log).entries
    assert entries["a"] == compiler.Resources(255, 4, 12, 8)
    assert entries["b"] == compiler.Resources(16, 0, 0, 0)
    with pytest.raises(CompileError, match="names no kernel"):
        CompiledKernel.from_log("", b"", json.dumps(log.replace("Used", "used")))
