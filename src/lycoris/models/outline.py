"""Describe a model without its code: its modules as data, from which an empty copy is built.

An outline is enough to plan on: classes by name, layers by their sizes, parameters by their shapes. Those of well-known
models come with this package, so that planning for them needs no model library and takes no time.

        {"class": name, "layer": [class of torch, arguments], "parameters": {name: shape}, "children": {name: outline}}

Every key but the class may be missing. A child called "0..18" stands for nineteen identical ones, 0 to 18. The
outermost may also have "tied": {name: name}, for a parameter that is the same as an earlier one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import nn

from lycoris.errors import ConfigError, unknown
from lycoris.layers.geometry import Geometry
from lycoris.layers.sites import ModelSites

Outline = Mapping[str, Any]

OUTLINE_LAYERS: Mapping[str, tuple[str, ...]] = {
    "Linear": ("in_features", "out_features"),
    "Conv1d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "Conv2d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "Conv3d": ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups"),
    "Embedding": ("num_embeddings", "embedding_dim"),
    "LayerNorm": ("normalized_shape", "eps", "elementwise_affine"),
    "GroupNorm": ("num_groups", "num_channels", "eps", "affine"),
    "RMSNorm": ("normalized_shape", "eps", "elementwise_affine"),
}
"""Classes of torch that are built as themselves, and the attributes that they are built from."""


def make_outline(model: nn.Module) -> dict[str, Any]:
    """Return the outline of a model.

    A module that appears twice is described once, under its first path.
    """
    tied = _find_tied_names(model)
    return _outline_module(model, set()) | ({"tied": tied} if tied else {})


def build_model(node: Outline) -> nn.Module:
    """Build an empty model on torch's meta device from its outline.

    Its classes have the same names, and its layers and parameters the same shapes; its modules have no `forward`.
    """
    with torch.device("meta"):
        made = _build_module(node)
    for name, first in node.get("tied", {}).items():
        path, _, own = name.rpartition(".")
        made.get_submodule(path).register_parameter(own, made.get_parameter(first))
    return made


def list_models() -> list[str]:
    """Return the names of the models whose outlines come with this package, sorted.

    These are the names that `load_model`, `load_outline` and `lycoris plan` accept.
    """
    return sorted(
        entry.name.removesuffix(".json") for entry in _outlines_folder().iterdir() if entry.name.endswith(".json")
    )


def load_model(name: str) -> nn.Module:
    """Build an empty copy of a known model.

    Raises `ConfigError` for an unknown name, with the nearest that exists.
    """
    return build_model(load_outline(name))


def load_outline(name: str) -> Outline:
    """Return the outline of a known model.

    Raises `ConfigError` for an unknown name, with the nearest that exists.
    """
    if name not in list_models():
        raise ConfigError(unknown("model", name, list_models()))
    return json.loads((_outlines_folder() / f"{name}.json").read_text(encoding="utf-8"))["outline"]


def iterate_layers(node: Outline) -> Iterator[tuple[str, Geometry]]:
    """Yield path and geometry of each layer in an outline, as `ModelSites` would in the model.

    Identical modules are built only once, so this is faster than building the model.
    """
    own = {key: value for key, value in node.items() if key not in ("children", "tied")}
    yield from _find_own_layers(json.dumps(own))
    for name, child in node.get("children", {}).items():
        inner = [*iterate_layers(child)]
        for each, _ in _expand_ranges({name: child}):
            yield from ((f"{each}.{path}" if path else each, geometry) for path, geometry in inner)


@lru_cache(maxsize=4096)
def _find_own_layers(text: str) -> tuple[tuple[str, Geometry], ...]:
    """Those of a module without children. Most of a model's are alike, and so are many of several models."""
    return tuple(ModelSites(build_model(json.loads(text))).geometries.items())


def _outlines_folder() -> Any:
    return files("lycoris.models") / "outlines"


def _find_tied_names(model: nn.Module) -> dict[str, str]:
    first: dict[int, str] = {}
    tied = {}
    for path, module in model.named_modules():
        for own, parameter in module._parameters.items():
            name = f"{path}.{own}" if path else own
            if parameter is not None and first.setdefault(id(parameter), name) != name:
                tied[name] = first[id(parameter)]
    return tied


def _outline_module(module: nn.Module, seen: set[int]) -> dict[str, Any]:
    seen.add(id(module))
    node: dict[str, Any] = {"class": type(module).__name__}
    layer = next(
        (c for c in type(module).__mro__ if c.__name__ in OUTLINE_LAYERS and c.__module__.startswith("torch.")),
        None,
    )
    if layer is not None:
        node["layer"] = [layer.__name__, {name: getattr(module, name) for name in OUTLINE_LAYERS[layer.__name__]}]
        bias = module._parameters.get("bias")
        if "bias" in module._parameters and bias is None:
            node["layer"][1]["bias"] = False
        if getattr(module, "padding_mode", "zeros") != "zeros":
            node["layer"][1]["padding_mode"] = module.padding_mode
        return node
    parameters = {name: [*p.shape] for name, p in module._parameters.items() if p is not None}
    children = {
        name: _outline_module(child, seen)
        for name, child in module._modules.items()
        if child is not None and id(child) not in seen
    }
    return (
        node
        | ({"parameters": parameters} if parameters else {})
        | ({"children": _join_ranges(children)} if children else {})
    )


def _join_ranges(children: Mapping[str, dict[str, Any]]) -> dict[str, Any]:
    """Consecutive numbers with the same outline, as one range."""
    found: list[tuple[str, str, dict[str, Any]]] = []
    for name, child in children.items():
        first, last, before = found[-1] if found else ("", "", {})
        if before == child and last.isdigit() and name == str(int(last) + 1):
            found[-1] = (first, name, child)
        else:
            found.append((name, name, child))
    return {first if first == last else f"{first}..{last}": child for first, last, child in found}


def _expand_ranges(children: Mapping[str, Outline]) -> Iterator[tuple[str, Outline]]:
    for name, child in children.items():
        first, _, last = name.partition("..")
        if first.isdigit() and last.isdigit():
            for at in range(int(first), int(last) + 1):
                yield str(at), child
        else:
            yield name, child


def _build_module(node: Outline) -> nn.Module:
    if "layer" in node:
        base, arguments = node["layer"]
        if base == "Embedding":  # left to fill its weight, it makes torch import its compiler
            weight = torch.empty(arguments["num_embeddings"], arguments["embedding_dim"])
            arguments = {**arguments, "_weight": weight}
        made = getattr(nn, base)(**arguments)
        if node["class"] != base:
            made.__class__ = type(node["class"], (type(made),), {})
        return made
    made = type(node["class"], (nn.Module,), {})()
    for name, shape in node.get("parameters", {}).items():
        made.register_parameter(name, nn.Parameter(torch.empty(shape)))
    for name, child in _expand_ranges(node.get("children", {})):
        made.add_module(name, _build_module(child))
    return made
