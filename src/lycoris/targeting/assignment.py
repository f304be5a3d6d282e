"""What each layer of a model gets by a `lycoris_config.json`."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import nn

from lycoris.algorithms import OFT, DoRA, DyLoRA, Norm
from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.ranked import Ranked
from lycoris.errors import NothingMeantError, nearest
from lycoris.layers.geometry import Geometry
from lycoris.layers.sites import ModelSites
from lycoris.ops.factorization import butterfly_sizes, factorize
from lycoris.targeting.options import OVERRIDE, algorithm_class, options_of, parse_optional, parse_options
from lycoris.targeting.planning import USUAL, Plan, assign_layers, block_classes, check_something_left, servable
from lycoris.targeting.preset import LAYER_CLASSES, names_class
from lycoris.targeting.recipe import Recipe
from lycoris.targeting.remarks import Remark
from lycoris.targeting.roles import expand_roles

SMALL_SHARE = 0.25
"""Share of a model's layers below which classes that were named reach few of them."""
NAMES_SHOWN = 5


def plan_recipe(recipe: Recipe, model: nn.Module | ModelSites) -> Plan:
    """Make the plan that a recipe means for a model; see `Recipe.plan`.

    Raises:
        NothingMeantError: No layer is targeted.
        PlanError: An algorithm cannot serve a layer, unless the recipe skips such layers and others can be served; or
            every layer that is targeted shares its weight with another module.
    """
    sites = ModelSites.of(model)
    preset, roles = expand_roles(recipe.preset, sites.model)

    def choose(
        path: str, layer: nn.Module, around: Sequence[nn.Module], geometry: Geometry
    ) -> tuple[Algorithm, ...] | None:
        override = preset.options_for(path, layer, around)
        if geometry.kind == "norm":
            return _assign_norm(recipe, path, override)
        if override is None or not (geometry.pointwise or recipe.preset.enable_conv):
            return None
        # Embeddings and bare parameters have rules of their own; trainers' configs do not mean them.
        return (algorithm(recipe, geometry, override),) if geometry.kind in ("linear", "conv") else None

    remarks = [*recipe.remarks, *roles.values(), *_find_unmatched(recipe, sites, roles)]
    made = assign_layers(sites, choose, remarks, names=recipe.preset.names, unserved=recipe.unserved)
    check_something_left(made)
    if not made.placements:
        raise NothingMeantError(_nothing(recipe, sites))
    remarks = [*_few(recipe, sites, made)]
    if _trains_norms(recipe) and not any(each.geometry.kind == "norm" for each in made.placements):
        remarks.append(Remark("train_norm has no effect: no norm with a weight is meant", "unmatched"))
    return replace(made, remarks=(*made.remarks, *remarks)) if remarks else made


def algorithm(recipe: Recipe, geometry: Geometry, override: Mapping[str, Any]) -> Algorithm:
    """Make the algorithm that a recipe means for a layer; see `Recipe.algorithm`.

    `dora_wd` puts it into a DoRA. For OFT and BOFT the rank bounds the size of the blocks, which follows from the
    number of outputs. Alpha 0 or none means the rank.

    Raises:
        ConfigError: The override has an unknown algorithm or a wrong value.
    """
    algo = str(override.get("algo", recipe.algo)).lower()
    own = parse_options(algo, {k: v for k, v in override.items() if k not in OVERRIDE}, "", False, [])
    options = {**recipe.options, **own}
    cls = algorithm_class(algo)
    values = {entry.field: options[name] for name, entry in options_of(algo).items() if entry.field and name in options}
    rank, alpha = _read_size(recipe, geometry, override)
    if issubclass(cls, OFT):
        return cls.from_options(values | {"block_size": _block_size(algo, geometry, rank)})
    if not issubclass(cls, Ranked):
        return cls.from_options(values)
    if not values.get("rank_dropout"):
        values.pop("rank_dropout_scale", None)
    if issubclass(cls, DyLoRA):
        values.setdefault("block_size", math.gcd(4, rank))
    made = cls.from_options(values | {"rank": rank, "alpha": alpha})
    if isinstance(made, Additive) and (options.get("dora_wd") or options.get("weight_decompose")):
        on_out = options.get("wd_on_output", options.get("wd_on_out", True))
        return DoRA(inner=made, axis="out" if on_out else "in")
    return made


def _block_size(algo: str, geometry: Geometry, wanted: int) -> int:
    """The size of the blocks that a file trained with this rank has: of two factors of the outputs, the smaller;
    for a butterfly the largest that is not above the rank. What cannot be is left to the plan to refuse.
    """
    if algo == "boft":
        return max((s for s in butterfly_sizes(geometry.out_features) if s <= wanted), default=max(wanted, 2))
    small = factorize(geometry.out_features, wanted)[0]
    return small if small > 1 else max(wanted, 2)


def _read_size(recipe: Recipe, geometry: Geometry, override: Mapping[str, Any]) -> tuple[int, float | None]:
    """Rank and alpha; alpha 0 or none means the rank, and convolutions fall back on the linear sizes."""
    alpha, name = recipe.linear_alpha, "linear_alpha"
    if not geometry.pointwise:
        alpha = recipe.conv_alpha if recipe.conv_alpha is not None else alpha
        name = "conv_alpha"
    alpha = parse_optional(override.get("alpha", override.get(name, alpha)), "alpha", float)
    return recipe.rank_for(geometry.pointwise, override), alpha or None


