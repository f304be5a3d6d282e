"""An adapter file as another dialect, or a program, has it, before it is written."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import NamedTuple

import torch
from torch import nn

from lycoris.adapters.bundle import Bundle
from lycoris.adapters.load_report import some
from lycoris.algorithms import Full, conversion
from lycoris.errors import FileError, LycorisError
from lycoris.files import placing
from lycoris.files.container.model_weights import BaseWeights
from lycoris.files.detect import Detection, ambiguous
from lycoris.files.dialects import DIALECTS
from lycoris.files.dialects.base import Style, flatten
from lycoris.files.dialects.components import FAMILY, family_in
from lycoris.files.growth import (
    Bytes,
    GrowthError,
    check_growth,
    compact,
    samples,
    size_written,
    stacks_bytes,
    widened_by,
)
from lycoris.files.layout import Layout
from lycoris.files.opening import Opened, find_layout, open_file, parse_opened
from lycoris.files.peft import write_peft
from lycoris.files.programs import PROGRAMS
from lycoris.files.programs.check import Check, judge_opened
from lycoris.files.programs.exporting import dialects_of, export_bundle
from lycoris.files.programs.portable import plain
from lycoris.files.recognition import Fit
from lycoris.files.skeleton import namings
from lycoris.files.writing import HASHES, Encoded, compose, keep_header, store_tensors
from lycoris.models import fingerprint
from lycoris.models.families.naming import DIFFUSERS as MIDDLE

MANY = 3
"""Times the size of the source from which a form is too large whatever else there may be."""


class Made(NamedTuple):
    """A file, not yet written."""

    written: Encoded
    dialect: str
    folder: Bundle | None = None
    """What a folder of PEFT's is to hold instead."""
    unchanged: bool = False
    rounded: Mapping[str, int] = MappingProxyType({})


class _Ready(NamedTuple):
    """Adapters under the names that a dialect has for their layers."""

    bundles: dict[str, Bundle]
    layouts: dict[str, Layout]
    notes: dict[str, str]


