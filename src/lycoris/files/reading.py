"""Read an adapter file for a model, accounting for every tensor."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping
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
from lycoris.files.container.kinds import CONFIG, WEIGHTS
from lycoris.files.container.storage import get_shapes
from lycoris.files.dialects import DIALECTS, forms, history, wrappers
from lycoris.files.dialects.components import find_family, find_header_family
from lycoris.files.dialects.scales import ADJACENT_CONFIG, ScaleReader, find_scale_sources
from lycoris.files.layout import NamedLayout
from lycoris.files.matching import Match, list_dialects, match_best
from lycoris.files.peft.reading import read_peft
from lycoris.files.problems import explain_mismatch, explain_no_match
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
    """Read an adapter file, or a PEFT folder, for a model.

    The same as `resolve` for the tensors in the file, with the config next to it (`adapter_config.json`,
    `lycoris_config.json`) consulted for scales that the tensors do not store. See `resolve` for the other arguments.

    Args:
        path: A `.safetensors` file, a pickle (`.pt`, `.pth`, `.bin`, `.ckpt`; loaded without running code), or a PEFT
            folder.
        model: The model the adapters are for. It is only asked for paths and shapes, except by a few PEFT types; see
            `read_peft`.
        dialect: A name in `DIALECTS`; None: detected.

    Raises:
        FileError: The file is damaged, or does not fit the model. The message starts with `path`.

    Example:
            bundle = lycoris.read("adapter.safetensors", model)
            adapters = AdapterSet.load(model, bundle)
    """
    folder = find_peft_folder(path)
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


def find_peft_folder(path: str | os.PathLike[str]) -> Path | None:
    """Return the PEFT folder that a path means, or None.

    A path means a PEFT folder if it is one, that is, contains `adapter_config.json`, or if it is the `adapter_model.*`
    file in one.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    own = Path(path).is_dir() or Path(path).stem == Path(WEIGHTS).stem
    return folder if own and (folder / CONFIG).is_file() else None


def resolve(
    tensors: Mapping[str, Tensor],
    model: nn.Module | ModelSites | NamedLayout,
    dialect: str | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    component: str = "",
    prefix: str | None = None,
    strict: bool = True,
    family: str | None = None,
    shared: bool = True,
) -> Bundle:
    """Match tensors of an adapter file to the layers of a model.

    An adapter of a fused layer stays one, and the layers that hold its rows get slices of it
    (`lycoris.algorithms.slices`).

    Args:
        tensors: By name, as in the file.
        model: It is only asked for paths and shapes, so a model on the meta device will do.
        dialect: A name in `DIALECTS`; None: detected.
        metadata: The file's header.
        component: Which part of a pipeline the model is: "" for the denoiser, "text_encoder", ... Tensors of other
            components are reported, not loaded.
        prefix: For flat names with a custom prefix: the prefix without its underscore.
        strict: Whether to refuse a file with tensors of this component that match no layer or do not fit it. If False,
            what fits is loaded and the rest is reported.
        family: A name in `lycoris.models.families.FAMILIES`, which decides how text encoders are numbered; None: taken
            from the header, or from the model.
        shared: If False, each layer gets an adapter of its own instead of slices of one, as other trainers need: a
            LoRA, or a dense difference where nothing smaller is exact.

    Returns:
        The adapters by path. `report` of the bundle says what happened to each tensor.

    Raises:
        FileError: Nothing matches, or, with `strict`, some tensor of this component does not. Nothing is loaded then.
    """
    other = ""
    if isinstance(model, NamedLayout):
        layout = model
    else:
        sites = ModelSites.of(model)
        layout = NamedLayout.from_model(sites)
        other = "" if component else fingerprint.describe_other_weights(metadata or {}, sites)
    header, asked = metadata or {}, (component, prefix, strict, family)
    found, _ = _resolve_tensors(tensors, layout, dialect, header, *asked, as_written=False, shared=shared)
    return found.with_remark(other) if other else found


