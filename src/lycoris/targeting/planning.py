"""Rules and a model make a plan: which layer gets what, decided and checked before anything is touched."""

from __future__ import annotations

import fnmatch
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

from torch import nn

from lycoris.algorithms.base import Algorithm
from lycoris.errors import ConfigError, PlanError, nearest, unknown
from lycoris.layers import paths
from lycoris.layers.geometry import Geometry, Kind
from lycoris.layers.sites import ModelSites, Site, class_name
from lycoris.layers.tied_parameters import find_shared_parameters, spells_out, tied_to
from lycoris.targeting.remarks import Remark

LAYERS_SHOWN = 3
USUAL = ("linear", "conv")
"""Kinds of layers that get adapters where nothing else is said."""

TIED = "left out, as merging would part them; name the layer to adapt it all the same"
TIED_NAMED = "adapted, as it was named; a merge will be refused unless it may untie them"

Unserved = Literal["error", "skip"]
"""What becomes of a layer that its algorithm cannot serve: an error, or the layer gets nothing and the plan says so."""

Choose = Callable[[str, nn.Module, Sequence[nn.Module], Geometry], "tuple[Algorithm, ...] | None"]
"""(path, layer, modules around it from the nearest out, geometry) → algorithms, lowest first; None: leave it alone."""

Names = Callable[[Site], bool]
"""Whether a layer was asked for by name, and not only as one of many."""


@dataclass(frozen=True)
class Rule:
    """What the layers that it matches get. All conditions must hold; `*` and `?` are wildcards.

    Example:
        >>> Rule(LoRA(rank=8), path="*.attn.*")  # every linear layer and convolution inside an `attn`
        >>> Rule((), path="*.norm*", kind="*")   # leave these alone
    """

    use: Algorithm | tuple[Algorithm, ...]
    """One algorithm, several stacked from the lowest up, or () to leave the layer alone."""
    path: str | re.Pattern[str] = "*"
    """The layer's dotted path as in `named_modules()`, as a glob, or a compiled expression that must match whole."""
    kind: str | tuple[str, ...] = USUAL
    """Kinds of layers: linear, conv, embedding, norm, or parameter (a bare matrix or stack of matrices that a module
    uses without a layer of its own, such as fused attention projections and experts). `*` is a wildcard."""
    inside: str = "*"
    """Class name of the layer itself or of a module around it."""

    def __post_init__(self) -> None:
        for algorithm in self.use if isinstance(self.use, tuple) else (self.use,):
            if not isinstance(algorithm, Algorithm):
                raise ConfigError(
                    f"a rule's `use` is an algorithm such as LoRA(rank=8), a tuple of them from the lowest up, or () "
                    f"to leave layers alone, not {_describe_value(self.use)}"
                )
        if not isinstance(self.path, str | re.Pattern):
            raise ConfigError(f"a rule's `path` is a glob or a compiled expression, not {_describe_value(self.path)}")
        if not isinstance(self.inside, str):
            raise ConfigError(f"a rule's `inside` is the name of a class, not {_describe_value(self.inside)}")
        kinds = get_args(Kind)
        for wanted in self.kinds():
            if not isinstance(wanted, str) or not any(fnmatch.fnmatchcase(kind, wanted) for kind in kinds):
                raise ConfigError(unknown("kind of layer", str(wanted), kinds))

    def algorithms(self) -> tuple[Algorithm, ...]:
        return self.use if isinstance(self.use, tuple) else (self.use,)

    def kinds(self) -> tuple[str, ...]:
        return self.kind if isinstance(self.kind, tuple) else (self.kind,)

    def names(self, place: Site) -> bool:
        """Return whether this asks for a layer by the last part of its path, or for an uncommon kind of layer by name.

        Such a layer gets an adapter even if it shares its weight with another module. Wildcards do not count as names.
        """
        wanted = self.path.pattern if isinstance(self.path, re.Pattern) else self.path
        by_kind = place.geometry.kind not in USUAL and place.geometry.kind in self.kinds()
        return by_kind or spells_out(wanted, place.path)

    def matches(self, path: str, chain: Sequence[nn.Module], geometry: Geometry) -> bool:
        if isinstance(self.path, re.Pattern):
            at_path = self.path.fullmatch(path) is not None
        else:
            at_path = fnmatch.fnmatchcase(path, self.path)
        return (
            at_path
            and any(fnmatch.fnmatchcase(geometry.kind, kind) for kind in self.kinds())
            and any(fnmatch.fnmatchcase(type(module).__name__, self.inside) for module in chain)
        )


