"""Rewrite an opened adapter file for another dialect or program, in memory."""

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
from lycoris.files.detect import Detection, find_ambiguous
from lycoris.files.dialects import DIALECTS
from lycoris.files.dialects.base import Style, flatten
from lycoris.files.dialects.components import FAMILY_KEY, find_header_family
from lycoris.files.growth import (
    FileSize,
    GrowthError,
    check_growth,
    count_stack_bytes,
    describe_widening,
    drop_unused_ranks,
    estimate_file_size,
    sample_groups,
)
from lycoris.files.layout import NamedLayout
from lycoris.files.opening import Opened, load_layout, open_file, parse_opened
from lycoris.files.peft import write_peft
from lycoris.files.programs import PROGRAMS
from lycoris.files.programs.check import ProgramCheck, check_opened
from lycoris.files.programs.exporting import export_bundle, list_known_dialects
from lycoris.files.programs.portable import convert_to_smaller
from lycoris.files.recognition import Fit
from lycoris.files.skeleton import list_namings
from lycoris.files.writing import HASH_KEYS, EncodedFile, compose, keep_header, store_tensors
from lycoris.models import fingerprint
from lycoris.models.families.naming import DIFFUSERS_NAMING

HOPELESS_GROWTH = 3
"""Times the size of the source from which a form is too large whatever else there may be."""


class RewrittenFile(NamedTuple):
    """A converted file that has not been written yet.

    `rounded` counts tensors by the precision that does not hold their values exactly.
    """

    written: EncodedFile
    dialect: str
    folder: Bundle | None = None
    """What a PEFT folder is to hold instead."""
    unchanged: bool = False
    rounded: Mapping[str, int] = MappingProxyType({})


class _PlacedBundles(NamedTuple):
    """Adapters under the names that a dialect has for their layers."""

    bundles: dict[str, Bundle]
    layouts: dict[str, NamedLayout]
    notes: dict[str, str]


