"""The library table, the search, and its errors: found or not, nothing here depends on which."""

from __future__ import annotations

import ctypes
import ctypes.util
import re
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest
from cuda import pathfinder

from slidesparse_rt.errors import BackendUnavailable, OptionError
from slidesparse_rt.ffi import libraries
from slidesparse_rt.ffi.libraries import (
    LIBRARIES,
    Loaded,
    Missing,
    examine,
    find,
    library,
    load,
    version_text,
)

NAMES = [row.name for row in LIBRARIES]


@dataclass
class Place:
    """What a search returns."""

    abs_path: str | None
    found_via: str = "site-packages"


def put(pointer, value):
    """Store into what ctypes.byref made of a C variable."""
    pointer._obj.value = value


class FakeLibrary:
    """A loaded library that states a version, by all four functions that can be asked."""

    def __init__(self, version, status=0):
        self.version = version
        self.status = status
        self.cublasLtGetVersion = lambda: version[0] * 10000 + version[1] * 100 + version[2]

    def cusparseLtGetProperty(self, which, value):  # noqa: N802
        put(value, self.version[which])
        return self.status

    def nvrtcVersion(self, major, minor):  # noqa: N802
        put(major, self.version[0])
        put(minor, self.version[1])
        return self.status

    def cuDriverGetVersion(self, number):  # noqa: N802
        put(number, self.version[0] * 1000 + self.version[1] * 10)
        return self.status


def searching(place=None, error=None):
    """A search that finds ``place``, or fails."""

    def search(name):
        if error is not None:
            raise error
        return place

    return search


def nowhere(soname):
    """A system loader that has no such file, in glibc's words."""
    raise OSError(f"{soname}: cannot open shared object file: No such file or directory")


NOT_FOUND = pathfinder.DynamicLibNotFoundError("Failure finding it:\n  No such file")


def missing(name, **parts):
    """Examine with a search that must fail."""
    found = examine(library(name), **parts)
    assert isinstance(found, Missing)
    return found


@pytest.fixture
def fresh():
    """The memory of find() is the process's; tests that fill it empty it again."""
    find.cache_clear()
    yield
    find.cache_clear()


# ------------------------------------------------------------------------------------- the table


def test_names_are_unique_and_cuda_pathfinder_knows_them():
    assert len(set(NAMES)) == len(NAMES) == 4
    for name in NAMES:
        try:
            pathfinder.load_nvidia_dynamic_lib(name)
        except pathfinder.DynamicLibNotFoundError as error:
            # Its subclasses say that the name is unknown, or unknown on this platform.
            assert type(error) is pathfinder.DynamicLibNotFoundError


def test_the_extras_bring_every_wheel_of_the_table():
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    for major in (12, 13):
        extra = re.search(rf"^cu{major} = \[(.*?)^\]", text, re.DOTALL | re.MULTILINE)
        brought = set(re.findall(r'"([a-z0-9-]+)[^"]*"', extra[1]))
        wanted = {row.wheels[major] for row in LIBRARIES if row.wheels}
        assert len(wanted) == 3
        assert wanted <= brought


@pytest.mark.parametrize("row", LIBRARIES, ids=NAMES)
def test_every_row_says_what_and_why(row):
    assert row.purpose
    assert row.why_minimum
    assert row.minimum > (0,)
    assert row.sonames
    assert bool(row.wheels) == bool(row.folders)


def test_unknown_name():
    for ask in (library, find, load):
        with pytest.raises(OptionError, match="'cudart' is no library that slidesparse_rt uses"):
            ask("cudart")


def test_mend_names_one_package_or_all():
    row = library("cusparseLt")
    assert row.mend(12) == "pip install nvidia-cusparselt-cu12"
    assert row.mend(13, flag="--upgrade") == "pip install --upgrade nvidia-cusparselt-cu13"
    for unknown in (None, 11, 14):
        assert row.mend(unknown) == (
            "pip install nvidia-cusparselt-cu12 (CUDA 12) or "
            "pip install nvidia-cusparselt-cu13 (CUDA 13)"
        )
    assert "pip install" not in library("cuda").mend(12)
    assert "driver" in library("cuda").mend()


# ----------------------------------------------------------------------------------------- found


@pytest.mark.parametrize(
    ("name", "version", "seen"),
    [
        ("cusparseLt", (0, 8, 1), (0, 8, 1)),
        ("cusparseLt", (0, 7, 0), (0, 7, 0)),
        ("cusparseLt", (0, 10, 0), (0, 10, 0)),
        ("cublasLt", (12, 9, 3), (12, 9, 3)),
        ("cublasLt", (13, 10, 0), (13, 10, 0)),
        ("nvrtc", (12, 0, 0), (12, 0)),
        ("nvrtc", (13, 5, 37), (13, 5)),
        ("cuda", (12, 8, 0), (12, 8)),
        ("cuda", (13, 0, 0), (13, 0)),
    ],
)
def test_found(name, version, seen):
    handle = FakeLibrary(version)
    opened = []

    def open_file(path):
        opened.append(path)
        return handle

    found = examine(
        library(name), search=searching(Place("/lib/x.so", "conda")), open_file=open_file
    )
    assert found == Loaded(library(name), handle, "/lib/x.so", "conda", seen)
    assert opened == ["/lib/x.so"]


