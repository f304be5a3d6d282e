"""What a program makes of an adapter file, before it is given to it."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from torch import nn

from lycoris.algorithms import DoRA
from lycoris.bundle import Bundle, Entry
from lycoris.errors import FileError, unknown
from lycoris.files.components import component_of
from lycoris.files.consumers import CONSUMERS, Consumer, Verdict
from lycoris.files.consumers.keys import Known
from lycoris.files.detect import Detection
from lycoris.files.dialect import flatten
from lycoris.files.dialects import DIALECTS
from lycoris.files.families import FAMILIES
from lycoris.files.layout import Layout
from lycoris.files.opening import Opened, opened
from lycoris.files.portable import EXPORTS
from lycoris.report import some


@dataclass(frozen=True)
class Check:
    """What a program reads of a file. `str` tells it in lines, layers with the same verdict together."""

    consumer: str
    detection: Detection
    keys: str
    """Why it does not know the file's keys; "" when it does."""
    unknown: bool
    """Whether it knows no keys at all for this model."""
    layers: Mapping[str, Verdict] = field(default_factory=dict)
    """Layer → verdict on its adapter."""
    algorithms: Mapping[str, str] = field(default_factory=dict)
    """Layer → its algorithm."""

    @property
    def as_trained(self) -> bool:
        """Whether all of it is read as it was trained."""
        return not self.keys and all(each.reads == "as trained" for each in self.layers.values())

    @property
    def reasons(self) -> list[str]:
        """Why not all of it is."""
        bad = [row for row in self.rows() if row[2] != "as trained"]
        found = [f"{count} layers of {algorithm} are read {reads}: {why}" for algorithm, count, reads, _, why in bad]
        return [*filter(None, [self.keys]), *found]

    @property
    def remedies(self) -> tuple[str, ...]:
        """What exports would do."""
        found = {EXPORTS[each.remedy].does for each in self.layers.values() if each.remedy is not None}
        return tuple(sorted(found))

    def rows(self) -> list[tuple[str, str, str, str, str]]:
        """(algorithm, layers, read, error, why), one for each verdict."""
        groups: dict[tuple[str, Verdict], list[str]] = {}
        for layer, verdict in self.layers.items():
            groups.setdefault((self.algorithms[layer], verdict._replace(error=None)), []).append(layer)
        found: list[tuple[str, str, str, str, str]] = []
        for (algorithm, verdict), layers in groups.items():
            errors = [error for layer in layers if (error := self.layers[layer].error) is not None]
            span = f"{min(errors):.2g} to {max(errors):.2g}" if errors and min(errors) != max(errors) else ""
            told = span or (f"{errors[0]:.2g}" if errors else "")
            found.append((algorithm, str(len(layers)), verdict.reads, told, verdict.why))
        return found

    def __str__(self) -> str:
        title = CONSUMERS[self.consumer].title
        lines = [str(self.detection), ""]
        if self.keys:
            lines.append(self.keys)
        for algorithm, count, reads, error, why in self.rows():
            off = f" (relative error of the change {error})" if error else ""
            lines.append(f"{count} layers of {algorithm}: {reads}{off}: {why}")
        if self.as_trained:
            return "\n".join([*lines, f"{title} reads all of it as trained."])
        lines += [f"an export makes it right: {remedy}" for remedy in self.remedies]
        hopeless = [layer for layer, each in self.layers.items() if each.reads != "as trained" and not each.remedy]
        if hopeless:
            lines.append(f"no export is known for {some(hopeless)}")
        if len(hopeless) < len(self.layers) and not self.unknown:
            lines.append(f"convert it with: lycoris convert IN OUT --portable {self.consumer}")
        return "\n".join(lines)


def check(path: str | os.PathLike[str], consumer: str, *, base: nn.Module | None = None) -> Check:
    """What a program makes of an adapter file, layer by layer, by its rules as they are known here.

    `base` as for `convert`. Raises `FileError` when the file is damaged or fits no model.
    """
    if consumer not in CONSUMERS:
        raise FileError(unknown("program", consumer, CONSUMERS))
    return judged(opened(path, base), consumer)


def judged(found: Opened, consumer: str) -> Check:
    """The same of a file that is open."""
    program = CONSUMERS[consumer]
    detection, bundles, layouts = found.detection, found.bundles, found.layouts
    written = _written(found.shapes, detection)
    parts = [
        Part(program, name, detection.dialect, layouts[name], bundles[name], written[name])
        for name in detection.components
    ]
    verdicts, algorithms = {}, {}
    for part in parts:
        for layer, verdict in part.verdicts.items():
            name = f"{part.component}.{layer}" if part.component else layer
            verdicts[name], algorithms[name] = verdict, _told(part.bundle.entries[layer])
    problems = [problem for part in parts for problem in (*part.problems, part.together) if problem]
    lost = sum(part.passed_over for part in parts)
    if program.unmatched is not None and lost > program.unmatched:
        problems.append(
            f"{program.title} rejects a file of which it does not know {lost} keys; {program.unmatched} are let by"
        )
    if detection.renamed:
        first, new = next(iter(detection.renamed.items()))
        problems.append(f"{program.title} is not known to read names such as {first}, read here as {new}: convert it")
    nowhere = not any(part.elsewhere for part in parts)
    return Check(consumer, detection, "\n".join(problems), nowhere, verdicts, algorithms)


