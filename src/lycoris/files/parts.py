"""What a program makes of the part of a file that is for one component of a pipeline."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

from lycoris.algorithms import ALGORITHMS, ALPHA, MAGNITUDE, DoRA, below_lengths
from lycoris.bundle import Bundle, Entry
from lycoris.families import ARCHITECTURES, FAMILIES
from lycoris.families.naming import Span
from lycoris.files.components import component_of
from lycoris.files.consumers import Consumer, Verdict
from lycoris.files.consumers.keys import Known
from lycoris.files.consumers.routes import Routed, Sent
from lycoris.files.detect import Detection
from lycoris.files.dialect import flatten
from lycoris.files.dialects import DIALECTS
from lycoris.files.holding import holders, place_of
from lycoris.files.layout import Layout
from lycoris.files.opening import Opened
from lycoris.files.spelling import MAGNITUDE_VECTOR
from lycoris.report import some

SAME = 1e-6
"""A scale this near to 1 is 1."""


class Written(NamedTuple):
    """A layer in a file."""

    key: str
    """What the names of its tensors have in common."""
    tensors: Mapping[str, tuple[int, ...]]
    """Their shapes, by name in LyCORIS' spelling."""
    names: tuple[str, ...] = ()
    """Of the tensors, as the file has them."""


def written_in(shapes: Mapping[str, tuple[int, ...]], detection: Detection) -> dict[str, dict[str, Written]]:
    """Component → layer as written → what the file has."""
    whose = component_of(FAMILIES[detection.family] if detection.family else None)
    found: dict[str, dict[str, Written]] = {component: {} for component in detection.components}
    for name, shape in shapes.items():
        key = DIALECTS[detection.dialect].split(name)
        if key is not None:
            layers = found.setdefault(whose(key), {})
            before = layers.get(key.layer, Written(key.prefix + key.layer, {}))
            layers[key.layer] = before._replace(
                tensors={**before.tensors, key.suffix: shape}, names=(*before.names, name)
            )
    return found


def routed_by(program: Consumer, found: Opened, written: Mapping[str, Mapping[str, Written]]) -> Routed | None:
    """What becomes of all keys together in a program that looks at all of them."""
    if program.route is None:
        return None
    layers = {
        each.key: tuple(name.removeprefix(f"{each.key}.") for name in each.names)
        for component in written.values()
        for each in component.values()
    }
    return program.route(Sent(layers, denoiser_of(found), tuple(found.shapes)))


def denoiser_of(found: Opened) -> str | None:
    """The architecture of the denoiser that a file is for; None: not known."""
    architecture = found.layouts[""].architecture if "" in found.layouts else None
    if architecture is None and found.family is not None:
        architecture = ARCHITECTURES[FAMILIES[found.family].components[""]]
    return None if architecture is None else architecture.name


