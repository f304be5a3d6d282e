"""Predict what a program makes of an adapter file."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import nn

from lycoris.adapters.load_report import some
from lycoris.algorithms import DoRA
from lycoris.algorithms.base import Entry
from lycoris.errors import FileError, unknown
from lycoris.files.detect import Detection
from lycoris.files.opening import Opened, open_file
from lycoris.files.programs import PROGRAMS, Program, Verdict
from lycoris.files.programs.parts import FilePart
from lycoris.files.programs.portable import EXPORTS
from lycoris.files.programs.written import find_denoiser, find_scales, group_written, list_names_in_file, route_file


@dataclass(frozen=True)
class ProgramCheck:
    """What a program reads of a file.

    `str` gives it in lines, with layers of the same verdict together.
    """

    program: str
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
        """Whether the program reads all of the file as it was trained.

        False also where that is not known.
        """
        return not self.keys and all(each.reads == "as trained" for each in self.layers.values())

    @property
    def reasons(self) -> list[str]:
        """Why the file is not read as trained, one sentence each.

        Empty if it is.
        """
        bad = [row for row in self.list_rows() if row[2] != "as trained"]
        found = [f"{count} layers of {algorithm} are read {reads}: {why}" for algorithm, count, reads, _, why in bad]
        return [*filter(None, [self.keys]), *found]

    @property
    def remedies(self) -> tuple[str, ...]:
        """What conversion would change to fix it, sorted.

        Empty if nothing is wrong, or no fix is known.
        """
        found = {EXPORTS[each.remedy].description for each in self.layers.values() if each.remedy is not None}
        return tuple(sorted(found))

    def list_rows(self) -> list[tuple[str, str, str, str, str]]:
        """Return the verdicts as a table: (algorithm, layers, read, error, why).

        One row for each verdict; all cells are strings. The error is relative to the trained change, and "" where the
        tensors alone do not determine it.
        """
        groups: dict[tuple[str, Verdict], list[str]] = {}
        for layer, verdict in self.layers.items():
            groups.setdefault((self.algorithms[layer], verdict._replace(error=None)), []).append(layer)
        found: list[tuple[str, str, str, str, str]] = []
        for (algorithm, verdict), layers in groups.items():
            errors = [error for layer in layers if (error := self.layers[layer].error) is not None]
            span = f"{min(errors):.2g} to {max(errors):.2g}" if errors and min(errors) != max(errors) else ""
            shown = span or (f"{errors[0]:.2g}" if errors else "")
            found.append((algorithm, str(len(layers)), verdict.reads, shown, verdict.why))
        return found

    def __str__(self) -> str:
        title = PROGRAMS[self.program].title
        lines = [str(self.detection), ""]
        if self.keys:
            lines.append(self.keys)
        for algorithm, count, reads, error, why in self.list_rows():
            off = f" (relative error of the change {error})" if error else ""
            lines.append(f"{count} layers of {algorithm}: {reads}{off}: {why}")
        if self.as_trained:
            return "\n".join([*lines, f"{title} reads all of it as trained."])
        lines += [f"an export makes it right: {remedy}" for remedy in self.remedies]
        hopeless = [layer for layer, each in self.layers.items() if each.reads != "as trained" and not each.remedy]
        if hopeless:
            lines.append(f"no export is known for {some(hopeless)}")
        if len(hopeless) < len(self.layers) and not self.unknown:
            lines.append(f"convert it with: lycoris convert IN OUT --portable {self.program}")
        return "\n".join(lines)


def check(path: str | os.PathLike[str], program: str, *, base: nn.Module | None = None) -> ProgramCheck:
    """Predict what a program makes of an adapter file, layer by layer.

    The rules are those of the program versions named in `lycoris.files.programs`; the program itself is not run.

    Args:
        path: A file or a PEFT folder.
        program: A name in `PROGRAMS`.
        base: The denoiser it is for, which may be on the meta device; None: a known model, recognized by names and
            sizes.

    Raises:
        FileError: The file is damaged or fits no model, or `program` is unknown.
    """
    if program not in PROGRAMS:
        raise FileError(unknown("program", program, PROGRAMS))
    return check_opened(open_file(path, base), program)


def check_opened(found: Opened, name: str) -> ProgramCheck:
    """Predict what the program of that name makes of an opened file.

    `name` must be in `PROGRAMS`. The same as `check` for a file that was read before.
    """
    program = PROGRAMS[name]
    detection, bundles, layouts = found.detection, found.bundles, found.layouts
    written = group_written(found.shapes, detection)
    routed = route_file(program, found, written)
    taken_for = (
        program.detect_algorithm(found.shapes, find_denoiser(found)) if program.detect_algorithm is not None else ""
    )
    parts = [
        FilePart(
            *(program, name, detection.dialect, layouts[name], bundles[name], written[name], routed, taken_for),
            family=found.family,
            model=found.assumed.get(name, ""),
            scales=find_scales(found, written[name]),
        )
        for name in detection.components
    ]
    rejected = [f"{program.title} {routed.refused}"] if routed is not None and routed.refused else []
    if program.explain_rejection is not None and (
        why := program.explain_rejection(list_names_in_file(found), find_denoiser(found))
    ):
        rejected.append(f"{program.title} {why}")
    rejected += [problem for part in parts for problem in (*part.problems, part.conflict) if problem]
    lost = len(found.shapes) - sum(part.taken_count for part in parts)
    if program.max_unmatched is not None and lost > program.max_unmatched:
        rejected.append(
            f"{program.title} rejects a file of which it does not know {lost} keys; {program.max_unmatched} are let by"
        )
    verdicts, algorithms = {}, {}
    for part in parts:
        for layer, verdict in part.verdicts.items():
            name = f"{part.component}.{layer}" if part.component else layer
            verdicts[name] = _reject_layer(verdict, program) if rejected else verdict
            algorithms[name] = _name_algorithms(part.bundle.entries[layer])
    problems = [*rejected, *(part.unknown for part in parts if part.unknown)]
    if detection.renamed and program.take_tensors is None:
        first, new = next(iter(detection.renamed.items()))
        problems.append(f"{program.title} is not known to read names such as {first}, read here as {new}: convert it")
    nowhere = not any(part.elsewhere for part in parts)
    return ProgramCheck(program.name, detection, "\n".join(problems), nowhere, verdicts, algorithms)


def _reject_layer(verdict: Verdict, program: Program) -> Verdict:
    """What becomes of a layer in a file that is rejected for another reason."""
    if verdict.reads == "not at all":
        return verdict
    why = f"{program.title} rejects the file" + ("" if verdict.reads == "as trained" else f"; else: {verdict.why}")
    return Verdict("not at all", why, None, verdict.remedy or "format")


def _name_algorithms(stack: tuple[Entry, ...]) -> str:
    names = []
    for entry in stack:
        own = entry.algorithm
        names.append(f"dora over {own.inner.name}, axis {own.axis}" if isinstance(own, DoRA) else own.name)
    return " + ".join(names)