@dataclass(frozen=True)
class Rewriter:
    """What to convert and under which constraints.

    `weights` are the base model's, for conversions that depend on them; `before` is the size that the result may not
    exceed by much unless `allow_growth`.
    """

    found: Opened
    base: nn.Module | None
    weights: BaseWeights | None
    dtype: torch.dtype | None
    before: FileSize
    allow_growth: bool

    def rewrite_for_program(self, program: str, to: str | None) -> RewrittenFile:
        """Return the smallest form of the file that a program reads as trained.

        Args:
            program: A name in `PROGRAMS`.
            to: The dialect to write; None: the file's own if the program reads it, else the one with the smallest
                result.

        Raises:
            FileError: No form is read as trained; the message gives the reason for each dialect that was tried.
                `GrowthError` if one was but is too large.
        """
        own, title = self.found.detection.dialect, PROGRAMS[program].title
        if to in (None, own) and self._is_fully_read and check_opened(self.found, program).as_trained:
            return self._keep_unchanged()
        dialects = list_known_dialects(program, self.found)
        if to is not None and to not in dialects:
            raise FileError(
                f"{title} does not know keys of the format {to} for this model; it knows "
                f"{', '.join(dialects) or 'no format for it'}"
            )
        if not dialects:
            raise FileError(f"{title} knows no format for this model")
        wanted = sorted(dialects, key=lambda each: each != own) if to is None else [to]
        best, reasons, grown = self._find_smallest(program, wanted)
        if best is not None:
            return best
        listed = "\n".join(f"  {', '.join(dialects)}: {why}" for why, dialects in reasons.items())
        others = "" if to is None else self._find_readable_dialects(program, [each for each in dialects if each != to])
        kind = GrowthError if grown else FileError
        raise kind(f"no file of it that {title} reads as trained was written:\n{listed}{others}")

    def _find_smallest(
        self, program: str, dialects: list[str]
    ) -> tuple[RewrittenFile | None, dict[str, list[str]], bool]:
        """The smallest form that a program reads as trained; why others are not it, and whether one is too large."""
        best: RewrittenFile | None = None
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
            elif best is None or self._measure(made) < self._measure(best):
                best = made
            if best is not None and self._measure(best) <= self.before.tensors:
                break
        return best, reasons, grown

    @property
    def _is_fully_read(self) -> bool:
        """Whether all of the file was understood, so that it may stay what it is."""
        folder = DIALECTS[self.found.detection.dialect].is_folder
        return not folder and all(bundle.report.clean for bundle in self.found.bundles.values())

    def _keep_unchanged(self) -> RewrittenFile:
        found = self.found
        header = found.header if self.dtype is None else {**found.header, **dict.fromkeys(HASH_KEYS, "")}
        own = EncodedFile(dict(found.tensors), {}, {})
        written = store_tensors(own, self.dtype, {key: value for key, value in header.items() if value})
        return RewrittenFile(written, found.detection.dialect, unchanged=True, rounded=_count_rounded(own, written))

    def rewrite(self, to: str, program: str | None = None, *, hurried: bool = False) -> RewrittenFile:
        """Return the file in a dialect and, if one is given, in a form that a program reads as trained.

        Whether the program in fact does is not checked here.

        Args:
            hurried: Stop at the first sign that the result would be too large, without computing how large.

        Raises:
            FileError: The dialect cannot store an adapter, or the file may be for several models that the dialect names
                differently. `GrowthError` if the result would be too large.
        """
        found = self.found
        for name in found.assumed:
            _check_unambiguous(found.detection, name, found.bundles[name], to)
        if not self.allow_growth:
            self._check_prediction(to, program, hurried=hurried)
        ready = self._prepare(found.bundles, to, program)
        if DIALECTS[to].is_folder:
            made = self._make_folder(ready)
        else:
            encoded = compose(ready.bundles, to, model=ready.layouts, family=found.family)
            written = store_tensors(encoded, self.dtype, _merge_headers(found, encoded.header))
            rounded = _count_rounded(encoded, written)
            made = RewrittenFile(written._replace(notes={**ready.notes, **written.notes}), to, rounded=rounded)
        if not self.allow_growth:
            size = self._measure(made)
            names = estimate_file_size({}, made.written.header) + sum(len(key) + 70 for key in made.written.tensors)
            wider = describe_widening(made.written.tensors, self.found.tensors)
            notes = [*filter(None, [wider]), *made.written.notes.values()]
            check_growth(self.before, FileSize(size + names, size), notes)
        return made

    def _prepare(self, bundles: Mapping[str, Bundle], to: str, program: str | None) -> _PlacedBundles:
        """As a program reads them as trained, where one is given, and on the layers that a dialect knows."""
        own, done = dict(bundles), dict[str, str]()
        if program is not None:
            own, done = export_bundle(self.found._replace(bundles=own), program, to, self.weights)
        if self.weights is not None and "" in own and not DIALECTS[to].is_folder:
            own[""] = _free_from_base(own[""], to, self.found.layouts[""], self.weights, done)
        layouts = {}
        for name, bundle in own.items():
            own[name], layouts[name] = _place_bundle(bundle, self.found.layouts[name], to, self.base, done)
        return _PlacedBundles(own, layouts, done)

    def _check_prediction(self, to: str, program: str | None, *, hurried: bool) -> None:
        """Raise `GrowthError` where the tensors would take more than is let by, before they are made."""
        total, notes = 0, list[str]()
        for name, bundle in self.found.bundles.items():
            layout = self.found.layouts[name]
            for sample in sample_groups(bundle, layout, _find_naming(layout, to)):
                try:
                    ready = self._prepare({name: sample.bundle}, to, program)
                except LycorisError:
                    # The conversion itself reports the reason.
                    continue
                total += sample.alike * count_stack_bytes(ready.bundles[name].entries, self.dtype)
                notes += ready.notes.values()
                if hurried and total > HOPELESS_GROWTH * self.before.tensors:
                    check_growth(self.before, FileSize(total, total), notes, "more than ")
        check_growth(self.before, FileSize(total, total), notes, "about ")

    def _measure(self, made: RewrittenFile) -> int:
        """Bytes of its tensors."""
        if made.folder is not None:
            return count_stack_bytes(made.folder.entries, self.dtype)
        return sum(tensor.nbytes for tensor in made.written.tensors.values())

    def _make_folder(self, ready: _PlacedBundles) -> RewrittenFile:
        if set(ready.bundles) != {""}:
            names = ", ".join(name or "the denoiser" for name in ready.bundles)
            raise FileError(f"a PEFT folder holds the adapters of one model, and this file has those of {names}")
        return RewrittenFile(EncodedFile({}, {}, ready.notes), "peft", folder=ready.bundles[""])

    def _check(self, made: RewrittenFile, program: str) -> ProgramCheck:
        """What a program makes of it once it is written."""
        if made.folder is None:
            return check_opened(parse_opened(made.written.tensors, made.written.header, self.base), program)
        with tempfile.TemporaryDirectory() as folder:
            write_peft(made.folder, folder, dtype=self.dtype)
            return check_opened(open_file(folder, self.base), program)

    def _find_readable_dialects(self, program: str, dialects: list[str]) -> str:
        """Of some dialects those that a program does read as trained, as the end of a message."""
        good = []
        for dialect in dialects:
            with contextlib.suppress(FileError):
                if self._check(self.rewrite(dialect, program), program).as_trained:
                    good.append(dialect)
        return f"\nAs {' or '.join(good)} it does" if good else "\nNor does it in any other format"


def _find_naming(layout: NamedLayout, to: str) -> str:
    """Whose names of layers a dialect has for a model; PEFT knows one by the names of its own modules."""
    if layout.architecture is None:
        return layout.naming
    return DIFFUSERS_NAMING if DIALECTS[to].is_folder else DIALECTS[to].choose_naming(layout.architecture)


