"""How well a format explains a file: one order for `detect`, which has no model, and `read`, which has one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

from lycoris.files.dialects.base import Dialect, Key
from lycoris.models.families.family import Architecture


class DialectRating(NamedTuple):
    """How well a format explains a file.

    Compared field by field, in this order; larger is better. Among equals the first in `DIALECTS` wins.
    """

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


def rate_dialect(
    dialect: Dialect,
    keys: Iterable[Key | None],
    header: Mapping[str, str],
    *,
    named: int,
    naming: str,
    architecture: Architecture | None,
    likely: tuple[float, int] = (0.0, 0),
) -> DialectRating:
    """Rate how well a format explains the names in a file.

    Args:
        keys: What `dialect.split` returned for each name in the file; None for names it does not have.
        header: The file's header.
        named: How many layers have names that the model has, under `naming`.
        architecture: That of the model; None: not known.
        likely: See `DialectRating.likely`.
    """
    keys = list(keys)
    return DialectRating(
        named,
        -sum(key is None for key in keys),
        any(mark in header for mark in dialect.header_marks),
        architecture is not None and naming == dialect.choose_naming(architecture),
        likely,
        sum(key is not None and dialect.spelling.get(key.suffix, key.suffix) == key.spelled for key in keys),
    )
