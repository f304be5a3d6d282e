"""`merge_weights_to_tensor`: one weight with a file's change to it."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet, Sequence
from typing import Any

import torch
from torch import Tensor

from lycoris.algorithms import conversion
from lycoris.algorithms.base import Entry, interpolate
from lycoris.algorithms.tensors import read_tensors
from lycoris.compat.functional.layer import geometry
from lycoris.layers.geometry import Affine


@torch.no_grad()
def merge_weight(
    marks: Sequence[str],
    model_weight: Tensor,
    lora_name: str,
    lora_sd: Mapping[str, Tensor],
    lora_weight_keys: MutableSet[str],
    multiplier: float,
    calc_device: Any,
) -> Tensor:
    """A weight with a file's change to it added, in float32, rounded once; its keys are taken from `lora_weight_keys`.

    Unchanged when the file has nothing for it; `marks` are the tensor names of which one tells. Raises `FileError` for
    tensors that do not fit.
    """
    if not any(f"{lora_name}.{mark}" in lora_weight_keys for mark in marks):
        return model_weight
    keys = {key for key in lora_weight_keys if key.startswith(f"{lora_name}.")}
    tensors = {key.removeprefix(f"{lora_name}."): lora_sd[key].to(calc_device) for key in keys}
    g = geometry(model_weight.shape)
    algorithm, values = read_tensors(tensors, g, lora_name)
    full = torch.promote_types(model_weight.dtype, torch.float32) if model_weight.itemsize > 1 else torch.float32
    base = Affine(model_weight.to(calc_device, full), None)
    changed = conversion.adapt_affine(Entry(algorithm, g, values), base)
    for key in keys:
        lora_weight_keys.discard(key)
    return interpolate(base, changed, multiplier).weight.to(model_weight.dtype)
