"""A warning at the first training pass when the base model trains along with the adapters of a network.

Trainers of this interface freeze the base model themselves, some of them only after `apply_to`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from lycoris.adapters.load_report import some
from lycoris.layers import freezing

logger = logging.getLogger("LyCORIS")


def watch_base(model: nn.Module) -> None:
    """Install a hook that checks once, at the first pass with gradients, whether the model's own parameters train.

    A second call does nothing. The hook removes itself after the check.
    """
    if not any(isinstance(hook, _FrozenCheckHook) for hook in model._forward_pre_hooks.values()):
        hook = _FrozenCheckHook()
        hook.handle = model.register_forward_pre_hook(hook)


def unwatch_base(model: nn.Module) -> None:
    """Remove the hook of `watch_base`, if it is still there."""
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, _FrozenCheckHook):
            hook.handle.remove()


class _FrozenCheckHook:
    handle: Any

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self.handle.remove()
        if names := freezing.trainable_names(model):
            logger.warning(
                "%d of the %s's own parameters train along with the adapters, and are not saved in adapter files: %s. "
                "Freeze them with requires_grad_(False) on the model before applying the network, or ignore this if "
                "they should train",
                len(names),
                type(model).__name__,
                some(names),
            )
