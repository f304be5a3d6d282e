"""Convert an adapter to a LoRA of its own factors, or to a dense difference.

Both are exact, at every strength. Some changes depend on the weight below, and the result holds for that weight only:
those of DoRA, GLoRA, (IA)³ and the rotations, and those of T-LoRA where a file leaves out its start. A change that
depends on the timestep is converted with all of its ranks.

Legend: O out features, I in features per group, K kernel dimensions, r' rank of the resulting LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from lycoris.algorithms import DyLoRA, Full, GLoRA, LoRA, Norm, Replace
from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Entry
from lycoris.algorithms.layer_below import BareWeight
from lycoris.algorithms.slices import own_rows
from lycoris.algorithms.slots import Params
from lycoris.errors import PlanError
from lycoris.layers.geometry import Affine, Geometry


def needs_base(entry: Entry) -> bool:
    """Tell whether the change that an entry makes depends on the weight below.

    True for multiplicative algorithms such as OFT, and where tensors are missing that the base weight determines.
    """
    if isinstance(entry.algorithm, Norm):
        return False
    return not isinstance(entry.algorithm, Additive) or not has_start(entry)


def has_start(entry: Entry) -> bool:
    """Tell whether an entry has all of its tensors. A file may leave out frozen ones that the base weight
    determines."""
    return entry.tensors.keys() >= entry.algorithm.slots(entry.geometry).keys()


def adapt_affine(entry: Entry, base: Affine) -> Affine:
    """Return the weight (O, I, *K) and bias (O) that an entry makes of those below, at strength 1.

    Computed in the dtype of the base. For a stacked parameter the weight is (E, O, I).
    """
    algorithm, g = entry.algorithm, _drop_stack(entry.geometry)
    p = _cast_tensors(_complete_tensors(entry, base), base.weight.dtype)
    if not entry.geometry.stack:
        return algorithm.transform(p, base, g)
    each = [algorithm.transform(_select_matrix(p, n), Affine(w, None), g).weight for n, w in enumerate(base.weight)]
    return Affine(torch.stack(each), None)


def low_rank(entry: Entry, base: Affine | None = None, *, always: bool = False) -> Entry | None:
    """Return the entry as a LoRA of rank r', through the factors that its algorithm has.

    Args:
        base: weight and bias below; None where they are not at hand.
        always: convert even where the factors have as many elements as ΔW, r'·(O + I·ΠK) ≥ O·I·ΠK.

    Returns:
        The LoRA; a LoRA is returned as it is. None where there are no factors, or where they would not be smaller.

    Raises:
        PlanError: the change depends on the weight below, and `base` is None.
    """
    entry = own_rows(entry) or entry
    algorithm, g = entry.algorithm, entry.geometry
    if type(algorithm) is LoRA and not (algorithm.use_scalar or algorithm.tucker):
        return entry
    if isinstance(algorithm, DyLoRA):
        alpha = algorithm.scale(g) * algorithm.rank
        return entry._replace(algorithm=LoRA(rank=algorithm.rank, alpha=alpha))
    factors = _find_factors(entry, base)
    if factors is None:
        return None
    up, down, scale = factors
    rank = up.shape[-1]
    if not always and rank * (g.out_features + g.fan_in) >= g.size:
        return None
    ones = (1,) * len(g.kernel)
    tensors = {
        "up": up.reshape(*g.stacked_shape((g.out_features, rank)), *ones),
        "down": down.reshape(g.stacked_shape((rank, *g.shape[1:]))),
    }
    return Entry(LoRA(rank=rank, alpha=scale * rank), g, tensors)


def dense(entry: Entry, base: Affine | None = None) -> Entry:
    """Return the entry as a dense difference of the weight; Full and Norm are returned as they are.

    Computed in float64 where the change is a small difference of two weights, else in at least float32.

    Args:
        base: weight and bias below; None where they are not at hand.

    Raises:
        PlanError: the change depends on the weight below, and `base` is None.
    """
    entry = own_rows(entry) or entry
    algorithm, g = entry.algorithm, entry.geometry
    if isinstance(algorithm, Full | Norm):
        return entry
    if isinstance(algorithm, Replace):
        return _difference(entry, _require_base(entry, base).widen(torch.float64), _wide_dtype(entry, base))
    tied = needs_base(entry)
    if tied:
        below = _require_base(entry, base).widen(torch.float64)
    else:
        device = next(iter(entry.tensors.values())).device
        below = Affine(torch.zeros(g.stacked_shape(g.shape), dtype=_wide_dtype(entry, None), device=device), None)
    diff = adapt_affine(entry, below).weight - below.weight
    if tied:
        diff = diff.to(_wide_dtype(entry, base))
    return Entry(Full(bias=False), g, {"diff": g.transpose_stored(diff)})


def _difference(entry: Entry, base: Affine, dtype: torch.dtype) -> Entry:
    """Return a replacement as a difference from the weight and bias that it replaces."""
    g, made = entry.geometry, adapt_affine(entry, base)
    found = {}
    if "w" in entry.tensors:
        found["diff"] = g.transpose_stored(made.weight - base.weight).to(dtype)
    if "b" in entry.tensors and made.bias is not None and base.bias is not None:
        found["diff_b"] = (made.bias - base.bias).to(dtype)
    if g.kind != "norm":
        return Entry(Full(weight="diff" in found, bias="diff_b" in found), g, found)
    tensors = {"w": found.get("diff", torch.zeros(g.shape, dtype=dtype))}
    if g.has_bias:
        tensors["b"] = found.get("diff_b", torch.zeros(g.out_features, dtype=dtype).reshape(g.shape))
    return Entry(Norm(), g, {name: tensor.reshape(g.shape) for name, tensor in tensors.items()})


def _find_factors(entry: Entry, base: Affine | None) -> tuple[Tensor, Tensor, float] | None:
    """(O, r'), (r', I, *K) and the scale, with one more axis in front for stacks; None where there are none."""
    algorithm, g = entry.algorithm, _drop_stack(entry.geometry)
    split: Callable[[Params, Tensor | None], tuple[Tensor, Tensor] | None]
    if isinstance(algorithm, GLoRA):
        below = _require_base(entry, base).weight
        split = _of_glora(algorithm, g)
        scale = algorithm.scale(g)
    elif isinstance(algorithm, Additive):
        below = None
        split = _of_additive(algorithm, g)
        scale = algorithm.scale(g)
    else:
        return None
    p = _cast_tensors(_complete_tensors(entry, base), _wide_dtype(entry, base if below is not None else None))
    if not entry.geometry.stack:
        pair = split(p, below)
        return None if pair is None else (*pair, scale)
    pairs = [split(_select_matrix(p, n), None if below is None else below[n]) for n in range(entry.geometry.stack)]
    found = [pair for pair in pairs if pair is not None]
    if len(found) < len(pairs):
        return None
    up, down = (torch.stack(each) for each in zip(*found, strict=True))
    return up, down, scale


def _of_additive(algorithm: Additive, g: Geometry) -> Callable[[Params, Tensor | None], tuple[Tensor, Tensor] | None]:
    def split(p: Params, below: Tensor | None) -> tuple[Tensor, Tensor] | None:
        pair = algorithm.low_rank_factors(p, g)
        return None if pair is None else (pair[0] * algorithm.read_scalar(p), pair[1])

    return split


def _of_glora(algorithm: GLoRA, g: Geometry) -> Callable[[Params, Tensor | None], tuple[Tensor, Tensor] | None]:
    """W·a1·a2 at each place of the kernel is a factor of its own: (W·a1)[o, (p, k)] · a2[p, i]·δ(k)."""
    places = math.prod(g.kernel)

    def split(p: Params, below: Tensor | None) -> tuple[Tensor, Tensor]:
        assert below is not None
        bent = torch.einsum("oik,ip->opk", below.to(p["a1"]).reshape(*g.shape[:2], places), p["a1"].flatten(1))
        here = torch.eye(places, dtype=bent.dtype, device=bent.device)
        spread = torch.einsum("pi,kl->pkil", p["a2"].flatten(1), here)
        up = torch.cat([bent.flatten(1), p["b1"].flatten(1)], dim=1)
        down = torch.cat([spread.reshape(-1, *g.shape[1:]), p["b2"].reshape(-1, *g.shape[1:])])
        return up * p.get("scalar", 1.0), down

    return split


def _complete_tensors(entry: Entry, base: Affine | None) -> dict[str, Tensor]:
    """The tensors with those added that the weight below determines."""
    if has_start(entry):
        return entry.tensors
    weight, g = _require_base(entry, base).weight, _drop_stack(entry.geometry)
    if not entry.geometry.stack:
        return entry.algorithm.fill_missing(entry.tensors, BareWeight(g, weight))
    each = [
        entry.algorithm.fill_missing(_select_matrix(entry.tensors, n), BareWeight(g, w)) for n, w in enumerate(weight)
    ]
    return {name: torch.stack([p[name] for p in each]) for name in each[0]}


def _require_base(entry: Entry, base: Affine | None) -> Affine:
    if base is None:
        raise PlanError(
            f"what {entry.algorithm.name} does to a {entry.geometry} depends on the weight below it, and none was "
            "given; pass the layer's weight and bias as base"
        )
    return base


def _wide_dtype(entry: Entry, base: Affine | None) -> torch.dtype:
    """At least float32, and the precision of the entry's tensors and of the base."""
    tensors = (*entry.tensors.values(), *(() if base is None else (base.weight,)))
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def _cast_tensors(p: Params, dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in p.items()}


def _select_matrix(p: Params, n: int) -> dict[str, Tensor]:
    return {name: tensor[n] for name, tensor in p.items()}


def _drop_stack(g: Geometry) -> Geometry:
    return replace(g, stack=0) if g.stack else g
