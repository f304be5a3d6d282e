"""The layers of a model as a file may call them, in any of the namings of its family."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from torch import nn

from lycoris.errors import FileError, PlanError
from lycoris.files.dialects.base import Style, flatten
from lycoris.files.recognition import Fit, guess, weight
from lycoris.files.skeleton import name_layers, skeleton, translate
from lycoris.layers.geometry import Geometry
from lycoris.layers.sites import ModelSites, class_name
from lycoris.models.families import ARCHITECTURES
from lycoris.models.families.family import Architecture
from lycoris.models.families.naming import DIFFUSERS as MIDDLE
from lycoris.models.families.naming import Span

LEAST = 0.9
"""Share of the layers that a model of a known family has, by their names; one whose sizes fit too counts twice."""


@dataclass(frozen=True)
class Layout:
    """Layers by name, in one naming, and what those names stand for in all others."""

    owner: str
    """What to call it in messages."""
    layers: Mapping[str, Geometry]
    """By dotted path."""
    architecture: Architecture | None = None
    """None: no known one, whose layers have one name each."""
    naming: str = MIDDLE
    """Of the paths in `layers`."""
    middle: Mapping[str, Geometry] = field(default_factory=dict)
    """The layers under diffusers' names."""
    _spans: dict[str, Mapping[str, Span]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def of(cls, model: nn.Module | ModelSites) -> Layout:
        """Of a model; one on the meta device serves."""
        sites = ModelSites.of(model)
        return cls.all_of(class_name(sites.model), sites.geometries)

    @classmethod
    def all_of(cls, owner: str, layers: Mapping[str, Geometry]) -> Layout:
        """Of all layers of a model of that class."""
        found = guess(layers)
        named = [each for each in found if owner in each.architecture.classes]
        return next(_fitting(owner, layers, named or found), cls(owner, layers, middle=layers))

    @classmethod
    def around(cls, layers: Mapping[str, Geometry]) -> Layout:
        """Of some layers of a model, such as those that have adapters; the rest is taken from a known model.

        Raises `FileError` when the layers may be of several architectures.
        """
        found = guess(layers)
        if not found or weight(found[0]) < LEAST * len(layers):
            return cls("the model", layers, middle=layers)
        best = found[0]
        tied = {each.architecture.name for each in found if (weight(each), each.share) == (weight(best), best.share)}
        if len(tied) > 1:
            raise FileError(
                f"these layers may be of {' or '.join(sorted(tied))}; say which model they are for (model=)"
            )
        if best.outline is not None:
            return cls.from_outline(best.architecture, best.outline).in_naming(best.naming)
        return next(_fitting("the model", layers, found[:1]), cls("the model", layers, middle=layers))

    @classmethod
    def from_outline(cls, architecture: Architecture, outline: str) -> Layout:
        """Of a model whose outline comes with this package, in diffusers' names."""
        return _load_layout(architecture.name, outline)

    @property
    def namings(self) -> tuple[str, ...]:
        """Those that a file may use for this model, its own first."""
        others = () if self.architecture is None else (MIDDLE, *self.architecture.namings)
        return (self.naming, *(name for name in others if name != self.naming))

    def spans(self, naming: str) -> Mapping[str, Span]:
        """Every name of a naming that this model has layers for."""
        if naming not in self._spans:
            if naming == MIDDLE or self.architecture is None:
                self._spans[naming] = {path: Span((path,)) for path in self.middle}
            else:
                self._spans[naming] = name_layers(self.middle, self.architecture.namings[naming])
        return self._spans[naming]

    def written_names(self, naming: str, style: Style) -> dict[str, str]:
        """Names of a naming, as a file writes them → dotted. Raises `FileError` when two are written alike."""
        names = self.layers if naming == self.naming else self.spans(naming)
        if style == "dotted":
            # Behind the name of a parameter that is called weight, that of a tensor is taken for one of a layer's.
            short = {name.removesuffix(".weight"): name for name in names if name.endswith(".weight")}
            return {**short, **{name: name for name in names}}
        found: dict[str, str] = {}
        for name in names:
            first = found.setdefault(flatten(name), name)
            if first != name:
                raise FileError(
                    f"{first} and {name} of {self.owner} have the same name with underscores; this format cannot tell "
                    "which of them is meant"
                )
        return found

    @property
    def unet(self) -> bool:
        """Whether pipelines of diffusers call this component unet."""
        return self.architecture is not None and "UNet2DConditionModel" in self.architecture.classes

    def parts(self, naming: str, name: str) -> int:
        """How many layers of diffusers a name of a naming holds."""
        span = self.spans(naming).get(name)
        return 1 if span is None else len(span.parts)

    def in_naming(self, naming: str) -> Layout:
        """The same model in another naming; layers that a name there holds together become one."""
        if naming == self.naming or self.architecture is None:
            return self
        layers = {name: self.whole(span) for name, span in self.spans(naming).items()}
        return replace(self, layers=layers, naming=naming)

    def whole(self, span: Span) -> Geometry:
        """The layer that holds the rows of all parts of a span."""
        lacking = [part for part in span.parts if part not in self.middle]
        if lacking:
            raise FileError(
                f"{span.parts[0]} and {', '.join(lacking)} are one module in that naming, and the size of the latter "
                "is not known from the layers that have adapters: give the model that they are for"
            )
        parts = [self.middle[part] for part in span.parts]
        if len(parts) == 1:
            return parts[0]
        rows = sum(part.out_features for part in parts)
        return replace(parts[0], shape=(rows, *parts[0].shape[1:]), has_bias=any(part.has_bias for part in parts))


def _fitting(owner: str, layers: Mapping[str, Geometry], found: Sequence[Fit]) -> Iterator[Layout]:
    """The layers as those of each known model that has nearly all of their names, and whose rules they can follow.

    A model may have the names of a family and other sizes: then a module there is not the rows of several in diffusers.
    """
    for fit in found:
        if weight(fit) < LEAST * len(layers):
            return
        middle = layers
        if fit.naming != MIDDLE:
            try:
                middle = translate(layers, fit.architecture.namings[fit.naming])
            except PlanError:
                continue
        yield Layout(owner, layers, fit.architecture, fit.naming, middle)


@lru_cache(maxsize=64)
def _load_layout(architecture: str, outline: str) -> Layout:
    layers = skeleton(outline)
    return Layout(outline, layers, ARCHITECTURES[architecture], MIDDLE, layers)
