"""DyLoRA: a LoRA trained at many ranks at once, so that its first ranks work without the others."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.call import Call, require_one_mask
from lycoris.algorithms.lora import LoRA
from lycoris.algorithms.serialization import TensorShapes
from lycoris.algorithms.slots import Params
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Geometry
from lycoris.ops.factorization import nearest_divisor


@dataclass(frozen=True, kw_only=True)
class DyLoRA(LoRA):
    """A LoRA whose first n ranks work without the others, for every n (arXiv:2210.07558 section 3, algorithm 1).

        training:   ΔW = alpha / n · up[:, :n] · down[:n], with n a random multiple of `block_size`
        evaluation: ΔW = alpha / r · up · down

    A step trains the last block of the n ranks only. With `rs_lora` the scales are alpha / √n and alpha / √r.

    A file of it is a LoRA file: cut to its first n ranks, with alpha as it is, it is what was trained at rank n.
    """

    block_size: int = 4
    """Ranks that are trained together; it has to divide the rank."""

    name: ClassVar[str] = "dylora"
    tensor_names: ClassVar = {"up": "lora_up.weight", "down": "lora_down.weight"}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1 or self.rank % self.block_size:
            raise ConfigError(
                f"block_size of dylora must divide the rank {self.rank}, and {self.block_size} does not; "
                f"the nearest that does is {nearest_divisor(self.rank, self.block_size)}"
            )
        if self.rank_dropout:
            raise ConfigError("dylora has no rank_dropout: each training step leaves ranks out already")
        if self.tucker:
            raise ConfigError("dylora has no Tucker core, whose ranks could not be cut one by one")
        if self.use_scalar:
            raise ConfigError("dylora has no scalar: its blocks are trained one at a time from zero")

    @property
    def has_dropout(self) -> bool:
        return True

    def sample_dropout(self, call: Call, x: Tensor) -> Call:
        call = super().sample_dropout(call, x)
        if call.dropout_scale is None:
            return call
        blocks = self.rank // self.block_size
        # 1 + a whole number below `blocks`; in evaluation, which a compiled graph only tells by the value, all of them.
        drawn = 1 + (torch.rand((), device=x.device) * blocks).floor().clamp_max(blocks - 1)
        n = torch.where(call.dropout_scale.to(x.device) > 0, drawn, float(blocks)) * self.block_size
        louder = (self.rank / n).sqrt() if self.rs_lora else self.rank / n
        rank_mask = (torch.arange(self.rank, device=x.device) < n).float() * louder
        return replace(
            call, rank_mask=rank_mask[None] if call.rank_mask is None else call.rank_mask.to(rank_mask) * rank_mask
        )

    def mask_ranks(self, p: Params, g: Geometry, rank_mask: Tensor | None) -> Params:
        p = super().mask_ranks(p, g, rank_mask)
        if rank_mask is None:
            return p
        blocks = (require_one_mask(rank_mask) > 0).reshape(-1, self.block_size).any(1)
        last = blocks & ~torch.cat([blocks[1:], blocks.new_zeros(1)])
        trained = last.repeat_interleave(self.block_size)
        up, down = p["up"], p["down"]
        rows, columns = trained.reshape(-1, *(1,) * (down.dim() - 1)), trained.reshape(1, -1, *(1,) * (up.dim() - 2))
        return {"up": torch.where(columns, up, up.detach()), "down": torch.where(rows, down, down.detach())}

    @classmethod
    def claims(cls, shapes: TensorShapes) -> bool:
        return False  # a file of it is one of LoRA, and is read as such

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(rank=p["down"].shape[0], alpha=alpha, block_size=1)
