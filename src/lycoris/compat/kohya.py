"""`create_network` and `create_network_from_weights`, as sd-scripts and similar trainers call them."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from torch import Tensor, nn

from lycoris import files
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.algorithms import OFT
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.ranked import Ranked
from lycoris.compat import block_classes
from lycoris.compat.inside import log_layers
from lycoris.compat.kohya_network import LycorisNetworkKohya, Ratios
from lycoris.compat.legacy_options import log_remarks, read_preset, rename_options
from lycoris.compat.parts import NetworkPart, add_dropout, check_plan, resolve_part
from lycoris.compat.patterns import KEYWORDS, PatternedPreset, Patterns
from lycoris.compat.presets import list_builtin_presets
from lycoris.errors import ConfigError, FileError, NothingMeantError
from lycoris.files.source import open_source
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_number, parse_optional, unknown_options
from lycoris.targeting.planning import USUAL, Plan, servable
from lycoris.targeting.preset import LAYER_CLASSES, Preset
from lycoris.targeting.recipe import Recipe, schedule_in
from lycoris.targeting.remarks import Remark

logger = logging.getLogger("LyCORIS")

Network = TypeVar("Network", bound=LycorisNetworkKohya)

RATIO_NAMES = tuple(f.name for f in fields(Ratios))
KOHYA_KEYWORDS = ("preset", "train_t5xxl", "train_llm_adapter", "neuron_dropout", "verbose", *RATIO_NAMES, *KEYWORDS)
"""Keywords that only this interface has, not configs."""

TEXT_MODEL_PART = "_text_model"
"""Part of the names of CLIP's layers in files that transformers 5 leaves out."""

OFT_UNET = "oft_unet"
"""Prefix of the denoiser in files of sd-scripts' own OFT."""


@dataclass(frozen=True)
class Component:
    """One of the models of a pipeline.

    `prefix` is how its layers' names start in a file, `text` tells text encoders from the denoiser, and `t5` marks
    those that are trained only with `train_t5xxl`.
    """

    model: nn.Module
    prefix: str
    text: bool
    t5: bool = False


def list_components(
    text_encoder: Any, unet: nn.Module | None, network: type[LycorisNetworkKohya] = LycorisNetworkKohya
) -> list[Component]:
    """Return the models with their prefixes: `lora_te` for a single text encoder, `lora_te1` and so on for a list.

    A T5 that is not the first in a list is always the third, as in files for Flux. Models that are None are left out.
    """
    found = []
    for at, model in enumerate(text_encoder if isinstance(text_encoder, list | tuple) else [text_encoder]):
        if model is None:
            continue
        t5 = type(model).__name__.startswith(("T5", "UMT5"))
        number = "" if not isinstance(text_encoder, list | tuple) else "3" if t5 and at else str(at + 1)
        prefix = f"{network.LORA_PREFIX_TEXT_ENCODER}{number}"
        # transformers 5 has no text_model any more, but programs that read files still look for it.
        bare = type(model).__name__ == "CLIPTextModel" and not hasattr(model, "text_model")
        found.append(Component(model, f"{prefix}{TEXT_MODEL_PART}" if bare else prefix, True, t5))
    if unet is not None:
        found.append(Component(unet, network.LORA_PREFIX_UNET, False))
    return found


def create_network(
    multiplier: float | str,
    network_dim: int | str | None,
    network_alpha: float | str | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module,
    warn_on_unmatched: bool = True,
    **kwargs: Any,
) -> LycorisNetworkKohya:
    """Build adapters for a denoiser and its text encoders (one, a list, or None); they are not yet applied.

    All values may be strings. `preset` is a built-in name, "full" by default, or a TOML or JSON file. `conv_dim=0`
    leaves out convolutions with a kernel larger than 1. Unknown keywords are ignored with a warning.

    Raises `ConfigError` for wrong values and `PlanError` when no layer of any model is targeted.
    """
    parts, recipe = build_parts(
        LycorisNetworkKohya, multiplier, network_dim, network_alpha, text_encoder, unet, warn_on_unmatched, kwargs
    )
    network = LycorisNetworkKohya.from_parts(parts, recipe.multiplier, recipe.options.get("bypass_mode"), recipe)
    apply_options(network, kwargs)
    return network


