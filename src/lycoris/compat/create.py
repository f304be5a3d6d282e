"""`create_lycoris` and `create_lycoris_from_weights`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lycoris import files
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.compat.legacy_options import rename_options, tell
from lycoris.compat.network import LycorisNetwork
from lycoris.compat.parts import Part, choose, with_dropout
from lycoris.errors import ConfigError
from lycoris.files.source import open_source
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_number, parse_optional, unknown_options
from lycoris.targeting.recipe import schedule_in

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
    given = options | {
        "multiplier": multiplier,
        "linear_dim": _one_of("rank", rank, "linear_dim", linear_dim),
        "linear_alpha": _one_of("alpha", alpha, "linear_alpha", linear_alpha),
    }
    part, recipe = choose(module, given, LycorisNetwork.preset_in_force(), warn_on_unmatched=warn_on_unmatched)
    return LycorisNetwork.of([part], recipe.multiplier, recipe.options.get("bypass_mode"), recipe)


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

    Settings come from the tensors. Of `options`, which trainers pass along, those count that no file has: dropout, and
    a T-LoRA schedule that the header lacks; ones that nothing knows are warned about. `component` says which part of a
    pipeline the model is, for files that hold several: "" the denoiser, "text_encoder", ...; the network is saved for
    this model alone, in LyCORIS' own names. Raises `FileError` when the file is damaged or does not fit the model.
    """
    options = rename_options(options)
    tell(unknown_options(options))
    own: str = LycorisNetwork.LORA_PREFIX
    sites = ModelSites(module)
    with open_source(file, weights_sd) as (tensors, header):
        prefix = own if any(key.startswith(f"{own}_") for key in tensors) else "lycoris"
        known = None if prefix == "lycoris" else prefix
        bundle = files.resolve(tensors, sites, metadata=header, component=component, prefix=known, shared=False)
    for remark in bundle.remarks:
        logger.warning(remark)
    adapters = AdapterSet.load(sites, with_dropout(bundle, options), name=None)
    adapters.schedule = adapters.schedule or schedule_in(options)
    strength: float = parse_number(multiplier, "multiplier", float)
    bypass: bool | None = parse_optional(options.get("bypass_mode"), "bypass_mode", bool)
    return LycorisNetwork.of([Part(prefix, adapters)], strength, bypass), tensors


def _one_of(name: str, value: float | None, other: str, documented: float | None) -> float | None:
    """One setting that has two names; giving both is fine only if they agree."""
    if value is None:
        return documented
    if not isinstance(documented, _Int) and documented != value:
        raise ConfigError(f"{name}={value!r} and {other}={documented!r} contradict each other; give one")
    return value