def test_cublaslt_version_is_read_as_size_t():
    handle = FakeLibrary((12, 9, 3))
    examine(library("cublasLt"), search=searching(Place("/x")), open_file=lambda path: handle)
    assert handle.cublasLtGetVersion.restype is ctypes.c_size_t


def test_version_text():
    assert version_text((0, 10, 0)) == "0.10.0"


# --------------------------------------------------------------------------------------- missing


@pytest.mark.parametrize("name", NAMES)
def test_not_found(name):
    row = library(name)
    found = missing(name, search=searching(error=NOT_FOUND), open_file=nowhere)
    assert found.trouble == "not found"
    assert found.path is None
    assert found.headline == f"{row.title} was not found; it is needed for {row.purpose}"
    assert found.detail == "Failure finding it: No such file"
    assert found.looked
    for place in found.looked:
        assert f"    - {place}" in found.message
    assert f"cuda.pathfinder said: {found.detail}" in found.message
    assert f"to mend it: {row.mend()}" in found.message
    assert ("slidesparse-rt[cu12]" in found.message) == bool(row.wheels)


def test_not_found_lists_every_folder_in_site_packages(monkeypatch):
    monkeypatch.setattr(libraries.site, "getsitepackages", lambda: ["/a", "/b"])
    monkeypatch.setattr(libraries.site, "ENABLE_USER_SITE", True)
    monkeypatch.setattr(libraries.site, "getusersitepackages", lambda: "/home/u")
    found = missing("nvrtc", search=searching(error=NOT_FOUND), open_file=nowhere)
    expected = [
        f"{root}/{folder}" for root in ("/a", "/b", "/home/u") for folder in found.library.folders
    ]
    assert list(found.looked[:6]) == expected
    assert any("conda" in place for place in found.looked)
    assert any("ldconfig" in place for place in found.looked)
    assert any("CUDA_PATH" in place for place in found.looked)
    monkeypatch.setattr(libraries.site, "ENABLE_USER_SITE", False)
    found = missing("nvrtc", search=searching(error=NOT_FOUND), open_file=nowhere)
    assert not any("/home/u" in place for place in found.looked)


def test_not_found_although_the_loader_would_open_it():
    found = missing(
        "nvrtc", search=searching(error=NOT_FOUND), open_file=lambda name: FakeLibrary((12, 0, 0))
    )
    assert found.trouble == "not found"


def test_found_by_the_loader_but_a_dependency_is_missing():
    asked = []

    def refusing(soname):
        asked.append(soname)
        if soname == "libnvrtc.so.13":
            nowhere(soname)
        raise OSError("libdep.so.1: cannot open shared object file: No such file or directory")

    found = missing("nvrtc", search=searching(error=NOT_FOUND), open_file=refusing)
    assert asked == ["libnvrtc.so.13", "libnvrtc.so.12"]
    assert found.trouble == "cannot be loaded"
    assert "was found, but cannot be loaded: libdep.so.1" in found.headline
    assert "pip install --force-reinstall nvidia-cuda-nvrtc-cu12" in found.message
    assert "cuda.pathfinder said" not in found.message


def test_found_but_cuda_pathfinder_cannot_open_it():
    found = missing("nvrtc", search=searching(error=RuntimeError("Failed to dlopen /x: bad ELF")))
    assert found.trouble == "cannot be loaded"
    assert found.detail == "Failed to dlopen /x: bad ELF"
    assert "  - the system's loader" in found.message


def test_a_file_that_is_no_library(tmp_path):
    """The real loader, on a real file."""
    path = tmp_path / "libcusparseLt.so.0"
    path.write_bytes(b"not ELF at all")
    found = missing("cusparseLt", search=searching(Place(str(path))))
    assert found.trouble == "cannot be loaded"
    assert found.path == str(path)
    assert f"cuSPARSELt was found at {path}, but cannot be loaded: " in found.message
    assert str(path) in found.detail


@pytest.mark.parametrize("name", NAMES)
def test_another_library_under_that_name(name):
    """The real loader, on a real library that is something else."""
    path = ctypes.util.find_library("c") or "libc.so.6"
    found = missing(name, search=searching(Place(path)))
    assert found.trouble == "cannot be loaded"
    assert f"it is no {library(name).title}" in found.headline


