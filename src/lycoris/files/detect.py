"""What an adapter file is, from its header alone."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lycoris.adapters.load_report import some
from lycoris.algorithms import OFT, Replace
from lycoris.algorithms.tensors import ALPHA, MAGNITUDE, find_layer_size, match_algorithms
from lycoris.errors import FileError, prefix_errors
from lycoris.files import base_model, foreign
from lycoris.files.choosing import Standing, standing
from lycoris.files.container.storage import load_shapes
from lycoris.files.dialects import DIALECTS, wrappers
from lycoris.files.dialects.base import Dialect, Key
from lycoris.files.dialects.components import component_of, family_in, family_of
from lycoris.files.dialects.suffixes import MAGNITUDE_VECTOR
from lycoris.files.peft.config import weights_in
from lycoris.files.recognition import Fit, Size, candidates
from lycoris.models.families import ARCHITECTURES
from lycoris.models.families.family import Family
from lycoris.models.families.naming import DIFFUSERS as MIDDLE

Confidence = Literal["certain", "likely", "unsure"]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Detection:
    """What a file is, and by what it was told. `str` tells it in lines."""

    dialect: str
    algorithms: Mapping[str, int]
    """Algorithm → layers."""
    family: str | None
    """None: of no known family, or of several that its layers do not tell apart."""
    fits: Mapping[str, tuple[Fit, ...]]
    """Component → known models that have its layers by name and size, the likeliest first."""
    components: Mapping[str, int]
    """Component → layers."""
    confidence: Confidence
    judged_by: tuple[str, ...]
    """Some of the keys that decided."""
    strange: tuple[str, ...] = ()
    """Keys that are not of this dialect."""
    remarks: tuple[str, ...] = ()
    renamed: Mapping[str, str] = field(default_factory=dict)
    """Name in the file → the one by which it is of this dialect and of a known model."""

    @property
    def models(self) -> dict[str, str]:
        """Component → the known model that it is likeliest for."""
        return {component: str(own[0].outline) for component, own in self.fits.items() if own}

    def variants(self, component: str = "") -> str:
        """The known models that a component may be for equally well, in words; "" for none."""
        own = self.fits.get(component)
        return " or ".join(base_model.variants(own)) if own else ""

    @property
    def candidates(self) -> tuple[str, ...]:
        """Models that have all the denoiser's layers, the likeliest first."""
        return tuple(str(each.outline) for each in self.fits.get("", ()))

    @property
    def naming(self) -> str:
        """Whose names of layers the denoiser has."""
        own = self.fits.get("")
        return own[0].naming if own else MIDDLE

    def __str__(self) -> str:
        kinds = ", ".join(f"{count} layers of {name}" for name, count in self.algorithms.items())
        parts = ", ".join(f"{name or 'denoiser'} ({count})" for name, count in self.components.items())
        models = ", ".join(filter(None, map(self.variants, self.fits))) or "no known model"
        lines = [
            f"format      {self.dialect}, layers named as in {self.naming}",
            f"algorithms  {kinds or 'none known'}",
            f"for         {self.family or 'no known family'} ({models}); {self.confidence}",
            f"components  {parts}",
            f"judged by   {some(self.judged_by)}",
        ]
        others = [each for each in self.candidates if each not in self.variants().split(" or ")]
        if others:
            lines.insert(3, f"            fits too, and less completely or as well: {', '.join(others)}")
        if self.strange:
            lines.append(f"unknown     {some(self.strange)}")
        lines += [f"remark      {remark}" for remark in self.remarks]
        return "\n".join(lines)


def detect(path: str | os.PathLike[str]) -> Detection:
    """What a safetensors file or a folder of PEFT's is. Raises `FileError` when it is damaged or has no adapters."""
    shapes, metadata = load_shapes(weights_in(Path(path)) if Path(path).is_dir() else path)
    with prefix_errors(path):
        return judge(shapes, metadata)


def judge(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str], family: Family | None = None, *, settle: bool = True
) -> Detection:
    """The same from names and shapes; of a `family`, if the caller knows it.

    `settle` allows other names for those that no known model has, without what stands before and behind them.
    """
    if what := foreign.whole(shapes):
        raise FileError(what)
    shapes, aside = foreign.split_foreign(shapes)
    wrapped = wrappers.find_renames(shapes, wrappers.without_wrappers)
    found = _judge_dialects(shapes, metadata, family)
    if found is None or not _is_explained(found):
        if what := foreign.kind_of(shapes, readable=found is None):
            raise FileError(what)
        renamed = wrappers.find_renames(shapes, wrappers.plainer) if settle else {}
        others = {renamed.get(name, name): shape for name, shape in shapes.items()}
        again = _judge_dialects(others, metadata, family) if renamed else None
        if again is not None and (found is None or _count_explained(again) > _count_explained(found)):
            found = replace(again, renamed=renamed, remarks=(*again.remarks, wrappers.describe_renames(renamed)))
    if found is not None and wrapped and not found.renamed:
        found = replace(found, renamed=wrapped, remarks=(*found.remarks, wrappers.describe_renames(wrapped)))
    if found is None:
        raise FileError(f"none of its {len(shapes)} keys is of an adapter: {some(shapes)}")
    plain = [name for name in found.strange if foreign.is_plain(name)]
    told = f"{len(plain)} tensors are no adapter's: {some(plain)}" if plain else ""
    strange = tuple(name for name in found.strange if name not in plain)
    return replace(found, strange=strange, remarks=(*found.remarks, *filter(None, (aside, told))))


