"""What a bundle's tensors become on a model's adapters: completed from the base weight, and checked against them; and
what adapters hold, as a state that is saved and loaded."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lycoris import attach, bases, merging, sharding
from lycoris.adapter import Adapter
from lycoris.algorithm import Algorithm
from lycoris.bundle import Bundle, Entry
from lycoris.errors import FileError
from lycoris.geometry import Site, site


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
    return agreeing(adapter, entry.algorithm, completed(entry, place), place.path)


def agreeing(adapter: Adapter, algorithm: Algorithm, whole: Mapping[str, Tensor], path: str) -> dict[str, Tensor]:
    """Tensors of a file, completed, for an adapter that is there already, if they mean the same on it."""
    tensors, own = dict(whole), adapter.tensors()
    if "gate" in own:
        tensors["gate"] = torch.ones(own["gate"].shape)
    same = {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in own.items()}
    # The scale, not alpha: a LoKr of whole factors ignores it. Other programs round alpha to bfloat16.
    scales = [each.scale(adapter.geometry) for each in (adapter.algorithm, algorithm)]
    if not same or not math.isclose(*scales, rel_tol=4e-3):
        raise FileError(f"{path}: the file has {algorithm}, the adapter is {adapter.algorithm}")
    return tensors


Stacks = Mapping[str, tuple[Adapter, ...]]
"""Adapters by layer path, lowest first."""


def state(stacks: Stacks) -> dict[str, Tensor]:
    """Every tensor under `path/index/slot`, detached and whole."""
    return {
        f"{path}/{at}/{slot}": tensor for path, at, adapter in _each(stacks) for slot, tensor in adapter.whole().items()
    }


@torch.no_grad()
def load_state(stacks: Stacks, values: Mapping[str, Tensor]) -> None:
    """Copy in what `state` gave. Raises `FileError` unless names and shapes are the same."""
    own = {f"{path}/{at}/{slot}": t for path, at, adapter in _each(stacks) for slot, t in adapter.kept().items()}
    wrong = [key for key in own.keys() & values.keys() if own[key].shape != values[key].shape]
    off = sorted(own.keys() ^ values.keys()) + sorted(wrong)
    if off:
        raise FileError(f"the saved state does not fit these adapters: {', '.join(off[:5])} ({len(off)} in all)")
    for key, tensor in own.items():
        sharding.assign(tensor, values[key])


@torch.no_grad()
def fill(model: nn.Module, stacks: Stacks, bundle: Bundle) -> None:
    """Copy in a bundle's tensors, for layers that these adapters have. Raises `FileError` if one does not fit."""
    values = {path: _values(model, stacks.get(path), path, entries) for path, entries in bundle.entries.items()}
    for path, stack in values.items():
        for adapter, tensors in zip(stacks[path], stack, strict=True):
            adapter.fill(tensors)


def _values(
    model: nn.Module, stack: tuple[Adapter, ...] | None, path: str, entries: tuple[Entry, ...]
) -> list[dict[str, Tensor]]:
    if stack is None or len(stack) != len(entries):
        raise FileError(f"{path} has no adapters to take these tensors")
    place = site(model, path)
    return [fitted(adapter, entry, place) for adapter, entry in zip(stack, entries, strict=True)]


def _each(stacks: Stacks) -> Iterator[tuple[str, int, Adapter]]:
    return ((path, at, adapter) for path, stack in stacks.items() for at, adapter in enumerate(stack))


def blocks_of(paths: Iterable[str]) -> Iterator[str]:
    """Every module that holds one of these layers, the layers themselves among them, as dotted paths."""
    for path in paths:
        steps = path.split(".")
        yield from (".".join(steps[: at + 1]) for at in range(len(steps)))
