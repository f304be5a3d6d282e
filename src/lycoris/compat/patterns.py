"""Regular expressions over layer paths: which layers are left out, and which get a rank or learning rate of their own.

The keywords are those of sd-scripts' and Musubi Tuner's own network modules. An expression must match the whole path.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from torch import nn

from lycoris.errors import ConfigError
from lycoris.targeting.options import parse_number
from lycoris.targeting.preset import Options, Preset
from lycoris.targeting.remarks import Remark

KEYWORDS = ("exclude_patterns", "include_patterns", "network_reg_dims", "network_reg_lrs")

Expressions = tuple[re.Pattern[str], ...]


@dataclass(frozen=True)
class Patterns:
    """What the four keywords say."""

    excludes: Expressions = ()
    includes: Expressions = ()
    """Paths that get adapters although `excludes` has them."""
    ranks: tuple[tuple[re.Pattern[str], int], ...] = ()
    """The first that matches counts; rank 0 leaves the layer out."""
    rates: tuple[tuple[re.Pattern[str], float], ...] = ()
    """The first that matches counts; rate 0 leaves the adapter as it starts."""

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Patterns:
        """From strings, as `--network_args` hands them over, or from lists and mappings. Raises `ConfigError`."""
        ranks = _pairs(options.get("network_reg_dims"), "network_reg_dims", int)
        rates = _pairs(options.get("network_reg_lrs"), "network_reg_lrs", float)
        excludes, includes = (parse_expressions(options.get(name), name) for name in KEYWORDS[:2])
        return cls(excludes, includes, ranks, rates)

    def leaves_out(self, path: str) -> bool:
        """Whether a layer gets nothing."""
        if any(each.fullmatch(path) for each in self.excludes) and not any(p.fullmatch(path) for p in self.includes):
            return True
        return self.rank_for(path) == 0

    def rank_for(self, path: str) -> int | None:
        """The rank of a layer that has one of its own."""
        return next((rank for each, rank in self.ranks if each.fullmatch(path)), None)

    def rate_for(self, path: str) -> int | None:
        """Which of `rates` a layer has."""
        return next((at for at, (each, _) in enumerate(self.rates) if each.fullmatch(path)), None)

    def find_unmatched(self, paths: Iterable[str], adapted: Iterable[str]) -> Iterator[Remark]:
        """Expressions that match none of the layers of all models, or, for those that need one, no adapted layer."""
        every, chosen = list(paths), list(adapted)
        asked = [
            *(("exclude_patterns", each, every, "layer") for each in self.excludes),
            *(("include_patterns", each, every, "layer") for each in self.includes),
            *(
                ("network_reg_dims", each, chosen if rank else every, "layer that gets an adapter" if rank else "layer")
                for each, rank in self.ranks
            ),
            *(("network_reg_lrs", each, chosen, "layer that gets an adapter") for each, _ in self.rates),
        ]
        for name, each, among, what in asked:
            if not any(each.fullmatch(path) for path in among):
                yield Remark(
                    f"{each.pattern!r} in {name} matches the whole path of no {what}; paths are such as "
                    f"{next(iter(among), 'none')}",
                    "unmatched",
                )


@dataclass(frozen=True, kw_only=True)
class PatternedPreset(Preset):
    """A preset whose layers patterns narrow, and give ranks of their own."""

    patterns: Patterns = field(default_factory=Patterns)
    alpha: float | None = None
    """Alpha of a layer with a rank of its own, a convolution too."""

    @classmethod
    def over(cls, preset: Preset, patterns: Patterns, alpha: float | None) -> PatternedPreset:
        """A preset with patterns on top."""
        own = {each.name: getattr(preset, each.name) for each in fields(Preset)}
        return cls(**own, patterns=patterns, alpha=alpha)

    def excludes(self, path: str) -> bool:
        return super().excludes(path) or self.patterns.leaves_out(path)

    def options_for(self, path: str, layer: nn.Module, around: Sequence[nn.Module]) -> Options | None:
        found, rank = super().options_for(path, layer, around), self.patterns.rank_for(path)
        if found is None or rank is None:
            return found
        return {"conv_alpha": self.alpha, **found, "dim": rank}

    def overrides(self) -> tuple[Options, ...]:
        # The schedule of T-LoRA goes by the largest rank that any layer may get.
        return (*super().overrides(), *({"dim": rank} for _, rank in self.patterns.ranks if rank))


def parse_expressions(given: Any, name: str) -> Expressions:
    """Regular expressions from a list, or from a list or string as Python writes it. Raises `ConfigError`."""
    wanted = f"{name} is a list of regular expressions, written as in Python: \"['.*attn.*']\"; not {given!r}"
    try:
        found = ast.literal_eval(given) if isinstance(given, str) else given or []
    except (ValueError, SyntaxError) as error:
        raise ConfigError(wanted) from error
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
        raise ConfigError(wanted)
    return tuple(_compile(each, name) for each in found)


def _pairs(given: Any, name: str, kind: type) -> tuple[tuple[re.Pattern[str], Any], ...]:
    """Pairs from a mapping, or from "expression=number,expression=number"."""
    if given is None or given == "":
        return ()
    pairs = dict(given) if isinstance(given, Mapping) else dict(_split(str(given), name))
    found = {each: parse_number(value, f"{each} in {name}", kind) for each, value in pairs.items()}
    for each, value in found.items():
        if value < 0 or not math.isfinite(value):
            raise ConfigError(f"{each} in {name} must be 0 or more, not {value}")
    return tuple((_compile(each, name), value) for each, value in found.items())


def _split(text: str, name: str) -> Iterator[tuple[str, str]]:
    for pair in filter(None, (part.strip() for part in text.split(","))):
        expression, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(
                f"{name} is pairs such as .*attn.*=8,.*mlp.*=4, and {pair!r} has no '='. A comma ends a pair and the "
                "first '=' ends its expression, so an expression can have neither"
            )
        yield expression.strip(), value.strip()


def _compile(expression: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{name}: {expression!r} is not a regular expression ({error})") from None
