"""What autograd holds for backward once a forward pass is over."""

from __future__ import annotations

import weakref

import torch
from torch import Tensor


class Kept:
    """The storages that are held for backward, those of `own` tensors aside.

    Only what is still held when it is asked for: a function may make and drop a graph inside its forward.
    """

    def __init__(self, *own: Tensor) -> None:
        self.own = {_place(t) for t in own}
        self._held: list[weakref.ref[_Held]] = []

    def during(self) -> torch.autograd.graph.saved_tensors_hooks:
        """A context for the forward pass."""
        return torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)

    def tensors(self) -> list[Tensor]:
        """One for each storage."""
        alive = [held.tensor for ref in self._held if (held := ref()) is not None]
        return list({_place(t): t for t in alive if _place(t) not in self.own}.values())

    def sizes(self) -> list[int]:
        """Numbers in each storage, the largest first."""
        return sorted((t.untyped_storage().nbytes() // t.element_size() for t in self.tensors()), reverse=True)

    def holds(self, tensor: Tensor) -> bool:
        """Whether this one is held, `own` or not."""
        return any(held is not None and _place(held.tensor) == _place(tensor) for held in (ref() for ref in self._held))

    def _pack(self, t: Tensor) -> _Held:
        held = _Held(t)
        self._held.append(weakref.ref(held))
        return held


class _Held:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def _place(t: Tensor) -> int:
    return t.untyped_storage().data_ptr()
