"""From one kind of adapter file to another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from lycoris import fingerprint, recast
from lycoris.bundle import Bundle, Entry
from lycoris.errors import FileError, PlanError, unknown
from lycoris.files import placing
from lycoris.files.components import FAMILY
from lycoris.files.consumers import CONSUMERS
from lycoris.files.detect import Detection, ambiguous
from lycoris.files.dialect import Style, flatten
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import Layout
from lycoris.files.opening import Opened, known, opened
from lycoris.files.peft import write_peft
from lycoris.files.peft.config import WEIGHTS
from lycoris.files.portable import plain
from lycoris.files.portable import portable as portable_entry
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
    assumed: Mapping[str, str]
    """Component → the known model that it was taken to be for, where none was given."""
    written: Encoded

    def __str__(self) -> str:
        found = self.detection
        lines = [f"from {found.dialect}: {sum(len(each.applied) for each in self.reports.values())} layers"]
        if self.assumed:
            models = ", ".join(f"{name or 'denoiser'} {model}" for name, model in self.assumed.items())
            told = f"{found.family} ({models})" if found.family else models
            lines.append(f"taken to be for {told}; {found.confidence}")
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
    strict: bool = True,
) -> Conversion:
    """Write an adapter file anew in another dialect, exactly, or not at all.

    `portable` names a program that reads it as trained then: adapters that it would take for something else are written
    otherwise, and where that depends on the base model, by its `weights`. `to` is the dialect, None: the usual one of
    that program. `base` is the denoiser that the file is for (one on the meta device serves); None: a known model,
    recognised by names and sizes. With `strict=False` what has no place is left out, and the report tells it.

    Raises `FileError` when the file fits no model, when something in it has no place, when it may be for several models
    whose names differ, or when the dialect or the program cannot hold what it has.
    """
    _check_asked(to, portable)
    found = opened(source, base, strict=strict)
    to = to or _usual(portable or "", found)
    bundles, layouts, done = found.bundles, found.layouts, dict[str, str]()
    try:
        for name in found.assumed:
            _check_sure(found.detection, name, bundles[name], to)
    except FileError as error:
        raise FileError(f"{source}: {error}") from error
    reports = {name: bundle.report for name, bundle in bundles.items()}
    if portable is not None:
        _check_known(to, portable, found)
        bundles = {
            name: _portable(bundle, portable, to, layouts[name], None if name else weights, done)
            for name, bundle in bundles.items()
        }
    if weights is not None and "" in bundles and not DIALECTS[to].folder:
        bundles[""] = _free(bundles[""], to, layouts[""], weights, done)
    if DIALECTS[to].folder:
        written = _write_folder(bundles, target, dtype)
    else:
        header = _header(found)
        written = write(bundles, target, to, dtype=dtype, metadata=header, model=layouts, family=found.family)
    return Conversion(found.detection, reports, found.assumed, written._replace(notes={**done, **written.notes}))


def _header(found: Opened) -> dict[str, str]:
    """What of the file's header stays true; which base it says that it is for, if it is for that."""
    header = {key: value for key, value in kept(found.header).items() if key != FAMILY}
    layout = found.layouts.get("")
    if layout is not None and fingerprint.other_layers(header, layout.owner, layout.layers, layout.middle):
        del header[fingerprint.KEY]
    return header


def _check_asked(to: str | None, portable: str | None) -> None:
    if portable is not None and portable not in CONSUMERS:
        raise FileError(unknown("program", portable, CONSUMERS))
    if to is None and portable is None:
        raise FileError(f"say what to convert to: a dialect ({', '.join(DIALECTS)}) or the program that is to read it")
    if to is not None and to not in DIALECTS:
        raise FileError(unknown("dialect", to, DIALECTS))


def _usual(program: str, found: Opened) -> str:
    """The dialect to write for a program."""
    return next(iter(_known_to(program, found)), next(iter(CONSUMERS[program].keys)))


def _known_to(program: str, found: Opened) -> list[str]:
    """The dialects in which a program knows the keys of a file's denoiser."""
    architecture = found.layouts[""].architecture if "" in found.layouts else None
    keys = CONSUMERS[program].keys
    return [each for each in keys if architecture is None or CONSUMERS[program].known(each, architecture.name)]


def _check_known(to: str, program: str, found: Opened) -> None:
    """Raise `FileError` when a program does not know the keys that a dialect has for a model."""
    dialects = _known_to(program, found)
    if to not in dialects:
        raise FileError(
            f"{CONSUMERS[program].title} does not know keys of the format {to} for this model; it knows "
            f"{', '.join(dialects) or 'no format for it'}"
        )


def _portable(
    bundle: Bundle, program: str, to: str, layout: Layout, weights: BaseWeights | None, done: dict[str, str]
) -> Bundle:
    """Every adapter as a program reads it as trained; what was done to which is put into `done`."""
    entries, problems = {}, {}
    for layer, stack in bundle.entries.items():
        made = []
        for entry in stack:
            try:
                one, what = _exported(entry, program, to, layer, layout, weights)
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


def _exported(
    entry: Entry, program: str, to: str, layer: str, layout: Layout, weights: BaseWeights | None
) -> tuple[Entry, str]:
    architecture = None if layout.architecture is None else layout.architecture.name
    export = partial(portable_entry, entry, program, dialect=to, architecture=architecture)
    try:
        return export()
    except PlanError as error:
        if weights is None:
            raise FileError(
                f"what {program} would need of {entry.algorithm.name} depends on the base model's weights: give the "
                "folder that they are in (--base)"
            ) from error
        return export(base=weights.affine(layer, layout))


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


def _write_folder(bundles: Mapping[str, Bundle], target: str | os.PathLike[str], dtype: torch.dtype | None) -> Encoded:
    if set(bundles) != {""}:
        names = ", ".join(name or "the denoiser" for name in bundles)
        raise FileError(f"a folder of PEFT's holds the adapters of one model, and this file has those of {names}")
    write_peft(bundles[""], target, dtype=dtype)
    return Encoded(load_tensors(Path(target) / WEIGHTS)[0], {}, {})


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
                f"{' and '.join(own[differing])} for the one, {' and '.join(its[differing])} for the other. "
                f"Say which it is for: --base {best.outline} or --base {other.outline}"
            )


def _names(fit: Fit, bundle: Bundle, style: Style, to: str) -> dict[str, list[str]]:
    """Layer → what a dialect calls its parts, if the file is for this model."""
    layout, target = known(fit), DIALECTS[to].naming_for(fit.architecture)
    home = namings(fit.architecture)[target].home
    names, spans = layout.written(fit.naming, style), layout.spans(fit.naming)
    spelled = flatten if style == "flat" else str
    written = flatten if DIALECTS[to].style == "flat" else str
    return {
        layer: [*dict.fromkeys(written(home(part) or part) for part in spans[names[spelled(layer)]].parts)]
        for layer in bundle.entries
    }
