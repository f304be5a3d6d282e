"""A warning when a trainer saves an adapted model's `state_dict`, in which the adapters are not.

Attaching puts a hook on the model that looks at who asks for the state: code that asks for it itself gets the base and
no warning; a library's function that saves does.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

from torch import nn

from lycoris.adapters.adapter import Adapter

SAVERS = (
    *("accelerate", "deepspeed", "diffusers", "lightning", "pytorch_lightning", "safetensors", "transformers", "trl"),
)
"""Packages that save models for others."""
PASSING = ("contextlib", "functools", "lycoris", "torch")
"""Packages whose functions pass a request for the state on."""


class BaseOnlyWarning(UserWarning):
    """A library saved an adapted model without its adapters.

    Given once for each model as long as it has adapters. `lycoris.write` and a merge are what save them.
    """


class _StateDictHook:
    """The hook: once for each model. Picklable, and copied with its model."""

    def __init__(self) -> None:
        self.warned = False

    def __call__(self, module: nn.Module, *_: Any) -> None:
        if self.warned:
            return
        frames, at = _saving_frames()
        names = [frame.f_code.co_name for frame in frames if "save" in frame.f_code.co_name]
        if not names:
            return
        lost = [each for each in module.modules() if isinstance(each, Adapter) and _is_left_out(each)]
        if lost and not any(_keeps(frame.f_locals.get("self"), module, lost) for frame in frames):
            self.warned = True
            warnings.warn(_message(_package(frames[0]), names[0], module, len(lost)), BaseOnlyWarning, stacklevel=at)


def watch_saving(model: Any) -> None:
    """Warn from now on when a library saves the state of a model without its adapters; a second call does nothing.

    Nor does one for a single layer that is adapted by itself: it is a part of what would be saved.
    """
    # A single layer that is adapted by itself is part of a model, which is what would be saved.
    alone = any(isinstance(child, Adapter) for child in model.children())
    if not alone and not any(isinstance(hook, _StateDictHook) for hook in model._state_dict_pre_hooks.values()):
        model.register_state_dict_pre_hook(_StateDictHook())


def unwatch_saving(model: nn.Module) -> None:
    """Stop warning of saves without adapters, once the model has none.

    As long as another set is attached nothing changes.
    """
    if not any(isinstance(module, Adapter) for module in model.modules()):
        hooks = model._state_dict_pre_hooks
        for key in [key for key, hook in hooks.items() if isinstance(hook, _StateDictHook)]:
            del hooks[key]


def _is_left_out(adapter: Adapter) -> bool:
    return not adapter.merged and not adapter.saved_with_model


def _saving_frames() -> tuple[list[FrameType], int]:
    """The functions of saving libraries that asked for the state, innermost first, and the stack level of who called.

    Empty when code of somebody else asked.
    """
    found: list[FrameType] = []
    # From the hook on; level 1 of a warning is the hook.
    frame, level = sys._getframe(1).f_back, 2
    while frame is not None:
        package = _package(frame)
        if package in SAVERS:
            found.append(frame)
        elif package not in PASSING and (found or frame.f_code.co_name != "state_dict"):
            break
        frame, level = frame.f_back, level + 1
    return found, level


def _package(frame: FrameType) -> str:
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


def _keeps(saver: Any, module: nn.Module, adapters: Iterable[Adapter]) -> bool:
    """Whether one of accelerate's `Accelerator`s saves these adapters by other means.

    Either by a hook of the trainer's own, or as an object of their own that it was given.
    """
    if getattr(saver, "_save_model_state_pre_hook", None):
        return True
    others = [*getattr(saver, "_custom_objects", ()), *getattr(saver, "_models", ())]
    held = {id(parameter) for other in others for parameter in _parameters_held_by(other, module)}
    return bool(held) and all(id(own) in held for adapter in adapters for own in adapter.parameters())


def _parameters_held_by(other: Any, module: nn.Module) -> Iterator[nn.Parameter]:
    """Those of an object that does not save the module itself."""
    around = isinstance(other, nn.Module) and any(each is module for each in other.modules())
    if not around and hasattr(other, "parameters"):
        yield from other.parameters()


def _message(package: str, function: str, module: nn.Module, count: int) -> str:
    return (
        f"{function} of {package} saves this {type(module).__name__} without its {count} adapters, which are not in "
        "its state_dict. For checkpoints to resume from: callbacks=[AdapterCallback(adapters)] of "
        "lycoris.integrations.transformers for Trainer and TRL, "
        "lycoris.integrations.checkpoints.checkpoint_adapters(adapters) for accelerate, Lightning and others. "
        "For an adapter file: lycoris.write(adapters.bundle(), path). For weights "
        "that have them in: merge first. If the base is what you want: "
        'warnings.filterwarnings("ignore", category=lycoris.adapters.saving.BaseOnlyWarning)'
    )
