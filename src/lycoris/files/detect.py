"""What an adapter file is, from its header alone."""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

from lycoris.algorithms import ALGORITHMS
from lycoris.errors import FileError
from lycoris.files.components import component_of, family_in, family_of
from lycoris.files.dialect import Dialect, Key, flatten
from lycoris.files.dialects import DIALECTS
from lycoris.files.families import ARCHITECTURES, FAMILIES
from lycoris.files.family import Architecture, Family
from lycoris.files.headers import header
from lycoris.files.layout import Layout
from lycoris.files.naming import DIFFUSERS as MIDDLE
from lycoris.report import some

Confidence = Literal["certain", "likely", "unsure"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Candidate:
    """A model that layers may be of."""

    architecture: Architecture
    naming: str
    outline: str
    named: int
    """Layers whose names it has."""
    shaped: int
    """Of those, the ones whose adapters also have its layers' sizes."""
    share: float
    """How much of what this model has of such layers there is: adapters are mostly on all blocks or on none."""
    whole: float
    """How much of all its layers there is."""


@dataclass(frozen=True)
class Detection:
    """What a file is, and by what it was told. `str` tells it in lines."""

    dialect: str
    algorithms: Mapping[str, int]
    """Algorithm → layers."""
    family: str | None
    """None: of no known family, or of several that its layers do not tell apart."""
    models: Mapping[str, str]
    """Component → known model whose layers its names and sizes fit."""
    naming: str
    """Whose names of layers it has."""
    confidence: Confidence
    judged_by: tuple[str, ...]
    """Some of the keys that decided."""
    candidates: tuple[str, ...] = ()
    """Models that fit the denoiser's layers equally well."""
    strange: tuple[str, ...] = ()
    """Keys that are not of this dialect."""
    components: Mapping[str, int] = field(default_factory=dict)
    """Component → layers."""

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} layers of {name}" for name, count in self.algorithms.items())
        parts = ", ".join(f"{name or 'denoiser'} ({count})" for name, count in self.components.items())
        models = ", ".join(self.models.values()) or "no known model"
        lines = [
            f"format      {self.dialect}, layers named as in {self.naming}",
            f"algorithms  {kinds or 'none known'}",
            f"for         {self.family or 'no known family'} ({models}); {self.confidence}",
            f"components  {parts}",
            f"judged by   {some(self.judged_by)}",
        ]
        if len(self.candidates) > 1:
            lines.insert(3, f"            fits too, and less completely or as well: {', '.join(self.candidates[1:])}")
        if self.strange:
            lines.append(f"unknown     {some(self.strange)}")
        return "\n".join(lines)


def detect(path: str | os.PathLike[str]) -> Detection:
    """What a safetensors file is. Raises `FileError` when it is damaged or holds no adapters."""
    found = header(path)
    try:
        return judge({name: info.shape for name, info in found.tensors.items()}, found.metadata)
    except FileError as error:
        raise FileError(f"{path}: {error}") from error


