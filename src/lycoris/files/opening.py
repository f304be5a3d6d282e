"""An adapter file of any kind with all that it holds, for models that are told or recognised."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from lycoris.adapters.bundle import Bundle
from lycoris.errors import FileError
from lycoris.files import variants
from lycoris.files.container.storage import load_tensors
from lycoris.files.described import describe_base
from lycoris.files.detect import Detection, detect, judge
from lycoris.files.dialects import DIALECTS, wrappers
from lycoris.files.dialects.components import component_of, family_in, family_of
from lycoris.files.dialects.scales import BESIDE
from lycoris.files.layout import Layout
from lycoris.files.peft import read_peft
from lycoris.files.peft.config import weights_in
from lycoris.files.reading import DOWN, peft_folder, resolve_as_written, settled_names
from lycoris.files.recognition import Fit
from lycoris.files.source import open_source
from lycoris.models import fingerprint, outline
from lycoris.models.families import FAMILIES
from lycoris.models.families.family import Family


class Opened(NamedTuple):
    """What a file has for each component of a pipeline, under the names of layers that it has itself."""

    detection: Detection
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors, by the names by which they are read: `detection.renamed` has those that differ in the file."""
    header: Mapping[str, str]
    bundles: dict[str, Bundle]
    layouts: dict[str, Layout]
    family: str | None
    assumed: dict[str, str]
    """Component → the known models that it was taken to be for, where none was given: which of them is not known."""
    tensors: Mapping[str, Tensor] = {}
    """As the file has them, under its own names."""


def open_file(source: str | os.PathLike[str], base: nn.Module | None = None, *, strict: bool = True) -> Opened:
    """Read a file, or a folder of PEFT's, whole.

    `base` is the denoiser that it is for (one on the meta device serves); None: a known model. Raises `FileError` when
    the file is damaged or fits no model and, unless `strict` is False, when something in it has no place.
    """
    folder = peft_folder(source)
    if folder is not None:
        return _folder(folder, base)
    with open_source(source) as (tensors, header):
        return parse_opened(tensors, header, base, strict=strict)


def parse_opened(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], base: nn.Module | None = None, *, strict: bool = True
) -> Opened:
    """The same from what a file holds."""
    denoiser = describe_base(metadata) if base is None else Layout.of(base)
    renamed: Mapping[str, str] = {} if denoiser is None else settled_names(tensors, denoiser, metadata)
    in_file = tensors
    tensors, shapes = _rename_tensors(tensors, renamed)
    found = judge(shapes, metadata, None if denoiser is None else _family(metadata, denoiser), settle=denoiser is None)
    if base is None and denoiser is not None:
        told = f"its header describes the base, a {denoiser.owner} of {len(denoiser.layers)} layers: judged by those"
        found = replace(found, fits={**found.fits, "": ()}, remarks=(*found.remarks, told))
    tensors, shapes = _rename_tensors(tensors, found.renamed)
    if renamed:
        found = replace(found, renamed=renamed, remarks=(*found.remarks, wrappers.describe_renames(renamed)))
    bundles, layouts, assumed = {}, {}, {}
    for component in found.components:
        layout = denoiser
        if layout is None or component:
            assumed[component] = _outlines(found, component)
            layout, told = _variant(find_layout(found.fits[component][0]), found, component, shapes)
            found = replace(found, remarks=(*found.remarks, *filter(None, (told,))))
        try:
            bundle, layouts[component] = resolve_as_written(
                tensors, layout, found.dialect, metadata, component, found.family, strict=strict
            )
        except FileError:
            if component or component not in assumed:
                raise
            _check_made_for(metadata, layout)
            raise
        bundles[component] = _without_guess(bundle, assumed, component)
    own = {key: value for key, value in metadata.items() if key != BESIDE}
    return Opened(found, shapes, own, bundles, layouts, found.family, assumed, in_file)


def _rename_tensors(
    tensors: Mapping[str, Tensor], renamed: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Tensors under other names, and their shapes."""
    named = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    return named, {name: tuple(tensor.shape) for name, tensor in named.items()}


def _variant(
    layout: Layout, found: Detection, component: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[Layout, str]:
    """A known model, or the variant of it that a file's adapter for its first layer is for, and a remark on that."""
    dialect, naming = DIALECTS[found.dialect], found.fits[component][0].naming
    written, whose = layout.written_names(naming, dialect.style), component_of(FAMILIES.get(found.family or ""))
    for name, shape in shapes.items():
        key = dialect.split(name)
        if key is None or key.suffix != DOWN or key.layer not in written or len(shape) < 2 or whose(key) != component:
            continue
        if told := variants.describe_variant(layout, naming, written[key.layer], shape[1]):
            return variants.widen_model(layout, naming, written[key.layer], shape[1]), f"{told}; taken to be for that"
    return layout, ""


def _check_made_for(metadata: Mapping[str, str], layout: Layout) -> None:
    """Raise `FileError` where a header tells of another base than the one that a file was taken to be for."""
    if other := fingerprint.other_layers(metadata, layout.owner, layout.layers, layout.middle):
        raise FileError(f"{other}; give that base with --base: its folder, or its config.json")


def find_layout(fit: Fit) -> Layout:
    """The layers of a model that a file may be for."""
    assert fit.outline is not None
    return Layout.from_outline(fit.architecture, fit.outline)


def _folder(folder: Path, base: nn.Module | None) -> Opened:
    found = detect(folder)
    assumed = {"": _outlines(found, "")} if base is None else {}
    model = outline.load_model(found.models[""]) if base is None else base
    layout = Layout.of(model)
    family = FAMILIES.get(found.family or "") if base is None else _family({}, layout)
    bundle = _without_guess(read_peft(folder, model), assumed, "")
    tensors, _ = load_tensors(weights_in(folder))
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    own = None if family is None else family.name
    return Opened(found, shapes, {}, {"": bundle}, {"": layout}, own, assumed, tensors)


def _without_guess(bundle: Bundle, assumed: Mapping[str, str], component: str) -> Bundle:
    """A bundle that does not say what it is for where that is a guess: it would be written as a fact."""
    return replace(bundle, base=None) if component in assumed else bundle


def _family(metadata: Mapping[str, str], denoiser: Layout) -> Family | None:
    """The family of a file whose denoiser is known: that of its header, unless that has other denoisers."""
    architecture, told = denoiser.architecture, family_in(metadata)
    if told is not None and (architecture is None or told.components.get("") == architecture.name):
        return told
    return family_of({"": architecture})


def _outlines(found: Detection, component: str) -> str:
    """The known models that a component may be for equally well, in words; raises `FileError` where there is none."""
    if component not in found.models:
        raise FileError(
            f"its {component or 'denoiser'} is of no known model, so that its layers' names cannot be told for "
            "certain; give the model with --base: the folder or the config.json of that denoiser"
        )
    return found.variants(component)
