"""`LycorisNetwork`: the adapters of one model, or of several that are trained together."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lycoris import files
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.adapters.bundle import Bundle
from lycoris.adapters.loading import put
from lycoris.adapters.strengths import finite
from lycoris.compat import timestep_masks, unfrozen_base
from lycoris.compat.assignable import Assignable, Fixed, sizes, warn_of_both
from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.class_preset import ClassPreset
from lycoris.compat.module_classes import NormModule, module_class
from lycoris.compat.parts import Part, check_names, choose, encode, module_name, resolve
from lycoris.compat.quantized import check_mergeable, is_mergeable
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.files.dialects.components import family_of
from lycoris.files.layout import Layout
from lycoris.files.source import open_source
from lycoris.targeting.options import parse_number, parse_optional
from lycoris.targeting.preset import Preset
from lycoris.targeting.rank_schedule import WITHOUT_SCHEDULE
from lycoris.targeting.recipe import Recipe

logger = logging.getLogger("LyCORIS")


class LycorisNetwork(Assignable, ClassPreset):
    """Adapters, made but not applied. `apply_to` puts them on, `merge_to` folds them in."""

    def __init__(
        self,
        module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        conv_lora_dim: int = 4,
        alpha: float | None = 1,
        conv_alpha: float | None = 1,
        use_tucker: bool = False,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        network_module: str = "locon",
        norm_modules: Any = None,
        train_norm: bool = False,
        init_only: bool = False,
        warn_on_unmatched: bool = True,
        **options: Any,
    ) -> None:
        """New adapters for a model by the preset of this class, as `create_lycoris` makes them.

        `conv_lora_dim=0` leaves convolutions with a real kernel out. Raises as `create_lycoris` does.
        """
        nn.Module.__init__(self)
        if init_only or norm_modules not in (None, NormModule):
            raise ConfigError(
                "a network without adapters (init_only) is filled by create_lycoris_from_weights"
                if init_only
                else f"norms are trained by NormModule; norm_modules={norm_modules!r} cannot be used"
            )
        sizes = {"linear_dim": lora_dim, "linear_alpha": alpha, "conv_dim": conv_lora_dim, "conv_alpha": conv_alpha}
        drop = {"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout}
        given = {"algo": network_module, "use_tucker": use_tucker, "train_norm": train_norm, **options, **sizes, **drop}
        preset = type(self).preset_in_force()
        if conv_lora_dim == 0:
            preset = dataclasses.replace(preset or Preset(), enable_conv=False)
            given["conv_dim"] = given["conv_alpha"] = None
        given["multiplier"] = multiplier
        part, recipe = choose(module, given, preset, warn_on_unmatched=warn_on_unmatched)
        self._become([part], recipe.multiplier, recipe.options.get("bypass_mode"), recipe)

    def _become(
        self, parts: Sequence[Part], multiplier: float, bypass_mode: bool | None, recipe: Recipe | None = None
    ) -> None:
        self.parts = list(parts)
        self._multiplier = multiplier
        self._told_twice = False
        vars(self).update(sizes(recipe))
        check_names(self.parts)
        for part in self.parts:
            part.adapters.set_strength(multiplier)
            for path, stack in part.adapters.stacks.items():
                place = part.adapters.sites[path]
                for at, adapter in enumerate(stack):
                    name = module_name(part.prefix, path, at)
                    module = module_class(adapter.algorithm).of(name, adapter, place, bypass_mode)
                    module._member = part.adapters, path
                    self.add_module(name, module)

    @classmethod
    def of(
        cls,
        parts: Sequence[Part],
        multiplier: float = 1.0,
        bypass_mode: bool | None = None,
        recipe: Recipe | None = None,
    ) -> Self:
        """A network of adapters that are there already."""
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._become(parts, multiplier, bypass_mode, recipe)
        return made

    @property
    def adapters(self) -> AdapterSet:
        """The native set; of several models, that of the denoiser."""
        return self._denoiser.adapters

    @property
    def prefix(self) -> str:
        """What the names in the file start with; of several models, those of the denoiser."""
        return self._denoiser.prefix

    @property
    def _denoiser(self) -> Part:
        return next((part for part in self.parts if not part.text), self.parts[0])

    @property
    def multiplier(self) -> float:
        """What `set_multiplier` was given last; modules may have one of their own. Assigning to it sets it."""
        return self._multiplier

    @multiplier.setter
    def multiplier(self, multiplier: float | str) -> None:
        if self.is_made:
            self.set_multiplier(multiplier)
        else:
            self._multiplier = parse_number(multiplier, "multiplier", float)

    @property
    def loras(self) -> list[LycorisBaseModule]:
        """The modules, in the models' order."""
        return Fixed(child for child in self.children() if isinstance(child, LycorisBaseModule))

    def _modules_of(self, part: Part) -> list[LycorisBaseModule]:
        """The modules of one of the models: of a layer that has several adapters, all of them."""
        return Fixed(module for module in self.loras if module._member and module._member[0] is part.adapters)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the names that they have in a file."""
        for name, module in self.named_children():
            yield from module.named_parameters(f"{prefix}{'.' if prefix else ''}{name}")

    # -- on and off --------------------------------------------------------------------------------------------------

    def apply_to(self, *_: Any, **__: Any) -> None:
        """Put the adapters on the model's layers. A second call does nothing.

        The model's own parameters are left as they are; when they train too, the first training pass says so.

        Modules that were applied or merged by themselves are restored first.
        """
        self._check_undoable()
        self._restore_singles(self.loras)
        with ExitStack() as undo:
            for part in self.parts:
                self._warn_of_schedule(part)
                fresh = not part.adapters.attached
                part.adapters.attach(freeze=False)
                if fresh:
                    undo.callback(part.adapters.detach)
                    unfrozen_base.watch(part.adapters.model)
            undo.pop_all()
        self._track()

    def restore(self) -> None:
        """Take the adapters off and undo a merge, those of modules by themselves too; the model is as it was."""
        self._check_undoable()
        for part in self.parts:
            part.adapters.check_detachable()
        self._restore_singles(self.loras)
        for part in self.parts:
            part.adapters.detach()
            unfrozen_base.unwatch(part.adapters.model)
            timestep_masks.untrack(part.adapters)

    def merge_to(self, weight: float = 1.0, *, precise: bool = False, untie: bool = False) -> None:
        """Fold the adapters into the model's weights at `weight` times the multiplier.

        Computed in float32 and rounded once, whether `precise` or not. `restore` undoes it exactly. T-LoRA with a
        schedule goes on masking ranks after the merge. Raises a `RuntimeError`, and changes nothing, when a weight is
        stored in few bits, and `AttachError` when it is shared with another module, unless `untie` gives the layer one
        of its own.
        """
        self._merge(weight, untie)

    def _merge(self, weight: float, untie: bool = False) -> None:
        self._check_undoable()
        check_mergeable(self._layers())
        if any(part.adapters.merged for part in self.parts):
            raise AttachError("these adapters are merged already; call restore() or onfly_restore() first")
        self._restore_singles(self.loras)
        self._told_twice = warn_of_both(weight, self._multiplier, told=self._told_twice)
        with ExitStack() as undo:
            for part in self.parts:
                part.adapters.merge(weight * part.adapters.strength, untie=untie)
                undo.callback(part.adapters.unmerge)
            undo.pop_all()
        self._track()

    def onfly_merge(self, weight: float = 1.0) -> None:
        """Fold in for a while, applied or not; `onfly_restore` undoes it exactly."""
        self._merge(weight)

    def onfly_restore(self) -> None:
        """Undo `onfly_merge`; applied adapters act again."""
        self._check_undoable()
        for part in self.parts:
            part.adapters.unmerge()
            if not part.adapters.attached:
                timestep_masks.untrack(part.adapters)

    def is_mergeable(self) -> bool:
        """Whether `merge_to` can be done without rounding the update to few bits."""
        return is_mergeable(self._layers())

    def set_multiplier(self, multiplier: float | str) -> None:
        """Strength of all adapters, those of modules that were applied by themselves too; 0 is exactly the base model.

        Raises `AttachError`, and changes nothing, while one of them is merged.
        """
        self._check_undoable()
        strength: float = finite(parse_number(multiplier, "multiplier", float))
        for module in self.loras:
            module._check_unmerged()
        for part in self.parts:
            part.adapters.set_strength(strength)
        for module in self.loras:
            if module._alone is not None:
                module._alone.set_strength(strength)
        self._multiplier = strength

    def _check_undoable(self) -> None:
        """Raise `AttachError` once the adapters were merged for good."""

    @staticmethod
    def _restore_singles(modules: Sequence[LycorisBaseModule]) -> None:
        """Restore those that were applied or merged by themselves. All or none."""
        alone = [module for module in modules if module._on_its_own]
        for module in alone:
            module._check_restorable()
        for module in alone:
            module.restore()

    def _layers(self) -> dict[str, nn.Module]:
        """What has a weight, by module."""
        return {module.lora_name: module._holder for module in self.loras}

    def _track(self) -> None:
        for part in self.parts:
            if not part.text:
                timestep_masks.track(part.adapters)

    def _warn_of_schedule(self, part: Part) -> None:
        adapters = part.adapters
        unguided = adapters.schedule is None and timestep_masks.get_timestep_mask() is None
        if adapters.rank_masks.are_used and unguided and not adapters.attached and not part.text:
            logger.warning(
                "applying adapters that were trained with a timestep schedule, without one: %s", WITHOUT_SCHEDULE
            )

    # -- what trainers call around a run -----------------------------------------------------------------------------

    def prepare_optimizer_params(self, lr: float | str | None = None) -> Any:
        """Parameter groups for an optimizer."""
        self.requires_grad_(True)
        group: dict[str, Any] = {"params": list(self.parameters())}
        rate: float | None = parse_optional(lr, "lr", float)
        return [group if rate is None else group | {"lr": rate}]

    def enable_gradient_checkpointing(self) -> None:
        """Nothing to do: the model's own checkpointing covers its adapters."""

    def prepare_grad_etc(self, *_: Any) -> None:
        """Let all parameters train."""
        self.requires_grad_(True)

    def on_epoch_start(self, *_: Any) -> None:
        """Draw dropout from here on."""
        self.train()

    def on_step_start(self, *_: Any) -> None:
        """Nothing to do."""

    def get_trainable_params(self, *_: Any) -> Iterator[nn.Parameter]:
        """The parameters, for clipping."""
        return self.parameters()

    def apply_max_norm_regularization(self, max_norm_value: float, device: Any = None) -> tuple[int, float, float]:
        """Shrink every ΔW to a norm: how many were above, and the mean and largest norm there are now."""
        found = [module.apply_max_norm(max_norm_value, device) for module in self.loras]
        norms = [norm for _, norm in found if norm is not None]
        if not norms:
            return 0, 0.0, 0.0
        return sum(bool(above) for above, _ in found), sum(norms) / len(norms), max(norms)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The tensors as they would be in a file."""
        found = {} if destination is None else destination
        found.update({prefix + key: tensor for key, tensor in self._encode().items()})
        return found

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Copy in what `state_dict` gave; returns (missing, unexpected) keys like any module."""
        missing, unexpected = self._load(dict(state_dict), {})
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
        bundles = {self._name(part): self._bundle(part) for part in self.parts}
        denoisers = {self._name(part): part.adapters.base for part in self.parts if not part.text}
        family = family_of(
            {name: Layout.all_of(base.model, base.layers).architecture for name, base in denoisers.items()}
        )
        files.write(
            bundles,
            file,
            dtype=dtype,
            metadata={**files.keep_header(self.adapters.metadata), **(metadata or {})},
            prefix={self._name(part): part.prefix for part in self.parts},
            family=None if family is None else family.name,
            describe=self._describe,
        )

    def _describe(self, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> Mapping[str, str]:
        """What a file's header says that depends on the rest of the file; see `lycoris.files.write`."""
        return {}

    def _bundle(self, part: Part) -> Bundle:
        """The adapters of a part as a file has them."""
        return part.adapters.bundle()

    @staticmethod
    def _name(part: Part) -> str:
        """Of a model of several: the denoiser has none."""
        return part.prefix if part.text else ""

    def load_weights(self, file: str | os.PathLike[str]) -> dict[str, list[str]]:
        """Copy in the tensors of a file. {} when all of them fit, otherwise the missing and unexpected keys.

        Raises `FileError`, and changes nothing, for tensors that mean something else, and `AttachError` while merged.
        """
        with open_source(file) as (tensors, header):
            missing, unexpected = self._load(tensors, header)
        found = {"missing keys": missing, "unexpected keys": unexpected}
        return {what: keys for what, keys in found.items() if keys}

    def _encode(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for part in self.parts:
            found |= files.encode(self._bundle(part), prefix=part.prefix)
        return found

    def _load(self, tensors: dict[str, Tensor], metadata: Mapping[str, str]) -> tuple[list[str], list[str]]:
        """Fill the adapters from tensors by file name; nothing changes unless every layer's tensors are usable."""
        self._check_undoable()
        values: list[tuple[Adapter, dict[str, Tensor]]] = []
        own: set[str] = set()
        for part in self.parts:
            names = set(encode(part))
            usable = {key: tensor for key, tensor in tensors.items() if key in names}
            own |= names
            if not usable:
                continue
            bundle = resolve(usable, part.adapters.model, part.prefix, metadata, text=part.text)
            for path, stack in bundle.entries.items():
                for at, entry in enumerate(stack):
                    module: Any = self._modules[module_name(part.prefix, path, at)]
                    values.append((module.adapter, module.fit(entry)))
        put(values)
        return sorted(own - tensors.keys()), sorted(tensors.keys() - own)
