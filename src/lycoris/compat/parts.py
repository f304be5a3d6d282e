"""The adapters of one model of a network: how they are chosen and named, and how a file is read for them."""

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
from lycoris.compat.class_preset import to_json_value
from lycoris.compat.legacy_options import log_remarks, read_preset, rename_options
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
"""Options that have an effect on adapters read from a file."""


class NetworkPart(NamedTuple):
    """The adapters of one model.

    A network over a pipeline has several parts, of which at most one is the denoiser.
    """

    prefix: str
    """Prefix of their names in a file."""
    adapters: AdapterSet
    text: bool = False
    """Whether the model is a text encoder, which has no timesteps."""


def choose_adapters(
    model: nn.Module, given: Mapping[str, Any], preset: Preset | None, *, warn_on_unmatched: bool
) -> tuple[NetworkPart, Recipe]:
    """Build adapters for a model from config options, and return them with the parsed config.

    Args:
        given: Options of a config, also under deprecated names.
        preset: Preset of the class of networks. It takes precedence over `apply_preset` in `given`; keys of a preset
            file named there take precedence over it.
        warn_on_unmatched: Whether targets that match no layer are warnings.

    Raises `ConfigError` for wrong values and `PlanError` when no layer of the model is targeted.
    """
    given, own = rename_options(given), {}
    named = given.get("preset")
    if named is not None and str(named) not in PRESETS_WITH_CONV:
        own, given = read_preset(str(named)), given | {"preset": None}
    if preset is not None and given.get("apply_preset"):
        if Preset.parse(given["apply_preset"]) != preset:
            logger.warning("apply_preset of the class and of this call differ; that of the class is used")
        given = {key: value for key, value in given.items() if key != "apply_preset"}
    if own:
        # Keys of a preset file take precedence over those of apply_preset.
        preset = override_preset(preset or Preset.parse(given.pop("apply_preset", None) or {}), own)
    recipe = Recipe.parse(given, strict=False, preset=preset)
    plan = recipe.plan(model)
    log_remarks(plan.remarks, unmatched=warn_on_unmatched)
    check_plan(plan)
    adapters = AdapterSet.build(model, plan, name=None)
    adapters.schedule = recipe.schedule
    logger.info("%s", replace(plan, remarks=()))
    return NetworkPart(recipe.preset.lora_prefix, adapters), recipe


def override_preset(preset: Preset, given: Mapping[str, Any]) -> Preset:
    """Return a preset with the keys of a JSON object replaced.

    Raises `ConfigError` for unknown keys and wrong values.
    """
    return Preset.parse({**{each.name: to_json_value(getattr(preset, each.name)) for each in fields(preset)}, **given})


def check_plan(plan: Plan) -> None:
    """Check that no quantized linear layer gets an adapter that it cannot have.

    Raises `ConfigError`; see `lycoris.compat.quantized.check_trainable`.
    """
    uses = {each.path: each.algorithms for each in plan.placements if each.geometry.kind == "linear"}
    layers = {path: site.module for path, site in (plan.sites or {}).items()}
    check_trainable(layers, uses)


def resolve_part(
    tensors: Mapping[str, Tensor],
    model: nn.Module | ModelSites,
    prefix: str,
    metadata: Mapping[str, str],
    *,
    text: bool,
) -> Bundle:
    """Match the tensors of a file with the layers of one of several models.

    Remarks are logged as warnings. `text` models ignore the base model named in the header, which is the denoiser.
    Raises `FileError` for tensors that do not match.
    """
    # The base model in a header is the denoiser.
    own = {key: value for key, value in metadata.items() if not (text and key == fingerprint.FINGERPRINT_KEY)}
    # Modules of a trainer do not share tensors.
    bundle = files.resolve(tensors, model, prefix=prefix, metadata=own, shared=False)
    for remark in bundle.remarks:
        logger.warning("%s: %s", prefix, remark)
    return bundle


def add_dropout(bundle: Bundle, options: Mapping[str, Any]) -> Bundle:
    """Return a file's adapters with the dropout from `options`, which files do not store.

    Settings that an algorithm does not have, and options that a file's tensors decide, are logged.
    """
    drop = {name: value for name in DROPOUT if (value := parse_optional(options.get(name), name, OPTIONS[name].kind))}
    others = sorted(name for name, value in options.items() if name in OPTIONS and value and name not in _READ)
    if others:
        logger.info("these options have no effect, since the tensors of the file decide: %s", ", ".join(others))
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


def name_module(prefix: str, path: str, at: int) -> str:
    """Return the name of an adapter's module: prefix and path, with underscores for dots.

    `at` is the adapter's index on its layer. Only the first has this name in files; others, such as a bias, get a
    suffix.
    """
    return f"{prefix}_{flatten(path)}{f'__{at}' if at else ''}"


def encode_part(part: NetworkPart) -> dict[str, Tensor]:
    """Return the tensors of a part by their names in a file."""
    return files.encode(part.adapters.bundle(), prefix=part.prefix)


def check_names(parts: Sequence[NetworkPart]) -> None:
    """Check that no two layers have the same name in a file, where one adapter would replace the other.

    Raises `ConfigError`, since dots in paths become underscores there, or when two models have the same prefix.
    """
    for at, part in enumerate(parts):
        if part.prefix in [other.prefix for other in parts[:at]]:
            kind = type(part.adapters.model).__name__
            raise ConfigError(f"two models, the second a {kind}, have the same prefix {part.prefix}; leave one out")
        owner: dict[str, str] = {}
        for path in part.adapters.stacks:
            first = owner.setdefault(flatten(path), path)
            if first != path:
                raise ConfigError(
                    f"{first} and {path} have the same name {flatten(path)}, where dots become underscores; leave one "
                    "out with exclude_name, or use AdapterSet, which uses paths"
                )
