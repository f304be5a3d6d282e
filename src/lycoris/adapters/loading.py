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

from lycoris.adapters import attach, merging
from lycoris.adapters.adapter import Adapter, SharedTensors
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms import rows, slices
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.slices import Slice
from lycoris.errors import AttachError, FileError, nearest
from lycoris.layers import base_weights, paths
from lycoris.layers.sites import ModelSites, Site
from lycoris.ops.equality import same
from lycoris.targeting.planning import Plan


def tensor_options(place: Site) -> dict[str, Any]:
    """Return device and dtype of new adapter tensors for a site, as keyword arguments of `torch.empty`.

    The device is that of the site's weight. The dtype is float64 for float64 weights, else float32, low-bit ones
    included.
    """
    return base_weights.home(base_weights.holder(place.module, place.attribute))


def warn_of_rounding(dtype: torch.dtype | None, stacklevel: int) -> None:
    """Warn of what parameters of half precision do to small updates; any other dtype, or None, is fine.

    Args:
        stacklevel: As for `warnings.warn`: 1 is who calls this.
    """
    if dtype in (torch.bfloat16, torch.float16):
        warnings.warn(
            f"adapter parameters in {dtype}: an update far below a parameter's own size rounds away. Leave dtype out "
            "for float32, or pass stochastic_rounding=True if your optimizer rounds stochastically",
            stacklevel=stacklevel + 1,
        )


def complete_tensors(entry: Entry, place: Site) -> dict[str, Tensor]:
    """Return an entry's tensors with those that the file leaves out because they follow from the base weight.

    Such are the frozen starting factors of a T-LoRA in files of other programs.

    Raises:
        FileError: Some are left out and adapters are merged into the weight, or they do not follow from it.
    """
    tensors = entry.algorithm.fill_missing(entry.tensors, attach.bottom(place))
    if len(tensors) > len(entry.tensors) and merging.is_merged(place.module, place.attribute):
        raise FileError(
            f"{place.path}: the file leaves out tensors that follow from the base weight, and adapters are merged into "
            "it; undo the merge, load, and merge again"
        )
    return tensors


def fit_tensors(adapter: Adapter, entry: Entry, place: Site) -> dict[str, Tensor]:
    """Return an entry's tensors for an adapter that is there already, by slot name.

    Raises:
        FileError: They mean something else on this adapter: other shapes, another algorithm or scale.
    """
    if not isinstance(adapter.algorithm, Slice):
        entry = rows.separate_slice(entry, place.path).entry
    # Of what makes a start, a file does not tell all.
    alike = type(entry.algorithm) is type(adapter.algorithm)
    own = entry._replace(algorithm=adapter.algorithm) if alike else entry
    return match_tensors(adapter, entry.algorithm, complete_tensors(own, place), place.path)


