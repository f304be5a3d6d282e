"""From one kind of adapter file to another."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from lycoris import fingerprint, recast
from lycoris.bundle import Bundle
from lycoris.errors import FileError, unknown
from lycoris.files import placing
from lycoris.files.check import Check, judged
from lycoris.files.components import FAMILY
from lycoris.files.consumers import CONSUMERS
from lycoris.files.detect import Detection, ambiguous
from lycoris.files.dialect import Style, flatten
from lycoris.files.dialects import DIALECTS
from lycoris.files.exporting import dialects_of, exported
from lycoris.files.layout import Layout
from lycoris.files.naming import DIFFUSERS as MIDDLE
from lycoris.files.opening import Opened, known, opened, understood
from lycoris.files.peft import write_peft
from lycoris.files.peft.config import WEIGHTS
from lycoris.files.portable import plain
from lycoris.files.recognise import Fit
from lycoris.files.skeleton import namings
from lycoris.files.storage import load_tensors, save_tensors
from lycoris.files.target import check_target
from lycoris.files.weights import BaseWeights
from lycoris.files.writing import Encoded, compose, kept, stored
from lycoris.report import Report, some


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
    overwrite: bool = False,
) -> Conversion:
    """Write an adapter file anew in another dialect, exactly, or not at all.

    `portable` names a program that reads it as trained then: adapters that it would take for something else are written
    otherwise, and where that depends on the base model, by its `weights`. Unless `check` of the result says that it
    does, nothing is written. `to` is the dialect, None: the first one of that program's in which it does. `base` is the
    denoiser that the file is for (one on the meta device serves); None: a known model, recognised by names and sizes.
    With `strict=False` what has no place is left out, and the report tells it.

    A target that exists is refused unless `overwrite`, one that is read here always.

    Raises `FileError` for that, when the file fits no model, when something in it has no place, when it may be for
    several models whose names differ, or when the dialect cannot hold what it has or the program does not read it as
    trained; then it says why, and of which dialects it does.
    """
    _check_asked(to, portable)
    read = {Path(source), *(() if weights is None else weights.files.values())}
    check_target(target, read, overwrite=overwrite)
    order = _Order(opened(source, base, strict=strict), base, weights, dtype)
    try:
        if portable is not None:
            made = order.for_program(portable, to)
        else:
            assert to is not None
            made = order.made(to)
    except FileError as error:
        raise FileError(f"{source}: {error}") from error
    if made.folder is None:
        save_tensors(made.written.tensors, target, made.written.header)
    else:
        write_peft(made.folder, target, dtype=dtype)
        made.written.tensors.update(load_tensors(Path(target) / WEIGHTS)[0])
    found = order.found
    reports = {name: bundle.report for name, bundle in found.bundles.items()}
    return Conversion(found.detection, reports, found.assumed, made.written)


def _check_asked(to: str | None, portable: str | None) -> None:
    if portable is not None and portable not in CONSUMERS:
        raise FileError(unknown("program", portable, CONSUMERS))
    if to is None and portable is None:
        raise FileError(f"say what to convert to: a dialect ({', '.join(DIALECTS)}) or the program that is to read it")
    if to is not None and to not in DIALECTS:
        raise FileError(unknown("dialect", to, DIALECTS))


class _Made(NamedTuple):
    """A file, not yet written."""

    written: Encoded
    folder: Bundle | None = None
    """What a folder of PEFT's is to hold instead."""


@dataclass(frozen=True)
class _Order:
    """What to convert, and with what."""

    found: Opened
    base: nn.Module | None
    weights: BaseWeights | None
    dtype: torch.dtype | None

    def for_program(self, program: str, to: str | None) -> _Made:
        """In the dialect, or the first one, in which a program reads all of it as trained."""
        title, known = CONSUMERS[program].title, dialects_of(program, self.found)
        if to is not None and to not in known:
            raise FileError(
                f"{title} does not know keys of the format {to} for this model; it knows "
                f"{', '.join(known) or 'no format for it'}"
            )
        if not known:
            raise FileError(f"{title} knows no format for this model")
        reasons: dict[str, list[str]] = {}
        for dialect in known if to is None else [to]:
            try:
                made = self.made(dialect, program)
                check = self._check(made, program)
            except FileError as error:
                reasons.setdefault(str(error), []).append(dialect)
                continue
            if check.as_trained:
                return made
            reasons.setdefault("; ".join(check.reasons), []).append(dialect)
        told = "\n".join(f"  {', '.join(dialects)}: {why}" for why, dialects in reasons.items())
        others = "" if to is None else self._others(program, [each for each in known if each != to])
        raise FileError(f"no file of it that {title} reads as trained was written:\n{told}{others}")

    def made(self, to: str, program: str | None = None) -> _Made:
        """In a dialect, and for a program where one is given. Raises `FileError`."""
        found, done = self.found, dict[str, str]()
        bundles = found.bundles
        for name in found.assumed:
            _check_sure(found.detection, name, bundles[name], to)
        if program is not None:
            bundles, done = exported(found, program, to, self.weights)
        if self.weights is not None and "" in bundles and not DIALECTS[to].folder:
            bundles = bundles | {"": _free(bundles[""], to, found.layouts[""], self.weights, done)}
        if DIALECTS[to].folder:
            return self._folder(bundles, done)
        encoded = compose(bundles, to, model=found.layouts, family=found.family)
        written = stored(encoded, self.dtype, {**encoded.header, **_header(found)})
        return _Made(written._replace(notes={**done, **written.notes}))

    def _folder(self, bundles: Mapping[str, Bundle], done: dict[str, str]) -> _Made:
        if set(bundles) != {""}:
            names = ", ".join(name or "the denoiser" for name in bundles)
            raise FileError(f"a folder of PEFT's holds the adapters of one model, and this file has those of {names}")
        # PEFT knows a model by the names of its own modules.
        layout = self.found.layouts[""]
        own = layout.renamed(MIDDLE) if self.base is None else Layout.of(self.base)
        places = placing.place(bundles[""].entries, own, layout.naming, dense=False)
        if places.refused:
            raise FileError(f"{len(places.refused)} layers cannot be written: {some(places.refused.values())}")
        return _Made(Encoded({}, {}, done | places.notes), replace(bundles[""], entries=places.entries))

    def _check(self, made: _Made, program: str) -> Check:
        """What a program makes of it once it is written."""
        if made.folder is None:
            return judged(understood(made.written.tensors, made.written.header, self.base), program)
        with tempfile.TemporaryDirectory() as folder:
            write_peft(made.folder, folder, dtype=self.dtype)
            return judged(opened(folder, self.base), program)

    def _others(self, program: str, dialects: list[str]) -> str:
        """Of some dialects those that a program does read as trained, as the end of a message."""
        good = []
        for dialect in dialects:
            with contextlib.suppress(FileError):
                if self._check(self.made(dialect, program), program).as_trained:
                    good.append(dialect)
        return f"\nAs {' or '.join(good)} it does" if good else "\nNor does it in any other format"


def _header(found: Opened) -> dict[str, str]:
    """What of the file's header stays true; which base it says that it is for, if it is for that."""
    header = {key: value for key, value in kept(found.header).items() if key != FAMILY}
    layout = found.layouts.get("")
    if layout is not None and fingerprint.other_layers(header, layout.owner, layout.layers, layout.middle):
        del header[fingerprint.KEY]
    return header


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
