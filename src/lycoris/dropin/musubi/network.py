"""Networks of one algorithm on the linear layers of one denoiser."""

from __future__ import annotations

import ast
import logging
import re
from collections.abc import Callable, Iterator, Mapping, MutableSet, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from lycoris import files, recast
from lycoris.adapters import AdapterSet
from lycoris.algorithm import Affine, Algorithm, Entry, interpolate
from lycoris.algorithms import below_lengths, read_tensors
from lycoris.attach import base_class
from lycoris.dropin.functional.layer import geometry
from lycoris.dropin.kohya_network import LycorisNetworkKohya, Ratios
from lycoris.dropin.parts import Part, with_dropout
from lycoris.errors import ConfigError, FileError, NothingMeantError
from lycoris.geometry import Geometry
from lycoris.options import parse_number, parse_optional
from lycoris.planning import block_classes, place

logger = logging.getLogger("LyCORIS")

PREFIX = "lora_unet"
KNOWN = (
    *("rank_dropout", "module_dropout", "verbose", "exclude_patterns", "include_patterns"),
    *("loraplus_lr_ratio", "conv_dim", "conv_alpha"),
)
"""What `--network_args` may hold for any algorithm."""

Make = Callable[..., Algorithm]


class MusubiNetwork(LycorisNetworkKohya):
    """Adapters of one denoiser."""

    _off: list[tuple[float, dict[str, float]]] | None = None
    """What is in force again once the adapters act; None while they do."""

    # Musubi's trainer has no text encoder, and gives the rate by the name of its own parameter.
    def prepare_optimizer_params(  # type: ignore[override]
        self, unet_lr: float | None = 1e-4, **_: Any
    ) -> tuple[list[dict[str, Any]], list[str]]:
        """Parameter groups and what each is called."""
        return super().prepare_optimizer_params(None, unet_lr)

    def prepare_network(self, args: Any) -> None:
        """Nothing to do."""

    def set_enabled(self, is_enabled: bool) -> None:
        """Let the adapters act, or not. When they act again, every module has the multiplier that it had."""
        if not is_enabled and self._off is None:
            self._off = [(part.adapters.strength, dict(part.adapters.blocks)) for part in self.parts]
            for part in self.parts:
                part.adapters.set_strength(0.0)
        elif is_enabled and self._off is not None:
            for part, (strength, blocks) in zip(self.parts, self._off, strict=True):
                part.adapters.set_strength(strength, blocks)
            self._off = None

    def set_multiplier(self, multiplier: float | str) -> None:
        """As in any network; while the adapters do not act, it counts from `set_enabled(True)` on."""
        super().set_multiplier(multiplier)
        if self._off is not None:
            self._off = None
            self.set_enabled(False)

    def __iter__(self) -> Iterator[Any]:
        # With --dim_from_weights the trainer takes what create_arch_network_from_weights returns apart into two.
        return iter((self, None))


def create(
    make: Make,
    targets: Sequence[str] | None,
    prefix: str,
    multiplier: float,
    network_dim: int | None,
    network_alpha: float | None,
    unet: nn.Module,
    neuron_dropout: float | None,
    options: Mapping[str, Any],
) -> MusubiNetwork:
    """New adapters for the linear layers in blocks of some classes (None: in all), not yet applied.

    All options may be strings. Raises `ConfigError` for wrong ones and `PlanError` when no layer is meant.
    """
    drop = {name: parse_optional(options.get(name), name, float) or 0.0 for name in ("rank_dropout", "module_dropout")}
    drop["dropout"] = parse_optional(neuron_dropout, "network_dropout", float) or 0.0
    dim = parse_optional(network_dim, "network_dim", int) or 4
    alpha = 1.0 if network_alpha is None else parse_number(network_alpha, "network_alpha", float)
    algorithm = make(rank=dim, alpha=alpha or None, rank_dropout_scale=drop["rank_dropout"] > 0, **drop)
    excludes, includes = (patterns(options.get(name), name) for name in ("exclude_patterns", "include_patterns"))

    def choose(path: str, layer: nn.Module, around: Sequence[nn.Module], g: Geometry) -> tuple[Algorithm, ...] | None:
        inside = targets is None or any(type(module).__name__ in targets for module in (layer, *around))
        if not inside or base_class(layer).__name__ != "Linear":
            return None
        if any(p.fullmatch(path) for p in excludes) and not any(p.fullmatch(path) for p in includes):
            return None
        return (algorithm,)

    plan = place(unet, choose)
    if not plan.placements:
        raise NothingMeantError(
            f"no linear layer of {type(unet).__name__} is meant; classes with layers: {', '.join(block_classes(unet))}"
        )
    for remark in plan.remarks:
        logger.warning("%s", remark)
    if str(options.get("verbose")) == "True":
        logger.info("\n".join(each.path for each in plan.placements))
    logger.info("%s: %s", prefix, replace(plan, remarks=()))
    return _network(Part(prefix, AdapterSet.build(unet, plan, name=None)), multiplier, options)


