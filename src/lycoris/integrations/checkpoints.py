"""Checkpoints of trainers: the state of an adapted model becomes that of its adapters, while this is in force.

Trainers save `model.state_dict()` or `model.save_pretrained()`, and resume by `model.load_state_dict()`. So these three
are what changes; nothing of any trainer does.
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
from lycoris.training.checkpoint import CONFIG, WEIGHTS
from lycoris.training.jsonfile import write_object

STATE = "model.safetensors"
"""The file with the exact state, under the name that trainers look for."""
MARK = "lycoris."
"""How the names of adapters' tensors in a model's state begin: `lycoris.SET:path/index/slot`."""
STATISTICS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Layers whose buffers change in training."""


def checkpoint_adapters(*adapters: AdapterSet, model: nn.Module | None = None) -> Checkpoints:
    """Make the state of a model that of its adapters, for trainers that save it; `remove()` ends that.

    `model.state_dict()` then holds every tensor of the sets that are attached and what else trains (parameters that
    require gradients, statistics of batch norms), and not the rest of the base; `load_state_dict` takes it back
    exactly; `save_pretrained`, where the model has one, writes that and adapter files. `model` is what the trainer
    saves; None: what the adapters are on. A second call for a model takes the place of the first.

    Raises `ConfigError` for sets of one name or of another model. While in force: `ConfigError` when the state is asked
    for and the model has adapters of a set that was not given, `FileError` for a state without these adapters.
    """
    return Checkpoints(adapters, model)


