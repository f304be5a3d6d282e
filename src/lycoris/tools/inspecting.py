"""Measure what is in an adapter file: settings, sizes, the strength of each layer, and how many ranks it uses."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from lycoris.adapters.load_report import SHOWN
from lycoris.algorithms import Norm, conversion
from lycoris.algorithms.base import Entry
from lycoris.files.container.model_weights import BaseWeights
from lycoris.layers.geometry import Affine
from lycoris.ops.svd import relative
from lycoris.tools.adapter_file import AdapterFile, LayerLocation
from lycoris.tools.resizing import decompose_entry

NEEDED_ERROR = 0.01
"""Relative error at which ranks are counted as needed."""


class LayerReport(NamedTuple):
    """Settings and measurements of one layer.

    Measurements are None where they do not apply, or depend on base weights that were not given.
    """

    algorithm: str
    rank: int | None
    """As the algorithm counts it; None where it has none."""
    alpha: float | None
    scale: float
    """What ΔW is multiplied by."""
    parameters: int
    dtype: str
    norm: float | None
    """‖ΔW‖ in the Frobenius norm, with the scale; None where it depends on base weights that were not given."""
    relative_norm: float | None
    """‖ΔW‖ / ‖W‖; None without the base's weights."""
    effective_rank: float | None
    """exp of the entropy of the squared singular values, as shares (Roy and Vetterli 2007); None where no spectrum."""
    enough_rank: int | None
    """The least rank with a relative error of at most 1 %."""
    problem: str
    """What is wrong with it, such as "changes nothing"; "" where nothing is."""


