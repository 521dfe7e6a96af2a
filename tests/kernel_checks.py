"""Every kernel against the NumPy definition, on a GPU or on the emulator.

A machine has ``kernels`` (a KernelCache or what stands for one), ``memory(nbytes, offset)`` and
``stream``; memory has ``address``, ``write(values)``, ``read()`` (its bytes) and ``check()``
(nothing was written outside of it).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from hopper_cases import plain_bits, sparse_bits

from slidesparse_rt.dtypes import SCALE_FLOOR, array_type, operand
from slidesparse_rt.kernels.geometry import quantize_config
from slidesparse_rt.kernels.hopper import pack_weights
from slidesparse_rt.kernels.hopper_layout import pack, unpack
from slidesparse_rt.kernels.launch import Dequantizer, Quantizer
from slidesparse_rt.kernels.weight_launch import Findings, WeightKernels
from slidesparse_rt.packing.prune import prune
from slidesparse_rt.packing.quantize import quantize, quantize_tokens
from slidesparse_rt.packing.slide import lift_rows, slide_rows
from slidesparse_rt.pattern import Pattern

POISON = 0xC3
ARRAY_NAMES = ("float32", "float16", "bfloat16")


def bits(values: np.ndarray) -> np.ndarray:
    return values.view(f"u{values.itemsize}")


def tokens(rng: np.random.Generator, rows: int, columns: int, name: str) -> np.ndarray:
    """Rows of very different sizes, with the special ones among them."""
    kind = array_type(name).dtype
    largest = float(ml_dtypes.finfo(kind).max)
    with np.errstate(over="ignore"):
        size = np.exp2(rng.integers(-24, 12, (rows, 1)))
        x = (rng.standard_normal((rows, columns)) * size).astype(kind)
    special: list[Any] = [
        lambda row: row.fill(0),
        lambda row: row.__setitem__(rng.integers(columns), np.inf),
        lambda row: row.__setitem__(rng.integers(columns), -np.nan),
        lambda row: row.__setitem__(slice(None), -0.0),
        lambda row: row.__setitem__(0, -largest),
        lambda row: row.__setitem__(slice(None), ml_dtypes.finfo(kind).smallest_subnormal),
        # Halves: every tie of the rounding, both parities.
        lambda row: row.__setitem__(slice(None), np.resize([127, 0.5, -1.5, 2.5, -126.5], columns)),
        lambda row: row.__setitem__(slice(None), np.resize([448, 17, -19, 0.0087890625], columns)),
    ]
    for row, change in zip(x[1:], special, strict=False):
        change(row)
    return x


def strided(machine: Any, x: np.ndarray, stride: int, offset: int = 0) -> Any:
    """Memory with x's rows ``stride`` elements apart and other numbers between them."""
    rows, columns = x.shape
    host = np.full((rows, stride), 3, x.dtype)
    host[:, :columns] = x
    # The last row ends the allocation: reading on would leave it.
    flat = host.reshape(-1)[: (rows - 1) * stride + columns] if rows else host.reshape(-1)
    memory = machine.memory(flat.nbytes, offset)
    memory.write(flat)
    return memory


def expected_lift(x: np.ndarray, out: str, pattern: Pattern) -> tuple[np.ndarray, Any]:
    values, scales = quantize_tokens(x, out)
    lifted = lift_rows(values, pattern)
    if scales is None:
        # A dead row is NaN in all its K' slots, the padding of the last group included.
        lifted[np.isnan(values.astype(np.float32)).all(axis=1)] = np.nan
    return lifted, scales