@dataclass(frozen=True)
class Placement:
    """One layer of a plan: where it is, what it is, and the algorithms it gets, from the lowest up.

    `path` is "" where the model itself is the layer.
    """

    path: str
    geometry: Geometry
    algorithms: tuple[Algorithm, ...]

    @property
    def parameters(self) -> int:
        """Number of trainable parameters: elements of all trained tensors."""
        slots = [slot for algorithm in self.algorithms for slot in algorithm.slots(self.geometry).values()]
        return sum(math.prod(self.geometry.stacked_shape(slot.shape)) for slot in slots if slot.trainable)


class LeftOut(NamedTuple):
    """A layer that was to get an adapter, and why it gets none.

    `path` is dotted; `why` begins with what the layer is.
    """

    path: str
    why: str


@dataclass(frozen=True)
class Plan:
    """Which layers of a model get which algorithms.

    A value: print it, compare it, pass it to `AdapterSet.build` or `explain`. It holds a reference to the model that
    it was made for; pickles and copies do not.
    """

    placements: tuple[Placement, ...]
    skipped: tuple[str, ...] = ()
    """Paths of linear layers and convolutions that get none."""
    remarks: tuple[Remark, ...] = field(default=())
    """What the user should know: options without effect or unknown, targets that no layer matches."""
    unserved: tuple[LeftOut, ...] = ()
    """Layers that were to get an algorithm which cannot serve them, and get nothing, as `unserved="skip"` asks."""
    sites: ModelSites | None = field(default=None, compare=False, repr=False)
    """The model that was planned for, with its layers. A pickled or copied plan comes without; see `sites_in`."""

    @property
    def parameters(self) -> int:
        return sum(placement.parameters for placement in self.placements)

    def sites_in(self, model: nn.Module) -> ModelSites:
        """Return the sites of the model that adapters are about to be built on.

        Those of the plan itself where it was made for this model and no module of it was replaced since; otherwise the
        model is searched again, so that a plan from a model on the meta device serves the one with weights.

        Raises:
            PlanError: The model lacks layers of this plan, or has them in other shapes.
        """
        if self.sites is not None and self.sites.model is model and self.sites.are_current():
            return self.sites
        found = ModelSites(model)
        wrong = [each for each in self.placements if found.geometries.get(each.path) != each.geometry]
        if wrong:
            path, planned = wrong[0].path, wrong[0].geometry
            here = f"a {found[path].geometry} here" if path in found else f"no layer of this {class_name(model)}"
            made_for = "" if self.sites is None else f", made for a {class_name(self.sites.model)},"
            raise PlanError(
                f"this plan{made_for} does not fit: {path or 'the model itself'}, a {planned} in the plan, is {here} "
                f"({len(wrong)} of {len(self.placements)} layers). Make the plan for the model that you build on"
            )
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "sites": None}

    def __str__(self) -> str:
        groups: Counter[tuple[str, str]] = Counter()
        sizes: Counter[tuple[str, str]] = Counter()
        for placement in self.placements:
            key: tuple[str, str] = (" + ".join(map(str, placement.algorithms)), placement.geometry.kind)
            groups[key] += 1
            sizes[key] += placement.parameters
        lines = [
            f"{len(self.placements)} layers get adapters, {len(self.skipped)} do not; {self.parameters:,} parameters"
        ]
        lines += [
            f"  {count:5d} {kind:9s} {sizes[use, kind]:>12,}  {use}" for (use, kind), count in groups.most_common()
        ]
        if self.unserved:
            lines.append(f"  {len(self.unserved)} of those cannot be served by what they were to get:")
            lines += [f"    {where}" for where in _some_left_out(self.unserved)]
        return "\n".join(lines + [f"  note: {remark}" for remark in self.remarks])


