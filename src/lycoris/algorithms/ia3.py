"""(IA)³: one trained factor per output or input channel."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.call import Call
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.row_selection import RowBlock, covers, joined_rows
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.channel_scale import bend


@dataclass(frozen=True, kw_only=True)
class IA3(Algorithm):
    """Scales the output channels of a layer, or its input channels (arXiv:2205.05638 section 3.3).

        V[o, i, k] = W[o, i, k] · (1 + w[o]), or with `on_input` W[o, i, k] · (1 + w[i])

    Tensors: `w`, of O or I elements in a shape that broadcasts over the layer's output; starts at zero. The bias is not
    scaled.
    """

    on_input: bool = False
    """Scale the layer's input and not its output, as is usual for the second layer of a feed-forward."""

    name: ClassVar[str] = "ia3"
    tensor_names: ClassVar = {"w": "weight", "on_input": "on_input"}
    stored_settings: ClassVar = ("on_input",)

    def slots(self, g: Geometry) -> dict[str, Slot]:
        n = g.in_features * g.groups if self.on_input else g.out_features
        return {"w": Slot((1, n, *(1,) * len(g.kernel)) if g.kernel else (n,), "scale")}

    def constants(self, g: Geometry) -> tuple[float, ...]:
        return (self.on_input,)

    def initialize(self, p: Params, below: LayerBelow) -> None:
        torch.nn.init.zeros_(p["w"])

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        if not self.on_input:
            w = p["w"].reshape(-1, *(1,) * (len(g.shape) - 1))
            return Affine(base.weight + base.weight * w, base.bias)
        # Input channel c of group j meets the rows of that group only.
        w = p["w"].reshape(g.groups, 1, g.in_features, *(1,) * len(g.kernel))
        grouped = base.weight.reshape(g.groups, -1, *g.shape[1:])
        return Affine((grouped + grouped * w).reshape(base.weight.shape), base.bias)

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        g, w = below.geometry, p["w"].reshape(-1) * call.strength
        if not self.on_input:
            return bend(below(x), w, g.channel_axis, below.bias())
        if g.kind == "embedding":
            y = below(x)
            return torch.addcmul(y, y, w[x].unsqueeze(-1).to(y.dtype))
        return below(bend(x, w, g.channel_axis))

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        if self.on_input and g.kind != "embedding":
            # A convolution keeps the scaled input, frozen or not.
            kept = g.channels_in if g.kind == "conv" else 0
            return Cost("scaled", "the input is scaled", g.channels_in, 3 * g.channels_in, kept)
        return Cost(
            "scaled", "the output is scaled", g.out_features, 3 * g.out_features, g.out_features, needs_input=False
        )

    def row_block_size(self, g: Geometry) -> int:
        return 1

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        return dict(p) if self.on_input else {"w": run.of(p["w"], self._axis(g))}

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        first = parts[0].entry
        if len({part.entry.algorithm.constants(part.entry.geometry) for part in parts}) > 1:
            return None
        assert isinstance(first.algorithm, cls)
        if first.algorithm.on_input:
            same = all(torch.equal(part.entry.tensors["w"], first.tensors["w"]) for part in parts)
            return (first.algorithm, dict(first.tensors)) if same and covers(parts, g) else None
        return first.algorithm, {"w": joined_rows(parts, g, "w", cls._axis(g))}

    @staticmethod
    def _axis(g: Geometry) -> int:
        """Where the channels of the factor are."""
        return 1 if g.kernel else 0

    def export_tensors(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        return dict(p) | {"on_input": torch.tensor(int(self.on_input))}

    @classmethod
    def uses_alpha(cls, p: Params) -> bool:
        return False

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        if "on_input" in p:
            if p["on_input"].numel() != 1:
                raise ConfigError(f"on_input is one truth value, not {tuple(p['on_input'].shape)}")
            return cls(on_input=bool(p["on_input"]))
        return cls(on_input=p["w"].numel() != g.out_features)
