"""From an adapter file to a bundle, with every tensor accounted for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from lycoris import fingerprint
from lycoris.algorithm import Entry
from lycoris.algorithms import ALPHA, LoRA, read_tensors
from lycoris.bundle import Base, Bundle
from lycoris.errors import FileError, nearest, unknown
from lycoris.files import forms, history, placing
from lycoris.files.choosing import Standing, standing
from lycoris.files.components import component_of, family_in, family_of
from lycoris.files.detect import judge
from lycoris.files.dialect import Dialect, Key
from lycoris.files.dialects import DIALECTS
from lycoris.files.families import FAMILIES
from lycoris.files.family import Family
from lycoris.files.layout import Layout
from lycoris.files.peft.config import CONFIG, WEIGHTS
from lycoris.files.peft.reading import read_peft
from lycoris.files.scales import BESIDE, Scales, beside, sources
from lycoris.files.storage import load_tensors
from lycoris.geometry import Geometry
from lycoris.report import SHOWN, Report, some

DOWN = LoRA.keys["down"]


def read(
    path: str | os.PathLike[str],
    model: nn.Module,
    dialect: str | None = None,
    *,
    component: str = "",
    prefix: str | None = None,
    strict: bool = True,
    family: str | None = None,
) -> Bundle:
    """Read an adapter file, or a folder of PEFT's, for a model. See `resolve`; the name is put before every error."""
    folder = peft_folder(path)
    if folder is not None and dialect in (None, "peft"):
        return read_peft(folder, model)
    tensors, metadata = load_tensors(path)
    try:
        return resolve(
            tensors,
            model,
            dialect,
            metadata={**beside(path), **metadata},
            component=component,
            prefix=prefix,
            strict=strict,
            family=family,
        )
    except FileError as error:
        raise FileError(f"{path}: {error}") from error


def peft_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of an adapter of PEFT's, from itself or from the file in it; None for everything else."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    own = Path(path).is_dir() or Path(path).stem == Path(WEIGHTS).stem
    return folder if own and (folder / CONFIG).is_file() else None


def resolve(
    tensors: Mapping[str, Tensor],
    model: nn.Module | Layout,
    dialect: str | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    component: str = "",
    prefix: str | None = None,
    strict: bool = True,
    family: str | None = None,
    shared: bool = True,
) -> Bundle:
    """Tensors by file name, matched to a model's layers; `report` of the bundle says what became of each.

    The model is only asked for paths and shapes, so one on the meta device serves. `component` is which part of a
    pipeline the model is ("" the denoiser, "text_encoder", ...); tensors of other components are reported. `dialect`
    and `prefix` (for flat names behind a word of one's own) say what the file is; None: it is recognised. `family`
    tells how text encoders are counted; None: by the header, or by the model. An adapter of a fused layer stays one,
    and the layers that have its rows get slices of it (`lycoris.slices`); with `shared=False` each gets an adapter of
    its own, which other programs' ways of training need, as a LoRA or a dense difference where it cannot be less.

    Raises `FileError` when nothing matches and, unless `strict` is False, when a tensor of this component belongs to no
    layer or does not fit it; nothing is loaded then. With `strict=False` what fits is taken and the rest reported.
    """
    layout = model if isinstance(model, Layout) else Layout.of(model)
    found, _ = _resolve(
        tensors,
        layout,
        dialect,
        metadata or {},
        component,
        prefix,
        strict,
        family,
        as_written=False,
        shared=shared,
    )
    other = "" if component or isinstance(model, Layout) else fingerprint.other_weights(metadata or {}, model)
    return found.remarked(other) if other else found


def resolve_as_written(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    dialect: str,
    header: Mapping[str, str],
    component: str,
    family: str | None,
    *,
    strict: bool = True,
) -> tuple[Bundle, Layout]:
    """A bundle under the names of layers that the file has, so that nothing is cut or joined, and their layout."""
    return _resolve(tensors, layout, dialect, header, component, None, strict, family, as_written=True)


