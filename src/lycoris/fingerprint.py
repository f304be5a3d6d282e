"""Which base model adapters were made for: its class, and the names and shapes of its layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from lycoris.geometry import Geometry, sites

KEY = "lycoris_base"
"""Header key under which a file says it."""


class Fingerprint(NamedTuple):
    """What tells one base model from another, without its weights."""

    model: str
    """Name of its class."""
    layers: str
    """Hash over paths and shapes of its layers, in any order."""

    def __str__(self) -> str:
        return json.dumps(self._asdict())


def of_model(model: nn.Module) -> Fingerprint:
    """Of a model; one on the meta device serves."""
    return of_layers(type(model).__name__, {place.path: place.geometry for place in sites(model)})


def of_layers(model: str, layers: Mapping[str, Geometry]) -> Fingerprint:
    """The same from its layers."""
    lines = sorted(f"{path} {geometry.kind} {geometry.stacked(geometry.shape)}" for path, geometry in layers.items())
    return Fingerprint(model, hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16])


def told_by(header: Mapping[str, str]) -> Fingerprint | None:
    """What a file's header says; None when it says nothing that can be read."""
    try:
        told = json.loads(header.get(KEY, ""))
        return Fingerprint(str(told["model"]), str(told["layers"]))
    except (ValueError, TypeError, KeyError):
        return None
