"""`lycoris_config.json`: the settings that trainers hand over, and the plan that they mean for a model.

Names, defaults and matching rules are those that existing configs rely on. Every option is honoured, refused, or
remarked upon; none is dropped.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from lycoris.additive import Additive, Ranked
from lycoris.algorithm import Algorithm
from lycoris.algorithms import OFT, DoRA, DyLoRA, Norm
from lycoris.errors import ConfigError, NothingMeantError, nearest
from lycoris.geometry import Geometry
from lycoris.jsons import json_object
from lycoris.ops.factorization import butterfly_sizes, factorize
from lycoris.options import (
    OPTIONS,
    OVERRIDE,
    SCHEDULE,
    TOP,
    UNUSED_SIZES,
    algorithm_class,
    parse_number,
    parse_optional,
    parse_options,
    parse_rank,
)
from lycoris.planning import USUAL, Plan, Remark, around, block_classes, check_something_left, place, servable
from lycoris.preset import LAYER_CLASSES, Preset, with_named
from lycoris.schedule import RankSchedule, in_header

logger = logging.getLogger("LyCORIS")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed `lycoris_config.json`."""

    algo: str = "lora"
    multiplier: float = 1.0
    linear_dim: int = 4
    linear_alpha: float | None = 1.0
    conv_dim: int | None = None
    conv_alpha: float | None = None
    options: Mapping[str, Any] = field(default_factory=dict)
    preset: Preset = field(default_factory=Preset)
    given: Mapping[str, Any] = field(default_factory=dict)
    """The JSON object as it came."""
    remarks: tuple[Remark, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any], *, strict: bool = True, preset: Preset | None = None) -> Recipe:
        """Check a config and read it.

        Raises `ConfigError` for a wrong value and, when `strict`, for a key that nothing knows; otherwise such a key
        becomes a remark. `preset` stands in for a missing `apply_preset`.
        """
        remarks: list[Remark] = []
        algo = str(given.get("algo", "lora")).lower()
        algorithm_class(algo)
        wanted = given.get("apply_preset")
        if wanted:
            preset = Preset.parse(wanted)
        preset = with_named(preset or Preset(), wanted or {}, given.get("preset"), remarks)
        masked = "tlora" in _algorithms(algo, preset)
        top = {k: v for k, v in given.items() if k not in TOP}
        schedule = {k: top.pop(k) for k in SCHEDULE if masked and k in top}
        options = parse_options(algo, top, "", strict, remarks) | parse_options("tlora", schedule, "", strict, remarks)
        for where, maps in (("module_algo_map", preset.module_algo_map), ("name_algo_map", preset.name_algo_map)):
            for name, override in maps.items():
                inner = str(override.get("algo", algo)).lower()
                algorithm_class(inner)
                rest = {k: v for k, v in override.items() if k not in OVERRIDE}
                own = parse_options(inner, rest, f" in {where}[{name!r}]", strict, remarks)
                for key in (*SCHEDULE,) if inner == "tlora" else ():
                    if key in own and options.setdefault(key, own[key]) != own[key]:
                        raise ConfigError(
                            f"{key} is {own[key]} in {where}[{name!r}] and {options[key]} elsewhere; all layers share "
                            "one schedule: give it once"
                        )
                for key in ("dim", "linear_dim"):
                    parse_rank(override.get(key), key)
        remarks += _without_effect(algo, preset, given, options)
        return cls(
            algo=algo,
            multiplier=parse_number(given.get("multiplier", 1.0), "multiplier", float),
            linear_dim=parse_rank(given.get("linear_dim"), "linear_dim") or 4,
            linear_alpha=parse_optional(given.get("linear_alpha", 1.0), "linear_alpha", float),
            conv_dim=parse_optional(given.get("conv_dim"), "conv_dim", int),
            conv_alpha=parse_optional(given.get("conv_alpha"), "conv_alpha", float),
            options=options,
            preset=preset,
            given=dict(given),
            remarks=tuple(dict.fromkeys(remarks)),
        )

    def as_dict(self) -> dict[str, Any]:
        """The JSON object as it came."""
        return dict(self.given)

    @property
    def schedule(self) -> RankSchedule | None:
        """Of the ranks that count by timestep; None when no layer can get an algorithm that has one.

        Its largest rank is that of any T-LoRA layer, by the sizes that the config gives.
        """
        overrides = [{"algo": self.algo}, *self.preset.overrides()]
        masked = [o for o in overrides if str(o.get("algo", self.algo)).lower() == "tlora"]
        shapes = [True, False] if self.preset.enable_conv else [True]
        ranks = [self._rank_for(pointwise, override) for override in masked for pointwise in shapes]
        if not ranks:
            return None
        return RankSchedule(
            max_rank=max(ranks),
            min_rank=int(self.options.get("tlora_min_rank", 1)),
            alpha=float(self.options.get("tlora_alpha", 1.0)),
        )

    def plan(self, model: nn.Module) -> Plan:
        """What each layer of a model gets. Raises `NothingMeantError`, naming the model's classes, when none does."""

        def choose(
            path: str, layer: nn.Module, around: Sequence[nn.Module], geometry: Geometry
        ) -> tuple[Algorithm, ...] | None:
            override = self.preset.options_for(path, layer, around)
            if geometry.kind == "norm":
                return self._norm(path, override)
            if override is None or not (geometry.pointwise or self.preset.enable_conv):
                return None
            # Embeddings and bare parameters have rules of their own; trainers' configs do not mean them.
            return (self.algorithm(geometry, override),) if geometry.kind in ("linear", "conv") else None

        made = place(model, choose, [*self.remarks, *self._unmatched(model)], names=self.preset.names)
        check_something_left(made)
        if not made.placements:
            raise NothingMeantError(self._nothing(model))
        if self._trains_norms() and not any(each.geometry.kind == "norm" for each in made.placements):
            told = Remark("train_norm has no effect: no norm with a weight is meant", "unmatched")
            return replace(made, remarks=(*made.remarks, told))
        return made

    def _norm(self, path: str, override: Mapping[str, Any] | None) -> tuple[Algorithm, ...] | None:
        """Default targets mean the norms of any library, named ones just what they name."""
        if override is None and (self.preset.excludes(path) or self.preset.target_module != LAYER_CLASSES):
            return None
        algo = str((override or {}).get("algo", self.algo)).lower()
        given = {k: v for k, v in (override or {}).items() if k not in OVERRIDE}
        options = {**self.options, **parse_options(algo, given, "", False, [])}
        return (Norm(module_dropout=options.get("module_dropout", 0.0)),) if options.get("train_norm") else None

    def _trains_norms(self) -> bool:
        return any(options.get("train_norm") for options in (self.options, *self.preset.overrides()))

    def algorithm(self, geometry: Geometry, override: Mapping[str, Any]) -> Algorithm:
        """The algorithm for a layer of this shape, with a preset's own settings over the general ones."""
        algo = str(override.get("algo", self.algo)).lower()
        own = parse_options(algo, {k: v for k, v in override.items() if k not in OVERRIDE}, "", False, [])
        options = {**self.options, **own}
        cls = algorithm_class(algo)
        values = {
            entry.field: options[name]
            for name, entry in OPTIONS.items()
            if entry.field and name in options and algo in entry.algorithms
        }
        rank, alpha = self._size(geometry, override)
        if issubclass(cls, OFT):
            return cls.from_options(values | {"block_size": self._block_size(algo, geometry, rank)})
        if not issubclass(cls, Ranked):
            return cls.from_options(values)
        if not values.get("rank_dropout"):
            values.pop("rank_dropout_scale", None)
        if issubclass(cls, DyLoRA):
            values.setdefault("block_size", math.gcd(4, rank))
        made = cls.from_options(values | {"rank": rank, "alpha": alpha})
        if isinstance(made, Additive) and (options.get("dora_wd") or options.get("weight_decompose")):
            on_out = options.get("wd_on_output", options.get("wd_on_out", True))
            return DoRA(over=made, axis="out" if on_out else "in")
        return made

    def _block_size(self, algo: str, geometry: Geometry, wanted: int) -> int:
        """The size of the blocks that a file trained with this rank has: of two factors of the outputs, the smaller;
        for a butterfly the largest that is not above the rank. What cannot be is left to the plan to refuse.
        """
        if algo == "boft":
            return max((s for s in butterfly_sizes(geometry.out_features) if s <= wanted), default=max(wanted, 2))
        small = factorize(geometry.out_features, wanted)[0]
        return small if small > 1 else max(wanted, 2)

    def _size(self, geometry: Geometry, override: Mapping[str, Any]) -> tuple[int, float | None]:
        """Rank and alpha; alpha 0 or none means the rank, and convolutions fall back on the linear sizes."""
        alpha, name = self.linear_alpha, "linear_alpha"
        if not geometry.pointwise:
            alpha = self.conv_alpha if self.conv_alpha is not None else alpha
            name = "conv_alpha"
        alpha = parse_optional(override.get("alpha", override.get(name, alpha)), "alpha", float)
        return self._rank_for(geometry.pointwise, override), alpha or None

    def _rank_for(self, pointwise: bool, override: Mapping[str, Any]) -> int:
        own = parse_rank(override.get("dim"), "dim")
        if pointwise:
            return own or parse_rank(override.get("linear_dim"), "linear_dim") or self.linear_dim
        conv = parse_optional(override.get("conv_dim"), "conv_dim", int)
        return int(own or conv or self.conv_dim or self.linear_dim)

    def _unmatched(self, model: nn.Module) -> list[Remark]:
        """Targets that the user named and that mean no layer which could get an adapter."""
        conv = self.preset.enable_conv
        layers = servable(model, (*USUAL, "norm") if self._trains_norms() else USUAL)
        meant = {path: layer for path, (layer, geometry) in layers.items() if conv or geometry.pointwise}
        classes = {type(m).__name__ for path, layer in meant.items() for m in (layer, *around(model, path))}
        named = [name for name in self.preset.target_module if self.preset.target_module != LAYER_CLASSES]
        missing = [name for name in dict.fromkeys([*named, *self.preset.module_algo_map]) if name not in classes]
        for pattern in dict.fromkeys((*self.preset.target_name, *self.preset.name_algo_map)):
            missing += [] if any(self.preset.means(pattern, path) for path in meant) else [pattern]
        for pattern in dict.fromkeys(self.preset.exclude_name):
            missing += [] if any(self.preset.means(pattern, path) for path in layers) else [pattern]
        but = "" if conv else " (convolutions with a real kernel are off)"
        text = f"matches no layer of {type(model).__name__} that adapters can serve{but}"
        return [Remark(f"{name!r} {text}", "unmatched") for name in missing]

    def _nothing(self, model: nn.Module) -> str:
        have = block_classes(model)
        wanted = [*self.preset.target_module, *self.preset.module_algo_map]
        wanted += [*self.preset.target_name, *self.preset.name_algo_map]
        close = sorted({hit for name in wanted for hit in nearest(name, have, limit=1)})
        hint = f" Did you mean {', '.join(close)}?" if close else ""
        return (
            f"no layer of {type(model).__name__} is meant by the targets {', '.join(dict.fromkeys(wanted))}.{hint} "
            f"Classes with layers that adapters can serve: {', '.join(have) or '(none)'}"
        )


