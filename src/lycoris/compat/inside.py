"""Plans as sd-scripts' and Musubi Tuner's own network modules make them: layers inside blocks of certain classes."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from lycoris.adapters.attach import base_class
from lycoris.algorithms import LoHa, LoKr
from lycoris.algorithms.base import Algorithm
from lycoris.compat.patterns import Expressions, Patterns
from lycoris.layers.geometry import Geometry
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_number, parse_optional
from lycoris.targeting.planning import Plan, assign_layers

logger = logging.getLogger("LyCORIS")

AlgorithmFactory = Callable[..., Algorithm]
"""Builds an algorithm from its settings; the keyword `options` has the `--network_args`."""


def make_loha(options: Mapping[str, Any], **settings: Any) -> LoHa:
    """Return a LoHa with these settings. `options` has nothing more for it."""
    return LoHa(**settings)


def make_lokr(options: Mapping[str, Any], **settings: Any) -> LoKr:
    """Return a LoKr with these settings, whose smaller factors have the size that `options["factor"]` asks for.

    -1, the default, splits each dimension near its square root. Raises `ConfigError` for what is not an integer.
    """
    return LoKr(factor=parse_number(options.get("factor", -1), "factor", int), **settings)


@dataclass(frozen=True)
class LayerSizes:
    """Rank and alpha of linear layers and of convolutions with a kernel larger than 1.

    Layers whose rank is None get no adapter; alpha None means the rank.
    """

    rank: int | None
    alpha: float | None
    """None: the rank."""
    conv_rank: int | None = None
    conv_alpha: float | None = None

    @classmethod
    def parse(cls, network_dim: Any, network_alpha: Any, conv_dim: Any, conv_alpha: Any) -> LayerSizes:
        """Parse ranks and alphas, which may be strings.

        The defaults are rank 4 and alpha 1. Rank 0 means no adapter, alpha 0 means the rank. Without `conv_dim`,
        convolutions with a kernel larger than 1 get nothing.
        """
        dim = parse_optional(network_dim, "network_dim", int)
        alpha = 1.0 if network_alpha is None else parse_number(network_alpha, "network_alpha", float)
        conv = parse_optional(conv_dim, "conv_dim", int)
        over = 1.0 if conv_alpha is None else parse_number(conv_alpha, "conv_alpha", float)
        return cls(4 if dim is None else dim or None, alpha or None, conv or None, over or None)

    def for_layer(self, geometry: Geometry, own: int | None) -> tuple[int, float | None] | None:
        """Return (rank, alpha) of a layer, or None for no adapter.

        `own` is the rank that a pattern gives the layer; it is combined with the alpha of linear layers.
        """
        if own is not None:
            return own, self.alpha
        rank, alpha = (self.rank, self.alpha) if geometry.pointwise else (self.conv_rank, self.conv_alpha)
        return None if rank is None else (rank, alpha)


def parse_dropout(options: Mapping[str, Any], neuron_dropout: Any) -> dict[str, Any]:
    """Return the dropout settings in `--network_args` as keyword arguments of an algorithm.

    Rank dropout is rescaled, as in these trainers. Raises `ConfigError` for what is not a number.
    """
    drop = {name: parse_optional(options.get(name), name, float) or 0.0 for name in ("rank_dropout", "module_dropout")}
    dropout = parse_optional(neuron_dropout, "network_dropout", float) or 0.0
    return {**drop, "dropout": dropout, "rank_dropout_scale": drop["rank_dropout"] > 0}


def plan_blocks(
    model: nn.Module | ModelSites,
    classes: Collection[str] | None,
    kinds: Collection[str],
    patterns: Patterns,
    sizes: LayerSizes,
    make: Callable[[int, float | None], Algorithm],
) -> Plan:
    """Return a plan for the layers of some classes inside blocks of some classes.

    Args:
        classes: Class names of the blocks, or of layers themselves. None: the whole model.
        kinds: Class names of the layers, such as "Linear".
        patterns: Layers to leave out, and ranks of single layers.
        make: Called with (rank, alpha), returns the algorithm of a layer.
    """

    def choose_algorithm(
        path: str, layer: nn.Module, around: Sequence[nn.Module], g: Geometry
    ) -> tuple[Algorithm, ...] | None:
        inside = classes is None or any(type(module).__name__ in classes for module in (layer, *around))
        if not inside or base_class(layer).__name__ not in kinds or patterns.leaves_out(path):
            return None
        size = sizes.for_layer(g, patterns.rank_for(path))
        return None if size is None else (make(*size),)

    return assign_layers(model, choose_algorithm)


def add_excludes(patterns: Patterns, more: Expressions) -> Patterns:
    """Return patterns that leave out more paths, unless `includes` matches them."""
    return replace(patterns, excludes=(*patterns.excludes, *more))


def log_plan(name: str, plan: Plan, options: Mapping[str, Any]) -> None:
    """Log a plan: its remarks as warnings, a summary and, with the option `verbose`, every layer."""
    for remark in plan.remarks:
        logger.warning("%s", remark)
    logger.info("%s: %s", name, replace(plan, remarks=()))
    if parse_number(options.get("verbose") or False, "verbose", bool):
        log_layers(name, plan)


def log_layers(name: str, plan: Plan) -> None:
    """Log what each layer of a plan gets."""
    for each in plan.placements:
        logger.info("%s.%s: %s", name, each.path, " + ".join(map(str, each.algorithms)))


def warn_of_unknown_options(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Log a warning for each of `--network_args` that is unknown and therefore ignored.

    `known` are the names of those that are used.
    """
    for name in options:
        if name not in known:
            logger.warning("unknown option %r is ignored; known options are %s", name, ", ".join(known))
