"""Read a PEFT adapter for a model, accounting for every tensor."""

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
from lycoris.adapters.load_report import SHOWN, Report, some
from lycoris.algorithms.base import Entry
from lycoris.errors import FileError, nearest, prefix_errors
from lycoris.files.container.storage import load_tensors
from lycoris.files.peft.config import PEFT_TYPES, PeftConfig, find_weights, load_config
from lycoris.files.peft.layers import read_entries
from lycoris.layers import paths
from lycoris.layers.sites import ModelSites, Site, class_name

PEFT_PREFIX = "base_model.model."


@cache
def _compile_tensor_name() -> re.Pattern[str]:
    """A tensor's name in its parts. Made when it is first needed: that takes longer than most of this package."""
    names = "|".join(sorted({name for kind in PEFT_TYPES.values() for name in kind.tensors}))
    return re.compile(rf"(?P<path>.+?)\.(?P<name>{names})(?:\.(?P<rest>.+))?")


@dataclass
class _SortedTensors:
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

    OFT, BOFT, trained biases, and IA3 on outputs of layers with a bias need the model's weights. Everything else works
    with a model on the meta device. Full copies of modules (`modules_to_save`) are not adapters: they are left out with
    a remark.

    Args:
        source: The folder, or tensors by name.
        config: The content of `adapter_config.json`; None: read from the folder. Required for tensors by name.

    Raises:
        FileError: A tensor matches no layer, does not fit it, or is of a method that is not supported.
    """
    if isinstance(source, Mapping):
        if config is None:
            raise FileError("tensors alone do not say what they are: pass config, the content of adapter_config.json")
        return _resolve_peft(source, model, config)
    folder = Path(source)
    with prefix_errors(folder):
        values = load_config(folder) if config is None else config
        return _resolve_peft(_load_weights(folder), model, values)


def _load_weights(folder: Path) -> dict[str, Tensor]:
    return load_tensors(find_weights(folder))[0]


def _resolve_peft(given: Mapping[str, Tensor], model: nn.Module | ModelSites, values: Mapping[str, Any]) -> Bundle:
    config, places = PeftConfig.parse(values), ModelSites.of(model)
    found = _sort_tensors(given, places.model, config)
    _check_sorted(found, places, places.model, config)
    entries: dict[str, tuple[Entry, ...]] = {}
    problems = []
    for path in sorted(found.layers.keys() | found.biases.keys()):
        tensors = found.layers.get(path, {})
        try:
            entries[path] = read_entries(config, places[path], tensors, found.biases.get(path))
        except FileError as error:
            problems.append(str(error))
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise FileError(f"{len(problems)} of {len(entries) + len(problems)} layers cannot be read:\n  {listed}{more}")
    applied = {path: " + ".join(entry.algorithm.name for entry in stack) for path, stack in entries.items()}
    base = Base(class_name(places.model), places.geometries)
    report = Report(dialect="peft", applied=applied, remarks=_list_remarks(found, places, config))
    return Bundle(entries, {}, base, report)


def _sort_tensors(tensors: Mapping[str, Tensor], model: nn.Module, config: PeftConfig) -> _SortedTensors:
    found, kind, modules = _SortedTensors(), PEFT_TYPES[config.type], config.list_saved_modules()
    own: dict[str, Tensor] = dict(paths.named_tensors(model))
    for key, tensor in tensors.items():
        name = key.removeprefix(PEFT_PREFIX)
        match = _compile_tensor_name().fullmatch(name)
        if match is not None and match["name"] in kind.tensors:
            tail, adapter = _split_tail(match["name"], match["rest"])
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
        elif last == "bias" and config.get_text("bias", "none") != "none" and plain in own:
            found.biases[plain.removesuffix(".bias")] = tensor
        elif plain in own:
            (found.copies if _equals_own(tensor, own[plain]) else found.changed).add(plain)
        else:
            found.strange.append(key)
    return found


def _equals_own(tensor: Tensor, own: Tensor) -> bool:
    """Whether a tensor is what the model has. One on the meta device has nothing that could differ but its shape."""
    return tensor.shape == own.shape and (own.is_meta or torch.equal(tensor.cpu(), own.detach().cpu().to(tensor.dtype)))


def _split_tail(name: str, rest: str | None) -> tuple[str, str]:
    """What follows a tensor's name: ".bias" or nothing, and the adapter's name in a dump of a state_dict."""
    if rest is None:
        return "", ""
    first, _, last = rest.rpartition(".")
    if last == "bias" and name == "lora_B":
        return ".bias", first
    return "", first if last == "weight" else rest


def _check_sorted(found: _SortedTensors, places: Mapping[str, Site], model: nn.Module, config: PeftConfig) -> None:
    what = type(model).__name__
    if len(found.adapters) > 1:
        raise FileError(f"it has several adapters, {some(sorted(found.adapters))}; pass the tensors of one of them")
    if found.strange:
        raise FileError(
            f"{len(found.strange)} of its keys are no tensors of {config.type} and none of {what}: "
            f"{some(sorted(found.strange))}"
        )
    if not found.layers:
        raise FileError(f"it has no tensors of {config.type}: those are {', '.join(PEFT_TYPES[config.type].tensors)}")
    lost = sorted((found.layers.keys() | found.biases.keys()) - places.keys())
    if lost:
        hint = next((f"; {path} is like {near[0]}" for path in lost if (near := nearest(path, places, limit=1))), "")
        raise FileError(
            f"{len(lost)} of its {len(found.layers)} layers are no layers of {what}: {some(sorted(lost))}{hint}. Is "
            "this the model the adapter was made for?"
        )


def _list_remarks(found: _SortedTensors, places: Mapping[str, Site], config: PeftConfig) -> tuple[str, ...]:
    remarks = []
    if found.saved:
        remarks.append(f"full copies of {some(sorted(found.saved))} (modules_to_save) are no adapters; left out")
    if found.copies:
        remarks.append(
            f"{len(found.copies)} tensors are the model's own, not adapters; left out: {some(sorted(found.copies))}"
        )
    if found.changed:
        remarks.append(
            f"{len(found.changed)} tensors replace the model's own and differ from them, so they are no adapters; "
            f"left out: {some(sorted(found.changed))}"
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
