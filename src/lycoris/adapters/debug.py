"""Finding out where NaN or infinity began."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from lycoris.errors import NotFiniteError


class _BadResultError(NotFiniteError):
    """The first module whose result was bad, and where it is."""

    def __init__(self, where: str, given: str) -> None:
        super().__init__(
            f"{where} returned NaN or infinity; what it was given is {given}. A lower learning rate or strength, or "
            "bfloat16 in place of float16, are what helps most often"
        )
        self.where = where


@contextmanager
def watch_finite(model: nn.Module) -> Iterator[None]:
    """Raise `NotFiniteError` at the first module, innermost first, that returns NaN or infinity in a pass inside.

    It waits for every module's result, which on a GPU costs time: for finding out, not for training.
    """
    handles = [module.register_forward_hook(_watch(name)) for name, module in model.named_modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _watch(name: str) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, output: Any) -> None:
        if not is_output_finite(output):
            where = f"{name or 'the model'} ({type(module).__name__})"
            raise _BadResultError(where, "finite" if is_output_finite(args) else "not finite either")

    return hook


def first_bad_module(model: nn.Module, run: Callable[[], object]) -> str | None:
    """Call `run`, which uses `model`, and name the first module to return NaN or infinity; None when all is finite.

    Modules finish innermost first, so the name is that of the layer, not of the blocks around it.
    """
    try:
        with torch.no_grad(), watch_finite(model):
            run()
    except _BadResultError as error:
        return error.where
    return None


def first_bad_tensor(model: nn.Module) -> str | None:
    """Name the first trained parameter, or gradient of one, that is not finite; None when all are.

    In the order of `named_parameters()`, each before its gradient. Frozen parameters are not looked at.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.isfinite().all():
            return name
        if parameter.grad is not None and not parameter.grad.isfinite().all():
            return f"the gradient of {name}"
    return None


def is_output_finite(output: Any) -> bool:
    """Return whether all tensors in something that a module was given or returned are finite.

    Dicts, tuples and lists are looked into, at any depth; integer tensors and other objects count as finite.
    """
    if isinstance(output, torch.Tensor):
        return not output.is_floating_point() or bool(output.isfinite().all())
    if isinstance(output, dict):
        return all(is_output_finite(value) for value in output.values())
    if isinstance(output, (tuple, list)):
        return all(is_output_finite(value) for value in output)
    return True