class Checkpoints:
    """What `checkpoint_adapters` gives."""

    def __init__(self, adapters: tuple[AdapterSet, ...], model: nn.Module | None) -> None:
        if not adapters:
            raise ConfigError("no adapters were given to save")
        self.model = adapters[0].model if model is None else model
        self.sets = {each.name or str(at): each for at, each in enumerate(adapters)}
        if len(self.sets) != len(adapters):
            raise ConfigError(f"two of these sets are called {', '.join(self.sets)}: give them different names")
        if odd := [name for name in self.sets if {*name} & {*":/\\"}]:
            raise ConfigError(f"the set name {odd[0]!r} has to serve as the name of a folder: no colons, no slashes")
        inside = {id(module) for module in self.model.modules()}
        if any(id(each.model) not in inside for each in adapters):
            raise ConfigError(f"these adapters are not all on one {type(self.model).__name__}: call it for each model")
        self._before: list[str] | None = None
        for earlier in _in_force(self.model):
            earlier.remove()
        if any(adapter.saved_with_model for adapter in self._adapters()):
            raise ConfigError("these adapters are in the state of another module already: remove() that first")
        for adapter in self._adapters():
            adapter.saved_with_model = True
        self._handles = _install(self, self.model)
        self._save_pretrained = getattr(self.model, "save_pretrained", None)
        if self._save_pretrained is not None:
            self._own = vars(self.model).get("save_pretrained")
            vars(self.model)["save_pretrained"] = self.save_pretrained

    @property
    def attached_sets(self) -> dict[str, AdapterSet]:
        """The sets that are on the model now, by the name they have in its state."""
        return {name: each for name, each in self.sets.items() if each.attached}

    def remove(self) -> None:
        """Give the model its own state again. A second call does nothing."""
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
        """Write the adapter file of the set that is attached, or of each of several into a folder of its name.

        A config that the set was made or read with goes beside it.
        """
        sets = self.attached_sets
        for name, each in sets.items():
            into = Path(folder) / name if len(sets) > 1 else Path(folder)
            into.mkdir(parents=True, exist_ok=True)
            files.write(each.bundle(), into / WEIGHTS)
            if "lycoris_config" in each.metadata:
                write_object(json_object(each.metadata["lycoris_config"]), into / CONFIG)

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], is_main_process: bool = True, **options: Any
    ) -> None:
        """Stands in for the model's own: the exact state and the adapter files, and no config of the base.

        With such a config beside it, the state would look like that of a model, and load as one with random weights.
        Options about the base's weights have no object; `push_to_hub` raises `ConfigError`.
        """
        if self._save_pretrained is not None and not self.attached_sets:
            self._save_pretrained(save_directory, is_main_process=is_main_process, **options)
            return
        if options.get("push_to_hub"):
            raise ConfigError("save_pretrained(push_to_hub=True) cannot be had here; call model.push_to_hub(...)")
        state = self.model.state_dict()
        if is_main_process:
            files.save_tensors(state, Path(save_directory) / STATE, {})
            self.write(save_directory)

    def state(self) -> dict[str, Tensor]:
        """Every tensor of the attached sets, by its name in the model's state."""
        return {
            f"{MARK}{name}:{key}": tensor.contiguous()
            for name, each in self.attached_sets.items()
            for key, tensor in each.state_dict().items()
        }

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state` gave. Raises `FileError` unless it is of the sets that are attached."""
        values: dict[str, dict[str, Tensor]] = {}
        for key, tensor in state.items():
            name, _, own = key.removeprefix(MARK).partition(":")
            values.setdefault(name, {})[own] = tensor
        if values.keys() != self.attached_sets.keys():
            has = f"adapters of {', '.join(values)}" if values else "no adapters, as the base's own has none"
            raise FileError(
                f"this state of a {type(self.model).__name__} has {has}, and attached are "
                f"{', '.join(self.attached_sets)}. Take it for what it is with checkpoint_adapters(...).remove(), or "
                "choose another checkpoint"
            )
        for name, each in self.attached_sets.items():
            each.load_state_dict(values[name])

    def check_complete(self) -> None:
        """Raise `ConfigError` if the model has adapters that are in none of these sets, and would not be saved."""
        lost = [name for name, each in self.model.named_modules() if isinstance(each, Adapter) and _is_missing(each)]
        if lost:
            raise ConfigError(f"{len(lost)} adapters would not be saved: give their set as well, as {lost[0]}")

    def names_besides(self) -> Iterator[str]:
        """Names in the base's state of what trains besides the adapters."""
        for name, module in self.model.named_modules():
            if isinstance(module, Adapter):
                continue
            trained = [key for key, each in module.named_parameters(recurse=False) if each.requires_grad]
            trained += [key for key, _ in module.named_buffers(recurse=False)] if isinstance(module, STATISTICS) else []
            yield from (f"{name}.{key}" if name else key for key in trained)

    def _adapters(self) -> Iterator[Adapter]:
        return (adapter for each in self.sets.values() for stack in each.stacks.values() for adapter in stack)


def _install(own: Checkpoints, model: Any) -> list[Any]:
    return [
        model.register_state_dict_post_hook(partial(_replace_state, own)),
        model.register_load_state_dict_pre_hook(partial(_take_state, own)),
        model.register_load_state_dict_post_hook(partial(_forget_missing, own)),
    ]


def _in_force(model: nn.Module) -> list[Checkpoints]:
    hooks = (hook for hook in model._state_dict_hooks.values() if isinstance(hook, partial))
    return [hook.args[0] for hook in hooks if hook.func is _replace_state]


def _is_missing(adapter: Adapter) -> bool:
    return not adapter.saved_with_model and not adapter.merged


def _replace_state(own: Checkpoints, module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    if not own.attached_sets:
        return
    own.check_complete()
    besides = {prefix + name for name in own.names_besides()}
    for key in [key for key in state if key.startswith(prefix) and key not in besides]:
        del state[key]
    state.update({prefix + key: tensor for key, tensor in own.state().items()})


def _take_state(
    own: Checkpoints, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any, strict: bool, *lists: Any
) -> None:
    if own.attached_sets:
        missing: list[str] = lists[0]
        own._before = list(missing)
        own.load({key.removeprefix(prefix): state.pop(key) for key in [*state] if key.startswith(prefix + MARK)})


def _forget_missing(own: Checkpoints, module: nn.Module, incompatible: Any) -> None:
    # The base's own tensors, which are not in the state on purpose.
    if own._before is not None:
        incompatible.missing_keys[:] = own._before
        own._before = None
