"""The layers of known models without the models: their names, their shapes, and whose a set of layers may be."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from lycoris import outline
from lycoris.errors import PlanError
from lycoris.files.families import ARCHITECTURES
from lycoris.files.family import Architecture
from lycoris.files.naming import DIFFUSERS, Naming, Span, Table
from lycoris.geometry import Geometry

Skeleton = Mapping[str, Geometry]
"""Path → geometry of the layer, or of the bare parameter, at that path."""

MIDDLE = Table(())
"""It as a naming: every name is the same."""


@lru_cache(maxsize=64)
def skeleton(name: str) -> Skeleton:
    """The layers of a well-known model, by their paths in diffusers. Raises `ConfigError` for an unknown name."""
    return MappingProxyType(dict(outline.places(outline.told(name))))


def namings(architecture: Architecture) -> dict[str, Naming]:
    """All namings of an architecture; the middle one first, as "diffusers"."""
    return {DIFFUSERS: MIDDLE, **architecture.namings}


def named(layers: Skeleton, naming: Naming) -> Mapping[str, Span]:
    """Every name that these layers of diffusers have in a naming, and what it holds."""
    found = {}
    for path in layers:
        name = naming.home(path) or path
        if name not in found:
            found[name] = naming.span(name) or Span((name,))
    return MappingProxyType(found)


def translate(layers: Skeleton, naming: Naming) -> dict[str, Geometry]:
    """The layers of diffusers that the layers of a model in another naming hold.

    Raises `PlanError` when a module's rows cannot be those of its parts.
    """
    found = {}
    for name, geometry in layers.items():
        span = naming.span(name)
        if span is None or len(span.parts) == 1:
            found[name if span is None else span.parts[0]] = geometry
            continue
        rows = geometry.out_features
        sizes = naming.sizes(name, rows, geometry.fan_in)
        if sum(sizes) != rows or min(sizes) <= 0:
            raise PlanError(
                f"{name} is {geometry}, but is to hold the rows of {', '.join(span.parts)}, which would be "
                f"{' + '.join(map(str, sizes))}; the model is of another kind than the naming is for"
            )
        for part, size in zip(span.parts, sizes, strict=True):
            found[part] = replace(geometry, shape=(size, *geometry.shape[1:]))
    return found


class Guess(NamedTuple):
    """What a set of layers may be of."""

    architecture: Architecture
    naming: str
    """"diffusers", or one of the architecture's namings."""
    outline: str | None
    """The known model; None for one whose layers have such names but other shapes or numbers."""
    score: float
    """1 when every name and shape is there, ½ when every name is but no shape."""
    share: float
    """How many of the known model's layers of such kinds are among them: 1 when the adapter leaves out no block."""


def guess(layers: Skeleton) -> list[Guess]:
    """Whose layers these may be, most likely first; among equal scores, the one of which more is there.

    Equal scores are a tie, whatever the shares: a few layers of Flux.1 are also some of HunyuanVideo. `layers` may be
    all of a model or a few of it. A shape counts as a matrix: a layer (O, I, *K) is O rows of I·ΠK.
    """
    kinds = Counter(map(_kind, layers))
    examples = {_kind(name): name for name in layers}
    fits = []
    for architecture in ARCHITECTURES.values():
        known = frozenset[str]().union(*map(_kinds, architecture.outlines))
        for naming in namings(architecture).items():
            parts = {kind: _parts(name, naming[1]) for kind, name in examples.items()}
            if fit := sum(kinds[kind] for kind in kinds if parts[kind] and known.issuperset(map(_kind, parts[kind]))):
                fits.append((fit, architecture, *naming))
    least = max((fit for fit, *_ in fits), default=0) / 2
    found = [
        each
        for fit, architecture, name, naming in fits
        if fit >= least
        for each in _guesses(layers, architecture, name, naming, fit / len(layers) / 2)
    ]
    return sorted(found, key=lambda each: (-each.score, -each.share))


def _guesses(layers: Skeleton, architecture: Architecture, name: str, naming: Naming, fit: float) -> Iterator[Guess]:
    """The known models of an architecture that have something of these layers; itself, if none has more."""
    parts = {each: _parts(each, naming) for each in layers}
    best = 0.0
    for model in architecture.outlines:
        there = skeleton(model)
        held = [each for each in layers if parts[each] and all(part in there for part in parts[each])]
        same = sum(_alike(layers[each], [there[part] for part in parts[each]]) for each in held)
        if same:
            score = (len(held) + same) / len(layers) / 2
            best = max(best, score)
            taken = Counter(_kind(part) for each in held for part in parts[each])
            share = taken.total() / sum(_numbers(model)[kind] for kind in taken)
            yield Guess(architecture, name, model, score, share)
    if best < fit:
        yield Guess(architecture, name, None, fit, 0.0)


def _parts(name: str, naming: Naming) -> tuple[str, ...]:
    """What a name holds; nothing when the naming calls the layer of that name otherwise."""
    span = naming.span(name)
    if span is not None:
        return span.parts
    return (name,) if naming.home(name) is None else ()


def _alike(whole: Geometry, parts: Sequence[Geometry]) -> bool:
    return whole.out_features == sum(part.out_features for part in parts) and whole.fan_in == parts[0].fan_in


_NUMBER = re.compile(r"(?<![^.])\d+(?![^.])")


def _kind(path: str) -> str:
    """A path with stars for its numbers."""
    return _NUMBER.sub("*", path)


@lru_cache(maxsize=64)
def _numbers(model: str) -> Mapping[str, int]:
    """How many layers of each kind a known model has."""
    return MappingProxyType(Counter(map(_kind, skeleton(model))))


@lru_cache(maxsize=64)
def _kinds(model: str) -> frozenset[str]:
    """The kinds of paths in a known model, read off its outline."""
    return frozenset(_walk(outline.told(model), ""))


def _walk(told: outline.Outline, path: str) -> Iterator[str]:
    yield path
    start = f"{path}." if path else ""
    yield from (start + name for name in told.get("parameters", ()))
    for name, child in told.get("children", {}).items():
        yield from _walk(child, start + ("*" if name.replace("..", "").isdigit() else name))