@dataclass(frozen=True)
class Part:
    """What a file has for one component of a pipeline."""

    program: Consumer
    component: str
    own: str
    """The file's dialect."""
    layout: Layout
    bundle: Bundle
    written: Mapping[str, Written]
    """By layer as written."""
    routed: Routed | None = None
    """What becomes of the whole file's keys; None: `Consumer.keys` says it."""
    taken_for: str = ""
    """The one algorithm that the program takes the whole file for; "" each layer has its own."""

    @property
    def architecture(self) -> str | None:
        return None if self.layout.architecture is None else self.layout.architecture.name

    @property
    def prefix(self) -> str:
        """What its keys begin with."""
        return next((each.key.removesuffix(layer) for layer, each in self.written.items()), "")

    @cached_property
    def dialect(self) -> str:
        """The dialect that usually has such keys for this component: that of the file, or if its layers have other
        names, one that the program knows; "" none.
        """
        own, architecture = DIALECTS[self.own], self.layout.architecture
        # Text encoders have other names only by a level that some versions of a class have.
        if architecture is None or self.component or own.folder or own.naming_for(architecture) == self.layout.naming:
            return self.own
        alike = (
            each.name
            for each in DIALECTS.values()
            if self.prefix in each.prefixes and each.naming_for(architecture) == self.layout.naming
        )
        return next((name for name in alike if self.program.known(name, architecture.name)), "")

    @cached_property
    def known(self) -> Known | None:
        return self.program.known(self.dialect, self.architecture)

    @property
    def elsewhere(self) -> list[str]:
        """Dialects that the program does know for this architecture."""
        return [each for each in self.program.keys if self.program.known(each, self.architecture)]

    @property
    def problems(self) -> list[str]:
        """Why the program rejects a file with this component."""
        title = self.program.title
        if self.unknown or (self.routed is not None and self.routed.refused):
            return []
        stopped = [self._stopped] if self._stopped else []
        if self.routed is not None:
            return stopped
        assert self.known is not None
        keys = {each.key for each in self.written.values()}
        stopping = sorted(
            each.key
            for layer, each in self.written.items()
            if re.fullmatch(self.known.stops, each.key) or (self.known.strict and self._lost(layer))
        )
        groups = {match.groups() for key in keys if (match := re.fullmatch(self.known.needs, key))}
        lacking = [key for key in self._absent if _among(key, self.known.needs, groups)]
        found = [*stopped, *([f"{title} rejects the file for {some(stopping)}"] if stopping else [])]
        if lacking:
            found.append(f"{title} rejects the file, for it wants all layers of that kind, and lacks {some(lacking)}")
        return found

    @property
    def unknown(self) -> str:
        """That the program knows none of its keys; "" where it does."""
        if self.routed is not None and self.routed.refused:
            return ""
        taken = not self.written or not all(map(self._lost, self.written))
        if (self.known is not None or self.routed is not None) and taken:
            return ""
        there, model = ", ".join(self._others), self.architecture or "this model"
        if self.routed is None and not self.program.seen(self.architecture):
            return f"which keys {self.program.title} knows for {model} was not looked at"
        return f"{self.program.title} does not know keys of the format {self.own} for {model}" + (
            f"; it knows {there}" if there else ", nor of any other known here"
        )

    @property
    def _others(self) -> list[str]:
        """The dialects that it does know for this architecture, but that of the file."""
        return [each for each in self.elsewhere if each != self.own]

    @property
    def _stopped(self) -> str:
        """Why the program gives a file up at a layer that it cannot take; "" where it takes what it finds."""
        stopping = {
            layer: verdict.why
            for layer, verdict in self.verdicts.items()
            if verdict.stops and not self._lost(self._as_written(layer))
        }
        if not stopping:
            return ""
        return f"{self.program.title} rejects the file for {some(stopping)}: {next(iter(stopping.values()))}"

    @property
    def together(self) -> str:
        """Why the program does not take layers together that it takes one by one; "" where it does."""
        stops = any(each.stops for each in self.verdicts.values())
        if self.program.whole is None or stops:
            return ""
        entries = {at: each for at, each in self.bundle.entries.items() if not self._lost(self._as_written(at))}
        return self.program.whole(replace(self.bundle, entries=entries))

    @property
    def passed_over(self) -> int:
        """How many tensors the program has no use for."""
        found = 0
        for layer, verdict in self.verdicts.items():
            written = self._as_written(layer)
            if verdict.reads == "not at all":
                # Of a layer that it knows, it takes these whatever else there is.
                taken = set() if self._lost(written) else {ALPHA, MAGNITUDE}
                found += len(self._of(written).tensors.keys() - taken)
            else:
                found += len(self._of(written).tensors.keys() & {MAGNITUDE_VECTOR, "lora_up.bias"})
        return found

    @cached_property
    def verdicts(self) -> Mapping[str, Verdict]:
        """What becomes of each layer."""
        return {layer: self._verdict(layer, stack) for layer, stack in self.bundle.entries.items()}

    def _of(self, written: str) -> Written:
        """What the file has for a layer; nothing where PEFT has names of its own, as for IA3."""
        return self.written.get(written) or Written(self.prefix + written, {})

    def _as_written(self, layer: str) -> str:
        return flatten(layer) if DIALECTS[self.own].style == "flat" else layer

    @cached_property
    def _among(self) -> frozenset[str]:
        """The own names of all tensors."""
        return frozenset(name for each in self.written.values() for name in each.tensors)

    @cached_property
    def _named(self) -> Collection[str] | None:
        """The layers' names, as written, that the program knows; None: any."""
        architecture, named = self.layout.architecture, self.known.named if self.known else ""
        if architecture is None or not named:
            return None
        return self.layout.written(DIALECTS[named].naming_for(architecture), DIALECTS[self.own].style)

    @cached_property
    def _absent(self) -> list[str]:
        """Keys of layers that the file has nothing for."""
        keys = {each.key for each in self.written.values()}
        every = (self.prefix + name for name in self.layout.written(self.layout.naming, DIALECTS[self.own].style))
        return [key for key in every if key not in keys]

    @cached_property
    def _incomplete(self) -> set[tuple[str | None, ...]]:
        """Groups of keys that go together, of which the file lacks some."""
        together = self.known.together if self.known is not None else ""
        return {match.groups() for key in self._absent if together and (match := re.fullmatch(together, key))}

    @cached_property
    def _holders(self) -> Mapping[str, Span]:
        return holders(self.program, self.layout)

    def _span(self, layer: str) -> Span:
        return self.layout.spans(self.layout.naming).get(layer, Span((layer,)))

    def _lost(self, written: str) -> bool:
        """Whether the program passes a layer's keys over."""
        if self.routed is not None:
            return self._of(written).key in self.routed.lost
        if self.known is None:
            return True
        unnamed = self._named is not None and written not in self._named
        key = self._of(written).key
        return unnamed or bool(re.fullmatch(self.known.lost, key)) or _among(key, self.known.together, self._incomplete)

    def _verdict(self, layer: str, stack: tuple[Entry, ...]) -> Verdict:
        title, written = self.program.title, self._as_written(layer)
        key, stored, _ = self._of(written)
        known = None if self.routed is not None else self.known
        if self.known is None and self.routed is None and not self.program.seen(self.architecture):
            return Verdict("not known", f"which keys {title} knows for this model was not looked at")
        if self._lost(written) or (known is not None and re.fullmatch(known.stops, key)):
            return Verdict(
                "not at all", f"{title} has no place for such keys", None, "format" if self._others else None
            )
        if known is not None and re.fullmatch(known.unsure, key):
            return Verdict(
                "not known", f"whether {title} has a place for such keys depends on the version of the model"
            )
        if "bias_indices" in stored:
            return Verdict("differently", f"{title} leaves out the single places of the weight", None, "joined")
        first, *rest = stack
        verdict = self.program.verdict(
            first,
            beside=tuple(rest),
            dialect=self.dialect or self.own,
            architecture=self.architecture,
            key=key,
            stored=stored,
            place=place_of(self._span(layer), self._holders, self.layout),
            among=self._among,
        )
        own = below_lengths(first.algorithm).name
        if (
            self.taken_for
            and verdict.reads != "not at all"
            and not issubclass(ALGORITHMS[own], ALGORITHMS[self.taken_for])
        ):
            why = (
                f"{title} takes a whole file for one algorithm, by its first tensors, and this one for {self.taken_for}"
            )
            return Verdict("not at all", why, None, "lora")
        if verdict.reads != "as trained":
            return verdict
        if left_out := self._left_out(stack, key, stored):
            return left_out
        if known is not None and re.fullmatch(known.bent, key):
            return Verdict("differently", f"{title} puts it on other rows of the weight")
        corrected = self.bundle.report.changed.get(layer)
        if corrected:
            return Verdict(
                "differently", f"{title} takes the scale that the file says; here {corrected}", None, "scale"
            )
        return verdict

    def _left_out(self, stack: tuple[Entry, ...], key: str, stored: Collection[str]) -> Verdict | None:
        """What becomes of a layer whose scale or magnitude the program does not look for where the file has it."""
        title, dialect, (entry, *others) = self.program.title, DIALECTS[self.own], stack
        if self.routed is not None and key in self.routed.without_lengths:
            return Verdict(
                "differently",
                f"{title} leaves DoRA's magnitude out; how far off that is depends on the base weight",
                None,
                "plain",
            )
        scale = entry.algorithm.scale(entry.geometry)
        kept_outside = (dialect.scale == "header" and ALPHA not in stored) or dialect.folder
        outside = kept_outside and not self.program.reads_header
        inside = self.routed is not None and key in self.routed.without_scale
        if (outside or inside) and abs(scale - 1) > SAME:
            where = "a file's header or config" if outside else "alpha beside such tensors"
            error = None if others or isinstance(entry.algorithm, DoRA) else abs(1 / scale - 1) if scale else None
            return Verdict("differently", f"{title} reads no scale from {where}, and takes 1", error, "scale")
        return None


def _among(key: str, pattern: str, groups: set[tuple[str | None, ...]]) -> bool:
    match = re.fullmatch(pattern, key)
    return match is not None and match.groups() in groups
