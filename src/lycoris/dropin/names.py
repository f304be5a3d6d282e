"""An adapter's tensors by the names that scripts know."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from lycoris.adapter import Adapter
from lycoris.algorithm import Algorithm
from lycoris.algorithms import DoRA, Full


def file_names(algorithm: Algorithm) -> dict[str, str]:
    """Slot → name as in files, for what a file has no name for too."""
    inner = algorithm.over if isinstance(algorithm, DoRA) else algorithm
    return {**inner.keys, **DoRA.keys, "gate": "scalar"}


def by_old_name(adapter: Adapter, name: str) -> Any:
    """A tensor by its name in files; None for other names. Of `lora_up.weight` the first part is asked for."""
    inner = adapter.algorithm.over if isinstance(adapter.algorithm, DoRA) else adapter.algorithm
    if name == "alpha":
        alpha = inner.stored_alpha(adapter.geometry)
        return None if alpha is None else torch.tensor(alpha)
    tensors = adapter.tensors()
    if name == "scalar":
        return tensors.get("gate", torch.tensor(1.0))
    for slot, key in file_names(adapter.algorithm).items():
        if slot in tensors and key == name:
            return tensors[slot]
        if slot in tensors and key == f"{name}.weight":
            return SimpleNamespace(weight=tensors[slot])
    if isinstance(inner, Full) and name in ("weight", "bias"):
        return tensors.get("diff" if name == "weight" else "diff_b")
    settings = {"dropout", "rank_dropout", "module_dropout", "rs_lora", "tucker", "block_size", "constraint"}
    return getattr(inner, name, None) if name in settings else None
