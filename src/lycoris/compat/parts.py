"""The adapters of one model of a network: how they are chosen, what they are called, and what a file has for them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from lycoris import files
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms import DoRA
from lycoris.algorithms.base import Entry
from lycoris.algorithms.dora import unwrap_dora
from lycoris.compat.legacy_options import read_preset, rename_options, tell
from lycoris.compat.quantized import check_trainable
from lycoris.errors import ConfigError
from lycoris.files.dialects.base import flatten
from lycoris.layers.sites import ModelSites
from lycoris.models import fingerprint
from lycoris.targeting.options import OPTIONS, SCHEDULE, parse_optional
from lycoris.targeting.planning import Plan
from lycoris.targeting.preset import PRESETS_WITH_CONV, Preset
from lycoris.targeting.recipe import Recipe

logger = logging.getLogger("LyCORIS")


DROPOUT = ("dropout", "rank_dropout", "rank_dropout_scale", "module_dropout")
_READ = (*DROPOUT, *SCHEDULE, "bypass_mode")
"""Options that count beside a file's tensors."""


class Part(NamedTuple):
    """The adapters of one model."""

    prefix: str
    """What their names in the file start with."""
    adapters: AdapterSet
    text: bool = False
    """Whether the model encodes text; such ones follow no timestep."""


def choose(
    model: nn.Module, given: Mapping[str, Any], preset: Preset | None, *, warn_on_unmatched: bool
) -> tuple[Part, Recipe]:
    """New adapters for a model by a config, and the config as it was read; `preset` is that of the class of networks.

    Raises `ConfigError` for wrong values and `PlanError` when no layer of the model is meant.
    """
    given, own = rename_options(given), {}
    named = given.get("preset")
    if named is not None and str(named) not in PRESETS_WITH_CONV:
        own, given = read_preset(str(named)), given | {"preset": None}
    if preset is not None and given.get("apply_preset"):
        if Preset.parse(given["apply_preset"]) != preset:
            logger.warning("apply_preset was given to the class and, with other values, here; the class's is used")
        given = {key: value for key, value in given.items() if key != "apply_preset"}
    if own:
        # The keys of a file count before those that apply_preset was given, by the class or here.
        preset = over(preset or Preset.parse(given.pop("apply_preset", None) or {}), own)
    recipe = Recipe.parse(given, strict=False, preset=preset)
    plan = recipe.plan(model)
    tell(plan.remarks, unmatched=warn_on_unmatched)
    check_plan(plan)
    adapters = AdapterSet.build(model, plan, name=None)
    adapters.schedule = recipe.schedule
    logger.info("%s", replace(plan, remarks=()))
    return Part(recipe.preset.lora_prefix, adapters), recipe


def over(preset: Preset, given: Mapping[str, Any]) -> Preset:
    """A preset with the keys of a JSON object in the place of its own."""
    return Preset.parse({**{each.name: _plain(getattr(preset, each.name)) for each in fields(preset)}, **given})


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def check_plan(plan: Plan) -> None:
    """Raise `ConfigError` where a quantised layer would get what it cannot have."""
    uses = {each.path: each.algorithms for each in plan.placements if each.geometry.kind == "linear"}
    layers = {path: site.module for path, site in (plan.sites or {}).items()}
    check_trainable(layers, uses)


def resolve(
    tensors: Mapping[str, Tensor],
    model: nn.Module | ModelSites,
    prefix: str,
    metadata: Mapping[str, str],
    *,
    text: bool,
) -> Bundle:
    """The tensors of one of several models; what is to be said of them is on the logger "LyCORIS"."""
    # The base that a header names is the denoiser.
    own = {key: told for key, told in metadata.items() if not (text and key == fingerprint.KEY)}
    # A trainer's module has tensors of its own.
    bundle = files.resolve(tensors, model, prefix=prefix, metadata=own, shared=False)
    for remark in bundle.remarks:
        logger.warning("%s: %s", prefix, remark)
    return bundle


def with_dropout(bundle: Bundle, options: Mapping[str, Any]) -> Bundle:
    """The adapters of a file with the dropout that was asked for, of which a file says nothing.

    What an algorithm does not have is on the logger "LyCORIS", and so are the other options, which tensors decide.
    """
    drop = {name: value for name in DROPOUT if (value := parse_optional(options.get(name), name, OPTIONS[name].kind))}
    others = sorted(name for name, value in options.items() if name in OPTIONS and value and name not in _READ)
    if others:
        logger.info("a file's tensors say what these options do, which have no effect: %s", ", ".join(others))
    if not drop:
        return bundle
    lacking: set[str] = set()

    def dropping(entry: Entry) -> Entry:
        algorithm = unwrap_dora(entry.algorithm)
        own = {name: value for name, value in drop.items() if hasattr(algorithm, name)}
        if "rank_dropout" not in own:
            own.pop("rank_dropout_scale", None)
        lacking.update(f"{algorithm.name} has no {name}" for name in drop if not hasattr(algorithm, name))
        if isinstance(entry.algorithm, DoRA):
            over = replace(entry.algorithm.inner, **own)
            return entry._replace(algorithm=replace(entry.algorithm, inner=over))
        return entry._replace(algorithm=replace(algorithm, **own))

    entries = {path: tuple(map(dropping, stack)) for path, stack in bundle.entries.items()}
    for each in sorted(lacking):
        logger.info("%s", each)
    return replace(bundle, entries=entries)


def module_name(prefix: str, path: str, at: int) -> str:
    """Of an adapter's module. What a file has beside an algorithm, such as a bias, has no name of its own there."""
    return f"{prefix}_{flatten(path)}{f'__{at}' if at else ''}"


def encode(part: Part) -> dict[str, Tensor]:
    """The tensors of a part as they would be in a file."""
    return files.encode(part.adapters.bundle(), prefix=part.prefix)


def check_names(parts: Sequence[Part]) -> None:
    """Raise `ConfigError` when two layers have one name: the second adapter would take the place of the first."""
    for at, part in enumerate(parts):
        if part.prefix in [other.prefix for other in parts[:at]]:
            kind = type(part.adapters.model).__name__
            raise ConfigError(f"two models, the second a {kind}, are both called {part.prefix} here; leave one out")
        owner: dict[str, str] = {}
        for path in part.adapters.stacks:
            first = owner.setdefault(flatten(path), path)
            if first != path:
                raise ConfigError(
                    f"{first} and {path} are both called {flatten(path)} here, where dots become underscores; leave "
                    "one out with exclude_name, or use AdapterSet, which goes by paths"
                )
