"""Written in any dialect, for any family, and read back: every adapter does the same to every layer, or is refused."""

from __future__ import annotations

import re
import zlib
from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor

import covering
from cases import ALGORITHMS, relative
from lycoris import OFT
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms import conversion
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.layer_below import BareWeight
from lycoris.errors import ConfigError, FileError
from lycoris.files import compose, resolve
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import NamedLayout
from lycoris.files.skeleton import load_skeleton
from lycoris.layers.geometry import Affine, Geometry
from lycoris.models.families import ARCHITECTURES

EXACT = 1e-10
NAMES = (
    "lora",
    "lokr-factor",
    "dora-lora",
    "lora-tucker",
    "loha",
    "lokr-full-matrix",
    "lokr-unbalanced",
    "tlora",
    "full",
    "dora-lora-in",
    "glora",
    "ia3",
    "ia3-in",
    "oft-constraint",
    "boft",
    "norm",
)
"""What differs when rows are cut, joined or exchanged; `tests/test_rows.py` goes through all settings."""
FILES = [name for name, each in DIALECTS.items() if not each.is_folder]
SETTINGS = ALGORITHMS | {"oft-constraint": OFT(block_size=2, constraint=1 / 64)}
"""A constraint that the file, which keeps it in single precision, does not round."""
Tensors = dict[str, Tensor]
NAMINGS = {name: len(each.namings) for name, each in ARCHITECTURES.items()}
"""Of architectures with as many namings, one with each setting and each format is quick."""
covering.register(NAMINGS)
covering.register({"oft-constraint": "OFT"})
MODELS = [(name, outline) for name, each in ARCHITECTURES.items() for outline in each.outlines[:1]]
TYPICAL = ("sdxl-unet", "flux1", "flux2", "wan", "sd3", "clip")
"""Architectures that differ in how their layers are named and fused."""


def small(g: Geometry) -> Geometry:
    """The same proportions, a part of the width."""
    part = next((part for part in (384, 256, 64) if all(n % part == 0 or n < 64 for n in g.shape[:2])), 1)
    shape = tuple(n // part if n % part == 0 else n for n in g.shape[:2])
    groups = g.groups // part if g.groups % part == 0 else g.groups
    return replace(g, shape=(*shape, *g.shape[2:]), groups=groups)


def layout(architecture: str, outline: str) -> NamedLayout:
    """One layer of each kind of a known model, made small."""
    seen: set[str] = set()
    layers = {}
    for path, g in load_skeleton(outline).items():
        kind = re.sub(r"\d+", "*", path)
        # Of numbers that are not blocks, as in net.0 and net.2, all.
        if (re.sub(r"blocks?\.\d+", "", path)) not in seen and g.size < 10**9 and g.kind != "embedding":
            seen |= {re.sub(r"blocks?\.\d+", "", path), kind}
            layers[path] = small(g)
    return NamedLayout(outline, layers, ARCHITECTURES[architecture], "diffusers", layers)


def entry(algorithm: Algorithm, g: Geometry, weight: Tensor) -> Entry | None:
    try:
        algorithm.check(g)
    except ConfigError:
        return None
    adapter = Adapter(algorithm, g, dtype=torch.float64)
    adapter.initialize(BareWeight(g, weight))
    return Entry(algorithm, g, {name: t + 0.3 * torch.randn_like(t) for name, t in adapter.whole().items()})


@cache
def build_bundle(architecture: str, outline: str, name: str) -> tuple[NamedLayout, Bundle, Tensors]:
    """A layout, adapters of one setting on its layers, and by layer the weight that they are over."""
    torch.manual_seed(zlib.crc32(outline.encode()))
    where = layout(architecture, outline)
    weights = {path: torch.randn(g.stacked_shape(g.shape), dtype=torch.float64) for path, g in where.layers.items()}
    each = {path: entry(SETTINGS[name], g, weights[path]) for path, g in where.layers.items()}
    return where, Bundle({path: (one,) for path, one in each.items() if one is not None}), weights


def change(stack: tuple[Entry, ...], weight: Tensor) -> Tensor:
    base = Affine(weight, None)
    for each in stack:
        base = conversion.adapt_affine(each, base)
    return base.weight - weight


def held(bundle: Bundle, dialect: str) -> Bundle:
    """Without layers that a dialect has no place for."""
    kinds, layers = DIALECTS[dialect].kinds, DIALECTS[dialect].layer_pattern or ".*"
    return Bundle(
        {
            path: stack
            for path, stack in bundle.entries.items()
            if (kinds is None or stack[0].geometry.kind in kinds) and re.fullmatch(layers, path)
        }
    )


def rightly_refused(error: FileError, bundle: Bundle, kind: str, dialect: str) -> None:
    """Only for what a dialect does not hold, or what the base weight determines."""
    served = DIALECTS[dialect].algorithms
    tied = any(conversion.needs_base(each) for stack in bundle.entries.values() for each in stack)
    assert (served is not None and kind not in served) or tied, str(error)


@pytest.mark.sample(30)
@pytest.mark.parametrize("dialect", FILES)
@pytest.mark.parametrize(("architecture", "outline"), MODELS)
@pytest.mark.parametrize("name", NAMES)
def test_read_as_written(architecture: str, outline: str, name: str, dialect: str) -> None:
    where, bundle, weights = build_bundle(architecture, outline, name)
    bundle = held(bundle, dialect)
    served, kind = DIALECTS[dialect].algorithms, SETTINGS[name].name
    if not bundle.entries:
        return
    try:
        written = compose(bundle, dialect, model=where)
    except FileError as error:
        rightly_refused(error, bundle, kind, dialect)
        return
    assert served is None or kind in served
    read = resolve(written.tensors, where, dialect, metadata=written.header)
    assert read.entries.keys() == bundle.entries.keys()
    for path, stack in bundle.entries.items():
        assert relative(change(read.entries[path], weights[path]), change(stack, weights[path])) < EXACT, path


@pytest.mark.parametrize(
    ("architecture", "outline"),
    [pytest.param(*model, marks=() if model[0] in TYPICAL else pytest.mark.slow) for model in MODELS],
)
def test_recognised_without_being_told(architecture: str, outline: str) -> None:
    """The dialect may be told by its keys alone, whichever of those that look alike is found."""
    where, bundle, weights = build_bundle(architecture, outline, "lora")
    for dialect in FILES:
        own = held(bundle, dialect)
        if not own.entries:
            continue
        written = compose(own, dialect, model=where)
        read = resolve(written.tensors, where, metadata=written.header)
        assert read.entries.keys() == own.entries.keys(), dialect
        for path, stack in own.entries.items():
            assert relative(change(read.entries[path], weights[path]), change(stack, weights[path])) < EXACT
