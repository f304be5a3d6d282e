"""The layers of a base that is no known model, as a file's header has them: with those the file explains itself."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from lycoris.adapters.bundle import Base
from lycoris.files.layout import Layout
from lycoris.files.recognition import guess
from lycoris.json_io import json_object
from lycoris.layers.geometry import Geometry, Kind, Norm
from lycoris.models import fingerprint

KEY = "lycoris_layers"
"""Header key under which they are."""
LONGEST = 500_000
"""Characters; the description of a base with more layers than that is left out."""
LARGEST = 2**31
WORDS: Mapping[str, tuple[str, ...]] = {
    "norm": get_args(Norm),
    "padding": ("same", "valid"),
    "padding_mode": ("zeros", "reflect", "replicate", "circular"),
}
"""Field → the words that it may be."""
FIELDS = tuple(each.name for each in fields(Geometry) if each.name not in ("kind", "shape"))
"""What a description has of a layer beside its kind and its shape, where it is not the usual."""


def describe(base: Base) -> str | None:
    """A base's layers as JSON, layers that are alike together; None for a known model's, or where they are too many."""
    if _is_known(base):
        return None
    groups: dict[str, list[str]] = {}
    for path, geometry in base.layers.items():
        own = {name: getattr(geometry, name) for name in FIELDS}
        usual = Geometry(kind=geometry.kind, shape=geometry.shape)
        told = {"kind": geometry.kind, "shape": geometry.shape}
        told |= {name: value for name, value in own.items() if value != getattr(usual, name)}
        groups.setdefault(json.dumps(told), []).append(path)
    text = json.dumps({"layers": [json.loads(told) | {"at": paths} for told, paths in groups.items()]})
    return text if len(text) <= LONGEST else None


def describe_base(header: Mapping[str, str]) -> Layout | None:
    """The base that a header describes; None where it does not, or where that is not what its fingerprint is of."""
    made_for, text = fingerprint.told_by(header), header.get(KEY, "")
    if made_for is None or not 0 < len(text) <= LONGEST:
        return None
    try:
        layers = {path: geometry for each in json_object(text)["layers"] for path, geometry in _group(each)}
    except (ValueError, KeyError, TypeError):
        return None
    if fingerprint.of_layers("", layers).layers != made_for.layers:
        return None
    return Layout.all_of(made_for.model, layers)


def _group(told: Mapping[str, Any]) -> list[tuple[str, Geometry]]:
    """Raises `ValueError`, `KeyError` or `TypeError` for what describes no layer."""
    kind, shape, paths = told["kind"], tuple(told["shape"]), told["at"]
    own = {name: _value(name, told[name], len(shape) - 2) for name in FIELDS if name in told}
    usual = kind in get_args(Kind) and len(shape) >= (1 if kind == "norm" else 2)
    if not usual or not all(_is_size(number) for number in shape) or not all(isinstance(path, str) for path in paths):
        raise ValueError(f"no layer: {told!r:.80}")
    geometry = Geometry(kind=kind, shape=shape, **own)
    if kind == "conv" and not len(geometry.stride) == len(geometry.dilation) == len(geometry.kernel):
        raise ValueError(f"no convolution: {told!r:.80}")
    return [(path, geometry) for path in paths]


def _value(name: str, value: Any, kernel: int) -> Any:
    """A field of a layer, checked. Raises `ValueError` for what it cannot be."""
    if isinstance(value, list):
        wanted = {"stride": kernel, "dilation": kernel, "padding": kernel, "pad": 2 * kernel}.get(name, -1)
        good = len(value) in (0, wanted) and all(type(each) is int and 0 <= each < LARGEST for each in value)
    elif name == "eps":
        good = value is None or isinstance(value, float)
    elif name in ("groups", "stack"):
        good = _is_size(value)
    elif name in ("has_bias", "transposed"):
        good = isinstance(value, bool)
    else:
        good = name in WORDS and value in WORDS[name]
    if not good:
        raise ValueError(f"{name} cannot be {value!r:.80}")
    return tuple(value) if isinstance(value, list) else value


def _is_size(number: Any) -> bool:
    return type(number) is int and 0 < number < LARGEST


def _is_known(base: Base) -> bool:
    own = fingerprint.of_layers("", base.layers).layers
    fits = [fit for fit in guess(base.layers) if fit.outline is not None]
    known = (Layout.from_outline(fit.architecture, str(fit.outline)).in_naming(fit.naming) for fit in fits[:4])
    return any(fingerprint.of_layers("", each.layers).layers == own for each in known)
