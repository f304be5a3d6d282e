"""GGUF files as diffusers loads them: bytes of blocks, dequantized in every forward pass."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lycoris.layers.base_weights.base import Storage, loaded_class


class GGUF(Storage):
    """`GGUFLinear`: blocks of bytes that are dequantized in every forward pass.

    Writing goes through the gguf package, which quantizes to some of its types only, and to nearest.
    """

    def holds(self, layer: Any) -> bool:
        return isinstance(layer.weight, loaded_class("diffusers.quantizers.gguf.utils", "GGUFParameter"))

    def label(self, layer: Any) -> str:
        return f"GGUF {layer.weight.quant_type.name}"

    def why_unwritable(self, layer: Any) -> str:
        import gguf
        import numpy as np

        kind = layer.weight.quant_type
        try:
            gguf.quants.quantize(np.zeros((1, gguf.GGML_QUANT_SIZES[kind][0]), np.float32), kind)
        except NotImplementedError:
            return f"the gguf package reads {kind.name} and cannot write it"
        return ""

    def decode(self, layer: Any, weight: Any) -> Tensor:
        from diffusers.quantizers.gguf.utils import dequantize_gguf_tensor

        dense: Tensor = dequantize_gguf_tensor(weight)
        return dense.to(layer.compute_dtype or torch.float32)

    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        import gguf

        kind = layer.weight.quant_type
        data = torch.from_numpy(gguf.quants.quantize(dense.float().cpu().numpy(), kind))
        made: nn.Parameter = type(layer.weight)(data.to(layer.weight.device), requires_grad=False, quant_type=kind)
        return made
