"""`merge_weights_to_tensor`: a file's update added to one weight."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet, Sequence
from typing import Any

import torch
from torch import Tensor

from lycoris.algorithms import conversion
from lycoris.algorithms.base import Entry, interpolate
from lycoris.algorithms.tensors import read_tensors
from lycoris.compat.functional.layer import build_geometry
from lycoris.layers.geometry import Affine


@torch.no_grad()
def merge_into_weight(
    marks: Sequence[str],
    model_weight: Tensor,
    lora_name: str,
    lora_sd: Mapping[str, Tensor],
    lora_weight_keys: MutableSet[str],
    multiplier: float,
    calc_device: Any,
) -> Tensor:
    """Return a weight with a file's update added, computed in float32 and rounded once to the weight's dtype.

    Args:
        marks: Tensor names, of which any one shows that the file has an adapter for the layer. Without one, the weight
            itself is returned.
        lora_name: Prefix of the layer's tensors in `lora_sd`.
        lora_weight_keys: Names still to be merged; those of this layer are removed.
        calc_device: Device for the computation and the result.

    Raises `FileError` for tensors that do not match the weight's shape.
    """
    if not any(f"{lora_name}.{mark}" in lora_weight_keys for mark in marks):
        return model_weight
    keys = {key for key in lora_weight_keys if key.startswith(f"{lora_name}.")}
    tensors = {key.removeprefix(f"{lora_name}."): lora_sd[key].to(calc_device) for key in keys}
    g = build_geometry(model_weight.shape)
    algorithm, values = read_tensors(tensors, g, lora_name)
    full = torch.promote_types(model_weight.dtype, torch.float32) if model_weight.itemsize > 1 else torch.float32
    base = Affine(model_weight.to(calc_device, full), None)
    changed = conversion.adapt_affine(Entry(algorithm, g, values), base)
    for key in keys:
        lora_weight_keys.discard(key)
    return interpolate(base, changed, multiplier).weight.to(model_weight.dtype)
