"""Diag-OFT: trained rotations of blocks of the weight's rows."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.base import Algorithm, dense_forward
from lycoris.algorithms.call import Call
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.row_selection import RowBlock, common_dtype, joined_rows
from lycoris.algorithms.serialization import TensorShapes
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.factorization import nearest_divisor
from lycoris.ops.rotation import cayley, limit_norm, scaled_turn, turn_blocks


@dataclass(frozen=True, kw_only=True)
class OFT(Algorithm):
    """Rotates blocks of consecutive rows of the weight (OFT, arXiv:2306.07280 section 4, as diag-oft in lycoris-lora).

        V = rescale · Rᵀ · W, with R block-diagonal of blocks (I + Q)(I - Q)⁻¹ (Cayley transform) and Q = B - Bᵀ

    Tensors: `blocks` B (O / s, s, s), and with `rescale` also `rescale` (O, 1, ...), which starts at one. B starts at
    zero. The bias is not rotated. Forward rotates the layer's output, which is saved for backward.
    """

    block_size: int = 32
    """Rows that are rotated together, s; at least 2, and it has to divide the layer's outputs."""
    constraint: float = 0.0
    """Limits the Frobenius norm of Q over all blocks to constraint · O (COFT); 0: no limit."""
    rescale: bool = False
    """Also train a factor per row."""

    name: ClassVar[str] = "diag-oft"
    tensor_names: ClassVar = {"blocks": "oft_blocks", "rescale": "rescale"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 2:
            raise ConfigError(f"block_size of {self.name} must be at least 2, not {self.block_size}: 1 rotates nothing")
        if not 0 <= self.constraint < float("inf"):
            raise ConfigError(f"constraint of {self.name} must be a finite number from 0, not {self.constraint}")

    def slots(self, g: Geometry) -> dict[str, Slot]:
        s, o = self.block_size, g.out_features
        if o % s:
            near = nearest_divisor(o, s)
            raise ConfigError(
                f"block_size {s} does not divide the {o} outputs"
                + (f"; the nearest that does is {near}" if near > 1 else ", and nothing near it does; leave it out")
            )
        return {"blocks": Slot((o // s, s, s), "rotation")} | length_slot(self.rescale, g)

    def constants(self, g: Geometry) -> tuple[float, ...]:
        return (self.constraint,)

    def initialize(self, p: Params, below: LayerBelow) -> None:
        torch.nn.init.zeros_(p["blocks"])
        if "rescale" in p:
            torch.nn.init.ones_(p["rescale"])

    @classmethod
    def claims(cls, shapes: TensorShapes) -> bool:
        return len(shapes.get(cls.tensor_names["blocks"], ())) == 3

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        turn = cayley(p["blocks"], self.constraint * g.out_features).to(base.weight.dtype)
        rows = base.weight.reshape(len(turn), self.block_size, -1)
        weight = (rows + turn.mT @ rows).reshape(base.weight.shape)
        return Affine(weight * p["rescale"] if "rescale" in p else weight, base.bias)

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        g = below.geometry
        if g.groups > 1:
            return dense_forward(self, p, below, x, call)
        turn = scaled_turn(cayley(p["blocks"], self.constraint * g.out_features), p.get("rescale")) * call.strength
        y, bias = below(x), below.bias()
        if bias is None:
            return turn_blocks(y, turn, g.channel_axis)
        bias = bias.to(y.dtype)
        return turn_blocks(y, turn, g.channel_axis, bias - turn_blocks(bias, turn))

    def row_block_size(self, g: Geometry) -> int:
        return self.block_size

    def restrict_to_rows(self, g: Geometry, run: RowRange) -> Self:
        return replace(self, constraint=0.0) if self.constraint else self

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        # The limit is one for all blocks together: it has to be applied before they part.
        free = limit_norm(p["blocks"], self.constraint * g.out_features)
        own = {"blocks": run.blocks(self.block_size).of(free)}
        return own | ({"rescale": run.of(p["rescale"])} if "rescale" in p else {})

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        # A block of zeros rotates nothing, and a factor of 1 changes nothing.
        size = parts[0].entry.tensors["blocks"].shape[-1]
        sizes = {part.entry.tensors["blocks"].shape[-1] for part in parts}
        if cls is not OFT or sizes != {size} or any(at % size for at in (g.out_features, *(p.start for p in parts))):
            return None
        free = []
        for part in parts:
            own = part.entry.algorithm
            assert isinstance(own, cls)
            free.append(limit_norm(part.entry.tensors["blocks"], own.constraint * part.entry.geometry.out_features))
        blocks = free[0].new_zeros(g.out_features // size, size, size, dtype=common_dtype(free))
        for part, own_blocks in zip(parts, free, strict=True):
            blocks[part.start // size :][: len(own_blocks)] = own_blocks
        long = [part for part in parts if "rescale" in part.entry.tensors]
        rescale = {"rescale": joined_rows(long, g, "rescale", fill=1.0)} if long else {}
        return cls(block_size=size, rescale=bool(long)), {"blocks": blocks} | rescale

    def max_rank(self, g: Geometry) -> int:
        # A rotation of an odd number of rows leaves one direction where it is.
        still = 0 if self.rescale or self.block_size % 2 == 0 else g.out_features // self.block_size
        return min(g.out_features - still, g.fan_in)

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        if g.groups > 1:
            return super().cost(g, tokens, alone=alone)
        work, once = g.out_features * self.block_size, g.out_features * self.block_size**2 / tokens
        why = "the output is rotated, block by block"
        return Cost("rotated", why, work + once, 3 * (work + once), g.out_features, needs_input=False)

    def export_alpha(self, g: Geometry) -> float | None:
        return float(self.constraint)

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        blocks = shapes.get(cls.tensor_names["blocks"], ())
        return (math.prod(blocks[-3:-1]) if len(blocks) > 2 else 0), 0

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(block_size=p["blocks"].shape[-1], constraint=alpha or 0.0, rescale="rescale" in p)


def length_slot(wanted: bool, g: Geometry) -> dict[str, Slot]:
    """Return the slot of a trained factor per row, `rescale` of shape (O, 1, ...), if it is wanted.

    {} if not.
    """
    return {"rescale": Slot((g.out_features, *(1,) * (len(g.shape) - 1)), "magnitude")} if wanted else {}