@pytest.mark.parametrize(
    ("name", "function"),
    [
        ("cusparseLt", "cusparseLtGetProperty"),
        ("nvrtc", "nvrtcVersion"),
        ("cuda", "cuDriverGetVersion"),
    ],
)
def test_a_library_that_refuses_to_say_its_version(name, function):
    handle = FakeLibrary((12, 0, 0), status=7)
    found = missing(name, search=searching(Place("/x")), open_file=lambda path: handle)
    assert found.trouble == "cannot be loaded"
    assert found.detail == f"{function} returned status 7 instead of 0"


def test_a_search_without_a_path():
    found = missing("nvrtc", search=searching(Place(None)))
    assert found.trouble == "cannot be loaded"
    assert "did not say where" in found.detail


@pytest.mark.parametrize(
    ("name", "version", "seen", "least"),
    [
        ("cusparseLt", (0, 6, 3), "0.6.3", "0.7"),
        ("cublasLt", (11, 9, 9), "11.9.9", "12.0"),
        ("nvrtc", (11, 8, 0), "11.8", "12.0"),
        ("cuda", (11, 8, 0), "11.8", "12.0"),
    ],
)
def test_too_old(name, version, seen, least):
    found = missing(
        name, search=searching(Place("/old.so")), open_file=lambda path: FakeLibrary(version)
    )
    assert found.trouble == "too old"
    assert version_text(found.version) == seen
    assert found.path == "/old.so"
    assert f"at /old.so is too old: version {seen}, needed is {least} or newer" in found.message
    assert found.library.why_minimum in found.message
    if found.library.wheels:
        assert found.remedy(12) == f"pip install --upgrade {found.library.wheels[12]}"


def test_cuda_pathfinder_does_not_know_it():
    error = pathfinder.DynamicLibUnknownError("Unknown library name: 'cusparseLt'")
    found = missing("cusparseLt", search=searching(error=error))
    assert found.looked == ()
    assert found.remedy(12) == "pip install --upgrade 'cuda-pathfinder>=1.4.4'"
    assert "to mend it: pip install --upgrade 'cuda-pathfinder" in found.message
    assert "  looked for" not in found.message
    assert "slidesparse-rt[cu12]" not in found.message


def test_cuda_pathfinder_is_missing():
    found = missing("nvrtc", search=searching(error=ImportError("No module named 'cuda'")))
    assert "No module named 'cuda'" in found.headline
    assert "cuda-pathfinder" in found.remedy()


def test_not_for_this_platform():
    error = pathfinder.DynamicLibNotAvailableError("known but not available on Windows")
    found = missing("cusparseLt", search=searching(error=error))
    assert "does not exist for this platform" in found.headline
    assert "backend='reference'" in found.remedy()


def test_the_three_troubles_read_differently():
    absent = missing("cusparseLt", search=searching(error=NOT_FOUND), open_file=nowhere)
    broken = missing("cusparseLt", search=searching(error=RuntimeError("Failed to dlopen")))
    old = missing(
        "cusparseLt",
        search=searching(Place("/x")),
        open_file=lambda path: FakeLibrary((0, 6, 0)),
    )
    headlines = {found.headline for found in (absent, broken, old)}
    assert len(headlines) == len({found.remedy(12) for found in (absent, broken, old)}) == 3


# ---------------------------------------------------------------------- load and find, as shipped


@pytest.mark.usefixtures("fresh")
def test_load_raises_the_whole_message(monkeypatch):
    def search(name):
        raise pathfinder.DynamicLibNotFoundError("nothing here")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", search)
    monkeypatch.setattr(libraries, "_open", nowhere)
    with pytest.raises(BackendUnavailable) as caught:
        load("cusparseLt")
    found = find("cusparseLt")
    assert isinstance(found, Missing)
    assert str(caught.value) == found.message


@pytest.mark.usefixtures("fresh")
def test_load_returns_what_find_found(monkeypatch):
    asked = []

    def search(name):
        asked.append(name)
        return Place("/lib/libnvrtc.so.12", "CUDA_PATH")

    monkeypatch.setattr(pathfinder, "load_nvidia_dynamic_lib", search)
    monkeypatch.setattr(libraries, "_open", lambda path: FakeLibrary((12, 9, 0)))
    with ThreadPoolExecutor(8) as pool:
        loaded = list(pool.map(lambda _: load("nvrtc"), range(64)))
    assert {(entry.path, entry.found_via, entry.version) for entry in loaded} == {
        ("/lib/libnvrtc.so.12", "CUDA_PATH", (12, 9))
    }
    assert load("nvrtc") is find("nvrtc")
    before = len(asked)
    load("nvrtc")
    assert len(asked) == before


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", NAMES)
def test_this_machine_answers_either_way(name):
    """On the machine at hand: a usable library, or a message that says what to do."""
    found = find(name)
    if isinstance(found, Loaded):
        assert Path(found.path).is_file()
        assert found.version >= found.library.minimum
        assert found.found_via
        assert load(name) is found
    else:
        assert "to mend it: " in found.message
        with pytest.raises(BackendUnavailable):
            load(name)
