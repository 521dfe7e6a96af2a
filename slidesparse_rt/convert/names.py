"""Choosing layers by module name: whole components, never parts of a word.

A name such as ``model.layers.0.mlp.up_proj`` is a path of components.  A glob is one too, and fits
a module if it fits any run of consecutive components of its path: ``up_proj``, ``layers.0``,
``layers.*.mlp`` and ``model.**.up_proj`` all fit the one above; ``up``, ``layers.00`` and
``proj`` do not.  Within a component ``*``, ``?`` and ``[...]`` are those of a shell; ``**`` stands
for any number of components, none included.  Upper and lower case differ.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase

from ..errors import OptionError

__all__ = ["DEFAULT_EXCLUDE", "checked_globs", "first_fit", "fits", "is_embedding"]

#: Output heads and routers of mixtures of experts: few weights of much weight.
DEFAULT_EXCLUDE = (
    "lm_head",
    "embed_out",
    "output_layer",
    "score",
    "classifier",
    "router",
    "gate",
    "shared_expert_gate",
)

#: Last components of tables that are looked up, not multiplied; never converted, whatever is asked.
_EMBEDDINGS = (
    "*embed",
    "*embedding",
    "*embeddings",
    "embed_tokens*",
    "embed_positions",
    "embed_in",
    "wte",
    "wpe",
    "shared",
    "relative_attention_bias",
)


def fits(glob: str, module: str) -> bool:
    """Whether ``glob`` fits a run of consecutive components of ``module``."""
    pieces, path = glob.split("."), module.split(".")
    return any(_fits_from(pieces, path[start:]) for start in range(len(path)))


def _fits_from(pieces: Sequence[str], path: Sequence[str]) -> bool:
    """Whether the pieces fit a beginning of the path."""
    if not pieces:
        return True
    if pieces[0] == "**":
        return any(_fits_from(pieces[1:], path[start:]) for start in range(len(path) + 1))
    return bool(path) and fnmatchcase(path[0], pieces[0]) and _fits_from(pieces[1:], path[1:])


def first_fit(module: str, globs: Iterable[str]) -> str | None:
    """The first glob that fits ``module``."""
    return next((glob for glob in globs if fits(glob, module)), None)


def is_embedding(module: str) -> bool:
    """Whether the module's own name is one that embedding tables have."""
    last = module.rpartition(".")[2]
    return any(fnmatchcase(last, glob) for glob in _EMBEDDINGS)


def checked_globs(globs: Iterable[str], option: str) -> tuple[str, ...]:
    """The globs as a tuple.

    Raises OptionError for a string instead of a list, and for a glob with an empty component.
    """
    if isinstance(globs, str):
        raise OptionError(f"{option} is the string {globs!r}; allowed is a list of globs")
    found = tuple(globs)
    for glob in found:
        if not isinstance(glob, str) or not all(glob.split(".")):
            raise OptionError(
                f"{option} {glob!r} has an empty component; type names between single dots, such "
                f"as 'q_proj' or 'layers.0.mlp'"
            )
    return found
