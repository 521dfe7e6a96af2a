"""Layers are chosen by whole components of their names."""

from __future__ import annotations

import re
from fnmatch import translate

import pytest
from hypothesis import given
from hypothesis import strategies as st

import slidesparse_rt as ss
from slidesparse_rt.convert.names import checked_globs, first_fit, fits, is_embedding

components = st.sampled_from(["a", "ab", "b", "0", "10", "q_proj", "proj"])
paths = st.lists(components, min_size=1, max_size=6).map(".".join)
pieces = st.sampled_from(["a", "a*", "*", "**", "?", "[ab]", "0", "q_proj", "*proj"])
globs = st.lists(pieces, min_size=1, max_size=4).map(".".join)


@pytest.mark.parametrize(
    ("glob", "module", "fit"),
    [
        ("up_proj", "model.layers.0.mlp.up_proj", True),
        ("proj", "model.layers.0.mlp.up_proj", False),
        ("*_proj", "model.layers.0.mlp.up_proj", True),
        ("layers.1", "model.layers.1.mlp", True),
        ("layers.1", "model.layers.11.mlp", False),
        ("layers.1.mlp", "model.layers.1.self_attn", False),
        ("layers.*.mlp", "model.layers.1.mlp.up_proj", True),
        ("layers.*.up_proj", "model.layers.1.mlp.up_proj", False),
        ("layers.**.up_proj", "model.layers.1.mlp.up_proj", True),
        ("model.**.layers", "model.layers.1", True),
        ("embed", "embed_tokens", False),
        ("lm_head", "LM_HEAD", False),
        ("[qk]_proj", "self_attn.v_proj", False),
        ("[qk]_proj", "self_attn.k_proj", True),
    ],
)
def test_examples(glob: str, module: str, fit: bool) -> None:
    assert fits(glob, module) is fit


def as_expression(glob: str) -> re.Pattern[str]:
    """The same rule as one regular expression over '.component.component.'."""
    expression = ""
    for piece in glob.split("."):
        if piece == "**":
            expression += r"(?:[^.]+\.)*"
        else:
            inner = translate(piece).removeprefix("(?s:").removesuffix(r")\Z").removesuffix(r")\z")
            expression += inner.replace(".*", "[^.]*").replace(".", "[^.]") + r"\."
            expression = expression.replace("[^[^.]]", "[^.]")
    return re.compile(r"(?:^|(?<=\.))" + expression)


@given(globs, paths)
def test_fitting_is_that_of_a_regular_expression(glob: str, path: str) -> None:
    assert fits(glob, path) == bool(as_expression(glob).search(path + "."))


@given(paths, st.data())
def test_every_run_of_components_fits_and_nothing_shorter(path: str, data: st.DataObject) -> None:
    parts = path.split(".")
    start = data.draw(st.integers(0, len(parts) - 1))
    stop = data.draw(st.integers(start + 1, len(parts)))
    assert fits(".".join(parts[start:stop]), path)
    longer = ".".join([*parts[:start], parts[start] + "x", *parts[start + 1 :]])
    assert fits(parts[start], longer) == (parts[start] in longer.split("."))


def test_first_fit() -> None:
    assert first_fit("a.b", ["c", "b", "a"]) == "b"
    assert first_fit("a.b", ["c"]) is None


def test_embeddings_are_known_by_their_own_name() -> None:
    assert is_embedding("model.embed_tokens")
    assert is_embedding("bert.embeddings.word_embeddings")
    assert is_embedding("transformer.wte")
    assert not is_embedding("encoder.embeddings_project")
    assert not is_embedding("shared.q_proj")


@pytest.mark.parametrize("glob", ["", "a..b", ".a", "a."])
def test_empty_components_are_refused(glob: str) -> None:
    with pytest.raises(ss.OptionError, match="has an empty component; type names"):
        checked_globs([glob], "include")


def test_a_string_is_no_list() -> None:
    with pytest.raises(ss.OptionError, match="include is the string 'a'; allowed is a list"):
        checked_globs("a", "include")
