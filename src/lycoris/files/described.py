"""The layers of a base that is not a known model, stored in a file's header so that the file explains itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from lycoris.adapters.bundle import Base
from lycoris.files.layout import NamedLayout
from lycoris.files.recognition import guess_models
from lycoris.json_io import json_object
from lycoris.layers.geometry import Geometry, Kind, Norm
from lycoris.models import fingerprint

DESCRIPTION_KEY = "lycoris_layers"
"""Header key under which they are."""
LONGEST_DESCRIPTION = 500_000
"""Characters; the description of a base with more layers than that is left out."""
LARGEST_DIMENSION = 2**31
FIELD_CHOICES: Mapping[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "padding": ("same", "valid"),
    "padding_mode": ("zeros", "reflect", "replicate", "circular"),
}
"""Field → the words that it may be."""
GEOMETRY_FIELDS = tuple(each.name for each in fields(Geometry) if each.name not in ("kind", "shape"))
"""What a description has of a layer next to its kind and its shape, where it is not the usual."""


def encode_base_layers(base: Base) -> str | None:
    """Encode a base's layers as JSON, grouping layers that are alike.

    Returns None for a known model, which needs no description, and for one whose description would exceed
    `LONGEST_DESCRIPTION` characters.
    """
    if _is_known_base(base):
        return None
    groups: dict[str, list[str]] = {}
    for path, geometry in base.layers.items():
        own = {name: getattr(geometry, name) for name in GEOMETRY_FIELDS}
        usual = Geometry(kind=geometry.kind, shape=geometry.shape)
        entry = {"kind": geometry.kind, "shape": geometry.shape}
        entry |= {name: value for name, value in own.items() if value != getattr(usual, name)}
        groups.setdefault(json.dumps(entry), []).append(path)
    text = json.dumps({"layers": [json.loads(entry) | {"at": paths} for entry, paths in groups.items()]})
    return text if len(text) <= LONGEST_DESCRIPTION else None


def decode_base(header: Mapping[str, str]) -> NamedLayout | None:
    """Return the base that a header describes.

    The header comes from anywhere, so each field is checked, and the layers must have the hash that the header's
    fingerprint has.

    Returns:
        None if the header has no description, or one that is damaged or does not match its fingerprint.
    """
    made_for, text = fingerprint.read_fingerprint(header), header.get(DESCRIPTION_KEY, "")
    if made_for is None or not 0 < len(text) <= LONGEST_DESCRIPTION:
        return None
    try:
        layers = {path: geometry for each in json_object(text)["layers"] for path, geometry in _decode_group(each)}
    except (ValueError, KeyError, TypeError):
        return None
    if fingerprint.fingerprint_layers("", layers).layers != made_for.layers:
        return None
    return NamedLayout.from_layers(made_for.model, layers)


def _decode_group(entry: Mapping[str, Any]) -> list[tuple[str, Geometry]]:
    """Raises `ValueError`, `KeyError` or `TypeError` for what describes no layer."""
    kind, shape, paths = entry["kind"], tuple(entry["shape"]), entry["at"]
    own = {name: _check_field(name, entry[name], len(shape) - 2) for name in GEOMETRY_FIELDS if name in entry}
    usual = kind in get_args(Kind) and len(shape) >= (1 if kind == "norm" else 2)
    if not usual or not all(_is_size(number) for number in shape) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"no layer: {entry!r:.80}")
    geometry = Geometry(kind=kind, shape=shape, **own)
    if kind == "conv" and not len(geometry.stride) == len(geometry.dilation) == len(geometry.kernel):
        raise ValueError(f"no convolution: {entry!r:.80}")
    return [(path, geometry) for path in paths]


def _check_field(name: str, value: Any, kernel: int) -> Any:
    """A field of a layer, checked. Raises `ValueError` for what it cannot be."""
    if isinstance(value, list):
        wanted = {"stride": kernel, "dilation": kernel, "padding": kernel, "pad": 2 * kernel}.get(name, -1)
        good = len(value) in (0, wanted) and all(type(each) is int and 0 <= each < LARGEST_DIMENSION for each in value)
    elif name == "eps":
        good = value is None or isinstance(value, float)
    elif name in ("groups", "stack"):
        good = _is_size(value)
    elif name in ("has_bias", "transposed"):
        good = isinstance(value, bool)
    else:
        good = name in FIELD_CHOICES and value in FIELD_CHOICES[name]
    if not good:
        raise ValueError(f"{name} cannot be {value!r:.80}")
    return tuple(value) if isinstance(value, list) else value


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 < number < LARGEST_DIMENSION


def _is_known_base(base: Base) -> bool:
    own = fingerprint.fingerprint_layers("", base.layers).layers
    fits = [fit for fit in guess_models(base.layers) if fit.outline is not None]
    known = (
        NamedLayout.from_outline(fit.architecture, str(fit.outline)).convert_to_naming(fit.naming) for fit in fits[:4]
    )
    return any(fingerprint.fingerprint_layers("", each.layers).layers == own for each in known)
