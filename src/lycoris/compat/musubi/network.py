"""Networks of one algorithm on the linear layers of a denoiser, as Musubi Tuner builds them."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar

from torch import Tensor, nn

from lycoris import files
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.dora import unwrap_dora
from lycoris.compat.inside import (
    AlgorithmFactory,
    LayerSizes,
    log_plan,
    parse_dropout,
    plan_blocks,
    warn_of_unknown_options,
)
from lycoris.compat.kohya_network import Ratios
from lycoris.compat.parts import NetworkPart, add_dropout
from lycoris.compat.patterns import Patterns
from lycoris.compat.switchable import SwitchableNetwork
from lycoris.errors import FileError, NothingMeantError
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_number, parse_optional
from lycoris.targeting.planning import block_classes

logger = logging.getLogger("LyCORIS")

MUSUBI_PREFIX = "lora_unet"
MUSUBI_OPTIONS = (
    *("rank_dropout", "module_dropout", "verbose", "exclude_patterns", "include_patterns"),
    *("loraplus_lr_ratio", "conv_dim", "conv_alpha"),
)
"""Names of `--network_args` that every algorithm has."""


class MusubiNetwork(SwitchableNetwork):
    """The adapters of one denoiser."""

    # Musubi Tuner has LoRA+ for LoRA only.
    plus: ClassVar[Mapping[type[Algorithm], tuple[str, ...]]] = MappingProxyType({})

    # Musubi Tuner trains no text encoder, and passes the rate by this keyword.
    def prepare_optimizer_params(  # type: ignore[override]  # see above
        self, unet_lr: float | None = 1e-4, **_: Any
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Return parameter groups and their names, and make all parameters trainable.

        Other keywords are ignored. See `LycorisNetworkKohya.prepare_optimizer_params`.
        """
        return super().prepare_optimizer_params(None, unet_lr)

    def prepare_network(self, args: Any) -> None:
        """Do nothing; the trainer calls it before training."""

    def __iter__(self) -> Iterator[Any]:
        # With --dim_from_weights the trainer unpacks the result of create_arch_network_from_weights into two.
        return iter((self, None))


def create_musubi_network(
    make: AlgorithmFactory,
    targets: Sequence[str] | None,
    prefix: str,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    unet: nn.Module,
    neuron_dropout: float | None,
    patterns: Patterns,
    options: Mapping[str, Any],
) -> MusubiNetwork:
    """Build adapters for the linear layers inside blocks of some classes; they are not yet applied.

    Args:
        make: Builds the algorithm of a layer.
        targets: Class names of the blocks. None: the whole model.
        prefix: How the layers' names start in a file.
        patterns: Layers to leave out.
        options: `--network_args`, which may be strings.

    Raises `ConfigError` for wrong values and `PlanError` when no layer is targeted.
    """
    drop = parse_dropout(options, neuron_dropout)
    sizes = LayerSizes.parse(network_dim, network_alpha, None, None)

    def make_sized(rank: int, alpha: float | None) -> Algorithm:
        return make(rank=rank, alpha=alpha, **drop)

    plan = plan_blocks(unet, targets, ("Linear",), patterns, sizes, make_sized)
    if not plan.placements:
        raise NothingMeantError(
            f"no linear layer of {type(unet).__name__} is targeted; classes with layers: "
            f"{', '.join(block_classes(unet))}"
        )
    log_plan(prefix, plan, options)
    return _build_network(NetworkPart(prefix, AdapterSet.build(unet, plan, name=None)), multiplier, options)


def _build_network(part: NetworkPart, multiplier: float, options: Mapping[str, Any]) -> MusubiNetwork:
    network = MusubiNetwork.from_parts([part], parse_number(multiplier, "multiplier", float))
    network.ratios = Ratios(parse_optional(options.get("loraplus_lr_ratio"), "loraplus_lr_ratio", float))
    return network


def read_musubi_network(
    name: str,
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    unet: nn.Module,
    for_inference: bool,
    options: Mapping[str, Any],
) -> MusubiNetwork:
    """Build adapters from a file's tensors; they are not yet applied.

    Args:
        name: Name of the algorithm.
        for_inference: Whether `merge_to` is irreversible, and so needs no copy of the original weights.
        options: `--network_args`; dropout and the LoRA+ ratio count.

    Raises `FileError` for another algorithm (with or without DoRA), or when the tensors do not match the model.
    """
    tensors = {key: tensor for key, tensor in weights_sd.items() if "." in key}
    sites = ModelSites(unet)
    bundle = files.resolve(tensors, sites, prefix=MUSUBI_PREFIX, shared=False)
    others = sorted({unwrap_dora(e.algorithm).name for stack in bundle.entries.values() for e in stack} - {name})
    if others:
        raise FileError(
            f"this network module is for {name}, but the file has {', '.join(others)}; use the module for that"
        )
    adapters = AdapterSet.load(sites, add_dropout(bundle, options), name=None)
    network = _build_network(NetworkPart(MUSUBI_PREFIX, adapters), multiplier, options)
    network.for_inference = for_inference
    return network


def warn_of_musubi_options(options: Mapping[str, Any], own: Sequence[str]) -> None:
    """Log a warning for each of `--network_args` that has no effect.

    `own` are options of the algorithm alone, which are used.
    """
    warn_of_unknown_options(options, (*MUSUBI_OPTIONS, *own))
    for name in ("conv_dim", "conv_alpha"):
        if options.get(name) is not None:
            logger.warning("%s has no effect: only linear layers are adapted here", name)
