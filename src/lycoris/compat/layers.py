"""What scripts read off the layer that a module is for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from lycoris.layers.geometry import Geometry

FUNCTIONS: Mapping[str, Callable[..., Tensor]] = {
    "linear": F.linear,
    "embedding": F.embedding,
    "conv1d": F.conv1d,
    "conv2d": F.conv2d,
    "conv3d": F.conv3d,
    "layernorm": F.layer_norm,
    "groupnorm": F.group_norm,
}
"""Kind of a layer → the function of torch that it is."""

_CONVOLUTION: Mapping[str, str] = {name: name for name in ("stride", "padding", "dilation", "groups")}
ARGUMENTS: Mapping[str, Mapping[str, str]] = {
    "conv1d": _CONVOLUTION,
    "conv2d": _CONVOLUTION,
    "conv3d": _CONVOLUTION,
    "layernorm": {"normalized_shape": "normalized_shape", "eps": "eps"},
    "groupnorm": {"num_groups": "num_groups", "eps": "eps"},
}
"""Kind of a layer → argument of its function → attribute of the layer."""


def type_name(layer: nn.Module, geometry: Geometry) -> str:
    """The kind of a layer by the names that scripts know."""
    if geometry.kind == "norm":
        return "groupnorm" if hasattr(layer, "num_groups") else "layernorm"
    return f"conv{len(geometry.kernel)}d" if geometry.kind == "conv" else geometry.kind


def arguments(layer: nn.Module, kind: str) -> dict[str, Any]:
    """What a layer gives its function beside input, weight and bias."""
    return {name: getattr(layer, attribute) for name, attribute in ARGUMENTS.get(kind, {}).items()}
