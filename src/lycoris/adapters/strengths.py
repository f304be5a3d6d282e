"""How much adapters count: a strength for all of a model's, times a factor by block."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lycoris.errors import ConfigError, unknown


@dataclass(frozen=True)
class Strengths:
    """What counts at each layer; see `AdapterSet.set_strength`."""

    overall: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, overall: float, blocks: Mapping[str, float], paths: Iterable[str]) -> Strengths:
        """For layers at these paths. Raises `ConfigError` for a block that holds none, and for what is no number."""
        known = set(blocks_of(paths))
        for block in blocks:
            if block not in known:
                raise ConfigError(unknown("block of layers with adapters", block, known))
        return cls(finite(overall), {block: finite(factor) for block, factor in blocks.items()})

    def factor(self, path: str) -> float:
        """Of the blocks that hold a layer, the longest one's."""
        around = [block for block in blocks_of([path]) if block in self.blocks] if self.blocks else []
        return self.blocks[max(around, key=len)] if around else 1.0

    def at(self, path: str) -> float:
        return self.overall * self.factor(path)

    def with_one(self, path: str, strength: float, paths: Collection[str]) -> Strengths:
        """The same for all of these layers but one, which may hold others."""
        told = self.overall == 1 and self.blocks.keys() >= set(paths)
        return Strengths(1.0, {**(self.blocks if told else {each: self.at(each) for each in paths}), path: strength})


def finite(strength: float) -> float:
    """Raises `ConfigError` for a strength that is none."""
    if not math.isfinite(strength):
        raise ConfigError(f"strength must be a finite number, not {strength!r}; 0 is off, 1 the trained strength")
    return float(strength)


def blocks_of(paths: Iterable[str]) -> Iterator[str]:
    """Every module that holds one of these layers, the layers themselves among them, as dotted paths."""
    for path in paths:
        steps = path.split(".")
        yield from (".".join(steps[: at + 1]) for at in range(len(steps)))
