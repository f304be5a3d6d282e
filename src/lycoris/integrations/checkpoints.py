"""Checkpoints of other trainers: the state of an adapted model is replaced by that of its adapters.

Trainers save with `model.state_dict()` or `model.save_pretrained()` and resume with `model.load_state_dict()`, so these
three change, and no trainer has to.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from lycoris import files
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.errors import ConfigError, FileError
from lycoris.json_io import json_object
from lycoris.training.checkpoint import CONFIG_FILE, WEIGHTS_FILE
from lycoris.training.jsonfile import write_object

STATE_FILE_NAME = "model.safetensors"
"""File with the exact state, by the name that trainers look for."""
STATE_PREFIX = "lycoris."
"""Prefix of adapter tensors in a model's state: `lycoris.SET:path/index/slot`."""
STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Layers whose buffers change in training."""


def checkpoint_adapters(*adapters: AdapterSet, model: nn.Module | None = None) -> Checkpoints:
    """Make the state of a model that of its adapters, until `remove()` of the result is called.

    `model.state_dict()` then holds every tensor of the attached sets and what else trains (parameters that require
    gradients, statistics of batch norms), without the rest of the base; `load_state_dict` restores it exactly, and
    `save_pretrained`, where the model has one, writes it and adapter files. A second call for a model replaces the
    first.

    Args:
        adapters: Sets on one model, with different names.
        model: The module that the trainer saves. None: the module that the adapters are on.

    Raises `ConfigError` for two sets of one name, or for sets of another model. Until removed, asking for the state
    raises `ConfigError` when the model has adapters of a set that was not given, and loading raises `FileError` for a
    state without these adapters.
    """
    return Checkpoints(adapters, model)


class Checkpoints:
    """The hooks that `checkpoint_adapters` installs on a model, until `remove()`.

    Only sets that are attached are saved and loaded; without any, the model's own state is used.
    """

    def __init__(self, adapters: tuple[AdapterSet, ...], model: nn.Module | None) -> None:
        if not adapters:
            raise ConfigError("no adapters were given to save")
        self.model = adapters[0].model if model is None else model
        self.sets = {each.name or str(at): each for at, each in enumerate(adapters)}
        if len(self.sets) != len(adapters):
            raise ConfigError(
                f"two of these sets have the same name; the names are {', '.join(self.sets)}. Choose different ones"
            )
        if odd := [name for name in self.sets if {*name} & {*":/\\"}]:
            raise ConfigError(f"the set name {odd[0]!r} is also a folder name, and cannot contain colons or slashes")
        inside = {id(module) for module in self.model.modules()}
        if any(id(each.model) not in inside for each in adapters):
            raise ConfigError(
                f"these adapters are not all on this {type(self.model).__name__}; make one call per model"
            )
        self._before: list[str] | None = None
        for earlier in _find_installed(self.model):
            earlier.remove()
        if any(adapter.saved_with_model for adapter in self._adapters()):
            raise ConfigError(
                "these adapters are already saved with another module; call remove() on those checkpoints first"
            )
        for adapter in self._adapters():
            adapter.saved_with_model = True
        self._handles = _install_hooks(self, self.model)
        self._save_pretrained = getattr(self.model, "save_pretrained", None)
        if self._save_pretrained is not None:
            self._own = vars(self.model).get("save_pretrained")
            vars(self.model)["save_pretrained"] = self.save_pretrained

    @property
    def attached_sets(self) -> dict[str, AdapterSet]:
        """The sets that are attached now, by their name in the model's state."""
        return {name: each for name, each in self.sets.items() if each.attached}

    def remove(self) -> None:
        """Restore the model's own `state_dict`, `load_state_dict` and `save_pretrained`.

        A second call does nothing.
        """
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles = []
        if vars(self.model).get("save_pretrained") == self.save_pretrained:
            del vars(self.model)["save_pretrained"]
            if self._own is not None:
                vars(self.model)["save_pretrained"] = self._own
        for adapter in self._adapters():
            adapter.saved_with_model = False

    def write(self, folder: str | os.PathLike[str]) -> None:
        """Write the adapter file of the attached set, or of each of several into a subfolder named after it.

        A config that the set was built or read with is written next to it.
        """
        sets = self.attached_sets
        for name, each in sets.items():
            into = Path(folder) / name if len(sets) > 1 else Path(folder)
            into.mkdir(parents=True, exist_ok=True)
            files.write(each.bundle(), into / WEIGHTS_FILE)
            if "lycoris_config" in each.metadata:
                write_object(json_object(each.metadata["lycoris_config"]), into / CONFIG_FILE)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
    ) -> None:
        """Write the exact state and the adapter files, in place of the model's own `save_pretrained`.

        The base model's config is left out: with it, the state would look like that of a complete model and load as one
        with random weights. Options about the base's weights have no effect. Without attached sets, the model's own
        method is called.

        Raises `ConfigError` for `push_to_hub`.
        """
        if self._save_pretrained is not None and not self.attached_sets:
            self._save_pretrained(save_directory, is_main_process=is_main_process, **options)
            return
        if options.get("push_to_hub"):
            raise ConfigError(
                "save_pretrained(push_to_hub=True) is not supported with adapters; call model.push_to_hub(...)"
            )
        state = self.model.state_dict()
        if is_main_process:
            files.save_tensors(state, Path(save_directory) / STATE_FILE_NAME, {})
            self.write(save_directory)

    def state(self) -> dict[str, Tensor]:
        """Return every tensor of the attached sets, by its name in the model's state: `lycoris.SET:path/index/slot`."""
        return {
            f"{STATE_PREFIX}{name}:{key}": tensor.contiguous()
            for name, each in self.attached_sets.items()
            for key, tensor in each.state_dict().items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of `state` into the attached sets.

        Raises `FileError` unless it is the state of exactly these sets.
        """
        values: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            name, _, own = key.removeprefix(STATE_PREFIX).partition(":")
            values.setdefault(name, {})[own] = tensor
        if values.keys() != self.attached_sets.keys():
            has = f"adapters of {', '.join(values)}" if values else "no adapters"
            raise FileError(
                f"this state of a {type(self.model).__name__} has {has}, but the attached sets are "
                f"{', '.join(self.attached_sets)}. Choose another checkpoint, or call remove() on the result of "
                "checkpoint_adapters to load the base model's own state"
            )
        for name, each in self.attached_sets.items():
            each.load_state_dict(values[name])

    def check_complete(self) -> None:
        """Check that every adapter on the model is saved.

        Raises `ConfigError` if the model has adapters that are in none of these sets. Merged adapters are part of the
        weights, and need not be.
        """
        lost = [name for name, each in self.model.named_modules() if isinstance(each, Adapter) and _is_unsaved(each)]
        if lost:
            raise ConfigError(
                f"{len(lost)} adapters would not be saved, such as {lost[0]}; pass their set to checkpoint_adapters too"
            )

    def iterate_other_trainable(self) -> Iterator[str]:
        """Yield the names, in the base's state, of what trains in addition to the adapters.

        These are parameters that require gradients, and all buffers of batch norms.
        """
        for name, module in self.model.named_modules():
            if isinstance(module, Adapter):
                continue
            trained = [key for key, each in module.named_parameters(recurse=False) if each.requires_grad]
            trained += [key for key, _ in module.named_buffers(recurse=False)] if isinstance(module, STATISTICS) else []
            yield from (f"{name}.{key}" if name else key for key in trained)

    def _adapters(self) -> Iterator[Adapter]:
        return (adapter for each in self.sets.values() for stack in each.stacks.values() for adapter in stack)


def _install_hooks(own: Checkpoints, model: Any) -> list[Any]:
    return [
        model.register_state_dict_post_hook(partial(_replace_state, own)),
        model.register_load_state_dict_pre_hook(partial(_take_state, own)),
        model.register_load_state_dict_post_hook(partial(_forget_missing, own)),
    ]


def _find_installed(model: nn.Module) -> list[Checkpoints]:
    hooks = (hook for hook in model._state_dict_hooks.values() if isinstance(hook, partial))
    return [hook.args[0] for hook in hooks if hook.func is _replace_state]


def _is_unsaved(adapter: Adapter) -> bool:
    return not adapter.saved_with_model and not adapter.merged


def _replace_state(own: Checkpoints, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if not own.attached_sets:
        return
    own.check_complete()
    besides = {prefix + name for name in own.iterate_other_trainable()}
    for key in [key for key in state if key.startswith(prefix) and key not in besides]:
        del state[key]
    state.update({prefix + key: tensor for key, tensor in own.state().items()})


def _take_state(
    own: Checkpoints, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any
) -> None:
    if own.attached_sets:
        missing: list[str] = lists[0]
        own._before = list(missing)
        own.load(
            {key.removeprefix(prefix): state.pop(key) for key in [*state] if key.startswith(prefix + STATE_PREFIX)}
        )


def _forget_missing(own: Checkpoints, module: nn.Module, incompatible: Any) -> None:
    # The base's own tensors are left out of the state on purpose.
    if own._before is not None:
        incompatible.missing_keys[:] = own._before
        own._before = None
