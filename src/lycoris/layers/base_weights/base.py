"""The contract of a row in the table of base weights: how one kind of layer stores its weight."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn


class Storage(ABC):
    """One way of storing a weight. Rows are found by type, and a library that is not loaded cannot have made a layer.

    `layer` is Any throughout: the attributes that are read are those of the library's own class.
    """

    low_bit: ClassVar[bool] = True
    """Whether writing a weight loses more than a 16-bit format would; a merge then has to be asked for."""

    plain: ClassVar[bool] = False
    """Whether the weight is a tensor with nothing beside it, so that moving and casting it is all there is to do."""

    @abstractmethod
    def holds(self, layer: Any) -> bool:
        """Whether this layer's weight is stored this way."""

    @abstractmethod
    def label(self, layer: Any) -> str:
        """What the weight is stored as, in the words of the library that made it."""

    @abstractmethod
    def decode(self, layer: Any, weight: Any) -> Tensor:
        """The dense weight (O, I, *K) that the layer multiplies with, from its own parameter or from one like it."""

    @abstractmethod
    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        """A new parameter for the layer that stores `dense`, which is float32 or float64; rounded once.

        A generator asks for stochastic rounding. The layer is not changed.
        """

    def why_unreadable(self, layer: Any) -> str:
        """Why `decode` is not possible, with what to do; empty when it is."""
        return ""

    def why_unwritable(self, layer: Any) -> str:
        """Why `encode` is not possible, with what to do; empty when it is."""
        return ""

    def stochastic(self, layer: Any) -> bool:
        """Whether `encode` can round stochastically."""
        return False

    def passes_gradient(self, layer: Any) -> bool:
        """Whether backward reaches what lies before the layer."""
        return True

    def install(self, layer: Any, weight: nn.Parameter) -> None:
        """Make a parameter from `encode`, or the layer's own earlier one, the layer's weight."""
        layer.weight = weight


def loaded_class(module: str, name: str) -> Any:
    """A class of another library if that library is in use, else one that nothing is an instance of."""
    return getattr(sys.modules.get(module), name, _Nothing)


class _Nothing:
    """No object has this class."""
