"""What a program makes of an adapter file, before it is given to it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from lycoris.algorithms import DoRA
from lycoris.bundle import Bundle, Entry
from lycoris.errors import FileError, unknown
from lycoris.files.consumers import CONSUMERS, Verdict
from lycoris.files.detect import Detection
from lycoris.files.opening import opened
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
    program = CONSUMERS[consumer]
    found = opened(path, base)
    detection, bundles, layouts = found.detection, found.bundles, found.layouts
    architecture = layouts[""].architecture if "" in layouts else None
    name = None if architecture is None else architecture.name
    keys, unknown_model = "", not any(program.knows(each, name) for each in program.keys)
    if not program.knows(detection.dialect, name):
        known = ", ".join(each for each in program.keys if program.knows(each, name))
        keys = f"{program.title} does not know keys of the format {detection.dialect} for {name or 'this model'}" + (
            f"; it knows {known}" if known else ", nor of any other known here"
        )
    entries = {f"{name}.{layer}" if name else layer: stack for name, layer, stack in _each(bundles)}
    verdicts = {layer: _worst([program.verdict(entry) for entry in stack]) for layer, stack in entries.items()}
    return Check(
        consumer, detection, keys, unknown_model, verdicts, {layer: _told(stack) for layer, stack in entries.items()}
    )


def _each(bundles: Mapping[str, Bundle]) -> list[tuple[str, str, tuple[Entry, ...]]]:
    return [(name, layer, stack) for name, bundle in bundles.items() for layer, stack in bundle.entries.items()]


def _worst(verdicts: Sequence[Verdict]) -> Verdict:
    order = ("not at all", "differently", "as trained")
    return min(verdicts, key=lambda each: order.index(each.reads))


def _told(stack: tuple[Entry, ...]) -> str:
    names = []
    for entry in stack:
        own = entry.algorithm
        names.append(f"dora over {own.over.name}, axis {own.axis}" if isinstance(own, DoRA) else own.name)
    return " + ".join(names)
