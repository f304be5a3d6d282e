"""LoHa as functions of tensors: (w1d, w1u, w2d, w2u, t1, t2), the cores None without Tucker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lycoris.algorithms import LoHa
from lycoris.compat.functional.general import rebuild_tucker
from lycoris.compat.functional.layer import Added, geometry, name_tensors, require, shape_tensors, start_tensors
from lycoris.layers.geometry import Geometry

SLOTS = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")


def weight_gen(org_weight: Tensor, rank: int, tucker: bool = True) -> tuple[Tensor | None, ...]:
    """New tensors for a layer's weight; those on the input side keep its kernel."""
    p = start_tensors(LoHa(rank=rank, tucker=tucker), org_weight)
    if "t1" not in p:
        p |= {name: p[name].reshape(rank, *org_weight.shape[1:]) for name in ("w1_b", "w2_b")}
    return tuple(p.get(name) for name in SLOTS)


def _read(
    weights: tuple[Tensor | None, ...], gamma: float, extra: Mapping[str, Any] | None
) -> tuple[LoHa, dict[str, Tensor], Geometry]:
    p = name_tensors(weights, SLOTS)
    require(p, "w1_b", "w1_a", "w2_b", "w2_a")
    rank, core = p["w1_b"].shape[0], "t1" in p
    out = p["w1_a"].shape[1 if core else 0]
    kernel = p["t1"].shape[2:] if core else p["w1_b"].shape[2:]
    g = geometry((out, p["w1_b"].shape[1], *kernel), extra)
    algorithm = LoHa(rank=rank, alpha=gamma * rank, tucker=core)
    return algorithm, shape_tensors(algorithm, p, g), g


_OWN = Added(_read)
diff_weight = _OWN.diff_weight
bypass_forward_diff = _OWN.bypass_forward_diff


def make_weight(w1d: Tensor, w1u: Tensor, w2d: Tensor, w2u: Tensor, scale: float | Tensor) -> Tensor:
    """scale·(w1u·w1d ⊙ w2u·w2d)."""
    return (w1u @ w1d) * (w2u @ w2d) * scale


def make_weight_tucker(
    t1: Tensor, w1d: Tensor, w1u: Tensor, t2: Tensor, w2d: Tensor, w2u: Tensor, scale: float | Tensor
) -> Tensor:
    """The same of two products with a core each."""
    return rebuild_tucker(t1, w1u, w1d) * rebuild_tucker(t2, w2u, w2d) * scale
