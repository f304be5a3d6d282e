"""Names and shapes of the layers of known models, without building the models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from types import MappingProxyType

from lycoris.errors import PlanError
from lycoris.layers.geometry import Geometry
from lycoris.models import outline
from lycoris.models.families.family import Architecture
from lycoris.models.families.naming import DIFFUSERS_NAMING, Naming, Span, Table

Skeleton = Mapping[str, Geometry]
"""Path → geometry of the layer, or of the bare parameter, at that path."""

IDENTITY_NAMING = Table(())
"""It as a naming: every name is the same."""


@lru_cache(maxsize=64)
def load_skeleton(name: str) -> Skeleton:
    """Return the layers of a known model, by their paths in diffusers.

    Cached. Raises `ConfigError` for an unknown name, with the nearest that exists.
    """
    return MappingProxyType(dict(outline.iterate_layers(outline.load_outline(name))))


def list_namings(architecture: Architecture) -> dict[str, Naming]:
    """Return all namings of an architecture by name, with diffusers' own first.

    Diffusers' own is the identity: every name stands for itself.
    """
    return {DIFFUSERS_NAMING: IDENTITY_NAMING, **architecture.namings}


def name_layers(layers: Skeleton, naming: Naming) -> Mapping[str, Span]:
    """Return every name that these layers of diffusers have in a naming.

    Args:
        layers: By their paths in diffusers.

    Returns:
        Name in the naming → the layers whose rows the module of that name holds. A span may name parts that are not in
            `layers`.
    """
    found = {}
    for path in layers:
        name = naming.find_module(path) or path
        if name not in found:
            found[name] = naming.find_span(name) or Span((name,))
    return MappingProxyType(found)


def translate_layers(layers: Skeleton, naming: Naming) -> dict[str, Geometry]:
    """Return the layers of diffusers that the layers of a model in another naming hold.

    The inverse of `name_layers`: a fused layer becomes one layer for each of its parts, with its share of the rows.

    Raises:
        PlanError: The rows of a module cannot be those of its parts.
    """
    found = {}
    for name, geometry in layers.items():
        span = naming.find_span(name)
        if span is None or len(span.parts) == 1:
            found[name if span is None else span.parts[0]] = geometry
            continue
        rows = geometry.out_features
        sizes = naming.split_rows(name, rows, geometry.fan_in)
        if sum(sizes) != rows or min(sizes) <= 0:
            raise PlanError(
                f"{name} is {geometry}, but is to hold the rows of {', '.join(span.parts)}, which would be "
                f"{' + '.join(map(str, sizes))}; the model is of another kind than the naming is for"
            )
        for part, size in zip(span.parts, sizes, strict=True):
            found[part] = replace(geometry, shape=(size, *geometry.shape[1:]))
    return found
