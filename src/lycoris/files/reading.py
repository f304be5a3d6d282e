"""From an adapter file to a bundle, with every tensor accounted for."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from lycoris.algorithms import read_tensors
from lycoris.bundle import Bundle, Entry
from lycoris.errors import FileError, nearest, unknown
from lycoris.files.dialect import Dialect, Key, flatten
from lycoris.files.dialects import DIALECTS
from lycoris.files.storage import load_tensors
from lycoris.geometry import Geometry, sites

SHOWN = 5


def read(
    path: str | os.PathLike[str],
    model: nn.Module,
    dialect: str | None = None,
    *,
    component: str = "",
    prefix: str | None = None,
) -> Bundle:
    """Read an adapter file for a model. See `resolve`; the file's name is put before every error."""
    tensors, metadata = load_tensors(path)
    try:
        return resolve(tensors, model, dialect, metadata=metadata, component=component, prefix=prefix)
    except FileError as error:
        raise FileError(f"{path}: {error}") from error


def resolve(
    tensors: Mapping[str, Tensor],
    model: nn.Module,
    dialect: str | None = None,
    *,
    metadata: Mapping[str, str] | None = None,
    component: str = "",
    prefix: str | None = None,
) -> Bundle:
    """Tensors by file name, matched to a model's layers.

    The model is only asked for paths and shapes, so one on the meta device serves. `component` is which part of a
    pipeline the model is ("" the denoiser, "text_encoder", ...); tensors of other components become remarks.

    Raises `FileError` when a tensor of this component belongs to no layer, when shapes differ, or when nothing
    matches; nothing is loaded then.
    """
    keys = _split(tensors, _dialect(tensors, dialect, prefix))
    mine = {name: key for name, key in keys.items() if key.component == component}
    others = sorted({key.component or "the denoiser" for key in keys.values() if key.component != component})
    remarks = [f"{len(keys) - len(mine)} tensors are for {', '.join(others)} and were left out"] if others else []
    paths = _paths(model)
    groups: dict[str, dict[str, Tensor]] = defaultdict(dict)
    for name, key in mine.items():
        groups[key.flat][key.suffix] = tensors[name]
    lost = sorted(flat for flat in groups if flat not in paths)
    if lost or not groups:
        raise FileError(_lost(lost, groups, paths, model, others))
    entries: dict[str, tuple[Entry, ...]] = {}
    problems = []
    for flat, group in groups.items():
        where, geometry = paths[flat]
        try:
            entries[where] = (_entry(group, geometry, where),)
        except FileError as error:
            problems.append(str(error))
    if problems:
        more = f"\n  and {len(problems) - SHOWN} more" if len(problems) > SHOWN else ""
        listed = "\n  ".join(problems[:SHOWN])
        raise FileError(f"{len(problems)} of {len(groups)} layers do not fit {type(model).__name__}:\n  {listed}{more}")
    return Bundle(entries, dict(metadata or {}), tuple(remarks))


def _entry(group: Mapping[str, Tensor], geometry: Geometry, where: str) -> Entry:
    for suffix, tensor in group.items():
        if not torch.isfinite(tensor).all():
            raise FileError(f"{where}.{suffix} holds NaN or infinity")
    algorithm, tensors = read_tensors(group, geometry, where)
    return Entry(algorithm, geometry, tensors)


def _dialect(tensors: Mapping[str, Tensor], name: str | None, prefix: str | None) -> Dialect:
    if prefix is not None:
        return Dialect(name=prefix, prefixes={prefix: ""}, default=prefix)
    if name is not None:
        if name not in DIALECTS:
            raise FileError(unknown("dialect", name, DIALECTS))
        return DIALECTS[name]
    for dialect in DIALECTS.values():
        if any(dialect.split(key) for key in tensors):
            return dialect
    known = "; ".join(f"{d.name}: {', '.join(p + '_...' for p in d.prefixes)}" for d in DIALECTS.values())
    raise FileError(f"its {len(tensors)} keys are of no known format: {_some(tensors)}. Known are {known}")


def _split(tensors: Mapping[str, Tensor], dialect: Dialect) -> dict[str, Key]:
    keys = {name: dialect.split(name) for name in tensors}
    strange = [name for name, key in keys.items() if key is None]
    if strange:
        raise FileError(
            f"{len(strange)} of its {len(tensors)} keys are not of the format {dialect.name}: {_some(strange)}"
        )
    return {name: key for name, key in keys.items() if key is not None}


def _paths(model: nn.Module) -> dict[str, tuple[str, Geometry]]:
    """Flat name → path and geometry of each layer that adapters can serve."""
    found: dict[str, tuple[str, Geometry]] = {}
    for path, _, _, geometry in sites(model):
        flat = flatten(path)
        if flat in found:
            raise FileError(
                f"{found[flat][0]} and {path} of {type(model).__name__} have the same name with underscores; "
                "this format cannot tell which of them is meant"
            )
        found[flat] = (path, geometry)
    return found


def _lost(
    lost: list[str],
    groups: Mapping[str, object],
    paths: Mapping[str, object],
    model: nn.Module,
    others: list[str],
) -> str:
    name = type(model).__name__
    if not groups:
        return f"it has nothing for this component, only tensors for {', '.join(others)}; pass it as component="
    hint = next((f"; {flat} is like {near[0]}" for flat in lost if (near := nearest(flat, paths, limit=1))), "")
    matched = len(groups) - len(lost)
    what = "none of its" if not matched else f"{len(lost)} of its"
    return (
        f"{what} {len(groups)} layers {'is' if not matched else 'are not'} a layer of {name}: {_some(lost)}{hint}. "
        f"{name} has {len(paths)} such layers: {_some(sorted(paths))}. Is this the model the file was made for?"
    )


def _some(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(names[:SHOWN]) + (f", ... ({len(names)})" if len(names) > SHOWN else "")
