"""Identify the base model that adapters were made for, by its class, layers and the signs of some weights."""

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

FINGERPRINT_KEY = "lycoris_base"
"""Header key under which a file says it."""
SIGNS_PER_WEIGHT = 8
"""Numbers that are looked at of each weight."""
SAME_WEIGHTS_SHARE = 0.995
"""Share of equal signs from which weights are the same: copies in other precisions keep all but the tiniest."""


class Fingerprint(NamedTuple):
    """What distinguishes one base model from another.

    `str` encodes it as JSON, as it is stored in headers.
    """

    model: str
    """Name of its class."""
    layers: str
    """Hash over paths and shapes of its layers, in any order."""
    signs: str = ""
    """See `sample_signs`."""

    def __str__(self) -> str:
        return json.dumps({name: value for name, value in self._asdict().items() if value})


def fingerprint_layers(model: str, layers: Mapping[str, Geometry], signs: str = "") -> Fingerprint:
    """Make the fingerprint of a model from its layers.

    Args:
        model: The name of its class.
        layers: By path; their order does not matter.
        signs: See `sample_signs`.
    """
    lines = sorted(
        f"{path} {geometry.kind} {geometry.stacked_shape(geometry.shape)}" for path, geometry in layers.items()
    )
    return Fingerprint(model, hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16], signs)


def sample_signs(model: nn.Module | ModelSites) -> str:
    """Return the signs of a few evenly spaced weights of each linear layer and convolution, as base64.

    One byte per layer. Rounding preserves signs, fine-tuning flips a few, training from scratch half of them. "" if
    weights are not available: on the meta device, sharded, or quantized.
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
        found.append((flat[:: max(1, len(flat) // SIGNS_PER_WEIGHT)][:SIGNS_PER_WEIGHT] > 0).cpu())
    return _encode_signs(torch.cat(found)) if found else ""


def compare_signs(one: str, other: str) -> float | None:
    """Return the share of signs that two samples have in common.

    None if either is empty or damaged, or they have different lengths.
    """
    bits = [_decode_signs(text) for text in (one, other)]
    if not len(bits[0]) or len(bits[0]) != len(bits[1]):
        return None
    return float((bits[0] == bits[1]).double().mean())


def describe_other_layers(header: Mapping[str, str], owner: str, *layers: Mapping[str, Geometry]) -> str:
    """Return what to say about a file made for a base with other layers; "" if it was not.

    Args:
        header: The file's header.
        owner: What to call the model in the message.
        layers: The model's layers, in one or several namings. One that matches is enough.
    """
    made_for = read_fingerprint(header)
    if made_for is None or made_for.layers in [fingerprint_layers("", each).layers for each in layers]:
        return ""
    return f"it was made for another base, a {made_for.model} of other layers than this {owner}"


def describe_other_weights(header: Mapping[str, str], model: nn.Module | ModelSites) -> str:
    """Return what to say about a file made for a base with the same layers but other weights; "" if it was not.

    "" also if either has no signs to compare.
    """
    made_for = read_fingerprint(header)
    if made_for is None or not made_for.signs:
        return ""
    sites = ModelSites.of(model)
    here = fingerprint_layers("", sites.geometries, sample_signs(sites))
    share = compare_signs(made_for.signs, here.signs)
    if made_for.layers != here.layers or share is None or share >= SAME_WEIGHTS_SHARE:
        return ""
    return (
        f"it was made for a {made_for.model} with other weights: of those looked at, {share:.0%} have the same sign "
        "here. Of the same model nearly all have, of a variant of it most, of another one half"
    )


def read_fingerprint(header: Mapping[str, str]) -> Fingerprint | None:
    """Return the fingerprint in a file's header; None if there is none or it cannot be read."""
    try:
        stored = json_object(header.get(FINGERPRINT_KEY, ""))
        return Fingerprint(str(stored["model"]), str(stored["layers"]), str(stored.get("signs", "")))
    except (ValueError, KeyError):
        return None


def _encode_signs(signs: Tensor) -> str:
    padded = torch.nn.functional.pad(signs.byte(), (0, -len(signs) % 8)).reshape(-1, 8)
    values = (padded * (2 ** torch.arange(8, dtype=torch.uint8))).sum(1, dtype=torch.int64)
    return base64.b64encode(bytes(values.tolist())).decode()


def _decode_signs(text: str) -> Tensor:
    try:
        values = torch.tensor([*base64.b64decode(text, validate=True)], dtype=torch.int64)
    except (binascii.Error, ValueError):
        return torch.zeros(0)
    return (values[:, None] >> torch.arange(8)) & 1