def _place_bundle(
    bundle: Bundle, layout: NamedLayout, to: str, base: nn.Module | None, notes: dict[str, str]
) -> tuple[Bundle, NamedLayout]:
    """A bundle on the layers that a dialect knows, without ranks that only other parts of a layer needed."""
    if layout.architecture is None:
        return bundle, layout
    kind = DIALECTS[to]
    own = layout.convert_to_naming(_find_naming(layout, to))
    if kind.is_folder and base is not None:
        own = NamedLayout.from_model(base)
    dense = not kind.is_folder and (kind.algorithms is None or Full.name in kind.algorithms)
    places = placing.place_stacks(bundle.entries, own, layout.naming, dense=dense)
    if places.refused:
        raise FileError(f"{len(places.refused)} layers cannot be written: {some(places.refused.values())}")
    notes |= places.notes
    spans = layout.find_spans(layout.naming)
    cut = {part for layer in bundle.entries for part in spans[layer].parts if len(spans[layer].parts) > 1}
    targets = own.find_spans(own.naming)
    entries = {
        name: tuple(map(drop_unused_ranks, stack)) if cut.issuperset(targets[name].parts) else stack
        for name, stack in places.entries.items()
    }
    return replace(bundle, entries=entries), own


def _count_rounded(before: EncodedFile, after: EncodedFile) -> dict[str, int]:
    """Precision → tensors that have other values in it than they had."""
    count: Counter[str] = Counter()
    for name, tensor in after.tensors.items():
        own = before.tensors[name]
        if own.dtype != tensor.dtype and not torch.equal(own.double(), tensor.double()):
            count[str(tensor.dtype).removeprefix("torch.")] += 1
    return dict(count)


def _merge_headers(found: Opened, own: Mapping[str, str]) -> dict[str, str]:
    """What a file says of itself: `own` of what is written, and of the source's header what stays true.

    The base and its family are stored if the source's header has them or the base was given, never by a guess.
    """
    header = {key: value for key, value in keep_header(found.header).items() if key != FAMILY_KEY}
    layout, guessed = found.layouts.get(""), "" in found.assumed
    if layout is not None and not guessed:
        other = fingerprint.describe_other_layers(header, layout.model_name, layout.layers, layout.diffusers_layers)
        header = {key: value for key, value in header.items() if key != fingerprint.FINGERPRINT_KEY or not other}
    known = find_header_family(found.header)
    sure = not guessed or (known is not None and known.name == found.family)
    return {**{key: value for key, value in own.items() if key != FAMILY_KEY or sure}, **header}


def _free_from_base(bundle: Bundle, to: str, layout: NamedLayout, weights: BaseWeights, done: dict[str, str]) -> Bundle:
    """Without what only the base weight determines, where layers are cut or joined for a dialect."""
    if layout.architecture is None:
        return bundle
    refused = placing.place_stacks(
        bundle.entries, layout.convert_to_naming(DIALECTS[to].choose_naming(layout.architecture)), layout.naming
    ).refused
    if not refused:
        return bundle
    entries = dict(bundle.entries)
    for layer, stack in entries.items():
        if any(conversion.needs_base(entry) for entry in stack):
            entries[layer] = tuple(convert_to_smaller(entry, weights.affine(layer, layout)) for entry in stack)
            done[layer] = f"{stack[0].algorithm.name} written as a LoRA or a difference, for its layer is cut or joined"
    return replace(bundle, entries=entries)


def _check_unambiguous(detection: Detection, component: str, bundle: Bundle, to: str) -> None:
    """Raise `FileError` when another model that a file may be for would get other names."""
    style = DIALECTS[detection.dialect].style
    best, *_ = found = detection.fits[component]
    for other in find_ambiguous(found):
        own, its = _name_parts(best, bundle, style, to), _name_parts(other, bundle, style, to)
        differing = next((layer for layer in own if own[layer] != its[layer]), None)
        if differing is not None:
            raise FileError(
                f"its layers may be of {best.outline} or of {other.outline}, and {to} files call {differing} "
                f"{' and '.join(own[differing])} for the one, {' and '.join(its[differing])} for the other. "
                f"Say which it is for: --base {best.outline} or --base {other.outline}"
            )


def _name_parts(fit: Fit, bundle: Bundle, style: Style, to: str) -> dict[str, list[str]]:
    """Layer → what a dialect calls its parts, if the file is for this model."""
    layout, target = load_layout(fit), DIALECTS[to].choose_naming(fit.architecture)
    find_module = list_namings(fit.architecture)[target].find_module
    names, spans = layout.map_written_names(fit.naming, style), layout.find_spans(fit.naming)
    spelled = flatten if style == "flat" else str
    written = flatten if DIALECTS[to].style == "flat" else str
    return {
        layer: [*dict.fromkeys(written(find_module(part) or part) for part in spans[names[spelled(layer)]].parts)]
        for layer in bundle.entries
    }
