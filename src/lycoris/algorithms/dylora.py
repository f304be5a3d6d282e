"""DyLoRA: a LoRA trained at many ranks at once, so that its first ranks work without the others (arXiv:2210.07558)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.additive import Additive, Ranked, low_rank_work
from lycoris.algorithm import Affine, Base, Call, Params, Slot, one_mask, uniform_like_linear
from lycoris.errors import ConfigError
from lycoris.geometry import Geometry
from lycoris.ops.lowrank import low_rank_gram


@dataclass(frozen=True, kw_only=True)
class DyLoRA(Ranked, Additive):
    """ΔW = up · down. A training step uses the first n ranks, n a random multiple of `block_size`, at scale alpha / n
    (alpha / √n with `rs_lora`), and trains the last block of them; evaluation uses all r at alpha / r.

    A file of it is a LoRA file: cutting it to its first n ranks and keeping alpha gives what was trained at rank n.
    """

    block_size: int = 4
    """Ranks that are trained together; divides the rank."""

    name: ClassVar[str] = "dylora"
    keys: ClassVar = {"up": "lora_up.weight", "down": "lora_down.weight"}
    GATE_FOLDS_INTO: ClassVar = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1 or self.rank % self.block_size:
            fitting = [n for n in range(1, self.rank + 1) if self.rank % n == 0]
            near = min(fitting, key=lambda n: abs(n - self.block_size))
            raise ConfigError(
                f"block_size of dylora must divide the rank {self.rank}, and {self.block_size} does not; "
                f"the nearest that does is {near}"
            )
        if self.rank_dropout:
            raise ConfigError("dylora has no rank_dropout: each training step leaves ranks out already")
        if self.gate:
            raise ConfigError("dylora has no gate: its blocks are trained one at a time from zero")

    def slots(self, g: Geometry) -> dict[str, Slot]:
        ones = (1,) * len(g.kernel)
        return {
            "up": Slot((g.out_features, self.rank, *ones), "out"),
            "down": Slot((self.rank, *g.shape[1:]), "in"),
        }

    def initialise(self, p: Params, below: Base) -> None:
        uniform_like_linear(p["down"], p["down"][0].numel())
        torch.nn.init.zeros_(p["up"])

    @property
    def drops(self) -> bool:
        return True

    def draw(self, call: Call, x: Tensor) -> Call:
        call = super().draw(call, x)
        if call.dropping is None:
            return call
        blocks = self.rank // self.block_size
        # 1 + a whole number below `blocks`; in evaluation, which a compiled graph only tells by the value, all of them.
        drawn = 1 + (torch.rand((), device=x.device) * blocks).floor().clamp_max(blocks - 1)
        n = torch.where(call.dropping.to(x.device) > 0, drawn, float(blocks)) * self.block_size
        louder = (self.rank / n).sqrt() if self.rs_lora else self.rank / n
        keep = (torch.arange(self.rank, device=x.device) < n).float() * louder
        return replace(call, keep=keep[None] if call.keep is None else call.keep.to(keep) * keep)

    def masked(self, p: Params, g: Geometry, keep: Tensor | None) -> Params:
        p = super().masked(p, g, keep)
        if keep is None:
            return p
        blocks = (one_mask(keep) > 0).reshape(-1, self.block_size).any(1)
        last = blocks & ~torch.cat([blocks[1:], blocks.new_zeros(1)])
        # All blocks on is evaluation, or the largest draw of training.
        trained = last.repeat_interleave(self.block_size)
        up, down = p["up"], p["down"]
        rows, columns = trained.reshape(-1, *(1,) * (down.dim() - 1)), trained.reshape(1, -1, *(1,) * (up.dim() - 2))
        return {
            "up": torch.where(columns, up, up.detach()),
            "down": torch.where(rows, down, down.detach()),
        }

    def delta(self, p: Params, g: Geometry, keep: Tensor | None = None) -> Affine:
        return Affine((p["up"].flatten(1) @ p["down"].flatten(1)).reshape(g.shape), None)

    def pair(self, p: Params, g: Geometry) -> tuple[Tensor, Tensor]:
        return p["up"].flatten(1), p["down"]

    def gram(self, p: Params, weight: Tensor, g: Geometry, axis: int) -> tuple[Tensor, Tensor]:
        return low_rank_gram(weight, *self.pair(p, g), axis)

    def stretched(self, p: Params, length: Tensor) -> Params:
        return dict(p) | {"up": p["up"] * length.to(p["up"]).reshape(-1, *(1,) * (p["up"].dim() - 1))}

    def work(self, g: Geometry) -> int | None:
        return low_rank_work(g, self.rank)

    def building(self, g: Geometry) -> int:
        return self.rank * g.size

    def kept(self, g: Geometry) -> int:
        return self.rank

    def max_rank(self, g: Geometry) -> int:
        return min(self.rank, g.out_features, g.fan_in)

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(rank=p["down"].shape[0], alpha=alpha, block_size=1)
