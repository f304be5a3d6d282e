"""Which base model adapters were made for: its class, and the names and shapes of its layers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

from lycoris.geometry import Geometry
from lycoris.jsons import json_object

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


def of_layers(model: str, layers: Mapping[str, Geometry]) -> Fingerprint:
    """Of a model, by its layers; `model` is the name of its class."""
    lines = sorted(f"{path} {geometry.kind} {geometry.stacked(geometry.shape)}" for path, geometry in layers.items())
    return Fingerprint(model, hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16])


def told_by(header: Mapping[str, str]) -> Fingerprint | None:
    """What a file's header says; None when it says nothing that can be read."""
    try:
        told = json_object(header.get(KEY, ""))
        return Fingerprint(str(told["model"]), str(told["layers"]))
    except (ValueError, KeyError):
        return None
