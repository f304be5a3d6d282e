"""bitsandbytes: int8 with a scale per row (LLM.int8), and 4-bit codes with a scale per block (QLoRA)."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from lycoris.layers.base_weights.base import Storage, loaded_class
from lycoris.layers.base_weights.block_scales import widen_scale
from lycoris.ops import rounding


class Int8(Storage):
    """`Linear8bitLt`: W[o, i] = SCB[o] / 127 · CB[o, i].

    Written with stochastic rounding or to nearest. Not writable before it is quantized, nor with `has_fp16_weights`.
    """

    def holds(self, layer: Any) -> bool:
        return isinstance(layer, loaded_class("bitsandbytes.nn", "Linear8bitLt"))

    def label(self, layer: Any) -> str:
        return "bitsandbytes int8" if _is_packed(layer.weight) else "bitsandbytes int8, not quantized yet"

    def why_unwritable(self, layer: Any) -> str:
        if layer.state.has_fp16_weights:
            return "with has_fp16_weights it is rounded again in every forward pass"
        return (
            "" if _is_packed(layer.weight) else "it is quantized when the layer is moved to its device; do that first"
        )

    def stochastic(self, layer: Any) -> bool:
        return True

    def decode(self, layer: Any, weight: Any) -> Tensor:
        return weight * (_peaks(layer, weight) / 127)[:, None] if _is_packed(weight) else weight

    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        peaks = widen_scale(_peaks(layer, layer.weight)[:, None], dense, 1.0)
        codes = dense * (127 / peaks.clamp_min(torch.finfo(torch.float32).tiny))
        data = rounding.to_integers(codes, -127, 127, generator).to(torch.int8)
        made: nn.Parameter = type(layer.weight)(data, requires_grad=False, CB=data, SCB=peaks[:, 0])
        return made

    def install(self, layer: Any, weight: nn.Parameter) -> None:
        # A forward pass moves codes and scales from the parameter to the layer; each parameter takes its own along.
        if layer.weight.CB is None:
            layer.weight.CB, layer.weight.SCB = layer.state.CB, layer.state.SCB
        super().install(layer, weight)


def _is_packed(weight: Any) -> bool:
    return not weight.is_floating_point()


def _peaks(layer: Any, weight: Any) -> Tensor:
    found: Tensor = layer.state.SCB if weight.SCB is None else weight.SCB
    return found


class Bits4(Storage):
    """`Linear4bit`: nf4 or fp4 codes, two to a byte, whose scales may be quantized in turn.

    Not writable before the layer was moved to its device, which quantizes it.
    """

    def holds(self, layer: Any) -> bool:
        return isinstance(layer, loaded_class("bitsandbytes.nn", "Linear4bit"))

    def label(self, layer: Any) -> str:
        quantized = self._state(layer, layer.weight) is not None
        return f"bitsandbytes {layer.weight.quant_type}{'' if quantized else ', not quantized yet'}"

    def why_unwritable(self, layer: Any) -> str:
        if self._state(layer, layer.weight) is None:
            return "it is quantized when the layer is moved to its device; do that first"
        return ""

    def decode(self, layer: Any, weight: Any) -> Tensor:
        from bitsandbytes import functional

        data, state = weight.data, self._state(layer, weight)
        if state is None:
            return data
        if getattr(state, "packing_format_for_cpu", False):
            # The inverse works on the state that it is given.
            data, state = functional._convert_weight_packed_for_cpu_inverse(data, copy.copy(state))
        dense: Tensor = functional.dequantize_4bit(data, state)
        return dense

    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        old, state = layer.weight, self._state(layer, layer.weight)
        made: Any = type(old)(
            dense.float(),
            requires_grad=False,
            blocksize=state.blocksize,
            compress_statistics=old.compress_statistics,
            quant_type=old.quant_type,
            quant_storage=old.quant_storage,
        ).to(dense.device)
        # Rounded from float32 at once; what it is dequantized to stays as it was.
        made.quant_state.dtype = state.dtype
        return made

    def install(self, layer: Any, weight: nn.Parameter) -> None:
        super().install(layer, weight)
        layer.quant_state = self._state(layer, weight)

    def _state(self, layer: Any, weight: Any) -> Any:
        own = getattr(weight, "quant_state", None)
        return layer.quant_state if own is None and weight is layer.weight else own
