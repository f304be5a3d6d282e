"""Full: ΔW and Δb stored whole, what plain fine-tuning would learn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithm import Additive, Affine, Base, Params, Slot
from lycoris.geometry import Geometry


@dataclass(frozen=True, kw_only=True)
class Full(Additive):
    """V = W + diff, b' = b + diff_b."""

    bias: bool = True
    """Also train the bias, on layers that have one."""

    name: ClassVar[str] = "full"
    keys: ClassVar = {"diff": "diff", "diff_b": "diff_b"}

    def slots(self, g: Geometry) -> dict[str, Slot]:
        bias = {"diff_b": Slot((g.out_features,), "delta")} if self.bias and g.has_bias else {}
        return {"diff": Slot(g.shape, "delta")} | bias

    def initialise(self, p: Params, below: Base) -> None:
        for tensor in p.values():
            torch.nn.init.zeros_(tensor)

    def delta(self, p: Params, g: Geometry, keep: Tensor | None = None) -> Affine:
        return Affine(p["diff"], p.get("diff_b"))

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(bias="diff_b" in p)
