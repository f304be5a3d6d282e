"""The layers of a file under the names that the file has for them and for their tensors."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from torch import Tensor

from lycoris.algorithms.tensors import ALPHA, RANK_TENSORS
from lycoris.files.detect import Detection
from lycoris.files.dialects import DIALECTS
from lycoris.files.dialects.base import Key
from lycoris.files.dialects.components import make_component_lookup
from lycoris.files.opening import Opened
from lycoris.files.programs import Program
from lycoris.files.programs.routes import RoutedKeys, SentFile
from lycoris.models.families import ARCHITECTURES, FAMILIES

_PROCESSOR_NAME = re.compile(r"(.+)(_lora\.(?:up|down)\.weight)")


class WrittenLayer(NamedTuple):
    """A layer as a file writes it: its key, and its tensors' names and shapes.

    LyCORIS' spelling of a tensor's name is the one of `Algorithm.tensor_names`.
    """

    key: str
    """What the names of its tensors have in common."""
    tensors: Mapping[str, tuple[int, ...]]
    """Their shapes, by name in LyCORIS' spelling."""
    names: tuple[str, ...] = ()
    """Of the tensors, as the file has them."""
    spelled: tuple[str, ...] = ()
    """The part of those that is the tensor's own; a whole name where it does not begin with a key as programs have
    them."""
    own: str = ""
    """The key as the file has it: of attention processors another one; "" none."""


def group_written(shapes: Mapping[str, tuple[int, ...]], detection: Detection) -> dict[str, dict[str, WrittenLayer]]:
    """Group a file's tensors: component → layer as written → what the file has for it.

    Every detected component is a key, even without layers. Names of other dialects are left out.
    """
    whose = make_component_lookup(FAMILIES[detection.family] if detection.family else None)
    in_file = {name: other for other, name in detection.renamed.items()}
    found: dict[str, dict[str, WrittenLayer]] = {component: {} for component in detection.components}
    for name, shape in shapes.items():
        key = DIALECTS[detection.dialect].split(name)
        if key is not None:
            layers = found.setdefault(whose(key), {})
            before = layers.get(key.layer, WrittenLayer(key.prefix + key.layer, {}))
            own, spelled = _split_name(in_file.get(name, name), key)
            layers[key.layer] = before._replace(
                tensors={**before.tensors, key.suffix: shape},
                names=(*before.names, name),
                spelled=(*before.spelled, spelled),
                own=before.own or own,
            )
    return found


def list_names_in_file(found: Opened) -> list[str]:
    """Return the names of all tensors as the file has them.

    They differ from `found.shapes` for tensors that were renamed to be read.
    """
    in_file = {name: other for other, name in found.detection.renamed.items()}
    return [in_file.get(name, name) for name in found.shapes]


def _split_name(name: str, key: Key) -> tuple[str, str]:
    """The layer's key, and the tensor's own name."""
    whole = key.prefix + key.layer
    if name == f"{whole}.{key.spelled}":
        return whole, key.spelled
    found = _PROCESSOR_NAME.fullmatch(name)
    return (found[1], found[2]) if found is not None else ("", name)


def find_scales(found: Opened, written: Mapping[str, WrittenLayer]) -> dict[str, tuple[float, float]]:
    """Return the layers that store a scale as a number of its own.

    Returns:
        Layer as written → that scale, and the one that alpha says.
    """
    scales = {}
    for layer, own in written.items():
        scale = find_tensor(found, own, "scale")
        if scale is None or scale.numel() != 1:
            continue
        alpha, ranked = (
            find_tensor(found, own, ALPHA),
            next((name for name in RANK_TENSORS if name in own.tensors), None),
        )
        its = 1.0 if alpha is None or ranked is None else float(alpha) / own.tensors[ranked][0]
        scales[layer] = (float(scale), its)
    return scales


def find_tensor(found: Opened, written: WrittenLayer, suffix: str) -> Tensor | None:
    """Return a tensor of a layer by its suffix in LyCORIS' spelling.

    None if the file has none.
    """
    if suffix not in written.tensors:
        return None
    name = dict(zip(written.tensors, written.names, strict=True))[suffix]
    in_file = {other: own for own, other in found.detection.renamed.items()}
    return found.tensors.get(in_file.get(name, name))


def route_file(program: Program, found: Opened, written: Mapping[str, Mapping[str, WrittenLayer]]) -> RoutedKeys | None:
    """Return what a program makes of all keys together.

    None if it treats each key alone.
    """
    if program.route is None:
        return None
    layers = {
        each.key: tuple(name.removeprefix(f"{each.key}.") for name in each.names)
        for component in written.values()
        for each in component.values()
    }
    return program.route(SentFile(layers, find_denoiser(found), tuple(found.shapes)))


def find_denoiser(found: Opened) -> str | None:
    """Return the architecture of the denoiser that a file is for; None if it is not known.

    A file with text encoders only is assigned one by its family.
    """
    architecture = found.layouts[""].architecture if "" in found.layouts else None
    if architecture is None and found.family is not None:
        architecture = ARCHITECTURES[FAMILIES[found.family].components[""]]
    return None if architecture is None else architecture.name
