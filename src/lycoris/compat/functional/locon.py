"""LoRA as functions of tensors: (down, up, mid), mid None without a Tucker core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lycoris.algorithms import LoRA
from lycoris.compat.functional.layer import Added, geometry, name_tensors, require, shape_tensors, start_tensors
from lycoris.layers.geometry import Geometry

SLOTS = ("down", "up", "mid")


def weight_gen(org_weight: Tensor, rank: int, tucker: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """New tensors for a layer's weight."""
    p = start_tensors(LoRA(rank=rank, tucker=tucker), org_weight)
    return p["down"], p["up"], p.get("mid")


def _read(
    weights: tuple[Tensor | None, ...], gamma: float, extra: Mapping[str, Any] | None
) -> tuple[LoRA, dict[str, Tensor], Geometry]:
    p = name_tensors(weights, SLOTS)
    require(p, "down", "up")
    rank, inputs = p["down"].shape[:2]
    g = geometry((p["up"].shape[0], inputs, *p.get("mid", p["down"]).shape[2:]), extra)
    algorithm = LoRA(rank=rank, alpha=gamma * rank, tucker="mid" in p)
    return algorithm, shape_tensors(algorithm, p, g), g


_OWN = Added(_read)
diff_weight = _OWN.diff_weight
bypass_forward_diff = _OWN.bypass_forward_diff
