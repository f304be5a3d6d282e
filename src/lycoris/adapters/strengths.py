"""How much adapters count: a strength for all of a model's, times a factor by block."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from lycoris.errors import ConfigError, unknown


@dataclass(frozen=True)
class Strengths:
    """What counts at each layer: `overall` times the factor of the longest block that holds it.

    A value, which never changes; see `AdapterSet.set_strength`.
    """

    overall: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)

    @classmethod
    def of(cls, overall: float, blocks: Mapping[str, float], paths: Iterable[str]) -> Strengths:
        """Check strengths for layers at these paths, and return them.

        Raises:
            ConfigError: A block holds none of the layers, or a strength is not finite.
        """
        known = set(blocks_of(paths))
        for block in blocks:
            if block not in known:
                raise ConfigError(unknown("block of layers with adapters", block, known))
        return cls(finite(overall), {block: finite(factor) for block, factor in blocks.items()})

    def factor(self, path: str) -> float:
        """Return the factor of a layer: of the blocks that hold it, the longest path's.

        1 where no block holds it. A layer's own path counts as a block.
        """
        around = [block for block in blocks_of([path]) if block in self.blocks] if self.blocks else []
        return self.blocks[max(around, key=len)] if around else 1.0

    def at(self, path: str) -> float:
        return self.overall * self.factor(path)

    def with_one(self, path: str, strength: float, paths: Collection[str]) -> Strengths:
        """Return strengths that are the same for all of these layers but one, which may hold others.

        In the result `overall` is 1 and every layer a block of its own.
        """
        is_complete = self.overall == 1 and self.blocks.keys() >= set(paths)
        return Strengths(
            1.0, {**(self.blocks if is_complete else {each: self.at(each) for each in paths}), path: strength}
        )


def finite(strength: float) -> float:
    """Return a strength as a float.

    Raises:
        ConfigError: It is infinite or NaN.
    """
    if not math.isfinite(strength):
        raise ConfigError(f"strength must be a finite number, not {strength!r}; 0 is off, 1 the trained strength")
    return float(strength)


def blocks_of(paths: Iterable[str]) -> Iterator[str]:
    """Iterate over every module that holds one of these layers, the layers themselves among them, as dotted paths.

    Of `a.b.c` these are `a`, `a.b` and `a.b.c`; a block that holds several layers is given once for each.
    """
    for path in paths:
        steps = path.split(".")
        yield from (".".join(steps[: at + 1]) for at in range(len(steps)))
