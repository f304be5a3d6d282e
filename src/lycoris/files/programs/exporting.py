"""Rewrite a file's adapters in forms that a program evaluates as trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial

from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.dora import unwrap_dora
from lycoris.errors import FileError, PlanError
from lycoris.files.container.model_weights import BaseWeights
from lycoris.files.dialects import DIALECTS
from lycoris.files.dialects.base import flatten
from lycoris.files.dialects.components import find_prefix
from lycoris.files.layout import NamedLayout
from lycoris.files.opening import Opened
from lycoris.files.placing import Stack
from lycoris.files.programs import PROGRAMS, LayerPlace
from lycoris.files.programs.holding import Holder, find_holders, find_place, map_holders
from lycoris.files.programs.portable import convert_to_lora, make_stack_portable
from lycoris.files.skeleton import list_namings
from lycoris.models.families import FAMILIES


def list_known_dialects(program: str, found: Opened) -> list[str]:
    """Return the dialects in which a program knows keys of a file's denoiser, the preferred one first.

    All dialects that it knows for any model if the denoiser is not known.
    """
    architecture = found.layouts[""].architecture if "" in found.layouts else None
    keys = PROGRAMS[program].keys
    return [each for each in keys if architecture is None or PROGRAMS[program].find_keys(each, architecture.name)]


def export_bundle(
    found: Opened, program: str, to: str, weights: BaseWeights | None
) -> tuple[dict[str, Bundle], dict[str, str]]:
    """Return every adapter of a file in a form that a program reads as trained in a dialect.

    Args:
        found: The file.
        program: A name in `PROGRAMS`.
        to: The dialect to write.
        weights: The base model's, for adapters that depend on them.

    Returns:
        Component → bundle, and layer → what was done to it.

    Raises:
        FileError: No such form of an adapter is known, or it depends on the base model's weights and there are none.
    """
    bundles, done, problems = {}, dict[str, str](), dict[str, str]()
    for component, bundle in found.bundles.items():
        layout, entries = found.layouts[component], dict[str, Stack]()
        keys = _name_keys(bundle, layout, to, _find_export_prefix(found, component, to))
        places = _find_places(bundle, layout, program, to)
        for layer, stack in bundle.entries.items():
            try:
                entries[layer], what = _export_stack(
                    stack,
                    program,
                    to,
                    layer,
                    keys[layer],
                    places[layer],
                    layout,
                    None if component else weights,
                    found.assumed.get(component, ""),
                )
            except FileError as error:
                problems[layer] = str(error)
                continue
            if what != "nothing":
                done[layer] = f"{stack[0].algorithm.name} {what}"
        bundles[component] = replace(bundle, entries=entries)
        if PROGRAMS[program].detect_algorithm is not None:
            bundles[component] = _unify_algorithms(bundles[component], program, done)
    if problems:
        first, why = next(iter(problems.items()))
        raise FileError(f"{len(problems)} layers cannot be written for {program}, such as {first}: {why}")
    return bundles, done


def _unify_algorithms(bundle: Bundle, program: str, done: dict[str, str]) -> Bundle:
    """All as LoRA, where a program takes a file for one algorithm and this one has several.

    Raises `FileError` for a layer that no LoRA can stand for.
    """
    found = {layer: unwrap_dora(stack[0].algorithm).name for layer, stack in bundle.entries.items()}
    if len({"lora" if name == "dylora" else name for name in found.values()}) < 2:
        return bundle
    entries = dict(bundle.entries)
    for layer, name in found.items():
        if name not in ("lora", "dylora"):
            entries[layer] = (convert_to_lora(entries[layer][0]), *entries[layer][1:])
            what = f"written as a LoRA, for {PROGRAMS[program].title} takes a file for one algorithm"
            done[layer] = f"{done[layer]}, then {what}" if layer in done else f"{name} {what}"
    return replace(bundle, entries=entries)


def _export_stack(
    stack: Stack,
    program: str,
    to: str,
    layer: str,
    key: str,
    place: LayerPlace,
    layout: NamedLayout,
    weights: BaseWeights | None,
    model: str,
) -> tuple[Stack, str]:
    architecture = None if layout.architecture is None else layout.architecture.name
    export = partial(
        make_stack_portable, stack, program, dialect=to, architecture=architecture, key=key, place=place, model=model
    )
    try:
        return export()
    except PlanError as error:
        if weights is None:
            raise FileError(
                f"what {program} would need of {stack[0].algorithm.name} depends on the base model's weights: give the "
                "folder that they are in (--base)"
            ) from error
        return export(base=weights.affine(layer, layout))


def _find_export_prefix(found: Opened, component: str, to: str) -> str:
    family = FAMILIES[found.family] if found.family else None
    return find_prefix(DIALECTS[to], family, component) or ""


def _name_keys(bundle: Bundle, layout: NamedLayout, to: str, prefix: str) -> Mapping[str, str]:
    """Layer → what the first of its parts is called in a dialect."""
    spelled = flatten if DIALECTS[to].style == "flat" else str
    if layout.architecture is None:
        return {layer: prefix + spelled(layer) for layer in bundle.entries}
    find_module = list_namings(layout.architecture)[DIALECTS[to].choose_naming(layout.architecture)].find_module
    firsts = {layer: layout.find_spans(layout.naming)[layer].parts[0] for layer in bundle.entries}
    return {layer: prefix + spelled(find_module(part) or part) for layer, part in firsts.items()}


def _find_places(bundle: Bundle, layout: NamedLayout, program: str, to: str) -> Mapping[str, LayerPlace]:
    """Layer → how the program's model holds the first of its parts, as a dialect calls it."""
    held = find_holders(PROGRAMS[program], layout)
    if layout.architecture is None or not held:
        return dict.fromkeys(bundle.entries, "")
    there = map_holders(layout, DIALECTS[to].choose_naming(layout.architecture))
    own = layout.find_spans(layout.naming)
    return {
        layer: find_place(there.get(own[layer].parts[0], Holder(layer, own[layer])), held, layout)
        for layer in bundle.entries
    }
