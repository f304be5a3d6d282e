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
        """Return whether this layer's weight is stored this way.

        `STORAGES` is searched in order, so a row may rely on those before it having said no.
        """

    @abstractmethod
    def label(self, layer: Any) -> str:
        """What the weight is stored as, in the words of the library that made it."""

    @abstractmethod
    def decode(self, layer: Any, weight: Any) -> Tensor:
        """Return the dense weight (O, I, *K) that the layer multiplies with.

        Call it only where `why_unreadable` is empty.

        Args:
            layer: the layer, which may hold scales beside the weight. It is not changed.
            weight: the parameter to decode: the layer's own, or one that `encode` made.
        """

    @abstractmethod
    def encode(self, layer: Any, dense: Tensor, generator: torch.Generator | None) -> nn.Parameter:
        """A new parameter for the layer that stores `dense`, which is float32 or float64; rounded once.

        A generator asks for stochastic rounding. The layer is not changed.
        """

    def why_unreadable(self, layer: Any) -> str:
        """Return why `decode` is not possible, with what to do; empty when it is.

        The default is empty. Errors and the table of `Capabilities` quote it.
        """
        return ""

    def why_unwritable(self, layer: Any) -> str:
        """Return why `encode` is not possible, with what to do; empty when it is.

        The default is empty. A merge needs `why_unreadable` to be empty as well.
        """
        return ""

    def stochastic(self, layer: Any) -> bool:
        """Return whether `encode` can round stochastically.

        Where it cannot, it ignores the generator and rounds to nearest.
        """
        return False

    def passes_gradient(self, layer: Any) -> bool:
        """Return whether backward reaches what lies before the layer.

        Where it does not, the decoded weight may give the derivative instead; see `stands_in`.
        """
        return True

    def install(self, layer: Any, weight: nn.Parameter) -> None:
        """Make a parameter from `encode`, or the layer's own earlier one, the layer's weight.

        Override it where the layer keeps codes or scales in other places, too.
        """
        layer.weight = weight


def loaded_class(module: str, name: str) -> Any:
    """Return a class of another library if that library is in use, else one that nothing is an instance of.

    Nothing is imported: a library that is not in `sys.modules` cannot have made a layer.

    Args:
        module: the dotted name of the module that has the class.
    """
    return getattr(sys.modules.get(module), name, _Nothing)


class _Nothing:
    """No object has this class."""
