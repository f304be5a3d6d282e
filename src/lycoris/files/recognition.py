"""Recognize which known model a set of layers belongs to, and in which naming."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from lycoris.files.dialects.base import flatten
from lycoris.files.skeleton import Skeleton, list_namings, load_skeleton, name_layers
from lycoris.models import outline
from lycoris.models.families import ARCHITECTURES
from lycoris.models.families.family import Architecture

LayerSize = tuple[int, int]
"""(O, I·ΠK) of a layer; 0 for unknown."""


class Fit(NamedTuple):
    """A model that a set of layers may belong to, and how well it fits.

    Compare fits by `score_fit`, then `share`.
    """

    architecture: Architecture
    naming: str
    """"diffusers", or one of the architecture's namings."""
    outline: str | None
    """The known model; None for one whose layers have such names but other sizes or another number of blocks."""
    named: int
    """Layers whose names it has."""
    shaped: int
    """Of those, the ones that also have its layers' sizes."""
    share: float = 0.0
    """How much of what this model has of such layers there is: adapters are mostly on all blocks or on none."""
    whole: float = 0.0
    """How much of all its layers there is."""


def find_fits(layers: Mapping[str, LayerSize], *, flat: bool = False) -> list[Fit]:
    """Return every known model that has some of these names, in every naming, in no particular order.

    Args:
        layers: Name → (O, I·ΠK), 0 for unknown.
        flat: Whether names have underscores in place of dots.

    Names are first compared with their numbers masked. Known models are only compared name by name in namings that
    match at least half as many masked names as the best one; for dotted names, a model of unknown size is a result too.
    """
    kinds = Counter(map(_mask_numbers, layers))
    choices = []
    for each in ARCHITECTURES.values():
        for naming in list_namings(each):
            there = _list_name_kinds(each.name, naming, flat)
            choices.append((sum(count for kind, count in kinds.items() if kind in there), each, naming))
    least = max((count for count, *_ in choices), default=0) / 2
    found = []
    for count, architecture, naming in choices:
        if count and count >= least:
            if not flat:
                found.append(Fit(architecture, naming, None, count, 0))
            found += _find_known_fits(layers, architecture, naming, flat)
    return found


def guess_models(layers: Skeleton) -> list[Fit]:
    """Return the models that layers may belong to, the likeliest first.

    `layers` may be all layers of a model or a few. Among models that fit equally well, the one of which more layers are
    there comes first; that alone does not decide, since a few layers of Flux.1 are also some of HunyuanVideo. A shape
    counts as a matrix: a layer (O, I, *K) is O rows of I·ΠK.
    """
    found = find_fits({path: (geometry.out_features, geometry.fan_in) for path, geometry in layers.items()})
    shaped = [each for each in found if each.shaped]
    best: dict[tuple[str, str], int] = {}
    for each in shaped:
        key = each.architecture.name, each.naming
        best[key] = max(best.get(key, 0), score_fit(each))
    open_ = (each for each in found if each.outline is None)
    sized = [each for each in open_ if score_fit(each) > best.get((each.architecture.name, each.naming), 0)]
    return sorted(shaped + sized, key=lambda each: (-score_fit(each), -each.share))


def score_fit(fit: Fit) -> int:
    """Return how well a model fits: matching names plus matching sizes.

    At most twice the number of layers.
    """
    return fit.named + fit.shaped


def find_candidates(layers: Mapping[str, LayerSize], flat: bool) -> list[Fit]:
    """Return the known models that fit these layers best, the more complete ones first.

    All of them have the same score; each is listed in every naming that reaches it. `layers` and `flat` as in
    `find_fits`.
    """
    found = [each for each in find_fits(layers, flat=flat) if each.outline is not None]
    best = max(map(_rank_fit, found), default=None)
    return sorted((each for each in found if _rank_fit(each) == best), key=lambda each: -each.share)


def _rank_fit(fit: Fit) -> tuple[int, int]:
    return score_fit(fit), fit.named


def _find_known_fits(
    layers: Mapping[str, LayerSize], architecture: Architecture, naming: str, flat: bool
) -> Iterator[Fit]:
    """The known models of an architecture that have some of these names."""
    for model in architecture.outlines:
        there = _load_layers(architecture.name, naming, model, flat)
        held = [layer for layer in layers if layer in there.sizes]
        if held:
            shaped = sum(_is_compatible(layers[layer], there.sizes[layer]) for layer in held)
            kinds = sum(there.kinds[kind] for kind in set(map(_mask_numbers, held)))
            share, whole = len(held) / kinds, len(held) / len(there.sizes)
            yield Fit(architecture, naming, model, len(held), shaped, share, whole)


def _is_compatible(given: LayerSize, there: LayerSize) -> bool:
    return all(one in (0, other) for one, other in zip(given, there, strict=True))


class _KnownLayers(NamedTuple):
    sizes: Mapping[str, LayerSize]
    kinds: Mapping[str, int]
    """How many there are of each kind of name."""


@lru_cache(maxsize=4096)
def _load_layers(architecture: str, naming: str, model: str, flat: bool) -> _KnownLayers:
    """The layers of a known model in a naming."""
    middle = load_skeleton(model)
    sizes = {}
    for name, span in name_layers(middle, list_namings(ARCHITECTURES[architecture])[naming]).items():
        parts = [middle[part] for part in span.parts if part in middle]
        if len(parts) == len(span.parts):
            size = sum(part.out_features for part in parts), parts[0].fan_in
            sizes[flatten(name) if flat else name] = size
    return _KnownLayers(MappingProxyType(sizes), MappingProxyType(Counter(map(_mask_numbers, sizes))))


@lru_cache(maxsize=512)
def _list_name_kinds(architecture: str, naming: str, flat: bool) -> frozenset[str]:
    """The kinds of names that the known models of an architecture have in a naming."""
    known = ARCHITECTURES[architecture]
    names = list_namings(known)[naming]
    paths = {path for model in known.outlines for path in _list_paths_once(model)}
    own = (names.find_module(path) or path for path in paths)
    return frozenset(_mask_numbers(flatten(name) if flat else name) for name in own)


_NUMBER = re.compile(r"(?<![^._])\d+(?![^._])")


@lru_cache(maxsize=2**16)
def _mask_numbers(path: str) -> str:
    """A path with stars for its numbers, dotted or flat."""
    return _NUMBER.sub("*", path)


@lru_cache(maxsize=256)
def _list_paths_once(model: str) -> frozenset[str]:
    """Paths in a known model, read off its outline: of modules that are alike, those in the first.

    Not one of each kind: what differs in a number alone may have names of different kinds elsewhere.
    """
    return frozenset(_walk_outline(outline.load_outline(model), ""))


def _walk_outline(node: outline.Outline, path: str) -> Iterator[str]:
    """The paths of an outline; of modules that are alike, those of the first."""
    yield path
    start = f"{path}." if path else ""
    yield from (start + name for name in node.get("parameters", ()))
    for name, child in node.get("children", {}).items():
        first, _, last = name.partition("..")
        yield from _walk_outline(child, start + (first if last.isdigit() else name))
