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
    """The parsed values of the keywords in `KEYWORDS`, with which sd-scripts and Musubi Tuner select layers.

    An expression has to match the whole path of a layer.
    """

    excludes: Expressions = ()
    includes: Expressions = ()
    """Paths that get adapters although `excludes` matches them."""
    ranks: tuple[tuple[re.Pattern[str], int], ...] = ()
    """The first match counts; rank 0 leaves the layer out."""
    rates: tuple[tuple[re.Pattern[str], float], ...] = ()
    """The first match counts; rate 0 leaves the adapter untrained."""

    @classmethod
    def parse(cls, options: Mapping[str, Any]) -> Patterns:
        """Parse the keywords from strings, as in `--network_args`, or from lists and mappings.

        Other options are ignored. Raises `ConfigError` for what cannot be parsed, and for negative ranks and rates.
        """
        ranks = _parse_pairs(options.get("network_reg_dims"), "network_reg_dims", int)
        rates = _parse_pairs(options.get("network_reg_lrs"), "network_reg_lrs", float)
        excludes, includes = (parse_expressions(options.get(name), name) for name in KEYWORDS[:2])
        return cls(excludes, includes, ranks, rates)

    def leaves_out(self, path: str) -> bool:
        """Return whether a layer gets no adapter.

        It is excluded and not included again, or its rank is 0.
        """
        if any(each.fullmatch(path) for each in self.excludes) and not any(p.fullmatch(path) for p in self.includes):
            return True
        return self.rank_for(path) == 0

    def rank_for(self, path: str) -> int | None:
        """Return the rank of the first pattern in `ranks` that matches a layer.

        None: no pattern matches, and the layer has the network's rank.
        """
        return next((rank for each, rank in self.ranks if each.fullmatch(path)), None)

    def rate_for(self, path: str) -> int | None:
        """Return the index in `rates` of the first pattern that matches a layer.

        None: no pattern matches, and the layer has the network's learning rate.
        """
        return next((at for at, (each, _) in enumerate(self.rates) if each.fullmatch(path)), None)

    def find_unmatched(self, paths: Iterable[str], adapted: Iterable[str]) -> Iterator[Remark]:
        """Yield a remark for each expression that matches no layer.

        Args:
            paths: Layers of all models.
            adapted: Layers that get an adapter; ranks and rates have to match one of these.
        """
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
                    f"{each.pattern!r} in {name} matches the full path of no {what}; an example of a path is "
                    f"{next(iter(among), 'none')}",
                    "unmatched",
                )


@dataclass(frozen=True, kw_only=True)
class PatternedPreset(Preset):
    """A preset whose targets are further restricted by patterns, which may also set the rank of single layers.

    Everything else is as in `lycoris.targeting.preset.Preset`.
    """

    patterns: Patterns = field(default_factory=Patterns)
    alpha: float | None = None
    """Alpha of layers whose rank a pattern sets, also of convolutions."""

    @classmethod
    def over(cls, preset: Preset, patterns: Patterns, alpha: float | None) -> PatternedPreset:
        """Return a preset with patterns on top. `alpha` is that of layers whose rank a pattern sets."""
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
        # T-LoRA's schedule depends on the largest rank that any layer may get.
        return (*super().overrides(), *({"dim": rank} for _, rank in self.patterns.ranks if rank))


def parse_expressions(given: Any, name: str) -> Expressions:
    """Parse regular expressions from a list, or from a string in Python syntax.

    `name` is the keyword, for errors. Raises `ConfigError` for anything else, and for invalid expressions.
    """
    wanted = f"{name} must be a list of regular expressions in Python syntax, such as \"['.*attn.*']\", not {given!r}"
    try:
        found = ast.literal_eval(given) if isinstance(given, str) else given or []
    except (ValueError, SyntaxError) as error:
        raise ConfigError(wanted) from error
    found = [found] if isinstance(found, str) else found
    if not isinstance(found, list | tuple) or not all(isinstance(each, str) for each in found):
        raise ConfigError(wanted)
    return tuple(_compile_expression(each, name) for each in found)


def _parse_pairs(given: Any, name: str, kind: type) -> tuple[tuple[re.Pattern[str], Any], ...]:
    """Parse pairs from a mapping, or from "expression=number,expression=number"."""
    if given is None or given == "":
        return ()
    pairs = dict(given) if isinstance(given, Mapping) else dict(_split_pairs(str(given), name))
    found = {each: parse_number(value, f"{each} in {name}", kind) for each, value in pairs.items()}
    for each, value in found.items():
        if value < 0 or not math.isfinite(value):
            raise ConfigError(f"{each} in {name} must be 0 or more, not {value}")
    return tuple((_compile_expression(each, name), value) for each, value in found.items())


def _split_pairs(text: str, name: str) -> Iterator[tuple[str, str]]:
    for pair in filter(None, (part.strip() for part in text.split(","))):
        expression, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(
                f"{name} must be pairs such as .*attn.*=8,.*mlp.*=4, but {pair!r} has no '='. Expressions cannot "
                "contain commas or '=', which separate pairs and values"
            )
        yield expression.strip(), value.strip()


def _compile_expression(expression: str, name: str) -> re.Pattern[str]:
    try:
        return re.compile(expression)
    except re.error as error:
        raise ConfigError(f"{name}: {expression!r} is not a regular expression ({error})") from None
