"""Reproduce the factor shapes of PEFT's LoKr, which has one `decompose_factor` for all layers."""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from typing import NamedTuple

from lycoris.adapters.load_report import some
from lycoris.errors import FileError
from lycoris.layers.geometry import Geometry


class LokrFactors(NamedTuple):
    """How the two factors of a layer are stored.

    w1 is (ol, im), w2 is (O / ol, I / im, *K); each may be split into two matrices.
    """

    geometry: Geometry
    ol: int
    im: int
    rank: int
    w1_split: bool
    w2_split: bool
    tucker: bool


def factorize_like_peft(n: int, factor: int) -> tuple[int, int]:
    """Split n into two factors as PEFT does.

    Unlike LyCORIS' rule, a factor that divides n comes first, even where it is the larger of the two. Otherwise the
    smaller one comes first; -1 asks for the most even split.
    """
    if factor > 0 and n % factor == 0:
        return factor, n // factor
    best = (1, n)
    for m in _divisors(n):
        if best[0] >= best[1] or (m > factor and factor != -1):
            break
        best = m, n // m
    return min(best), max(best)


@lru_cache(maxsize=1024)
def _divisors(n: int) -> tuple[int, ...]:
    small = [m for m in range(1, math.isqrt(n) + 1) if n % m == 0]
    return tuple(sorted({*small, *(n // m for m in small)}))


def find_decompose_factor(layers: Mapping[str, LokrFactors]) -> int:
    """Return the `decompose_factor` for which PEFT makes the shapes of all these layers.

    Raises:
        FileError: None does. The message names the best one and the layers that differ.
    """
    wanted: dict[tuple[int, int], set[str]] = {}
    for path, each in layers.items():
        for pair in ((each.geometry.in_features, each.im), (each.geometry.out_features, each.ol)):
            wanted.setdefault(pair, set()).add(path)
    found = [-1, *range(1, 1 + max(n for n, _ in wanted))]
    for n, m in wanted:
        found = [factor for factor in found if factorize_like_peft(n, factor)[0] == m]
    if found:
        return found[0]
    # The factor that serves the most layers: what it does not is what to tell.
    lost = {
        factor: set().union(*(p for (n, m), p in wanted.items() if factorize_like_peft(n, factor)[0] != m))
        for factor in (-1, *(m for _, m in wanted))
    }
    best = min(lost, key=lambda factor: (len(lost[factor]), factor))
    raise FileError(
        f"PEFT gives all layers of a LoKr one decompose_factor, and none makes the shapes of these: with {best}, "
        f"{len(layers) - len(lost[best])} of {len(layers)} fit, and not {some(sorted(lost[best]))}. Write those into "
        "a folder of their own, train with one factor that divides all sizes, or convert to LoRA"
    )


def choose_lokr_settings(layers: Mapping[str, LokrFactors]) -> tuple[dict[str, object], dict[str, int]]:
    """Return LoKr settings for the config, and the rank to state for each layer.

    PEFT decides by rank whether a factor is split; a layer with unsplit factors gets a rank that keeps them so.

    Raises:
        FileError: No settings reproduce all layers.
    """
    both = any(each.w1_split for each in layers.values())
    effective = any(each.tucker for each in layers.values())
    ranks: dict[str, int] = {}
    off = []
    for path, each in layers.items():
        g = each.geometry
        first, second = max(each.ol, each.im), max(g.out_features // each.ol, g.in_features // each.im)
        whole = not (each.w1_split or each.w2_split)
        rank = ranks[path] = max(first, second) if whole else each.rank
        fits = (both and rank < first / 2) == each.w1_split and (rank < second / 2) == each.w2_split
        plain = g.kind == "conv" and not g.pointwise and each.w2_split and not each.tucker
        if not fits or (effective and plain):
            off.append(path)
    if off:
        raise FileError(
            "PEFT decides by rank and by switches for all layers (decompose_both, use_effective_conv2d) which "
            f"factors of a LoKr are split, and would not split these as they are: {some(sorted(off))}. Write those "
            "into a folder of their own, or convert to LoRA"
        )
    factor = find_decompose_factor(layers)
    return {"decompose_factor": factor, "decompose_both": both, "use_effective_conv2d": effective}, ranks


def is_representable(layer: LokrFactors) -> bool:
    """Return whether PEFT can make the shapes of a layer if it is the only one."""
    try:
        choose_lokr_settings({"": layer})
    except FileError:
        return False
    return True
