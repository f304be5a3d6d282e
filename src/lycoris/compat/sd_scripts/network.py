"""Networks of one algorithm on SDXL or Anima, as sd-scripts makes them."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms import LoKr
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.dora import unwrap_dora
from lycoris.compat.inside import Make, Sizes, log_plan, parse_dropout, plan_inside, with_excludes
from lycoris.compat.kohya import OWN, Component, components, read_network, set_up
from lycoris.compat.kohya_network import Rate
from lycoris.compat.legacy_options import tell
from lycoris.compat.parts import Part, check_plan
from lycoris.compat.patterns import Patterns
from lycoris.compat.sd_scripts.architectures import Architecture, detect_architecture
from lycoris.compat.switchable import SwitchableNetwork
from lycoris.errors import FileError, NothingMeantError
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_number
from lycoris.targeting.planning import block_classes, servable

logger = logging.getLogger("LyCORIS")

KNOWN = tuple(
    sorted({*OWN, "rank_dropout", "module_dropout", "conv_dim", "conv_alpha", "use_tucker"} - {"preset", "train_t5xxl"})
)
"""What `--network_args` may hold for any algorithm."""


class SdScriptsNetwork(SwitchableNetwork):
    """Adapters of a denoiser and its text encoders."""

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Rate | Sequence[Rate] = None, unet_lr: Rate = 1e-4, default_lr: Rate = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and what each is called; text encoders have numbers, whatever their rates."""
        return self._all_groups(self._numbered_encoders(text_encoder_lr), unet_lr, default_lr)

    def backup_weights(self) -> None:
        """Nothing to do, nor for the two below (`--network_pre_calc`): adapters act at their multiplier as they are."""

    def restore_weights(self) -> None:
        """Nothing to do."""

    def pre_calculation(self) -> None:
        """Nothing to do."""

    def _bundle(self, part: Part) -> Bundle:
        # Its own modules load nothing but matrices for convolutions of 1x1.
        bundle = super()._bundle(part)
        return replace(bundle, entries={path: tuple(map(_flatten, stack)) for path, stack in bundle.entries.items()})


def _flatten(entry: Entry) -> Entry:
    if not isinstance(entry.algorithm, LoKr) or not entry.geometry.pointwise or "w2" not in entry.tensors:
        return entry
    return entry._replace(tensors={**entry.tensors, "w2": entry.tensors["w2"].flatten(1)})


def name_components(text_encoder: Any, unet: nn.Module | None, architecture: Architecture) -> list[Component]:
    """The models by the prefixes that an architecture has."""
    encoders = list(text_encoder) if isinstance(text_encoder, list | tuple) else [text_encoder]
    encoder = encoders if architecture.numbered or len(encoders) != 1 else encoders[0]
    return components(encoder, unet, SdScriptsNetwork)


def create(
    make: Make,
    multiplier: float | str,
    network_dim: Any,
    network_alpha: Any,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: Any,
    options: Mapping[str, Any],
) -> SdScriptsNetwork:
    """New adapters, not yet applied. All options may be strings.

    Raises `ConfigError` for wrong ones and for an unknown architecture, and `PlanError` when no layer is meant.
    """
    architecture = detect_architecture(unet)
    patterns = Patterns.parse(options)
    every = with_excludes(patterns, architecture.excludes)
    sizes = Sizes.parse(network_dim, network_alpha, options.get("conv_dim"), options.get("conv_alpha"))
    drop = parse_dropout(options, neuron_dropout or options.get("neuron_dropout"))
    tucker = parse_number(options.get("use_tucker") or False, "use_tucker", bool)

    def make_sized(rank: int, alpha: float | None) -> Algorithm:
        return make(rank=rank, alpha=alpha, tucker=tucker, **drop)

    models = name_components(text_encoder, unet, architecture)
    searched, parts = [ModelSites(each.model) for each in models], []
    for component, sites in zip(models, searched, strict=True):
        classes = architecture.text if component.text else _targets(architecture, options)
        plan = plan_inside(sites, classes, ("Linear", "Conv2d"), every, sizes, make_sized)
        check_plan(plan)
        log_plan(component.prefix, plan, options)
        if plan.placements:
            adapters = AdapterSet.build(component.model, plan, name=None)
            parts.append(Part(component.prefix, adapters, component.text))
    paths = (path for each in searched for path in servable(each))
    tell(patterns.find_unmatched(paths, [path for part in parts for path in part.adapters.stacks]))
    if not parts:
        have = ", ".join(block_classes(unet))
        raise NothingMeantError(f"no layer is left for adapters; classes of {type(unet).__name__} with layers: {have}")
    network = SdScriptsNetwork.of(parts, parse_number(multiplier, "multiplier", float))
    set_up(network, options)
    return network


def _targets(architecture: Architecture, options: Mapping[str, Any]) -> tuple[str, ...]:
    convolved = () if options.get("conv_dim") is None else architecture.convolved
    trained = parse_number(options.get("train_llm_adapter") or False, "train_llm_adapter", bool)
    return (*architecture.targets, *convolved, *(architecture.adapter if trained else ()))


def read(
    name: str,
    multiplier: float | str,
    file: str | os.PathLike[str] | None,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None,
    for_inference: bool,
    options: Mapping[str, Any],
) -> tuple[SdScriptsNetwork, dict[str, Tensor]]:
    """Adapters from a file or its tensors, whose shapes say all, and the tensors; not yet applied.

    Raises `FileError` when they are not of the algorithm of that name, with or without DoRA, or do not fit the models.
    """
    models = name_components(text_encoder, unet, detect_architecture(unet))
    network, tensors = read_network(SdScriptsNetwork, models, multiplier, file, weights_sd, for_inference, options)
    have = {unwrap_dora(module.algorithm).name for module in network.loras}
    if others := sorted(have - {name}):
        raise FileError(f"this module is for {name}, and the file has {', '.join(others)}; name that one's module")
    return network, tensors