def schedule_of(metadata: Mapping[str, str]) -> RankSchedule | None:
    """The rank schedule in a file's header, by itself or in its `lycoris_config`, or None."""
    if (found := in_header(metadata)) is not None:
        return found
    text = metadata.get("lycoris_config", "{}")
    try:
        config = json_object(text)
    except ValueError:
        logger.warning("the header's lycoris_config is no JSON object and was left aside: %.80s", text)
        return None
    return schedule_in(config)


def schedule_in(config: Mapping[str, Any]) -> RankSchedule | None:
    """The rank schedule that a whole config describes, whatever else it says; None when no T-LoRA is in it."""
    preset = config.get("apply_preset")
    maps = {
        name: {target: _kept(override) for target, override in given.items() if isinstance(override, Mapping)}
        for name in ("module_algo_map", "name_algo_map")
        if isinstance(preset, Mapping) and isinstance(given := preset.get(name), Mapping)
    }
    algos = [config.get("algo"), *(override.get("algo") for given in maps.values() for override in given.values())]
    if "tlora" not in [str(algo).lower() for algo in algos]:
        return None
    only = {name: {k: v for k, v in given.items() if _masked(v, config)} for name, given in maps.items()}
    algo = "tlora" if str(config.get("algo")).lower() == "tlora" else "lora"
    return Recipe.parse(_kept(config) | {"algo": algo, "apply_preset": {"use_fnmatch": True} | only}).schedule


