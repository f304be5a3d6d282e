"""BOFT: trained rotations of all of the weight's rows, as a butterfly of small blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from lycoris.algorithms.base import dense_forward
from lycoris.algorithms.call import Call
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.oft import OFT, length_slot
from lycoris.algorithms.serialization import TensorShapes
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.factorization import butterfly_sizes
from lycoris.ops.rotation import butterfly_work, cayley, joined_butterfly, stage, stages_to_join, turn_all
from lycoris.ops.shape import unflatten


@dataclass(frozen=True, kw_only=True)
class BOFT(OFT):
    """Rotates all rows of the weight by a butterfly of small blocks (BOFT, arXiv:2311.06243 section 4).

        V = rescale · R_{m-1} ··· R_0 · W, with each R_i made of orthogonal blocks, as in `OFT`, over rows that are
        2^i · s / 2 apart

    With m = log2(O / s) + 1 stages every row reaches every other. Tensors: `blocks` (m, O / s, s, s), which start at
    zero, and with `rescale` also `rescale` (O, 1, ...), which starts at one.

    The bias is not rotated. Forward rotates the layer's output, several neighboring stages at a time, and saves it for
    backward: once in float32 on a CPU, elsewhere before each group of stages.
    """

    block_size: int = 32
    """Rows that are rotated together in a stage, s; even, and the layer's outputs have to be s times a power of two."""

    name: ClassVar[str] = "boft"

    def slots(self, g: Geometry) -> dict[str, Slot]:
        s, o = self.block_size, g.out_features
        fitting = butterfly_sizes(o)
        if s not in fitting:
            near = sorted(fitting, key=lambda size: (abs(size - s), size))[:2]
            hint = f"; the nearest are {' and '.join(map(str, near))}" if near else "; no size does, leave it out"
            raise ConfigError(f"block_size of boft is even and {o} outputs are it times a power of two: not {s}{hint}")
        n = o // s
        return {"blocks": Slot((n.bit_length(), n, s, s), "rotation")} | length_slot(self.rescale, g)

    @classmethod
    def claims(cls, shapes: TensorShapes) -> bool:
        return len(shapes.get(cls.tensor_names["blocks"], ())) == 4

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        rows = base.weight.flatten(1)
        for i, turn in enumerate(cayley(p["blocks"], self.constraint * g.out_features)):
            rows = stage(rows, turn, i)
        weight = rows.reshape(base.weight.shape)
        return Affine(weight * p["rescale"] if "rescale" in p else weight, base.bias)

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        g = below.geometry
        if g.groups > 1:
            return dense_forward(self, p, below, x, call)
        stages = cayley(p["blocks"], self.constraint * g.out_features)
        butterfly = joined_butterfly(stages, p.get("rescale"))
        y, bias = below(x), below.bias()
        shift = None
        if bias is not None:
            bias = bias.to(y.dtype)
            shift = bias - turn_all(bias[None], butterfly)[0]
        channels = y.movedim(g.channel_axis, -1).contiguous()
        whole = turn_all(channels.view(-1, g.out_features), butterfly, shift)
        whole = unflatten(whole.contiguous(), channels.shape).movedim(-1, g.channel_axis)
        if not torch.compiler.is_compiling() and bool(call.strength == 1):
            # In the layer's own memory layout: what comes next picks its kernels, and with them the last bit, by it.
            return whole if whole.stride() == y.stride() else whole.contiguous()
        return y + (whole - y) * call.strength

    def row_block_size(self, g: Geometry) -> int:
        return g.out_features  # every row of the layer is mixed with every other

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        return dict(p)

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        if g.groups > 1:
            return super().cost(g, tokens, alone=alone)
        s, o, m = self.block_size, g.out_features, self.slots(g)["blocks"].shape[0]
        work, once, many = butterfly_work(o, m, s), m * o * s**2 / tokens, stages_to_join(m, s)
        # In float32 a CPU keeps the first of them only.
        kept = o * -(-m // many)
        why = f"the output is rotated by {m} stages, {many} at a time"
        return Cost("rotated", why, work + once, 3 * (work + once), kept, needs_input=False)
