"""Networks of one algorithm on the linear layers of one denoiser."""

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
from lycoris.compat.inside import Make, Sizes, log_plan, parse_dropout, plan_inside, warn_of_unknown
from lycoris.compat.kohya_network import Ratios
from lycoris.compat.parts import Part, with_dropout
from lycoris.compat.patterns import Patterns
from lycoris.compat.switchable import SwitchableNetwork
from lycoris.errors import FileError, NothingMeantError
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_number, parse_optional
from lycoris.targeting.planning import block_classes

logger = logging.getLogger("LyCORIS")

PREFIX = "lora_unet"
KNOWN = (
    *("rank_dropout", "module_dropout", "verbose", "exclude_patterns", "include_patterns"),
    *("loraplus_lr_ratio", "conv_dim", "conv_alpha"),
)
"""What `--network_args` may hold for any algorithm."""


class MusubiNetwork(SwitchableNetwork):
    """Adapters of one denoiser."""

    # Musubi Tuner's LoRA+ is for LoRA alone.
    plus: ClassVar[Mapping[type[Algorithm], tuple[str, ...]]] = MappingProxyType({})

    # Musubi's trainer has no text encoder, and gives the rate by the name of its own parameter.
    def prepare_optimizer_params(  # type: ignore[override]  # see above
        self, unet_lr: float | None = 1e-4, **_: Any
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and what each is called."""
        return super().prepare_optimizer_params(None, unet_lr)

    def prepare_network(self, args: Any) -> None:
        """Nothing to do."""

    def __iter__(self) -> Iterator[Any]:
        # With --dim_from_weights the trainer takes what create_arch_network_from_weights returns apart into two.
        return iter((self, None))


def create(
    make: Make,
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
    """New adapters for the linear layers in blocks of some classes (None: in all), not yet applied.

    All options may be strings. Raises `ConfigError` for wrong ones and `PlanError` when no layer is meant.
    """
    drop = parse_dropout(options, neuron_dropout)
    sizes = Sizes.parse(network_dim, network_alpha, None, None)

    def make_sized(rank: int, alpha: float | None) -> Algorithm:
        return make(rank=rank, alpha=alpha, **drop)

    plan = plan_inside(unet, targets, ("Linear",), patterns, sizes, make_sized)
    if not plan.placements:
        raise NothingMeantError(
            f"no linear layer of {type(unet).__name__} is meant; classes with layers: {', '.join(block_classes(unet))}"
        )
    log_plan(prefix, plan, options)
    return _network(Part(prefix, AdapterSet.build(unet, plan, name=None)), multiplier, options)


def _network(part: Part, multiplier: float, options: Mapping[str, Any]) -> MusubiNetwork:
    network = MusubiNetwork.of([part], parse_number(multiplier, "multiplier", float))
    network.ratios = Ratios(parse_optional(options.get("loraplus_lr_ratio"), "loraplus_lr_ratio", float))
    return network


def read(
    name: str,
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    unet: nn.Module,
    for_inference: bool,
    options: Mapping[str, Any],
) -> MusubiNetwork:
    """Adapters from a file's tensors, whose shapes say all; not yet applied.

    Raises `FileError` when they are not of the algorithm of that name, with or without DoRA, or do not fit the model.
    """
    tensors = {key: tensor for key, tensor in weights_sd.items() if "." in key}
    sites = ModelSites(unet)
    bundle = files.resolve(tensors, sites, prefix=PREFIX, shared=False)
    others = sorted({unwrap_dora(e.algorithm).name for stack in bundle.entries.values() for e in stack} - {name})
    if others:
        raise FileError(f"this module is for {name}, and the file has {', '.join(others)}; name that one's module")
    adapters = AdapterSet.load(sites, with_dropout(bundle, options), name=None)
    network = _network(Part(PREFIX, adapters), multiplier, options)
    network.for_inference = for_inference
    return network


def warn_of_options(options: Mapping[str, Any], own: Sequence[str]) -> None:
    """Warn of `--network_args` that do nothing; `own` are those of the algorithm alone."""
    warn_of_unknown(options, (*KNOWN, *own))
    for name in ("conv_dim", "conv_alpha"):
        if options.get(name) is not None:
            logger.warning("%s has no effect: only linear layers are adapted here", name)
