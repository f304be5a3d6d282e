"""What is measured: algorithm settings with their targets, layers, and the precision and threads they run with.

Ratios are to the same frozen layer without an adapter, which is the limit.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Case:
    """One algorithm with settings that mean the same in every library."""

    name: str
    label: str
    algorithm: str
    """Key of the tables in `benchmarks.libraries`."""
    settings: Mapping[str, int] = field(default_factory=dict)
    target: float | None = None
    """Ratio of time that we want to stay under on the headline layer. None: no target was set."""


@dataclass(frozen=True, kw_only=True)
class Layer:
    """A layer and what goes into it; `size` is tokens for a linear layer and the side of the image for a 3x3 one."""

    name: str
    kind: str
    into: int
    out: int
    size: int

    def build(self) -> nn.Module:
        if self.kind == "linear":
            return nn.Linear(self.into, self.out)
        return nn.Conv2d(self.into, self.out, 3, padding=1)

    def input(self) -> Tensor:
        if self.kind == "linear":
            return torch.randn(1, self.size, self.into)
        return torch.randn(1, self.into, self.size, self.size)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """How a layer runs. Adapters are float32 always; `dtype` is the base's and the input's."""

    device: str
    dtype: str
    threads: int
    compiled: bool = False

    def __str__(self) -> str:
        if self.device == "cpu":
            return f"{self.dtype}, {self.threads} thread{'s' if self.threads > 1 else ''}"
        return f"{self.dtype}, {'compiled' if self.compiled else 'eager'}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def _by_name(*things: Any) -> dict[str, Any]:
    return {thing.name: thing for thing in things}


def _linear(into: int, out: int, tokens: int) -> Layer:
    return Layer(name=f"linear-{into}-{out}-t{tokens}", kind="linear", into=into, out=out, size=tokens)


def _conv(channels: int, side: int) -> Layer:
    return Layer(name=f"conv-{channels}-s{side}", kind="conv", into=channels, out=channels, size=side)


def _case(name: str, label: str, algorithm: str, target: float | None, **settings: int) -> Case:
    return Case(name=name, label=label, algorithm=algorithm, settings=settings, target=target)


CASES: Mapping[str, Case] = _by_name(
    _case("lora-r16", "LoRA r16", "lora", 1.12, rank=16),
    _case("loha-r4", "LoHa r4", "loha", 1.17, rank=4),
    _case("loha-r8", "LoHa r8", "loha", 1.30, rank=8),
    _case("loha-r32", "LoHa r32", "loha", 1.75, rank=32),
    _case("lokr-full", "LoKr full, factor -1", "lokr-full", 1.23, factor=-1),
    _case("lokr-full-f4", "LoKr full, factor 4", "lokr-full", 1.50, factor=4),
    _case("lokr-r16-f8", "LoKr r16, factor 8", "lokr", 1.23, rank=16, factor=8),
    _case("oft-32", "diag-OFT, blocks of 32", "oft", 1.15, block=32),
    _case("boft-32", "BOFT, blocks of 32", "boft", 1.80, block=32),
    _case("boft-8", "BOFT, blocks of 8", "boft", None, block=8),
    _case("dora-r16", "DoRA over LoRA r16", "dora", 1.27, rank=16),
    _case("glora-r16", "GLoRA r16", "glora", 1.20, rank=16),
    _case("ia3", "(IA)³", "ia3", 1.04),
    _case("tlora-r16", "T-LoRA r16", "tlora", 1.17, rank=16),
    _case("dylora-r16", "DyLoRA r16", "dylora", None, rank=16, block=4),
    _case("lora-r4", "LoRA r4", "lora", None, rank=4),
)

OVERHEAD_CASE, OVERHEAD_LAYER = "lora-r4", "linear-64-64-t16"
"""A layer so small that what an adapter costs is Python, reported in microseconds beyond the frozen layer."""

HEADLINE_LAYER = "linear-1024-1024-t1024"

LAYERS: Mapping[str, Layer] = _by_name(
    _linear(1024, 1024, 1024),
    _linear(64, 64, 16),
    _linear(1024, 1024, 4096),
    _linear(3072, 3072, 1024),
    _linear(3072, 3072, 4096),
    _linear(3072, 12288, 1024),
    _linear(3072, 12288, 4096),
    _conv(320, 64),
    _conv(640, 32),
)


def cases_for(layer: Layer, names: Sequence[str]) -> list[Case]:
    """Of the named cases, those that a layer is measured with: one where only overhead is looked at."""
    small = layer.name == OVERHEAD_LAYER
    return [CASES[name] for name in names if (name == OVERHEAD_CASE) == small]
