"""`lycoris_config.json`: the settings that trainers hand over, and the plan that they mean for a model.

Names, defaults and matching rules are those that existing configs rely on. Every option is honored, refused, or
remarked upon; none is dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from lycoris.errors import ConfigError, unknown
from lycoris.json_io import json_object
from lycoris.targeting.options import (
    OVERRIDE,
    SCHEDULE,
    TOP,
    UNUSED_SIZES,
    check_algorithm_name,
    parse_number,
    parse_optional,
    parse_options,
    parse_rank,
)
from lycoris.targeting.preset import Preset, with_named
from lycoris.targeting.remarks import Remark

if TYPE_CHECKING:
    from torch import nn

    from lycoris.algorithms.base import Algorithm
    from lycoris.layers.geometry import Geometry
    from lycoris.layers.sites import ModelSites
    from lycoris.targeting.planning import Plan
    from lycoris.targeting.rank_schedule import RankSchedule

logger = logging.getLogger("LyCORIS")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A parsed `lycoris_config.json`.

    `parse` checks and makes one; the constructor takes values as they are. `linear_alpha` 0 or None means the rank, and
    None for `conv_dim` or `conv_alpha` what linear layers have.
    """

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
    unserved: Literal["error", "skip"] = "error"
    """What becomes of layers that their algorithm cannot serve; see `lycoris.targeting.planning.plan`."""
    remarks: tuple[Remark, ...] = ()

    @classmethod
    def parse(cls, given: Mapping[str, Any], *, strict: bool = True, preset: Preset | None = None) -> Recipe:
        """Check a config and read it.

        Raises `ConfigError` for a wrong value and, when `strict`, for a key that nothing knows; otherwise such a key
        becomes a remark. `preset` stands in for a missing `apply_preset`.
        """
        remarks: list[Remark] = []
        algo = str(given.get("algo", "lora")).lower()
        check_algorithm_name(algo)
        wanted = given.get("apply_preset")
        if wanted:
            preset = Preset.parse(wanted)
        preset = with_named(preset or Preset(), wanted or {}, given.get("preset"), remarks)
        masked = "tlora" in _algorithm_names(algo, preset)
        top = {k: v for k, v in given.items() if k not in TOP}
        schedule = {k: top.pop(k) for k in SCHEDULE if masked and k in top}
        options = parse_options(algo, top, "", strict, remarks) | parse_options("tlora", schedule, "", strict, remarks)
        for where, maps in (("module_algo_map", preset.module_algo_map), ("name_algo_map", preset.name_algo_map)):
            for name, override in maps.items():
                inner = str(override.get("algo", algo)).lower()
                check_algorithm_name(inner)
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
            unserved=_parse_unserved(given.get("unserved", "error")),
            remarks=tuple(dict.fromkeys(remarks)),
        )

    def as_dict(self) -> dict[str, Any]:
        """Return the JSON object as it came, as a new dict.

        Defaults are not filled in, and options that were remarked upon are still there.
        """
        return dict(self.given)

    @property
    def schedule(self) -> RankSchedule | None:
        """Of the ranks that count by timestep; None when no layer can get an algorithm that has one.

        Its largest rank is that of any T-LoRA layer, by the sizes that the config gives.
        """
        overrides = [{"algo": self.algo}, *self.preset.overrides()]
        masked = [o for o in overrides if str(o.get("algo", self.algo)).lower() == "tlora"]
        shapes = [True, False] if self.preset.enable_conv else [True]
        ranks = [self.rank_for(pointwise, override) for override in masked for pointwise in shapes]
        if not ranks:
            return None
        # With torch, which a config is checked without.
        from lycoris.targeting.rank_schedule import RankSchedule

        return RankSchedule(
            max_rank=max(ranks),
            min_rank=int(self.options.get("tlora_min_rank", 1)),
            alpha=float(self.options.get("tlora_alpha", 1.0)),
        )

    def plan(self, model: nn.Module | ModelSites) -> Plan:
        """Return what each layer of a model gets; the model stays as it is.

        Raises:
            NothingMeantError: No layer is targeted. The message names the classes that the model has.
            PlanError: An algorithm cannot serve a layer that is targeted; `unserved` "skip" leaves such layers out.
        """
        from lycoris.targeting.assignment import plan_recipe

        return plan_recipe(self, model)

    def algorithm(self, geometry: Geometry, override: Mapping[str, Any]) -> Algorithm:
        """Return the algorithm for a layer of this shape.

        Args:
            override: The settings that a preset has for the layer; they win over the general ones. {}: none.

        Raises:
            ConfigError: The override has an unknown algorithm or a wrong value.
        """
        from lycoris.targeting.assignment import algorithm

        return algorithm(self, geometry, override)

    def rank_for(self, pointwise: bool, override: Mapping[str, Any]) -> int:
        """Return the rank of a layer; convolutions fall back on that of linear layers.

        Args:
            pointwise: Whether it is a linear layer or a 1x1 convolution.
            override: The settings that a preset has for the layer: `dim` wins, then `linear_dim` or `conv_dim`.

        Raises:
            ConfigError: A rank of the override is no whole number, or `dim` or `linear_dim` is below 1.
        """
        own = parse_rank(override.get("dim"), "dim")
        if pointwise:
            return own or parse_rank(override.get("linear_dim"), "linear_dim") or self.linear_dim
        conv = parse_optional(override.get("conv_dim"), "conv_dim", int)
        return int(own or conv or self.conv_dim or self.linear_dim)


