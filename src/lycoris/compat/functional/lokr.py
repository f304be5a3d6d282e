"""LoKr as functions of tensors (w1, w1a, w1b, w2, w2a, w2b, t2), None for those that the layout does not have."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lycoris.algorithms import LoKr
from lycoris.algorithms.lokr import FactorSizes
from lycoris.compat.functional.layer import (
    AdditiveFunctions,
    build_geometry,
    initialize_tensors,
    name_tensors,
    require_tensors,
    shape_tensors,
)
from lycoris.layers.geometry import Geometry
from lycoris.ops.kronecker import kron

LOKR_SLOTS = ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")


def weight_gen(
    org_weight: Tensor,
    rank: int,
    tucker: bool = True,
    factor: int = -1,
    decompose_both: bool = False,
    full_matrix: bool = False,
    unbalanced_factorization: bool = False,
) -> tuple[Tensor | None, ...]:
    """Return new tensors for a layer's weight: (w1, w1a, w1b, w2, w2a, w2b, t2), which change nothing yet.

    Each of w1 and w2 is either a full matrix or split into its factors a and b, of which w2b keeps the kernel.

    Args:
        factor: Wanted size of w1. -1: near the square root of each dimension.
        decompose_both: Whether w1 may be split as well.
        full_matrix: Whether w2 stays a full matrix.
        unbalanced_factorization: Whether w1 gets the larger factor of the output dimension.
    """
    algorithm = LoKr(
        rank=rank,
        tucker=tucker,
        factor=factor,
        decompose_both=decompose_both,
        full_matrix=full_matrix,
        unbalanced=unbalanced_factorization,
    )
    p = initialize_tensors(algorithm, org_weight)
    if "w2_b" in p and "t2" not in p:
        p["w2_b"] = p["w2_b"].reshape(rank, -1, *org_weight.shape[2:])
    return tuple(p.get(name) for name in LOKR_SLOTS)


def _read_lokr_tensors(
    weights: tuple[Tensor | None, ...], gamma: float, extra: Mapping[str, Any] | None
) -> tuple[LoKr, dict[str, Tensor], Geometry]:
    p = name_tensors(weights, LOKR_SLOTS)
    require_tensors(p, *(() if "w1" in p else ("w1_a", "w1_b")), *(() if "w2" in p else ("w2_a", "w2_b")))
    ol, im = p["w1"].shape if "w1" in p else (p["w1_a"].shape[0], p["w1_b"].shape[1])
    core = "t2" in p
    if "w2" in p:
        ok, inner, *kernel = p["w2"].shape
    else:
        ok, inner = p["w2_a"].shape[1 if core else 0], p["w2_b"].shape[1]
        kernel = [*(p["t2"] if core else p["w2_b"]).shape[2:]]
    split = p.get("w2_b", p.get("w1_b"))
    rank = 1 if split is None else split.shape[0]
    layout = FactorSizes(ol, im, "w1" not in p, "w2" not in p)
    algorithm = LoKr(rank=rank, alpha=gamma, tucker=core, layout=layout)
    g = build_geometry((ol * ok, im * inner, *kernel), extra)
    return algorithm, shape_tensors(algorithm, p, g), g


_LOKR_FUNCTIONS = AdditiveFunctions(_read_lokr_tensors)
diff_weight = _LOKR_FUNCTIONS.diff_weight
bypass_forward_diff = _LOKR_FUNCTIONS.bypass_forward_diff


def make_kron(w1: Tensor, w2: Tensor, scale: float | Tensor) -> Tensor:
    """Return scale·(w1 ⊗ w2), the Kronecker product over the first two axes of w2.

    Shapes: w1 (a, b), w2 (c, d, *K); the result is (a·c, b·d, *K).
    """
    return kron(w1, w2) * scale


def kron_weight(
    w1: Tensor | None,
    w1a: Tensor | None,
    w1b: Tensor | None,
    w2: Tensor | None,
    w2a: Tensor | None,
    w2b: Tensor | None,
    t: Tensor | None = None,
    scale: float | Tensor = 1.0,
    backend: str | None = None,
) -> Tensor:
    """Return scale·(w1 ⊗ w2); each may be given by its factors instead.

    w1 = w1a·w1b and w2 = w2a·w2b, or with the Tucker core `t`, see `rebuild_tucker`.
    """
    own = w1, w1a, w1b, w2, w2a, w2b, t
    return diff_weight(*own, gamma=_read_lokr_rank(w1b, w2b)) * scale


def kron_bypass(
    h: Tensor,
    w1: Tensor | None,
    w1a: Tensor | None,
    w1b: Tensor | None,
    w2: Tensor | None,
    w2a: Tensor | None,
    w2b: Tensor | None,
    t: Tensor | None = None,
    scale: float | Tensor = 1.0,
    extra_args: Mapping[str, Any] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Return scale·(w1 ⊗ w2) applied to h; `extra_args` are those of a convolution.

    The tensors are those of `kron_weight`.
    """
    own = w1, w1a, w1b, w2, w2a, w2b, t
    return bypass_forward_diff(h, None, *own, gamma=_read_lokr_rank(w1b, w2b), extra_args=extra_args) * scale


def _read_lokr_rank(*second: Tensor | None) -> int:
    """Return the rank, by which `diff_weight` divides its gamma."""
    return next((each.shape[0] for each in reversed(second) if each is not None), 1)
