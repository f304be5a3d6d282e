"""What a bundle's tensors become on a model's adapters: completed from the base weight, and checked against them; and
what adapters hold, as a state that is saved and loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from lycoris import attach, bases, merging, paths
from lycoris.adapter import Adapter
from lycoris.algorithm import Algorithm
from lycoris.bundle import Bundle, Entry
from lycoris.errors import AttachError, FileError, nearest
from lycoris.geometry import Site, site, sites
from lycoris.planning import Plan


def home(place: Site) -> dict[str, Any]:
    """Where and how the adapters of a place keep their tensors."""
    return bases.home(bases.holder(place.module, place.attribute))


def warn_of_rounding(dtype: torch.dtype | None, stacklevel: int) -> None:
    """Say what parameters of half precision do to small updates."""
    if dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"adapter parameters in {dtype}: an update far below a parameter's own size rounds away. Leave dtype out "
            "for float32, or pass stochastic_rounding=True if your optimizer rounds stochastically",
            stacklevel=stacklevel + 1,
        )


def completed(entry: Entry, place: Site) -> dict[str, Tensor]:
    """An entry's tensors with those that follow from the base weight, which must still be the base weight."""
    tensors = entry.algorithm.complete(entry.tensors, attach.bottom(place.module, place.attribute))
    if len(tensors) > len(entry.tensors) and merging.is_merged(place.module, place.attribute):
        raise FileError(
            f"{place.path}: the file leaves out tensors that follow from the base weight, and adapters are merged into "
            "it; undo the merge, load, and merge again"
        )
    return tensors


def fitted(adapter: Adapter, entry: Entry, place: Site) -> dict[str, Tensor]:
    """An entry's tensors for an adapter that is there already. Raises `FileError` when they mean something else."""
    # Of what makes a start, a file does not tell all.
    alike = type(entry.algorithm) is type(adapter.algorithm)
    own = entry._replace(algorithm=adapter.algorithm) if alike else entry
    return matched(adapter, entry.algorithm, completed(own, place), place.path)