def check_quantize(
    machine: Any,
    x: np.ndarray,
    out: str,
    pattern: Pattern,
    *,
    stride: int | None = None,
    offset: int = 0,
    pad_rows: int = 0,
    pad_chunks: int = 0,
    given: np.ndarray | None = None,
    vectors: int | None = None,
    threads: int | None = None,
    blocks_per_sm: int | None = None,
) -> Quantizer:
    rows, columns = x.shape
    size = operand(out).dtype.itemsize
    slid = pattern.slid_k(columns)
    row_length = -(-slid * size // 16) * 16 // size + pad_chunks * 16 // size
    launcher = Quantizer(
        machine.kernels,
        columns,
        x.dtype.name,
        out,
        pattern,
        row_length,
        given_scales=given is not None,
        config=quantize_config(
            columns,
            x.dtype.name,
            out,
            pattern,
            shared_limit=machine.kernels.limits.shared_bytes,
            vectors=vectors,
            threads=threads,
        ),
        blocks_per_sm=blocks_per_sm,
    )
    stride = columns if stride is None else stride
    source = strided(machine, x, stride, offset)
    q = machine.memory((rows + pad_rows) * row_length * size)
    scales = machine.memory(rows * 4)
    scale_memory = machine.memory(0 if given is None else given.nbytes)
    if given is not None:
        scale_memory.write(given)
    launcher(
        source.address,
        stride,
        q.address,
        scales.address,
        rows,
        rows + pad_rows,
        machine.stream,
        scale_memory.address,
        0 if given is None or given.size == 1 else 1,
    )
    got = q.read().view(operand(out).dtype).reshape(rows + pad_rows, row_length)
    want = np.zeros_like(got)
    if given is None:
        lifted, want_scales = expected_lift(x, out, pattern)
    else:
        values, want_scales = quantize_with(x, out, np.resize(given, rows))
        lifted = lift_rows(values, pattern)
    want[:rows, :slid] = lifted
    same = bits(got) == bits(want)
    if size == 2:  # a NaN is a NaN, whatever its bits
        same |= np.isnan(got.astype(np.float32)) & np.isnan(want.astype(np.float32))
    where = (
        f"{launcher.config}, access {launcher.access}, first differences {np.argwhere(~same)[:4]}"
    )
    assert same.all(), where
    if want_scales is not None:
        np.testing.assert_array_equal(scales.read().view(np.float32), want_scales)
    for memory in (source, q, scales, scale_memory):
        memory.check()
    return launcher


def quantize_with(x: np.ndarray, out: str, given: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The definition for a given scale for each row; a scale out of range gives NaN and zeros."""
    values = np.zeros(x.shape, operand(out).dtype)
    scales = np.full(len(x), np.nan, np.float32)
    for row, scale in enumerate(given):
        if np.isfinite(scale) and scale >= SCALE_FLOOR:
            rows = slice(row, row + 1)
            values[rows], scales[rows] = quantize_tokens(x[rows], out, x_scale=scale)
    return values, scales


def check_weight_quantize(machine: Any, w: np.ndarray, out: str) -> None:
    rows, columns = w.shape
    size = operand(out).dtype.itemsize
    pitch = -(-columns * size // 16) * 16
    kernels = WeightKernels(machine.kernels, w.dtype.name, Pattern.parse("6:8"))
    source = strided(machine, w, columns + 3)
    q, scales = machine.memory(rows * pitch), machine.memory(rows * 4)
    kernels.quantize(
        out,
        source.address,
        columns + 3,
        q.address,
        pitch,
        scales.address,
        rows,
        columns,
        machine.stream,
    )
    want, want_scales = quantize(w, out)
    got = q.read().view(want.dtype).reshape(rows, pitch // size)
    same = bits(got[:, :columns]) == bits(want)
    assert same.all(), np.argwhere(~same)[:4]
    assert not bits(got[:, columns:]).any()
    if want_scales is not None:
        np.testing.assert_array_equal(scales.read().view(np.float32), want_scales)
    for memory in (source, q, scales):
        memory.check()


def accumulators(rng: np.random.Generator, rows: int, columns: int, name: str) -> np.ndarray:
    if name == "int32":
        x = rng.integers(-(2**31), 2**31, (rows, columns)).astype(np.int32)
        x.flat[: min(3, x.size)] = [0, -(2**31), 2**31 - 1][: min(3, x.size)]
        return x
    x = (rng.standard_normal((rows, columns)) * 1000).astype(array_type(name).dtype)
    x.flat[: min(4, x.size)] = np.array([0.0, -0.0, np.inf, np.nan], x.dtype)[: min(4, x.size)]
    return x


def check_dequantize(
    machine: Any,
    rng: np.random.Generator,
    acc: np.ndarray,
    out_type: str,
    *,
    acc_pad: int = 0,
    out_pad: int = 0,
    offset: int = 0,
    factors: str = "tcb",
    spec: Any = None,
) -> None:
    rows, columns = acc.shape
    target = array_type(out_type).dtype
    launcher = Dequantizer(machine.kernels, columns, acc.dtype.name, out_type, spec=spec)
    source = strided(machine, acc, columns + acc_pad, offset * acc.itemsize)
    token = np.exp2(rng.uniform(-20, 4, rows)).astype(np.float32)
    channel = np.exp2(rng.uniform(-20, 4, columns)).astype(np.float32)
    bias = rng.standard_normal(columns).astype(np.float32)
    if rows > 1:
        token[1] = np.nan
    want = acc.astype(np.float32)
    vectors = []
    with np.errstate(all="ignore"):
        for letter, vector, step in (
            ("t", token, lambda y: y * token[:, None]),
            ("c", channel, lambda y: y * channel),
            ("b", bias, lambda y: y + bias),
        ):
            memory = machine.memory(vector.nbytes, 4)
            memory.write(vector)
            vectors.append(memory if letter in factors else None)
            if letter in factors:
                want = step(want)
        want = want.astype(target)
    stride = columns + out_pad
    out = machine.memory((rows - 1) * stride * target.itemsize + want.itemsize * columns)
    launcher(
        source.address,
        columns + acc_pad,
        out.address,
        stride,
        *(0 if memory is None else memory.address for memory in vectors),
        rows,
        machine.stream,
    )
    got = np.full(rows * stride, 0, target)
    flat = out.read().view(target)
    got[: flat.size] = flat
    got = got.reshape(rows, stride)
    same = bits(np.ascontiguousarray(got[:, :columns])) == bits(want)
    same |= np.isnan(got[:, :columns].astype(np.float32)) & np.isnan(want.astype(np.float32))
    assert same.all(), f"first differences {np.argwhere(~same)[:4]}"
    untouched = got[:-1, columns:].copy().view(np.uint8)
    assert (untouched == POISON).all()
    out.check()


def findings_memory(machine: Any) -> Any:
    memory = machine.memory(WeightKernels.FINDINGS_BYTES)
    memory.write(np.zeros(WeightKernels.FINDINGS_BYTES, np.uint8))
    return memory


def sparse_values(
    rng: np.random.Generator, rows: int, columns: int, dtype: str, pattern: Pattern
) -> np.ndarray:
    """A weight of an array type or an operand's that fits the pattern; some zeros are -0."""
    w = rng.standard_normal((rows, columns)).astype(np.float32)
    w[rng.random(w.shape) < 0.15] = 0
    fitting = prune(w, pattern)
    if dtype in ARRAY_NAMES:
        values = fitting.astype(array_type(dtype).dtype)
    else:
        name = {"int8": "int8", "float8_e4m3fn": "fp8_e4m3"}[dtype]
        values = quantize(fitting, name)[0]
    if dtype != "int8":
        raw = bits(values)
        zeros = (raw == 0) & (rng.random(w.shape) < 0.5)
        raw[zeros] = 1 << (8 * raw.itemsize - 1)
    return values


def check_slide(
    machine: Any, values: np.ndarray, pattern: Pattern, pad_rows: int = 2, pad: int = 16
) -> None:
    rows, columns = values.shape
    size = values.itemsize
    used = pattern.slid_k(columns) * size
    pitch = -(-used // 8) * 8 + pad
    stride = columns + 1
    kernels = WeightKernels(machine.kernels, values.dtype.name, pattern)
    source = strided(machine, values, stride)
    out = machine.memory((rows + pad_rows) * pitch)
    found = findings_memory(machine)
    kernels.slide(
        source.address,
        stride * size,
        out.address,
        pitch,
        rows,
        rows + pad_rows,
        columns,
        found.address,
        machine.stream,
    )
    got = out.read().reshape(rows + pad_rows, pitch)
    want = np.zeros_like(got)
    want[:rows, :used] = slide_rows(values, pattern, "values", threads=1).view(np.uint8)
    np.testing.assert_array_equal(got, want)
    assert Findings.decode(found.read().tobytes(), columns, pattern).violations == 0

    back = machine.memory(rows * columns * size)
    kernels.unslide(
        out.address,
        pitch,
        back.address,
        columns * size,
        rows,
        columns,
        found.address,
        machine.stream,
    )
    returned = back.read().view(values.dtype).reshape(rows, columns)
    plain = bits(values).copy()
    if values.dtype != np.int8:
        plain[plain == 1 << (8 * size - 1)] = 0
    np.testing.assert_array_equal(bits(returned), plain)
    assert Findings.decode(found.read().tobytes(), columns, pattern).violations == 0
    for memory in (source, out, found, back):
        memory.check()


def check_slide_misfit(machine: Any, pattern: Pattern) -> None:
    """One group that is too full is reported."""
    columns = 3 * pattern.group + 1
    values = np.zeros((5, columns), np.int8)
    start = 2 * pattern.group
    values[3, start : start + pattern.keep + 1] = 1
    kernels = WeightKernels(machine.kernels, "int8", pattern)
    source = strided(machine, values, columns)
    pitch = -(-pattern.slid_k(columns) // 16) * 16
    out = machine.memory(5 * pitch)
    found = findings_memory(machine)
    kernels.slide(
        source.address, columns, out.address, pitch, 5, 5, columns, found.address, machine.stream
    )
    decoded = Findings.decode(found.read().tobytes(), columns, pattern)
    assert decoded.violations == 1
    assert decoded.first == (3, 2, pattern.keep + 1)


def check_unslide_misfit(machine: Any, pattern: Pattern) -> None:
    """Slid rows that no weight has are reported."""
    columns = 3 * pattern.group + 1
    pitch = -(-pattern.slid_k(columns) // 16) * 16
    corrupt = np.zeros((5, pitch), np.int8)
    corrupt[2, 3 * pattern.slots + 1] = 1  # an input beyond the row
    overlapping = pattern.windows > 1
    if overlapping:
        corrupt[4, [2, 4]] = 1  # both mean input 2 of group 0
    if pattern.name == "dense":
        corrupt[3, 2] = 1  # where no weight is ever stored
    source = strided(machine, corrupt, pitch)
    found = findings_memory(machine)
    target = machine.memory(5 * columns)
    WeightKernels(machine.kernels, "int8", pattern).unslide(
        source.address, pitch, target.address, columns, 5, columns, found.address, machine.stream
    )
    decoded = Findings.decode(found.read().tobytes(), columns, pattern)
    assert decoded.violations == 1 + (overlapping or pattern.name == "dense")
    assert decoded.first == (2, 3, 1)
    target.check()


def check_prune(
    machine: Any, w: np.ndarray, pattern: Pattern, norms: np.ndarray | None, *, in_place: bool
) -> None:
    rows, columns = w.shape
    size = w.itemsize
    kernels = WeightKernels(machine.kernels, w.dtype.name, pattern)
    source = strided(machine, w, columns)
    out = source if in_place else machine.memory(w.nbytes)
    where = (source.address, columns * size, out.address, columns * size)
    if norms is None:
        kernels.prune_magnitude(*where, rows, columns, machine.stream)
        want = prune(w, pattern)
    else:
        memory = machine.memory(8 * norms.size)
        memory.write(norms.astype(np.float64))
        kernels.prune_wanda(*where, memory.address, rows, columns, machine.stream)
        want = prune(w, pattern, method="wanda", norms=norms)
    got = out.read().view(w.dtype).reshape(rows, columns)
    np.testing.assert_array_equal(bits(got), bits(want))
    out.check()


def check_check(machine: Any, values: np.ndarray, pattern: Pattern) -> None:
    """The findings of ``values`` against plain NumPy."""
    rows, columns = values.shape
    wide = values.astype(np.float32)
    padded = np.zeros((rows, pattern.padded_k(columns)))
    padded[:, :columns] = wide != 0
    counts = padded.reshape(rows, -1, pattern.group).sum(axis=2).astype(int)
    misfits = np.argwhere(counts > pattern.keep)
    strange = np.argwhere(~np.isfinite(wide))
    memory = strided(machine, values, columns + 5)
    found = findings_memory(machine)
    WeightKernels(machine.kernels, values.dtype.name, pattern).check(
        memory.address,
        (columns + 5) * values.itemsize,
        rows,
        columns,
        found.address,
        machine.stream,
    )
    got = Findings.decode(found.read().tobytes(), columns, pattern)
    assert got.nonzeros == np.count_nonzero(wide)
    assert got.violations == len(misfits)
    assert got.nonfinite == len(strange)
    first = None if not len(misfits) else (*misfits[0].tolist(), counts[tuple(misfits[0])])
    assert got.first == first
    assert got.first_nonfinite == (tuple(strange[0].tolist()) if len(strange) else None)


def check_hopper_pack(
    machine: Any, rng: np.random.Generator, rows: int, row_bytes: int, dtype: str
) -> None:
    """hopper_pack.cu against hopper_layout.py, and back."""
    slid = sparse_bits(rng, rows, row_bytes // operand(dtype).dtype.itemsize, dtype)
    wanted = pack(slid)
    source, target = machine.memory(slid.nbytes), machine.memory(wanted.nbytes)
    source.write(slid)
    pack_weights(
        machine.kernels, dtype, source.address, rows, row_bytes, target.address, machine.stream
    )
    found = target.read().reshape(wanted.shape)
    np.testing.assert_array_equal(found, wanted)
    target.check()
    np.testing.assert_array_equal(plain_bits(unpack(found, slid.dtype)), plain_bits(slid))