def _kept(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config or an override a schedule depends on."""
    return {key: config[key] for key in ("algo", "dim", "linear_dim", "conv_dim", *SCHEDULE) if key in config}


def _masked(override: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return str(override.get("algo", config.get("algo"))).lower() == "tlora"


def _algorithms(algo: str, preset: Preset) -> set[str]:
    """Names of the algorithms that layers may get."""
    return {algo, *(str(override.get("algo", algo)).lower() for override in preset.overrides())}


def _without_effect(
    algo: str, preset: Preset, given: Mapping[str, Any], options: Mapping[str, Any]
) -> Iterator[Remark]:
    """What was given, is right, and changes nothing."""
    for name in preset.for_pipelines():
        yield Remark(f"{name} has no effect here: it is for interfaces that adapt a whole pipeline, not one model")
    if options.get("bypass_mode") or any(override.get("bypass_mode") for override in preset.overrides()):
        yield Remark("bypass_mode has no effect: every path here is exact")
    every = [options, *({**options, **override} for override in preset.overrides())]
    for name in ("wd_on_output", "wd_on_out"):
        asked = [each for each in every if name in each]
        if asked and not any(each.get("dora_wd") or each.get("weight_decompose") for each in asked):
            yield Remark(f"{name} has no effect without dora_wd")
    if options.get("rank_dropout") and any(each.get("train_norm") for each in every):
        yield Remark("rank_dropout has no effect on norms, which have no rank")
    if options.get("rank_dropout_scale") and not options.get("rank_dropout"):
        yield Remark("rank_dropout_scale has no effect without rank_dropout")
    yield from _unused_sizes(_algorithms(algo, preset), given)


def _unused_sizes(algorithms: set[str], given: Mapping[str, Any]) -> Iterator[Remark]:
    for algo, sizes in UNUSED_SIZES.items():
        for name in sizes if algorithms == {algo} else ():
            if given.get(name) is not None:
                what = "alpha" if "alpha" in name else "rank"
                yield Remark(f"{name} has no effect on {algo}, which has no {what}")
