"""LoHa: ΔW is the elementwise product of two low-rank matrices (FedPara, arXiv:2108.06098)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithm import Affine, Base, Params, Ranked, Slot
from lycoris.geometry import Geometry
from lycoris.ops.khatri_rao import khatri_rao
from lycoris.ops.tucker import tucker


@dataclass(frozen=True, kw_only=True)
class LoHa(Ranked):
    """ΔW = (w1_a·w1_b) ⊙ (w2_a·w2_b), of rank up to r²; with Tucker cores each factor is a Tucker-2 kernel.

    A product of two rank-r matrices, element by element, is one matrix of rank r² whose factors are the Khatri-Rao
    products of theirs. So it runs as a LoRA of rank r² wherever that is cheaper than building ΔW.
    """

    tucker: bool = False
    """On convolutions with a real kernel, put the kernel into cores `t1`, `t2` of r x r."""

    name: ClassVar[str] = "loha"
    keys: ClassVar = {
        "w1_a": "hada_w1_a",
        "w1_b": "hada_w1_b",
        "w2_a": "hada_w2_a",
        "w2_b": "hada_w2_b",
        "t1": "hada_t1",
        "t2": "hada_t2",
    }
    GATE_FOLDS_INTO: ClassVar = ("w1_a",)

    def slots(self, g: Geometry) -> dict[str, Slot]:
        r = self.rank
        if self.tucker and not g.pointwise:
            a, b, t = Slot((r, g.out_features), "out"), Slot((r, g.in_features), "in"), Slot((r, r, *g.kernel), "core")
            return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b, "t1": t, "t2": t} | self._gate_slot()
        a, b = Slot((g.out_features, r), "out"), Slot((r, g.fan_in), "in")
        return {"w1_a": a, "w1_b": b, "w2_a": a, "w2_b": b} | self._gate_slot()

    def initialise(self, p: Params, below: Base) -> None:
        for name, tensor in p.items():
            torch.nn.init.normal_(tensor, std=1.0 if name in ("w1_b", "w2_b") else 0.1)
        self._start_at_zero(p, "w2_a")

    def delta(self, p: Params, g: Geometry, keep: Tensor | None = None) -> Affine:
        if "t1" in p:
            one = tucker(p["t1"], p["w1_a"].T, p["w1_b"])
            return Affine(one * tucker(p["t2"], p["w2_a"].T, p["w2_b"]), None)
        return Affine(((p["w1_a"] @ p["w1_b"]) * (p["w2_a"] @ p["w2_b"])).reshape(g.shape), None)

    def product(self, p: Params, g: Geometry, x: Tensor, gain: Tensor | float, keep: Tensor | None) -> Tensor:
        dense = 3 * self.rank**2 * (g.out_features + g.fan_in) >= g.out_features * g.fan_in
        if dense or "t1" in p:
            return super().product(p, g, x, gain, keep)
        up = khatri_rao(p["w1_a"].T, p["w2_a"].T).T
        down = khatri_rao(p["w1_b"], p["w2_b"]).reshape(-1, *g.shape[1:])
        return g.mix(g.op(x, down) * gain, up)

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(rank=p["w1_b"].shape[0], alpha=alpha, tucker="t1" in p)
