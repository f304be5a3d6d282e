"""The layers of a model under every naming that a file may use for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache

from torch import nn

from lycoris.errors import FileError, PlanError
from lycoris.files.dialects.base import Style, flatten
from lycoris.files.recognition import Fit, guess_models, score_fit
from lycoris.files.skeleton import load_skeleton, name_layers, translate_layers
from lycoris.layers.geometry import Geometry
from lycoris.layers.sites import ModelSites, class_name
from lycoris.models.families import ARCHITECTURES
from lycoris.models.families.family import Architecture
from lycoris.models.families.naming import DIFFUSERS_NAMING, Span

MIN_MATCH = 0.9
"""Share of the layers that a model of a known family has, by their names; one whose sizes fit too counts twice."""


@dataclass(frozen=True)
class NamedLayout:
    """The layers of a model in one naming, and what those names mean in all others.

    Immutable; `convert_to_naming` returns another. Names of all namings are linked through diffusers' names: see
    `lycoris.models.families.naming`.
    """

    model_name: str
    """What to call it in messages."""
    layers: Mapping[str, Geometry]
    """By dotted path."""
    architecture: Architecture | None = None
    """None: no known one, whose layers have one name each."""
    naming: str = DIFFUSERS_NAMING
    """Of the paths in `layers`."""
    diffusers_layers: Mapping[str, Geometry] = field(default_factory=dict)
    """The layers under diffusers' names."""
    _spans: dict[str, Mapping[str, Span]] = field(default_factory=dict, repr=False, compare=False)

    @classmethod
    def from_model(cls, model: nn.Module | ModelSites) -> NamedLayout:
        """Return the layout of a model, which may be on the meta device.

        The architecture is recognized by the names and sizes of its layers, and by its class where those fit several.
        """
        sites = ModelSites.of(model)
        return cls.from_layers(class_name(sites.model), sites.geometries)

    @classmethod
    def from_layers(cls, owner: str, layers: Mapping[str, Geometry]) -> NamedLayout:
        """Return the layout of a model from all its layers and the name of its class.

        Without an architecture when no known one has nearly all (`MIN_MATCH`) of these names: then its layers have one
        name each.
        """
        found = guess_models(layers)
        named = [each for each in found if owner in each.architecture.classes]
        return next(_fit_layouts(owner, layers, named or found), cls(owner, layers, diffusers_layers=layers))

    @classmethod
    def from_some_layers(cls, layers: Mapping[str, Geometry]) -> NamedLayout:
        """Return the layout of a model of which only some layers are known, such as those that have adapters.

        The rest is taken from the known model that fits best.

        Raises:
            FileError: The layers fit several architectures equally well.
        """
        found = guess_models(layers)
        if not found or score_fit(found[0]) < MIN_MATCH * len(layers):
            return cls("the model", layers, diffusers_layers=layers)
        best = found[0]
        tied = {
            each.architecture.name for each in found if (score_fit(each), each.share) == (score_fit(best), best.share)
        }
        if len(tied) > 1:
            raise FileError(
                f"these layers may be of {' or '.join(sorted(tied))}; say which model they are for (model=)"
            )
        if best.outline is not None:
            return cls.from_outline(best.architecture, best.outline).convert_to_naming(best.naming)
        return next(_fit_layouts("the model", layers, found[:1]), cls("the model", layers, diffusers_layers=layers))

    @classmethod
    def from_outline(cls, architecture: Architecture, outline: str) -> NamedLayout:
        """Return the layout of a known model, under diffusers' names.

        `outline` is a name in `architecture.outlines`. Cached.
        """
        return _load_layout(architecture.name, outline)

    @property
    def namings(self) -> tuple[str, ...]:
        """Namings that a file may use for this model, its own first.

        Just its own for a model of no known architecture.
        """
        others = () if self.architecture is None else (DIFFUSERS_NAMING, *self.architecture.namings)
        return (self.naming, *(name for name in others if name != self.naming))

    def find_spans(self, naming: str) -> Mapping[str, Span]:
        """Return every name of a naming that this model has layers for.

        Returns:
            Name → the layers of diffusers whose rows that module holds. Computed once for each naming.
        """
        if naming not in self._spans:
            if naming == DIFFUSERS_NAMING or self.architecture is None:
                self._spans[naming] = {path: Span((path,)) for path in self.diffusers_layers}
            else:
                self._spans[naming] = name_layers(self.diffusers_layers, self.architecture.namings[naming])
        return self._spans[naming]

    def map_written_names(self, naming: str, style: Style) -> dict[str, str]:
        """Return the names of a naming as a file writes them.

        A parameter that is itself called `weight` is listed under the path of its module too, since its last step reads
        as a tensor name there.

        Returns:
            Name as written → dotted name.

        Raises:
            FileError: Two names become the same with underscores.
        """
        names = self.layers if naming == self.naming else self.find_spans(naming)
        if style == "dotted":
            # Behind the name of a parameter that is called weight, that of a tensor is taken for one of a layer's.
            short = {name.removesuffix(".weight"): name for name in names if name.endswith(".weight")}
            return {**short, **{name: name for name in names}}
        found: dict[str, str] = {}
        for name in names:
            first = found.setdefault(flatten(name), name)
            if first != name:
                raise FileError(
                    f"{first} and {name} of {self.model_name} become the same name with underscores, and this format "
                    "cannot tell them apart; choose a dialect with dotted names"
                )
        return found

    @property
    def is_unet(self) -> bool:
        """Whether diffusers' pipelines call this component `unet`.

        False for a model of no known architecture.
        """
        return self.architecture is not None and "UNet2DConditionModel" in self.architecture.classes

    def count_parts(self, naming: str, name: str) -> int:
        """Return how many layers of diffusers a module holds.

        1 for a name that the naming does not have.
        """
        span = self.find_spans(naming).get(name)
        return 1 if span is None else len(span.parts)

    def convert_to_naming(self, naming: str) -> NamedLayout:
        """Return the same model in another naming.

        Layers that a module of that naming holds together become one. Returns itself for its own naming, and for a
        model of no known architecture.

        Raises:
            FileError: A fused module holds a layer whose size is not known.
        """
        if naming == self.naming or self.architecture is None:
            return self
        layers = {name: self.fuse_parts(span) for name, span in self.find_spans(naming).items()}
        return replace(self, layers=layers, naming=naming)

    def fuse_parts(self, span: Span) -> Geometry:
        """Return the geometry of the layer that holds the rows of all parts of a span.

        It has a bias if any part has one.

        Raises:
            FileError: A part is not among the known layers.
        """
        lacking = [part for part in span.parts if part not in self.diffusers_layers]
        if lacking:
            raise FileError(
                f"{span.parts[0]} and {', '.join(lacking)} are one module in that naming, and the size of the latter "
                "is not known from the layers that have adapters: give the model that they are for"
            )
        parts = [self.diffusers_layers[part] for part in span.parts]
        if len(parts) == 1:
            return parts[0]
        rows = sum(part.out_features for part in parts)
        return replace(parts[0], shape=(rows, *parts[0].shape[1:]), has_bias=any(part.has_bias for part in parts))


def _fit_layouts(owner: str, layers: Mapping[str, Geometry], found: Sequence[Fit]) -> Iterator[NamedLayout]:
    """The layers as those of each known model that has nearly all of their names, and whose rules they can follow.

    A model may have the names of a family and other sizes: then a module there is not the rows of several in diffusers.
    """
    for fit in found:
        if score_fit(fit) < MIN_MATCH * len(layers):
            return
        middle = layers
        if fit.naming != DIFFUSERS_NAMING:
            try:
                middle = translate_layers(layers, fit.architecture.namings[fit.naming])
            except PlanError:
                continue
        yield NamedLayout(owner, layers, fit.architecture, fit.naming, middle)


@lru_cache(maxsize=64)
def _load_layout(architecture: str, outline: str) -> NamedLayout:
    layers = load_skeleton(outline)
    return NamedLayout(outline, layers, ARCHITECTURES[architecture], DIFFUSERS_NAMING, layers)