def _count_explained(found: Detection) -> tuple[int, int, int]:
    """How much of a file is known: layers that known models have and have not, and tensors of the dialect."""
    named = sum(fits[0].named for fits in found.fits.values() if fits)
    return named, named - sum(found.components.values()), -len(found.strange)


def _is_explained(found: Detection) -> bool:
    named = [fits[0].named if fits else 0 for fits in found.fits.values()]
    return not found.strange and named == [*found.components.values()]


def _judge_dialects(
    shapes: Mapping[str, Shape], metadata: Mapping[str, str], family: Family | None
) -> Detection | None:
    """The same of tensors under their own names; None where no dialect has any."""
    fitting = _Fitting()
    readings = [_reading(dialect, shapes, metadata, family, fitting) for dialect in DIALECTS.values()]
    best = max((each for each in readings if each.layers), key=lambda each: each.standing, default=None)
    if best is None:
        return None
    decided = [*best.decided] or list(shapes)
    return Detection(
        dialect=best.dialect.name,
        algorithms=_algorithms(best.tensors.values()),
        family=best.family.name if best.family is not None else None,
        fits={component: tuple(_fits(best, component)) for component in best.layers},
        components={name: len(layers) for name, layers in best.layers.items()},
        confidence=_confidence(best),
        judged_by=tuple(decided[:5]),
        strange=tuple(best.strange),
        remarks=(best.remark,) if best.remark else (),
    )


@dataclass
class _Reading:
    """A file as one dialect has it."""

    dialect: Dialect
    layers: dict[str, dict[str, Size]]
    """Component → layer as written → the size of its weight as far as its tensors tell, (O, I·ΠK); 0 for unknown."""
    tensors: dict[tuple[str, str], dict[str, Shape]]
    candidates: list[Fit]
    others: dict[str, list[Fit]]
    """Other components → known models that have their layers."""
    family: Family | None
    remark: str
    strange: list[str]
    decided: list[str]
    standing: Standing
    foreign: bool
    """Whether the header names a base of no known family."""


class _Fitting:
    """The known models that have some layers; most formats part a file alike, and it is asked once."""

    def __init__(self) -> None:
        self._found: dict[tuple[bool, frozenset[tuple[str, Size]]], list[Fit]] = {}

    def candidates(self, layers: Mapping[str, Size], dialect: Dialect) -> list[Fit]:
        """The likeliest first, each in the naming that is the usual one of a format if that fits as well as others."""
        key = dialect.style == "flat", frozenset(layers.items())
        if key not in self._found:
            self._found[key] = candidates(layers, key[0])
        found: dict[str | None, Fit] = {}
        for each in sorted(self._found[key], key=lambda each: _rank(each, dialect)):
            found.setdefault(each.outline, each)
        return [*found.values()]


def _reading(
    dialect: Dialect,
    shapes: Mapping[str, Shape],
    metadata: Mapping[str, str],
    known: Family | None,
    fits: _Fitting,
) -> _Reading:
    keys = {name: dialect.split(name) for name in shapes}
    parted = {name: key for name, key in keys.items() if key is not None}
    denoiser = _group_by_component(parted, shapes, lambda key: key.component).get("", {})
    found = fits.candidates(denoiser, dialect)
    told, foreign = known or family_in(metadata), "" if known else base_model.unknown_base(metadata)
    fitting = _only(found, told, "")
    family, remarks = told, [] if known else [base_model.disagreement(metadata)]
    if told is None or (known is None and found and not fitting):
        family = family_of({"": found[0].architecture}) if found and not ambiguous(found) else None
    if known is None and told is not None and found and not fitting:
        remarks.append(f"its header says {told.name}, which has no such layers; taken for what they are")
    if foreign:
        like = f"; its layers are like those of {family.name}" if family is not None else ""
        family = None
        remarks.append(f"its header says {foreign}, which is no known family{like}")
    own = base_model.narrow(fitting or found, metadata)
    if own:
        remarks.append(_misfit(own[0], len(denoiser)))
    best = own[0] if own else None
    layers = _group_by_component(parted, shapes, component_of(family))
    others = {each: fits.candidates(those, dialect) for each, those in layers.items() if each}
    return _Reading(
        dialect=dialect,
        layers=layers,
        tensors=_group_by_layer(parted, shapes),
        candidates=own,
        others=others,
        family=family,
        remark="; ".join(filter(None, remarks)),
        strange=[name for name, key in keys.items() if key is None],
        decided=[name for name, key in parted.items() if not key.component],
        standing=standing(
            dialect,
            keys.values(),
            metadata,
            named=(best.named if best else 0) + sum(each[0].named for each in others.values() if each),
            naming=best.naming if best else MIDDLE,
            architecture=best.architecture if best else None,
            likely=_likely(best) if best else (0.0, -len(ARCHITECTURES)),
        ),
        foreign=bool(foreign),
    )


