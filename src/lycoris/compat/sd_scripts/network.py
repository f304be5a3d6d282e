"""Networks of one algorithm on SDXL or Anima, as sd-scripts builds them."""

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
from lycoris.compat.inside import AlgorithmFactory, LayerSizes, add_excludes, log_plan, parse_dropout, plan_blocks
from lycoris.compat.kohya import KOHYA_KEYWORDS, Component, apply_options, list_components, read_network
from lycoris.compat.kohya_network import Rate
from lycoris.compat.legacy_options import log_remarks
from lycoris.compat.parts import NetworkPart, check_plan
from lycoris.compat.patterns import Patterns
from lycoris.compat.sd_scripts.architectures import SdScriptsTargets, detect_sd_scripts_targets
from lycoris.compat.switchable import SwitchableNetwork
from lycoris.errors import FileError, NothingMeantError
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_number
from lycoris.targeting.planning import block_classes, servable

logger = logging.getLogger("LyCORIS")

SD_SCRIPTS_OPTIONS = tuple(
    sorted(
        {*KOHYA_KEYWORDS, "rank_dropout", "module_dropout", "conv_dim", "conv_alpha", "use_tucker"}
        - {"preset", "train_t5xxl"}
    )
)
"""Names of `--network_args` that every algorithm has."""


class SdScriptsNetwork(SwitchableNetwork):
    """The adapters of a denoiser and its text encoders."""

    def prepare_optimizer_params_with_multiple_te_lrs(
        self, text_encoder_lr: Rate | Sequence[Rate] = None, unet_lr: Rate = 1e-4, default_lr: Rate = None
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups and their names, with a learning rate per text encoder.

        Text encoders are always numbered in the names, whatever their rates. Otherwise as in `LycorisNetworkKohya`.
        """
        return self._build_all_groups(self._number_encoders(text_encoder_lr), unet_lr, default_lr)

    def backup_weights(self) -> None:
        """Do nothing, like the two methods below (`--network_pre_calc`): adapters act without precomputed weights."""

    def restore_weights(self) -> None:
        """Do nothing."""

    def pre_calculation(self) -> None:
        """Do nothing."""

    def _bundle(self, part: NetworkPart) -> Bundle:
        # sd-scripts' own modules load only matrices for 1x1 convolutions.
        bundle = super()._bundle(part)
        return replace(
            bundle, entries={path: tuple(map(_flatten_pointwise, stack)) for path, stack in bundle.entries.items()}
        )


def _flatten_pointwise(entry: Entry) -> Entry:
    if not isinstance(entry.algorithm, LoKr) or not entry.geometry.pointwise or "w2" not in entry.tensors:
        return entry
    return entry._replace(tensors={**entry.tensors, "w2": entry.tensors["w2"].flatten(1)})


def _name_components(text_encoder: Any, unet: nn.Module | None, architecture: SdScriptsTargets) -> list[Component]:
    """Return the models with the prefixes that files of this architecture have."""
    encoders = list(text_encoder) if isinstance(text_encoder, list | tuple) else [text_encoder]
    encoder = encoders if architecture.numbered or len(encoders) != 1 else encoders[0]
    return list_components(encoder, unet, SdScriptsNetwork)


def create_sd_scripts_network(
    make: AlgorithmFactory,
    multiplier: float | str,
    network_dim: Any,
    network_alpha: Any,
    text_encoder: Any,
    unet: nn.Module,
    neuron_dropout: Any,
    options: Mapping[str, Any],
) -> SdScriptsNetwork:
    """Build adapters for the blocks of SDXL or Anima; they are not yet applied.

    Args:
        make: Builds the algorithm of a layer.
        network_dim: Rank, 4 by default. `network_alpha` is 1 by default.
        neuron_dropout: Dropout of the layers' inputs.
        options: `--network_args`. All values may be strings.

    Raises `ConfigError` for wrong values and for other denoisers, and `PlanError` when no layer is targeted.
    """
    architecture = detect_sd_scripts_targets(unet)
    patterns = Patterns.parse(options)
    every = add_excludes(patterns, architecture.excludes)
    sizes = LayerSizes.parse(network_dim, network_alpha, options.get("conv_dim"), options.get("conv_alpha"))
    drop = parse_dropout(options, neuron_dropout or options.get("neuron_dropout"))
    tucker = parse_number(options.get("use_tucker") or False, "use_tucker", bool)

    def make_sized(rank: int, alpha: float | None) -> Algorithm:
        return make(rank=rank, alpha=alpha, tucker=tucker, **drop)

    models = _name_components(text_encoder, unet, architecture)
    searched, parts = [ModelSites(each.model) for each in models], []
    for component, sites in zip(models, searched, strict=True):
        classes = architecture.text if component.text else _list_target_classes(architecture, options)
        plan = plan_blocks(sites, classes, ("Linear", "Conv2d"), every, sizes, make_sized)
        check_plan(plan)
        log_plan(component.prefix, plan, options)
        if plan.placements:
            adapters = AdapterSet.build(component.model, plan, name=None)
            parts.append(NetworkPart(component.prefix, adapters, component.text))
    paths = (path for each in searched for path in servable(each))
    log_remarks(patterns.find_unmatched(paths, [path for part in parts for path in part.adapters.stacks]))
    if not parts:
        have = ", ".join(block_classes(unet))
        raise NothingMeantError(f"no layer is left for adapters; classes of {type(unet).__name__} with layers: {have}")
    network = SdScriptsNetwork.from_parts(parts, parse_number(multiplier, "multiplier", float))
    apply_options(network, options)
    return network


def _list_target_classes(architecture: SdScriptsTargets, options: Mapping[str, Any]) -> tuple[str, ...]:
    convolved = () if options.get("conv_dim") is None else architecture.convolved
    trained = parse_number(options.get("train_llm_adapter") or False, "train_llm_adapter", bool)
    return (*architecture.targets, *convolved, *(architecture.adapter if trained else ()))


def read_sd_scripts_network(
    name: str,
    multiplier: float | str,
    file: str | os.PathLike[str] | None,
    text_encoder: Any,
    unet: nn.Module,
    weights_sd: Mapping[str, Tensor] | None,
    for_inference: bool,
    options: Mapping[str, Any],
) -> tuple[SdScriptsNetwork, dict[str, Tensor]]:
    """Build adapters from a file or its tensors; they are not yet applied. Returns the network and the tensors.

    Args:
        name: Name of the algorithm.
        for_inference: Whether `merge_to` is irreversible, and so needs no copy of the original weights.

    Raises `FileError` for another algorithm (with or without DoRA), or when the tensors do not match the models.
    """
    models = _name_components(text_encoder, unet, detect_sd_scripts_targets(unet))
    network, tensors = read_network(SdScriptsNetwork, models, multiplier, file, weights_sd, for_inference, options)
    have = {unwrap_dora(module.algorithm).name for module in network.loras}
    if others := sorted(have - {name}):
        raise FileError(
            f"this network module is for {name}, but the file has {', '.join(others)}; use the module for that"
        )
    return network, tensors
