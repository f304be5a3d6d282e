"""The layers of known models without the models: their names and their shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType

from lycoris.errors import PlanError
from lycoris.layers.geometry import Geometry
from lycoris.models import outline
from lycoris.models.families.family import Architecture
from lycoris.models.families.naming import DIFFUSERS, Naming, Span, Table

Skeleton = Mapping[str, Geometry]
"""Path → geometry of the layer, or of the bare parameter, at that path."""

MIDDLE = Table(())
"""It as a naming: every name is the same."""


@lru_cache(maxsize=64)
def skeleton(name: str) -> Skeleton:
    """The layers of a well-known model, by their paths in diffusers. Raises `ConfigError` for an unknown name."""
    return MappingProxyType(dict(outline.places(outline.load_outline(name))))


def namings(architecture: Architecture) -> dict[str, Naming]:
    """All namings of an architecture; the middle one first, as "diffusers"."""
    return {DIFFUSERS: MIDDLE, **architecture.namings}


def name_layers(layers: Skeleton, naming: Naming) -> Mapping[str, Span]:
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
