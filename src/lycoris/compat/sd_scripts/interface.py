"""The functions that sd-scripts calls on a network module."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lycoris.compat.inside import warn_of_unknown_options
from lycoris.compat.interface import NetworkInterface
from lycoris.compat.sd_scripts import network
from lycoris.compat.sd_scripts.network import SdScriptsNetwork


class SdScriptsInterface(NetworkInterface):
    """The functions of `networks.loha` and `networks.lokr`."""

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
        """Build adapters for the blocks of SDXL or Anima; they are not yet applied.

        See `create_sd_scripts_network` in `lycoris.compat.sd_scripts.network` for the options and exceptions. `vae` is
        not read.
        """
        warn_of_unknown_options(kwargs, (*network.SD_SCRIPTS_OPTIONS, *self.options))
        return network.create_sd_scripts_network(
            self._bind_options(kwargs),
            multiplier,
            network_dim,
            network_alpha,
            text_encoder,
            unet,
            neuron_dropout,
            kwargs,
        )

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
        """Build adapters from a file or its tensors. Returns the network and the tensors.

        See `read_sd_scripts_network` in `lycoris.compat.sd_scripts.network`. `vae` is not read.
        """
        warn_of_unknown_options(kwargs, (*network.SD_SCRIPTS_OPTIONS, *self.options))
        return network.read_sd_scripts_network(
            self.name, multiplier, file, text_encoder, unet, weights_sd, for_inference, kwargs
        )