def build_parts(
    network: type[LycorisNetworkKohya],
    multiplier: float | str,
    network_dim: int | str | None,
    network_alpha: float | str | None,
    text_encoder: Any,
    unet: nn.Module | None,
    warn_on_unmatched: bool,
    kwargs: Mapping[str, Any],
) -> tuple[list[NetworkPart], Recipe]:
    """Build adapters for each model from the arguments of `create_network`.

    Returns the parts, and the recipe that the arguments describe. Raises `ConfigError` and `PlanError` as
    `create_network` does.
    """
    options = {key: value for key, value in rename_options(kwargs).items() if value is not None}
    if options.get("neuron_dropout"):
        options.setdefault("dropout", options["neuron_dropout"])
    given = {key: value for key, value in options.items() if key not in KOHYA_KEYWORDS}
    given |= {"multiplier": multiplier, "linear_dim": network_dim, "linear_alpha": network_alpha}
    preset, builtin = _resolve_preset(network, options.get("preset"), given.pop("apply_preset", None))
    if parse_optional(given.get("conv_dim"), "conv_dim", int) == 0:
        given.pop("conv_dim")
        preset = replace(preset, enable_conv=False)
    _warn_of_single_model_keys(preset)
    if (patterns := Patterns.parse(options)) != Patterns():
        alpha = parse_optional(network_alpha, "network_alpha", float)
        preset = PatternedPreset.over(preset, patterns, alpha)
    recipe = Recipe.parse(given, strict=False, preset=preset)
    plans: list[tuple[Component, Recipe, Plan]] = []
    nothing: NothingMeantError | None = None
    models = list_components(text_encoder, unet, network)
    searched = [ModelSites(each.model) for each in models]
    for component, sites in zip(models, searched, strict=True):
        own = Recipe.parse(
            given, strict=False, preset=_select_targets(preset, component, **_read_optional_parts(options))
        )
        if not _has_targets(own.preset):
            continue
        try:
            plans.append((component, own, own.plan(sites)))
        except NothingMeantError as error:
            nothing = nothing or error if component.text else error
    remarks = [remark for _, _, plan in plans for remark in plan.remarks]
    log_remarks([each for each in remarks if not (builtin and each.kind == "unmatched")], unmatched=warn_on_unmatched)
    log_remarks(_find_unused_patterns(patterns, searched, plans), unmatched=warn_on_unmatched)
    if not plans:
        raise _explain_no_targets(patterns, nothing, str(options.get("preset", "full")))
    verbose = parse_number(options.get("verbose") or False, "verbose", bool)
    return [_build_part(component, own, plan, verbose) for component, own, plan in plans], recipe


def _warn_of_single_model_keys(preset: Preset) -> None:
    """Warn of preset keys that have an effect only on networks over one model."""
    if preset.target_module != LAYER_CLASSES or preset.target_name or preset.lora_prefix != Preset().lora_prefix:
        logger.warning(
            "target_module, target_name and lora_prefix of the preset only affect networks over one model; use "
            "unet_target_module, unet_target_name, text_encoder_target_module and text_encoder_target_name here, and "
            "LORA_PREFIX_UNET and LORA_PREFIX_TEXT_ENCODER of the class for prefixes"
        )


def _build_part(component: Component, recipe: Recipe, plan: Plan, verbose: bool) -> NetworkPart:
    check_plan(plan)
    adapters = AdapterSet.build(component.model, plan, name=None)
    adapters.schedule = recipe.schedule
    logger.info("%s: %s", component.prefix, replace(plan, remarks=()))
    if verbose:
        log_layers(component.prefix, plan)
    return NetworkPart(component.prefix, adapters, component.text)


def _find_unused_patterns(
    patterns: Patterns, models: Sequence[ModelSites], plans: Sequence[tuple[Component, Recipe, Plan]]
) -> Iterator[Remark]:
    """Yield a remark for each pattern without effect."""
    placements = [each for _, _, plan in plans for each in plan.placements]
    paths = (path for model in models for path in servable(model, (*USUAL, "norm")))
    yield from patterns.find_unmatched(paths, [each.path for each in placements])
    unranked = {
        unwrap_dora(algorithm).name
        for each in placements
        for algorithm in each.algorithms
        if patterns.rank_for(each.path) and not isinstance(unwrap_dora(algorithm), Ranked | OFT)
    }
    for name in sorted(unranked):
        yield Remark(f"network_reg_dims has no effect on {name}, which has no rank", "unmatched")


def _explain_no_targets(patterns: Patterns, nothing: NothingMeantError | None, preset: str) -> NothingMeantError:
    message = str(nothing) if nothing else f"the preset {preset!r} has no targets for these models"
    if patterns.excludes or any(rank == 0 for _, rank in patterns.ranks):
        message += ". exclude_patterns and ranks of 0 in network_reg_dims exclude layers that are targeted otherwise"
    return NothingMeantError(message)


