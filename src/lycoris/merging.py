"""Folding adapters into a layer's weight: computed in full precision, rounded once, undone by putting things back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn

from lycoris import attach, bases
from lycoris.additive import Additive
from lycoris.algorithm import Affine, Call
from lycoris.attach import Adapter
from lycoris.errors import AttachError

MARK = "_lycoris_merged"
"""Attribute of parameters that hold a merge."""


class Merge(NamedTuple):
    """A layer's parameters before and after, and how often the new ones had been written to when they were made."""

    attribute: str
    """Name of the parameter; "" for a layer's weight and bias."""
    old: Affine
    new: Affine
    versions: tuple[int, ...]


@torch.no_grad()
def fold(layer: nn.Module, stack: Sequence[Adapter], strength: float) -> Merge:
    """The layer's parameters, and new ones with a stack of adapters folded in. The layer is not changed yet.

    float32 throughout (float64 for such weights), and one rounding to the layer's own precision.
    """
    attribute, geometry = stack[0].attribute, stack[0].geometry
    old = _own(layer, attribute)
    dtype = old.weight.dtype
    full = torch.promote_types(dtype, torch.float32)
    affine = Affine(geometry.turned(old.weight.to(full)), None if old.bias is None else old.bias.to(full))
    for adapter in stack:
        affine = adapter.adapted(affine, Call(strength))
    whole = geometry.turned(affine.weight).contiguous()
    weight = nn.Parameter(whole.to(dtype), requires_grad=old.weight.requires_grad)
    trained = (old.weight if old.bias is None else old.bias).requires_grad
    bias = None if affine.bias is None else nn.Parameter(affine.bias.to(dtype), requires_grad=trained)
    setattr(weight, MARK, True)
    new = Affine(weight, bias)
    return Merge(attribute, old, new, _versions(new))


def _own(layer: nn.Module, attribute: str) -> Affine:
    """The parameters themselves, as the module stores them."""
    if attribute:
        return Affine(layer._parameters[attribute], None)  # type: ignore[arg-type]
    return bases.read(layer)


def is_merged(layer: nn.Module, attribute: str = "") -> bool:
    """Whether a layer's weight, or a parameter, has adapters folded in."""
    return bool(getattr(layer._parameters.get(attribute or "weight"), MARK, False))


def install(layer: nn.Module, affine: Affine, attribute: str = "") -> None:
    """Give a layer these very parameters. Another layer that shared the old ones keeps them."""
    layer._parameters[attribute or "weight"] = affine.weight  # type: ignore[assignment]
    if "bias" in layer._parameters and not attribute:
        layer._parameters["bias"] = affine.bias  # type: ignore[assignment]


def check_untouched(path: str, layer: nn.Module, merge: Merge) -> None:
    """Raise `AttachError` unless the layer still has just what the merge gave it (moved or cast, perhaps)."""
    now = _own(layer, merge.attribute)
    if now.weight is not merge.new.weight or now.bias is not merge.new.bias:
        raise AttachError(
            f"the weight of {path} was replaced after this merge; undo later merges first, newest to oldest"
        )
    if _versions(merge.new) != merge.versions:
        raise AttachError(
            f"the weight of {path} was written to after this merge, by load_state_dict or by training; "
            "undoing the merge would lose that"
        )


def restore(layer: nn.Module, merge: Merge) -> None:
    """Put a layer's own parameters back, where and in the precision to which the layer was moved since."""
    for old, new in zip(merge.old, merge.new, strict=True):
        if old is not None and new is not None and (old.dtype, old.device) != (new.dtype, new.device):
            old.data = old.data.to(new)
    install(layer, merge.old, merge.attribute)


def _versions(affine: Affine) -> tuple[int, ...]:
    # Tensors made in inference mode do not count their writes.
    return tuple(t._version for t in affine if t is not None and not t.is_inference())


def check_order(path: str, layer: nn.Module, own: Sequence[Adapter]) -> None:
    """Merging puts a stack below the adapters of other sets; that is the same only if all of them add.

    A stack that is not attached would have come on top. Raises `AttachError` otherwise.
    """
    order = list(attach.adapters_on(layer, own[0].attribute))
    first = next((at for at, adapter in enumerate(order) if adapter is own[0]), len(order))
    lower = [adapter for adapter in order[:first] if not adapter.silent]
    moved = [adapter.algorithm for adapter in (*lower, *own)]
    if lower and not all(isinstance(algorithm, Additive) for algorithm in moved):
        names = ", ".join(algorithm.name for algorithm in moved)
        raise AttachError(f"on {path} {names} do not commute; merge or detach the lower set first")
