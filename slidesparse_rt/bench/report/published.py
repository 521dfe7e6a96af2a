"""Our figures beside those of others for an H100, from benchmarks/published-h100.json.

The two were measured on different GPUs and days, so what is compared is each one's speed over the
dense baseline of its own run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ..quantize import LiftCase
from ..sides import DENSE
from .markdown import SHORT, table
from .results import Case, Key, Result, merged, products

__all__ = ["against_published"]

_SIDE = "hopper"
_FORMATS = ("fp8_e4m3", "int8")


def against_published(published: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Tables of products, operators and the quantize kernel, each column with its source.

    ``published`` is the parsed file, ``results`` are of the same kind of GPU.  What was not
    measured has no row; "" where nothing was.
    """
    parts = [
        _gemm(published, results),
        _op(published, results),
        _quantize(published, results),
    ]
    if not any(parts):
        return ""
    labels = "".join(f"- **{name}**: {words}.\n" for name, words in published["sources"].items())
    text = (
        f"{published['model']} at {published['pattern']}. Ours are bursts from the files under "
        f"[Sources](#sources-h100), column **B**. The others are:\n\n{labels}\n"
        "A and B are different GPUs on different days: compare speeds, which are relative to the "
        "dense baseline of the same run, not microseconds.\n\n"
    )
    text += "".join(f"{part}\n\n" for part in parts if part)
    return text + _words(published, results)


def _case(
    published: Mapping[str, Any], results: Sequence[Result], dtype: str, m: int, stage: str
) -> Case | None:
    rows = products(results, "gemm").get(_SIDE, {})
    key = Key(published["model"], published["pattern"], dtype, m, stage, "burst")
    return rows.get(key)


def _gemm(published: Mapping[str, Any], results: Sequence[Result]) -> str:
    data = published["gemm_us"]
    where = data["source"]
    lines = []
    for dtype in _FORMATS:
        dense, sparse = data["dense"][dtype]["us"], data["cusparselt"][dtype]["us"]
        for m, dense_us, sparse_us in zip(data["m"], dense, sparse, strict=True):
            case = _case(published, results, dtype, m, "gemm")
            if case is None:
                continue
            theirs, ours = dense_us / sparse_us, case.us(DENSE) / case.us(_SIDE)
            lines.append(
                [
                    SHORT[dtype],
                    str(m),
                    f"{dense_us}",
                    f"{sparse_us}",
                    f"{theirs:.2f}",
                    f"{case.us(DENSE):.0f}",
                    f"{case.us(_SIDE):.0f}",
                    f"{ours:.2f}",
                    f"{ours / theirs:.2f}",
                ]
            )
    head = [
        "type",
        "M",
        f"{where}: dense us",
        f"{where}: cuSPARSELt us",
        f"{where}: speed",
        "B: dense us",
        f"B: {_SIDE} us",
        "B: speed",
        "B over A",
    ]
    words = "Product alone, against cuSPARSELt's:"
    return f"{words}\n\n{table(head, lines)}" if lines else ""


def _op(published: Mapping[str, Any], results: Sequence[Result]) -> str:
    data = published["op"]
    where = data["source"]
    lines = []
    for index, m in enumerate(data["m"]):
        base = _case(published, results, "fp8_e4m3", m, "op")
        if base is None:
            continue
        line = [str(m), f"{data['dense_fp8_us'][index]}", f"{base.us(DENSE):.0f}"]
        for dtype in _FORMATS:
            case = _case(published, results, dtype, m, "op")
            theirs = data["speed"][dtype][index]
            if case is None:
                line += [f"{theirs:.2f}", "-", "-"]
                continue
            # Against dense fp8 for both formats, as the published figures are.
            ours = base.us(DENSE) / case.us(_SIDE)
            line += [f"{theirs:.2f}", f"{ours:.2f}", f"{ours / theirs:.2f}"]
        lines.append(line)
    head = ["M", f"{where}: dense fp8 us", "B: dense fp8 us"]
    for dtype in _FORMATS:
        short = SHORT[dtype]
        head += [f"{where}: published {short}", f"B: {_SIDE} {short}", f"{short} B over A"]
    words = (
        "Operator, bf16 in and bf16 out, in CUDA graphs; the dense fp8 operator with fused scales "
        f"is 1. That of {where} quantizes with the published kernel, that of B with ours, which "
        "moves more bytes a second: the table below."
    )
    return f"{words}\n\n{table(head, lines)}" if lines else ""


def _quantize(published: Mapping[str, Any], results: Sequence[Result]) -> str:
    data = published["quantize"]
    where = data["source"]
    rows = {
        row["columns"]: row
        for row in merged(results, "quantize")
        if (row["kernel"], row["x"], row["out"], row["pattern"])
        == ("quantize_lift", "bfloat16", "fp8_e4m3", published["pattern"])
    }
    lines = []
    for text, us in data["us"].items():
        row = rows.get(int(text))
        if row is None:
            continue
        case = LiftCase(data["m"], int(text), "bfloat16", "fp8_e4m3", published["pattern"])
        rate = (case.read + case.written) / us / 1e6
        copy = data["copy_tb_per_s"]
        lines.append(
            [
                text,
                str(data["m"]),
                f"{us}",
                f"{rate:.2f}",
                f"{100 * rate / copy:.0f} % of {copy:.2f}",
                str(row["m"]),
                f"{row['us']:.0f}",
                f"{row['tb_per_s']:.2f}",
                f"{100 * row['of_copy']:.0f} % of {row['copy_tb_per_s']:.2f}",
            ]
        )
    head = [
        "K",
        f"{where}: M",
        f"{where}: us",
        f"{where}: TB/s",
        f"{where}: of a copy's TB/s",
        "B: M",
        "B: us",
        "B: TB/s",
        "B: of a copy's TB/s",
    ]
    words = "Quantize and lift, bf16 to fp8, the published kernel's time and ours:"
    return f"{words}\n\n{table(head, lines)}" if lines else ""


def _words(published: Mapping[str, Any], results: Sequence[Result]) -> str:
    """Figures that have no table."""
    text = "".join(
        f"- {published[key]['source']}: {published[key]['words']}.\n"
        for key in ("dense", "dequantize", "host", "prefill")
    )
    rows = [
        row
        for row in merged(results, "overhead")
        if (row["backend"], row["call"]) == (_SIDE, "SparseGemmPlan.run out=y")
    ]
    if rows:
        low, high = (f(row["median_us"] for row in rows) for f in (min, max))
        text += (
            f"- B: `SparseGemmPlan.run(x, out=y)` with `{_SIDE}` takes {low:.0f} to {high:.0f} us "
            f"of host time, of which no part makes a plan.\n"
        )
    return text
