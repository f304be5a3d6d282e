"""LoKr as Musubi Tuner's `networks.lokr`; `factor` is the wanted size of the smaller factors."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet, Sequence
from typing import Any

from torch import Tensor, nn

from lycoris.algorithms import LoKr
from lycoris.dropin.musubi import network
from lycoris.dropin.musubi.architectures import detect
from lycoris.options import parse_number


def create_arch_network(
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    vae: Any,
    text_encoders: Any,
    unet: nn.Module,
    neuron_dropout: float | None = None,
    **kwargs: Any,
) -> network.MusubiNetwork:
    """New adapters for the blocks that the model's architecture means, without the layers that it leaves out.

    `exclude_patterns` come on top of these. Raises `ConfigError` for an architecture that is not known.
    """
    found = detect(unet)
    excludes = [p.pattern for p in network.patterns(kwargs.get("exclude_patterns"), "exclude_patterns")]
    kwargs["exclude_patterns"] = [*excludes, *found.excludes]
    return create_network(
        found.targets,
        network.PREFIX,
        multiplier,
        network_dim,
        network_alpha,
        vae,
        text_encoders,
        unet,
        neuron_dropout,
        **kwargs,
    )


def create_network(
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
) -> network.MusubiNetwork:
    """New adapters for the linear layers in blocks of some classes; None: in all of the model."""
    factor = parse_number(kwargs.get("factor", -1), "factor", int)

    def make(**settings: Any) -> LoKr:
        return LoKr(factor=factor, **settings)

    return network.create(
        make, target_replace_modules, prefix, multiplier, network_dim, network_alpha, unet, neuron_dropout, kwargs
    )


def create_arch_network_from_weights(
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: Any = None,
    unet: Any = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> network.MusubiNetwork:
    """Adapters from a file's tensors, which say the factor too."""
    return network.read("lokr", multiplier, weights_sd, unet, for_inference, kwargs)


def create_network_from_weights(
    target_replace_modules: Sequence[str] | None,
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    text_encoders: Any = None,
    unet: Any = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> network.MusubiNetwork:
    """The same; the tensors say which layers are meant."""
    return network.read("lokr", multiplier, weights_sd, unet, for_inference, kwargs)


def merge_weights_to_tensor(
    model_weight: Tensor,
    lora_name: str,
    lora_sd: Mapping[str, Tensor],
    lora_weight_keys: MutableSet[str],
    multiplier: float,
    calc_device: Any,
) -> Tensor:
    """A weight with a file's change to it; see `network.merged`."""
    return network.merged("lokr_w1", model_weight, lora_name, lora_sd, lora_weight_keys, multiplier, calc_device)