def _resolve(
    tensors: Mapping[str, Tensor],
    layout: Layout,
    dialect: str | None,
    header: Mapping[str, str],
    component: str,
    prefix: str | None,
    strict: bool,
    family: str | None,
    *,
    as_written: bool,
    shared: bool = True,
) -> tuple[Bundle, Layout]:
    choices = _dialects(tensors, dialect, prefix)
    whose, contradiction = _family(family, header, component, layout)
    # A prefix of one's own is that of this component, whatever a family's files mean by it.
    whose = whose if prefix is None else None
    match = max(
        (_matched(tensors, each, layout, component, whose, header) for each in choices), key=lambda each: each.standing
    )
    if not match.groups:
        raise FileError(_nothing(match, tensors))
    if as_written:
        layout = layout.renamed(match.naming)
    unscaled = match.dialect.folder and not any(ALPHA in group for group in match.groups.values())
    if strict and unscaled and not sources(header, match.dialect, match.prefix):
        raise FileError(
            f"PEFT's tensors tell their scale only beside its {CONFIG}: read the folder with both, or take 1 for it "
            "with strict=False"
        )
    found, mismatched = _entries(tensors, match, layout, header)
    places = placing.place(found.stacks, layout, match.naming, shared=shared)
    mismatched |= places.refused
    remark = "" if component else fingerprint.other_layers(header, layout.owner, layout.layers, layout.middle)
    report = Report(
        dialect=match.dialect.name,
        applied={path: " + ".join(e.algorithm.name for e in stack) for path, stack in places.entries.items()},
        unused=_unused(match, layout),
        mismatched=mismatched,
        elsewhere=match.elsewhere,
        changed=found.notes | places.notes,
        remarks=tuple(each for each in (remark, contradiction, *found.remarks) if each),
        cast=Counter(str(tensors[name].dtype).removeprefix("torch.") for name in match.used()),
    )
    if not places.entries or (strict and not report.clean):
        raise FileError(_problem(report, match, layout, tensors, header))
    # A fingerprint is of a model under its own names, which are diffusers' where only the file's are known.
    base = Base(layout.owner, layout.middle if as_written else layout.layers)
    own = {key: value for key, value in header.items() if key != BESIDE}
    return Bundle(places.entries, own, base, report), layout


def _family(name: str | None, header: Mapping[str, str], component: str, layout: Layout) -> tuple[Family | None, str]:
    """The family by which text encoders are counted, and what is to be said of the header's."""
    if name is not None:
        if name not in FAMILIES:
            raise FileError(unknown("family", name, FAMILIES))
        return FAMILIES[name], ""
    told, architecture = family_in(header), layout.architecture
    if told is None or architecture is None or told.components.get(component, architecture.name) == architecture.name:
        return told or family_of({component: architecture}), ""
    return family_of({component: architecture}), f"its header says {told.name}, and the model is a {architecture.name}"


def _unused(match: _Match, layout: Layout) -> dict[str, str]:
    """Tensor → why it has no place."""
    unused = dict.fromkeys(match.strange, f"not a name of the format {match.dialect.name}")
    for layer, group in match.groups.items():
        if layer not in match.names:
            unused |= dict.fromkeys(group.values(), f"{layout.owner} has no layer {layer}")
    return unused


@dataclass
class _Match:
    """A file read as one dialect and, of its family's namings, the one that fits best."""

    dialect: Dialect
    naming: str
    groups: dict[str, dict[str, str]]
    """Layer as written → suffix → tensor name."""
    names: Mapping[str, str]
    """Layer as written → dotted, for the layers that the model has."""
    strange: list[str]
    elsewhere: dict[str, int]
    prefix: str
    """What the names begin with."""
    standing: Standing

    def used(self) -> list[str]:
        return [name for layer, group in self.groups.items() if layer in self.names for name in group.values()]


def _dialects(tensors: Mapping[str, Tensor], name: str | None, prefix: str | None) -> list[Dialect]:
    if prefix is not None:
        return [Dialect(name=prefix, style="flat", prefixes={f"{prefix}_": ""})]
    if name is not None:
        if name not in DIALECTS:
            raise FileError(unknown("dialect", name, DIALECTS))
        return [DIALECTS[name]]
    fitting = [dialect for dialect in DIALECTS.values() if any(dialect.split(key) for key in tensors)]
    if fitting:
        return fitting
    known = "; ".join(f"{d.name}: {next(iter(d.prefixes)) or 'no prefix'}..." for d in DIALECTS.values())
    raise FileError(f"its {len(tensors)} keys are of no known format: {some(tensors)}. Known are {known}")


def _matched(
    tensors: Mapping[str, Tensor],
    dialect: Dialect,
    layout: Layout,
    component: str,
    family: Family | None,
    header: Mapping[str, str],
) -> _Match:
    keys = {name: dialect.split(name) for name in tensors}
    parted = {name: key for name, key in keys.items() if key is not None}
    by_component: dict[str, dict[str, Key]] = {}
    whose = component_of(family)
    for name, key in parted.items():
        by_component.setdefault(whose(key), {})[name] = key
    mine = by_component.pop(component, {})
    groups: dict[str, dict[str, str]] = {}
    for name, key in mine.items():
        first = groups.setdefault(key.layer, {}).setdefault(key.suffix, name)
        if first != name:
            raise FileError(f"{first} and {name} are the same tensor under two names; take one of them out")
    tables = {naming: layout.written(naming, dialect.style) for naming in layout.namings}
    usual = None if layout.architecture is None else dialect.naming_for(layout.architecture)
    counts = {each: sum(layer in table for layer in groups) for each, table in tables.items()}
    naming = max(tables, key=lambda each: (counts[each], each == usual))
    strange = [name for name, key in keys.items() if key is None]
    elsewhere = {name: len(those) for name, those in by_component.items()}
    prefix = next((key.prefix for key in mine.values()), "")
    own = standing(
        dialect, keys.values(), header, named=counts[naming], naming=naming, architecture=layout.architecture
    )
    return _Match(dialect, naming, groups, tables[naming], strange, elsewhere, prefix, own)