class Written(NamedTuple):
    """A layer in a file."""

    key: str
    """What the names of its tensors have in common."""
    tensors: Mapping[str, tuple[int, ...]]
    """Their shapes, by name in LyCORIS' spelling."""


def _written(shapes: Mapping[str, tuple[int, ...]], detection: Detection) -> dict[str, dict[str, Written]]:
    """Component → layer as written → what the file has."""
    whose = component_of(FAMILIES[detection.family] if detection.family else None)
    found: dict[str, dict[str, Written]] = {component: {} for component in detection.components}
    for name, shape in shapes.items():
        key = DIALECTS[detection.dialect].split(name)
        if key is not None:
            layers = found.setdefault(whose(key), {})
            before = layers.get(key.layer, Written(key.prefix + key.layer, {}))
            layers[key.layer] = before._replace(tensors={**before.tensors, key.suffix: shape})
    return found


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
        if architecture is None or self.component or own.naming_for(architecture) == self.layout.naming:
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
        """Why the program does not take this component at all."""
        title, model = self.program.title, self.architecture or "this model"
        if self.known is None or all(map(self._lost, self.written)):
            there = ", ".join(each for each in self.elsewhere if each != self.own)
            return [
                f"{title} does not know keys of the format {self.own} for {model}"
                + (f"; it knows {there}" if there else ", nor of any other known here")
            ]
        keys = {each.key for each in self.written.values()}
        stopping = sorted(key for key in keys if re.fullmatch(self.known.stops, key))
        groups = {match.groups() for key in keys if (match := re.fullmatch(self.known.needs, key))}
        every = (self.prefix + name for name in self.layout.written(self.layout.naming, DIALECTS[self.own].style))
        lacking = [key for key in every if key not in keys and _among(key, self.known.needs, groups)]
        found = [f"{title} rejects the file for {some(stopping)}"] if stopping else []
        if lacking:
            found.append(f"{title} rejects the file, for it wants all layers of that kind, and lacks {some(lacking)}")
        return found

    @property
    def together(self) -> str:
        """Why the program does not take layers together that it takes one by one; "" where it does."""
        alone = all(each.reads == "as trained" for each in self.verdicts.values())
        return self.program.whole(self.bundle) if self.program.whole is not None and alone else ""

    @property
    def passed_over(self) -> int:
        """How many tensors the program has no use for."""
        if self.known is None:
            return sum(len(each.tensors) for each in self.written.values())
        lost = (layer for layer, verdict in self.verdicts.items() if verdict.reads == "not at all")
        return sum(len(self.written[self._as_written(layer)].tensors) for layer in lost)

    @cached_property
    def verdicts(self) -> Mapping[str, Verdict]:
        """What becomes of each layer."""
        return {layer: self._verdict(layer, stack) for layer, stack in self.bundle.entries.items()}

    def _as_written(self, layer: str) -> str:
        return flatten(layer) if DIALECTS[self.own].style == "flat" else layer

    @cached_property
    def _named(self) -> Collection[str] | None:
        """The layers' names, as written, that the program knows; None: any."""
        architecture, named = self.layout.architecture, self.known.named if self.known else ""
        if architecture is None or not named:
            return None
        return self.layout.written(DIALECTS[named].naming_for(architecture), DIALECTS[self.own].style)

    def _lost(self, written: str) -> bool:
        """Whether the program passes a layer's keys over."""
        unnamed = self._named is not None and written not in self._named
        return unnamed or (self.known is not None and bool(re.fullmatch(self.known.lost, self.written[written].key)))

    def _verdict(self, layer: str, stack: tuple[Entry, ...]) -> Verdict:
        title, written = self.program.title, self._as_written(layer)
        key, stored = self.written[written]
        if self._lost(written) or (self.known is not None and re.fullmatch(self.known.stops, key)):
            return Verdict("not at all", f"{title} has no place for such keys")
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
        )
        if verdict.reads != "as trained":
            return verdict
        if self.known is not None and re.fullmatch(self.known.bent, key):
            return Verdict("differently", f"{title} puts it on other rows of the weight")
        corrected = self.bundle.report.changed.get(layer)
        if corrected:
            return Verdict(
                "differently", f"{title} takes the scale that the file says; here {corrected}", None, "scale"
            )
        return verdict


def _among(key: str, pattern: str, groups: set[tuple[str | None, ...]]) -> bool:
    match = re.fullmatch(pattern, key)
    return match is not None and match.groups() in groups


def _told(stack: tuple[Entry, ...]) -> str:
    names = []
    for entry in stack:
        own = entry.algorithm
        names.append(f"dora over {own.over.name}, axis {own.axis}" if isinstance(own, DoRA) else own.name)
    return " + ".join(names)
