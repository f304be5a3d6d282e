"""From one kind of adapter file to another."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from lycoris.adapters.load_report import SHOWN, Report
from lycoris.errors import FileError, prefix_errors, unknown
from lycoris.files.container.kinds import WEIGHTS
from lycoris.files.container.model_weights import BaseWeights
from lycoris.files.container.storage import load_tensors, save_tensors
from lycoris.files.container.target import check_target
from lycoris.files.detect import Detection
from lycoris.files.dialects import DIALECTS
from lycoris.files.growth import ALLOW, Bytes, GrowthError, change, forms, size_of
from lycoris.files.opening import open_file
from lycoris.files.peft import write_peft
from lycoris.files.programs import PROGRAMS
from lycoris.files.rewriting import Order
from lycoris.files.writing import Encoded


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how. `str` tells it in lines."""

    detection: Detection
    reports: Mapping[str, Report]
    """By component."""
    assumed: Mapping[str, str]
    """Component → the known model that it was taken to be for, where none was given."""
    written: Encoded
    rounded: Mapping[str, int]
    """Precision → tensors whose values it does not hold exactly."""
    forms: tuple[str, str]
    """What the layers of the source have and what those written have, such as "38 lora of rank 4"."""
    before: Bytes
    after: Bytes
    unchanged: bool = False
    """Whether the tensors are those of the source, under the same names."""

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
        return "\n".join([*lines, *self._changes(), f"{len(self.written.tensors)} tensors written"])

    def _changes(self) -> list[str]:
        """What became of the layers, and of the size."""
        lines = ["the tensors and their names are those of the source"] if self.unchanged else []
        changed: dict[str, list[str]] = {}
        for layer, note in self.written.notes.items():
            changed.setdefault(note, []).append(layer)
        for note, layers in changed.items():
            more = f" and {len(layers) - 1} more" if len(layers) > 1 else ""
            lines.append(f"{layers[0]}{more}: {note}")
        one, other = self.forms
        lines += [f"layers: {one}" if one == other else f"layers: {one}; now {other}"]
        lines += [f"exact but for {count} tensors rounded to {dtype}" for dtype, count in self.rounded.items()]
        if not self.rounded:
            lines.append("exact: no value was rounded")
        before, after = self.before.file, self.after.file
        return [*lines, f"size: {before} bytes before, {after} after ({change(before, after)})"]


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
    allow_growth: bool = False,
) -> Conversion:
    """Write an adapter file anew in another dialect, exactly, or not at all.

    `portable` names a program that reads it as trained then: adapters that it would take for something else are written
    otherwise, and where that depends on the base model, by its `weights`. Unless `check` of the result says that it
    does, nothing is written. `to` is the dialect, None: the smallest form of that program's in which it does, first of
    all the one that the file has. `base` is the denoiser that the file is for (one on the meta device serves); None: a
    known model, recognised by names and sizes. With `strict=False` what has no place is left out, and the report tells
    it.

    A file that would become more than 10 % larger is refused unless `allow_growth`; what `dtype` adds is asked for and
    does not count.

    A target that exists is refused unless `overwrite`, one that is read here always.

    Raises `FileError` for that (`GrowthError` for the size), when the file fits no model, when something in it has no
    place, when it may be for several models whose names differ, or when the dialect cannot hold what it has or the
    program does not read it as trained; then it says why, and of which dialects it does.
    """
    _check_asked(to, portable)
    read = {Path(source), *(() if weights is None else weights.files.values())}
    check_target(target, read, overwrite=overwrite)
    found = open_file(source, base, strict=strict)
    before = Bytes.of(found.tensors, size_of(source), dtype)
    order = Order(found, base, weights, dtype, before, allow_growth)
    try:
        with prefix_errors(source):
            made = order.for_program(portable, to) if portable is not None else order.rewrite(str(to))
    except GrowthError as error:
        raise GrowthError(f"{error}. {ALLOW}") from error
    if made.folder is None:
        save_tensors(made.written.tensors, target, made.written.header)
    else:
        write_peft(made.folder, target, dtype=dtype)
        made.written.tensors.update(load_tensors(Path(target) / WEIGHTS)[0])
    written = made.written.tensors
    return Conversion(
        detection=found.detection,
        reports={name: bundle.report for name, bundle in found.bundles.items()},
        assumed=found.assumed,
        written=made.written,
        rounded=made.rounded,
        forms=(_count_forms(found.shapes, found.detection.dialect), _count_forms(_shapes(written), made.dialect)),
        before=Bytes.of(found.tensors, size_of(source)),
        after=Bytes.of(written, size_of(target)),
        unchanged=made.unchanged,
    )


def _check_asked(to: str | None, portable: str | None) -> None:
    if portable is not None and portable not in PROGRAMS:
        raise FileError(unknown("program", portable, PROGRAMS))
    if to is None and portable is None:
        raise FileError(f"say what to convert to: a dialect ({', '.join(DIALECTS)}) or the program that is to read it")
    if to is not None and to not in DIALECTS:
        raise FileError(unknown("dialect", to, DIALECTS))


def _shapes(tensors: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _count_forms(shapes: Mapping[str, tuple[int, ...]], dialect: str) -> str:
    counts = forms(shapes, DIALECTS[dialect]).most_common()
    told = [f"{count} {form}" for form, count in counts[:SHOWN]]
    return ", ".join(told) + (f" and {len(counts) - SHOWN} more kinds" if len(counts) > SHOWN else "")
