"""Safetensors files: every type both ways, damaged and hostile ones, and writes that fail."""

from __future__ import annotations

import json
import os
import stat
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from strategies import Array, same_bits

import slidesparse_rt as ss
from slidesparse_rt.packing import TensorFile, write_file

TYPES = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": ml_dtypes.bfloat16,
    "F8_E4M3": ml_dtypes.float8_e4m3fn,
    "F8_E5M2": ml_dtypes.float8_e5m2,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U64": np.uint64,
    "U32": np.uint32,
    "U16": np.uint16,
    "U8": np.uint8,
    "BOOL": np.bool_,
    "C64": np.complex64,
}


def raw_file(path: Path, header: dict[str, Any] | bytes, data: bytes = b"") -> Path:
    """A safetensors file put together by hand."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def entry(dtype: str, shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "a.safetensors"


@pytest.mark.parametrize("name", TYPES)
@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 3, 4), (0,), (4, 0)])
def test_every_type_round_trips(name: str, shape: tuple[int, ...], target: Path) -> None:
    values = np.arange(int(np.prod(shape))).reshape(shape).astype(TYPES[name])
    write_file(target, {"t": values}, {"k": "v"})
    with TensorFile(target) as file:
        assert file.keys() == ["t"]
        assert file.metadata == {"k": "v"}
        assert file.shape("t") == shape
        assert file.dtype_name("t") == name
        assert file.nbytes("t") == values.nbytes
        read = file.read("t")
    assert same_bits(read, values)  # still there after the file is closed
    if values.size:
        assert not read.flags.writeable


def test_other_tools_read_the_file(target: Path) -> None:
    import safetensors.torch

    values = {"b": np.float32([[1, 2]]), "a": np.int8([3])}
    write_file(target, values, {})
    found = safetensors.numpy.load_file(target)
    assert {name: array.tolist() for name, array in found.items()} == {"a": [3], "b": [[1, 2]]}
    write_file(target, {"w": np.ones((2, 2), ml_dtypes.float8_e4m3fn)}, {})
    import torch

    assert safetensors.torch.load_file(target)["w"].dtype == torch.float8_e4m3fn


def test_tensors_are_listed_in_the_order_of_their_data(target: Path) -> None:
    header = {"z": entry("U8", [1], 0, 1), "a": entry("U8", [2], 1, 3), "e": entry("U8", [0], 3, 3)}
    raw_file(target, header, b"\1\2\3")
    with TensorFile(target) as file:
        assert file.keys() == ["z", "a", "e"]
        assert file.metadata == {}
        assert file.read("a").tolist() == [2, 3]


def test_data_may_start_at_any_byte(target: Path) -> None:
    for padding in range(5):
        text = json.dumps({"t": entry("F32", [2], 0, 8)}).encode() + b" " * padding
        raw_file(target, text, np.float32([1.5, -2]).tobytes())
        with TensorFile(target) as file:
            found = file.read("t")
        assert found.tolist() == [1.5, -2]
        assert ss.prune(found.reshape(1, 2), "2:4").tolist() == [[1.5, -2]]


def test_strided_arrays_are_written_in_order(target: Path) -> None:
    values = np.arange(24, dtype=np.float32).reshape(4, 6)
    write_file(target, {"t": values[::2, ::-2], "f": np.asfortranarray(values)}, {})
    with TensorFile(target) as file:
        assert same_bits(file.read("t"), np.ascontiguousarray(values[::2, ::-2]))
        assert same_bits(file.read("f"), values)


def test_an_unknown_tensor_is_named(target: Path) -> None:
    write_file(target, {f"t{i}": np.zeros(1, np.int8) for i in range(11)}, {})
    with (
        TensorFile(target) as file,
        pytest.raises(ss.FormatError, match=r"has no tensor 'x'; it has 't0'.* and 3 more"),
    ):
        file.read("x")
    write_file(target, {"only": np.zeros(1, np.int8)}, {})
    with TensorFile(target) as file, pytest.raises(ss.FormatError, match=r"it has 'only'$"):
        file.shape("x")
    raw_file(target, {})
    with TensorFile(target) as file, pytest.raises(ss.FormatError, match=r"it has none$"):
        file.nbytes("x")


def test_a_closed_file_says_so(target: Path) -> None:
    write_file(target, {"t": np.zeros(1, np.int8)}, {})
    file = TensorFile(target)
    file.close()
    file.close()
    for use in (file.read, file.shape, file.nbytes, file.dtype_name):
        with pytest.raises(ss.FormatError, match="is closed; open it again"):
            use("t")


def test_types_without_a_numpy_type_are_named(target: Path) -> None:
    raw_file(target, {"t": entry("F8_E8M0", [2], 0, 2)}, b"\1\2")
    with TensorFile(target) as file:
        assert file.dtype_name("t") == "F8_E8M0"
        with pytest.raises(
            ss.DTypeError, match=r"'t' in .* has dtype F8_E8M0; readable are F64, F32"
        ):
            file.read("t")


def damaged() -> Iterator[Any]:
    good = json.dumps({"t": entry("F32", [2], 0, 8)}).encode()
    body = b"\0" * 8
    yield "empty", b""
    yield "seven bytes", b"\1" * 7
    yield "text", b"this is no tensor file, but a text of some length"
    yield "zip", b"PK\3\4" + b"\0" * 60
    yield "header of 2**63", struct.pack("<Q", 2**63) + good + body
    yield "header of 2**64-1", struct.pack("<Q", 2**64 - 1) + good + body
    yield "header of 200 MB", struct.pack("<Q", 200_000_000) + good + body
    yield "header past the end", struct.pack("<Q", len(good) + 9) + good + body
    yield "header too short", struct.pack("<Q", len(good) - 1) + good + body
    yield "no header", struct.pack("<Q", 0) + body
    yield "data missing", struct.pack("<Q", len(good)) + good + body[:-1]
    yield "data left over", struct.pack("<Q", len(good)) + good + body + b"\0"

    def made(header: Any, data: bytes = body) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text)) + text + data

    yield "array header", made(b"[1, 2]")
    yield "number header", made(b"17")
    yield "invalid UTF-8", made(good.replace(b"t", b"\xff", 1))
    yield "lone surrogate", made(good.replace(b'"t"', b'"\\ud800"'))
    yield "NaN in the header", made(good.replace(b"[2]", b"[NaN]"))
    yield "overlapping", made({"a": entry("F32", [2], 0, 8), "b": entry("F32", [2], 0, 8)})
    yield "a hole", made({"a": entry("F32", [1], 4, 8)})
    yield "backwards", made({"a": entry("F32", [2], 8, 0)})
    yield "negative", made({"a": entry("F32", [-2], 0, 8)})
    yield "shape and size differ", made({"a": entry("F32", [3], 0, 8)})
    yield "fraction", made({"a": entry("F32", [2.0], 0, 8)})  # type: ignore[list-item]
    yield "shape overflows", made({"a": entry("U8", [2**32, 2**32], 0, 0)}, b"")
    yield "too large for memory", made({"a": entry("U8", [2**62], 0, 2**62)}, b"")
    yield "extent above 2**63", made({"a": entry("U8", [0, 2**64 - 1], 0, 0)}, b"")
    yield "empty but absurd", made({"a": entry("U8", [0, 2**62, 2**62], 0, 0)}, b"")
    yield "a hundred dimensions", made({"a": entry("U8", [1] * 100, 0, 1)}, b"\1")
    yield "unknown type", made({"a": entry("F31", [2], 0, 8)})
    yield "no type", made({"a": {"shape": [2], "data_offsets": [0, 8]}})
    yield "three offsets", made({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}})
    yield "entry is a list", made({"a": [1, 2]})
    yield "metadata is a list", made({"__metadata__": ["a"], "t": entry("F32", [2], 0, 8)})
    yield "metadata is a number", made({"__metadata__": {"a": 3}, "t": entry("F32", [2], 0, 8)})
    yield "metadata twice", made(b'{"__metadata__":{},"__metadata__":{"a":"b"},' + good[1:])
    yield "deep", made(good.replace(b'"dtype"', b'"x":' + b"[" * 9999 + b"]" * 9999 + b',"dtype"'))
    yield "long number", made(good.replace(b'"dtype"', b'"x":' + b"9" * 9999 + b',"dtype"'))


@pytest.mark.parametrize(
    ("name", "content"), [pytest.param(*case, id=case[0]) for case in damaged()]
)
def test_damaged_and_hostile_files_are_format_errors(
    name: str, content: bytes, target: Path
) -> None:
    target.write_bytes(content)
    with pytest.raises(ss.FormatError, match=r"a\.safetensors"), TensorFile(target) as file:
        keys = file.keys()
        for key in keys:
            file.read(key)
    with pytest.raises(ss.FormatError):
        ss.SparseWeight.load(target)


def test_the_same_name_twice_is_refused(target: Path) -> None:
    """What the last one says must not differ from what was checked."""
    small = json.dumps(entry("U8", [1], 0, 1))
    large = json.dumps(entry("U8", [1000], 0, 1000))
    for first, second in ((small, large), (large, small)):
        raw_file(target, f'{{"t": {first}, "t": {second}}}'.encode(), b"\1")
        try:
            file = TensorFile(target)
        except ss.FormatError:
            continue
        assert file.nbytes("t") == 1
        assert file.read("t").tolist() == [1]


def test_names_that_python_and_the_checker_read_differently(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_file(target, {"t": np.zeros(1, np.int8)}, {})
    monkeypatch.setattr(json, "loads", lambda text: {"other": entry("I8", [1], 0, 1)})
    with pytest.raises(ss.FormatError, match="names its tensors ambiguously"):
        TensorFile(target)


def test_files_that_cannot_be_opened_are_os_errors(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nothing"):
        TensorFile(tmp_path / "nothing")
    with pytest.raises(OSError, match=tmp_path.name):
        TensorFile(tmp_path)


# Writing


def files_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def old(target: Path) -> bytes:
    write_file(target, {"old": np.arange(5)}, {"version": "old"})
    return target.read_bytes()


def fail(*args: object, **kwargs: object) -> None:
    raise OSError(28, "No space left on device")


def test_a_failing_write_leaves_the_old_file(
    target: Path, old: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(target, {"new": np.zeros(3)}, {})
    assert target.read_bytes() == old
    assert files_in(target.parent) == [target.name]


def test_a_write_that_fails_halfway_leaves_the_old_file(
    target: Path, old: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def half(tensors: object, path: Path, metadata: object = None) -> None:
        Path(path).write_bytes(b"half")
        raise safetensors.SafetensorError("I/O error: broken pipe")

    monkeypatch.setattr(safetensors.numpy, "save_file", half)
    with pytest.raises(OSError, match=r"a\.safetensors could not be written: I/O error"):
        write_file(target, {"new": np.zeros(3)}, {})
    assert target.read_bytes() == old
    assert files_in(target.parent) == [target.name]


@pytest.mark.parametrize("step", ["fsync", "replace"])
@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_failing_sync_or_rename_leaves_the_old_file(
    step: str, error: BaseException, target: Path, old: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    def raising(*args: object, **kwargs: object) -> None:
        raise error

    monkeypatch.setattr(os, step, raising)
    if step == "replace":
        monkeypatch.setattr(Path, "replace", raising)
    with pytest.raises(type(error)):
        write_file(target, {"new": np.zeros(3)}, {})
    assert target.read_bytes() == old
    assert files_in(target.parent) == [target.name]


def test_a_new_file_that_fails_leaves_nothing(
    target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        write_file(target, {"new": np.zeros(3)}, {})
    assert files_in(target.parent) == []


def test_nothing_is_written_for_a_type_without_a_name(target: Path, old: bytes) -> None:
    for bad in (np.zeros(2, ">f4"), np.zeros(2, np.longdouble), np.array(["a"]), np.array([None])):
        with pytest.raises(ss.DTypeError, match=r"tensor 'b' has dtype .*; writable are float64"):
            write_file(target, {"a": np.zeros(1), "b": bad}, {})
    assert target.read_bytes() == old
    assert files_in(target.parent) == [target.name]


def test_a_folder_that_does_not_exist_is_an_os_error(tmp_path: Path) -> None:
    path = tmp_path / "missing" / "a.safetensors"
    with pytest.raises(OSError, match=r"missing/a\.safetensors"):
        write_file(path, {"a": np.zeros(1)}, {})
    assert not path.parent.exists()


@pytest.mark.parametrize("name", ["/", "."])
def test_a_folder_is_no_file_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(OSError):
        write_file(name, {"a": np.zeros(1)}, {})
    assert files_in(tmp_path) == []


def test_a_symbolic_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "real" / "data")
    for value in (1, 2):
        write_file(link, {"a": np.int8([value])}, {})
        assert link.is_symlink()
        with TensorFile(link) as file:
            assert file.read("a").tolist() == [value]
    assert files_in(tmp_path / "real") == ["data"]
    assert files_in(tmp_path) == ["link", "real"]


@pytest.mark.parametrize("mask", [0o022, 0o027, 0o077])
def test_a_new_file_has_the_permissions_of_any_new_file(mask: int, target: Path) -> None:
    before = os.umask(mask)
    try:
        write_file(target, {"a": np.zeros(1)}, {})
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


def test_a_replaced_file_keeps_its_permissions(target: Path, old: bytes) -> None:
    target.chmod(0o640)
    write_file(target, {"a": np.zeros(1)}, {})
    assert target.read_bytes() != old
    assert stat.S_IMODE(target.stat().st_mode) == 0o640


def test_a_mapped_tensor_survives_the_replacement_of_its_file(target: Path) -> None:
    first = np.arange(1000)
    write_file(target, {"a": first}, {})
    with TensorFile(target) as file:
        mapped: Array = file.read("a")
    write_file(target, {"a": np.zeros(7)}, {})
    assert same_bits(mapped, first)


def test_writers_at_the_same_time_leave_one_whole_file(target: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: write_file(target, {"a": np.full(999, i)}, {}), range(24)))
    assert files_in(target.parent) == [target.name]
    with TensorFile(target) as file:
        assert len(set(file.read("a").tolist())) == 1
