"""Reading a base layer's weight. What cannot be read densely is refused by name, never guessed."""

from __future__ import annotations

from typing import Any

from torch import nn

from lycoris import sharding
from lycoris.algorithm import Affine
from lycoris.errors import AttachError


def read(layer: nn.Module) -> Affine:
    """Weight and bias of a layer as floating-point tensors.

    Raises `AttachError` for weights that are sharded, packed or quantised: reading those is not built yet.
    """
    weight: Any = layer.weight
    bias: Any = layer.bias
    sharding.check_readable(layer, weight)
    if not weight.is_floating_point() or weight.element_size() < 2:
        kind = type(layer).__name__
        raise AttachError(
            f"{kind} holds its weight as {weight.dtype}, which cannot be read densely yet; "
            "use an algorithm that needs only the layer's output (LoRA, LoHa, LoKr), unmerged"
        )
    return Affine(weight, bias)