def plan(
    model: nn.Module | ModelSites,
    rules: Rule | Sequence[Rule],
    *,
    strict: bool = True,
    unserved: Unserved = "error",
) -> Plan:
    """Match rules to the layers of a model; for each layer the first rule that matches wins.

    Raises `PlanError` for a rule that no layer falls to, naming near misses, for an algorithm that cannot serve a
    layer it was given (with `unserved="skip"` only if that leaves no layer; else such layers get nothing and
    `Plan.unserved` lists them) and, when `strict`, for settings that ask for more than a layer can use, such as a rank
    above what its weight can have; otherwise those become remarks.

    Layers that share a parameter with another module, as output layers do with embeddings, are left out with a remark
    unless a rule's `path` names the layer, or its `kind` an uncommon kind such as "embedding".
    """
    rules = [rules] if isinstance(rules, Rule) else list(rules) if isinstance(rules, Sequence) else rules
    if not isinstance(rules, list) or not rules or not all(isinstance(rule, Rule) for rule in rules):
        given = "an empty list" if rules == [] else _describe_value(rules)
        raise PlanError(f"a plan needs at least one rule, such as Rule(LoRA(rank=8)), not {given}")
    sites = ModelSites.of(model)
    used: Counter[int] = Counter()
    chosen: dict[str, Rule] = {}

    def choose(
        path: str, layer: nn.Module, around: Sequence[nn.Module], geometry: Geometry
    ) -> tuple[Algorithm, ...] | None:
        for at, rule in enumerate(rules):
            if rule.matches(path, [layer, *around], geometry):
                used[at] += 1
                chosen[path] = rule
                return rule.algorithms()
        return None

    made = assign_layers(
        sites, choose, strict=strict, names=lambda place: chosen[place.path].names(place), unserved=unserved
    )
    for at, rule in enumerate(rules):
        if not used[at]:
            raise PlanError(f"{rule} applies to no layer: {_explain_unused_rule(sites, rule)}")
    check_something_left(made)
    return made


def check_something_left(made: Plan) -> None:
    """Raise `PlanError` where every layer that was targeted shares its weight with another, and none is named."""
    tied = [remark for remark in made.remarks if remark.kind == "tied"]
    if tied and not made.placements:
        raise PlanError(f"no layer gets an adapter: {tied[0]}")


def assign_layers(
    model: nn.Module | ModelSites,
    choose: Choose,
    remarks: Sequence[Remark] = (),
    *,
    strict: bool = False,
    names: Names = lambda place: False,
    unserved: Unserved = "error",
) -> Plan:
    """A plan from a function that decides layer by layer; a layer that appears twice is decided once.

    A layer that shares a parameter with another module is left out, with a remark, unless `names` says that it was
    asked for by name: what it does cannot be merged without parting the two.

    Raises `PlanError` when an algorithm cannot serve a layer, unless `unserved` is "skip" and others can be served, and
    when `strict`, when its settings are wasted on one.
    """
    if unserved not in get_args(Unserved):
        raise ConfigError(unknown("value of unserved", str(unserved), get_args(Unserved)))
    sites = ModelSites.of(model)
    placements, skipped, wasted, tied, left_out = [], [], [], [], list[LeftOut]()
    shared = find_shared_parameters(sites.modules)
    for site in sites.values():
        path, layer, _, geometry = site
        algorithms = choose(path, layer, sites.around(path), geometry)
        if not algorithms:
            skipped += [path] if geometry.kind in USUAL else []
            continue
        where = f"{path or 'the model itself'}, {geometry}"
        if others := tied_to(site, shared):
            named = names(site)
            tied += [Remark(f"{where}: tied to {', '.join(others)}; {TIED_NAMED if named else TIED}", "tied")]
            if not named:
                skipped += [path] if geometry.kind in USUAL else []
                continue
        if why := _refusal(algorithms, geometry):
            if unserved == "error":
                raise PlanError(f'{where}: {why}. unserved="skip" leaves such layers out')
            left_out.append(LeftOut(path, f"{geometry}: {why}"))
            skipped += [path] if geometry.kind in USUAL else []
            continue
        waste = [each for algorithm in algorithms if (each := algorithm.find_excess(geometry))]
        if waste and strict:
            raise PlanError(f"{where}: {waste[0]}")
        wasted += [Remark(f"{where}: {each}") for each in waste]
        placements.append(Placement(path, geometry, algorithms))
    if left_out and not placements:
        raise PlanError("\n".join([f"none of {len(left_out)} layers can be served:", *_some_left_out(left_out)]))
    notes = (*remarks, *_shorten(tied), *_shorten(wasted))
    return Plan(tuple(placements), tuple(skipped), notes, tuple(left_out), sites)


