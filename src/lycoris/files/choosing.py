"""Which of several formats a file is of: one order for `detect`, which knows no model, and `read`, which has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lycoris.files.dialects.base import Dialect, Key
from lycoris.models.families.family import Architecture


class Standing(NamedTuple):
    """How well a format explains a file. The larger counts, field by field; of equals the first in `DIALECTS`."""

    named: int
    """Layers whose names a model has: the one at hand, or the known one that has most of them."""
    known: int
    """Tensors that are not of the format, below zero."""
    marked: bool
    """Whether the header is one of its files'."""
    usual: bool
    """Whether such files usually call the layers so."""
    likely: tuple[float, int]
    """How much of a model there is, if it is most of it; of models that fit equally well, the one that most files are
    for. With a model at hand it is the same for every format."""
    spelled: int
    """Tensors spelled as such files usually are."""


def standing(
    dialect: Dialect,
    keys: Iterable[Key | None],
    header: Mapping[str, str],
    *,
    named: int,
    naming: str,
    architecture: Architecture | None,
    likely: tuple[float, int] = (0.0, 0),
) -> Standing:
    """How well a format explains the names of a file, of whose layers a model has `named` under that naming."""
    keys = list(keys)
    return Standing(
        named,
        -sum(key is None for key in keys),
        any(mark in header for mark in dialect.marks),
        architecture is not None and naming == dialect.naming_for(architecture),
        likely,
        sum(key is not None and dialect.spelling.get(key.suffix, key.suffix) == key.spelled for key in keys),
    )