def _parse_unserved(value: Any) -> Literal["error", "skip"]:
    if value not in ("error", "skip"):
        raise ConfigError(unknown("value of unserved", str(value), ("error", "skip")))
    return "skip" if value == "skip" else "error"


def schedule_of(metadata: Mapping[str, str]) -> RankSchedule | None:
    """Return the rank schedule in a file's header, by itself or in the settings of its training.

    None where there is none. Settings that are no JSON object are logged and left aside.

    Raises:
        FileError: The header has a schedule of its own that cannot be read.
        ConfigError: The settings of the training describe a schedule with a wrong value.
    """
    from lycoris.targeting.rank_schedule import in_header

    if (found := in_header(metadata)) is not None:
        return found
    for key in SETTINGS_KEYS:
        if _read_settings(metadata, key) is None:
            logger.warning("the header's %s is no JSON object and was left aside: %.80s", key, metadata[key])
    return schedule_in(settings_of(metadata))


SETTINGS_KEYS = ("ss_network_args", "lycoris_config")
"""Header keys with settings of training as JSON: of sd-scripts and Musubi Tuner; of SimpleTuner and this library."""


def settings_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Return the settings of training in a file's header, as far as it can be read; {} for none.

    What `lycoris_config` says wins over `ss_network_args`, and that over `ss_network_dim`. What is no JSON object is
    left out without a word.
    """
    settings: dict[str, Any] = {}
    if (rank := metadata.get("ss_network_dim", "")).isdecimal():
        settings["linear_dim"] = rank
    for key in SETTINGS_KEYS:
        settings |= _read_settings(metadata, key) or {}
    return settings


def _read_settings(metadata: Mapping[str, str], key: str) -> dict[str, Any] | None:
    """None for what is no JSON object."""
    try:
        return json_object(metadata.get(key, "{}"))
    except ValueError:
        return None


def schedule_in(config: Mapping[str, Any]) -> RankSchedule | None:
    """Return the rank schedule that a whole config describes, whatever else it says; None when no T-LoRA is in it.

    Raises:
        ConfigError: A rank or a setting of the schedule is wrong.
    """
    preset = config.get("apply_preset")
    maps = {
        name: {target: _schedule_keys(override) for target, override in given.items() if isinstance(override, Mapping)}
        for name in ("module_algo_map", "name_algo_map")
        if isinstance(preset, Mapping) and isinstance(given := preset.get(name), Mapping)
    }
    algos = [config.get("algo"), *(override.get("algo") for given in maps.values() for override in given.values())]
    if "tlora" not in [str(algo).lower() for algo in algos]:
        return None
    only = {name: {k: v for k, v in given.items() if _uses_masks(v, config)} for name, given in maps.items()}
    algo = "tlora" if str(config.get("algo")).lower() == "tlora" else "lora"
    return Recipe.parse(_schedule_keys(config) | {"algo": algo, "apply_preset": {"use_fnmatch": True} | only}).schedule


def _schedule_keys(config: Mapping[str, Any]) -> dict[str, Any]:
    """What of a config or an override a schedule depends on."""
    return {key: config[key] for key in ("algo", "dim", "linear_dim", "conv_dim", *SCHEDULE) if key in config}


def _uses_masks(override: Mapping[str, Any], config: Mapping[str, Any]) -> bool:
    return str(override.get("algo", config.get("algo"))).lower() == "tlora"


def _algorithm_names(algo: str, preset: Preset) -> set[str]:
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
    yield from _unused_sizes(_algorithm_names(algo, preset), given)


def _unused_sizes(algorithms: set[str], given: Mapping[str, Any]) -> Iterator[Remark]:
    for algo, sizes in UNUSED_SIZES.items():
        for name in sizes if algorithms == {algo} else ():
            if given.get(name) is not None:
                what = "alpha" if "alpha" in name else "rank"
                yield Remark(f"{name} has no effect on {algo}, which has no {what}")