def _group_by_layer(keys: Mapping[str, Key], shapes: Mapping[str, Shape]) -> dict[tuple[str, str], dict[str, Shape]]:
    found: dict[tuple[str, str], dict[str, Shape]] = {}
    for name, key in keys.items():
        found.setdefault((key.prefix, key.layer), {})[key.suffix] = shapes[name]
    return found


def _misfit(best: Fit, layers: int) -> str:
    """What of some layers the model that they fit best does not have; "" where it has all of them."""
    told = []
    if best.named < layers:
        told.append(f"{layers - best.named} of its {layers} layers are none of {best.outline}'s")
    if best.shaped < best.named:
        told.append(f"{best.named - best.shaped} have other sizes than {best.outline}'s")
    return ", ".join(told)


def _only(found: Iterable[Fit], family: Family | None, component: str) -> list[Fit]:
    """Those that are of a family's component."""
    wanted = None if family is None else family.components.get(component)
    return [each for each in found if each.architecture.name == wanted]


def _fits(reading: _Reading, component: str) -> list[Fit]:
    if component == "":
        return reading.candidates
    found = reading.others[component]
    return _only(found, reading.family, component) or found


def _group_by_component(
    keys: Mapping[str, Key], shapes: Mapping[str, Shape], whose: Callable[[Key], str]
) -> dict[str, dict[str, Size]]:
    tensors: dict[str, dict[str, dict[str, Shape]]] = {}
    for name, key in keys.items():
        component = whose(key)
        tensors.setdefault(component, {}).setdefault(key.layer, {})[key.suffix] = shapes[name]
    return {
        of: {layer: find_layer_size(_modernize(own)) for layer, own in layers.items()} for of, layers in tensors.items()
    }


def _modernize(shapes: Mapping[str, Shape]) -> Mapping[str, Shape]:
    """Old rotations have the shape of what generates them today."""
    return {OFT.tensor_names["blocks"] if suffix == "oft_diag" else suffix: shape for suffix, shape in shapes.items()}


MOST = 0.9
"""Share of a model's blocks from which on they tell that a file is for it: fewer may be some of any model's."""


def _rank(each: Fit, dialect: Dialect) -> tuple[float, bool, int, float, float]:
    """Smaller is likelier, of candidates that have all the layers.

    Of models of which a file has few blocks or equally many, the families in their order (the ones that most files are
    for come first), and of a family the model of which a file has most.
    """
    usual = each.naming == dialect.naming_for(each.architecture)
    share, order = _likely(each)
    return -share, not usual, -order, -each.share, -each.whole


def _likely(each: Fit) -> tuple[float, int]:
    """The larger the likelier: the share if a file has most of a model, and the family's place in their order."""
    return each.share if each.share >= MOST else 0.0, -list(ARCHITECTURES).index(each.architecture.name)


def _algorithms(layers: Iterable[Mapping[str, Shape]]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for own in layers:
        kind = _algorithm(
            _modernize({suffix: shape for suffix, shape in own.items() if suffix not in {ALPHA, *LENGTHS}})
        )
        counts[f"dora over {kind}" if own.keys() & LENGTHS else kind] += 1
    return dict(counts)


def _algorithm(tensors: Mapping[str, Shape]) -> str:
    """The algorithm of a layer's tensors; what changes or replaces the bias beside it counts as part of it."""
    plain = {suffix: shape for suffix, shape in tensors.items() if suffix not in BIASES} or tensors
    if plain.keys() <= WHOLE:
        return Replace.name if plain else "other"
    return next((each.name for each in match_algorithms(plain)), "other")


LENGTHS = frozenset({MAGNITUDE, MAGNITUDE_VECTOR})
BIASES = frozenset({"diff_b", "bias", "lora_up.bias", Replace.tensor_names["b"]})
WHOLE = frozenset({"weight", "bias", "scale", *Replace.tensor_names.values()})
"""Tensors that stand in place of a layer's own, when there are no others; IA³ has one more."""


def _confidence(reading: _Reading) -> Confidence:
    if reading.strange or reading.foreign or not reading.candidates or ambiguous(reading.candidates):
        return "unsure"
    best = reading.candidates[0]
    if not best.named == best.shaped == len(reading.layers.get("", {})):
        return "unsure"
    only = all(each.architecture is best.architecture for each in reading.candidates)
    return "certain" if only else "likely"


def ambiguous(found: Sequence[Fit]) -> list[Fit]:
    """Of models that have all layers of a file, those of another architecture that it may be for as well as the first.

    None when all blocks of the first have adapters, and the others would have more.
    """
    return [
        each
        for each in found
        if each.architecture is not found[0].architecture and (found[0].share < 1 or each.share == found[0].share)
    ]