@dataclass(frozen=True)
class Inspection:
    """What `inspect` found. `str` gives a summary in lines, `as_dict` everything for JSON."""

    path: str
    format: str
    family: str | None
    models: tuple[str, ...]
    """Known models that it may be for, the likeliest first."""
    bytes: int
    metadata: Mapping[str, str]
    layers: Mapping[LayerLocation, LayerReport]
    unread: Mapping[str, str] = field(default_factory=dict)
    """What could not be read, tensors or layers, and why."""

    @property
    def parameters(self) -> int:
        return sum(each.parameters for each in self.layers.values())

    def find_problems(self) -> dict[str, list[str]]:
        """Return problem → the layers, or tensors, that have it.

        A problem is "changes nothing", or "not read" with the reason.
        """
        found: dict[str, list[str]] = {}
        for layer, each in self.layers.items():
            if each.problem:
                found.setdefault(each.problem, []).append(str(layer))
        for name, why in self.unread.items():
            found.setdefault(f"not read, {why}", []).append(name)
        return found

    def as_dict(self) -> dict[str, Any]:
        """Return everything in types that JSON has.

        Layers are keyed by `str` of their location.
        """
        layers = {str(layer): each._asdict() for layer, each in self.layers.items()}
        own = {"path": self.path, "format": self.format, "family": self.family, "models": list(self.models)}
        return own | {
            "bytes": self.bytes,
            "metadata": dict(self.metadata),
            "layers": layers,
            "unread": dict(self.unread),
        }

    def __str__(self) -> str:
        every = list(self.layers.values())
        kinds = Counter(_describe_settings(each) for each in every)
        components = Counter(layer.component or "denoiser" for layer in self.layers)
        dtypes = Counter(each.dtype for each in every)
        lines = [
            f"format      {self.format}",
            f"for         {self.family or 'no known family'} ({', '.join(self.models[:3]) or 'no known model'})",
            f"size        {self.bytes:,} bytes, {self.parameters:,} parameters in {', '.join(dtypes)}",
            f"layers      {len(every)}: " + ", ".join(f"{count} in the {name}" for name, count in components.items()),
        ]
        lines += [f"            {count} of {name}" for name, count in kinds.most_common(SHOWN)]
        if len(kinds) > SHOWN:
            lines.append(f"            and {len(kinds) - SHOWN} settings more")
        lines += [*self._strength_lines(), *self._rank_lines()]
        for what, where in self.find_problems().items():
            more = f" and {len(where) - 1} more" if len(where) > 1 else ""
            lines.append(f"problem     {what}: {where[0]}{more}")
        if self.metadata:
            lines.append(f"header      {', '.join(list(self.metadata)[:SHOWN])}, {len(self.metadata)} keys in all")
        return "\n".join(lines)

    def _strength_lines(self) -> list[str]:
        shares = {layer: e.relative_norm for layer, e in self.layers.items() if e.relative_norm is not None}
        norms = {layer: e.norm for layer, e in self.layers.items() if e.norm is not None and math.isfinite(e.norm)}
        values, what = (shares, "‖ΔW‖/‖W‖") if shares else (norms, "‖ΔW‖")
        if not values:
            return []
        ordered = sorted(values.items(), key=lambda item: item[1])
        middle = ordered[len(ordered) // 2][1]
        (low, least), (high, most) = ordered[0], ordered[-1]
        return [f"{what:11} median {middle:.3g}, smallest {least:.3g} at {low}, largest {most:.3g} at {high}"]

    def _rank_lines(self) -> list[str]:
        ranked = [each for each in self.layers.values() if each.enough_rank is not None and each.rank is not None]
        if not ranked:
            return []
        needed = sorted(each.enough_rank or 0 for each in ranked)
        used = sorted(each.effective_rank or 0.0 for each in ranked)
        return [
            f"ranks       needed for {NEEDED_ERROR:.0%} error: median {needed[len(needed) // 2]}, "
            f"largest {needed[-1]}; median effective rank {used[len(used) // 2]:.1f}"
        ]


def inspect(
    path: str | os.PathLike[str], *, base: nn.Module | None = None, weights: BaseWeights | None = None
) -> Inspection:
    """Read an adapter file and measure every layer of it.

    Args:
        base: The denoiser it is for, on the meta device; None: a known model.
        weights: The base model's weights. With them, norms are also given relative to the base, and adapters that
            depend on it are measured.

    Raises:
        FileError: The file is damaged or fits no model. Layers that cannot be read are in `unread` instead.
    """
    file = AdapterFile.open(path, base, strict=False)
    detection = file.opened.detection
    layers = {}
    for layer, stack in file.iterate_stacks():
        below = None
        if weights is not None and not layer.component:
            below = weights.affine(layer.path, file.opened.layouts[""])
        for at, entry in enumerate(stack):
            where = layer if not at else layer._replace(path=f"{layer.path} (+{at})")
            layers[where] = _measure_entry(entry, below)
    fits = detection.fits.get("", ())
    models = tuple(str(fit.outline) for fit in fits)
    unread: dict[str, str] = {}
    for bundle in file.opened.bundles.values():
        unread |= {**bundle.report.mismatched, **bundle.report.unused}
    header = dict(file.opened.header)
    return Inspection(str(path), detection.dialect, file.opened.family, models, file.size, header, layers, unread)


def _measure_entry(entry: Entry, below: Affine | None) -> LayerReport:
    algorithm, g = entry.algorithm, entry.geometry
    floating = [t for t in entry.tensors.values() if t.is_floating_point()]
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in floating})
    rank, alpha = getattr(algorithm, "rank", None), getattr(algorithm, "alpha", None)
    own = (str(algorithm.name), rank, alpha, algorithm.scale(g))
    size = sum(t.numel() for t in entry.tensors.values())
    norm, effective, enough = _measure_spectrum(entry, below)
    share = None
    if norm is not None and below is not None:
        share = relative(norm**2, float(below.weight.double().square().sum()))
    problem = "changes nothing" if norm == 0 and not _has_bias(entry) else ""
    return LayerReport(*own, size, "+".join(dtypes), norm, share, effective, enough, problem)


def _measure_spectrum(entry: Entry, below: Affine | None) -> tuple[float | None, float | None, int | None]:
    """‖ΔW‖, effective rank, and the rank that is enough."""
    if isinstance(entry.algorithm, Norm) or entry.geometry.kind == "norm":
        tensor = next(iter(entry.tensors.values()))
        return float(tensor.double().norm()), None, None
    if conversion.needs_base(entry):
        if below is None:
            return None, None, None
        change = conversion.dense(entry, below).tensors["diff"]
        return float(change.double().norm()), None, None
    if entry.geometry.stack or set(entry.tensors) == {"diff_b"}:
        change = conversion.dense(entry).tensors.get("diff", torch.zeros(1))
        return float(change.double().norm()), None, None
    energies = decompose_entry(entry).energies()
    total = float(energies[0])
    if total == 0:
        return 0.0, 0.0, 0
    shares = -energies.diff() / total
    shares = shares[shares > 0]
    effective = float(torch.exp(-(shares * shares.log()).sum()))
    enough = int((energies > NEEDED_ERROR**2 * total).sum())
    return math.sqrt(total), effective, enough


def _has_bias(entry: Entry) -> bool:
    return "diff_b" in entry.tensors and bool(entry.tensors["diff_b"].any())


def _describe_settings(each: LayerReport) -> str:
    rank = "" if each.rank is None else f" rank {each.rank}"
    return f"{each.algorithm}{rank}" + ("" if each.scale == 1 else f", scale {each.scale:.4g}")