def _network(part: Part, multiplier: float, options: Mapping[str, Any]) -> MusubiNetwork:
    network = MusubiNetwork.of([part], parse_number(multiplier, "multiplier", float))
    network.ratios = Ratios(parse_optional(options.get("loraplus_lr_ratio"), "loraplus_lr_ratio", float))
    return network


def read(
    name: str,
    multiplier: float,
    weights_sd: Mapping[str, Tensor],
    unet: nn.Module,
    for_inference: bool,
    options: Mapping[str, Any],
) -> MusubiNetwork:
    """Adapters from a file's tensors, whose shapes say all; not yet applied.

    Raises `FileError` when they are not of the algorithm of that name, with or without DoRA, or do not fit the model.
    """
    tensors = {key: tensor for key, tensor in weights_sd.items() if "." in key}
    bundle = files.resolve(tensors, unet, prefix=PREFIX, shared=False)
    others = sorted({below_lengths(e.algorithm).name for stack in bundle.entries.values() for e in stack} - {name})
    if others:
        raise FileError(f"this module is for {name}, and the file has {', '.join(others)}; name that one's module")
    adapters = AdapterSet.load(unet, with_dropout(bundle, options), name=None)
    network = _network(Part(PREFIX, adapters), multiplier, options)
    network.for_inference = for_inference
    return network


@torch.no_grad()
def merged(
    marks: Sequence[str],
    model_weight: Tensor,
    lora_name: str,
    lora_sd: Mapping[str, Tensor],
    lora_weight_keys: MutableSet[str],
    multiplier: float,
    calc_device: Any,
) -> Tensor:
    """A weight with a file's change to it added, in float32, rounded once; its keys are taken from `lora_weight_keys`.

    Unchanged when the file has nothing for it; `marks` are the tensor names of which one tells. Raises `FileError` for
    tensors that do not fit.
    """
    if not any(f"{lora_name}.{mark}" in lora_weight_keys for mark in marks):
        return model_weight
    keys = {key for key in lora_weight_keys if key.startswith(f"{lora_name}.")}
    tensors = {key.removeprefix(f"{lora_name}."): lora_sd[key].to(calc_device) for key in keys}
    g = geometry(model_weight.shape)
    algorithm, values = read_tensors(tensors, g, lora_name)
    full = torch.promote_types(model_weight.dtype, torch.float32) if model_weight.itemsize > 1 else torch.float32
    base = Affine(model_weight.to(calc_device, full), None)
    whole = recast.adapted(Entry(algorithm, g, values), base)
    for key in keys:
        lora_weight_keys.discard(key)
    return interpolate(base, whole, multiplier).weight.to(model_weight.dtype)


def patterns(given: Any, name: str) -> list[re.Pattern[str]]:
    """Regular expressions from a list, or from one written out. Raises `ConfigError` for what is no such list."""
    try:
        found = ast.literal_eval(given) if isinstance(given, str) else given or []
    except (ValueError, SyntaxError) as error:
        raise ConfigError(f"{name} is a list of regular expressions such as ['.*attn.*'], not {given!r}") from error
    if isinstance(found, str) or not all(isinstance(pattern, str) for pattern in found):
        raise ConfigError(f"{name} is a list of regular expressions such as ['.*attn.*'], not {given!r}")
    try:
        return [re.compile(pattern) for pattern in found]
    except re.error as error:
        raise ConfigError(f"{name}: {error.pattern!r} is not a regular expression ({error})") from None


def say_unknown(options: Mapping[str, Any], own: Sequence[str]) -> None:
    """Warn of `--network_args` that do nothing; `own` are those of the algorithm alone."""
    known = (*KNOWN, *own)
    for name in options:
        if name not in known:
            logger.warning("unknown option %r was ignored; known are %s", name, ", ".join(known))
    for name in ("conv_dim", "conv_alpha"):
        if options.get(name) is not None:
            logger.warning("%s has no effect: only linear layers are adapted here", name)
