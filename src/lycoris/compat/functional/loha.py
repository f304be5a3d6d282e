"""LoHa as functions of tensors (w1d, w1u, w2d, w2u, t1, t2); the cores are None without Tucker."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lycoris.algorithms import LoHa
from lycoris.compat.functional.general import rebuild_tucker
from lycoris.compat.functional.layer import (
    AdditiveFunctions,
    build_geometry,
    initialize_tensors,
    name_tensors,
    require_tensors,
    shape_tensors,
)
from lycoris.layers.geometry import Geometry

LOHA_SLOTS = ("w1_b", "w1_a", "w2_b", "w2_a", "t1", "t2")


def weight_gen(org_weight: Tensor, rank: int, tucker: bool = True) -> tuple[Tensor | None, ...]:
    """Return new tensors for a layer's weight: (w1d, w1u, w2d, w2u, t1, t2), which change nothing yet.

    Shapes without Tucker: w1d and w2d (r, I, *K), w1u and w2u (O, r), t1 and t2 None. With `tucker`, on a kernel larger
    than 1: w1d (r, I), w1u (r, O), t1 (r, r, *K), and likewise for the second product.
    """
    p = initialize_tensors(LoHa(rank=rank, tucker=tucker), org_weight)
    if "t1" not in p:
        p |= {name: p[name].reshape(rank, *org_weight.shape[1:]) for name in ("w1_b", "w2_b")}
    return tuple(p.get(name) for name in LOHA_SLOTS)


def _read_loha_tensors(
    weights: tuple[Tensor | None, ...], gamma: float, extra: Mapping[str, Any] | None
) -> tuple[LoHa, dict[str, Tensor], Geometry]:
    p = name_tensors(weights, LOHA_SLOTS)
    require_tensors(p, "w1_b", "w1_a", "w2_b", "w2_a")
    rank, core = p["w1_b"].shape[0], "t1" in p
    out = p["w1_a"].shape[1 if core else 0]
    kernel = p["t1"].shape[2:] if core else p["w1_b"].shape[2:]
    g = build_geometry((out, p["w1_b"].shape[1], *kernel), extra)
    algorithm = LoHa(rank=rank, alpha=gamma * rank, tucker=core)
    return algorithm, shape_tensors(algorithm, p, g), g


_LOHA_FUNCTIONS = AdditiveFunctions(_read_loha_tensors)
diff_weight = _LOHA_FUNCTIONS.diff_weight
bypass_forward_diff = _LOHA_FUNCTIONS.bypass_forward_diff


def make_weight(w1d: Tensor, w1u: Tensor, w2d: Tensor, w2u: Tensor, scale: float | Tensor) -> Tensor:
    """Return scale·(w1u·w1d ⊙ w2u·w2d).

    Shapes: w1d and w2d (r, I), w1u and w2u (O, r); the result is (O, I).
    """
    return (w1u @ w1d) * (w2u @ w2d) * scale


def make_weight_tucker(
    t1: Tensor, w1d: Tensor, w1u: Tensor, t2: Tensor, w2d: Tensor, w2u: Tensor, scale: float | Tensor
) -> Tensor:
    """Return scale times the elementwise product of two Tucker products.

    Each is `rebuild_tucker(t, wu, wd)`; shapes: t (r, r, *K), wd (r, I), wu (r, O); the result is (O, I, *K).
    """
    return rebuild_tucker(t1, w1u, w1d) * rebuild_tucker(t2, w2u, w2d) * scale
