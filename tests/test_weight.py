"""SparseWeight: made, saved, loaded, and every way in which a file of one can lie."""

from __future__ import annotations

import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import (
    FLOATS,
    LAYOUTS,
    OPERAND_NAMES,
    Array,
    fit,
    layouts,
    matrices,
    operand_names,
    patterns,
    same_bits,
)
from tolerances import quantization

import slidesparse_rt as ss
from slidesparse_rt.dtypes import OPERANDS, operand
from slidesparse_rt.packing import _rows, check, write_file
from slidesparse_rt.packing.slide import unslide_rows
from slidesparse_rt.packing.weight import FORMAT, FORMAT_VERSION
from slidesparse_rt.pattern import PATTERNS, Pattern


def sample(pattern: str = "6:8", dtype: str = "int8", n: int = 3, k: int = 21) -> ss.SparseWeight:
    rng = np.random.default_rng(0)
    dense = rng.standard_normal((n, k)).astype(np.float32)
    return ss.SparseWeight.from_array(ss.prune(dense, pattern), pattern, dtype=dtype)


def assert_equal(left: ss.SparseWeight, right: ss.SparseWeight) -> None:
    assert left.pattern == right.pattern
    assert left.dtype == right.dtype
    assert same_bits(left.values, right.values)
    if left.scales is None or right.scales is None:
        assert left.scales is right.scales is None
    else:
        assert same_bits(left.scales, right.scales)


@given(st.data(), patterns, operand_names, layouts, st.sampled_from((None, 1, 2)))
def test_from_array_quantizes_a_weight_that_fits(
    data: st.DataObject, pattern: Pattern, dtype: str, layout: str, threads: int | None
) -> None:
    plain = fit(data.draw(matrices(pattern)), pattern)
    weight = LAYOUTS[layout](plain)
    too_large = (
        dtype in ("fp16", "bf16")
        and not np.isfinite(_cast(plain, operand(dtype).dtype).astype(np.float32)).all()
    )
    if too_large:
        with pytest.raises(ss.NonFiniteError, match=f"too large for {dtype}"):
            ss.SparseWeight.from_array(weight, pattern, dtype=dtype, threads=threads)
        return
    made = ss.SparseWeight.from_array(weight, pattern, dtype=dtype, threads=threads)
    assert (made.n, made.k) == made.shape == plain.shape
    assert made.values.dtype == made.dtype.dtype
    assert made.nbytes == plain.size * made.dtype.bits // 8 + (
        4 * plain.shape[0] if made.dtype.scaled else 0
    )
    assert not made.values.flags.writeable
    assert made.scales is None or not made.scales.flags.writeable
    assert same_bits(weight, plain)
    values, scales = ss.quantize(weight, dtype)
    assert same_bits(made.values, values)
    assert (made.scales is None and scales is None) or same_bits(made.scales, scales)
    exact = plain.astype(np.float64)
    back = made.values.astype(np.float64)
    if made.scales is not None:
        back = back * made.scales.astype(np.float64)[:, None]
    assert (np.abs(exact - back) <= quantization(exact, made.scales, dtype)).all()
    slid = made.slide()
    assert slid.dtype == made.dtype.dtype
    assert same_bits(unslide_rows(slid, pattern, made.k), made.values)


def _cast(values: Array, dtype: Any) -> Array:
    with np.errstate(over="ignore"):
        return values.astype(np.float32).astype(dtype)


def test_it_says_what_it_is() -> None:
    assert repr(sample()) == "SparseWeight(3 x 21, 6:8, int8)"
    assert sample() != sample()  # compared by identity: arrays have no single truth
    again = pickle.loads(pickle.dumps(sample()))
    assert_equal(again, sample())


@pytest.mark.parametrize("dtype", OPERAND_NAMES)
def test_dequantize_is_float32(dtype: str) -> None:
    made = sample(dtype=dtype)
    found = made.dequantize()
    assert found.dtype == np.float32
    assert found.flags.writeable
    wide = made.values.astype(np.float32)
    expected = wide if made.scales is None else wide * made.scales[:, None]
    assert same_bits(found, expected)


