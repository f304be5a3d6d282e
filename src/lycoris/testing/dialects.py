"""What must hold for every file format: what it holds is read back as it was written, and it refuses the rest."""

from __future__ import annotations

import re
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms import DoRA, Full, LoHa, LoKr, LoRA, conversion
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.errors import FileError
from lycoris.files import compose, resolve
from lycoris.files.dialects import DIALECTS
from lycoris.layers.geometry import Affine
from lycoris.targeting.planning import Rule, plan
from lycoris.testing.algorithms import perturb, relative_error

EXACT = 1e-10

DIALECT_SETTINGS: tuple[Algorithm, ...] = (
    LoRA(rank=2, alpha=1.0),
    LoHa(rank=2, alpha=1.0),
    LoKr(rank=1, alpha=0.5, factor=2),
    Full(bias=False),
    DoRA(inner=LoRA(rank=2)),
)
"""Settings that differ in what a format has to store."""


def check_dialect(dialect: str, model: nn.Module, algorithms: Iterable[Algorithm] = DIALECT_SETTINGS) -> None:
    """Write adapters of a model in a format and read them back, with and without naming the format.

    Args:
        dialect: a name in `lycoris.files.dialects.DIALECTS`.
        model: any model with layers that the format holds; they are named as those of no known family.
        algorithms: what to write. One that the format does not hold has to be refused.

    Raises:
        AssertionError: a layer is lost, added, or does something else; the message names it.
    """
    held = DIALECTS[dialect].algorithms
    for algorithm in algorithms:
        bundle = keep_held_layers(_build(model, algorithm), dialect)
        assert bundle.entries, f"{dialect} holds no layer of this model: see its `kinds` and `layers`"
        try:
            written = compose(bundle, dialect, model=model)
        except FileError as error:
            if held is None or algorithm.name in held:
                raise AssertionError(f"{dialect} refuses {algorithm}: {error}") from error
            continue
        assert held is None or algorithm.name in held, f"{dialect} writes {algorithm}, which it does not list"
        for named in (dialect, None):
            found = resolve(written.tensors, model, named, metadata=written.header)
            lost = sorted(bundle.entries.keys() ^ found.entries.keys())
            assert not lost, f"{dialect}, {algorithm}: not in both what was written and what was read: {lost}"
            for path, stack in bundle.entries.items():
                weight = torch.randn(stack[0].geometry.stacked_shape(stack[0].geometry.shape), dtype=torch.float64)
                error_ = relative_error(_change(found.entries[path], weight), _change(stack, weight))
                assert error_ < EXACT, f"{dialect}, {algorithm}, {path}: read back with an error of {error_:.1e}"


def keep_held_layers(bundle: Bundle, dialect: str) -> Bundle:
    """Leave out the layers that a format has no place for."""
    kinds, layers = DIALECTS[dialect].kinds, DIALECTS[dialect].layer_pattern or ".*"
    return Bundle(
        {
            path: stack
            for path, stack in bundle.entries.items()
            if (kinds is None or stack[0].geometry.kind in kinds) and re.fullmatch(layers, path)
        }
    )


def _build(model: nn.Module, algorithm: Algorithm) -> Bundle:
    adapters = AdapterSet.build(model, plan(model, Rule(algorithm), strict=False), dtype=torch.float64)
    perturb(adapters)
    return adapters.bundle()


def _change(stack: Iterable[Entry], weight: Tensor) -> Tensor:
    base = Affine(weight, None)
    for entry in stack:
        base = conversion.adapt_affine(entry, base)
    return base.weight - weight