def apply_options(network: LycorisNetworkKohya, options: Mapping[str, Any]) -> None:
    """Set the attributes that trainers read off a network, and what its parameter groups depend on.

    These are `train_t5xxl`, `train_llm_adapter`, the LoRA+ ratios and the learning rates by pattern.
    """
    vars(network).update({f"train_{name}": on for name, on in _read_optional_parts(options).items()})
    network.ratios = Ratios(**{name: parse_optional(options.get(name), name, float) for name in RATIO_NAMES})
    network.patterns = Patterns.parse(options)


def _read_optional_parts(options: Mapping[str, Any]) -> dict[str, bool]:
    return {name: parse_number(options.get(f"train_{name}") or False, f"train_{name}", bool) for name in OPTIONAL_PARTS}


OPTIONAL_PARTS = ("t5xxl", "llm_adapter")
"""Parts trained only on request, by `train_t5xxl` and `train_llm_adapter`."""


def create_network_from_weights(
    multiplier: float | str,
    file: str | os.PathLike[str] | None,
    vae: Any,
    text_encoder: Any,
    unet: nn.Module | None,
    weights_sd: Mapping[str, Tensor] | None = None,
    for_inference: bool = False,
    **kwargs: Any,
) -> tuple[LycorisNetworkKohya, dict[str, Tensor]]:
    """Build adapters from a file or its tensors; they are not yet applied. Returns the network and the tensors.

    Settings come from the tensors; of `kwargs`, those count that training depends on, such as dropout, LoRA+ ratios,
    and a T-LoRA schedule that the header lacks. Tensors of text encoders that are not given are skipped with a warning.

    Args:
        weights_sd: Tensors to use instead of reading `file`.
        for_inference: Whether `merge_to` is irreversible, and so needs no copy of the original weights.

    Raises `FileError` when the file is damaged, does not match the models, or has tensors without a layer.
    """
    options = rename_options(kwargs)
    if options.get("neuron_dropout"):
        options.setdefault("dropout", options["neuron_dropout"])
    log_remarks(unknown_options({key: value for key, value in options.items() if key not in KOHYA_KEYWORDS}))
    models = list_components(text_encoder, unet)
    return read_network(LycorisNetworkKohya, models, multiplier, file, weights_sd, for_inference, options)


def read_network(
    kind: type[Network],
    models: Sequence[Component],
    multiplier: float | str,
    file: str | os.PathLike[str] | None,
    weights_sd: Mapping[str, Tensor] | None,
    for_inference: bool,
    options: Mapping[str, Any],
) -> tuple[Network, dict[str, Tensor]]:
    """Build a network of class `kind` from a file or its tensors; see `create_network_from_weights`.

    Returns the network and the tensors. `models` are the pipeline's models with their usual prefixes; files may have
    others.
    """
    with open_source(file, weights_sd) as (tensors, header):
        parts = list(_read_parts(tensors, header, _rename_as_in_file(models, tensors), options))
    bypass: bool | None = parse_optional(options.get("bypass_mode"), "bypass_mode", bool)
    network = kind.from_parts(parts, parse_number(multiplier, "multiplier", float), bypass)
    network.for_inference = for_inference
    apply_options(network, options)
    rates = Patterns(rates=network.patterns.rates)
    log_remarks(rates.find_unmatched((), [path for part in parts for path in part.adapters.stacks]))
    if idle := [name for name in KEYWORDS if options.get(name) and name != "network_reg_lrs"]:
        logger.info("these options have no effect, since the tensors of the file decide: %s", ", ".join(idle))
    return network, tensors


