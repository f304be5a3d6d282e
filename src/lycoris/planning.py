"""Rules and a model make a plan: which layer gets what, decided and checked before anything is touched."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import nn

from lycoris.algorithm import Algorithm
from lycoris.errors import ConfigError, PlanError, nearest
from lycoris.geometry import Geometry, describe

Choose = Callable[[str, nn.Module, Sequence[nn.Module], Geometry], "tuple[Algorithm, ...] | None"]
"""(path, layer, modules around it from the nearest out, geometry) → algorithms, lowest first; None: leave it alone."""


@dataclass(frozen=True)
class Rule:
    """What the layers that it matches get. All conditions must hold; `*` and `?` are wildcards."""

    use: Algorithm | tuple[Algorithm, ...]
    """One algorithm, several stacked from the lowest up, or () to leave the layer alone."""
    path: str | re.Pattern[str] = "*"
    """The layer's dotted path as in `named_modules()`, as a glob, or a compiled expression that must match whole."""
    kind: str = "*"
    """linear or conv."""
    inside: str = "*"
    """Class name of the layer itself or of a module around it."""

    def algorithms(self) -> tuple[Algorithm, ...]:
        return self.use if isinstance(self.use, tuple) else (self.use,)

    def matches(self, path: str, chain: Sequence[nn.Module], geometry: Geometry) -> bool:
        if isinstance(self.path, re.Pattern):
            at_path = self.path.fullmatch(path) is not None
        else:
            at_path = fnmatch.fnmatchcase(path, self.path)
        return (
            at_path
            and fnmatch.fnmatchcase(geometry.kind, self.kind)
            and any(fnmatch.fnmatchcase(type(module).__name__, self.inside) for module in chain)
        )


@dataclass(frozen=True)
class Placement:
    """One layer's part of a plan."""

    path: str
    geometry: Geometry
    algorithms: tuple[Algorithm, ...]

    @property
    def parameters(self) -> int:
        """Trainable numbers."""
        slots = [slot for algorithm in self.algorithms for slot in algorithm.slots(self.geometry).values()]
        return sum(math.prod(slot.shape) for slot in slots if slot.trainable)


@dataclass(frozen=True)
class Plan:
    """Which layers get which algorithms. A value: print it, compare it, hand it to `AdapterSet`."""

    placements: tuple[Placement, ...]
    skipped: tuple[str, ...] = ()
    """Paths of layers that adapters could serve and that get none."""
    remarks: tuple[str, ...] = field(default=())
    """What the user should know: targets that matched nothing, options without effect."""

    @property
    def parameters(self) -> int:
        return sum(placement.parameters for placement in self.placements)

    def __str__(self) -> str:
        groups: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        for placement in self.placements:
            key = (" + ".join(map(str, placement.algorithms)), placement.geometry.kind)
            groups[key] += 1
            sizes[key] += placement.parameters
        lines = [
            f"{len(self.placements)} layers get adapters, {len(self.skipped)} do not; {self.parameters:,} parameters"
        ]
        lines += [
            f"  {count:5d} {kind:6s} {sizes[use, kind]:>12,}  {use}" for (use, kind), count in groups.most_common()
        ]
        return "\n".join(lines + [f"  note: {remark}" for remark in self.remarks])


def plan(model: nn.Module, rules: Rule | Sequence[Rule]) -> Plan:
    """Match rules to the layers of a model; for each layer the first rule that matches wins.

    Raises `PlanError` for a rule that no layer falls to, naming near misses, and for an algorithm that cannot serve a
    layer it was given.
    """
    rules = [rules] if isinstance(rules, Rule) else list(rules)
    used: Counter[int] = Counter()

    def choose(
        path: str, layer: nn.Module, around: Sequence[nn.Module], geometry: Geometry
    ) -> tuple[Algorithm, ...] | None:
        for at, rule in enumerate(rules):
            if rule.matches(path, [layer, *around], geometry):
                used[at] += 1
                return rule.algorithms()
        return None

    made = place(model, choose)
    for at, rule in enumerate(rules):
        if not used[at]:
            raise PlanError(f"{rule} applies to no layer: {_why(model, rule)}")
    return made


def place(model: nn.Module, choose: Choose, remarks: Sequence[str] = ()) -> Plan:
    """A plan from a function that decides layer by layer; a layer that appears twice is decided once.

    Raises `PlanError` when an algorithm cannot serve a layer.
    """
    modules = dict(model.named_modules())
    placements, skipped = [], []
    for path, layer in modules.items():
        geometry = describe(layer)
        if geometry is None:
            continue
        around = [modules[name] for name in _above(path) if name in modules]
        algorithms = choose(path, layer, around, geometry)
        if not algorithms:
            skipped.append(path)
            continue
        placement = Placement(path, geometry, algorithms)
        try:
            _ = placement.parameters
        except ConfigError as error:
            raise PlanError(f"{path or 'the model itself'}, {geometry.kind} {geometry.shape}: {error}") from error
        placements.append(placement)
    return Plan(tuple(placements), tuple(skipped), tuple(remarks))


def block_classes(model: nn.Module) -> list[str]:
    """Class names of modules that have layers which adapters can serve, or are such layers."""
    names = set()
    modules = dict(model.named_modules())
    for path, layer in modules.items():
        if describe(layer) is not None:
            names |= {type(modules[name]).__name__ for name in (path, *_above(path)) if name in modules}
    return sorted(names)


def _above(path: str) -> list[str]:
    """Paths of the modules around one, nearest first, the root last."""
    parts = path.split(".") if path else []
    return [".".join(parts[:n]) for n in range(len(parts) - 1, -1, -1)]


def _why(model: nn.Module, rule: Rule) -> str:
    layers = {path: layer for path, layer in model.named_modules() if describe(layer) is not None}
    if not layers:
        return f"{type(model).__name__} has no layer that adapters can serve"
    classes = block_classes(model)
    if rule.inside != "*" and not any(fnmatch.fnmatchcase(name, rule.inside) for name in classes):
        close = nearest(rule.inside, classes)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return f"{hint}Classes with such layers in {type(model).__name__}: {', '.join(classes)}"
    wanted = rule.path.pattern if isinstance(rule.path, re.Pattern) else rule.path
    close = nearest(wanted, layers) or sorted(layers)[:5]
    return f"earlier rules took the layers, or none fits. Paths like it in {type(model).__name__}: {', '.join(close)}"
