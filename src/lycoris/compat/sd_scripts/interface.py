"""The functions that sd-scripts calls on a network module, for one algorithm."""

from __future__ import annotations

import os
from collections.abc import Mapping, MutableSet
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lycoris.compat.inside import Make, warn_of_unknown
from lycoris.compat.merge_weight import merge_weight
from lycoris.compat.sd_scripts import network
from lycoris.compat.sd_scripts.network import SdScriptsNetwork


@dataclass(frozen=True)
class Interface:
    """One algorithm's; a network module has these methods as its functions."""

    name: str
    """Of the algorithm."""
    marks: tuple[str, ...]
    """Tensor names, of which any tells that a layer has it."""
    make: Make
    options: tuple[str, ...] = ()
    """`--network_args` that it has besides the common ones."""

    def create_network(
        self,
        multiplier: float | str,
        network_dim: int | str | None,
        network_alpha: float | str | None,
        vae: Any,
        text_encoder: Any,
        unet: nn.Module,
        neuron_dropout: float | str | None = None,
        **kwargs: Any,
    ) -> SdScriptsNetwork:
        """New adapters for the blocks of SDXL or Anima; see `network.create`."""
        warn_of_unknown(kwargs, (*network.KNOWN, *self.options))

        def make(**settings: Any) -> Any:
            return self.make(options=kwargs, **settings)

        return network.create(make, multiplier, network_dim, network_alpha, text_encoder, unet, neuron_dropout, kwargs)

    def create_network_from_weights(
        self,
        multiplier: float | str,
        file: str | os.PathLike[str] | None,
        vae: Any,
        text_encoder: Any,
        unet: nn.Module,
        weights_sd: Mapping[str, Tensor] | None = None,
        for_inference: bool = False,
        **kwargs: Any,
    ) -> tuple[SdScriptsNetwork, dict[str, Tensor]]:
        """Adapters from a file, and its tensors; see `network.read`."""
        warn_of_unknown(kwargs, (*network.KNOWN, *self.options))
        return network.read(self.name, multiplier, file, text_encoder, unet, weights_sd, for_inference, kwargs)

    def merge_weights_to_tensor(
        self,
        model_weight: Tensor,
        lora_name: str,
        lora_sd: Mapping[str, Tensor],
        lora_weight_keys: MutableSet[str],
        multiplier: float,
        calc_device: Any,
    ) -> Tensor:
        """A weight with a file's change to it; see `merge_weight`."""
        return merge_weight(self.marks, model_weight, lora_name, lora_sd, lora_weight_keys, multiplier, calc_device)