def test_every_array_kind_is_taken() -> None:
    import jax.numpy as jnp
    import torch

    plain = ss.prune(np.random.default_rng(0).standard_normal((3, 9)).astype(np.float32), "6:8")
    expected = ss.SparseWeight.from_array(plain, "6:8")
    for weight in (torch.from_numpy(plain), torch.nn.Parameter(torch.from_numpy(plain))):
        assert_equal(ss.SparseWeight.from_array(weight, "6:8"), expected)
    assert_equal(ss.SparseWeight.from_array(jnp.asarray(plain), "6:8"), expected)


def test_threads_are_kept_to(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    worker_count = _rows.worker_count
    monkeypatch.setattr(
        _rows, "worker_count", lambda threads: asked.append(threads) or worker_count(threads)
    )
    weight = np.zeros((2, 8), np.float32)
    ss.SparseWeight.from_array(weight, "6:8", threads=1).slide(threads=1)
    assert set(asked) == {1}
    with pytest.raises(ss.OptionError, match="threads is 0"):
        ss.SparseWeight.from_array(weight, "6:8", threads=0)


def test_a_weight_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ss.PatternError, match=r"row 0, group 0 .* has 8 nonzeros, allowed are 6"):
        ss.SparseWeight.from_array(np.ones((2, 8), np.float32), "6:8")


@pytest.mark.parametrize("row", OPERANDS[:2], ids=lambda row: row.name)
def test_rows_too_long_for_exact_sums_are_refused(row: Any) -> None:
    assert (
        ss.SparseWeight.from_array(np.zeros((1, row.max_k), np.float32), "2:4", dtype=row).k
        == row.max_k
    )
    with pytest.raises(ss.ShapeError, match=f"K = {row.max_k + 1}; .* up to K = {row.max_k}"):
        ss.SparseWeight.from_array(np.zeros((1, row.max_k + 1), np.float32), "2:4", dtype=row)


def parts(**changed: Any) -> dict[str, Any]:
    values = np.zeros((2, 8), np.int8)
    values[:, :6] = 5
    made = {
        "values": values,
        "scales": np.ones(2, np.float32),
        "pattern": Pattern.parse("6:8"),
        "dtype": operand("int8"),
    }
    return {**made, **changed}


@pytest.mark.parametrize(
    ("changed", "error", "says"),
    [
        ({"values": np.zeros(8, np.int8)}, ss.ShapeError, r"values has shape \(8,\)"),
        ({"values": np.zeros((0, 8), np.int8)}, ss.ShapeError, "both at least 1"),
        (
            {"values": np.zeros((2, 8), np.int16)},
            ss.DTypeError,
            "values is int16; a int8 weight is",
        ),
        ({"dtype": operand("fp8_e4m3")}, ss.DTypeError, "a fp8_e4m3 weight is float8_e4m3fn"),
        ({"values": np.full((2, 8), -128, np.int8)}, ss.NonFiniteError, "-128; .* -127..127"),
        ({"values": np.ones((2, 8), np.int8)}, ss.PatternError, "has 8 nonzeros"),
        ({"scales": None}, ss.ShapeError, r"int8 weight has scales \(N,\); none are given"),
        ({"scales": np.ones(3, np.float32)}, ss.ShapeError, r"scales is float32 of shape \(3,\)"),
        ({"scales": np.ones(2)}, ss.ShapeError, r"scales is float64 .* float32 of shape \(2,\)"),
        ({"scales": np.float32([1, np.nan])}, ss.NonFiniteError, "scales holds nan at index 1"),
        ({"scales": np.float32([np.inf, 1])}, ss.NonFiniteError, "scales holds inf at index 0"),
        ({"scales": np.float32([1, 0])}, ss.NonFiniteError, "scales holds 0.0 at index 1"),
        ({"scales": np.float32([-1, 1])}, ss.NonFiniteError, "finite and positive"),
        (
            {"values": np.zeros((2, 8), np.float16), "dtype": operand("fp16")},
            ss.ShapeError,
            "fp16 weight has no scales; some are given",
        ),
        (
            {
                "values": np.full((1, 8), np.nan).astype(np.float16),
                "scales": None,
                "dtype": operand("fp16"),
            },
            ss.NonFiniteError,
            "nan at row 0, column 0",
        ),
    ],
)
def test_parts_that_contradict_each_other(
    changed: dict[str, Any], error: type[Exception], says: str
) -> None:
    ss.SparseWeight(**parts())
    with pytest.raises(error, match=says):
        ss.SparseWeight(**parts(**changed))


