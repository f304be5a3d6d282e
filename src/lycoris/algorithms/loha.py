"""LoHa: ΔW is the elementwise (Hadamard) product of two low-rank matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.additive import Additive, low_rank_work
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.ranked import Ranked, joined_outputs, shared_inputs, side_by_side
from lycoris.algorithms.row_selection import RowBlock
from lycoris.algorithms.serialization import TensorShapes, axis_size, column_count
from lycoris.algorithms.slots import Params, Slot
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.khatri_rao import khatri_rao
from lycoris.ops.low_rank import low_rank_gram
from lycoris.ops.tucker import tucker


@dataclass(frozen=True, kw_only=True)
class LoHa(Ranked, Additive):
    """ΔW is the elementwise product of two low-rank matrices, of rank up to r² (FedPara, arXiv:2108.06098 section 2).

        ΔW = (w1_a · w1_b) ⊙ (w2_a · w2_b)

    Tensors: `w1_a`, `w2_a` (O, r) and `w1_b`, `w2_b` (r, I·ΠK). With Tucker cores each of the two matrices is a kernel
    of factors `wN_a` (r, O), `wN_b` (r, I) and core `tN` (r, r, *K) (proposition 3 there). `w2_a` starts at zero.

    The product of two rank-r matrices is a matrix of rank r², whose factors are the Khatri-Rao products of theirs. So
    this runs as a LoRA of rank r² wherever that takes fewer multiplications than building ΔW.
    """

    tucker: bool = False
    """On convolutions with a kernel larger than 1, store it in the cores `t1` and `t2` (r, r, *K)."""
    stable_init: bool = False
    """Start with entries of variance 1/(I·ΠK) in the product at any rank. False: factors from N(0, 0.1²) and N(0, 1) as
    in lycoris-lora, with which the variance grows with the rank."""

    name: ClassVar[str] = "loha"
    tensor_names: ClassVar = {
        "w1_a": "hada_w1_a",
        "w1_b": "hada_w1_b",
        "w2_a": "hada_w2_a",
        "w2_b": "hada_w2_b",
        "t1": "hada_t1",
        "t2": "hada_t2",
    }
    rank_tensors: ClassVar = ("w1_b",)
    SCALAR_FOLDS_INTO: ClassVar = ("w1_a",)

    def slots(self, g: Geometry) -> dict[str, Slot]:
        r = self.rank
        if self.tucker and not g.pointwise:
            a, b, t = Slot((r, g.out_features), "out"), Slot((r, g.in_features), "in"), Slot((r, r, *g.kernel), "core")
            return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b, "t1": t, "t2": t} | self._scalar_slot()
        a, b = Slot((g.out_features, r), "out"), Slot((r, g.fan_in), "in")
        return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b} | self._scalar_slot()

    def initialize(self, p: Params, below: LayerBelow) -> None:
        factors = 3 if "t1" in p else 2
        # A matrix is a sum over r (with a core over r²) products of `factors` numbers.
        terms = self.rank ** (factors - 1)
        even = (1 / math.sqrt(below.geometry.fan_in) / terms) ** (1 / (2 * factors))
        for name, tensor in p.items():
            usual = 1.0 if name in ("w1_b", "w2_b") else 0.1
            torch.nn.init.normal_(tensor, std=even if self.stable_init else usual)
        self._start_at_zero(p, "w2_a")

    def delta(self, p: Params, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        if "t1" in p:
            one = tucker(p["t1"], p["w1_a"].T, p["w1_b"])
            return Affine(one * tucker(p["t2"], p["w2_a"].T, p["w2_b"]), None)
        return Affine(((p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"])).reshape(g.shape), None)

    def low_rank_factors(self, p: Params, g: Geometry) -> tuple[Tensor, Tensor] | None:
        if "t1" in p:
            return None
        up = khatri_rao(p["w1_a"].T, p["w2_a"].T).T
        return up, khatri_rao(p["w1_b"], p["w2_b"]).reshape(-1, *g.shape[1:])

    def gram_terms(self, p: Params, weight: Tensor, g: Geometry, axis: int) -> tuple[Tensor, Tensor] | None:
        pair = self.low_rank_factors(p, g) if self.rank**2 * 2 < min(g.out_features, g.fan_in) else None
        return None if pair is None else low_rank_gram(weight, *pair, axis)

    def scale_rows(self, p: Params, length: Tensor) -> Params:
        length = length.to(p["w1_a"])
        return dict(p) | {"w1_a": p["w1_a"] * (length if "t1" in p else length.reshape(-1, 1))}

    def row_block_size(self, g: Geometry) -> int:
        return 1

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        axis = 1 if "t1" in p else 0
        return dict(p) | {name: run.of(p[name], axis) for name in ("w1_a", "w2_a")}

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        scale, first = cls.common_scale(parts), parts[0].entry.tensors
        one = None if scale is None else joined_outputs(parts, g, ["w1_a", "w2_a"], 1 if "t1" in first else 0)
        if one is not None and scale is not None:
            rank = len(first["w1_b"])
            return cls(rank=rank, alpha=scale * rank, tucker="t1" in first), one
        # Where one part's factors are not zero both of another's are: the products across parts vanish.
        if any("t1" in part.entry.tensors for part in parts):
            return None
        gains = [] if scale is not None else [part.entry.algorithm.scale(part.entry.geometry) for part in parts]
        starts, into = shared_inputs(parts, "w1_b", "w2_b")
        rank = len(into["w1_b"])
        out = {
            "w1_a": side_by_side(parts, g, "w1_a", gains=gains, starts=starts),
            "w2_a": side_by_side(parts, g, "w2_a", starts=starts),
        }
        return cls(rank=rank, alpha=None if scale is None else scale * rank), out | into

    def product_macs(self, g: Geometry) -> int | None:
        return None if self.tucker and not g.pointwise else low_rank_work(g, self.rank**2)

    def delta_macs(self, g: Geometry) -> int:
        return 2 * self.rank * g.size

    def saved_elements(self, g: Geometry) -> int:
        return self.rank**2 * (1 + self.use_scalar)

    def max_rank(self, g: Geometry) -> int:
        return min(self.rank**2, g.out_features, g.fan_in)

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        if cls.tensor_names["t1"] in shapes:
            out, columns = (
                axis_size(shapes, cls.tensor_names["w1_a"], 1),
                axis_size(shapes, cls.tensor_names["w1_b"], 1),
            )
            return out, columns * math.prod(shapes[cls.tensor_names["t1"]][2:])
        return axis_size(shapes, cls.tensor_names["w1_a"], 0), column_count(shapes, cls.tensor_names["w1_b"])

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(rank=p["w1_b"].shape[0], alpha=alpha, tucker="t1" in p)