def _assign_norm(recipe: Recipe, path: str, override: Mapping[str, Any] | None) -> tuple[Algorithm, ...] | None:
    """Default targets mean the norms of any library, named ones just what they name."""
    if override is None and (recipe.preset.excludes(path) or recipe.preset.target_module != LAYER_CLASSES):
        return None
    algo = str((override or {}).get("algo", recipe.algo)).lower()
    given = {k: v for k, v in (override or {}).items() if k not in OVERRIDE}
    options = {**recipe.options, **parse_options(algo, given, "", False, [])}
    return (Norm(module_dropout=options.get("module_dropout", 0.0)),) if options.get("train_norm") else None


def _trains_norms(recipe: Recipe) -> bool:
    return any(options.get("train_norm") for options in (recipe.options, *recipe.preset.overrides()))


def _named_classes(recipe: Recipe) -> list[str]:
    """Classes that the user named as targets."""
    preset = recipe.preset
    named = preset.target_module if preset.target_module != LAYER_CLASSES else ()
    return [*dict.fromkeys([*named, *preset.module_algo_map])]


def _find_unmatched(recipe: Recipe, sites: ModelSites, roles: Collection[str]) -> Iterator[Remark]:
    """Targets that the user named and that mean no layer which could get an adapter; `roles` stand for others."""
    preset, conv = recipe.preset, recipe.preset.enable_conv
    layers = servable(sites, (*USUAL, "norm") if _trains_norms(recipe) else USUAL)
    meant = {path: site.module for path, site in layers.items() if conv or site.geometry.pointwise}
    classes = {type(m).__name__ for path, layer in meant.items() for m in (layer, *sites.around(path))}
    but = "" if conv else " (convolutions with a real kernel are off)"
    text = f"matches no layer of {type(sites.model).__name__} that adapters can serve{but}"
    targets = _named_classes(recipe)
    for name in targets:
        if name not in roles and not any(names_class(name, each) for each in classes):
            close = [each for each in alike(name, classes) if not any(names_class(other, each) for other in targets)]
            hint = f"; did you mean {' or '.join(map(repr, close))}?" if close else ""
            yield Remark(f"{name!r} {text}{hint}", "unmatched")
    for pattern in dict.fromkeys((*preset.target_name, *preset.name_algo_map)):
        if not any(preset.means(pattern, path) for path in meant):
            yield Remark(f"{pattern!r} {text}", "unmatched")
    for pattern in dict.fromkeys(preset.exclude_name):
        if not any(preset.means(pattern, path) for path in layers):
            yield Remark(f"{pattern!r} {text}", "unmatched")


def alike(target: str, classes: Iterable[str]) -> list[str]:
    """Classes that a target may have meant: those whose name has it as a part, as FluxAttention has Attention, the
    shortest first, or else ones that are spelled like it.
    """
    word = target.strip("*").lower()
    parts = sorted((each for each in classes if word and word in each.lower()), key=lambda each: (len(each), each))
    return parts[:NAMES_SHOWN] or nearest(target, classes)


def _few(recipe: Recipe, sites: ModelSites, made: Plan) -> Iterator[Remark]:
    """That classes which were named reach few layers, and which classes have the others.

    Lists that name paths, to reach or to leave out, are narrow on purpose.
    """
    named = _named_classes(recipe)
    preset = recipe.preset
    if not named or preset.target_name or preset.name_algo_map or preset.exclude_name:
        return
    layers = [path for path, site in servable(sites).items() if preset.enable_conv or site.geometry.pointwise]
    got = {each.path for each in made.placements}
    reached = sum(path in got for path in layers)
    if reached >= SMALL_SHARE * len(layers):
        return
    others: Counter[str] = Counter()
    for path in layers:
        if path not in got:
            # The nearest module around a layer; the model itself is no target to name.
            above = [type(each).__name__ for each in sites.around(path)[:-1] if _names_itself(each)]
            others[above[0] if above else type(sites.model).__name__] += 1
    where = ", ".join(f"{name} ({count})" for name, count in others.most_common(NAMES_SHOWN))
    yield Remark(
        f"the targets {', '.join(named)} reach {reached} of {len(layers)} layers of {type(sites.model).__name__}; "
        f"classes that have the others: {where}",
        "unmatched",
    )


def _names_itself(module: nn.Module) -> bool:
    """Whether a class says what it is: a list of modules does not."""
    return not isinstance(module, nn.ModuleList | nn.Sequential | nn.ModuleDict)


def _nothing(recipe: Recipe, sites: ModelSites) -> str:
    have, preset = block_classes(sites), recipe.preset
    wanted = [*preset.target_module, *preset.module_algo_map, *preset.target_name, *preset.name_algo_map]
    close = sorted({hit for name in wanted for hit in alike(name, have)[:1]})
    hint = f" Did you mean {', '.join(close)}?" if close else ""
    return (
        f"no layer of {type(sites.model).__name__} matches the targets {', '.join(dict.fromkeys(wanted))}.{hint} "
        f"Classes with layers that adapters can serve: {', '.join(have) or '(none)'}"
    )
