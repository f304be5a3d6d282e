"""Open an adapter file of any kind with everything in it, for models that are given or recognized."""

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
from lycoris.files.container.storage import get_shapes, load_tensors
from lycoris.files.described import decode_base
from lycoris.files.detect import Detection, detect, judge
from lycoris.files.dialects import DIALECTS, wrappers
from lycoris.files.dialects.components import find_family, find_header_family, make_component_lookup
from lycoris.files.dialects.scales import ADJACENT_CONFIG
from lycoris.files.layout import NamedLayout
from lycoris.files.peft import read_peft
from lycoris.files.peft.config import find_weights
from lycoris.files.reading import DOWN, find_peft_folder, find_settled_names, resolve_as_written
from lycoris.files.recognition import Fit
from lycoris.files.source import open_source
from lycoris.models import fingerprint, outline
from lycoris.models.families import FAMILIES
from lycoris.models.families.family import Family


class Opened(NamedTuple):
    """A file's adapters for each component of a pipeline, under the file's own names of layers.

    What `convert`, `check` and the tools work on. Nothing has been split or fused yet.
    """

    detection: Detection
    shapes: Mapping[str, tuple[int, ...]]
    """Of its tensors, by the names by which they are read: `detection.renamed` has those that differ in the file."""
    header: Mapping[str, str]
    bundles: dict[str, Bundle]
    layouts: dict[str, NamedLayout]
    family: str | None
    assumed: dict[str, str]
    """Component → the known models that it was taken to be for, where none was given: which of them is not known."""
    tensors: Mapping[str, Tensor] = {}
    """As the file has them, under its own names."""


def open_file(source: str | os.PathLike[str], base: nn.Module | None = None, *, strict: bool = True) -> Opened:
    """Read a file, or a PEFT folder, with all its components.

    Args:
        source: The file or folder.
        base: The denoiser it is for, which may be on the meta device; None: the base that the header describes, or a
            known model, recognized by names and sizes.
        strict: Whether to refuse a file in which something matches no layer.

    Raises:
        FileError: The file is damaged or fits no model, or, with `strict`, something in it has no place.
    """
    folder = find_peft_folder(source)
    if folder is not None:
        return _open_folder(folder, base)
    with open_source(source) as (tensors, header):
        return parse_opened(tensors, header, base, strict=strict)


def parse_opened(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], base: nn.Module | None = None, *, strict: bool = True
) -> Opened:
    """Do the same as `open_file` for the tensors and the header of a file.

    `tensors` are by their names in the file. Error messages do not name the file, since it is not known here.
    """
    denoiser = decode_base(metadata) if base is None else NamedLayout.from_model(base)
    renamed: Mapping[str, str] = {} if denoiser is None else find_settled_names(tensors, denoiser, metadata)
    in_file = tensors
    tensors, shapes = _rename_with_shapes(tensors, renamed)
    found = judge(
        shapes, metadata, None if denoiser is None else _find_opened_family(metadata, denoiser), settle=denoiser is None
    )
    if base is None and denoiser is not None:
        remark = (
            f"its header describes the base, a {denoiser.model_name} of {len(denoiser.layers)} layers: judged by those"
        )
        found = replace(found, fits={**found.fits, "": ()}, remarks=(*found.remarks, remark))
    tensors, shapes = _rename_with_shapes(tensors, found.renamed)
    if renamed:
        found = replace(found, renamed=renamed, remarks=(*found.remarks, wrappers.describe_renames(renamed)))
    bundles, layouts, assumed = {}, {}, {}
    for component in found.components:
        layout = denoiser
        if layout is None or component:
            assumed[component] = _require_model(found, component)
            layout, remark = _detect_variant(load_layout(found.fits[component][0]), found, component, shapes)
            found = replace(found, remarks=(*found.remarks, *filter(None, (remark,))))
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
    own = {key: value for key, value in metadata.items() if key != ADJACENT_CONFIG}
    return Opened(found, shapes, own, bundles, layouts, found.family, assumed, in_file)


def _rename_with_shapes(
    tensors: Mapping[str, Tensor], renamed: Mapping[str, str]
) -> tuple[dict[str, Tensor], dict[str, tuple[int, ...]]]:
    """Tensors under other names, and their shapes."""
    named = {renamed.get(name, name): tensor for name, tensor in tensors.items()}
    return named, get_shapes(named)


def _detect_variant(
    layout: NamedLayout, found: Detection, component: str, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[NamedLayout, str]:
    """A known model, or the variant of it that a file's adapter for its first layer is for, and a remark on that."""
    dialect, naming = DIALECTS[found.dialect], found.fits[component][0].naming
    written, whose = (
        layout.map_written_names(naming, dialect.style),
        make_component_lookup(FAMILIES.get(found.family or "")),
    )
    for name, shape in shapes.items():
        key = dialect.split(name)
        if key is None or key.suffix != DOWN or key.layer not in written or len(shape) < 2 or whose(key) != component:
            continue
        if remark := variants.describe_variant(layout, naming, written[key.layer], shape[1]):
            return variants.widen_model(layout, naming, written[key.layer], shape[1]), f"{remark}; taken to be for that"
    return layout, ""


def _check_made_for(metadata: Mapping[str, str], layout: NamedLayout) -> None:
    """Raise `FileError` where a header tells of another base than the one that a file was taken to be for."""
    if other := fingerprint.describe_other_layers(metadata, layout.model_name, layout.layers, layout.diffusers_layers):
        raise FileError(f"{other}; give that base with --base: its folder, or its config.json")


def load_layout(fit: Fit) -> NamedLayout:
    """Return the layers of the known model that a fit names, under diffusers' names.

    `fit.outline` must not be None.
    """
    assert fit.outline is not None
    return NamedLayout.from_outline(fit.architecture, fit.outline)


def _open_folder(folder: Path, base: nn.Module | None) -> Opened:
    found = detect(folder)
    assumed = {"": _require_model(found, "")} if base is None else {}
    model = outline.load_model(found.models[""]) if base is None else base
    layout = NamedLayout.from_model(model)
    family = FAMILIES.get(found.family or "") if base is None else _find_opened_family({}, layout)
    bundle = _without_guess(read_peft(folder, model), assumed, "")
    tensors, _ = load_tensors(find_weights(folder))
    shapes = get_shapes(tensors)
    own = None if family is None else family.name
    return Opened(found, shapes, {}, {"": bundle}, {"": layout}, own, assumed, tensors)


def _without_guess(bundle: Bundle, assumed: Mapping[str, str], component: str) -> Bundle:
    """A bundle that does not say what it is for where that is a guess: it would be written as a fact."""
    return replace(bundle, base=None) if component in assumed else bundle


def _find_opened_family(metadata: Mapping[str, str], denoiser: NamedLayout) -> Family | None:
    """The family of a file whose denoiser is known: that of its header, unless that has other denoisers."""
    architecture, stated = denoiser.architecture, find_header_family(metadata)
    if stated is not None and (architecture is None or stated.components.get("") == architecture.name):
        return stated
    return find_family({"": architecture})


def _require_model(found: Detection, component: str) -> str:
    """The known models that a component may be for equally well, in words; raises `FileError` where there is none."""
    if component not in found.models:
        raise FileError(
            f"its {component or 'denoiser'} matches no known model, so the names of its layers are ambiguous; "
            "give the model with --base: the folder or the config.json of that denoiser"
        )
    return found.variants(component)
