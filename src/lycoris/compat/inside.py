"""Plans as sd-scripts' and Musubi Tuner's own network modules make them: layers inside blocks of some classes."""

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

Make = Callable[..., Algorithm]
"""Makes an algorithm from its settings and, under `options`, `--network_args`."""


def make_loha(options: Mapping[str, Any], **settings: Any) -> LoHa:
    """LoHa; `options` says nothing more of it."""
    return LoHa(**settings)


def make_lokr(options: Mapping[str, Any], **settings: Any) -> LoKr:
    """LoKr, whose smaller factors have the size that `factor` asks for."""
    return LoKr(factor=parse_number(options.get("factor", -1), "factor", int), **settings)


@dataclass(frozen=True)
class Sizes:
    """Ranks and alphas; None: such layers get nothing."""

    rank: int | None
    alpha: float | None
    """None: the rank."""
    conv_rank: int | None = None
    conv_alpha: float | None = None

    @classmethod
    def parse(cls, network_dim: Any, network_alpha: Any, conv_dim: Any, conv_alpha: Any) -> Sizes:
        """From what may be strings: rank 4 and alpha 1 where nothing is given, 0 for alpha means the rank."""
        dim = parse_optional(network_dim, "network_dim", int)
        alpha = 1.0 if network_alpha is None else parse_number(network_alpha, "network_alpha", float)
        conv = parse_optional(conv_dim, "conv_dim", int)
        over = 1.0 if conv_alpha is None else parse_number(conv_alpha, "conv_alpha", float)
        return cls(4 if dim is None else dim or None, alpha or None, conv or None, over or None)

    def for_layer(self, geometry: Geometry, own: int | None) -> tuple[int, float | None] | None:
        """The rank and alpha of a layer; `own`: the rank that a pattern gives it, at the alpha of linear layers."""
        if own is not None:
            return own, self.alpha
        rank, alpha = (self.rank, self.alpha) if geometry.pointwise else (self.conv_rank, self.conv_alpha)
        return None if rank is None else (rank, alpha)


def parse_dropout(options: Mapping[str, Any], neuron_dropout: Any) -> dict[str, Any]:
    """Dropout as an algorithm takes it."""
    drop = {name: parse_optional(options.get(name), name, float) or 0.0 for name in ("rank_dropout", "module_dropout")}
    dropout = parse_optional(neuron_dropout, "network_dropout", float) or 0.0
    return {**drop, "dropout": dropout, "rank_dropout_scale": drop["rank_dropout"] > 0}


def plan_inside(
    model: nn.Module | ModelSites,
    classes: Collection[str] | None,
    kinds: Collection[str],
    patterns: Patterns,
    sizes: Sizes,
    make: Callable[[int, float | None], Algorithm],
) -> Plan:
    """A plan for the layers of some classes (`kinds`) in blocks of some classes; None: in all of the model."""

    def choose(path: str, layer: nn.Module, around: Sequence[nn.Module], g: Geometry) -> tuple[Algorithm, ...] | None:
        inside = classes is None or any(type(module).__name__ in classes for module in (layer, *around))
        if not inside or base_class(layer).__name__ not in kinds or patterns.leaves_out(path):
            return None
        size = sizes.for_layer(g, patterns.rank_for(path))
        return None if size is None else (make(*size),)

    return assign_layers(model, choose)


def with_excludes(patterns: Patterns, more: Expressions) -> Patterns:
    """Patterns that leave out more, unless `includes` has it."""
    return replace(patterns, excludes=(*patterns.excludes, *more))


def log_plan(name: str, plan: Plan, options: Mapping[str, Any]) -> None:
    """Say what a plan does: its remarks as warnings and, with `verbose`, layer by layer."""
    for remark in plan.remarks:
        logger.warning("%s", remark)
    logger.info("%s: %s", name, replace(plan, remarks=()))
    if parse_number(options.get("verbose") or False, "verbose", bool):
        log_layers(name, plan)


def log_layers(name: str, plan: Plan) -> None:
    """Say what each layer gets."""
    for each in plan.placements:
        logger.info("%s.%s: %s", name, each.path, " + ".join(map(str, each.algorithms)))


def warn_of_unknown(options: Mapping[str, Any], known: Sequence[str]) -> None:
    """Warn of `--network_args` that do nothing."""
    for name in options:
        if name not in known:
            logger.warning("unknown option %r was ignored; known are %s", name, ", ".join(known))
