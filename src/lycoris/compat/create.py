"""`create_lycoris` and `create_lycoris_from_weights`."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from lycoris import files
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.compat.legacy_options import log_remarks, rename_options
from lycoris.compat.network import LycorisNetwork
from lycoris.compat.parts import NetworkPart, add_dropout, choose_adapters
from lycoris.errors import ConfigError
from lycoris.files.source import open_source
from lycoris.layers.sites import ModelSites
from lycoris.targeting.options import parse_number, parse_optional, unknown_options
from lycoris.targeting.recipe import schedule_in

logger = logging.getLogger("LyCORIS")


class _DefaultInt(int):
    """A default value that can be distinguished from the same number given by the caller."""


_DEFAULT_DIM, _DEFAULT_ALPHA = _DefaultInt(4), _DefaultInt(1)


def create_lycoris(
    module: nn.Module,
    multiplier: float = 1.0,
    linear_dim: int | None = _DEFAULT_DIM,
    linear_alpha: float | None = _DEFAULT_ALPHA,
    warn_on_unmatched: bool = True,
    *,
    algorithm: str | None = None,
    rank: int | None = None,
    alpha: float | None = None,
    **options: Any,
) -> LycorisNetwork:
    """Build adapters for a model; they are not yet applied.

        create_lycoris(model, 1.0, linear_dim=16, linear_alpha=2, algo="lokr")  # as trainers call it
        create_lycoris(model, algorithm="loha", rank=16, alpha=32)

    Complete `lycoris_config.json` objects may be passed as keywords. Options that the algorithm does not have are
    logged on "LyCORIS"; unknown ones are a warning with the nearest known name.

    Args:
        multiplier: Strength of the adapters.
        linear_dim: Rank of linear layers, also as `rank`.
        linear_alpha: Alpha of linear layers, also as `alpha`; ΔW is scaled by alpha / rank.
        warn_on_unmatched: Whether targets that match no layer are warnings.

    Raises `ConfigError` for wrong values and `PlanError` when no layer of the model is targeted.
    """
    if algorithm is not None and options.setdefault("algo", algorithm) != algorithm:
        raise ConfigError(f"algo={options['algo']!r} and algorithm={algorithm!r} contradict each other; give only one")
    given = options | {
        "multiplier": multiplier,
        "linear_dim": _merge_aliases("rank", rank, "linear_dim", linear_dim),
        "linear_alpha": _merge_aliases("alpha", alpha, "linear_alpha", linear_alpha),
    }
    part, recipe = choose_adapters(module, given, LycorisNetwork.build_preset(), warn_on_unmatched=warn_on_unmatched)
    return LycorisNetwork.from_parts([part], recipe.multiplier, recipe.options.get("bypass_mode"), recipe)


def create_lycoris_from_weights(
    multiplier: float | str,
    file: str | os.PathLike[str] | None,
    module: nn.Module,
    weights_sd: Mapping[str, Tensor] | None = None,
    *,
    component: str = "",
    **options: Any,
) -> tuple[LycorisNetwork, dict[str, Tensor]]:
    """Build adapters from a file or its tensors; they are not yet applied. Returns the network and the tensors.

    Settings come from the tensors. Of `options`, only those count that files do not store: dropout, and a T-LoRA
    schedule that the header lacks. Unknown ones are a warning.

    Args:
        weights_sd: Tensors to use instead of reading `file`.
        component: Component of a pipeline that the model is, for files with several: "" is the denoiser,
            "text_encoder", ... The network is saved for this model alone, with LyCORIS' own names.

    Raises `FileError` when the file is damaged or does not match the model.
    """
    options = rename_options(options)
    log_remarks(unknown_options(options))
    own: str = LycorisNetwork.LORA_PREFIX
    sites = ModelSites(module)
    with open_source(file, weights_sd) as (tensors, header):
        prefix = own if any(key.startswith(f"{own}_") for key in tensors) else "lycoris"
        known = None if prefix == "lycoris" else prefix
        bundle = files.resolve(tensors, sites, metadata=header, component=component, prefix=known, shared=False)
    for remark in bundle.remarks:
        logger.warning(remark)
    adapters = AdapterSet.load(sites, add_dropout(bundle, options), name=None)
    adapters.schedule = adapters.schedule or schedule_in(options)
    strength: float = parse_number(multiplier, "multiplier", float)
    bypass: bool | None = parse_optional(options.get("bypass_mode"), "bypass_mode", bool)
    return LycorisNetwork.from_parts([NetworkPart(prefix, adapters)], strength, bypass), tensors


def _merge_aliases(name: str, value: float | None, other: str, documented: float | None) -> float | None:
    """Return the value of a setting with two names. Raises `ConfigError` when both are given and differ."""
    if value is None:
        return documented
    if not isinstance(documented, _DefaultInt) and documented != value:
        raise ConfigError(f"{name}={value!r} and {other}={documented!r} contradict each other; give only one")
    return value
