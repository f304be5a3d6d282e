"""LoRA and, on convolutions, LoCon: ΔW is a product of two low-rank factors, optionally with a Tucker core."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.additive import Additive, add_mixed, amplify, low_rank_work
from lycoris.algorithms.base import Algorithm, uniform_like_linear
from lycoris.algorithms.call import Call
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.ranked import Ranked, joined_outputs, shared_inputs, side_by_side
from lycoris.algorithms.row_selection import RowBlock
from lycoris.algorithms.serialization import TensorShapes, axis_size, column_count
from lycoris.algorithms.slots import Params, Slot
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.low_rank import low_rank_gram
from lycoris.ops.tucker import tucker


@dataclass(frozen=True, kw_only=True)
class LoRA(Ranked, Additive):
    """ΔW = up · down, of rank r (LoRA, arXiv:2106.09685 section 4.1; LoCon on convolutions, arXiv:2309.14859 section
    3).

        ΔW[o, i, k] = Σ_r up[o, r] · down[r, i, k]
        with a Tucker core: ΔW[o, i, k] = Σ_pq up[o, p] · mid[p, q, k] · down[q, i]

    Tensors: `up` (O, r), `down` (r, I, *K), with a core `mid` (r, r, *K) and `down` (r, I). `up` starts at zero.
    """

    tucker: bool = False
    """On convolutions with a kernel larger than 1, store the kernel in a core (r, r, *K) and not in `down`."""

    name: ClassVar[str] = "lora"
    tensor_names: ClassVar = {"up": "lora_up.weight", "down": "lora_down.weight", "mid": "lora_mid.weight"}
    rank_tensors: ClassVar = ("down",)
    SCALAR_FOLDS_INTO: ClassVar = ("up",)

    def slots(self, g: Geometry) -> dict[str, Slot]:
        r, ones = self.rank, (1,) * len(g.kernel)
        up = Slot((g.out_features, r, *ones), "out")
        if self.tucker and not g.pointwise:
            mid, down = Slot((r, r, *g.kernel), "core"), Slot((r, g.in_features, *ones), "in")
            return {"up": up, "down": down, "mid": mid} | self._scalar_slot()
        return {"up": up, "down": Slot((r, *g.shape[1:]), "in")} | self._scalar_slot()

    def initialize(self, p: Params, below: LayerBelow) -> None:
        for name in ("up", "down", "mid"):
            if name in p:
                uniform_like_linear(p[name], p[name][0].numel())
        self._start_at_zero(p, "up")

    def delta(self, p: Params, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        up, into = self.low_rank_factors(p, g)
        return Affine((up @ into.flatten(1)).reshape(g.shape), None)

    def low_rank_factors(self, p: Params, g: Geometry) -> tuple[Tensor, Tensor]:
        up, down = p["up"].flatten(1), p["down"]
        return up, tucker(p["mid"], None, down.flatten(1)) if "mid" in p else down

    def gram_terms(self, p: Params, weight: Tensor, g: Geometry, axis: int) -> tuple[Tensor, Tensor]:
        return low_rank_gram(weight, *self.low_rank_factors(p, g), axis)

    def scale_rows(self, p: Params, length: Tensor) -> Params:
        return dict(p) | {"up": p["up"] * length.to(p["up"]).reshape(-1, *(1,) * (p["up"].dim() - 1))}

    def row_block_size(self, g: Geometry) -> int:
        return 1

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        return dict(p) | {"up": run.of(p["up"])}

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        scale, rank = cls.common_scale(parts), len(parts[0].entry.tensors["down"])
        one = None if scale is None else joined_outputs(parts, g, ["up"])
        if one is not None and scale is not None:
            return LoRA(rank=rank, alpha=scale * rank, tucker="mid" in one), one
        # The ranks of one part come after those of another, so that the first few alone mean nothing any more.
        if any("mid" in part.entry.tensors for part in parts):
            return None
        gains = [] if scale is not None else [part.entry.algorithm.scale(part.entry.geometry) for part in parts]
        starts, into = shared_inputs(parts, "down")
        rank = len(into["down"])
        algorithm = LoRA(rank=rank, alpha=None if scale is None else scale * rank)
        return algorithm, {"up": side_by_side(parts, g, "up", gains=gains, starts=starts), **into}

    def product_macs(self, g: Geometry) -> int | None:
        if self.tucker and not g.pointwise and g.groups == 1:
            return self.rank * (g.in_features + g.out_features) + self.rank**2 * (g.fan_in // g.in_features)
        return low_rank_work(g, self.rank)

    def delta_macs(self, g: Geometry) -> int:
        return self.rank * g.size

    def saved_elements(self, g: Geometry) -> int:
        return self.rank * (1 + self.use_scalar) + self.rank * ("mid" in self.slots(g))

    def max_rank(self, g: Geometry) -> int:
        return min(self.rank, g.out_features, g.fan_in)

    def add_product(self, y: Tensor, p: Params, g: Geometry, x: Tensor, gain: Tensor | float, call: Call) -> Tensor:
        h = g.op(g.mix(x, p["down"].flatten(1)), p["mid"]) if "mid" in p else g.op(x, p["down"])
        return add_mixed(y, g, amplify(h, gain), p["up"].flatten(1))

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        kernel = math.prod(shapes.get(cls.tensor_names.get("mid", ""), ())[2:])
        return axis_size(shapes, cls.tensor_names["up"], 0), column_count(shapes, cls.tensor_names["down"]) * kernel

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(rank=p["down"].shape[0], alpha=alpha, tucker="mid" in p)
