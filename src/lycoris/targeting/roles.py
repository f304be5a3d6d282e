"""What a documented class name means in a model of a known family: `Attention` and `FeedForward` are parts of a block,
whatever the class is called there, and also where it is no class but some layers of the block.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace

from torch import nn

from lycoris.layers.sites import class_name
from lycoris.models.families import DENOISERS
from lycoris.targeting.preset import Preset, names_class
from lycoris.targeting.remarks import Remark

ROLES: Mapping[str, str] = {"Attention": "attention", "FeedForward": "feed_forward"}
"""Documented class name → field of `lycoris.models.families.family.Architecture`."""


def expand_roles(preset: Preset, model: nn.Module) -> tuple[Preset, dict[str, Remark]]:
    """A preset whose documented names stand for what the model's family has, and by name a remark that says so.

    Classes that the preset spells out itself count as they are, and so do their layers.
    """
    spelled = [*preset.target_module, *preset.module_algo_map]
    remarks: dict[str, Remark] = {}
    for name in ROLES:
        if name not in spelled:
            continue
        classes, layers = _find_role_parts(name, model)
        classes = [each for each in classes if not _is_spelled(each, spelled)]
        layers = [(part, path) for part, path in layers if not _is_spelled(part.partition(".")[0], spelled)]
        if not classes and not layers:
            continue
        preset = _with(preset, name, classes, layers)
        parts = [*classes, *dict.fromkeys(part for part, _ in layers)]
        remarks[name] = Remark(f"{name!r} means {', '.join(parts)} too: {class_name(model)} has these for it")
    return preset, remarks


def _is_spelled(name: str, spelled: Sequence[str]) -> bool:
    """Whether a preset names a class by itself."""
    return any(names_class(target, name) for target in spelled)


def _find_role_parts(name: str, model: nn.Module) -> tuple[list[str], list[tuple[str, str]]]:
    """Classes of a model that have a role, and layers that have it as (class and name of the part, path)."""
    own = class_name(model)
    known = (part for each in DENOISERS if own in each.classes for part in getattr(each, ROLES[name]))
    parts = [part for part in dict.fromkeys(known) if part != name]
    there = {type(module).__name__ for module in model.modules()}
    classes = [part for part in parts if part in there]
    inside = [(part, *part.split(".")) for part in parts if "." in part]
    layers = [
        (part, f"{path}.{child}" if path else child)
        for path, module in model.named_modules()
        for part, holder, child in inside
        if type(module).__name__ == holder and isinstance(getattr(module, child, None), nn.Module)
    ]
    return classes, layers


def _with(preset: Preset, name: str, classes: Sequence[str], layers: Sequence[tuple[str, str]]) -> Preset:
    """A preset in which classes and layers have what a name has."""
    patterns = [pattern for _, path in layers for pattern in _patterns_for(path, preset.use_fnmatch)]
    if name in preset.module_algo_map:
        options = preset.module_algo_map[name]
        return replace(
            preset,
            module_algo_map={**preset.module_algo_map, **dict.fromkeys(classes, options)},
            name_algo_map={**preset.name_algo_map, **dict.fromkeys(patterns, options)},
        )
    return replace(
        preset,
        target_module=(*preset.target_module, *classes),
        target_name=(*preset.target_name, *patterns),
    )


def _patterns_for(path: str, globs: bool) -> tuple[str, ...]:
    """Those that mean a layer, or the layers in a module, and no other."""
    return (path, f"{path}.*") if globs else (re.escape(path) + r"(\..+)?$",)
