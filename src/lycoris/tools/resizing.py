"""Reduce the ranks of adapters."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lycoris.algorithms import DoRA, Full, LoRA, conversion
from lycoris.algorithms.base import Entry
from lycoris.files.container.model_weights import BaseWeights
from lycoris.files.container.target import check_target
from lycoris.files.placing import Stack
from lycoris.layers.geometry import Affine
from lycoris.ops.svd import Decomposition, decompose, decompose_product, relative
from lycoris.tools.adapter_file import AdapterFile, LayerLocation, count_bytes, measure_on_disk
from lycoris.tools.limits import Limit, Truncatable

MAGNITUDE_SLOT = "magnitude"


class Truncation(NamedTuple):
    """What happened to one layer.

    What it was, the rank of the LoRA that replaces it, and the relative error.
    """

    before: str
    """The algorithm that it had."""
    rank: int
    error: float
    """‖ΔW - ΔW'‖ / ‖ΔW‖ in the Frobenius norm, before the new factors are rounded to their dtype."""


@dataclass(frozen=True)
class Resizing:
    """What `resize` did. `str` gives a summary in lines.

    Each layer of the file is either in `layers` or in `left_alone`.
    """

    layers: Mapping[LayerLocation, Truncation]
    left_alone: Mapping[LayerLocation, str]
    """Layers that stay as they are, and why."""
    error: float
    """√Σ‖ΔW - ΔW'‖² / √Σ‖ΔW‖² over all layers that were truncated."""
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        ranks = sorted(each.rank for each in self.layers.values())
        kinds = Counter(each.before for each in self.layers.values())
        listed = ", ".join(f"{count} of {name}" for name, count in kinds.most_common())
        lines = []
        if ranks:
            lines.append(f"{len(ranks)} layers ({listed}) became LoRA of rank {_format_span(ranks)}")
            worst = sorted(self.layers.items(), key=lambda item: -item[1].error)[:3]
            lines.append(f"relative error {self.error:.2e} in all; largest " + _find_worst(worst))
        for why, count in Counter(self.left_alone.values()).most_common():
            lines.append(f"{count} layers left as they are: {why}")
        share = self.bytes_after / self.bytes_before
        return "\n".join([*lines, f"{self.bytes_before:,} bytes became {self.bytes_after:,} ({share:.0%})"])


def _format_span(ranks: list[int]) -> str:
    return str(ranks[0]) if ranks[0] == ranks[-1] else f"{ranks[0]} to {ranks[-1]}, median {ranks[len(ranks) // 2]}"


def _find_worst(layers: list[tuple[LayerLocation, Truncation]]) -> str:
    return ", ".join(f"{each.error:.2e} at {layer} (rank {each.rank})" for layer, each in layers)