def judge(shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> Detection:
    """The same from names and shapes."""
    readings = [_reading(dialect, shapes, metadata) for dialect in DIALECTS.values()]
    best = max((each for each in readings if each.layers), key=_Reading.score, default=None)
    if best is None:
        raise FileError(f"none of its {len(shapes)} keys is of an adapter: {some(shapes)}")
    family, candidates = best.family, best.candidates
    models = {"": candidates[0].outline} if candidates else {}
    for component, layers in best.layers.items():
        if component and (fitting := candidates_for(layers, best.dialect.style == "flat")):
            models[component] = fitting[0].outline
    decided = [*best.decided] or list(shapes)
    return Detection(
        dialect=best.dialect.name,
        algorithms=_algorithms(best.suffixes),
        family=family.name if family is not None else None,
        models=models,
        naming=candidates[0].naming if candidates else MIDDLE,
        confidence=_confidence(best),
        judged_by=tuple(decided[:5]),
        candidates=tuple(each.outline for each in candidates),
        strange=tuple(best.strange),
        components={name: len(layers) for name, layers in best.layers.items()},
    )


@dataclass
class _Reading:
    """A file as one dialect has it."""

    dialect: Dialect
    layers: dict[str, dict[str, Shape]]
    """Component → layer as written → the size of its weight as far as its tensors tell, (O, I·ΠK); 0 for unknown."""
    suffixes: dict[tuple[str, str], set[str]]
    candidates: list[Candidate]
    family: Family | None
    strange: list[str]
    decided: list[str]
    marked: bool
    spelled: int
    """Tensors spelled as this dialect writes them."""

    def score(self) -> tuple[int, int, bool, bool, int]:
        best = self.candidates[0] if self.candidates else None
        named = best.named if best else 0
        usual = best is not None and best.naming == self.dialect.naming_for(best.architecture)
        return -len(self.strange), named, self.marked, usual, self.spelled


def _reading(dialect: Dialect, shapes: Mapping[str, Shape], metadata: Mapping[str, str]) -> _Reading:
    keys = {name: dialect.split(name) for name in shapes}
    parted = {name: key for name, key in keys.items() if key is not None}
    flat = dialect.style == "flat"
    denoiser = _grouped(parted, shapes, lambda key: key.component).get("", {})
    found = candidates_for(denoiser, flat) if denoiser else []
    candidates = sorted(found, key=lambda each: _rank(each, dialect))
    tied = [each for each in candidates if _rank(each, dialect) == _rank(candidates[0], dialect)]
    family = family_in(metadata) or _of(tied)
    layers = _grouped(parted, shapes, component_of(family))
    suffixes: dict[tuple[str, str], set[str]] = {}
    for key in parted.values():
        suffixes.setdefault((key.prefix, key.layer), set()).add(key.suffix)
    decided = [name for name, key in parted.items() if not key.component]
    spelled = sum(dialect.spelling.get(key.suffix, key.suffix) == key.spelled for key in parted.values())
    strange = [name for name, key in keys.items() if key is None]
    marked = any(mark in metadata for mark in dialect.marks)
    return _Reading(dialect, layers, suffixes, candidates, family, strange, decided, marked, spelled)


def _grouped(keys: Mapping[str, Key], shapes: Mapping[str, Shape], whose: object) -> dict[str, dict[str, Shape]]:
    tensors: dict[str, dict[str, dict[str, Shape]]] = {}
    for name, key in keys.items():
        component = whose(key)  # type: ignore[operator]
        tensors.setdefault(component, {}).setdefault(key.layer, {})[key.suffix] = shapes[name]
    return {of: {layer: size(own) for layer, own in layers.items()} for of, layers in tensors.items()}


def size(tensors: Mapping[str, Shape]) -> tuple[int, int]:
    """(O, I·ΠK) of the layer that some tensors of an adapter are for; 0 where they do not tell."""

    def at(suffix: str, axis: int) -> int:
        shape = tensors.get(suffix, ())
        return shape[axis] if len(shape) > axis else 0

    def columns(suffix: str) -> int:
        return math.prod(tensors[suffix][1:]) if len(tensors.get(suffix, ())) > 1 else 0

    if "lora_up.weight" in tensors:
        core = math.prod(tensors["lora_mid.weight"][2:]) if "lora_mid.weight" in tensors else 1
        return at("lora_up.weight", 0), columns("lora_down.weight") * core
    if "hada_w1_a" in tensors and "hada_t1" not in tensors:
        return at("hada_w1_a", 0), columns("hada_w1_b")
    if "diff" in tensors:
        return at("diff", 0), columns("diff")
    if "b1.weight" in tensors:
        return at("b1.weight", 0), columns("b2.weight")
    if "p_layer.weight" in tensors:
        return at("p_layer.weight", 0), columns("q_layer.weight")
    if "oft_blocks" in tensors:
        return (math.prod(tensors["oft_blocks"][-3:-1]), 0) if len(tensors["oft_blocks"]) > 2 else (0, 0)
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        ol, im = at("lokr_w1", 0) or at("lokr_w1_a", 0), at("lokr_w1", 1) or at("lokr_w1_b", 1)
        ok, inner = at("lokr_w2", 0) or at("lokr_w2_a", 0), columns("lokr_w2") or columns("lokr_w2_b")
        return (0, 0) if "lokr_t2" in tensors else (ol * ok, im * inner)
    return 0, 0


def candidates_for(layers: Mapping[str, Shape], flat: bool, among: Iterable[str] | None = None) -> list[Candidate]:
    """The known models whose layers have these names, best first; only those that fit as well as the best, the
    more complete ones first.

    `among` limits them to some architectures.
    """
    found: list[Candidate] = []
    for name, architecture in ARCHITECTURES.items():
        if among is not None and name not in among:
            continue
        for outline in architecture.outlines:
            layout = Layout.known(architecture, outline)
            own = [_fit(layout, naming, layers, flat, outline) for naming in layout.namings]
            found.append(max(own, key=lambda each: (each.named, each.shaped)))
    best = max(((each.named, each.shaped) for each in found), default=(0, 0))
    tied = [each for each in found if (each.named, each.shaped) == best and best[0] > 0]
    return sorted(tied, key=lambda each: -each.share)


def _fit(layout: Layout, naming: str, layers: Mapping[str, Shape], flat: bool, outline: str) -> Candidate:
    assert layout.architecture is not None
    spans = layout.spans(naming)
    names = {flatten(name): name for name in spans} if flat else {name: name for name in spans}
    named = [layer for layer in layers if layer in names]
    shaped = 0
    for layer in named:
        geometry = layout.whole(spans[names[layer]])
        o, i = layers[layer]
        fits = len(geometry.shape) < 2 or (o in (0, geometry.out_features) and i in (0, geometry.fan_in))
        shaped += fits
    kinds = {_kind(layer) for layer in named}
    there = sum(_kind(name) in kinds for name in names)
    share, whole = len(named) / max(there, 1), len(named) / len(names)
    return Candidate(layout.architecture, naming, outline, len(named), shaped, share, whole)


def _kind(layer: str) -> str:
    """A name with a star for each number."""
    return re.sub(r"\d+", "*", layer)


def _rank(each: Candidate, dialect: Dialect) -> tuple[float, bool, float]:
    """Smaller is likelier, of candidates that have all the layers."""
    return -each.share, each.naming != dialect.naming_for(each.architecture), -each.whole


def _of(tied: list[Candidate]) -> Family | None:
    families = {family.name: family for each in tied if (family := family_of({"": each.architecture}))}
    return next(iter(families.values())) if len(families) == 1 else None


def _algorithms(suffixes: Mapping[tuple[str, str], set[str]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for own in suffixes.values():
        plain = own - {"alpha", "dora_scale", "lora_magnitude_vector"}
        kind = next((each.name for each in ALGORITHMS.values() if plain and plain <= set(each.keys.values())), "other")
        counts[f"dora over {kind}" if plain != own - {"alpha"} else kind] += 1
    return dict(counts)


def _confidence(reading: _Reading) -> Confidence:
    if reading.strange or not reading.candidates:
        return "unsure"
    best, layers = reading.candidates[0], reading.layers.get("", {})
    whole = best.named == best.shaped == len(layers)
    # Of as complete a model: others have such layers too, and more of them.
    rank = _rank(best, reading.dialect)
    tied = {each.architecture.name for each in reading.candidates if _rank(each, reading.dialect) == rank}
    only = len({each.architecture.name for each in reading.candidates}) == 1
    return "certain" if whole and only else "likely" if len(tied) == 1 else "unsure"


__all__ = ["FAMILIES", "Candidate", "Detection", "candidates_for", "detect", "judge", "size"]
