"""torchao: a plain layer whose weight is a tensor subclass that keeps codes and scales."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lycoris.layers.base_weights.base import Storage, loaded_class
from lycoris.layers.base_weights.block_scales import spread, widen_scale
from lycoris.ops import rounding


class TorchAO(Storage):
    """A weight of any torchao class: adapters train beside all of them.

    Written are `Int8Tensor`, `Float8Tensor` and `IntxUnpackedToInt8Tensor` with whole zero points. Products with
    quantized activations pass no gradient.
    """

    def holds(self, layer: Any) -> bool:
        return isinstance(layer.weight, loaded_class("torchao.utils", "TorchAOBaseTensor"))

    def label(self, layer: Any) -> str:
        codes = str(getattr(layer.weight, "target_dtype", "")).removeprefix("torch.")
        return f"torchao {type(layer.weight).__name__} {codes}".rstrip()

    def why_unreadable(self, layer: Any) -> str:
        known = type(layer.weight).dequantize is not Tensor.dequantize
        return "" if known else f"torchao has no dequantize() for {type(layer.weight).__name__}"

    def why_unwritable(self, layer: Any) -> str:
        weight = layer.weight
        names = ("Int8Tensor", "Float8Tensor", "IntxUnpackedToInt8Tensor")
        if not isinstance(weight, tuple(loaded_class("torchao.quantization", name) for name in names)):
            return f"only {', '.join(names)} can be written again"
        if str(getattr(weight, "target_dtype", "")) == "torch.int1":
            return "one bit has no grid to round to"
        if getattr(weight, "act_pre_scale", None) is not None:
            return "its columns were scaled for the activations"
        zero = getattr(weight, "zero_point", None)
        return "its zero points are not whole numbers" if zero is not None and zero.is_floating_point() else ""

    def stochastic(self, layer: Any) -> bool:
        return True

    def passes_gradient(self, layer: Any) -> bool:
        # torchao gives no derivative to products with quantized activations, nor to packed int4 on CPU.
        quantized = (getattr(layer.weight, name, None) for name in ("act_quant_kwargs", "activation_quantization"))
        return not self.why_unreadable(layer) and all(given is None for given in quantized)

    def decode(self, layer: Any, weight: Any) -> Tensor:
        dense: Tensor = weight.dequantize()
        return dense

    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        old = layer.weight
        codes, zero = old.qdata, getattr(old, "zero_point", None)
        floating = codes.is_floating_point()
        bits = 8 if floating else int(str(getattr(old, "target_dtype", torch.int8)).removeprefix("torch.int"))
        bits -= bool(getattr(old, "reduce_range", False))
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        # An asymmetric grid is kept: to move its zero points would move every other value too.
        symmetric = zero is None or not bool(zero.any())
        limit = torch.finfo(codes.dtype).max if floating else high
        reach = dense if floating else torch.where(dense < 0, dense * (high / -low), dense)
        scale = widen_scale(old.scale, reach, limit) if symmetric else old.scale
        exact = dense / spread(scale, dense.shape)
        if floating:
            new = rounding.to_dtype(exact, codes.dtype, generator)
        else:
            shift = 0 if zero is None else spread(zero, dense.shape)
            new = rounding.to_integers(exact + shift, low, high, generator).to(codes.dtype)
        names, attributes = old.__tensor_flatten__()
        parts = {name: getattr(old, name) for name in names} | {"qdata": new, "scale": scale}
        made = type(old).__tensor_unflatten__(parts, attributes, None, None)
        return nn.Parameter(made, requires_grad=False)
