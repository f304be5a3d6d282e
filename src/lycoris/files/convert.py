"""From one kind of adapter file to another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lycoris import recast
from lycoris.bundle import Bundle, Entry
from lycoris.errors import FileError, PlanError, unknown
from lycoris.files import placing
from lycoris.files.components import family_of
from lycoris.files.consumers import CONSUMERS
from lycoris.files.detect import Detection, ambiguous, judge
from lycoris.files.dialect import Style, flatten
from lycoris.files.dialects import DIALECTS
from lycoris.files.families import FAMILIES
from lycoris.files.layout import Layout
from lycoris.files.peft import write_peft
from lycoris.files.peft.config import WEIGHTS
from lycoris.files.portable import plain
from lycoris.files.portable import portable as portable_entry
from lycoris.files.reading import resolve_as_written
from lycoris.files.recognise import Fit
from lycoris.files.skeleton import namings
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
    assumed: Mapping[str, str]
    """Component → the known model that it was taken to be for, where none was given."""

    def __str__(self) -> str:
        found = self.detection
        lines = [f"from {found.dialect}: {sum(len(each.applied) for each in self.reports.values())} layers"]
        if self.assumed:
            models = ", ".join(f"{name or 'denoiser'} {model}" for name, model in self.assumed.items())
            lines.append(f"taken to be for {found.family or models} ({models}; {found.confidence})")
        lines += found.remarks
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
        assumed = {name: model for name, model in detection.models.items() if name or base is None}
        bundles, layouts, family = bundles_of(tensors, metadata, detection, base)
        for name in assumed:
            _check_sure(detection, name, bundles[name], to)
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
        written = write(bundles, target, to, dtype=dtype, metadata=kept(metadata), model=layouts, family=family)
    written = written._replace(notes={**done, **written.notes})
    return Conversion(detection, {name: bundle.report for name, bundle in bundles.items()}, written, assumed)


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


class Bundles(NamedTuple):
    """What a file has for each component of a pipeline, under the names of layers that it has itself."""

    bundles: dict[str, Bundle]
    layouts: dict[str, Layout]
    family: str | None


def bundles_of(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str],
    detection: Detection,
    base: nn.Module | None = None,
) -> Bundles:
    """The bundles of a file for the models that it was taken to be for, and for the denoiser if that is given."""
    bundles, layouts = {}, {}
    given = None if base is None else Layout.of(base)
    family = detection.family if given is None else _family(detection, given)
    for component in detection.components:
        layout = given if given is not None and component == "" else _assumed(detection, component)
        bundles[component], layouts[component] = resolve_as_written(
            tensors, layout, detection.dialect, metadata, component, family
        )
    return Bundles(bundles, layouts, family)


def _family(detection: Detection, denoiser: Layout) -> str | None:
    """The family of a file whose denoiser is known."""
    architecture = denoiser.architecture
    named = FAMILIES.get(detection.family or "")
    if named is not None and (architecture is None or named.components.get("") == architecture.name):
        return named.name
    found = family_of({"": architecture})
    return None if found is None else found.name


def _assumed(detection: Detection, component: str) -> Layout:
    found = detection.fits[component]
    if not found:
        what = component or "denoiser"
        raise FileError(
            f"its {what} is of no known model, so that its layers' names cannot be told for certain; give the model "
            "with --base: the folder or the config.json of that denoiser"
        )
    return _layout(found[0])


def _layout(fit: Fit) -> Layout:
    assert fit.outline is not None
    return Layout.known(fit.architecture, fit.outline)


def _check_sure(detection: Detection, component: str, bundle: Bundle, to: str) -> None:
    """Raise `FileError` when another model that a file may be for would get other names."""
    style = DIALECTS[detection.dialect].style
    best, *_ = found = detection.fits[component]
    for other in ambiguous(found):
        own, its = _names(best, bundle, style, to), _names(other, bundle, style, to)
        differing = next((layer for layer in own if own[layer] != its[layer]), None)
        if differing is not None:
            raise FileError(
                f"its layers may be of {best.outline} or of {other.outline}, and {to} files call {differing} "
                f"{' and '.join(own[differing])} for the one, {' and '.join(its[differing])} for the other. Say which "
                f"it is for: --base {best.outline} or --base {other.outline}"
            )


def _names(fit: Fit, bundle: Bundle, style: Style, to: str) -> dict[str, list[str]]:
    """Layer → what a dialect calls its parts, if the file is for this model."""
    layout, target = _layout(fit), DIALECTS[to].naming_for(fit.architecture)
    home = namings(fit.architecture)[target].home
    names, spans = layout.written(fit.naming, style), layout.spans(fit.naming)
    spelled = flatten if style == "flat" else str
    written = flatten if DIALECTS[to].style == "flat" else str
    return {
        layer: [written(home(part) or part) for part in spans[names[spelled(layer)]].parts] for layer in bundle.entries
    }
