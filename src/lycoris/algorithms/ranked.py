"""Settings of the algorithms that have a rank, and adapters of fused layers joined from theirs.

Legend: see `lycoris.algorithms.base`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.call import Call, require_one_mask
from lycoris.algorithms.row_selection import RowBlock, common_dtype, joined_rows
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Geometry
from lycoris.ops.equality import identical, same
from lycoris.ops.rounding import widen


@dataclass(frozen=True, kw_only=True)
class Ranked(Algorithm):
    """Settings of an algorithm with a rank, whose ΔW is multiplied by alpha / rank.

    Adds the trained scalar, dropout of whole ranks, and the alpha that goes into files.
    """

    rank: int = 4
    """Rank of the factors, at least 1."""
    alpha: float | None = None
    """ΔW is multiplied by alpha / rank. None: alpha equals the rank, so the scale is 1."""
    rs_lora: bool = False
    """Divide alpha by √rank instead, so that the scale does not vanish at high rank (arXiv:2312.03732)."""
    use_scalar: bool = False
    """Also train a scalar that multiplies ΔW and starts at 0, so that no factor has to start at zero."""
    rank_dropout: float = 0.0
    """Probability in [0, 1) that a training step leaves a rank out."""
    rank_dropout_scale: bool = False
    """Divide by the share of ranks that are left, so that the expected size of ΔW stays the same."""

    SCALAR_FOLDS_INTO: ClassVar[tuple[str, ...]]
    """Slots that the scalar can be multiplied into when a file is written; the first one present is used."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rank < 1:
            raise ConfigError(f"rank of {self.name} must be a whole number of at least 1, not {self.rank!r}")
        if self.alpha is not None and not math.isfinite(self.alpha):
            raise ConfigError(f"alpha of {self.name} must be finite, not {self.alpha!r}")
        if self.rank_dropout_scale and not self.rank_dropout:
            raise ConfigError(f"rank_dropout_scale of {self.name} says how rank_dropout scales; give rank_dropout too")

    def scale(self, g: Geometry) -> float:
        alpha = self.rank if self.alpha is None else self.alpha
        return alpha / (math.sqrt(self.rank) if self.rs_lora else self.rank)

    def export_alpha(self, g: Geometry) -> float | None:
        if self.rs_lora:
            return self.scale(g) * self.rank
        return float(self.rank if self.alpha is None else self.alpha)

    def export_tensors(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        tensors = dict(p)
        scalar = tensors.pop("scalar", None)
        if scalar is not None:
            slot = next(name for name in self.SCALAR_FOLDS_INTO if name in tensors)
            tensors[slot] = widen(tensors[slot]) * widen(scalar)
        return tensors

    @property
    def has_dropout(self) -> bool:
        return super().has_dropout or self.rank_dropout > 0

    def sample_dropout(self, call: Call, x: Tensor) -> Call:
        call = super().sample_dropout(call, x)
        if call.dropout_scale is None or not self.rank_dropout:
            return call
        rank_mask = (torch.rand(1, self.rank, device=x.device) >= call.dropout_scale * self.rank_dropout).float()
        if self.rank_dropout_scale:
            rank_mask = rank_mask / rank_mask.mean().clamp_min(1 / self.rank)
        return replace(
            call, rank_mask=rank_mask if call.rank_mask is None else call.rank_mask.to(rank_mask) * rank_mask
        )

    def mask_ranks(self, p: Params, g: Geometry, rank_mask: Tensor | None) -> Params:
        if rank_mask is None:
            return p
        own = require_one_mask(rank_mask)
        into = [name for name, slot in self.slots(g).items() if slot.role == "in"]
        return dict(p) | {name: p[name] * own.to(p[name]).reshape(-1, *(1,) * (p[name].dim() - 1)) for name in into}

    def find_excess(self, g: Geometry) -> str | None:
        most = min(g.out_features, g.fan_in)
        if self.rank <= most:
            return None
        return f"rank {self.rank} is above {most}, the highest that a weight {g.shape} can have; use rank={most}"

    @classmethod
    def common_scale(cls, parts: Sequence[RowBlock]) -> float | None:
        """Return the scale that all parts share; None where they differ.

        Scales are compared exactly. Where they differ, they have to be multiplied into a factor.
        """
        scales = {part.entry.algorithm.scale(part.entry.geometry) for part in parts}
        return scales.pop() if len(scales) == 1 else None

    def _scalar_slot(self) -> dict[str, Slot]:
        return {"scalar": Slot((1,), "scale")} if self.use_scalar else {}

    def _start_at_zero(self, p: Params, slot: str) -> None:
        """Zero the scalar if there is one, else the tensor in `slot`."""
        torch.nn.init.zeros_(p["scalar"] if self.use_scalar else p[slot])


def shared_inputs(parts: Sequence[RowBlock], *slots: str) -> tuple[list[int], dict[str, Tensor]]:
    """Concatenate the input factors (r, ...) of all parts, equal ones once; also return where those of each part
    start."""
    starts: list[int] = []
    kept: list[tuple[int, list[Tensor]]] = []
    rank = 0
    for part in parts:
        own = [part.entry.tensors[slot] for slot in slots]
        start = next((at for at, other in kept if all(map(identical, own, other))), None)
        if start is None:
            start = rank
            kept.append((rank, own))
            rank += len(own[0])
        starts.append(start)
    return starts, {slot: torch.cat([own[n] for _, own in kept]) for n, slot in enumerate(slots)}


def side_by_side(
    parts: Sequence[RowBlock],
    g: Geometry,
    slot: str,
    axis: int = 0,
    gains: Sequence[float] = (),
    starts: Sequence[int] = (),
) -> Tensor:
    """Place the output factors of all parts on the block diagonal of one factor for the joined layer.

    Args:
        axis: where the rows are: 0 for (O, r, ...), 1 for (r, O).
        gains: a factor for each part; (): none.
        starts: first rank of each part, from `shared_inputs`; (): one after the other.
    """
    tensors = [part.entry.tensors[slot] for part in parts]
    ranks = [tensor.shape[1 - axis] for tensor in tensors]
    first = starts or [sum(ranks[:n]) for n in range(len(ranks))]
    total = max(at + rank for at, rank in zip(first, ranks, strict=True))
    shape = [g.out_features, total] if axis == 0 else [total, g.out_features]
    # A gain is multiplied in at full precision, and the result stays so.
    tensors = [widen(tensor) * gain for tensor, gain in zip(tensors, gains, strict=True)] if gains else tensors
    whole = tensors[0].new_zeros(*shape, *tensors[0].shape[2:], dtype=common_dtype(tensors))
    for part, tensor, at, rank in zip(parts, tensors, first, ranks, strict=True):
        columns = slice(at, at + rank)
        whole[(part.rows, columns) if axis == 0 else (columns, part.rows)] = tensor
    return whole


def joined_outputs(
    parts: Sequence[RowBlock], g: Geometry, slots: Sequence[str], axis: int = 0
) -> dict[str, Tensor] | None:
    """Concatenate the rows of these slots, for parts that are equal in all others.

    None where they differ in other slots, as adapters do that were not split from one.
    """
    tensors = [part.entry.tensors for part in parts]
    rest = [{name: t for name, t in each.items() if name not in slots} for each in tensors]
    if not all(same(each, rest[0]) for each in rest):
        return None
    return rest[0] | {name: joined_rows(parts, g, name, axis) for name in slots}
