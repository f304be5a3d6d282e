"""Which base model adapters were made for: its class, the names and shapes of its layers, and signs of its weights."""

from __future__ import annotations

import base64
import binascii
import hashlib
import json
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lycoris.json_io import json_object
from lycoris.layers import sharding
from lycoris.layers.geometry import Geometry
from lycoris.layers.sites import ModelSites

KEY = "lycoris_base"
"""Header key under which a file says it."""
SAMPLES = 8
"""Numbers that are looked at of each weight."""
SAME = 0.995
"""Share of equal signs from which weights are the same: copies in other precisions keep all but the tiniest."""


class Fingerprint(NamedTuple):
    """What tells one base model from another."""

    model: str
    """Name of its class."""
    layers: str
    """Hash over paths and shapes of its layers, in any order."""
    signs: str = ""
    """See `of_weights`."""

    def __str__(self) -> str:
        return json.dumps({name: value for name, value in self._asdict().items() if value})


def of_layers(model: str, layers: Mapping[str, Geometry], signs: str = "") -> Fingerprint:
    """Of a model, by its layers; `model` is the name of its class."""
    lines = sorted(
        f"{path} {geometry.kind} {geometry.stacked_shape(geometry.shape)}" for path, geometry in layers.items()
    )
    return Fingerprint(model, hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16], signs)


def of_weights(model: nn.Module | ModelSites) -> str:
    """The signs of a few evenly spaced numbers of each linear layer and convolution, as base64; a thousand layers take
    as many bytes. Rounding keeps signs, training turns a few, another training half.

    "" for weights that are not at hand: on the meta device, sharded, or stored in few bits.
    """
    found = []
    for _, place in sorted(ModelSites.of(model).items()):
        if place.geometry.kind not in ("linear", "conv"):
            continue
        weight = place.module._parameters.get(place.attribute or "weight")
        if weight is None or weight.is_meta or sharding.is_sharded(weight) or type(weight) is not nn.Parameter:
            return ""
        # Of eight bits, much is rounded to 0.
        if not weight.is_floating_point() or weight.itemsize == 1 or not weight.numel():
            return ""
        flat = weight.detach().flatten()
        found.append((flat[:: max(1, len(flat) // SAMPLES)][:SAMPLES] > 0).cpu())
    return _encode_signs(torch.cat(found)) if found else ""


def agreement(one: str, other: str) -> float | None:
    """The share of signs that are equal; None where there are none, or not as many of each."""
    bits = [_bits(told) for told in (one, other)]
    if not len(bits[0]) or len(bits[0]) != len(bits[1]):
        return None
    return float((bits[0] == bits[1]).double().mean())


def other_layers(header: Mapping[str, str], owner: str, *layers: Mapping[str, Geometry]) -> str:
    """What is to be said where a file tells of a base with other layers than any of these; "" where it does not."""
    made_for = told_by(header)
    if made_for is None or made_for.layers in [of_layers("", each).layers for each in layers]:
        return ""
    return f"it was made for another base, a {made_for.model} of other layers than this {owner}"


def other_weights(header: Mapping[str, str], model: nn.Module | ModelSites) -> str:
    """What is to be said where a file tells of a base with these layers and other weights; "" where it does not."""
    made_for = told_by(header)
    if made_for is None or not made_for.signs:
        return ""
    sites = ModelSites.of(model)
    here = of_layers("", sites.geometries, of_weights(sites))
    share = agreement(made_for.signs, here.signs)
    if made_for.layers != here.layers or share is None or share >= SAME:
        return ""
    return (
        f"it was made for a {made_for.model} with other weights: of those looked at, {share:.0%} have the same sign "
        "here. Of the same model nearly all have, of a variant of it most, of another one half"
    )


def told_by(header: Mapping[str, str]) -> Fingerprint | None:
    """What a file's header says; None when it says nothing that can be read."""
    try:
        told = json_object(header.get(KEY, ""))
        return Fingerprint(str(told["model"]), str(told["layers"]), str(told.get("signs", "")))
    except (ValueError, KeyError):
        return None


def _encode_signs(signs: Tensor) -> str:
    padded = torch.nn.functional.pad(signs.byte(), (0, -len(signs) % 8)).reshape(-1, 8)
    values = (padded * (2 ** torch.arange(8, dtype=torch.uint8))).sum(1, dtype=torch.int64)
    return base64.b64encode(bytes(values.tolist())).decode()


def _bits(told: str) -> Tensor:
    try:
        values = torch.tensor([*base64.b64decode(told, validate=True)], dtype=torch.int64)
    except (binascii.Error, ValueError):
        return torch.zeros(0)
    return (values[:, None] >> torch.arange(8)) & 1
