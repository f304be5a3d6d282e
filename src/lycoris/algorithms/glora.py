"""GLoRA: a low-rank change that is multiplied with the weight, and one that is added to it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.additive import add_mixed, amplify, low_rank_work
from lycoris.algorithms.base import dense_forward, in_dtype_of, uniform_like_linear
from lycoris.algorithms.call import Call
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.ranked import Ranked
from lycoris.algorithms.serialization import TensorShapes, axis_size, column_count
from lycoris.algorithms.slots import Params, Slot
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.rounding import widen


@dataclass(frozen=True, kw_only=True)
class GLoRA(Ranked):
    """A change that depends on the weight, and one that does not (GLoRA, arXiv:2306.07967 section 3, without biases).

        V = W + scale · (W · A + B), with A = a1 · a2 and B = b1 · b2

    Tensors: `a1` (I, r), `a2` (r, I), `b1` (O, r), `b2` (r, I, *K). `a2` and `b2` start at zero.

    Where the weight can be read cheaply it runs as a LoRA of rank 2r with factors (W·a1, b1) and (a2, b2). Elsewhere A
    changes the layer's input, x + scale · A(x), and B adds to its output.
    """

    name: ClassVar[str] = "glora"
    tensor_names: ClassVar = {"a1": "a1.weight", "a2": "a2.weight", "b1": "b1.weight", "b2": "b2.weight"}
    rank_tensors: ClassVar = ("b2",)
    SCALAR_FOLDS_INTO: ClassVar = ("a2",)

    def slots(self, g: Geometry) -> dict[str, Slot]:
        r, ones = self.rank, (1,) * len(g.kernel)
        a1, a2 = Slot((g.in_features, r, *ones), "out"), Slot((r, g.in_features, *ones), "in")
        b1, b2 = Slot((g.out_features, r, *ones), "out"), Slot((r, *g.shape[1:]), "in")
        return {"a1": a1, "a2": a2, "b1": b1, "b2": b2} | self._scalar_slot()

    def initialize(self, p: Params, below: LayerBelow) -> None:
        for name, tensor in p.items():
            if name != "scalar":
                uniform_like_linear(tensor, tensor[0].numel())
        for slot in ("scalar",) if self.use_scalar else ("a2", "b2"):
            torch.nn.init.zeros_(p[slot])

    def export_tensors(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        tensors = super().export_tensors(p, g)
        return tensors | {"b2": widen(tensors["b2"]) * widen(p["scalar"])} if "scalar" in p else tensors

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        p = self.mask_ranks(p, g, rank_mask)
        turned = torch.einsum("oi...,ir,rj->oj...", base.weight, p["a1"].flatten(1), p["a2"].flatten(1))
        added = (p["b1"].flatten(1) @ p["b2"].flatten(1)).reshape(g.shape)
        return Affine(base.weight + (turned + added) * (p.get("scalar", 1.0) * self.scale(g)), base.bias)

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        g = below.geometry
        gain = call.strength * (p.get("scalar", 1.0) * self.scale(g))
        plain = below.plain(x) if g.kind in ("linear", "embedding") else None
        if plain is None and (g.groups > 1 or g.kind == "embedding"):
            return dense_forward(self, p, below, x, call)
        if plain is not None:
            y = below(x)
            p = self.mask_ranks(in_dtype_of(y, p), g, call.rank_mask)
            out = torch.cat([plain.weight @ p["a1"], p["b1"]], dim=1)
            return add_mixed(y, g, amplify(g.op(x, torch.cat([p["a2"], p["b2"]])), gain), out)
        own = self.mask_ranks(in_dtype_of(x, p), g, call.rank_mask)
        h = amplify(g.mix(x, own["a2"].flatten(1)), gain)
        y = below(x + g.mix(h, own["a1"].flatten(1)).to(x.dtype))
        own = self.mask_ranks(in_dtype_of(y, p), g, call.rank_mask)
        return add_mixed(y, g, amplify(g.op(x, own["b2"]), gain), own["b1"].flatten(1))

    def row_block_size(self, g: Geometry) -> int:
        return 1

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        # W·A takes the rows of W along.
        return dict(p) | {"b1": run.of(p["b1"])}

    def max_rank(self, g: Geometry) -> int:
        # A bends the same channels at every place of the kernel, and W takes each place elsewhere.
        places = g.fan_in // g.in_features
        return min(self.rank * (places + 1), g.out_features, g.fan_in)

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        if g.groups > 1:
            return super().cost(g, tokens, alone=alone)
        kept = 2 * self.rank * (1 + self.use_scalar)
        if g.kind != "conv":
            work, once = low_rank_work(g, 2 * self.rank) or 0, self.rank * g.size / tokens
            return Cost("factored", "as a LoRA of rank 2r, with W·a1 taken first", work + once, 3 * (work + once), kept)
        work = self.rank * (2 * g.in_features + g.out_features + g.fan_in)
        why = "A bends the input of the layer, B adds to its output"
        return Cost("factored", why, work, 3 * work, kept + g.channels_in)

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        out, back = cls.tensor_names["b1"], cls.tensor_names["b2"]
        if axis_size(shapes, out, 1) != axis_size(shapes, back, 0):
            out, back = back, out  # the first layout of GLoRA had the two the other way round
        return axis_size(shapes, out, 0), column_count(shapes, back)

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(rank=p["a2"].shape[0], alpha=alpha)