@dataclass
class _Found:
    stacks: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    """By dotted name, in the naming of the file."""
    notes: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def _entries(
    tensors: Mapping[str, Tensor], match: _Match, layout: Layout, header: Mapping[str, str]
) -> tuple[_Found, dict[str, str]]:
    """The stacks of a file by layer, and why others are none."""
    found, mismatched = _Found(), {}
    scales = Scales.of(header, match.dialect, match.prefix)
    spans = layout.spans(match.naming) if match.naming != layout.naming else {}
    for layer, group in match.groups.items():
        if layer not in match.names:
            continue
        name = match.names[layer]
        geometry = layout.whole(spans[name]) if name in spans else layout.layers[name]
        try:
            own = {suffix: tensors[key] for suffix, key in group.items()}
            if DOWN in own and own[DOWN].dim() and "scale" not in own:
                told = scales.alpha(name, len(own[DOWN]), _alpha(own))
                own |= {} if told is None or ALPHA in own else {ALPHA: torch.tensor(told, dtype=torch.float64)}
            stack = _stack(own, geometry, name)
            stack, note = history.as_trained(stack, layer, layout.parts(match.naming, name), match.dialect, header)
        except FileError as error:
            mismatched[name] = str(error)
            continue
        found.stacks[name] = stack
        if note:
            found.notes[name] = note
    found.remarks += scales.remarks()
    return found, mismatched


def _alpha(group: Mapping[str, Tensor]) -> float | None:
    """What a tensor `alpha` says, if it is one number; whether it has to be is for the algorithm to say."""
    return float(group[ALPHA]) if ALPHA in group and group[ALPHA].numel() == 1 else None


def _stack(group: Mapping[str, Tensor], geometry: Geometry, where: str) -> tuple[Entry, ...]:
    for suffix, tensor in group.items():
        # Whether alpha has to be finite is for the algorithm to say.
        if suffix != ALPHA and not finite(tensor):
            raise FileError(f"{where}.{suffix} holds NaN or infinity")
    stack = []
    for part in forms.modern(group, geometry, where):
        algorithm, own = read_tensors(part, geometry, where)
        stack.append(Entry(algorithm, geometry, own))
    return tuple(stack)


def finite(tensor: Tensor) -> bool:
    """Whether a tensor has no NaN and no infinity."""
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    # NaN is both; many times as fast as a test of every number. Of one byte torch has no order.
    least, most = (tensor.half() if tensor.itemsize == 1 else tensor).aminmax()
    return bool(torch.isfinite(least) & torch.isfinite(most))


def _nothing(match: _Match, tensors: Mapping[str, Tensor]) -> str:
    others = sorted(name or "the denoiser" for name in match.elsewhere)
    if not others:
        return f"its {len(tensors)} keys are not of the format {match.dialect.name}: {some(tensors)}"
    return (
        f"it has nothing for this component, only tensors for {', '.join(others)}; pass the model that they are for, "
        f"and its name as component="
    )


def _looks(tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> str:
    """What a file's keys are like, when they are of a known family."""
    try:
        found = judge({name: tuple(tensor.shape) for name, tensor in tensors.items()}, header)
    except FileError:
        return ""
    parts = [f"the {name or 'denoiser'} ({found.models[name]})" for name in found.components if name in found.models]
    if not parts:
        return ""
    return f"These look like {found.dialect} keys for {' and '.join(parts)}. "


def _problem(
    report: Report, match: _Match, layout: Layout, tensors: Mapping[str, Tensor], header: Mapping[str, str]
) -> str:
    """What was left over, grouped."""
    lines = []
    if report.mismatched:
        listed = [f"  {why}" for why in list(report.mismatched.values())[:SHOWN]]
        more = [f"  and {len(report.mismatched) - SHOWN} more"] if len(report.mismatched) > SHOWN else []
        head = f"{len(report.mismatched)} of {len(match.groups)} layers do not fit {layout.owner}:"
        lines.append("\n".join([head, *listed, *more]))
    lost = sorted(layer for layer in match.groups if layer not in match.names)
    if lost:
        close = ((one, nearest(one, match.names, 1)) for one in lost[:SHOWN])
        hint = next((f"; {one} is like {near[0]}" for one, near in close if near), "")
        none = len(lost) == len(match.groups)
        what = "none of its" if none else f"{len(lost)} of its"
        lines.append(
            f"{what} {len(match.groups)} layers {'is' if none else 'are not'} a layer of {layout.owner}: "
            f"{some(lost)}{hint}. {layout.owner} has {len(match.names)} such layers: {some(sorted(match.names))}. "
            f"{_looks(tensors, header)}Is this the model the file was made for?"
        )
    if match.strange:
        count = sum(map(len, match.groups.values())) + len(match.strange) + sum(match.elsewhere.values())
        lines.append(
            f"{len(match.strange)} of its {count} keys are not of the format {match.dialect.name}: "
            f"{some(match.strange)}"
        )
    return "\n".join(lines)
