"""How an algorithm's tensors are stored in a file, and recognized there."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, ClassVar

from torch import Tensor

from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.slots import Params
from lycoris.layers.geometry import Geometry

TensorShapes = Mapping[str, tuple[int, ...]]
"""Shapes of a layer's tensors in a file, by tensor name."""


class FileHooks:
    """Names, alpha and shapes of an algorithm's tensors in a file.

    The defaults store every slot as it is, without an alpha.
    """

    tensor_names: ClassVar[Mapping[str, str]]
    """Slot name → tensor name in adapter files, as LyCORIS, kohya and ComfyUI spell it."""
    stored_settings: ClassVar[tuple[str, ...]] = ()
    """Names among `tensor_names` that hold a setting and are no slots."""
    rank_tensors: ClassVar[tuple[str, ...]] = ()
    """Slots whose first axis in a file is the rank that alpha is divided by; the first one present tells it."""

    if TYPE_CHECKING:

        def scale(self, g: Geometry) -> float: ...

    def constants(self, g: Geometry) -> tuple[float, ...]:
        """Return the settings that enter the formula for a layer, as numbers.

        Under equal constants, tensors of equal names and shapes do the same. Override where it is more than the scale.
        """
        return (self.scale(g),)

    @classmethod
    def claims(cls, shapes: TensorShapes) -> bool:
        """Tell whether tensors under this algorithm's names are really its own, by their shapes.

        Override where another algorithm uses the same names.
        """
        return True

    @classmethod
    def uses_alpha(cls, p: Params) -> bool:
        """Tell whether the alpha stored with these tensors changes the result.

        Where it does not, an infinite alpha is accepted as well. The default is True.

        Args:
            p: tensors by slot name.
        """
        return True

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        """Return (O, I·ΠK) of the layer that tensors in a file belong to, from their shapes alone; 0 for unknown.

        Detection compares it with the layers of known models. The default knows neither.
        """
        return 0, 0

    def export_tensors(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        """Return the tensors that go into a file, by slot name; trained scalars are multiplied into a factor.

        Tensors that do not change are not copied.
        """
        return dict(p)

    def export_alpha(self, g: Geometry) -> float | None:
        """Return the alpha to store, so that a reader that divides it by the rank gets `scale`.

        None, the default: store none. Under rsLoRA it is another number than the setting `alpha`.
        """
        return None

    def fill_missing(self, p: Params, below: LayerBelow) -> dict[str, Tensor]:
        """Return a file's tensors together with those that it may leave out because the base weight determines them.

        Raises:
            FileError: something is missing that the base weight does not determine.
        """
        return dict(p)


def axis_size(shapes: TensorShapes, name: str, axis: int) -> int:
    """Return the size of one axis of a tensor in a file; 0 if the tensor or the axis is not there.

    Args:
        name: the tensor's name in files.
        axis: counted from 0.
    """
    shape = shapes.get(name, ())
    return shape[axis] if len(shape) > axis else 0


def column_count(shapes: TensorShapes, name: str) -> int:
    """Return the product of all sizes but the first of a tensor in a file; 0 if it has no second axis.

    For a factor (r, I, *K) that is I·ΠK.
    """
    return math.prod(shapes[name][1:]) if len(shapes.get(name, ())) > 1 else 0