def resolve_as_written(
    tensors: Mapping[str, Tensor],
    layout: NamedLayout,
    dialect: str,
    header: Mapping[str, str],
    component: str,
    family: str | None,
    *,
    strict: bool = True,
) -> tuple[Bundle, NamedLayout]:
    """Match tensors to the layers of a layout under the names that the file uses.

    Nothing is split or fused, so the result can be written back as it was. Arguments are those of `resolve`, all
    required.

    Returns:
        The bundle, by the file's names of layers, and the layout in that naming.
    """
    return _resolve_tensors(tensors, layout, dialect, header, component, None, strict, family, as_written=True)


def _resolve_tensors(
    tensors: Mapping[str, Tensor],
    layout: NamedLayout,
    dialect: str | None,
    header: Mapping[str, str],
    component: str,
    prefix: str | None,
    strict: bool,
    family: str | None,
    *,
    as_written: bool,
    shared: bool = True,
) -> tuple[Bundle, NamedLayout]:
    if whole := foreign.explain_no_adapter(get_shapes(tensors)):
        raise FileError(whole)
    whose, contradiction = _choose_family(family, header, component, layout)
    # A custom prefix is that of this component, whatever it means in a family's files.
    whose = whose if prefix is None else None

    tensors, match, _, remarks = _settle_names(
        tensors,
        lambda some: match_best(some, list_dialects(some, dialect, prefix), layout, component, whose, header),
        settle=not as_written,
    )
    if not match.groups:
        raise FileError(explain_no_match(match, tensors))
    if as_written:
        layout = layout.convert_to_naming(match.naming)
    unscaled = match.dialect.is_folder and not any(ALPHA in group for group in match.groups.values())
    if unscaled and not find_scale_sources(header, match.dialect, match.prefix):
        remarks.append(f"its scale is assumed to be 1: PEFT stores it in {CONFIG}, which is missing")
    found, mismatched = _read_stacks(tensors, match, layout, header)
    places = placing.place_stacks(found.stacks, layout, match.naming, shared=shared)
    mismatched |= places.refused
    remark = (
        ""
        if component
        else fingerprint.describe_other_layers(header, layout.model_name, layout.layers, layout.diffusers_layers)
    )
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
        raise FileError(explain_mismatch(report, match, layout, tensors, header))
    # A fingerprint is of a model under its own names, which are diffusers' where only the file's are known.
    base = Base(layout.model_name, layout.diffusers_layers if as_written else layout.layers)
    own = {key: value for key, value in header.items() if key != ADJACENT_CONFIG}
    return Bundle(places.entries, own, base, report), layout


def _choose_family(
    name: str | None, header: Mapping[str, str], component: str, layout: NamedLayout
) -> tuple[Family | None, str]:
    """The family by which text encoders are counted, and what is to be said of the header's."""
    if name is not None:
        if name not in FAMILIES:
            raise FileError(unknown("family", name, FAMILIES))
        return FAMILIES[name], ""
    stated, architecture = find_header_family(header), layout.architecture
    if (
        stated is None
        or architecture is None
        or stated.components.get(component, architecture.name) == architecture.name
    ):
        return stated or find_family({component: architecture}), ""
    return find_family(
        {component: architecture}
    ), f"its header says {stated.name}, and the model is a {architecture.name}"


def _find_unused(match: Match, layout: NamedLayout) -> tuple[dict[str, str], str]:
    """Tensor → why it has no place, and a remark on those that are hardly an adapter's."""
    unused = dict.fromkeys(match.strange, f"not a name of the format {match.dialect.name}")
    for layer, group in match.groups.items():
        if layer not in match.names:
            unused |= dict.fromkeys(group.values(), f"{layout.model_name} has no layer {layer}")
    plain = [name for name in unused if foreign.is_foreign(name)] if match.used_names() else []
    remark = f"{len(plain)} tensors belong to no adapter and no layer, left out: {some(plain)}" if plain else ""
    return {name: why for name, why in unused.items() if name not in plain}, remark


class _SettledNames(NamedTuple):
    """A file's tensors under the names by which they fit best, without what is no adapter's."""

    tensors: Mapping[str, Tensor]
    match: Match
    renamed: Mapping[str, str]
    """Name in the file → another by which it fits, where its own does not."""
    remarks: list[str]


