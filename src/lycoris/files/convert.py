"""Convert an adapter file to another format."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from lycoris.adapters.load_report import SHOWN, Report
from lycoris.errors import FileError, prefix_errors, unknown
from lycoris.files.container.kinds import WEIGHTS
from lycoris.files.container.model_weights import BaseWeights
from lycoris.files.container.storage import get_shapes, load_tensors, save_tensors
from lycoris.files.container.target import check_target
from lycoris.files.detect import Detection
from lycoris.files.dialects import DIALECTS
from lycoris.files.growth import GROWTH_ADVICE, FileSize, GrowthError, count_forms, format_growth, measure_file
from lycoris.files.opening import Opened, open_file
from lycoris.files.peft import write_peft
from lycoris.files.programs import PROGRAMS
from lycoris.files.rewriting import Rewriter, RewrittenFile
from lycoris.files.writing import EncodedFile


@dataclass(frozen=True)
class Conversion:
    """What was converted, and how.

    `str` gives a summary in lines. `written` holds the tensors themselves, those of a PEFT folder as well.
    """

    detection: Detection
    reports: Mapping[str, Report]
    """By component."""
    assumed: Mapping[str, str]
    """Component → the known model that it was taken to be for, where none was given."""
    written: EncodedFile
    rounded: Mapping[str, int]
    """Precision → tensors whose values it does not hold exactly."""
    forms: tuple[str, str]
    """What the layers of the source have and what those written have, such as "38 lora of rank 4"."""
    before: FileSize
    after: FileSize
    unchanged: bool = False
    """Whether the tensors are those of the source, under the same names."""

    def __str__(self) -> str:
        found = self.detection
        lines = [f"from {found.dialect}: {sum(len(each.applied) for each in self.reports.values())} layers"]
        if self.assumed:
            models = ", ".join(f"{name or 'denoiser'} {model}" for name, model in self.assumed.items())
            shown = f"{found.family} ({models})" if found.family else models
            lines.append(f"taken to be for {shown}; {found.confidence}")
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
        return [*lines, f"size: {before} bytes before, {after} after ({format_growth(before, after)})"]


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
    """Write an adapter file in another dialect, exactly, or not at all.

    A file that would become more than 10 % larger is refused unless `allow_growth`; what `dtype` adds does not count.

    Args:
        source: A file or a PEFT folder.
        target: The file to write. An existing one is refused unless `overwrite`, a file that is read here always.
        to: The dialect; None, with `portable`: the smallest form that the program reads as trained, and the file's own
            if it does.
        portable: A program that must read the result as trained: adapters that it would misread are written in another
            form. The result is verified with `check` before it is written.
        base: The denoiser that the file is for, which may be on the meta device; None: a known model, recognized by
            names and sizes.
        weights: The base model's weights, for conversions that depend on them.
        dtype: Of the written tensors; None: unchanged.
        strict: Whether to refuse a file with tensors that match no layer. If False they are dropped and reported.

    Raises:
        FileError: The file fits no model, or several whose names differ; something in it matches no layer; the dialect
            cannot store it; or the program does not read it as trained, with the dialects of which it does.
            `GrowthError` if it would become too large.
    """
    _check_request(to, portable)
    read = {Path(source), *(() if weights is None else weights.files.values())}
    check_target(target, read, overwrite=overwrite)
    found = open_file(source, base, strict=strict)
    size = FileSize.measure(found.tensors, measure_file(source), dtype)
    order = Rewriter(found, base, weights, dtype, size, allow_growth)
    try:
        with prefix_errors(source):
            made = order.rewrite_for_program(portable, to) if portable is not None else order.rewrite(str(to))
    except GrowthError as error:
        raise GrowthError(f"{error}. {GROWTH_ADVICE}") from error
    written = _write_result(made, target, dtype)
    return Conversion(
        detection=found.detection,
        reports={name: bundle.report for name, bundle in found.bundles.items()},
        assumed=found.assumed,
        written=made.written,
        rounded=made.rounded,
        forms=_summarize_both(found, written, made.dialect),
        before=FileSize.measure(found.tensors, measure_file(source)),
        after=FileSize.measure(written, measure_file(target)),
        unchanged=made.unchanged,
    )


def _summarize_both(found: Opened, written: Mapping[str, Tensor], dialect: str) -> tuple[str, str]:
    """Return the forms of the layers in the file that was read, and in the one that was written."""
    before = _summarize_forms(found.shapes, found.detection.dialect)
    return before, _summarize_forms(get_shapes(written), dialect)


def _write_result(made: RewrittenFile, target: str | os.PathLike[str], dtype: torch.dtype | None) -> dict[str, Tensor]:
    """Write the file or folder, and return its tensors."""
    if made.folder is None:
        save_tensors(made.written.tensors, target, made.written.header)
    else:
        write_peft(made.folder, target, dtype=dtype)
        made.written.tensors.update(load_tensors(Path(target) / WEIGHTS)[0])
    return made.written.tensors


def _check_request(to: str | None, portable: str | None) -> None:
    if portable is not None and portable not in PROGRAMS:
        raise FileError(unknown("program", portable, PROGRAMS))
    if to is None and portable is None:
        raise FileError(f"say what to convert to: a dialect ({', '.join(DIALECTS)}) or the program that is to read it")
    if to is not None and to not in DIALECTS:
        raise FileError(unknown("dialect", to, DIALECTS))


def _summarize_forms(shapes: Mapping[str, tuple[int, ...]], dialect: str) -> str:
    counts = count_forms(shapes, DIALECTS[dialect]).most_common()
    shown = [f"{count} {form}" for form, count in counts[:SHOWN]]
    return ", ".join(shown) + (f" and {len(counts) - SHOWN} more kinds" if len(counts) > SHOWN else "")
