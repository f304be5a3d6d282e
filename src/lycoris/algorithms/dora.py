"""DoRA: a trained length for each row or column of the adapted weight (arXiv:2402.09353)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithm import Affine, Algorithm, Base, Call, Params, Ranked, Slot
from lycoris.errors import ConfigError
from lycoris.geometry import Geometry

Axis = Literal["out", "in"]

EPSILON = torch.finfo(torch.float32).eps
"""Added to every norm, at the start too, so that a row of zeros divides; existing files were trained with it."""


@dataclass(frozen=True, kw_only=True)
class DoRA(Algorithm):
    """V' = m · V / ‖V‖ with V = W + scale·ΔW of the algorithm underneath; m starts as ‖W‖, so V' starts as W.

    A small ε is added to each norm, which runs over all other axes of the weight and is differentiated through. The
    bias stays as it is.
    """

    over: Ranked
    """The algorithm whose weight gets the lengths: any that adds a factored change."""
    axis: Axis = "out"
    """One length per output row (LyCORIS' default), or per input column (`wd_on_output: false`)."""

    name: ClassVar[str] = "dora"
    keys: ClassVar = {"magnitude": "dora_scale"}

    def __post_init__(self) -> None:
        if not isinstance(self.over, Ranked):
            raise ConfigError(f"DoRA goes over an algorithm that adds a factored change, not over {self.over!r}")
        if self.over.rank_masked:
            raise ConfigError(f"DoRA cannot go over {self.over.name}: its lengths would change with the timestep")
        if self.axis not in ("out", "in"):
            raise ConfigError(f"axis of dora must be 'out' or 'in', not {self.axis!r}")

    def slots(self, g: Geometry) -> dict[str, Slot]:
        ones = (1,) * len(g.kernel)
        shape = (g.out_features, 1, *ones) if self.axis == "out" else (1, g.in_features, *ones)
        return self.over.slots(g) | {"magnitude": Slot(shape, "length")}

    def initialise(self, p: Params, below: Base) -> None:
        self.over.initialise({name: tensor for name, tensor in p.items() if name != "magnitude"}, below)
        weight = self.over.transform(p, below.affine(), below.geometry).weight
        p["magnitude"].copy_(self._norm(weight.to(p["magnitude"].dtype)))

    def _norm(self, weight: Tensor) -> Tensor:
        kept = 0 if self.axis == "out" else 1
        others = [axis for axis in range(weight.dim()) if axis != kept]
        return torch.linalg.vector_norm(weight, dim=others, keepdim=True) + EPSILON

    def _ratio(self, p: Params, base: Affine, g: Geometry) -> tuple[Affine, Tensor]:
        """V and m / ‖V‖, in the adapter's own precision: in half precision the ratio would not be 1 at the start."""
        weight = base.weight.to(torch.promote_types(base.weight.dtype, p["magnitude"].dtype))
        below = self.over.transform(p, Affine(weight, base.bias), g)
        return below, p["magnitude"] / self._norm(below.weight)

    def transform(self, p: Params, base: Affine, g: Geometry, keep: Tensor | None = None) -> Affine:
        below, ratio = self._ratio(p, base, g)
        return Affine((below.weight * ratio).to(base.weight.dtype), below.bias)

    def forward(self, p: Params, below: Base, x: Tensor, call: Call) -> Tensor:
        g, base = below.geometry, below.affine()
        bend = self._ratio(p, base, g)[1] - 1
        if self.axis == "out":
            # y0 + μ((s - 1)·(y0 - b) + s·Δx): exactly y0 where s is 1 and Δ is 0.
            y = below(x)
            bend = g.channels(bend.to(y.dtype))
            plain = y if base.bias is None else y - g.channels(base.bias.to(y.dtype))
            return y + (plain * bend) * call.strength + self.over.added(p, g, x, call) * (1 + bend)
        bend = g.channels(bend.to(x.dtype).reshape(-1).repeat(g.groups))
        return below(x + x * bend * call.strength) + self.over.added(p, g, x + x * bend, call)

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        raise ConfigError("dora_scale alone says nothing: it belongs beside the tensors of another algorithm")

    @classmethod
    def read(cls, over: Ranked, p: Params, g: Geometry) -> Self:
        """DoRA over what the other tensors of a file are; the shape of `magnitude` tells the axis."""
        sizes = p["magnitude"].shape
        return cls(over=over, axis="out" if sizes[0] == sizes.numel() == g.out_features else "in")

    def scale(self, g: Geometry) -> float:
        return self.over.scale(g)

    def stored(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        return self.over.stored(p, g)

    def stored_alpha(self, g: Geometry) -> float | None:
        return self.over.stored_alpha(g)