def _settle_names(
    tensors: Mapping[str, Tensor], match_best: Callable[[Mapping[str, Tensor]], Match], *, settle: bool
) -> _SettledNames:
    """`match_best` is asked for each set of names, for other names may be of another format."""
    own, aside = foreign.split_foreign(get_shapes(tensors))
    tensors = {name: tensors[name] for name in own}
    match, wrapped = match_best(tensors), wrappers.find_renames(tensors, wrappers.strip_wrappers)
    if settle and not match.complete:
        used = {*match.used_names()}
        renamed = wrappers.find_renames(
            tensors, lambda name: name if name in used else wrappers.strip_surroundings(name)
        )
        others = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
        again = match_best(others) if renamed else match
        # Counting layers is not enough: another name may be that of one more tensor of a layer that is there already.
        if (len(again.used_names()), again.standing) > (len(match.used_names()), match.standing):
            return _SettledNames(others, again, renamed, [*filter(None, (aside,)), wrappers.describe_renames(renamed)])
    return _SettledNames(
        tensors, match, {}, [*filter(None, (aside, wrappers.describe_renames(wrapped) if wrapped else ""))]
    )


def find_settled_names(
    tensors: Mapping[str, Tensor], layout: NamedLayout, header: Mapping[str, str]
) -> Mapping[str, str]:
    """Find names by which tensors fit a denoiser better than by their own.

    Wrappers such as `module.` and components written twice are stripped from names for that.

    Returns:
        Name in the file → name that fits, only for those that differ; {} where the original names fit best.
    """
    if not any(each.split(key) for each in DIALECTS.values() for key in tensors):
        return {}
    whose, _ = _choose_family(None, header, "", layout)
    return _settle_names(
        tensors,
        lambda some: match_best(some, list_dialects(some, None, None), layout, "", whose, header),
        settle=True,
    ).renamed


@dataclass
class _ReadStacks:
    stacks: dict[str, tuple[Entry, ...]] = field(default_factory=dict)
    """By dotted name, in the naming of the file."""
    notes: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)


def _read_stacks(
    tensors: Mapping[str, Tensor], match: Match, layout: NamedLayout, header: Mapping[str, str]
) -> tuple[_ReadStacks, dict[str, str]]:
    """The stacks of a file by layer, and why others are none."""
    found, mismatched = _ReadStacks(), {}
    scales = ScaleReader.from_header(header, match.dialect, match.prefix)
    spans = layout.find_spans(match.naming) if match.naming != layout.naming else {}
    for layer, group in match.groups.items():
        if layer not in match.names:
            continue
        name = match.names[layer]
        geometry = layout.fuse_parts(spans[name]) if name in spans else layout.layers[name]
        own = {suffix: tensors[key] for suffix, key in group.items()}
        try:
            if DOWN in own and own[DOWN].dim() and "scale" not in own:
                alpha = scales.choose_alpha(name, len(own[DOWN]), _read_alpha_value(own))
                own |= {} if alpha is None or ALPHA in own else {ALPHA: torch.tensor(alpha, dtype=torch.float64)}
            stack = _read_layer_stack(own, geometry, name)
            stack, note = history.restore_trained_scale(
                stack, layer, layout.count_parts(match.naming, name), match.dialect, header
            )
        except FileError as error:
            down = own.get(DOWN)
            inputs = int(down.shape[1]) if down is not None and down.dim() > 1 else 0
            mismatched[name] = variants.describe_variant(layout, match.naming, name, inputs) or str(error)
            continue
        found.stacks[name] = stack
        if note:
            found.notes[name] = note
    found.remarks += scales.describe_sources()
    return found, mismatched


def _read_alpha_value(group: Mapping[str, Tensor]) -> float | None:
    """What a tensor `alpha` says, if it is one real number; whether it has to be is for the algorithm to say."""
    alpha = group.get(ALPHA)
    return None if alpha is None or alpha.numel() != 1 or alpha.is_complex() else float(alpha)


def _read_layer_stack(group: Mapping[str, Tensor], geometry: Geometry, where: str) -> tuple[Entry, ...]:
    for suffix, tensor in group.items():
        # Whether alpha has to be finite is for the algorithm to say.
        if suffix != ALPHA and not is_finite(tensor):
            raise FileError(f"{where}.{suffix} holds NaN or infinity")
    stack = []
    for part in forms.normalize_tensors(group, geometry, where):
        algorithm, own = read_tensors(part, geometry, where)
        stack.append(Entry(algorithm, geometry, own))
    return tuple(stack)
