"""SDNQ: layers of its own with codes of 1 to 16 bits, and scales, zero points and low-rank corrections beside them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from lycoris.errors import AttachError
from lycoris.layers.base_weights.base import Storage, loaded_class

MARK = "sdnq_dequantizer"
"""Attribute of its layers: what turns their tensors into the dense weight."""


class SDNQ(Storage):
    """Layers of SDNQ, read by its own dequantizer and never written.

    The forward runs without gradients, whatever the settings; in linear layers and convolutions the decoded weight
    stands in for the derivative.
    """

    def holds(self, layer: Any) -> bool:
        return isinstance(layer, loaded_class("sdnq.layers", "SDNQLayer")) and hasattr(layer, MARK)

    def label(self, layer: Any) -> str:
        how = layer.sdnq_dequantizer
        return f"SDNQ {how.weights_dtype}{', quantized activations' if how.use_quantized_matmul else ''}"

    def why_unwritable(self, layer: Any) -> str:
        return "SDNQ would choose all its scales and corrections again"

    def passes_gradient(self, layer: Any) -> bool:
        return False

    def decode(self, layer: Any, weight: Any) -> Tensor:
        from sdnq.utils import get_sdnq_params

        how = layer.sdnq_dequantizer
        parts = get_sdnq_params(layer) | {"weight": weight}
        dense: Tensor = how(**parts, skip_quantized_matmul=how.use_quantized_matmul, skip_compile=True)
        return dense

    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        raise AttachError(self.why_unwritable(layer))
