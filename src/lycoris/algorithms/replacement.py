"""Replace: a weight and a bias that take the place of the layer's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.base import Algorithm, run_adapted
from lycoris.algorithms.call import Call
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.row_selection import RowBlock, covers, joined_rows
from lycoris.algorithms.serialization import TensorShapes, axis_size, column_count
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine, Geometry, Kind
from lycoris.ops.blocks import RowRange


@dataclass(frozen=True, kw_only=True)
class Replace(Algorithm):
    """Replaces the weight and the bias of a layer.

        V = w, b' = b

    Tensors: `w`, in the shape of the layer's parameter, and `b` (O). They start as the layer's own. Few-step and
    control adapters store norms this way. Strength is W + μ(w - W), as everywhere; most programs that know such tensors
    put w in place at any strength but 0. Forward runs the layer once, with the new weight and bias.
    """

    weight: bool = True
    """Replace the weight."""
    bias: bool = True
    """Replace the bias too, on layers that have one."""

    name: ClassVar[str] = "replace"
    tensor_names: ClassVar = {"w": "set_weight", "b": "bias.set_weight"}
    kinds: ClassVar[tuple[Kind, ...]] = ("linear", "conv", "embedding", "parameter", "norm")

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (self.weight or self.bias):
            raise ConfigError("replace without weight and bias replaces nothing: set one of them to True")

    @property
    def changes_bias(self) -> bool:
        return self.bias

    def slots(self, g: Geometry) -> dict[str, Slot]:
        weight = {"w": Slot(g.stored_shape, "delta")} if self.weight else {}
        bias = {"b": Slot((g.out_features,), "delta")} if self.bias and g.has_bias else {}
        if not weight and not bias:
            raise ConfigError(f"replace with weight=False replaces biases, and this {g.kind} has none; leave it out")
        return weight | bias

    def initialize(self, p: Params, below: LayerBelow) -> None:
        base = below.affine()
        if "w" in p:
            p["w"].copy_(below.geometry.transpose_stored(base.weight))
        if "b" in p:
            p["b"].zero_()
            if base.bias is not None:
                p["b"].copy_(base.bias)

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        weight = g.transpose_stored(p["w"]).to(base.weight.dtype) if "w" in p else base.weight
        return Affine(weight, p["b"].to(base.weight.dtype) if "b" in p else base.bias)

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        return run_adapted(self, p, below, x, call)

    def row_block_size(self, g: Geometry) -> int:
        return 1

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        return {name: run.of(tensor, self._axis(name, g)) for name, tensor in p.items()}

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        # Of rows without a part only the base weight tells what they are.
        slots = {frozenset(part.entry.tensors) for part in parts}
        if len(slots) > 1 or not covers(parts, g):
            return None
        names = sorted(slots.pop())
        joined = {name: joined_rows(parts, g, name, cls._axis(name, g)) for name in names}
        return cls(weight="w" in joined, bias="b" in joined), joined

    @staticmethod
    def _axis(slot: str, g: Geometry) -> int:
        """Where the rows of a tensor are."""
        return 1 if slot == "w" and g.transposed else 0

    def max_rank(self, g: Geometry) -> int | None:
        if g.kind == "norm":
            return None
        return min(g.out_features, g.fan_in) if self.weight else 0

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        why = "the layer runs once, with the stored weight and bias"
        return Cost("dense", why, g.size / tokens, g.size + g.size / tokens, needs_input=self.weight)

    @classmethod
    def uses_alpha(cls, p: Params) -> bool:
        return False

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        if cls.tensor_names["w"] in shapes:
            return axis_size(shapes, cls.tensor_names["w"], 0), column_count(shapes, cls.tensor_names["w"])
        return axis_size(shapes, cls.tensor_names["b"], 0), 0

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(weight="w" in p, bias="b" in p)
