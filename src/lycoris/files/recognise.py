"""Whose a set of layers may be: which known model, in which naming, by the layers' names and sizes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from lycoris import outline
from lycoris.files.dialect import flatten
from lycoris.files.families import ARCHITECTURES
from lycoris.files.family import Architecture
from lycoris.files.naming import Naming
from lycoris.files.skeleton import Skeleton, named, namings, skeleton

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

    `flat` names have underscores for dots. Dotted ones are compared with patterns too, so that a model of unknown size
    is found. Models are only looked at one by one where the layers' names but for their numbers are like theirs.
    """
    choices = [(each, *naming) for each in ARCHITECTURES.values() for naming in namings(each).items()]
    if flat:
        counts = Counter(map(_kind, layers))
        alike = [(sum(counts[kind] for kind in counts.keys() & _flat_kinds(a.name, n)), a, n) for a, n, _ in choices]
        least = max((count for count, *_ in alike), default=0) / 2
        return [
            fit
            for count, each, naming in alike
            if count and count >= least
            for fit in _known(layers, each, naming, flat)
        ]
    patterned = [(_patterned(layers, each, naming), each, name) for each, name, naming in choices]
    least = max((count for count, *_ in patterned), default=0) / 2
    found = []
    for count, architecture, naming in patterned:
        if count and count >= least:
            found += [Fit(architecture, naming, None, count, 0), *_known(layers, architecture, naming, flat)]
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
    """The known models that have most of these layers, the more complete ones first; each in the naming that fits best.

    All that are listed fit equally well.
    """
    found: dict[str, Fit] = {}
    for each in fits(layers, flat=flat):
        if each.outline is not None and (each.outline not in found or _more(each) > _more(found[each.outline])):
            found[each.outline] = each
    best = max(map(_more, found.values()), default=None)
    return sorted((each for each in found.values() if _more(each) == best), key=lambda each: -each.share)


def _more(fit: Fit) -> tuple[int, int]:
    return weight(fit), fit.named


def _known(layers: Mapping[str, Size], architecture: Architecture, naming: str, flat: bool) -> Iterator[Fit]:
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
    for name, span in named(middle, namings(ARCHITECTURES[architecture])[naming]).items():
        parts = [middle[part] for part in span.parts if part in middle]
        if len(parts) == len(span.parts):
            size = sum(part.out_features for part in parts), parts[0].fan_in
            sizes[flatten(name) if flat else name] = size
    return _Layers(MappingProxyType(sizes), MappingProxyType(Counter(map(_kind, sizes))))


def _patterned(layers: Mapping[str, Size], architecture: Architecture, naming: Naming) -> int:
    """How many dotted names are like those of an architecture but for their numbers."""
    known = frozenset[str]().union(*map(_kinds, architecture.outlines))
    counts = Counter(map(_kind, layers))
    examples = {_kind(layer): layer for layer in layers}
    return sum(
        counts[kind] for kind, layer in examples.items() if (parts := _parts(layer, naming)) and known.issuperset(parts)
    )


def _parts(name: str, naming: Naming) -> list[str]:
    """The kinds of layers that a name holds; none when the naming calls the layer of that name otherwise."""
    span = naming.span(name)
    if span is not None:
        return [_kind(part) for part in span.parts]
    return [_kind(name)] if naming.home(name) is None else []


_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")


@lru_cache(maxsize=2**16)
def _kind(path: str) -> str:
    """A path with stars for its numbers, dotted or flat."""
    return _NUMBER.sub("*", path)


@lru_cache(maxsize=1024)
def _flat_kinds(architecture: str, naming: str) -> frozenset[str]:
    """The kinds of names with underscores that a naming has for an architecture, read off its outlines."""
    own = namings(ARCHITECTURES[architecture])[naming]
    return frozenset(
        _kind(flatten(own.home(path) or path))
        for model in ARCHITECTURES[architecture].outlines
        for path in _firsts(outline.told(model), "")
    )


def _firsts(told: outline.Outline, path: str) -> Iterator[str]:
    """The paths in a model, of modules that are alike the first."""
    yield path
    start = f"{path}." if path else ""
    yield from (start + name for name in told.get("parameters", ()))
    for name, child in told.get("children", {}).items():
        yield from _firsts(child, start + name.partition("..")[0])


@lru_cache(maxsize=512)
def _kinds(model: str) -> frozenset[str]:
    """The kinds of paths in a known model, read off its outline."""
    return frozenset(_walk(outline.told(model), ""))


def _walk(told: outline.Outline, path: str) -> Iterator[str]:
    yield _kind(path)
    start = f"{path}." if path else ""
    yield from (_kind(start + name) for name in told.get("parameters", ()))
    for name, child in told.get("children", {}).items():
        yield from _walk(child, start + ("*" if name.replace("..", "").isdigit() else name))
