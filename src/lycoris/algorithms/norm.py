"""Norm: changes of the scale and shift of a normalization layer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.row_selection import RowBlock, joined_rows
from lycoris.algorithms.serialization import TensorShapes, axis_size
from lycoris.algorithms.slots import Params, Slot
from lycoris.layers.geometry import Affine, Geometry, Kind
from lycoris.ops.blocks import RowRange


@dataclass(frozen=True, kw_only=True)
class Norm(Algorithm):
    """Changes the scale and the shift of a norm: LayerNorm, GroupNorm, RMSNorm, and those of model libraries.

        V = W + w, b' = b + b

    Tensors: `w` and, where the norm has a bias, `b`, in the shapes of the norm's parameters. Both start at zero.
    Forward runs the layer once, with the new scale and shift.
    """

    name: ClassVar[str] = "norm"
    tensor_names: ClassVar = {"w": "w_norm", "b": "b_norm"}
    kinds: ClassVar[tuple[Kind, ...]] = ("norm",)

    @property
    def changes_bias(self) -> bool:
        return True

    def slots(self, g: Geometry) -> dict[str, Slot]:
        bias = {"b": Slot(g.shape, "delta")} if g.has_bias else {}
        return {"w": Slot(g.shape, "delta")} | bias

    def initialize(self, p: Params, below: LayerBelow) -> None:
        for tensor in p.values():
            torch.nn.init.zeros_(tensor)

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        return Affine(base.weight + p["w"], None if base.bias is None else base.bias + p["b"])

    def row_block_size(self, g: Geometry) -> int:
        return 1

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        return {name: run.of(tensor) for name, tensor in p.items()}

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]]:
        having = {name: [part for part in parts if name in part.entry.tensors] for name in cls.tensor_names}
        return cls(), {name: joined_rows(some, g, name) for name, some in having.items() if some}

    def max_rank(self, g: Geometry) -> None:
        return None

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        why = "the layer runs once, with the new scale and shift"
        return Cost("dense", why, g.size / tokens, g.size + g.size / tokens)

    @classmethod
    def uses_alpha(cls, p: Params) -> bool:
        return False

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        return max(axis_size(shapes, name, 0) for name in cls.tensor_names.values()), 0

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls()
