"""Written in any dialect, for any family, and read back: every adapter does the same to every layer, or is refused."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from tests.cases import ALGORITHMS, relative
from torch import Tensor

from lycoris import recast
from lycoris.adapter import Adapter, Matrix
from lycoris.algorithm import Affine, Algorithm, Entry
from lycoris.bundle import Bundle
from lycoris.errors import ConfigError, FileError
from lycoris.files import compose, resolve
from lycoris.files.dialects import DIALECTS
from lycoris.files.families import ARCHITECTURES
from lycoris.files.layout import Layout
from lycoris.files.skeleton import skeleton
from lycoris.geometry import Geometry

EXACT = 1e-10
NAMES = (
    "lora",
    "lora-rs",
    "lora-gate",
    "lora-tucker",
    "dylora",
    "loha",
    "loha-tucker",
    "lokr",
    "lokr-factor",
    "lokr-full-matrix",
    "lokr-both",
    "lokr-unbalanced",
    "tlora",
    "full",
    "dora-lora",
    "dora-lora-in",
    "dora-lokr",
    "glora",
    "ia3",
    "ia3-in",
    "oft",
    "oft-constraint",
    "oft-rescale",
    "boft",
    "norm",
)
MODELS = [(name, outline) for name, each in ARCHITECTURES.items() for outline in each.outlines[:1]]


def small(g: Geometry) -> Geometry:
    """The same proportions, a 64th of the width."""
    shape = tuple(n // 64 if n % 64 == 0 else n for n in g.shape[:2])
    return replace(g, shape=(*shape, *g.shape[2:]))


def layout(architecture: str, outline: str) -> Layout:
    """One layer of each kind of a known model, made small."""
    seen: set[str] = set()
    layers = {}
    for path, g in skeleton(outline).items():
        kind = re.sub(r"\d+", "*", path)
        # Of numbers that are not blocks, as in net.0 and net.2, all.
        if (re.sub(r"blocks?\.\d+", "", path)) not in seen and g.size < 10**9 and g.kind != "embedding":
            seen |= {re.sub(r"blocks?\.\d+", "", path), kind}
            layers[path] = small(g)
    return Layout(outline, layers, ARCHITECTURES[architecture], "diffusers", layers)


def entry(algorithm: Algorithm, g: Geometry, weight: Tensor) -> Entry | None:
    try:
        algorithm.check(g)
    except ConfigError:
        return None
    adapter = Adapter(algorithm, g, dtype=torch.float64)
    adapter.initialise(Matrix(g, weight))
    return Entry(algorithm, g, {name: t + 0.3 * torch.randn_like(t) for name, t in adapter.whole().items()})


def bundles(where: Layout) -> Iterator[tuple[str, Bundle, dict[str, Tensor]]]:
    weights = {path: torch.randn(g.stacked(g.shape), dtype=torch.float64) for path, g in where.layers.items()}
    for name in NAMES:
        made = {path: entry(ALGORITHMS[name], g, weights[path]) for path, g in where.layers.items()}
        entries = {path: (one,) for path, one in made.items() if one is not None}
        if entries:
            yield name, Bundle(entries), weights


def change(stack: tuple[Entry, ...], weight: Tensor) -> Tensor:
    base = Affine(weight, None)
    for each in stack:
        base = recast.adapted(each, base)
    return base.weight - weight


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize(("architecture", "outline"), MODELS)
def test_read_as_written(architecture: str, outline: str, dialect: str) -> None:
    torch.manual_seed(zlib.crc32(f"{outline} {dialect}".encode()))
    where = layout(architecture, outline)
    served = DIALECTS[dialect].algorithms
    for name, bundle, weights in bundles(where):
        kind = ALGORITHMS[name].name
        try:
            written = compose(bundle, dialect, model=where)
        except FileError as error:
            tied = any(recast.needs_base(e) for stack in bundle.entries.values() for e in stack)
            assert (served is not None and kind not in served) or tied, (name, str(error))
            continue
        assert served is None or kind in served
        read = resolve(written.tensors, where, dialect, metadata=written.header)
        assert read.entries.keys() == bundle.entries.keys(), name
        for path, stack in bundle.entries.items():
            expected = change(stack, weights[path])
            assert relative(change(read.entries[path], weights[path]), expected) < EXACT, (name, path)


@pytest.mark.parametrize(("architecture", "outline"), MODELS)
def test_recognised_without_being_told(architecture: str, outline: str) -> None:
    """The dialect may be told by its keys alone, whichever of those that look alike is found."""
    torch.manual_seed(0)
    where = layout(architecture, outline)
    _, bundle, weights = next(bundles(where))
    for dialect in DIALECTS:
        written = compose(bundle, dialect, model=where)
        read = resolve(written.tensors, where, metadata=written.header)
        assert read.entries.keys() == bundle.entries.keys(), dialect
        for path, stack in bundle.entries.items():
            assert relative(change(read.entries[path], weights[path]), change(stack, weights[path])) < EXACT