# Files


@pytest.mark.parametrize("dtype", OPERAND_NAMES)
@pytest.mark.parametrize("pattern", [pattern.name for pattern in PATTERNS])
def test_every_weight_round_trips(pattern: str, dtype: str, tmp_path: Path) -> None:
    made = sample(pattern, dtype)
    path = tmp_path / "w.safetensors"
    made.save(path)
    loaded = ss.SparseWeight.load(path)
    assert_equal(loaded, made)
    assert not loaded.values.flags.writeable
    made.save(str(path))  # replaces it; a loaded weight does not lean on the file
    path.unlink()
    assert_equal(loaded, made)


def test_the_file_describes_itself(tmp_path: Path) -> None:
    from safetensors import safe_open

    sample(dtype="fp8_e4m3").save(tmp_path / "w")
    with safe_open(tmp_path / "w", framework="np") as file:
        assert sorted(file.keys()) == ["scales", "values"]
        metadata = file.metadata()
    assert metadata == {
        "format": "slidesparse_rt.sparse_weight",
        "format_version": "1",
        "pattern": "6:8",
        "dtype": "fp8_e4m3",
        "writer": f"slidesparse_rt {ss.__version__}",
    }


def edited(tmp_path: Path, edit: Callable[[dict[str, Any], dict[str, Array]], None]) -> Path:
    """A saved 6:8 int8 weight with its metadata and tensors changed by ``edit``."""
    made = sample()
    assert made.scales is not None
    metadata: dict[str, Any] = {
        "format": FORMAT,
        "format_version": str(FORMAT_VERSION),
        "pattern": "6:8",
        "dtype": "int8",
    }
    tensors = {"values": made.values.copy(), "scales": made.scales.copy()}
    edit(metadata, tensors)
    write_file(tmp_path / "w", tensors, metadata)
    return tmp_path / "w"


def test_the_unchanged_edit_loads(tmp_path: Path) -> None:
    assert_equal(ss.SparseWeight.load(edited(tmp_path, lambda m, t: None)), sample())


LIES: dict[str, tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str]] = {
    "no format": (lambda m, t: m.pop("format"), "metadata says format=None, expected"),
    "other format": (lambda m, t: m.update(format="pt"), "format='pt'.*SparseWeight.from_array"),
    "no version": (lambda m, t: m.pop("format_version"), "format_version ''; expected a whole"),
    "version 0": (lambda m, t: m.update(format_version="0"), "format_version '0'"),
    "version -1": (lambda m, t: m.update(format_version="-1"), "format_version '-1'"),
    "version 1.5": (lambda m, t: m.update(format_version="1.5"), "format_version '1.5'"),
    "version ²": (lambda m, t: m.update(format_version="²"), "format_version '²'"),
    "version 2": (
        lambda m, t: m.update(format_version="2"),
        "format_version 2, newer than the 1 .* pip install --upgrade",
    ),
    "version 10**5000": (lambda m, t: m.update(format_version="1" + "0" * 5000), "newer than"),
    "no pattern": (lambda m, t: m.pop("pattern"), "not understood: the pattern is empty"),
    "unknown pattern": (lambda m, t: m.update(pattern="2:8"), "not understood: .*type '6:8'"),
    "stricter pattern": (lambda m, t: m.update(pattern="2:4"), "contradicts itself: .*nonzeros"),
    "no dtype": (lambda m, t: m.pop("dtype"), "not understood: dtype ''"),
    "unknown dtype": (lambda m, t: m.update(dtype="int4"), "not understood: dtype 'int4'"),
    "other scaled dtype": (lambda m, t: m.update(dtype="fp8_e4m3"), "values is int8"),
    "unscaled dtype": (lambda m, t: m.update(dtype="bf16"), r"a bf16 weight holds \['values'\]"),
    "no scales": (lambda m, t: t.pop("scales"), r"holds the tensors \['values'\]"),
    "no values": (lambda m, t: t.pop("values"), r"holds the tensors \['scales'\]"),
    "another tensor": (lambda m, t: t.update(bias=np.zeros(3)), r"\['bias', 'scales', 'values'\]"),
    "nothing": (lambda m, t: t.clear(), r"holds the tensors \[\]"),
    "values 1-D": (lambda m, t: t.update(values=t["values"].ravel()), r"shape \(63,\)"),
    "values 3-D": (lambda m, t: t.update(values=t["values"][None]), r"shape \(1, 3, 21\)"),
    "values empty": (lambda m, t: t.update(values=t["values"][:, :0]), r"shape \(3, 0\)"),
    "values int16": (lambda m, t: t.update(values=t["values"].astype("i2")), "values is int16"),
    "values uint8": (lambda m, t: t.update(values=t["values"].view("u1")), "values is uint8"),
    "values too full": (lambda m, t: t["values"].fill(1), "has 8 nonzeros, allowed are 6"),
    "values -128": (lambda m, t: t["values"].__setitem__((0, 0), -128), "values holds -128"),
    "scales short": (lambda m, t: t.update(scales=t["scales"][:2]), r"float32 of shape \(2,\)"),
    "scales 2-D": (lambda m, t: t.update(scales=t["scales"][:, None]), r"of shape \(3, 1\)"),
    "scales float64": (lambda m, t: t.update(scales=t["scales"].astype("f8")), "is float64"),
    "scales NaN": (lambda m, t: t["scales"].__setitem__(1, np.nan), "scales holds nan at index 1"),
    "scales inf": (lambda m, t: t["scales"].__setitem__(2, np.inf), "scales holds inf at index 2"),
    "scales 0": (lambda m, t: t["scales"].__setitem__(0, 0), "scales holds 0.0 at index 0"),
    "scales -1": (lambda m, t: t["scales"].__setitem__(0, -1), "scales holds -1.0"),
    "too long": (
        lambda m, t: t.update(
            values=np.zeros((1, 133_145), np.int8), scales=np.ones(1, np.float32)
        ),
        "exact up to K = 133144",
    ),
}