@dataclass(frozen=True)
class Order:
    """What to convert, and with what."""

    found: Opened
    base: nn.Module | None
    weights: BaseWeights | None
    dtype: torch.dtype | None
    before: Bytes
    allow_growth: bool

    def for_program(self, program: str, to: str | None) -> Made:
        """The smallest form, or the one in a dialect, in which a program reads all of it as trained."""
        own, title = self.found.detection.dialect, PROGRAMS[program].title
        if to in (None, own) and self._as_it_is and judge_opened(self.found, program).as_trained:
            return self._keep_unchanged()
        dialects = dialects_of(program, self.found)
        if to is not None and to not in dialects:
            raise FileError(
                f"{title} does not know keys of the format {to} for this model; it knows "
                f"{', '.join(dialects) or 'no format for it'}"
            )
        if not dialects:
            raise FileError(f"{title} knows no format for this model")
        wanted = sorted(dialects, key=lambda each: each != own) if to is None else [to]
        best, reasons, grown = self._smallest(program, wanted)
        if best is not None:
            return best
        told = "\n".join(f"  {', '.join(dialects)}: {why}" for why, dialects in reasons.items())
        others = "" if to is None else self._others(program, [each for each in dialects if each != to])
        kind = GrowthError if grown else FileError
        raise kind(f"no file of it that {title} reads as trained was written:\n{told}{others}")

    def _smallest(self, program: str, dialects: list[str]) -> tuple[Made | None, dict[str, list[str]], bool]:
        """The smallest form that a program reads as trained; why others are not it, and whether one is too large."""
        best: Made | None = None
        reasons: dict[str, list[str]] = {}
        grown = False
        for dialect in dialects:
            try:
                made = self.rewrite(dialect, program, hurried=len(dialects) > 1)
                check = self._check(made, program)
            except FileError as error:
                grown |= isinstance(error, GrowthError)
                reasons.setdefault(str(error), []).append(dialect)
                continue
            if not check.as_trained:
                reasons.setdefault("; ".join(check.reasons), []).append(dialect)
            elif best is None or self._size(made) < self._size(best):
                best = made
            if best is not None and self._size(best) <= self.before.tensors:
                break
        return best, reasons, grown

    @property
    def _as_it_is(self) -> bool:
        """Whether all of the file was understood, so that it may stay what it is."""
        folder = DIALECTS[self.found.detection.dialect].folder
        return not folder and all(bundle.report.clean for bundle in self.found.bundles.values())

    def _keep_unchanged(self) -> Made:
        found = self.found
        header = found.header if self.dtype is None else {**found.header, **dict.fromkeys(HASHES, "")}
        own = Encoded(dict(found.tensors), {}, {})
        written = store_tensors(own, self.dtype, {key: value for key, value in header.items() if value})
        return Made(written, found.detection.dialect, unchanged=True, rounded=_count_rounded(own, written))

    def rewrite(self, to: str, program: str | None = None, *, hurried: bool = False) -> Made:
        """In a dialect, and for a program where one is given. Raises `FileError`.

        `hurried` is content to know that a file would be too large, without knowing how large.
        """
        found = self.found
        for name in found.assumed:
            _check_sure(found.detection, name, found.bundles[name], to)
        if not self.allow_growth:
            self._check_prediction(to, program, hurried=hurried)
        ready = self._ready(found.bundles, to, program)
        if DIALECTS[to].folder:
            made = self._folder(ready)
        else:
            encoded = compose(ready.bundles, to, model=ready.layouts, family=found.family)
            written = store_tensors(encoded, self.dtype, _header(found, encoded.header))
            rounded = _count_rounded(encoded, written)
            made = Made(written._replace(notes={**ready.notes, **written.notes}), to, rounded=rounded)
        if not self.allow_growth:
            size = self._size(made)
            names = size_written({}, made.written.header) + sum(len(key) + 70 for key in made.written.tensors)
            wider = widened_by(made.written.tensors, self.found.tensors)
            notes = [*filter(None, [wider]), *made.written.notes.values()]
            check_growth(self.before, Bytes(size + names, size), notes)
        return made

    def _ready(self, bundles: Mapping[str, Bundle], to: str, program: str | None) -> _Ready:
        """As a program reads them as trained, where one is given, and on the layers that a dialect knows."""
        own, done = dict(bundles), dict[str, str]()
        if program is not None:
            own, done = export_bundle(self.found._replace(bundles=own), program, to, self.weights)
        if self.weights is not None and "" in own and not DIALECTS[to].folder:
            own[""] = _free(own[""], to, self.found.layouts[""], self.weights, done)
        layouts = {}
        for name, bundle in own.items():
            own[name], layouts[name] = _place_bundle(bundle, self.found.layouts[name], to, self.base, done)
        return _Ready(own, layouts, done)

    def _check_prediction(self, to: str, program: str | None, *, hurried: bool) -> None:
        """Raise `GrowthError` where the tensors would take more than is let by, before they are made."""
        total, notes = 0, list[str]()
        for name, bundle in self.found.bundles.items():
            layout = self.found.layouts[name]
            for sample in samples(bundle, layout, _naming(layout, to)):
                try:
                    ready = self._ready({name: sample.bundle}, to, program)
                except LycorisError:
                    # The reason is for the conversion itself to tell.
                    continue
                total += sample.alike * stacks_bytes(ready.bundles[name].entries, self.dtype)
                notes += ready.notes.values()
                if hurried and total > MANY * self.before.tensors:
                    check_growth(self.before, Bytes(total, total), notes, "more than ")
        check_growth(self.before, Bytes(total, total), notes, "about ")

    def _size(self, made: Made) -> int:
        """Bytes of its tensors."""
        if made.folder is not None:
            return stacks_bytes(made.folder.entries, self.dtype)
        return sum(tensor.nbytes for tensor in made.written.tensors.values())

    def _folder(self, ready: _Ready) -> Made:
        if set(ready.bundles) != {""}:
            names = ", ".join(name or "the denoiser" for name in ready.bundles)
            raise FileError(f"a folder of PEFT's holds the adapters of one model, and this file has those of {names}")
        return Made(Encoded({}, {}, ready.notes), "peft", folder=ready.bundles[""])

    def _check(self, made: Made, program: str) -> Check:
        """What a program makes of it once it is written."""
        if made.folder is None:
            return judge_opened(parse_opened(made.written.tensors, made.written.header, self.base), program)
        with tempfile.TemporaryDirectory() as folder:
            write_peft(made.folder, folder, dtype=self.dtype)
            return judge_opened(open_file(folder, self.base), program)

    def _others(self, program: str, dialects: list[str]) -> str:
        """Of some dialects those that a program does read as trained, as the end of a message."""
        good = []
        for dialect in dialects:
            with contextlib.suppress(FileError):
                if self._check(self.rewrite(dialect, program), program).as_trained:
                    good.append(dialect)
        return f"\nAs {' or '.join(good)} it does" if good else "\nNor does it in any other format"


