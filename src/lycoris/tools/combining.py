"""Combine several adapter files into one."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lycoris.adapters.bundle import Bundle
from lycoris.algorithms import Full, LoRA, Norm, conversion
from lycoris.algorithms.base import Entry
from lycoris.algorithms.ranked import Ranked
from lycoris.errors import ConfigError, FileError
from lycoris.files import placing
from lycoris.files.container.target import check_target
from lycoris.files.layout import NamedLayout
from lycoris.files.placing import Stack
from lycoris.ops.svd import relative
from lycoris.tools.adapter_file import AdapterFile, LayerLocation, count_bytes, measure_on_disk
from lycoris.tools.resizing import decompose_entry, truncate_to_lora

MAX_COMBINED_GROWTH = 1.1
"""How much larger than all files together a result may be unasked."""


class WeightedEntry(NamedTuple):
    """An adapter of a layer, and the strength it is added with."""

    strength: float
    entry: Entry


@dataclass(frozen=True)
class Combination:
    """What `combine` did. `str` gives a summary in lines.

    Layers that were only scaled, or kept, are listed in `forms` too; only truncated ones in `errors`.
    """

    forms: Mapping[LayerLocation, str]
    """Layer → what its adapters became."""
    errors: Mapping[LayerLocation, float]
    """Layer → relative error, for those that were truncated to a rank."""
    bytes_before: int
    """Of all files together."""
    bytes_after: int

    def __str__(self) -> str:
        lines = [f"{count} layers: {form}" for form, count in Counter(self.forms.values()).most_common()]
        if self.errors:
            layer, worst = max(self.errors.items(), key=lambda item: item[1])
            lines.append(f"relative error up to {worst:.2e}, at {layer}")
        return "\n".join([*lines, f"{self.bytes_before:,} bytes became {self.bytes_after:,}"])


def combine(
    sources: Sequence[tuple[str | os.PathLike[str], float]],
    target: str | os.PathLike[str],
    *,
    rank: int | None = None,
    base: nn.Module | None = None,
    dtype: torch.dtype | None = None,
    allow_growth: bool = False,
    overwrite: bool = False,
) -> Combination:
    """Write one adapter file that is the sum of several: ΔW = Σ strength · ΔW.

    Exact unless `rank` is given. A layer that only one file has keeps its algorithm; others become a LoRA with the
    ranks of all, or a dense difference where that is smaller. The result has the format of the first file.

    Args:
        sources: Files and their strengths. A strength of 0 is refused, since some programs take it for a missing alpha.
        rank: Truncate each sum of several adapters to the best LoRA of this rank.
        base: The denoiser they are for, on the meta device; None: a known model.
        dtype: Of the stored tensors; None: unchanged.
        allow_growth: Whether the result may be more than 10 % larger than all files together.
        overwrite: Whether to replace an existing target.

    Raises:
        ConfigError: A strength is 0 or not finite, `rank` is less than 1, or there is no file.
        FileError: The files are for different models, a sum depends on the base's weights (two DoRA on one layer, or
            one at a strength other than 1), or the result would be too large.
    """
    if not sources:
        raise ConfigError("no file to combine was given")
    if rank is not None and rank < 1:
        raise ConfigError(f"rank is at least 1, not {rank}")
    for path, strength in sources:
        if not math.isfinite(strength) or strength == 0:
            raise ConfigError(
                f"the strength of {path} is {strength}: give a number other than 0, or leave the file out"
            )
    check_target(target, [Path(path) for path, _ in sources], overwrite=overwrite)
    files = [(AdapterFile.open(path, base), float(strength)) for path, strength in sources]
    first = _with_components(files[0][0], [file for file, _ in files[1:]])
    parts: dict[LayerLocation, list[tuple[float, Stack]]] = {}
    for file, strength in files:
        for layer, stack in _renamed_like(file, first):
            parts.setdefault(layer, []).append((strength, stack))
    stacks, forms, errors = dict[LayerLocation, Stack](), dict[LayerLocation, str](), dict[LayerLocation, float]()
    for layer, given in parts.items():
        stacks[layer] = _add_stacks_up(given, str(layer))
        if rank is not None and len(given) > 1 and _has_rank(stacks[layer][0]):
            stacks[layer], errors[layer] = _truncate_stack(stacks[layer], rank)
        forms[layer] = _describe_result(given, stacks[layer])
    _check_growth(stacks, [file for file, _ in files], allow_growth)
    first.write(target, stacks, dtype=dtype)
    return Combination(forms, errors, sum(file.size for file, _ in files), measure_on_disk(Path(target)))


def scale_entry(entry: Entry, strength: float, where: str) -> Entry:
    """Return an adapter that does at strength 1 what this one does at `strength`.

    Raises:
        FileError: The change is not proportional to any of its tensors, as for rotations and DoRA.
    """
    if strength == 1:
        return entry
    algorithm, tensors = entry.algorithm, entry.tensors
    if isinstance(algorithm, Full | Norm):
        return entry._replace(
            tensors={name: _multiply_in_float32(tensor, strength) for name, tensor in tensors.items()}
        )
    if isinstance(algorithm, Ranked) and not conversion.needs_base(entry):
        stronger = replace(algorithm, alpha=algorithm.rank * strength * algorithm.scale(entry.geometry), rs_lora=False)
        if math.isclose(stronger.scale(entry.geometry), strength * algorithm.scale(entry.geometry), rel_tol=1e-12):
            return entry._replace(algorithm=stronger)
        # As a scalar, which files hold folded into a factor.
        gated, scalar = replace(algorithm, use_scalar=True), torch.tensor(strength, dtype=torch.float64)
        wide = {name: _widen_tensor(tensor) for name, tensor in tensors.items()}
        wide["scalar"] = wide["scalar"] * scalar if "scalar" in wide else scalar
        return Entry(replace(algorithm, use_scalar=False), entry.geometry, gated.export_tensors(wide, entry.geometry))
    raise FileError(
        f"{where}: no {algorithm.name} does at strength 1 what this one does at {strength}; merge it into the base "
        "model instead"
    )


def _add_stacks_up(given: list[tuple[float, Stack]], where: str) -> Stack:
    """One stack for a layer, from those of several files."""
    if len(given) == 1:
        strength, stack = given[0]
        return tuple(scale_entry(entry, strength, where) for entry in stack)
    terms = [WeightedEntry(strength, entry) for strength, stack in given for entry in stack]
    bound = sorted({term.entry.algorithm.name for term in terms if conversion.needs_base(term.entry)})
    if bound:
        raise FileError(
            f"{where}: {' and '.join(bound)} depends on the base model's weights, and so does its sum with others; "
            "merge them into the base model one after the other instead"
        )
    masked = sorted({term.entry.algorithm.name for term in terms if term.entry.algorithm.uses_rank_mask})
    if masked:
        raise FileError(f"{where}: the ranks of {masked[0]} follow the timestep, which its sum with others would lose")
    scaled = [scale_entry(term.entry, term.strength, where) for term in terms]
    if all(isinstance(entry.algorithm, Norm) for entry in scaled):
        return (scaled[0]._replace(tensors=_sum_tensors([entry.tensors for entry in scaled])),)
    biases = [entry.tensors["diff_b"] for entry in scaled if "diff_b" in entry.tensors]
    weights = [_without_bias(entry) for entry in scaled if set(entry.tensors) != {"diff_b"}]
    stack = (_concatenate_factors(weights),) if weights else ()
    if not biases:
        return stack
    bias = _sum_tensors([{"diff_b": each} for each in biases])["diff_b"]
    if stack and isinstance(stack[0].algorithm, Full):
        return (stack[0]._replace(algorithm=Full(), tensors={**stack[0].tensors, "diff_b": bias}),)
    return (*stack, Entry(Full(weight=False), scaled[0].geometry, {"diff_b": bias}))


def _without_bias(entry: Entry) -> Entry:
    if "diff_b" not in entry.tensors:
        return entry
    return entry._replace(algorithm=Full(bias=False), tensors={"diff": entry.tensors["diff"]})


def _concatenate_factors(entries: list[Entry]) -> Entry:
    """The sum as a LoRA with the ranks of all, or as a dense difference where that is smaller."""
    g = entries[0].geometry
    factors = [conversion.low_rank(entry, always=True) for entry in entries]
    pairs = [each for each in factors if each is not None]
    total = sum(each.tensors["down"].shape[0] for each in pairs)
    if g.stack or len(pairs) < len(entries) or total * (g.out_features + g.fan_in) >= g.size:
        dense = [{"diff": conversion.dense(entry).tensors["diff"]} for entry in entries]
        return Entry(Full(bias=False), g, _sum_tensors(dense))
    ups = [_multiply_in_float32(each.tensors["up"], each.algorithm.scale(g)) for each in pairs]
    tensors = {"up": torch.cat(ups, dim=1), "down": torch.cat([each.tensors["down"] for each in pairs])}
    return Entry(LoRA(rank=total, alpha=float(total)), g, tensors)


def _check_growth(stacks: Mapping[LayerLocation, Stack], files: Sequence[AdapterFile], allowed: bool) -> None:
    before, after = sum(file.size for file in files), sum(count_bytes(*stack) for stack in stacks.values())
    if after > MAX_COMBINED_GROWTH * before and not allowed:
        raise FileError(
            f"the sum takes {after:,} bytes, and the files together {before:,}: give a rank that it is truncated to "
            "(--rank), or accept the size (--allow-growth, in Python allow_growth=True)"
        )


def _has_rank(entry: Entry) -> bool:
    return not isinstance(entry.algorithm, Norm) and not entry.geometry.stack and set(entry.tensors) != {"diff_b"}


def _truncate_stack(stack: Stack, rank: int) -> tuple[Stack, float]:
    """The first of a stack as a LoRA of at most that rank, and the relative error."""
    entry, rest = stack[0], stack[1:]
    if "diff_b" in entry.tensors:
        rest = (Entry(Full(weight=False), entry.geometry, {"diff_b": entry.tensors["diff_b"]}), *rest)
        entry = _without_bias(entry)
    found = decompose_entry(entry)
    energies = found.energies()
    kept = min(rank, len(found.values))
    return (truncate_to_lora(found, kept, entry), *rest), relative(float(energies[kept]), float(energies[0]))


def _describe_result(given: list[tuple[float, Stack]], stack: Stack) -> str:
    names = [entry.algorithm.name for _, each in given for entry in each]
    if len(given) == 1:
        return f"{' and '.join(names)}, as it was" + (f", times {given[0][0]:g}" if given[0][0] != 1 else "")
    result = stack[0].algorithm
    became = f"LoRA of rank {result.rank}" if isinstance(result, LoRA) else f"one {result.name}"
    return f"{' + '.join(names)} became {became}"


def _with_components(first: AdapterFile, others: list[AdapterFile]) -> AdapterFile:
    """The first file, as one that could have the components of all."""
    bundles, layouts = dict[str, Bundle](), dict[str, NamedLayout]()
    for file in (*reversed(others), first):
        bundles |= file.opened.bundles
        layouts |= file.opened.layouts
    return replace(first, opened=first.opened._replace(bundles=bundles, layouts=layouts))


def _renamed_like(file: AdapterFile, first: AdapterFile) -> list[tuple[LayerLocation, Stack]]:
    """The layers of a file under the names that another has for them. Raises `FileError` where it has none."""
    found = []
    for component, bundle in file.opened.bundles.items():
        own, other = file.opened.layouts[component], first.opened.layouts[component]
        lacking = [path for path, g in own.layers.items() if path in bundle.entries and other.layers.get(path) != g]
        if own.architecture is not other.architecture or (own.architecture is None and lacking):
            raise FileError(
                f"{file.path} is for {own.model_name} and {first.path} for {other.model_name}, which has other layers"
            )
        places = placing.place_stacks(bundle.entries, other, own.naming, dense=False)
        if places.refused:
            layer, why = next(iter(places.refused.items()))
            raise FileError(f"{file.path}: {layer}: {why}")
        found += [(LayerLocation(component, path), stack) for path, stack in places.entries.items()]
    return found


def _multiply_in_float32(tensor: Tensor, factor: float) -> Tensor:
    """In at least float32, so that nothing is rounded twice."""
    return tensor if factor == 1 else _widen_tensor(tensor) * factor


def _widen_tensor(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32)) if tensor.is_floating_point() else tensor


def _sum_tensors(tensors: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """By name, in at least float32; a name that some lack is nothing there."""
    found: dict[str, Tensor] = {}
    for name, tensor in (pair for each in tensors for pair in each.items()):
        wide = _widen_tensor(tensor)
        found[name] = found[name] + wide if name in found else wide
    return found
