"""`LycorisNetwork`: the adapters of one model, or of several models that are trained together."""

from __future__ import annotations

import dataclasses
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
from lycoris.compat.assignable import Assignable, ReadOnlyList, read_sizes, warn_of_both_strengths
from lycoris.compat.base_module import LycorisBaseModule
from lycoris.compat.class_preset import ClassPreset
from lycoris.compat.module_classes import NormModule, module_class
from lycoris.compat.parts import NetworkPart, check_names, choose_adapters, encode_part, name_module, resolve_part
from lycoris.compat.quantized import check_mergeable, is_mergeable
from lycoris.compat.training_hooks import TrainingHooks
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.files.dialects.components import find_family
from lycoris.files.layout import NamedLayout
from lycoris.files.source import open_source
from lycoris.targeting.options import parse_number
from lycoris.targeting.preset import Preset
from lycoris.targeting.recipe import Recipe


class LycorisNetwork(TrainingHooks, Assignable, ClassPreset):
    """A network of adapters, built but not applied. `apply_to` attaches them, `merge_to` merges them into the weights.

    Its parameters and `state_dict` have the names of an adapter file. Built by `create_lycoris`,
    `create_lycoris_from_weights`, or the constructor, which takes lycoris-lora 4.1.3's arguments.
    """

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
        """Build new adapters for a model by the preset of this class, as `create_lycoris` does.

        `conv_lora_dim=0` leaves out convolutions with a kernel larger than 1. Raises as `create_lycoris` does, and
        `ConfigError` for `init_only` and for other `norm_modules`.
        """
        nn.Module.__init__(self)
        if init_only or norm_modules not in (None, NormModule):
            raise ConfigError(
                "init_only is not supported; build the network of a file with create_lycoris_from_weights"
                if init_only
                else f"norm layers are trained by NormModule; norm_modules={norm_modules!r} is not supported"
            )
        sizes = {"linear_dim": lora_dim, "linear_alpha": alpha, "conv_dim": conv_lora_dim, "conv_alpha": conv_alpha}
        drop = {"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout}
        given = {"algo": network_module, "use_tucker": use_tucker, "train_norm": train_norm, **options, **sizes, **drop}
        preset = type(self).build_preset()
        if conv_lora_dim == 0:
            preset = dataclasses.replace(preset or Preset(), enable_conv=False)
            given["conv_dim"] = given["conv_alpha"] = None
        given["multiplier"] = multiplier
        part, recipe = choose_adapters(module, given, preset, warn_on_unmatched=warn_on_unmatched)
        self._set_up([part], recipe.multiplier, recipe.options.get("bypass_mode"), recipe)

    def _set_up(
        self, parts: Sequence[NetworkPart], multiplier: float, bypass_mode: bool | None, recipe: Recipe | None = None
    ) -> None:
        self.parts = list(parts)
        self._multiplier = multiplier
        self._warned_of_strengths = False
        vars(self).update(read_sizes(recipe))
        check_names(self.parts)
        for part in self.parts:
            part.adapters.set_strength(multiplier)
            for path, stack in part.adapters.stacks.items():
                place = part.adapters.sites[path]
                for at, adapter in enumerate(stack):
                    name = name_module(part.prefix, path, at)
                    module = module_class(adapter.algorithm).from_adapter(name, adapter, place, bypass_mode)
                    module._member = part.adapters, path
                    self.add_module(name, module)

    @classmethod
    def from_parts(
        cls,
        parts: Sequence[NetworkPart],
        multiplier: float = 1.0,
        bypass_mode: bool | None = None,
        recipe: Recipe | None = None,
    ) -> Self:
        """Return a network of existing adapters.

        Args:
            parts: The adapters of each model.
            multiplier: Strength to set on all of them.
            bypass_mode: What the modules' `bypass_mode` reads; no computation depends on it.
            recipe: Config from which the attributes such as `lora_dim` are read. None: their values where a file
                decides.

        Raises `ConfigError` when two layers would have the same name.
        """
        made = cls.__new__(cls)
        nn.Module.__init__(made)
        made._set_up(parts, multiplier, bypass_mode, recipe)
        return made

    @property
    def adapters(self) -> AdapterSet:
        """The `AdapterSet` behind this network; with several models, that of the denoiser."""
        return self._denoiser.adapters

    @property
    def prefix(self) -> str:
        """Prefix of the names in the file; with several models, that of the denoiser."""
        return self._denoiser.prefix

    @property
    def _denoiser(self) -> NetworkPart:
        return next((part for part in self.parts if not part.text), self.parts[0])

    @property
    def multiplier(self) -> float:
        """The value last given to `set_multiplier`; single modules may have another.

        Assigning to it calls `set_multiplier`.
        """
        return self._multiplier

    @multiplier.setter
    def multiplier(self, multiplier: float | str) -> None:
        if self.is_built:
            self.set_multiplier(multiplier)
        else:
            self._multiplier = parse_number(multiplier, "multiplier", float)

    def _modules_of(self, part: NetworkPart) -> list[LycorisBaseModule]:
        """Return the modules of one model; a layer with several adapters has several."""
        return ReadOnlyList(module for module in self.loras if module._member and module._member[0] is part.adapters)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by the names that they have in a file."""
        for name, module in self.named_children():
            yield from module.named_parameters(f"{prefix}{'.' if prefix else ''}{name}")

    # -- on and off --------------------------------------------------------------------------------------------------

    def apply_to(self, *_: Any, **__: Any) -> None:
        """Attach the adapters to the model's layers. A second call does nothing.

        The model's own parameters are not frozen; if they are trainable, a warning is logged at the first training
        pass. Modules that were applied or merged individually are restored first. All models are changed or none.
        """
        self._check_undoable()
        self._restore_singles(self.loras)
        with ExitStack() as undo:
            for part in self.parts:
                if not part.text:
                    timestep_masks.warn_of_missing_schedule(part.adapters)
                fresh = not part.adapters.attached
                part.adapters.attach(freeze=False)
                if fresh:
                    undo.callback(part.adapters.detach)
                    unfrozen_base.watch_base(part.adapters.model)
            undo.pop_all()
        self._track()

    def restore(self) -> None:
        """Detach the adapters and undo a merge, also of modules applied individually. The model is exactly as before.

        Raises `AttachError`, and changes nothing, when something else was attached or merged on top.
        """
        self._check_undoable()
        for part in self.parts:
            part.adapters.check_detachable()
        self._restore_singles(self.loras)
        for part in self.parts:
            part.adapters.detach()
            unfrozen_base.unwatch_base(part.adapters.model)
            timestep_masks.untrack_adapters(part.adapters)

    def merge_to(self, weight: float = 1.0, *, precise: bool = False, untie: bool = False) -> None:
        """Merge the adapters into the model's weights at `weight` times the multiplier.

        The merge is computed in float32 and rounded once, with or without `precise`, and `restore` undoes it exactly.
        T-LoRA with a schedule continues to mask ranks after the merge.

        Args:
            untie: Whether a layer that shares its weight with another module gets a weight of its own.

        Raises `RefusedError`, a `RuntimeError`, for weights stored in few bits, and `AttachError` for a second merge or
        for a shared weight without `untie`. The model is unchanged then.
        """
        self._merge(weight, untie)

    def _merge(self, weight: float, untie: bool = False) -> None:
        self._check_undoable()
        check_mergeable(self._layers())
        if any(part.adapters.merged for part in self.parts):
            raise AttachError("these adapters are already merged; call restore() or onfly_restore() first")
        self._restore_singles(self.loras)
        self._warned_of_strengths = warn_of_both_strengths(weight, self._multiplier, warned=self._warned_of_strengths)
        with ExitStack() as undo:
            for part in self.parts:
                part.adapters.merge(weight * part.adapters.strength, untie=untie)
                undo.callback(part.adapters.unmerge)
            undo.pop_all()
        self._track()

    def onfly_merge(self, weight: float = 1.0) -> None:
        """Merge the adapters temporarily, applied or not; `onfly_restore` undoes it exactly.

        Raises as `merge_to` does.
        """
        self._merge(weight)

    def onfly_restore(self) -> None:
        """Undo `onfly_merge`; applied adapters act on activations again.

        Does nothing when nothing is merged. Raises `AttachError` when something else was merged on top.
        """
        self._check_undoable()
        for part in self.parts:
            part.adapters.unmerge()
            if not part.adapters.attached:
                timestep_masks.untrack_adapters(part.adapters)

    def is_mergeable(self) -> bool:
        """Return whether `merge_to` is possible without rounding the update to few bits.

        False for quantized and 8-bit weights.
        """
        return is_mergeable(self._layers())

    def set_multiplier(self, multiplier: float | str) -> None:
        """Set the strength of all adapters, also of modules applied individually.

        0 gives exactly the base model's output. Raises `ConfigError` for what is not a finite number, and
        `AttachError`, without a change, while any of them is merged.
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
        """Raise `AttachError` once the adapters were merged irreversibly."""

    @staticmethod
    def _restore_singles(modules: Sequence[LycorisBaseModule]) -> None:
        """Restore the modules that were applied or merged individually: all or none."""
        alone = [module for module in modules if module._acts_alone]
        for module in alone:
            module._check_restorable()
        for module in alone:
            module.restore()

    def _layers(self) -> dict[str, nn.Module]:
        """Return what holds the weight, by module name."""
        return {module.lora_name: module._holder for module in self.loras}

    def _track(self) -> None:
        for part in self.parts:
            if not part.text:
                timestep_masks.track_adapters(part.adapters)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the tensors by the names that they have in a file."""
        found = {} if destination is None else destination
        found.update({prefix + key: tensor for key, tensor in self._encode().items()})
        return found

    def load_state_dict(self, state_dict: Mapping[str, Tensor], strict: bool = True, assign: bool = False) -> Any:
        """Copy tensors named as in `state_dict` into the adapters.

        Returns (missing, unexpected) keys as any module does. With `strict`, raises `FileError` when there are any.
        Raises it also for tensors of another algorithm or shape.
        """
        missing, unexpected = self._load(dict(state_dict), {})
        if strict and (missing or unexpected):
            raise FileError(f"missing tensors: {missing[:5]}; unexpected tensors: {unexpected[:5]}")
        return nn.modules.module._IncompatibleKeys(missing, unexpected)

    def save_weights(
        self, file: str | os.PathLike[str], dtype: torch.dtype | None, metadata: Mapping[str, str] | None = None
    ) -> None:
        """Write the adapters as safetensors, atomically.

        Args:
            file: Path. Raises `FileError` for the suffix of a pickle, such as .pt or .ckpt.
            dtype: Precision of the tensors in the file. None keeps that of the adapters.
            metadata: Additional header entries.
        """
        if Path(file).suffix in files.PICKLES:
            raise FileError(
                f"{file}: adapters are saved only as .safetensors, since a pickle can run code when it is loaded"
            )
        bundles = {self._name(part): self._bundle(part) for part in self.parts}
        denoisers = {self._name(part): part.adapters.base for part in self.parts if not part.text}
        family = find_family(
            {name: NamedLayout.from_layers(base.model, base.layers).architecture for name, base in denoisers.items()}
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
        """Return header entries that depend on the rest of the file; see `lycoris.files.write`."""
        return {}

    def _bundle(self, part: NetworkPart) -> Bundle:
        """Return the adapters of a part as they are written to a file."""
        return part.adapters.bundle()

    @staticmethod
    def _name(part: NetworkPart) -> str:
        """Return the component name of a part; the denoiser has none."""
        return part.prefix if part.text else ""

    def load_weights(self, file: str | os.PathLike[str]) -> dict[str, list[str]]:
        """Copy the tensors of a file into the adapters.

        Returns {} when all match, otherwise the missing and unexpected keys. Raises `FileError`, without a change, for
        tensors of another algorithm or shape, and `AttachError` while merged.
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
        """Fill the adapters from tensors by file name; nothing changes unless the tensors of every layer are usable."""
        self._check_undoable()
        values: list[tuple[Adapter, dict[str, Tensor]]] = []
        own: set[str] = set()
        for part in self.parts:
            names = set(encode_part(part))
            usable = {key: tensor for key, tensor in tensors.items() if key in names}
            own |= names
            if not usable:
                continue
            bundle = resolve_part(usable, part.adapters.model, part.prefix, metadata, text=part.text)
            for path, stack in bundle.entries.items():
                for at, entry in enumerate(stack):
                    module: Any = self._modules[name_module(part.prefix, path, at)]
                    values.append((module.adapter, module.fit(entry)))
        put(values)
        return sorted(own - tensors.keys()), sorted(tensors.keys() - own)
