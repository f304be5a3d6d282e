"""The base model's own parameters do not train while adapters are attached, and are as they were afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from torch import Tensor, nn

from lycoris.layers import paths
from lycoris.layers.geometry import IS_ADAPTER

HOLDERS = "_lycoris_frozen_by"
"""Attribute of a parameter: how many adapter sets keep it frozen."""

OwnedParameter = tuple[nn.Module, str]
"""A module and the name of its parameter: the object may be replaced, by a merge or by FSDP2."""


def freeze(model: nn.Module) -> list[OwnedParameter]:
    """Freeze a model's own parameters, and return those that `release` has to give back.

    Parameters of adapters are left alone, and so are those that were frozen by others before: they are not in the list.
    Several adapter sets may freeze one parameter; each call counts, and needs a `release` of its own.
    """
    found = []
    for module, name, parameter in _base_parameters(model):
        holders = getattr(parameter, HOLDERS, 0)
        if parameter.requires_grad or holders:
            setattr(parameter, HOLDERS, holders + 1)
            parameter.requires_grad_(False)
            found.append((module, name))
    return found


def release(places: Iterable[OwnedParameter]) -> None:
    """Undo `freeze`: what no other set keeps frozen trains again.

    Parameters that are no longer there are skipped.

    Args:
        places: what `freeze` returned. Pass it once, since every call takes one holder off.
    """
    for module, name in places:
        parameter = module._parameters.get(name)
        if parameter is None:
            continue
        holders = getattr(parameter, HOLDERS, 1) - 1
        if holders > 0:
            setattr(parameter, HOLDERS, holders)
            continue
        if hasattr(parameter, HOLDERS):
            delattr(parameter, HOLDERS)
        parameter.requires_grad_(True)


def carry(old: Tensor, new: Tensor) -> None:
    """Let a parameter that takes the place of another train, or not, like that one.

    `new` is changed in place: its `requires_grad`, unless it holds integers, and the count of sets that keep it frozen.
    """
    if new.is_floating_point():
        new.requires_grad_(old.requires_grad)
    if hasattr(old, HOLDERS):
        setattr(new, HOLDERS, getattr(old, HOLDERS))
    elif hasattr(new, HOLDERS):
        delattr(new, HOLDERS)


def trainable_names(model: nn.Module) -> list[str]:
    """Return the names of the model's own parameters that would train, in model order.

    Names are without wrappers around modules. Parameters of adapters are not among them.
    """
    layers = {id(module): path for path, module in paths.named_modules(model)}
    return [
        f"{layers[id(module)]}.{name}" if layers[id(module)] else name
        for module, name, parameter in _base_parameters(model)
        if parameter.requires_grad
    ]


def _base_parameters(model: nn.Module) -> Iterator[tuple[nn.Module, str, nn.Parameter]]:
    for _, module in paths.named_modules(model):
        if not getattr(module, IS_ADAPTER, False):
            yield from ((module, name, p) for name, p in module._parameters.items() if p is not None)
