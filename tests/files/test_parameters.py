"""Differences of bare parameters of known models: what a format writes of them it reads back, whatever their names."""

from __future__ import annotations

import re

import pytest
import torch

from lycoris import Full
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Entry
from lycoris.files import compose, resolve
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import NamedLayout
from lycoris.models.families import ARCHITECTURES, FAMILIES

KNOWN = {name: ARCHITECTURES[family.components[""]] for name, family in FAMILIES.items() if name != "language-model"}
LAYOUTS = {name: NamedLayout.from_outline(each, each.outlines[0]) for name, each in KNOWN.items()}
HAVE = [name for name, where in LAYOUTS.items() if any(g.kind == "parameter" for g in where.layers.values())]

HOLDING = [
    name
    for name, each in DIALECTS.items()
    if not each.is_folder and "parameter" in (each.kinds or {"parameter"}) and "full" in (each.algorithms or {"full"})
]


@pytest.mark.parametrize("family", HAVE)
def test_parameters_are_read_back(family: str) -> None:
    where, algorithm = LAYOUTS[family], Full(bias=False)
    paths = [path for path, g in where.layers.items() if g.kind == "parameter"]
    kinds = {re.sub(r"\d+", "*", path): path for path in paths}
    entries = {}
    for path in kinds.values():
        g = where.layers[path]
        tensors = {
            name: torch.zeros(1).expand(g.stacked_shape(slot.shape)) for name, slot in algorithm.slots(g).items()
        }
        entries[path] = (Entry(algorithm, g, tensors),)
    for name in HOLDING:
        written = compose(Bundle(entries), name, model=where, family=family)
        assert resolve(dict(written.tensors), where, name).entries.keys() == entries.keys(), name
