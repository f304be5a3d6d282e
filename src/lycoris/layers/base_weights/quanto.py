"""optimum-quanto: layers of its own whose weight, once frozen, is a quantized tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lycoris.layers.base_weights.base import Storage, loaded_class
from lycoris.layers.base_weights.block_scales import spread, widen_scale
from lycoris.ops import rounding

UNFROZEN = "it is quantized again in every forward pass; call optimum.quanto.freeze(model) first"


class Quanto(Storage):
    """Layers of optimum-quanto, readable and writable once they are frozen.

    8-bit: codes and a scale per row, stochastic rounding offered. 4 and 2 bits: quanto's own quantizer, nearest.
    """

    def holds(self, layer: Any) -> bool:
        return isinstance(layer, loaded_class("optimum.quanto", "QModuleMixin")) and layer.weight_qtype is not None

    def label(self, layer: Any) -> str:
        return f"optimum-quanto {layer.weight_qtype.name}{'' if layer.frozen else ', not frozen yet'}"

    def why_unreadable(self, layer: Any) -> str:
        return "" if layer.frozen else UNFROZEN

    def why_unwritable(self, layer: Any) -> str:
        return self.why_unreadable(layer)

    def stochastic(self, layer: Any) -> bool:
        return type(layer.weight) is loaded_class("optimum.quanto", "WeightQBytesTensor")

    def decode(self, layer: Any, weight: Any) -> Tensor:
        dense: Tensor = weight.dequantize()
        return dense

    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        return nn.Parameter(_bytes(layer, dense, generator) if self.stochastic(layer) else _is_packed(layer, dense))


def _bytes(layer: Any, dense: Tensor, generator: torch.Generator | None) -> Any:
    old, codes = layer.weight, layer.weight.qtype
    limit = torch.finfo(codes.dtype).max if codes.is_floating_point else 127
    scale = widen_scale(old._scale, dense, limit)
    exact = dense / spread(scale, dense.shape)
    if codes.is_floating_point:
        data = rounding.to_dtype(exact, codes.dtype, generator)
    else:
        data = rounding.to_integers(exact, -127, 127, generator).to(codes.dtype)
    return type(old)(codes, old.axis, old.size(), old.stride(), data, scale, old.activation_qtype)


def _is_packed(layer: Any, dense: Tensor) -> Any:
    from optimum.quanto import SymmetricOptimizer, quantize_weight

    kind, size = layer.weight.qtype, layer.weight_group_size
    # Scales in the layer's precision, for they set its compute dtype; codes from the exact values.
    rough, shift = dense.to(layer.weight.dtype), None
    if isinstance(layer.optimizer, SymmetricOptimizer):
        scale = layer.optimizer(rough, qtype=kind, axis=0)
    else:
        scale, shift = layer.optimizer(rough, qtype=kind, axis=0, group_size=size)
    activations = layer.activation_qtype
    return quantize_weight(dense, kind, 0, scale, shift=shift, group_size=size, activation_qtype=activations)
