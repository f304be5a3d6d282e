"""Folding adapters into a layer's weight: computed in full precision, rounded once, undone by putting things back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lycoris import attach, bases
from lycoris.algorithm import Additive, Affine, Call
from lycoris.attach import Adapter
from lycoris.errors import AttachError


class Merge(NamedTuple):
    """A layer's parameters before and after."""

    old: Affine
    new: Affine


@torch.no_grad()
def fold(layer: nn.Module, stack: Sequence[Adapter], strength: float) -> Merge:
    """The layer's parameters, and new ones with a stack of adapters folded in. The layer is not changed yet.

    float32 throughout (float64 for such weights), and one rounding to the layer's own precision.
    """
    old = bases.read(layer)
    dtype, trained = old.weight.dtype, old.weight.requires_grad
    full = torch.promote_types(dtype, torch.float32)
    affine = Affine(old.weight.to(full), None if old.bias is None else old.bias.to(full))
    for adapter in stack:
        affine = adapter.adapted(affine, Call(strength))
    weight = nn.Parameter(affine.weight.to(dtype), requires_grad=trained)
    bias = None if affine.bias is None else nn.Parameter(affine.bias.to(dtype), requires_grad=trained)
    return Merge(old, Affine(weight, bias))


def install(layer: nn.Module, affine: Affine) -> None:
    """Give a layer these very parameters. Another layer that shared the old ones keeps them."""
    layer.weight, layer.bias = affine.weight, affine.bias  # type: ignore[assignment]


def check_order(path: str, layer: nn.Module, own: Sequence[Adapter]) -> None:
    """Merging puts a stack below the adapters of other sets; that is the same only if all of them add.

    Raises `AttachError` otherwise.
    """
    order = list(attach.adapters_on(layer))
    first = next((at for at, adapter in enumerate(order) if adapter is own[0]), 0)
    lower = [adapter for adapter in order[:first] if not adapter.silent]
    moved = [adapter.algorithm for adapter in (*lower, *own)]
    if lower and not all(isinstance(algorithm, Additive) for algorithm in moved):
        names = ", ".join(algorithm.name for algorithm in moved)
        raise AttachError(f"on {path} {names} do not commute; merge or detach the lower set first")
