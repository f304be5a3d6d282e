"""The tensors that an algorithm keeps for one layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, NamedTuple

from torch import Tensor

Params = Mapping[str, Tensor]
"""An adapter's tensors by slot name."""

Role = Literal["in", "out", "core", "scale", "magnitude", "delta", "rotation", "frozen"]


class Slot(NamedTuple):
    """Shape and role of a tensor that an algorithm keeps per layer.

    Trainers group parameters by `role`, and LoRA+ gives "in" and "out" separate learning rates:

    - "in", "out": the factors on the input and the output side. The first axis of every "in" tensor is the rank.
    - "core": a factor between them, such as a Tucker core.
    - "scale": multiplies other tensors or channels.
    - "magnitude": a norm. Kept in float32 or wider, because rounding it would change the layer by itself.
    - "delta": a change that is stored densely.
    - "rotation": generates orthogonal matrices.
    - "frozen": saved with the adapter and not trained.
    """

    shape: tuple[int, ...]
    role: Role

    @property
    def trainable(self) -> bool:
        """Whether an optimizer gets this tensor.

        Frozen ones are saved with the adapter all the same.
        """
        return self.role != "frozen"
