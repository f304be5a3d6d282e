"""The functions that Musubi Tuner calls on a network module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lycoris.compat.interface import NetworkInterface
from lycoris.compat.musubi import network
from lycoris.compat.musubi.architectures import detect_musubi_targets
from lycoris.compat.musubi.network import MusubiNetwork
from lycoris.compat.patterns import KEYWORDS, Patterns, parse_expressions


class MusubiInterface(NetworkInterface):
    """The functions of `networks.loha` and `networks.lokr`."""

    def create_arch_network(
        self,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoders: Any,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> MusubiNetwork:
        """Build adapters for the blocks that Musubi Tuner trains of this architecture; they are not yet applied.

        Layers that it leaves out are excluded, in addition to `exclude_patterns`. Raises `ConfigError` for an unknown
        architecture.
        """
        found = detect_musubi_targets(unet)
        excludes = [p.pattern for p in parse_expressions(kwargs.get("exclude_patterns"), "exclude_patterns")]
        kwargs["exclude_patterns"] = [*excludes, *found.excludes]
        # fmt: off
        return self.create_network(
            found.targets, network.MUSUBI_PREFIX, multiplier, network_dim, network_alpha, vae, text_encoders, unet,
            neuron_dropout, **kwargs,
        )
        # fmt: on

    def create_network(
        self,
        target_replace_modules: Sequence[str] | None,
        prefix: str,
        multiplier: float,
        network_dim: int | None,
        network_alpha: float | None,
        vae: Any,
        text_encoders: Any,
        unet: nn.Module,
        neuron_dropout: float | None = None,
        **kwargs: Any,
    ) -> MusubiNetwork:
        """Build adapters for the linear layers inside blocks of some classes; they are not yet applied.

        `target_replace_modules` None means all linear layers of the model. See `create_musubi_network` in
        `lycoris.compat.musubi.network` for the options and exceptions.
        """
        network.warn_of_musubi_options(kwargs, self.options)
        excludes, includes = (parse_expressions(kwargs.get(name), name) for name in KEYWORDS[:2])
        # fmt: off
        return network.create_musubi_network(
            self._bind_options(kwargs), target_replace_modules, prefix, multiplier, network_dim, network_alpha, unet,
            neuron_dropout, Patterns(excludes, includes), kwargs,
        )
        # fmt: on

    def create_arch_network_from_weights(
        self,
        multiplier: float,
        weights_sd: Mapping[str, Tensor],
        text_encoders: Any = None,
        unet: Any = None,
        for_inference: bool = False,
        **kwargs: Any,
    ) -> MusubiNetwork:
        """Build adapters from a file's tensors, whose shapes decide rank, alpha and layers.

        Raises `FileError` for another algorithm, or when they do not match the model.
        """
        return self.create_network_from_weights(
            None, multiplier, weights_sd, text_encoders, unet, for_inference, **kwargs
        )

    def create_network_from_weights(
        self,
        target_replace_modules: Sequence[str] | None,
        multiplier: float,
        weights_sd: Mapping[str, Tensor],
        text_encoders: Any = None,
        unet: Any = None,
        for_inference: bool = False,
        **kwargs: Any,
    ) -> MusubiNetwork:
        """Build adapters from a file's tensors. `target_replace_modules` is ignored: the tensors decide.

        Raises as `create_arch_network_from_weights` does.
        """
        network.warn_of_musubi_options(kwargs, self.options)
        return network.read_musubi_network(self.name, multiplier, weights_sd, unet, for_inference, kwargs)
