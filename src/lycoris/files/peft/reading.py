"""From a PEFT adapter to a bundle, with every tensor accounted for."""

from __future__ import annotations

import os
import re
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lycoris.adapters.bundle import Base, Bundle
from lycoris.adapters.load_report import Report, some
from lycoris.algorithms.base import Entry
from lycoris.errors import FileError, nearest, prefix_errors
from lycoris.files.container.storage import load_tensors
from lycoris.files.peft.config import KINDS, Config, load_config, weights_in
from lycoris.files.peft.layers import entries_of
from lycoris.layers import paths
from lycoris.layers.sites import ModelSites, Site, class_name

PREFIX = "base_model.model."
SHOWN = 5


@cache
def _tensor() -> re.Pattern[str]:
    """A tensor's name in its parts. Made when it is first needed: that takes longer than most of this package."""
    names = "|".join(sorted({name for kind in KINDS.values() for name in kind.tensors}))
    return re.compile(rf"(?P<path>.+?)\.(?P<name>{names})(?:\.(?P<rest>.+))?")


@dataclass
class _Sorted:
    """The tensors of a file by what they are for."""

    layers: dict[str, dict[str, Tensor]] = field(default_factory=lambda: defaultdict(dict))
    """Path → tensor by PEFT's name, `lora_B.bias` for a bias."""
    biases: dict[str, Tensor] = field(default_factory=dict)
    adapters: set[str] = field(default_factory=set)
    saved: set[str] = field(default_factory=set)
    """Modules of `modules_to_save`."""
    copies: set[str] = field(default_factory=set)
    """The model's own tensors."""
    changed: set[str] = field(default_factory=set)
    """Those of them that are not what the model has."""
    strange: list[str] = field(default_factory=list)


def read_peft(
    source: str | os.PathLike[str] | Mapping[str, Tensor],
    model: nn.Module | ModelSites,
    config: Mapping[str, Any] | None = None,
) -> Bundle:
    """Read an adapter that PEFT wrote, for the model it was made for.

    `source` is the folder, or tensors by name with `config` beside them. OFT, BOFT, biases and IA3 on outputs of
    layers with a bias need the model's weights; for everything else one on the meta device serves. Full copies of
    modules (`modules_to_save`) are no adapters: they stay out and become remarks.

    Raises `FileError` when a tensor belongs to no layer, does not fit it, or means something that is not known.
    """
    if isinstance(source, Mapping):
        if config is None:
            raise FileError("tensors alone do not say what they are: pass config, the content of adapter_config.json")
        return _resolve(source, model, config)
    folder = Path(source)
    with prefix_errors(folder):
        values = load_config(folder) if config is None else config
        return _resolve(_load(folder), model, values)


def _load(folder: Path) -> dict[str, Tensor]:
    return load_tensors(weights_in(folder))[0]


def _resolve(given: Mapping[str, Tensor], model: nn.Module | ModelSites, values: Mapping[str, Any]) -> Bundle:
    config, places = Config.parse(values), ModelSites.of(model)
    found = _sort(given, places.model, config)
    _check(found, places, places.model, config)
    entries: dict[str, tuple[Entry, ...]] = {}
    problems = []
    for path in sorted(found.layers.keys() | found.biases.keys()):
        tensors = found.layers.get(path, {})
        try:
            entries[path] = entries_of(config, places[path], tensors, found.biases.get(path))
        except FileError as error:
            problems.append(str(error))
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise FileError(f"{len(problems)} of {len(entries) + len(problems)} layers cannot be read:\n  {listed}{more}")
    applied = {path: " + ".join(entry.algorithm.name for entry in stack) for path, stack in entries.items()}
    base = Base(class_name(places.model), places.geometries)
    report = Report(dialect="peft", applied=applied, remarks=_remarks(found, places, config))
    return Bundle(entries, {}, base, report)


def _sort(tensors: Mapping[str, Tensor], model: nn.Module, config: Config) -> _Sorted:
    found, kind, modules = _Sorted(), KINDS[config.type], config.saved_modules()
    own: dict[str, Tensor] = dict(paths.named_tensors(model))
    for key, tensor in tensors.items():
        name = key.removeprefix(PREFIX)
        match = _tensor().fullmatch(name)
        if match is not None and match["name"] in kind.tensors:
            tail, adapter = _tail(match["name"], match["rest"])
            found.adapters |= {adapter} - {""}
            if not torch.isfinite(tensor).all():
                raise FileError(f"{key} holds NaN or infinity")
            found.layers[match["path"]][match["name"] + tail] = tensor
            continue
        owner, _, last = name.rpartition(".")
        plain = f"{owner.removesuffix('.base_layer')}.{last}"
        saved = next((module for module in modules if f".{module}." in f".{name}"), None)
        if saved is not None:
            found.saved.add(saved)
        elif last == "bias" and config.text("bias", "none") != "none" and plain in own:
            found.biases[plain.removesuffix(".bias")] = tensor
        elif plain in own:
            (found.copies if _equal(tensor, own[plain]) else found.changed).add(plain)
        else:
            found.strange.append(key)
    return found


def _equal(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor is what the model has. One on the meta device has nothing that could differ but its shape."""
    return tensor.shape == own.shape and (own.is_meta or torch.equal(tensor.cpu(), own.detach().cpu().to(tensor.dtype)))


def _tail(name: str, rest: str | None) -> tuple[str, str]:
    """What follows a tensor's name: ".bias" or nothing, and the adapter's name in a dump of a state_dict."""
    if rest is None:
        return "", ""
    first, _, last = rest.rpartition(".")
    if last == "bias" and name == "lora_B":
        return ".bias", first
    return "", first if last == "weight" else rest


def _check(found: _Sorted, places: Mapping[str, Site], model: nn.Module, config: Config) -> None:
    what = type(model).__name__
    if len(found.adapters) > 1:
        raise FileError(f"it has several adapters, {some(sorted(found.adapters))}; pass the tensors of one of them")
    if found.strange:
        raise FileError(
            f"{len(found.strange)} of its keys are no tensors of {config.type} and none of {what}: "
            f"{some(sorted(found.strange))}"
        )
    if not found.layers:
        raise FileError(f"it has no tensors of {config.type}: those are {', '.join(KINDS[config.type].tensors)}")
    lost = sorted((found.layers.keys() | found.biases.keys()) - places.keys())
    if lost:
        hint = next((f"; {path} is like {near[0]}" for path in lost if (near := nearest(path, places, limit=1))), "")
        raise FileError(
            f"{len(lost)} of its {len(found.layers)} layers are no layers of {what}: {some(sorted(lost))}{hint}. Is "
            "this the model the adapter was made for?"
        )


def _remarks(found: _Sorted, places: Mapping[str, Site], config: Config) -> tuple[str, ...]:
    remarks = []
    if found.saved:
        remarks.append(f"full copies of {some(sorted(found.saved))} (modules_to_save) are no adapters; left out")
    if found.copies:
        remarks.append(
            f"{len(found.copies)} tensors are the model's own, not adapters; left out: {some(sorted(found.copies))}"
        )
    if found.changed:
        remarks.append(
            f"{len(found.changed)} tensors are whole ones in place of the model's own, not adapters, and differ from "
            f"them; left out: {some(sorted(found.changed))}"
        )
    windows = [
        path for path in found.layers if len(places[path].geometry.kernel) and not places[path].geometry.pointwise
    ]
    if config.type == "OFT" and windows:
        remarks.append(
            f"{len(windows)} convolutions have the weight that PEFT merges; unmerged, PEFT adds up overlapping windows "
            f"and gives something else: {some(sorted(windows))}"
        )
    return tuple(remarks)