def _naming(layout: Layout, to: str) -> str:
    """Whose names of layers a dialect has for a model; PEFT knows one by the names of its own modules."""
    if layout.architecture is None:
        return layout.naming
    return MIDDLE if DIALECTS[to].folder else DIALECTS[to].naming_for(layout.architecture)


def _place_bundle(
    bundle: Bundle, layout: Layout, to: str, base: nn.Module | None, notes: dict[str, str]
) -> tuple[Bundle, Layout]:
    """A bundle on the layers that a dialect knows, without ranks that only other parts of a layer needed."""
    if layout.architecture is None:
        return bundle, layout
    kind = DIALECTS[to]
    own = layout.in_naming(_naming(layout, to))
    if kind.folder and base is not None:
        own = Layout.of(base)
    whole = not kind.folder and (kind.algorithms is None or Full.name in kind.algorithms)
    places = placing.place(bundle.entries, own, layout.naming, dense=whole)
    if places.refused:
        raise FileError(f"{len(places.refused)} layers cannot be written: {some(places.refused.values())}")
    notes |= places.notes
    spans = layout.spans(layout.naming)
    cut = {part for layer in bundle.entries for part in spans[layer].parts if len(spans[layer].parts) > 1}
    targets = own.spans(own.naming)
    entries = {
        name: tuple(map(compact, stack)) if cut.issuperset(targets[name].parts) else stack
        for name, stack in places.entries.items()
    }
    return replace(bundle, entries=entries), own


def _count_rounded(before: Encoded, after: Encoded) -> dict[str, int]:
    """Precision → tensors that have other values in it than they had."""
    count: Counter[str] = Counter()
    for name, tensor in after.tensors.items():
        own = before.tensors[name]
        if own.dtype != tensor.dtype and not torch.equal(own.double(), tensor.double()):
            count[str(tensor.dtype).removeprefix("torch.")] += 1
    return dict(count)


def _header(found: Opened, own: Mapping[str, str]) -> dict[str, str]:
    """What a file says of itself: `own` of what is written, and of the source's header what stays true.

    The base and its family are told where the source's header has them or the base was given, never by a guess.
    """
    told = {key: value for key, value in keep_header(found.header).items() if key != FAMILY}
    layout, guessed = found.layouts.get(""), "" in found.assumed
    if layout is not None and not guessed:
        other = fingerprint.other_layers(told, layout.owner, layout.layers, layout.middle)
        told = {key: value for key, value in told.items() if key != fingerprint.KEY or not other}
    known = family_in(found.header)
    sure = not guessed or (known is not None and known.name == found.family)
    return {**{key: value for key, value in own.items() if key != FAMILY or sure}, **told}


def _free(bundle: Bundle, to: str, layout: Layout, weights: BaseWeights, done: dict[str, str]) -> Bundle:
    """Without what only the base weight determines, where layers are cut or joined for a dialect."""
    if layout.architecture is None:
        return bundle
    refused = placing.place(
        bundle.entries, layout.in_naming(DIALECTS[to].naming_for(layout.architecture)), layout.naming
    ).refused
    if not refused:
        return bundle
    entries = dict(bundle.entries)
    for layer, stack in entries.items():
        if any(conversion.needs_base(entry) for entry in stack):
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
    layout, target = find_layout(fit), DIALECTS[to].naming_for(fit.architecture)
    home = namings(fit.architecture)[target].home
    names, spans = layout.written_names(fit.naming, style), layout.spans(fit.naming)
    spelled = flatten if style == "flat" else str
    written = flatten if DIALECTS[to].style == "flat" else str
    return {
        layer: [*dict.fromkeys(written(home(part) or part) for part in spans[names[spelled(layer)]].parts)]
        for layer in bundle.entries
    }