def _read_parts(
    tensors: dict[str, Tensor],
    metadata: Mapping[str, str],
    models: Sequence[Component],
    options: Mapping[str, Any],
) -> Iterator[NetworkPart]:
    """Yield the adapters of each model. Tensors whose meaning the header changes are replaced in `tensors`."""
    named = [key for key in tensors if "." in key]
    owner = {key: next((m for m in models if key.startswith(f"{m.prefix}_")), None) for key in named}
    lost = [key for key, model in owner.items() if model is None]
    text = LycorisNetworkKohya.LORA_PREFIX_TEXT_ENCODER
    have = ", ".join(f"{model.prefix}_..." for model in models) or "none"
    if strange := [key for key in lost if not key.startswith(text)]:
        raise FileError(
            f"{len(strange)} of {len(named)} tensors belong to none of the given models, such as {strange[0]}; the "
            f"prefixes of the models are {have}. Read a file for one model with create_lycoris_from_weights"
        )
    if lost:
        logger.warning(
            "%d tensors such as %s are for text encoders that were not given, and are skipped; the given models are %s",
            len(lost),
            lost[0],
            have,
        )
    if len(lost) == len(named):
        raise FileError(f"it has no tensors for the given models, whose prefixes are {have}")
    for model in models:
        own = {key: tensors[key] for key in named if owner[key] is model}
        if not own:
            continue
        sites = ModelSites(model.model)
        bundle = resolve_part(own, sites, model.prefix, metadata, text=model.text)
        if bundle.report.changed:
            # Trainers load the tensors again, without the header, which is the reason for the change.
            changed = files.encode(bundle, prefix=model.prefix)
            tensors |= {key: t for key, t in changed.items() if key.endswith(".alpha") and key in tensors}
        adapters = AdapterSet.load(sites, add_dropout(bundle, options), name=None)
        adapters.schedule = adapters.schedule or schedule_in(options)
        yield NetworkPart(model.prefix, adapters, model.text)


def _rename_as_in_file(models: Sequence[Component], tensors: Mapping[str, Tensor]) -> list[Component]:
    """Return the models with the prefixes of a file.

    It may leave out `text_model`, have no number for the only text encoder (or have one), count a T5 as the second, and
    call the denoiser `oft_unet`, as sd-scripts' own OFT does.
    """
    text, unet = LycorisNetworkKohya.LORA_PREFIX_TEXT_ENCODER, LycorisNetworkKohya.LORA_PREFIX_UNET
    have = {name for name in (unet, OFT_UNET, text, *(f"{text}{n}" for n in (1, 2, 3))) if _has_prefix(tensors, name)}
    taken = {model.prefix.removesuffix(TEXT_MODEL_PART) for model in models}
    found = []
    for model in models:
        name = model.prefix.removesuffix(TEXT_MODEL_PART)
        others = {text: f"{text}1", f"{text}1": text, f"{text}3": f"{text}2" if model.t5 else "", unet: OFT_UNET}
        other = others.get(name, "")
        if name not in have and other in have and other not in taken:
            name = other
        bare = model.prefix.endswith(TEXT_MODEL_PART) and _has_prefix(tensors, f"{name}{TEXT_MODEL_PART}")
        found.append(replace(model, prefix=f"{name}{TEXT_MODEL_PART}" if bare else name))
    return found


def _has_prefix(tensors: Mapping[str, Tensor], prefix: str) -> bool:
    return any(key.startswith(f"{prefix}_") for key in tensors)


def _resolve_preset(network: type[LycorisNetworkKohya], name: Any, wanted: Any) -> tuple[Preset, bool]:
    """Return the preset of that name or file, and whether it is an unmodified built-in one.

    Keys that it lacks are those given to the class of networks. Without a name, `wanted`, or else what the class was
    given, replaces keys of "full".
    """
    if wanted and name is not None:
        raise ConfigError(f"preset={name!r} and apply_preset both select layers; give only one of them")
    known, own = list_builtin_presets(), network.get_given_keys()
    if name is None:
        return Preset.parse(known["full"].to_dict() | (wanted or own)), not (wanted or own)
    builtin = str(name) in known
    named = known[str(name)].to_dict() if builtin else {"enable_conv": True} | read_preset(str(name))
    if beaten := sorted(key for key in own.keys() & named.keys() if own[key] != named[key]):
        logger.warning(
            "preset=%r overrides %s, which the class of networks was given; leave preset out to use those",
            *(name, ", ".join(beaten)),
        )
    return Preset.parse(own | named), builtin and not own


def _select_targets(preset: Preset, component: Component, t5xxl: bool, llm_adapter: bool) -> Preset:
    """Return the targets that a preset for pipelines has for one of the models."""
    modules = preset.text_encoder_target_module if component.text else preset.unet_target_module
    names = preset.text_encoder_target_name if component.text else preset.unet_target_name
    if component.t5 and modules:
        modules = (*modules, *block_classes.T5_BLOCKS) if t5xxl else ()
    if not llm_adapter:
        modules = tuple(name for name in modules if name != block_classes.LANGUAGE_ADAPTER)
    clear: dict[str, Any] = {f.name: () for f in fields(Preset) if f.name.startswith(("unet_", "text_encoder_"))}
    prefix = "lycoris"
    return replace(preset, **clear, target_module=modules, target_name=names, lora_prefix=prefix)


def _has_targets(preset: Preset) -> bool:
    return bool(preset.target_module or preset.target_name or preset.module_algo_map or preset.name_algo_map)
