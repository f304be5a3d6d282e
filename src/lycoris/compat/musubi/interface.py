"""The functions that Musubi Tuner calls on a network module, for one algorithm."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from lycoris.compat.inside import Make
from lycoris.compat.merge_weight import merge_weight
from lycoris.compat.musubi import network
from lycoris.compat.musubi.architectures import detect
from lycoris.compat.musubi.network import MusubiNetwork
from lycoris.compat.patterns import KEYWORDS, Patterns, parse_expressions


@dataclass(frozen=True)
class Interface:
    """One algorithm's; a network module has these methods as its functions."""

    name: str
    """Of the algorithm."""
    marks: tuple[str, ...]
    """Tensor names, of which any tells that a layer has it."""
    make: Make
    """Makes it from settings and, under `options`, `--network_args`."""
    options: tuple[str, ...] = ()
    """`--network_args` that it has beside the common ones."""

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
        """New adapters for the blocks that the model's architecture means, without the layers that it leaves out.

        `exclude_patterns` come on top of these. Raises `ConfigError` for an architecture that is not known.
        """
        found = detect(unet)
        excludes = [p.pattern for p in parse_expressions(kwargs.get("exclude_patterns"), "exclude_patterns")]
        kwargs["exclude_patterns"] = [*excludes, *found.excludes]
        # fmt: off
        return self.create_network(
            found.targets, network.PREFIX, multiplier, network_dim, network_alpha, vae, text_encoders, unet,
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
        """New adapters for the linear layers in blocks of some classes; None: in all of the model."""

        network.warn_of_options(kwargs, self.options)

        def make(**settings: Any) -> Any:
            return self.make(options=kwargs, **settings)

        excludes, includes = (parse_expressions(kwargs.get(name), name) for name in KEYWORDS[:2])
        # fmt: off
        return network.create(
            make, target_replace_modules, prefix, multiplier, network_dim, network_alpha, unet, neuron_dropout,
            Patterns(excludes, includes), kwargs,
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
        """Adapters from a file's tensors, whose shapes say all."""
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
        """The same; the tensors say which layers are meant."""
        network.warn_of_options(kwargs, self.options)
        return network.read(self.name, multiplier, weights_sd, unet, for_inference, kwargs)

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
