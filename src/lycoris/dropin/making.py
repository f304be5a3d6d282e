"""`create_lycoris` and `create_lycoris_from_weights`."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lycoris import files
from lycoris.adapters import AdapterSet
from lycoris.dropin.keywords import read_preset, renamed, tell
from lycoris.dropin.network import LycorisNetwork, Part, over
from lycoris.dropin.quantised import check_trainable
from lycoris.errors import ConfigError, FileError
from lycoris.geometry import site
from lycoris.options import parse_number, parse_optional, unknown_options
from lycoris.planning import Plan
from lycoris.preset import PRESETS_WITH_CONV, Preset
from lycoris.recipe import Recipe, schedule_in

logger = logging.getLogger("LyCORIS")


class _Int(int):
    """A default that can be told from the same number given by the caller."""


DIM, ALPHA = _Int(4), _Int(1)


def create_lycoris(
    module: nn.Module,
    multiplier: float = 1.0,
    linear_dim: int | None = DIM,
    linear_alpha: float | None = ALPHA,
    warn_on_unmatched: bool = True,
    *,
    algorithm: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    **options: Any,
) -> LycorisNetwork:
    """Adapters for a model, not yet applied.

    `create_lycoris(model, 1.0, linear_dim=16, linear_alpha=2, algo="lokr")`, as trainers call it, or
    `create_lycoris(model, algorithm="loha", rank=16, alpha=32)`. Whole `lycoris_config.json` objects may be passed as
    keywords: options that this algorithm does not have are reported on the logger "LyCORIS", and ones that nothing
    knows are warned about with the nearest known name.

    Raises `ConfigError` for wrong values and `PlanError` when no layer of the model is meant.
    """
    if algorithm is not None and options.setdefault("algo", algorithm) != algorithm:
        raise ConfigError(f"algo={options['algo']!r} and algorithm={algorithm!r} contradict each other; give one")
    options = renamed(options)
    named = options.get("preset")
    own: dict[str, Any] = {}
    if named is not None and str(named) not in PRESETS_WITH_CONV:
        own, options = read_preset(str(named)), options | {"preset": None}
    given = options | {
        "multiplier": multiplier,
        "linear_dim": _one_of("rank", rank, "linear_dim", linear_dim),
        "linear_alpha": _one_of("alpha", alpha, "linear_alpha", linear_alpha),
    }
    preset = LycorisNetwork._preset
    if preset is not None and given.get("apply_preset"):
        if Preset.parse(given["apply_preset"]) != preset:
            logger.warning("apply_preset was given to the class and, with other values, here; the class's is used")
        given = {key: value for key, value in given.items() if key != "apply_preset"}
    if own:
        # The keys of a file count before those that apply_preset was given, by the class or here.
        preset = over(preset or Preset.parse(given.pop("apply_preset", None) or {}), own)
    recipe = Recipe.parse(given, strict=False, preset=preset)
    plan = recipe.plan(module)
    tell(plan.remarks, unmatched=warn_on_unmatched)
    check_plan(module, plan)
    adapters = AdapterSet.build(module, plan, name=None)
    adapters.schedule = recipe.schedule
    logger.info("%s", dataclasses.replace(plan, remarks=()))
    part = Part(recipe.preset.lora_prefix, adapters)
    return LycorisNetwork([part], recipe.multiplier, recipe.options.get("bypass_mode"))


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise `ConfigError` where a quantised layer would get what it cannot have."""
    layers = {each.path: site(model, each.path).module for each in plan.placements if each.geometry.kind == "linear"}
    check_trainable(layers, {each.path: each.algorithms for each in plan.placements if each.path in layers})


def create_lycoris_from_weights(
    multiplier: float | str,
    file: str | os.PathLike[str] | None,
    module: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    *,
    component: str = "",
    **options: Any,
) -> tuple[LycorisNetwork, dict[str, Tensor]]:
    """Adapters from a file (or from its tensors, `weights_sd`), not yet applied, and the tensors.

    Settings come from the tensors; `options`, which trainers pass along, only fill in a T-LoRA schedule that the
    file's header does not have; ones that nothing knows are warned about. `component` says which part of a pipeline
    the model is, for files that hold several: "" the denoiser, "text_encoder", ...; the network is saved for this
    model alone, in LyCORIS' own names. Raises `FileError` when the file is damaged or does not fit the model.
    """
    options = renamed(options)
    tell(unknown_options(options))
    metadata: dict[str, str] = {}
    if weights_sd is not None:
        tensors = dict(weights_sd)
    elif file is not None:
        tensors, metadata = files.load_tensors(file)
    else:
        raise FileError("neither a file nor weights_sd was given")
    own = LycorisNetwork._preset.lora_prefix if LycorisNetwork._preset else "lycoris"
    prefix = own if any(key.startswith(f"{own}_") for key in tensors) else "lycoris"
    try:
        known = None if prefix == "lycoris" else prefix
        bundle = files.resolve(tensors, module, metadata=metadata, component=component, prefix=known)
    except FileError as error:
        raise FileError(f"{file}: {error}" if file is not None else str(error)) from error
    for remark in bundle.remarks:
        logger.warning(remark)
    adapters = AdapterSet.load(module, bundle, name=None)
    adapters.schedule = adapters.schedule or schedule_in(options)
    strength: float = parse_number(multiplier, "multiplier", float)
    bypass: bool | None = parse_optional(options.get("bypass_mode"), "bypass_mode", bool)
    return LycorisNetwork([Part(prefix, adapters)], strength, bypass), tensors


def _one_of(name: str, value: float | None, other: str, documented: float | None) -> float | None:
    """One setting that has two names; giving both is fine only if they agree."""
    if value is None:
        return documented
    if not isinstance(documented, _Int) and documented != value:
        raise ConfigError(f"{name}={value!r} and {other}={documented!r} contradict each other; give one")
    return value
