"""A warning at the first training pass when the base model trains along with the adapters of a network.

Trainers of this interface freeze the base themselves, some of them only after `apply_to`.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import nn

from lycoris.adapters.load_report import some
from lycoris.layers import freezing

logger = logging.getLogger("LyCORIS")


def watch(model: nn.Module) -> None:
    """Look at the model's own parameters when a pass with gradients begins, once."""
    if not any(isinstance(hook, _Watch) for hook in model._forward_pre_hooks.values()):
        hook = _Watch()
        hook.handle = model.register_forward_pre_hook(hook)


def unwatch(model: nn.Module) -> None:
    """Undo `watch`."""
    for hook in list(model._forward_pre_hooks.values()):
        if isinstance(hook, _Watch):
            hook.handle.remove()


class _Watch:
    handle: Any

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return
        self.handle.remove()
        if names := freezing.trainable_names(model):
            logger.warning(
                "%d of the %s's own parameters train along with the adapters, and adapter files do not hold them: %s. "
                "Freeze them with requires_grad_(False) on the model before the network is applied, or ignore this if "
                "they should train",
                len(names),
                type(model).__name__,
                some(names),
            )