def matched(adapter: Adapter, algorithm: Algorithm, given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of an algorithm for an adapter, with the gate that a file folds into a factor.

    Raises `FileError` unless they do on the adapter what the algorithm does with them.
    """
    own, tensors = {name: tuple(t.shape) for name, t in adapter.tensors().items()}, dict(given)
    if "gate" in own:
        tensors.setdefault("gate", torch.ones(own["gate"]))
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    # The scale, not alpha: a LoKr of whole factors ignores it. Other programs round alpha to bfloat16.
    constants = [each.constants(adapter.geometry) for each in (algorithm, adapter.algorithm)]
    same = len(constants[0]) == len(constants[1]) and all(
        math.isclose(*pair, rel_tol=4e-3) for pair in zip(*constants, strict=True)
    )
    if shapes == own and same:
        return tensors
    odd = next((name for name in sorted(shapes.keys() | own.keys()) if shapes.get(name) != own.get(name)), None)
    told = f"; {odd} {shapes.get(odd, 'none')} in the file and {own.get(odd, 'none')} here" if odd else ""
    raise FileError(f"{where}: the file has {algorithm}, the adapter is {adapter.algorithm}{told}")


Stacks = Mapping[str, tuple[Adapter, ...]]
"""Adapters by layer path, lowest first."""


def in_model_order(model: nn.Module, stacks: Stacks) -> dict[str, tuple[Adapter, ...]]:
    """The same stacks, sorted by where their layers are in the model: optimizers tell parameters apart by position."""
    position = paths.order(model)
    return dict(sorted(stacks.items(), key=lambda item: position.get(item[0], len(position))))


def built(model: nn.Module, plan: Plan, dtype: torch.dtype | None) -> dict[str, tuple[Adapter, ...]]:
    """New adapters for a plan, initialised; None: parameters as fine as their layer's, and float32 at least."""
    stacks = {}
    for placement in plan.placements:
        place = site(model, placement.path)
        own = home(place) if dtype is None else home(place) | {"dtype": dtype}
        stack = [Adapter(algorithm, placement.geometry, **own) for algorithm in placement.algorithms]
        below = attach.top(place.module, place.attribute)
        for adapter in stack:
            adapter.attribute = place.attribute
            adapter.initialise(below)
        stacks[placement.path] = tuple(stack)
    return stacks


def loaded(model: nn.Module, bundle: Bundle) -> dict[str, tuple[Adapter, ...]]:
    """New adapters with a bundle's tensors. Raises `FileError` for layers that the model does not have like that."""
    places = _places(model, bundle)
    return {path: tuple(_made(entry, places[path]) for entry in stack) for path, stack in bundle.entries.items()}


def _places(model: nn.Module, bundle: Bundle) -> dict[str, Site]:
    """Where the layers of a bundle are in a model."""
    found = {}
    for path in bundle.entries:
        with suppress(KeyError):
            found[path] = site(model, path)
    if lost := [path for path in bundle.entries if path not in found]:
        known = {place.path for place in sites(model)}
        near = (f"{path} is like {close[0]}" for path in lost if (close := nearest(path, known, limit=1)))
        told = next(near, "is this the model they were made for?")
        if any(f"{path}.base_layer" in known for path in lost):
            told = "PEFT's layers are in their place: take them off first, as with pipe.unload_lora_weights()"
        raise FileError(
            f"{len(lost)} of {len(bundle.entries)} layers are no layers of this {type(model).__name__}: "
            f"{', '.join(lost[:5])}; {told}"
        )
    return found


def _made(entry: Entry, place: Site) -> Adapter:
    g, here = entry.geometry, place.geometry
    if (g.kind, g.stack, g.shape, g.transposed) != (here.kind, here.stack, here.shape, here.transposed):
        raise FileError(f"{place.path}: the file has {entry.algorithm} for a {g}, and this is a {here}")
    adapter = Adapter(entry.algorithm, here, **home(place))
    adapter.attribute = place.attribute
    adapter.fill(fitted(adapter, entry, place))
    return adapter


def entries(stacks: Stacks) -> dict[str, tuple[Entry, ...]]:
    """Adapters as values, whole."""
    return {
        path: tuple(Entry(each.algorithm, each.geometry, each.whole()) for each in stack)
        for path, stack in stacks.items()
    }


def state(stacks: Stacks) -> dict[str, Tensor]:
    """Every tensor under `path/index/slot`, detached and whole."""
    return {
        f"{path}/{at}/{slot}": tensor for path, at, adapter in _each(stacks) for slot, tensor in adapter.whole().items()
    }


def put(values: Sequence[tuple[Adapter, Mapping[str, Tensor]]]) -> None:
    """Copy tensors into adapters. Raises `AttachError`, and changes nothing, if one of them is merged."""
    if any(adapter.merged for adapter, _ in values):
        raise AttachError(
            "the adapters are merged, and the weights would keep what was merged: undo the merge (a network's or "
            "module's restore() or onfly_restore(), a set's unmerge()), load, and merge again"
        )
    for adapter, tensors in values:
        adapter.fill(tensors)


def load_state(stacks: Stacks, values: Mapping[str, Tensor]) -> None:
    """Copy in what `state` gave. Raises `FileError` unless names and shapes are the same."""
    own = {f"{path}/{at}/{slot}": t for path, at, adapter in _each(stacks) for slot, t in adapter.kept().items()}
    wrong = [key for key in own.keys() & values.keys() if own[key].shape != values[key].shape]
    off = sorted(own.keys() ^ values.keys()) + sorted(wrong)
    if off:
        raise FileError(f"the saved state does not fit these adapters: {', '.join(off[:5])} ({len(off)} in all)")
    put(
        [
            (adapter, {slot: values[f"{path}/{at}/{slot}"] for slot in adapter.kept()})
            for path, at, adapter in _each(stacks)
        ]
    )


def fill(model: nn.Module, stacks: Stacks, bundle: Bundle) -> None:
    """Copy in a bundle's tensors, for layers that these adapters have. Raises `FileError` if one does not fit."""
    values = {path: _values(model, stacks.get(path), path, entries) for path, entries in bundle.entries.items()}
    put([pair for path, stack in values.items() for pair in zip(stacks[path], stack, strict=True)])


def _values(
    model: nn.Module, stack: tuple[Adapter, ...] | None, path: str, entries: tuple[Entry, ...]
) -> list[dict[str, Tensor]]:
    if stack is None or len(stack) != len(entries):
        raise FileError(f"{path} has no adapters to take these tensors")
    place = site(model, path)
    return [fitted(adapter, entry, place) for adapter, entry in zip(stack, entries, strict=True)]


def _each(stacks: Stacks) -> Iterator[tuple[str, int, Adapter]]:
    return ((path, at, adapter) for path, stack in stacks.items() for at, adapter in enumerate(stack))
