"""What a bundle's tensors become on a model's adapters: completed from the base weight, and checked against them."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor

from lycoris import attach, bases, merging
from lycoris.adapter import Adapter
from lycoris.bundle import Entry
from lycoris.errors import FileError
from lycoris.geometry import Site


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
    tensors, own = completed(entry, place), adapter.tensors()
    if "gate" in own:
        tensors["gate"] = torch.ones(own["gate"].shape)
    same = {name: t.shape for name, t in tensors.items()} == {name: t.shape for name, t in own.items()}
    # The scale, not alpha: a LoKr of whole factors ignores it. Other programs round alpha to bfloat16.
    scales = [algorithm.scale(adapter.geometry) for algorithm in (adapter.algorithm, entry.algorithm)]
    if not same or not math.isclose(*scales, rel_tol=4e-3):
        raise FileError(f"{place.path}: the file has {entry.algorithm}, the adapter is {adapter.algorithm}")
    return tensors
