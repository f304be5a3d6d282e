"""`LycorisNetwork`, `create_lycoris` and `create_lycoris_from_weights`."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lycoris import files
from lycoris.adapter import Adapter
from lycoris.adapters import AdapterSet
from lycoris.dropin import tlora
from lycoris.errors import ConfigError, FileError
from lycoris.files.dialect import flatten
from lycoris.options import unknown_options
from lycoris.preset import Preset
from lycoris.recipe import Recipe, schedule_in
from lycoris.schedule import WITHOUT_SCHEDULE

logger = logging.getLogger("LyCORIS")


class _Int(int):
    """A default that can be told from the same number given by the caller."""


DIM, ALPHA = _Int(4), _Int(1)


class PresetKeyError(ConfigError, KeyError):
    """An unknown preset key; a `KeyError` because callers of `apply_preset` catch that."""

    __str__ = ConfigError.__str__


class LycorisNetwork(nn.Module):
    """Adapters for one model, made but not applied. `apply_to` puts them on, `merge_to` folds them in."""

    _preset: ClassVar[Preset | None] = None

    def __init__(self, adapters: AdapterSet, prefix: str = "lycoris", multiplier: float = 1.0) -> None:
        super().__init__()
        _check_names(list(adapters.stacks))
        self.adapters, self.prefix = adapters, prefix
        adapters.set_strength(multiplier)
        for path, stack in adapters.stacks.items():
            self.add_module(f"{prefix}_{flatten(path)}", stack[0])

    @classmethod
    def apply_preset(cls, preset: Mapping[str, Any]) -> type[Self]:
        """Targets for the networks made from now on; each keeps what was set when it was made.

        Keys: see `lycoris.preset.Preset`. Raises `PresetKeyError` for an unknown key.
        """
        known = {field.name for field in dataclasses.fields(Preset)}
        try:
            parsed = Preset.parse(preset)
        except ConfigError as error:
            if preset.keys() <= known:
                raise
            raise PresetKeyError(str(error)) from None
        given = {key: getattr(parsed, key) for key in preset}
        cls._preset = dataclasses.replace(cls._preset or Preset(), **given)
        return cls

    @property
    def multiplier(self) -> float:
        return self.adapters.strength

    @property
    def loras(self) -> list[Adapter]:
        """The adapters, in the model's order."""
        return [stack[0] for stack in self.adapters.stacks.values()]

    def apply_to(self) -> None:
        """Put the adapters on the model's layers. A second call does nothing."""
        unguided = self.adapters.schedule is None and tlora.get_timestep_mask() is None
        if self.adapters.rank_masked and unguided and not self.adapters.attached:
            logger.warning(
                "applying adapters that were trained with a timestep schedule, without one: %s", WITHOUT_SCHEDULE
            )
        self.adapters.attach()
        tlora.track(self.adapters)

    def restore(self) -> None:
        """Take the adapters off and undo a merge; the model is as it was."""
        self.adapters.detach()
        tlora.untrack(self.adapters)

    def merge_to(self, weight: float = 1.0) -> None:
        """Fold the adapters into the model's weights at `weight` times the multiplier.

        `restore` undoes it exactly. T-LoRA with a schedule goes on masking ranks after the merge.
        """
        self.adapters.merge(weight * self.multiplier)
        tlora.track(self.adapters)

    def set_multiplier(self, multiplier: float) -> None:
        """Strength of the adapters; 0 is exactly the base model."""
        self.adapters.set_strength(multiplier)

    def prepare_optimizer_params(self, lr: float | None = None) -> list[dict[str, Any]]:
        """Parameter groups for an optimizer."""
        self.requires_grad_(True)
        group: dict[str, Any] = {"params": list(self.parameters())}
        return [group if lr is None else group | {"lr": lr}]

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The tensors as they would be in a file."""
        named = files.encode(self.adapters.bundle(), prefix=self.prefix)
        found = {} if destination is None else destination
        found.update({prefix + key: tensor for key, tensor in named.items()})
        return found

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Copy in what `state_dict` gave; returns (missing, unexpected) keys like any module."""
        missing, unexpected = self._load(dict(state_dict))
        if strict and (missing or unexpected):
            raise FileError(f"tensors missing: {missing[:5]}; tensors with no place: {unexpected[:5]}")
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the adapters as safetensors, whole or not at all. `dtype` None keeps that of the adapters.

        Raises `FileError` for a name that asks for a pickle.
        """
        if Path(file).suffix in files.PICKLES:
            raise FileError(f"{file}: adapters are saved as .safetensors; a pickle can run code when it is opened")
        files.write(self.adapters.bundle(), file, dtype=dtype, metadata=metadata, prefix=self.prefix)

    def load_weights(self, file: str | os.PathLike[str]) -> dict[str, list[str]]:
        """Copy in the tensors of a file. {} when all of them fit, otherwise the missing and unexpected keys."""
        tensors, _ = files.load_tensors(file)
        try:
            missing, unexpected = self._load(tensors)
        except FileError as error:
            raise FileError(f"{file}: {error}") from error
        found = {"missing keys": missing, "unexpected keys": unexpected}
        return {what: keys for what, keys in found.items() if keys}

    def _load(self, tensors: dict[str, Tensor]) -> tuple[list[str], list[str]]:
        """Fill the adapters from tensors by file name; nothing changes unless every layer's tensors are usable."""
        own = set(files.encode(self.adapters.bundle(), prefix=self.prefix))
        missing, unexpected = sorted(own - tensors.keys()), sorted(tensors.keys() - own)
        usable = {key: tensor for key, tensor in tensors.items() if key in own}
        if usable:
            bundle = files.resolve(usable, self.adapters.model, prefix=self.prefix)
            self.adapters.fill(bundle)
        return missing, unexpected


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
    preset = LycorisNetwork._preset
    if preset is not None and given.get("apply_preset"):
        if Preset.parse(given["apply_preset"]) != preset:
            logger.warning("apply_preset was given to the class and, with other values, here; the class's is used")
        given = {key: value for key, value in given.items() if key != "apply_preset"}
    recipe = Recipe.parse(given, strict=False, preset=preset)
    plan = recipe.plan(module)
    for remark in plan.remarks:
        warn = remark.kind == "unknown" or (remark.kind == "unmatched" and warn_on_unmatched)
        logger.log(logging.WARNING if warn else logging.INFO, "%s", remark)
    adapters = AdapterSet.build(module, plan, name=None)
    adapters.schedule = recipe.schedule
    logger.info("%s", dataclasses.replace(plan, remarks=()))
    return LycorisNetwork(adapters, recipe.preset.lora_prefix, recipe.multiplier)


def create_lycoris_from_weights(
    multiplier: float,
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
    for strange in unknown_options(options):
        logger.warning("%s", strange)
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
    return LycorisNetwork(adapters, prefix, multiplier), tensors


def _one_of(name: str, value: float | None, other: str, documented: float | None) -> float | None:
    """One setting that has two names; giving both is fine only if they agree."""
    if value is None:
        return documented
    if not isinstance(documented, _Int) and documented != value:
        raise ConfigError(f"{name}={value!r} and {other}={documented!r} contradict each other; give one")
    return value


def _check_names(paths: list[str]) -> None:
    """Raise `ConfigError` when two layers have one name: the second adapter would take the place of the first."""
    owner: dict[str, str] = {}
    for path in paths:
        first = owner.setdefault(flatten(path), path)
        if first != path:
            raise ConfigError(
                f"{first} and {path} are both called {flatten(path)} here, where dots become underscores; leave one "
                "out with exclude_name, or use AdapterSet, which goes by paths"
            )
