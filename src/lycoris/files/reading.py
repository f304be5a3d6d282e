"""From an adapter file to a bundle, with every tensor accounted for."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lycoris.adapters.bundle import Base, Bundle
from lycoris.adapters.load_report import Report, some
from lycoris.algorithms import LoRA
from lycoris.algorithms.base import Entry
from lycoris.algorithms.tensors import ALPHA, read_tensors
from lycoris.errors import FileError, unknown
from lycoris.files import foreign, placing, variants
from lycoris.files.choosing import Standing, standing
from lycoris.files.container.kinds import CONFIG, WEIGHTS
from lycoris.files.dialects import DIALECTS, forms, history, wrappers
from lycoris.files.dialects.base import Dialect, Key
from lycoris.files.dialects.components import component_of, family_in, family_of
from lycoris.files.dialects.scales import BESIDE, Scales, sources
from lycoris.files.layout import Layout
from lycoris.files.peft.reading import read_peft
from lycoris.files.problems import nothing, problem
from lycoris.files.source import open_source
from lycoris.layers.geometry import Geometry
from lycoris.layers.sites import ModelSites
from lycoris.models import fingerprint
from lycoris.models.families import FAMILIES
from lycoris.models.families.family import Family
from lycoris.ops.finite import is_finite

DOWN = LoRA.tensor_names["down"]


def read(
    path: str | os.PathLike[str],
    model: nn.Module | ModelSites,
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
    with open_source(path) as (tensors, header):
        return resolve(
            tensors,
            model,
            dialect,
            metadata=header,
            component=component,
            prefix=prefix,
            strict=strict,
            family=family,
        )


def peft_folder(path: str | os.PathLike[str]) -> Path | None:
    """The folder of an adapter of PEFT's, from itself or from the file in it; None for everything else."""
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    own = Path(path).is_dir() or Path(path).stem == Path(WEIGHTS).stem
    return folder if own and (folder / CONFIG).is_file() else None


