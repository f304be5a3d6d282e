"""From one kind of adapter file to another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lycoris.bundle import Bundle
from lycoris.errors import FileError, unknown
from lycoris.files.detect import Detection, judge
from lycoris.files.dialects import DIALECTS
from lycoris.files.families import ARCHITECTURES
from lycoris.files.layout import Layout
from lycoris.files.reading import resolve
from lycoris.files.storage import load_tensors
from lycoris.files.writing import Encoded, write
from lycoris.report import Report

STALE = ("lora_adapter_metadata", "sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Header keys that describe the tensors of the file that was read."""


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how. `str` tells it in lines."""

    detection: Detection
    reports: Mapping[str, Report]
    """By component."""
    written: Encoded

    def __str__(self) -> str:
        lines = [f"from {self.detection.dialect}: {sum(len(each.applied) for each in self.reports.values())} layers"]
        for component, report in self.reports.items():
            name = component or "denoiser"
            lines += [f"{name}: {line}" for line in str(report).splitlines()]
        changed: dict[str, list[str]] = {}
        for layer, note in self.written.notes.items():
            changed.setdefault(note, []).append(layer)
        for note, layers in changed.items():
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            lines.append(f"{layers[0]}{more}: {note}")
        return "\n".join([*lines, f"{len(self.written.tensors)} tensors written"])


def convert(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    to: str,
    *,
    base: nn.Module | None = None,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Write an adapter file anew in another dialect, exactly, or not at all.

    `base` is the denoiser that it is for (one on the meta device serves); None: a known model, recognised by names and
    sizes. Raises `FileError` when the file fits no model, when something in it has no place, or when the dialect
    cannot hold what it has.
    """
    if to not in DIALECTS:
        raise FileError(unknown("dialect", to, DIALECTS))
    tensors, metadata = load_tensors(source)
    try:
        detection = judge({name: tuple(t.shape) for name, t in tensors.items()}, metadata)
        bundles, layouts = bundles_of(tensors, metadata, detection, to, base)
    except FileError as error:
        raise FileError(f"{source}: {error}") from error
    kept = {key: value for key, value in metadata.items() if key not in STALE}
    written = write(bundles, target, to, dtype=dtype, metadata=kept, model=layouts, family=detection.family)
    return Conversion(detection, {name: bundle.report for name, bundle in bundles.items()}, written)


def bundles_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    detection: Detection,
    to: str,
    base: nn.Module | None = None,
) -> tuple[dict[str, Bundle], dict[str, Layout]]:
    """A bundle for each component, in the naming of a dialect so that nothing is taken apart without need."""
    bundles, layouts = {}, {}
    for component in detection.components:
        layout = _layout(detection, component, base)
        assert layout.architecture is not None or base is not None
        if layout.architecture is not None:
            naming = DIALECTS[to].naming_for(layout.architecture.name)
            layout = layout.renamed(naming if naming in layout.namings else "diffusers")
        layouts[component] = layout
        bundles[component] = resolve(
            tensors, layout, detection.dialect, metadata=metadata, component=component, family=detection.family
        )
    return bundles, layouts


def _layout(detection: Detection, component: str, base: nn.Module | None) -> Layout:
    if component == "" and base is not None:
        return Layout.of(base)
    known = detection.models.get(component)
    if known is None:
        what = component or "denoiser"
        raise FileError(
            f"its {what} is of no known model, so that its layers' names cannot be told for certain; give the model "
            "with --base: the folder or the config.json of that denoiser"
        )
    architecture = next(each for each in ARCHITECTURES.values() if known in each.outlines)
    return Layout.known(architecture, known)