def match_tensors(adapter: Adapter, algorithm: Algorithm, given: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of an algorithm for an adapter, with the scalar that a file folds into a factor.

    Raises `FileError` unless they do on the adapter what the algorithm does with them.
    """
    own, tensors = {name: tuple(t.shape) for name, t in adapter.tensors().items()}, dict(given)
    if "scalar" in own:
        tensors.setdefault("scalar", torch.ones(own["scalar"]))
    shapes = {name: tuple(t.shape) for name, t in tensors.items()}
    # The scale, not alpha: a LoKr of whole factors ignores it. Other programs round alpha to bfloat16.
    constants = [each.constants(adapter.geometry) for each in (algorithm, adapter.algorithm)]
    same = len(constants[0]) == len(constants[1]) and all(
        math.isclose(*pair, rel_tol=4e-3) for pair in zip(*constants, strict=True)
    )
    if shapes == own and same:
        return tensors
    odd = next((name for name in sorted(shapes.keys() | own.keys()) if shapes.get(name) != own.get(name)), None)
    hint = f"; {odd} {shapes.get(odd, 'none')} in the file and {own.get(odd, 'none')} here" if odd else ""
    raise FileError(f"{where}: the file has {algorithm}, the adapter is {adapter.algorithm}{hint}")


Stacks = Mapping[str, tuple[Adapter, ...]]
"""Adapters by layer path, lowest first."""


def in_model_order(model: nn.Module, stacks: Stacks) -> dict[str, tuple[Adapter, ...]]:
    """Return the same stacks, sorted by where their layers are in the model.

    Optimizers tell parameters apart by position. Layers that are not in the model come last, in the order given.
    """
    position = paths.model_order(model)
    return dict(sorted(stacks.items(), key=lambda item: position.get(item[0], len(position))))


def build_adapters(sites: ModelSites, plan: Plan, dtype: torch.dtype | None) -> dict[str, tuple[Adapter, ...]]:
    """Build new adapters for a plan, initialized; the model stays as it is.

    They start on top of the adapters that a layer has already. Random numbers are torch's global ones.

    Args:
        dtype: Of the parameters. None: float64 on float64 layers, else float32.
    """
    stacks = {}
    for placement in plan.placements:
        place = sites[placement.path]
        own = tensor_options(place) if dtype is None else tensor_options(place) | {"dtype": dtype}
        stack = [Adapter(algorithm, placement.geometry, **own) for algorithm in placement.algorithms]
        below = attach.top(place)
        for adapter in stack:
            adapter.attribute = place.attribute
            adapter.initialize(below)
        stacks[placement.path] = tuple(stack)
    return stacks


def load_adapters(sites: ModelSites, bundle: Bundle) -> dict[str, tuple[Adapter, ...]]:
    """Build adapters with a bundle's tensors, which slices of one adapter share where their layers are alike.

    The tensors are copied, to the device of each layer and in float32 or float64 as `tensor_options` says.

    Raises:
        FileError: The model lacks a layer of the bundle, or has it in another shape or of another kind.
    """
    places, first = _find_sites(sites, bundle), dict[Any, Adapter]()
    return {
        path: tuple(_make_adapter(entry, places[path], first) for entry in stack)
        for path, stack in bundle.entries.items()
    }


def _find_sites(sites: ModelSites, bundle: Bundle) -> dict[str, Site]:
    """Where the layers of a bundle are in a model."""
    found = {}
    for path in bundle.entries:
        with suppress(KeyError):
            found[path] = sites.find(path)
    if lost := [path for path in bundle.entries if path not in found]:
        near = (f"{path} is like {close[0]}" for path in lost if (close := nearest(path, sites, limit=1)))
        hint = next(near, "is this the model they were made for?")
        if any(f"{path}.base_layer" in sites for path in lost):
            hint = "PEFT's layers are in their place: take them off first, as with pipe.unload_lora_weights()"
        raise FileError(
            f"{len(lost)} of {len(bundle.entries)} layers are no layers of this {type(sites.model).__name__}: "
            f"{', '.join(lost[:5])}; {hint}"
        )
    return found


def _make_adapter(entry: Entry, place: Site, first: dict[Any, Adapter]) -> Adapter:
    """`first` has the first one of all that share their tensors."""
    g, here = entry.geometry, place.geometry
    if (g.kind, g.stack, g.shape, g.transposed) != (here.kind, here.stack, here.shape, here.transposed):
        raise FileError(f"{place.path}: the file has {entry.algorithm} for a {g}, and this is a {here}")
    own = tensor_options(place)
    whole = slices.fused_entry(entry)
    # Layers on other devices, or in another precision, cannot have the same tensors.
    key = (whole.algorithm, whole.geometry, tuple(map(id, whole.tensors.values())), *own.values())
    if isinstance(entry.algorithm, Slice) and key in first:
        adapter = Adapter.sharing(first[key], entry.algorithm, here)
    else:
        adapter = first[key] = Adapter(entry.algorithm, here, **own)
        adapter.fill(fit_tensors(adapter, entry, place))
    adapter.attribute = place.attribute
    return adapter


def entries(stacks: Stacks) -> dict[str, tuple[Entry, ...]]:
    """Return adapters as values with whole tensors; those that share their tensors do so here as well.

    Collective on a sharded model; elsewhere the tensors share memory with the adapters.

    Raises:
        AttachError: See `check_sharing` and `Adapter.whole`.
    """
    check_sharing(stacks)
    found: dict[Any, dict[str, Tensor]] = {}

    def whole(adapter: Adapter) -> dict[str, Tensor]:
        key = adapter if adapter.group is None else adapter.group
        if key not in found:
            found[key] = adapter.whole()
        return found[key]

    return {
        path: tuple(Entry(each.algorithm, each.geometry, whole(each)) for each in stack)
        for path, stack in stacks.items()
    }


def each_once(stacks: Stacks) -> Iterator[tuple[str, int, Adapter]]:
    """Iterate over (path, index in the stack, adapter), in the order of the stacks.

    Of adapters that share their tensors only the first is given.
    """
    seen: set[SharedTensors] = set()
    for path, at, adapter in _each_adapter(stacks):
        if adapter.group is None or adapter.group not in seen:
            yield path, at, adapter
        if adapter.group is not None:
            seen.add(adapter.group)


def check_sharing(stacks: Stacks) -> None:
    """Raise `AttachError` where adapters of a group have parameters of their own by now.

    One of them stands for all in states and files, so that the values of the others would be lost.
    """
    first: dict[SharedTensors, tuple[str, Adapter]] = {}
    for path, _, adapter in _each_adapter(stacks):
        if adapter.group is None:
            continue
        where, other = first.setdefault(adapter.group, (path, adapter))
        apart = [name for name, tensor in adapter._parameters.items() if tensor is not other._parameters[name]]
        if apart:
            raise AttachError(
                f"{where} and {path} are slices of one adapter and no longer share its {', '.join(apart)}: something "
                "gave one of them another parameter (to_empty() does so). Load the adapters again after that"
            )


def state(stacks: Stacks) -> dict[str, Tensor]:
    """Return every tensor under `path/index/slot`, detached and whole.

    Collective on a sharded model; elsewhere the tensors share memory with the adapters. Those that slices of one
    adapter share are given once, under the first.
    """
    check_sharing(stacks)
    return {
        f"{path}/{at}/{slot}": tensor
        for path, at, adapter in each_once(stacks)
        for slot, tensor in adapter.whole().items()
    }


def put(values: Sequence[tuple[Adapter, Mapping[str, Tensor]]]) -> None:
    """Copy tensors into adapters, each by slot name.

    Raises:
        AttachError: One of the adapters is merged, and nothing was copied; or see `Adapter.fill`.
    """
    if any(adapter.merged for adapter, _ in values):
        raise AttachError(
            "the adapters are merged, and the weights would keep what was merged: undo the merge (a network's or "
            "module's restore() or onfly_restore(), a set's unmerge()), load, and merge again"
        )
    for adapter, tensors in values:
        adapter.fill(tensors)


def load_state(stacks: Stacks, values: Mapping[str, Tensor]) -> None:
    """Copy in what `state` gave. Collective on a sharded model, where the first process's values count.

    Raises:
        FileError: A name is missing or too many, or a shape differs. Nothing was copied.
        AttachError: One of the adapters is merged.
    """
    check_sharing(stacks)
    own = {
        f"{path}/{at}/{slot}": t
        for path, at, adapter in each_once(stacks)
        for slot, t in adapter.trained_tensors().items()
    }
    wrong = [key for key in own.keys() & values.keys() if own[key].shape != values[key].shape]
    off = sorted(own.keys() ^ values.keys()) + sorted(wrong)
    if off:
        raise FileError(f"the saved state does not fit these adapters: {', '.join(off[:5])} ({len(off)} in all)")
    put(
        [
            (adapter, {slot: values[f"{path}/{at}/{slot}"] for slot in adapter.trained_tensors()})
            for path, at, adapter in each_once(stacks)
        ]
    )


def fill(sites: Mapping[str, Site], stacks: Stacks, bundle: Bundle) -> None:
    """Copy in a bundle's tensors, for layers that these adapters have; adapters of other layers stay as they are.

    Raises:
        FileError: A layer of the bundle has no adapters here, or others than in the bundle; or tensors that adapters
            share here differ in the bundle. Nothing was copied.
        AttachError: One of the adapters is merged.
    """
    values = {path: _values(sites, stacks.get(path), path, entries) for path, entries in bundle.entries.items()}
    pairs = [(path, *pair) for path, stack in values.items() for pair in zip(stacks[path], stack, strict=True)]
    first: dict[SharedTensors, tuple[str, Mapping[str, Tensor]]] = {}
    for path, adapter, tensors in pairs:
        if adapter.group is not None:
            where, others = first.setdefault(adapter.group, (path, tensors))
            if not same(tensors, others):
                raise FileError(f"{where} and {path} share their tensors here, and those for them are not the same")
    put([(adapter, tensors) for _, adapter, tensors in pairs])


def _values(
    sites: Mapping[str, Site], stack: tuple[Adapter, ...] | None, path: str, entries: tuple[Entry, ...]
) -> list[dict[str, Tensor]]:
    if stack is None or len(stack) != len(entries):
        raise FileError(f"{path} has no adapters to take these tensors")
    return [fit_tensors(adapter, entry, sites[path]) for adapter, entry in zip(stack, entries, strict=True)]


def _each_adapter(stacks: Stacks) -> Iterator[tuple[str, int, Adapter]]:
    return ((path, at, adapter) for path, stack in stacks.items() for at, adapter in enumerate(stack))
