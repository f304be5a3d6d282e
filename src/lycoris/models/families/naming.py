"""Translate names of layers between diffusers and other code.

A layer has a name in diffusers (for text encoders: in transformers), and others in the code that the model was
published with and in the programs that load it. A module there may hold the rows of several layers here, such as one
projection to queries, keys and values; the two halves of a final modulation are swapped. Every naming is defined by
what its names mean in diffusers, so any two can be translated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import NamedTuple, Protocol, TypeVar

from lycoris.layers.geometry import Geometry

Item = TypeVar("Item")

DIFFUSERS_NAMING = "diffusers"
"""What the naming in the middle goes by."""
SplitSizes = Callable[[int, int, int], tuple[int, ...]]
"""(rows of the whole, columns, number of parts) → rows of each part."""


class Span(NamedTuple):
    """What a name stands for: the rows of these layers of diffusers, one after the other.

    A single part for a layer that is one in both.
    """

    parts: tuple[str, ...]
    swapped: bool = False
    """Whether shift and scale, the two halves of a modulation's rows, are the other way round; see `swaps_halves`."""
    gated: bool = False
    """Whether gate and value, the two halves of the rows of a feed-forward's first layer, are."""

    def swaps_halves(self, g: Geometry) -> bool:
        """Return whether the two halves of the rows are in the other order for a layer of this shape.

        Of modulations, only those of exactly two chunks are swapped.
        """
        return self.gated or (self.swapped and g.out_features == 2 * g.fan_in)


class Naming(Protocol):
    """Names of layers, translated to and from diffusers' by patterns.

    Which layers exist is up to the model: a naming translates any name that matches.
    """

    def find_span(self, name: str) -> Span | None:
        """Return the layers of diffusers that a name of this naming stands for.

        None if the naming has no rule for it: the name may be the same in both.
        """

    def find_module(self, path: str) -> str | None:
        """Return the name of the module that holds a layer of diffusers.

        None if the naming has no rule for it: the name may be the same in both.
        """

    def split_rows(self, name: str, rows: int, columns: int) -> tuple[int, ...]:
        """Return how many of a module's rows belong to each of its parts.

        `rows` and `columns` are the size of its weight.
        """


def split_evenly(rows: int, columns: int, parts: int) -> tuple[int, ...]:
    """Split rows into equal parts.

    Arguments and result as in `SplitSizes`.
    """
    return (rows // parts,) * parts


def split_square_first(rows: int, columns: int, parts: int) -> tuple[int, ...]:
    """Split rows into a square part and equal ones: queries of full width, keys and values of fewer heads.

    Arguments and result as in `SplitSizes`.
    """
    return (columns, *((rows - columns) // (parts - 1),) * (parts - 1))


def split_square_last(rows: int, columns: int, parts: int) -> tuple[int, ...]:
    """Split rows into square parts and the rest: queries, keys and values, then the first half of a feed-forward.

    Arguments and result as in `SplitSizes`.
    """
    return (*(columns,) * (parts - 1), rows - columns * (parts - 1))


@dataclass(frozen=True)
class Rename:
    """One rule of a naming: patterns of dotted names, in which `*` matches any one step, the same on both sides."""

    there: str
    here: str | Sequence[str]
    """In diffusers; several for a module that holds the rows of all of them, in this order."""
    swapped: bool = False
    gated: bool = False
    """This and the one before: see `Span`."""
    split: SplitSizes = split_evenly

    @property
    def parts(self) -> tuple[str, ...]:
        return (self.here,) if isinstance(self.here, str) else tuple(self.here)


def rename_inside(there: str, here: str, *renames: Rename) -> tuple[Rename, ...]:
    """Return renames that apply inside a module.

    `there` and `here` are put before both sides of each rename.
    """
    return tuple(
        replace(each, there=f"{there}.{each.there}", here=tuple(f"{here}.{part}" for part in each.parts))
        for each in renames
    )


@dataclass(frozen=True)
class Table:
    """A naming as a list of renames.

    The first that matches counts. What is inside a renamed module is renamed with it.
    """

    renames: tuple[Rename, ...]

    def find_span(self, name: str) -> Span | None:
        for rename in self._there(_first_step(name)):
            found = _match_rename(rename.there, name)
            if found is not None:
                return Span(tuple(_fill_stars(part, found) for part in rename.parts), rename.swapped, rename.gated)
        return None

    def find_module(self, path: str) -> str | None:
        for rename, part in self._here(_first_step(path)):
            found = _match_rename(part, path)
            if found is not None:
                return _fill_stars(rename.there, found)
        return None

    def split_rows(self, name: str, rows: int, columns: int) -> tuple[int, ...]:
        rename = next(
            (each for each in self._there(_first_step(name)) if _match_rename(each.there, name) is not None), None
        )
        return (rows,) if rename is None else rename.split(rows, columns, len(rename.parts))

    def _there(self, first: str) -> Sequence[Rename]:
        """The renames that a name of this naming with such a first step may match."""
        return self._by_first[0].get(first, self._by_first[0]["*"])

    def _here(self, first: str) -> Sequence[tuple[Rename, str]]:
        """The same for diffusers' names, with the pattern that may match."""
        return self._by_first[1].get(first, self._by_first[1]["*"])

    @cached_property
    def _by_first(self) -> tuple[Mapping[str, Sequence[Rename]], Mapping[str, Sequence[tuple[Rename, str]]]]:
        """The renames by the first step of their patterns; those that start with a star are in all of them."""
        there = [(_first_step(each.there), each) for each in self.renames]
        here = [(_first_step(part), (each, part)) for each in self.renames for part in each.parts]
        return _group_by_first_step(there), _group_by_first_step(here)


def _first_step(name: str) -> str:
    return name.partition(".")[0]


def _group_by_first_step(all_: Sequence[tuple[str, Item]]) -> dict[str, list[Item]]:
    firsts = {"*", *(first for first, _ in all_)}
    return {first: [each for own, each in all_ if own in (first, "*")] for first in firsts}


@lru_cache(maxsize=4096)
def _compile_rename(pattern: str) -> re.Pattern[str]:
    steps = (r"([^.]+)" if step == "*" else re.escape(step) for step in pattern.split("."))
    return re.compile(r"\.".join(steps) + r"((?:\..+)?)")


def _match_rename(pattern: str, name: str) -> tuple[str, ...] | None:
    """What the stars of a pattern stand for, and what comes behind it."""
    found = _compile_rename(pattern).fullmatch(name)
    return None if found is None else found.groups()


def _fill_stars(pattern: str, found: tuple[str, ...]) -> str:
    *stars, rest = found
    for star in stars:
        pattern = pattern.replace("*", star, 1)
    return pattern + rest