@pytest.mark.parametrize("name", LIES)
def test_a_file_that_lies_is_a_format_error(name: str, tmp_path: Path) -> None:
    edit, says = LIES[name]
    path = edited(tmp_path, edit)
    with pytest.raises(ss.FormatError, match=says) as caught:
        ss.SparseWeight.load(path)
    assert str(path) in str(caught.value)


def test_types_that_numpy_does_not_have_are_format_errors(tmp_path: Path) -> None:
    header = {
        "__metadata__": {
            "format": FORMAT,
            "format_version": "1",
            "pattern": "6:8",
            "dtype": "int8",
        },
        "values": {"dtype": "I8", "shape": [1, 1], "data_offsets": [0, 1]},
        "scales": {"dtype": "F8_E8M0", "shape": [1], "data_offsets": [1, 2]},
    }
    text = json.dumps(header).encode()
    (tmp_path / "w").write_bytes(struct.pack("<Q", len(text)) + text + b"\1\1")
    with pytest.raises(ss.FormatError, match="F8_E8M0"):
        ss.SparseWeight.load(tmp_path / "w")


def test_fp8_nan_in_a_file_is_a_format_error(tmp_path: Path) -> None:
    made = sample(dtype="fp8_e4m3")
    made.save(tmp_path / "w")
    content = bytearray((tmp_path / "w").read_bytes())
    assert content.endswith(made.values.tobytes())  # the last byte is row 2, column 20
    for code in (0x7F, 0xFF):
        content[-1] = code
        (tmp_path / "w").write_bytes(content)
        with pytest.raises(ss.FormatError, match="holds nan at row 2, column 20"):
            ss.SparseWeight.load(tmp_path / "w")


@pytest.mark.parametrize("dtype", ["fp8_e4m3", "bf16", "fp16"])
def test_minus_zero_in_a_file_becomes_plus_zero(dtype: str, tmp_path: Path) -> None:
    values = np.full((2, 8), -0.0).astype(operand(dtype).dtype)
    values[:, 0] = 1
    tensors = {"values": values}
    if operand(dtype).scaled:
        tensors["scales"] = np.ones(2, np.float32)
    metadata = {"format": FORMAT, "format_version": "1", "pattern": "6:8", "dtype": dtype}
    write_file(tmp_path / "w", tensors, metadata)
    loaded = ss.SparseWeight.load(tmp_path / "w")
    assert not np.signbit(loaded.values.astype(np.float32)).any()