def resolve(
    tensors: Mapping[str, Tensor],
    model: nn.Module | ModelSites | Layout,
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
    and the layers that have its rows get slices of it (`lycoris.algorithms.slices`); with `shared=False` each gets an
    adapter of its own, which other programs' ways of training need, as a LoRA or a dense difference where it cannot be
    less.

    Raises `FileError` when nothing matches and, unless `strict` is False, when a tensor of this component belongs to no
    layer or does not fit it; nothing is loaded then. With `strict=False` what fits is taken and the rest reported.
    """
    other = ""
    if isinstance(model, Layout):
        layout = model
    else:
        sites = ModelSites.of(model)
        layout = Layout.of(sites)
        other = "" if component else fingerprint.other_weights(metadata or {}, sites)
    header, asked = metadata or {}, (component, prefix, strict, family)
    found, _ = _resolve(tensors, layout, dialect, header, *asked, as_written=False, shared=shared)
    return found.with_remark(other) if other else found


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
    if whole := foreign.whole(_shapes(tensors)):
        raise FileError(whole)
    whose, contradiction = _family(family, header, component, layout)
    # A prefix of one's own is that of this component, whatever a family's files mean by it.
    whose = whose if prefix is None else None

    tensors, match, _, remarks = _settle_names(
        tensors,
        lambda some: _match_best(some, _dialects(some, dialect, prefix), layout, component, whose, header),
        settle=not as_written,
    )
    if not match.groups:
        raise FileError(nothing(match, tensors))
    if as_written:
        layout = layout.in_naming(match.naming)
    unscaled = match.dialect.folder and not any(ALPHA in group for group in match.groups.values())
    if unscaled and not sources(header, match.dialect, match.prefix):
        remarks.append(f"its scale is taken to be 1: PEFT's tensors tell it only beside their {CONFIG}")
    found, mismatched = _entries(tensors, match, layout, header)
    places = placing.place(found.stacks, layout, match.naming, shared=shared)
    mismatched |= places.refused
    remark = "" if component else fingerprint.other_layers(header, layout.owner, layout.layers, layout.middle)
    unused, plain = _find_unused(match, layout)
    report = Report(
        dialect=match.dialect.name,
        applied={path: " + ".join(e.algorithm.name for e in stack) for path, stack in places.entries.items()},
        unused=unused,
        mismatched=mismatched,
        elsewhere=match.elsewhere,
        changed=found.notes | places.notes,
        remarks=tuple(each for each in (remark, contradiction, *remarks, *found.remarks, plain) if each),
        cast=Counter(str(tensors[name].dtype).removeprefix("torch.") for name in match.used_names()),
    )
    if not places.entries or (strict and not report.clean):
        raise FileError(problem(report, match, layout, tensors, header))
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


def _find_unused(match: Match, layout: Layout) -> tuple[dict[str, str], str]:
    """Tensor → why it has no place, and a remark on those that are hardly an adapter's."""
    unused = dict.fromkeys(match.strange, f"not a name of the format {match.dialect.name}")
    for layer, group in match.groups.items():
        if layer not in match.names:
            unused |= dict.fromkeys(group.values(), f"{layout.owner} has no layer {layer}")
    plain = [name for name in unused if foreign.is_plain(name)] if match.used_names() else []
    told = f"{len(plain)} tensors are no adapter's and of no layer, left out: {some(plain)}" if plain else ""
    return {name: why for name, why in unused.items() if name not in plain}, told


class _Settled(NamedTuple):
    """A file's tensors under the names by which they fit best, without what is no adapter's."""

    tensors: Mapping[str, Tensor]
    match: Match
    renamed: Mapping[str, str]
    """Name in the file → another by which it fits, where its own does not."""
    remarks: list[str]


def _settle_names(
    tensors: Mapping[str, Tensor], match_best: Callable[[Mapping[str, Tensor]], Match], *, settle: bool
) -> _Settled:
    """`match_best` is asked for each set of names, for other names may be of another format."""
    own, aside = foreign.split_foreign(_shapes(tensors))
    tensors = {name: tensors[name] for name in own}
    match, wrapped = match_best(tensors), wrappers.find_renames(tensors, wrappers.without_wrappers)
    if settle and not match.complete:
        used = {*match.used_names()}
        renamed = wrappers.find_renames(tensors, lambda name: name if name in used else wrappers.plainer(name))
        others = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
        again = match_best(others) if renamed else match
        # Layers alone do not tell: another name may be that of one more tensor of a layer that is there already.
        if (len(again.used_names()), again.standing) > (len(match.used_names()), match.standing):
            return _Settled(others, again, renamed, [*filter(None, (aside,)), wrappers.describe_renames(renamed)])
    return _Settled(tensors, match, {}, [*filter(None, (aside, wrappers.describe_renames(wrapped) if wrapped else ""))])


def settled_names(tensors: Mapping[str, Tensor], layout: Layout, header: Mapping[str, str]) -> Mapping[str, str]:
    """The names by which tensors fit a denoiser where their own do not: name in the file → that one."""
    if not any(each.split(key) for each in DIALECTS.values() for key in tensors):
        return {}
    whose, _ = _family(None, header, "", layout)
    return _settle_names(
        tensors,
        lambda some: _match_best(some, _dialects(some, None, None), layout, "", whose, header),
        settle=True,
    ).renamed


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


@dataclass
class Match:
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

    @property
    def complete(self) -> bool:
        """Whether all of it is of layers that the model has."""
        return bool(self.groups) and not self.strange and all(layer in self.names for layer in self.groups)

    def used_names(self) -> list[str]:
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
    if what := foreign.kind_of(_shapes(tensors), readable=True):
        raise FileError(what)
    if any(wrappers.plainer(key) != key for key in tensors):
        return list(DIALECTS.values())
    known = "; ".join(f"{d.name}: {next(iter(d.prefixes)) or 'no prefix'}..." for d in DIALECTS.values())
    raise FileError(f"its {len(tensors)} keys are of no known format: {some(tensors)}. Known are {known}")


def _match_best(
    tensors: Mapping[str, Tensor],
    dialects: Iterable[Dialect],
    layout: Layout,
    component: str,
    family: Family | None,
    header: Mapping[str, str],
) -> Match:
    """Of some formats the one that explains the names best; see `Standing`."""
    every = (_match_dialect(tensors, each, layout, component, family, header) for each in dialects)
    return max(every, key=lambda each: each.standing)


def _match_dialect(
    tensors: Mapping[str, Tensor],
    dialect: Dialect,
    layout: Layout,
    component: str,
    family: Family | None,
    header: Mapping[str, str],
) -> Match:
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
    tables = {naming: layout.written_names(naming, dialect.style) for naming in layout.namings}
    usual = None if layout.architecture is None else dialect.naming_for(layout.architecture)
    counts = {each: sum(layer in table for layer in groups) for each, table in tables.items()}
    naming = max(tables, key=lambda each: (counts[each], each == usual))
    strange = [name for name, key in keys.items() if key is None]
    elsewhere = {name: len(those) for name, those in by_component.items()}
    prefix = next((key.prefix for key in mine.values()), "")
    own = standing(
        dialect, keys.values(), header, named=counts[naming], naming=naming, architecture=layout.architecture
    )
    return Match(dialect, naming, groups, tables[naming], strange, elsewhere, prefix, own)


@dataclass
class _Found:
    stacks: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    """By dotted name, in the naming of the file."""
    notes: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def _entries(
    tensors: Mapping[str, Tensor], match: Match, layout: Layout, header: Mapping[str, str]
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
        own = {suffix: tensors[key] for suffix, key in group.items()}
        try:
            if DOWN in own and own[DOWN].dim() and "scale" not in own:
                told = scales.alpha(name, len(own[DOWN]), _alpha(own))
                own |= {} if told is None or ALPHA in own else {ALPHA: torch.tensor(told, dtype=torch.float64)}
            stack = _stack(own, geometry, name)
            stack, note = history.as_trained(stack, layer, layout.parts(match.naming, name), match.dialect, header)
        except FileError as error:
            down = own.get(DOWN)
            inputs = int(down.shape[1]) if down is not None and down.dim() > 1 else 0
            mismatched[name] = variants.describe_variant(layout, match.naming, name, inputs) or str(error)
            continue
        found.stacks[name] = stack
        if note:
            found.notes[name] = note
    found.remarks += scales.remarks()
    return found, mismatched


def _alpha(group: Mapping[str, Tensor]) -> float | None:
    """What a tensor `alpha` says, if it is one real number; whether it has to be is for the algorithm to say."""
    alpha = group.get(ALPHA)
    return None if alpha is None or alpha.numel() != 1 or alpha.is_complex() else float(alpha)


def _stack(group: Mapping[str, Tensor], geometry: Geometry, where: str) -> tuple[Entry, ...]:
    for suffix, tensor in group.items():
        # Whether alpha has to be finite is for the algorithm to say.
        if suffix != ALPHA and not is_finite(tensor):
            raise FileError(f"{where}.{suffix} holds NaN or infinity")
    stack = []
    for part in forms.modern(group, geometry, where):
        algorithm, own = read_tensors(part, geometry, where)
        stack.append(Entry(algorithm, geometry, own))
    return tuple(stack)
