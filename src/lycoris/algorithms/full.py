"""Full: dense changes of the weight and the bias."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.call import Call
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.row_selection import RowBlock, joined_rows
from lycoris.algorithms.serialization import TensorShapes, axis_size, column_count
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange


@dataclass(frozen=True, kw_only=True)
class Full(Additive):
    """A dense change of the weight and the bias: everything that full fine-tuning can learn.

        V = W + diff, b' = b + diff_b

    Tensors: `diff`, in the shape of the layer's parameter, and `diff_b` (O). Both start at zero. There is no scale.
    """

    weight: bool = True
    """Train the weight."""
    bias: bool = True
    """Train the bias too, on layers that have one."""

    name: ClassVar[str] = "full"
    tensor_names: ClassVar = {"diff": "diff", "diff_b": "diff_b"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.weight or self.bias):
            raise ConfigError("full without weight and bias trains nothing: set one of them to True")
        if self.dropout and not self.weight:
            raise ConfigError("dropout is for the input of the weight's change; full with weight=False has none")

    @property
    def changes_bias(self) -> bool:
        return self.bias

    def slots(self, g: Geometry) -> dict[str, Slot]:
        weight = {"diff": Slot(g.stored_shape, "delta")} if self.weight else {}
        bias = {"diff_b": Slot((g.out_features,), "delta")} if self.bias and g.has_bias else {}
        if not weight and not bias:
            raise ConfigError(f"full with weight=False trains biases, and this {g.kind} has none; leave it out")
        return weight | bias

    def initialize(self, p: Params, below: LayerBelow) -> None:
        for tensor in p.values():
            torch.nn.init.zeros_(tensor)

    def delta(self, p: Params, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        weight = g.transpose_stored(p["diff"]) if "diff" in p else p["diff_b"].new_zeros(g.shape)
        return Affine(weight, self.delta_bias(p))

    def delta_bias(self, p: Params) -> Tensor | None:
        return p.get("diff_b")

    def row_block_size(self, g: Geometry) -> int:
        return 1

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        return {name: run.of(tensor, self._axis(name, g)) for name, tensor in p.items()}

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        slots = {name for part in parts for name in part.entry.tensors}
        having = {name: [part for part in parts if name in part.entry.tensors] for name in sorted(slots)}
        joined = {name: joined_rows(some, g, name, cls._axis(name, g)) for name, some in having.items()}
        return cls(weight="diff" in slots, bias="diff_b" in slots), joined

    @staticmethod
    def _axis(slot: str, g: Geometry) -> int:
        """Where the rows of a tensor are."""
        return 1 if slot == "diff" and g.transposed else 0

    def product_macs(self, g: Geometry) -> int | None:
        return None if self.weight else 0

    def add_product(self, y: Tensor, p: Params, g: Geometry, x: Tensor, gain: Tensor | float, call: Call) -> Tensor:
        # Reached only without a weight: the bias is added to whatever way there is.
        return y

    def max_rank(self, g: Geometry) -> int:
        return min(g.out_features, g.fan_in) if self.weight else 0

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        if self.weight:
            return super().cost(g, tokens, alone=alone)
        return Cost("added", "a bias is added to the output", 0, g.out_features, needs_input=False)

    @classmethod
    def uses_alpha(cls, p: Params) -> bool:
        return False

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        if cls.tensor_names["diff"] in shapes:
            return axis_size(shapes, cls.tensor_names["diff"], 0), column_count(shapes, cls.tensor_names["diff"])
        return axis_size(shapes, cls.tensor_names["diff_b"], 0), 0

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(weight="diff" in p, bias="diff_b" in p)