def assert_valid(loaded: ss.SparseWeight) -> None:
    """All that the class promises about itself."""
    assert loaded.values.dtype == loaded.dtype.dtype
    check.check_values(loaded.values, loaded.pattern, "weight", threads=1)
    assert loaded.values.ndim == 2
    assert loaded.values.size > 0
    assert (loaded.scales is not None) == loaded.dtype.scaled
    if loaded.scales is not None:
        assert loaded.scales.shape == (loaded.n,)
        assert loaded.scales.dtype == np.float32
        assert (np.isfinite(loaded.scales) & (loaded.scales > 0)).all()
    if loaded.dtype.name == "int8":
        assert (loaded.values >= -127).all()
    assert same_bits(unslide_rows(loaded.slide(), loaded.pattern, loaded.k), loaded.values)


@pytest.mark.parametrize("dtype", OPERAND_NAMES)
def test_a_truncated_file_is_a_format_error_at_every_length(dtype: str, tmp_path: Path) -> None:
    path = tmp_path / "w"
    sample(dtype=dtype).save(path)
    content = path.read_bytes()
    for length in range(len(content)):
        path.write_bytes(content[:length])
        with pytest.raises(ss.FormatError, match="is no intact safetensors file"):
            ss.SparseWeight.load(path)
    path.write_bytes(content + b"\0")
    with pytest.raises(ss.FormatError):
        ss.SparseWeight.load(path)


@given(
    operand_names,
    st.lists(
        st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), min_size=1, max_size=6
    ),
    st.booleans(),
)
def test_flipped_bits_give_a_format_error_or_a_valid_weight(
    tmp_path_factory: pytest.TempPathFactory,
    dtype: str,
    flips: list[tuple[float, int]],
    header_only: bool,
) -> None:
    path = tmp_path_factory.getbasetemp() / f"flipped-{dtype}"
    sample(dtype=dtype).save(path)
    content = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", content[:8])
    reach = 8 + header if header_only else len(content)
    for where, mask in flips:
        content[int(where * reach)] ^= mask
    path.write_bytes(content)
    try:
        loaded = ss.SparseWeight.load(path)
    except ss.FormatError as error:
        assert str(path) in str(error)
    else:
        assert_valid(loaded)


@given(
    st.floats(0, 1, exclude_max=True),
    st.integers(0, 12),
    st.one_of(
        st.binary(max_size=12),
        st.text(alphabet='0123456789,:"[]{}eE-.\\uI8F4', max_size=12).map(str.encode),
    ),
)
def test_spliced_headers_give_a_format_error_or_a_valid_weight(
    tmp_path_factory: pytest.TempPathFactory, where: float, removed: int, inserted: bytes
) -> None:
    path = tmp_path_factory.getbasetemp() / "spliced"
    sample().save(path)
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, data = content[8 : 8 + length], content[8 + length :]
    at = int(where * length)
    header = header[:at] + inserted + header[at + removed :]
    path.write_bytes(struct.pack("<Q", len(header)) + header + data)
    try:
        loaded = ss.SparseWeight.load(path)
    except ss.FormatError as error:
        assert str(path) in str(error)
    else:
        assert_valid(loaded)


def test_saving_into_a_missing_folder_is_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere/w"):
        sample().save(tmp_path / "nowhere" / "w")
    with pytest.raises(FileNotFoundError, match="nothing"):
        ss.SparseWeight.load(tmp_path / "nothing")
    assert list(tmp_path.iterdir()) == []


def test_a_checkpoint_of_another_kind_is_told_where_to_go(tmp_path: Path) -> None:
    from safetensors.numpy import save_file

    save_file({"w": np.ones((2, 4), np.float32)}, tmp_path / "model.safetensors")
    with pytest.raises(ss.FormatError, match=r"use\s+SparseWeight.from_array on its tensors"):
        ss.SparseWeight.load(tmp_path / "model.safetensors")


@pytest.mark.parametrize("source", FLOATS, ids=str)
def test_fp8_and_int8_of_half_types(source: np.dtype) -> None:
    weight = ss.prune(
        np.random.default_rng(0).standard_normal((2, 16)).astype(np.float32), "6:8"
    ).astype(source)
    for dtype in ("int8", "fp8_e4m3"):
        half = ss.SparseWeight.from_array(weight, "6:8", dtype=dtype)
        whole = ss.SparseWeight.from_array(weight.astype(np.float32), "6:8", dtype=dtype)
        assert_equal(half, whole)
