"""Attributes that scripts read off the layer that a module adapts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lycoris.layers.geometry import Geometry

LAYER_FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "embedding": F.embedding,
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "layernorm": F.layer_norm,
    "groupnorm": F.group_norm,
}
"""Kind of a layer → its function in `torch.nn.functional`."""

_CONVOLUTION: Mapping[str, str] = {name: name for name in ("stride", "padding", "dilation", "groups")}
LAYER_ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "conv1d": _CONVOLUTION,
    "conv2d": _CONVOLUTION,
    "conv3d": _CONVOLUTION,
    "layernorm": {"normalized_shape": "normalized_shape", "eps": "eps"},
    "groupnorm": {"num_groups": "num_groups", "eps": "eps"},
}
"""Kind of a layer → argument of its function → attribute of the layer."""


def name_layer_type(layer: nn.Module, geometry: Geometry) -> str:
    """Return the kind of a layer by lycoris-lora's names.

    These are "linear", "embedding", "conv1d" to "conv3d", "layernorm" and "groupnorm"; every norm without groups is
    "layernorm".
    """
    if geometry.kind == "norm":
        return "groupnorm" if hasattr(layer, "num_groups") else "layernorm"
    return f"conv{len(geometry.kernel)}d" if geometry.kind == "conv" else geometry.kind


def read_arguments(layer: nn.Module, kind: str) -> dict[str, Any]:
    """Return the arguments that a layer passes to its function, other than input, weight and bias.

    `kind` is the result of `name_layer_type`. Empty for linear layers and embeddings.
    """
    return {name: getattr(layer, attribute) for name, attribute in LAYER_ARGUMENTS.get(kind, {}).items()}
