"""From one kind of adapter file to another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from lycoris import recast
from lycoris.bundle import Bundle, Entry
from lycoris.errors import FileError, PlanError, unknown
from lycoris.files import placing
from lycoris.files.consumers import CONSUMERS
from lycoris.files.detect import Detection, judge
from lycoris.files.dialects import DIALECTS
from lycoris.files.families import ARCHITECTURES
from lycoris.files.layout import Layout
from lycoris.files.peft import write_peft
from lycoris.files.peft.config import WEIGHTS
from lycoris.files.portable import plain
from lycoris.files.portable import portable as portable_entry
from lycoris.files.reading import resolve_as_written
from lycoris.files.storage import load_tensors
from lycoris.files.weights import BaseWeights
from lycoris.files.writing import Encoded, kept, write
from lycoris.report import Report


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
    to: str | None = None,
    *,
    portable: str | None = None,
    base: nn.Module | None = None,
    weights: BaseWeights | None = None,
    dtype: torch.dtype | None = None,
) -> Conversion:
    """Write an adapter file anew in another dialect, exactly, or not at all.

    `portable` names a program that reads it as trained then: adapters that it would take for something else are written
    otherwise, and where that depends on the base model, by its `weights`. `to` is the dialect, None: the usual one of
    that program. `base` is the denoiser that the file is for (one on the meta device serves); None: a known model,
    recognised by names and sizes.

    Raises `FileError` when the file fits no model, when something in it has no place, or when the dialect or the
    program cannot hold what it has.
    """
    to = _dialect(to, portable)
    tensors, metadata = load_tensors(source)
    try:
        detection = judge({name: tuple(t.shape) for name, t in tensors.items()}, metadata)
        bundles, layouts = bundles_of(tensors, metadata, detection, base)
    except FileError as error:
        raise FileError(f"{source}: {error}") from error
    done: dict[str, str] = {}
    if portable is not None:
        bundles = {
            name: _portable(bundle, portable, layouts[name], None if name else weights, done)
            for name, bundle in bundles.items()
        }
    if weights is not None and not DIALECTS[to].folder:
        bundles[""] = _free(bundles[""], to, layouts[""], weights, done)
    if DIALECTS[to].folder:
        written = _write_folder(bundles, target, dtype)
    else:
        written = write(
            bundles, target, to, dtype=dtype, metadata=kept(metadata), model=layouts, family=detection.family
        )
    written = written._replace(notes={**done, **written.notes})
    return Conversion(detection, {name: bundle.report for name, bundle in bundles.items()}, written)


def _dialect(to: str | None, portable: str | None) -> str:
    if portable is not None and portable not in CONSUMERS:
        raise FileError(unknown("program", portable, CONSUMERS))
    if to is None and portable is None:
        raise FileError(f"say what to convert to: a dialect ({', '.join(DIALECTS)}) or the program that is to read it")
    to = to or next(iter(CONSUMERS[portable or ""].keys))
    if to not in DIALECTS:
        raise FileError(unknown("dialect", to, DIALECTS))
    return to


def _portable(
    bundle: Bundle, program: str, layout: Layout, weights: BaseWeights | None, done: dict[str, str]
) -> Bundle:
    """Every adapter as a program reads it as trained; what was done to which is put into `done`."""
    entries, problems = {}, {}
    for layer, stack in bundle.entries.items():
        made = []
        for entry in stack:
            try:
                one, what = _exported(entry, program, layer, layout, weights)
            except FileError as error:
                problems[layer] = str(error)
                break
            made.append(one)
            if what != "nothing":
                done[layer] = f"{entry.algorithm.name} {what}"
        entries[layer] = tuple(made)
    if problems:
        first, why = next(iter(problems.items()))
        raise FileError(f"{len(problems)} layers cannot be written for {program}, such as {first}: {why}")
    return replace(bundle, entries=entries)


def _free(bundle: Bundle, to: str, layout: Layout, weights: BaseWeights, done: dict[str, str]) -> Bundle:
    """Without what only the base weight determines, where layers are cut or joined for a dialect."""
    if layout.architecture is None:
        return bundle
    refused = placing.place(
        bundle.entries, layout.renamed(DIALECTS[to].naming_for(layout.architecture)), layout.naming
    ).refused
    if not refused:
        return bundle
    entries = dict(bundle.entries)
    for layer, stack in entries.items():
        if any(recast.needs_base(entry) for entry in stack):
            entries[layer] = tuple(plain(entry, weights.affine(layer, layout)) for entry in stack)
            done[layer] = f"{stack[0].algorithm.name} written as a LoRA or a difference, for its layer is cut or joined"
    return replace(bundle, entries=entries)


def _exported(entry: Entry, program: str, layer: str, layout: Layout, weights: BaseWeights | None) -> tuple[Entry, str]:
    try:
        return portable_entry(entry, program)
    except PlanError as error:
        if weights is None:
            raise FileError(
                f"what {program} would need of {entry.algorithm.name} depends on the base model's weights: give the "
                "folder that they are in (--base)"
            ) from error
        return portable_entry(entry, program, weights.affine(layer, layout))


def _write_folder(bundles: Mapping[str, Bundle], target: str | os.PathLike[str], dtype: torch.dtype | None) -> Encoded:
    if set(bundles) != {""}:
        names = ", ".join(name or "the denoiser" for name in bundles)
        raise FileError(f"a folder of PEFT's holds the adapters of one model, and this file has those of {names}")
    write_peft(bundles[""], target, dtype=dtype)
    return Encoded(load_tensors(Path(target) / WEIGHTS)[0], {}, {})


def bundles_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    detection: Detection,
    base: nn.Module | None = None,
) -> tuple[dict[str, Bundle], dict[str, Layout]]:
    """A bundle for each component, under the names of layers that the file has."""
    bundles, layouts = {}, {}
    for component in detection.components:
        bundles[component], layouts[component] = resolve_as_written(
            tensors, _layout(detection, component, base), detection.dialect, metadata, component, detection.family
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
