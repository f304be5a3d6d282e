"""Whose a set of layers may be: which known model, in which naming, by the layers' names and sizes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from lycoris.files.dialects.base import flatten
from lycoris.files.skeleton import Skeleton, name_layers, namings, skeleton
from lycoris.models import outline
from lycoris.models.families import ARCHITECTURES
from lycoris.models.families.family import Architecture

Size = tuple[int, int]
"""(O, I·ΠK) of a layer; 0 for unknown."""


class Fit(NamedTuple):
    """A model that a set of layers may be of."""

    architecture: Architecture
    naming: str
    """"diffusers", or one of the architecture's namings."""
    outline: str | None
    """The known model; None for one whose layers have such names but other sizes or numbers."""
    named: int
    """Layers whose names it has."""
    shaped: int
    """Of those, the ones that also have its layers' sizes."""
    share: float = 0.0
    """How much of what this model has of such layers there is: adapters are mostly on all blocks or on none."""
    whole: float = 0.0
    """How much of all its layers there is."""


def fits(layers: Mapping[str, Size], *, flat: bool = False) -> list[Fit]:
    """Every known model that has some of these names, in every naming, in no order.

    `flat` names have underscores for dots. Names that are like those of an architecture but for their numbers are only
    counted first: which model it may be is looked up where at least half as many are as where most are, and of dotted
    ones a model of unknown size is found too.
    """
    kinds = Counter(map(_kind, layers))
    choices = []
    for each in ARCHITECTURES.values():
        for naming in namings(each):
            there = _names(each.name, naming, flat)
            choices.append((sum(count for kind, count in kinds.items() if kind in there), each, naming))
    least = max((count for count, *_ in choices), default=0) / 2
    found = []
    for count, architecture, naming in choices:
        if count and count >= least:
            if not flat:
                found.append(Fit(architecture, naming, None, count, 0))
            found += _known_fits(layers, architecture, naming, flat)
    return found


def guess(layers: Skeleton) -> list[Fit]:
    """Whose layers these may be, most likely first; among those that fit equally well, the one of which more is there.

    Of several that fit equally well none is told apart by its share: a few layers of Flux.1 are also some of
    HunyuanVideo. `layers` may be all of a model or a few of it. A shape counts as a matrix: a layer (O, I, *K) is O
    rows of I·ΠK.
    """
    found = fits({path: (geometry.out_features, geometry.fan_in) for path, geometry in layers.items()})
    shaped = [each for each in found if each.shaped]
    best: dict[tuple[str, str], int] = {}
    for each in shaped:
        key = each.architecture.name, each.naming
        best[key] = max(best.get(key, 0), weight(each))
    open_ = (each for each in found if each.outline is None)
    sized = [each for each in open_ if weight(each) > best.get((each.architecture.name, each.naming), 0)]
    return sorted(shaped + sized, key=lambda each: (-weight(each), -each.share))


def weight(fit: Fit) -> int:
    """How well a model fits: names and sizes count alike, so at most twice the number of layers."""
    return fit.named + fit.shaped


def candidates(layers: Mapping[str, Size], flat: bool) -> list[Fit]:
    """The known models that have most of these layers, the more complete ones first, each in every naming that fits.

    All that are listed fit equally well.
    """
    found = [each for each in fits(layers, flat=flat) if each.outline is not None]
    best = max(map(_more, found), default=None)
    return sorted((each for each in found if _more(each) == best), key=lambda each: -each.share)


def _more(fit: Fit) -> tuple[int, int]:
    return weight(fit), fit.named


def _known_fits(layers: Mapping[str, Size], architecture: Architecture, naming: str, flat: bool) -> Iterator[Fit]:
    """The known models of an architecture that have some of these names."""
    for model in architecture.outlines:
        there = _layers(architecture.name, naming, model, flat)
        held = [layer for layer in layers if layer in there.sizes]
        if held:
            shaped = sum(_alike(layers[layer], there.sizes[layer]) for layer in held)
            kinds = sum(there.kinds[kind] for kind in set(map(_kind, held)))
            share, whole = len(held) / kinds, len(held) / len(there.sizes)
            yield Fit(architecture, naming, model, len(held), shaped, share, whole)


def _alike(given: Size, there: Size) -> bool:
    return all(one in (0, other) for one, other in zip(given, there, strict=True))


class _Layers(NamedTuple):
    sizes: Mapping[str, Size]
    kinds: Mapping[str, int]
    """How many there are of each kind of name."""


@lru_cache(maxsize=4096)
def _layers(architecture: str, naming: str, model: str, flat: bool) -> _Layers:
    """The layers of a known model in a naming."""
    middle = skeleton(model)
    sizes = {}
    for name, span in name_layers(middle, namings(ARCHITECTURES[architecture])[naming]).items():
        parts = [middle[part] for part in span.parts if part in middle]
        if len(parts) == len(span.parts):
            size = sum(part.out_features for part in parts), parts[0].fan_in
            sizes[flatten(name) if flat else name] = size
    return _Layers(MappingProxyType(sizes), MappingProxyType(Counter(map(_kind, sizes))))


@lru_cache(maxsize=512)
def _names(architecture: str, naming: str, flat: bool) -> frozenset[str]:
    """The kinds of names that the known models of an architecture have in a naming."""
    known = ARCHITECTURES[architecture]
    names = namings(known)[naming]
    paths = {path for model in known.outlines for path in _paths(model)}
    own = (names.home(path) or path for path in paths)
    return frozenset(_kind(flatten(name) if flat else name) for name in own)


_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")


@lru_cache(maxsize=2**16)
def _kind(path: str) -> str:
    """A path with stars for its numbers, dotted or flat."""
    return _NUMBER.sub("*", path)


@lru_cache(maxsize=256)
def _paths(model: str) -> frozenset[str]:
    """Paths in a known model, read off its outline: of modules that are alike, those in the first.

    Not one of each kind: what differs in a number alone may have names of different kinds elsewhere.
    """
    return frozenset(_walk(outline.load_outline(model), ""))


def _walk(told: outline.Outline, path: str) -> Iterator[str]:
    """The paths of an outline; of modules that are alike, those of the first."""
    yield path
    start = f"{path}." if path else ""
    yield from (start + name for name in told.get("parameters", ()))
    for name, child in told.get("children", {}).items():
        first, _, last = name.partition("..")
        yield from _walk(child, start + (first if last.isdigit() else name))