def resize(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    limit: Limit,
    *,
    base: nn.Module | None = None,
    weights: BaseWeights | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> Resizing:
    """Write an adapter file again with every low-rank change as a LoRA of fewer ranks, the best ones of their rank.

    LoRA, LoHa and LoKr are decomposed through their factors, never through ΔW where those are thin: a LoHa of rank r is
    a LoRA of rank r², a LoKr with a low-rank second factor one of rank f·r. Scales go into the factors: every alpha is
    the rank. Of DoRA the change underneath is truncated and its magnitude fitted again to the adapted weight, for which
    the base's `weights` are needed. A layer that is no larger as it is stays as it is, and so do norms, biases, whole
    differences, T-LoRA, and other changes that depend on the base's weights; the result says which and why.

    `dtype` is that of the written tensors; None: each layer's own. Raises `FileError` as `convert` does, and
    `ConfigError` for a size that is too small.
    """
    check_target(target, [Path(source)], overwrite=overwrite)
    file = AdapterFile.open(source, base)
    left_alone = {
        layer: why for layer, stack in file.iterate_stacks() if (why := _reason_to_leave(layer, stack, weights))
    }
    entries = {layer: stack[0] for layer, stack in file.iterate_stacks() if layer not in left_alone}
    found = {layer: decompose_entry(_below_magnitude(entry)) for layer, entry in entries.items()}
    sizes = {str(layer): _make_truncatable(each, entries[layer], dtype) for layer, each in found.items()}
    overhead = file.size - sum(count_bytes(_below_magnitude(entry)) for entry in entries.values())
    ranks = limit.choose_ranks(sizes, overhead)
    stacks, done, errors, norms = dict[LayerLocation, Stack](), dict[LayerLocation, Truncation](), 0.0, 0.0
    for layer, stack in file.iterate_stacks():
        stacks[layer] = stack
        if layer in left_alone:
            continue
        size, rank = sizes[str(layer)], ranks[str(layer)]
        if rank * size.bytes_per_rank >= count_bytes(_below_magnitude(stack[0])):
            left_alone[layer] = "no smaller as a LoRA of that rank"
            continue
        below = None
        if weights is not None and isinstance(stack[0].algorithm, DoRA):
            below = weights.affine(layer.path, file.opened.layouts[layer.component])
        stacks[layer] = (_truncate_entry(stack[0], found[layer], rank, below),)
        error, norm = float(size.energies[rank]), float(size.energies[0])
        errors, norms = errors + error, norms + norm
        done[layer] = Truncation(stack[0].algorithm.name, rank, relative(error, norm))
    file.write(target, stacks, dtype=dtype)
    return Resizing(done, left_alone, relative(errors, norms), file.size, measure_on_disk(Path(target)))


def _below_magnitude(entry: Entry) -> Entry:
    """What adds to the weight: the algorithm itself, or the one under DoRA."""
    if not isinstance(entry.algorithm, DoRA):
        return entry
    tensors = {name: tensor for name, tensor in entry.tensors.items() if name != MAGNITUDE_SLOT}
    return Entry(entry.algorithm.inner, entry.geometry, tensors)


def _truncate_entry(entry: Entry, found: Decomposition, rank: int, below: Affine | None) -> Entry:
    """The first ranks of an entry; of DoRA with a magnitude fitted to the adapted weight by least squares."""
    inner = truncate_to_lora(found, rank, _below_magnitude(entry))
    if not isinstance(entry.algorithm, DoRA):
        return inner
    assert below is not None
    wanted = conversion.adapt_affine(entry, below).weight
    assert isinstance(inner.algorithm, LoRA)
    magnitude = entry.tensors[MAGNITUDE_SLOT]
    unit = Entry(replace(entry.algorithm, inner=inner.algorithm), entry.geometry, dict(inner.tensors))
    ones = unit._replace(tensors={**unit.tensors, MAGNITUDE_SLOT: torch.ones_like(magnitude, dtype=wanted.dtype)})
    directions = conversion.adapt_affine(ones, below).weight
    axis = 0 if entry.algorithm.axis == "out" else 1
    others = [n for n in range(wanted.dim()) if n != axis]
    fitted = (directions * wanted).sum(others) / directions.square().sum(others).clamp_min(
        torch.finfo(wanted.dtype).tiny
    )
    return unit._replace(tensors={**unit.tensors, MAGNITUDE_SLOT: fitted.reshape(magnitude.shape).to(magnitude.dtype)})


def decompose_entry(entry: Entry) -> Decomposition:
    """Return the singular value decomposition of an adapter's ΔW, scale included, as (O, I·ΠK).

    Computed from the factors where there are some, without building ΔW.
    """
    factors = conversion.low_rank(entry, always=True)
    if factors is None:
        change = conversion.dense(entry)
        return decompose(_widen_to_float32(change.geometry.transpose_stored(change.tensors["diff"])).flatten(1))
    up, down = (
        _widen_to_float32(factors.tensors["up"]).flatten(1),
        _widen_to_float32(factors.tensors["down"]).flatten(1),
    )
    return decompose_product(up * factors.algorithm.scale(factors.geometry), down)


def truncate_to_lora(found: Decomposition, rank: int, like: Entry) -> Entry:
    """Return the first ranks of a decomposition as a LoRA with a scale of 1.

    `like` gives the layer and the dtype of the tensors.
    """
    g, ones = like.geometry, (1,) * len(like.geometry.kernel)
    dtype = next(t.dtype for t in like.tensors.values() if t.is_floating_point())
    up, down = found.factors(rank)
    tensors = {"up": up.reshape(g.out_features, rank, *ones), "down": down.reshape(rank, *g.shape[1:])}
    return Entry(LoRA(rank=rank, alpha=float(rank)), g, {name: t.to(dtype).contiguous() for name, t in tensors.items()})


def _reason_to_leave(layer: LayerLocation, stack: Stack, weights: BaseWeights | None) -> str:
    """Why a layer's adapters are not truncated; "" where they are."""
    if len(stack) > 1:
        return f"{' and '.join(each.algorithm.name for each in stack)} on one layer"
    entry = stack[0]
    if isinstance(entry.algorithm, Full):
        return "full differences have no factors"
    if entry.geometry.kind == "norm":
        return "norms have no rank"
    if entry.geometry.stack:
        return "stacked matrices"
    if entry.algorithm.uses_rank_mask:
        return f"the ranks of {entry.algorithm.name} follow the timestep, in an order that a truncation would lose"
    if isinstance(entry.algorithm, DoRA) and not conversion.needs_base(_below_magnitude(entry)):
        return "" if weights is not None and not layer.component else "dora needs the base model's weights for that"
    if conversion.needs_base(entry):
        return f"{entry.algorithm.name} depends on the base model's weights"
    return ""


def _make_truncatable(found: Decomposition, entry: Entry, dtype: torch.dtype | None) -> Truncatable:
    own = dtype or next(t.dtype for t in entry.tensors.values() if t.is_floating_point())
    g = entry.geometry
    return Truncatable(found.energies(), (g.out_features + g.fan_in) * own.itemsize)


def _widen_to_float32(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
