"""LoRA as functions of tensors (down, up, mid); mid is None without a Tucker core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lycoris.algorithms import LoRA
from lycoris.compat.functional.layer import (
    AdditiveFunctions,
    build_geometry,
    initialize_tensors,
    name_tensors,
    require_tensors,
    shape_tensors,
)
from lycoris.layers.geometry import Geometry

LORA_SLOTS = ("down", "up", "mid")


def weight_gen(org_weight: Tensor, rank: int, tucker: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """Return new tensors for a layer's weight: (down, up, mid), which change nothing yet.

    Shapes: down (r, I, *K), up (O, r, 1, ...), mid None. With `tucker`, on a kernel larger than 1: down (r, I, 1, ...),
    mid (r, r, *K).
    """
    p = initialize_tensors(LoRA(rank=rank, tucker=tucker), org_weight)
    return p["down"], p["up"], p.get("mid")


def _read_lora_tensors(
    weights: tuple[Tensor | None, ...], gamma: float, extra: Mapping[str, Any] | None
) -> tuple[LoRA, dict[str, Tensor], Geometry]:
    p = name_tensors(weights, LORA_SLOTS)
    require_tensors(p, "down", "up")
    rank, inputs = p["down"].shape[:2]
    g = build_geometry((p["up"].shape[0], inputs, *p.get("mid", p["down"]).shape[2:]), extra)
    algorithm = LoRA(rank=rank, alpha=gamma * rank, tucker="mid" in p)
    return algorithm, shape_tensors(algorithm, p, g), g


_LORA_FUNCTIONS = AdditiveFunctions(_read_lora_tensors)
diff_weight = _LORA_FUNCTIONS.diff_weight
bypass_forward_diff = _LORA_FUNCTIONS.bypass_forward_diff
