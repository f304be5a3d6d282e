"""The layer that an adapter acts on, as an algorithm sees it."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from lycoris.errors import AttachError
from lycoris.layers.geometry import Affine, Geometry


class LayerBelow(Protocol):
    """A layer, or a layer that already has adapters on it.

    What `forward` and `initialize` of an algorithm get to see of it.
    """

    @property
    def geometry(self) -> Geometry:
        """Shapes and operation of the layer."""

    def __call__(self, x: Tensor) -> Tensor:
        """Run the layer, with the adapters that are already on it."""

    def affine(self) -> Affine:
        """Return the dense weight (O, I, *K) and bias, as a merge would leave them.

        A quantized weight is decoded for it, in every call.

        Raises:
            AttachError: the weight cannot be read, or is sharded.
        """

    def bias(self) -> Tensor | None:
        """Return the bias alone, without decoding the weight where that is possible.

        None where the layer has none.
        """

    def plain(self, x: Tensor) -> Affine | None:
        """Return weight and bias if calling the layer is exactly `geometry.op(x, weight, bias)` in x's precision.

        None if the layer does anything else, such as decode a quantized weight: then run it by calling it.
        """

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        """Run the layer's operation with another weight and bias.

        The adapters already on the layer are not applied: `affine` is to have their change in it.
        """


class BareWeight:
    """A weight without a layer, as a `LayerBelow`: for parameters that their module uses directly.

    It has no output: calling it, or `run`, raises `AttachError`.
    """

    def __init__(self, geometry: Geometry, weight: Tensor) -> None:
        self.geometry, self.weight = geometry, weight

    def affine(self) -> Affine:
        return Affine(self.weight, None)

    def bias(self) -> Tensor | None:
        return None

    def plain(self, x: Tensor) -> Affine | None:
        return None

    def __call__(self, x: Tensor) -> Tensor:
        raise AttachError("a parameter has no output of its own; its module uses it")

    def run(self, x: Tensor, affine: Affine) -> Tensor:
        return self(x)