def _refusal(algorithms: Sequence[Algorithm], geometry: Geometry) -> str:
    """Why one of these cannot serve a layer; "" when all can."""
    try:
        for algorithm in algorithms:
            algorithm.check(geometry)
    except ConfigError as error:
        return str(error)
    return ""


def _some_left_out(layers: Sequence[LeftOut]) -> list[str]:
    shown = [f"{path or 'the model itself'}, {why}" for path, why in layers[:LAYERS_SHOWN]]
    return [*shown, f"and {len(layers) - LAYERS_SHOWN} more"] if len(layers) > LAYERS_SHOWN else shown


def _shorten(remarks: list[Remark]) -> list[Remark]:
    """The first few of many remarks of the same sort."""
    if len(remarks) <= LAYERS_SHOWN:
        return remarks
    return [*remarks[:LAYERS_SHOWN], Remark(f"and {len(remarks) - LAYERS_SHOWN} more layers like these")]


def servable(model: nn.Module | ModelSites, kinds: Sequence[str] = USUAL) -> dict[str, Site]:
    """Return the layers of some kinds that adapters can serve, by path and in model order.

    Args:
        kinds: As `Rule.kind`; `*` in a kind is a wildcard.
    """
    return {
        path: site
        for path, site in ModelSites.of(model).items()
        if any(fnmatch.fnmatchcase(site.geometry.kind, kind) for kind in kinds)
    }


def block_classes(model: nn.Module | ModelSites, kinds: Sequence[str] = USUAL) -> list[str]:
    """Return the sorted class names of layers that adapters can serve, and of the modules around them.

    The class of the model itself is among them: these are the names that a rule's `inside` can match.
    """
    sites = ModelSites.of(model)
    chains = ((path, *paths.ancestors(path)) for path in servable(sites, kinds))
    return sorted({type(sites.modules[name]).__name__ for chain in chains for name in chain if name in sites.modules})


def _describe_value(given: Any) -> str:
    """A wrong value in words; a class where an instance belongs is the likeliest slip."""
    if isinstance(given, type):
        return f"the class {given.__name__}; did you mean {given.__name__}()?"
    return repr(given)


def _explain_unused_rule(sites: ModelSites, rule: Rule) -> str:
    layers, model = servable(sites, rule.kinds()), sites.model
    if not layers:
        have = sorted({geometry.kind for geometry in sites.geometries.values()})
        kinds = f" of kind {' or '.join(rule.kinds())}; it has {', '.join(have)}" if have else ""
        return f"{type(model).__name__} has no layer that adapters can serve{kinds}"
    classes = block_classes(sites, rule.kinds())
    if rule.inside != "*" and not any(fnmatch.fnmatchcase(name, rule.inside) for name in classes):
        close = nearest(rule.inside, classes)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        return f"{hint}Classes with such layers in {type(model).__name__}: {', '.join(classes)}"
    wanted = rule.path.pattern if isinstance(rule.path, re.Pattern) else rule.path
    close = nearest(wanted, layers) or sorted(layers)[:5]
    return f"earlier rules took the layers, or none fits. Paths like it in {type(model).__name__}: {', '.join(close)}"
