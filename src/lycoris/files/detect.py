"""Detect what an adapter file is, from its header alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from lycoris.adapters.load_report import some
from lycoris.errors import FileError, prefix_errors
from lycoris.files import base_model, foreign
from lycoris.files.choosing import DialectRating, rate_dialect
from lycoris.files.container.storage import load_shapes
from lycoris.files.dialects import DIALECTS, wrappers
from lycoris.files.dialects.base import Dialect, Key
from lycoris.files.dialects.components import find_family, find_header_family, make_component_lookup
from lycoris.files.foreign import TensorShape
from lycoris.files.layer_tensors import count_algorithms, infer_layer_size
from lycoris.files.peft.config import find_weights
from lycoris.files.recognition import Fit, LayerSize, find_candidates
from lycoris.models.families import ARCHITECTURES
from lycoris.models.families.family import Family
from lycoris.models.families.naming import DIFFUSERS_NAMING

Confidence = Literal["certain", "likely", "unsure"]


@dataclass(frozen=True)
class Detection:
    """What a file is, and how that was decided. `str` gives a summary in lines.

    Algorithms and components are counted in layers. `fits`, `models`, `variants` and `candidates` say which known
    models have them.
    """

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
        """Component → the known model that it most likely belongs to.

        Components that fit no known model are left out.
        """
        return {component: str(own[0].outline) for component, own in self.fits.items() if own}

    def variants(self, component: str = "") -> str:
        """Return the known models that a component fits equally well, joined by " or ".

        "" if it fits none.
        """
        own = self.fits.get(component)
        return " or ".join(base_model.list_equal_fits(own)) if own else ""

    @property
    def candidates(self) -> tuple[str, ...]:
        """Known models that have all layers of the denoiser, the likeliest first.

        Names as in `lycoris plan`.
        """
        return tuple(str(each.outline) for each in self.fits.get("", ()))

    @property
    def naming(self) -> str:
        """The naming of the denoiser's layers: "diffusers", or one of its architecture's.

        "diffusers" if it fits no known model.
        """
        own = self.fits.get("")
        return own[0].naming if own else DIFFUSERS_NAMING

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
    """Detect the format, algorithms and base model of a safetensors file or a PEFT folder.

    Only the header is read. (A pickle has none, so it is loaded, without running code.)

    Raises:
        FileError: The file is damaged or has no adapters. If it is a known file of another kind, such as a checkpoint
            or an embedding, the message says which.
    """
    shapes, metadata = load_shapes(find_weights(Path(path)) if Path(path).is_dir() else path)
    with prefix_errors(path):
        return judge(shapes, metadata)


def judge(
    shapes: Mapping[str, TensorShape], metadata: Mapping[str, str], family: Family | None = None, *, settle: bool = True
) -> Detection:
    """Detect what tensors are from their names and shapes; see `detect`.

    Args:
        shapes: By name in the file.
        metadata: The file's header.
        family: The family, if the caller knows it; None: that of the header, or of the layers.
        settle: Whether to try names without wrappers and outer steps for layers that no known model has.

    Raises:
        FileError: None of the tensors is of an adapter.
    """
    if what := foreign.explain_no_adapter(shapes):
        raise FileError(what)
    shapes, aside = foreign.split_foreign(shapes)
    wrapped = wrappers.find_renames(shapes, wrappers.strip_wrappers)
    found = _judge_dialects(shapes, metadata, family)
    if found is None or not _is_explained(found):
        if what := foreign.explain_kind(shapes, readable=found is None):
            raise FileError(what)
        renamed = wrappers.find_renames(shapes, wrappers.strip_surroundings) if settle else {}
        others = {renamed.get(name, name): shape for name, shape in shapes.items()}
        again = _judge_dialects(others, metadata, family) if renamed else None
        if again is not None and (found is None or _measure_explained(again) > _measure_explained(found)):
            found = replace(again, renamed=renamed, remarks=(*again.remarks, wrappers.describe_renames(renamed)))
    if found is not None and wrapped and not found.renamed:
        found = replace(found, renamed=wrapped, remarks=(*found.remarks, wrappers.describe_renames(wrapped)))
    if found is None:
        raise FileError(f"none of its {len(shapes)} keys is of an adapter: {some(shapes)}")
    plain = [name for name in found.strange if foreign.is_foreign(name)]
    remark = f"{len(plain)} tensors belong to no adapter: {some(plain)}" if plain else ""
    strange = tuple(name for name in found.strange if name not in plain)
    return replace(found, strange=strange, remarks=(*found.remarks, *filter(None, (aside, remark))))


def _measure_explained(found: Detection) -> tuple[int, int, int]:
    """How much of a file is known: layers that known models have and have not, and tensors of the dialect."""
    named = sum(fits[0].named for fits in found.fits.values() if fits)
    return named, named - sum(found.components.values()), -len(found.strange)


def _is_explained(found: Detection) -> bool:
    named = [fits[0].named if fits else 0 for fits in found.fits.values()]
    return not found.strange and named == [*found.components.values()]


def _judge_dialects(
    shapes: Mapping[str, TensorShape], metadata: Mapping[str, str], family: Family | None
) -> Detection | None:
    """The same of tensors under their own names; None where no dialect has any."""
    fitting = _FitCache()
    readings = [_read_dialect(dialect, shapes, metadata, family, fitting) for dialect in DIALECTS.values()]
    best = max((each for each in readings if each.layers), key=lambda each: each.standing, default=None)
    if best is None:
        return None
    decided = [*best.decided] or list(shapes)
    return Detection(
        dialect=best.dialect.name,
        algorithms=count_algorithms(best.tensors.values()),
        family=best.family.name if best.family is not None else None,
        fits={component: tuple(_list_fits(best, component)) for component in best.layers},
        components={name: len(layers) for name, layers in best.layers.items()},
        confidence=_judge_confidence(best),
        judged_by=tuple(decided[:5]),
        strange=tuple(best.strange),
        remarks=(best.remark,) if best.remark else (),
    )


@dataclass
class _DialectReading:
    """A file as one dialect has it."""

    dialect: Dialect
    layers: dict[str, dict[str, LayerSize]]
    """Component → layer as written → the size of its weight as far as its tensors tell, (O, I·ΠK); 0 for unknown."""
    tensors: dict[tuple[str, str], dict[str, TensorShape]]
    candidates: list[Fit]
    others: dict[str, list[Fit]]
    """Other components → known models that have their layers."""
    family: Family | None
    remark: str
    strange: list[str]
    decided: list[str]
    standing: DialectRating
    foreign: bool
    """Whether the header names a base of no known family."""


class _FitCache:
    """The known models that have some layers; most formats part a file alike, and it is asked once."""

    def __init__(self) -> None:
        self._found: dict[tuple[bool, frozenset[tuple[str, LayerSize]]], list[Fit]] = {}

    def candidates(self, layers: Mapping[str, LayerSize], dialect: Dialect) -> list[Fit]:
        """The likeliest first, each in the naming that is the usual one of a format if that fits as well as others."""
        key = dialect.style == "flat", frozenset(layers.items())
        if key not in self._found:
            self._found[key] = find_candidates(layers, key[0])
        found: dict[str | None, Fit] = {}
        for each in sorted(self._found[key], key=lambda each: _rank_candidate(each, dialect)):
            found.setdefault(each.outline, each)
        return [*found.values()]


def _read_dialect(
    dialect: Dialect,
    shapes: Mapping[str, TensorShape],
    metadata: Mapping[str, str],
    known: Family | None,
    fits: _FitCache,
) -> _DialectReading:
    keys = {name: dialect.split(name) for name in shapes}
    parted = {name: key for name, key in keys.items() if key is not None}
    denoiser = _group_by_component(parted, shapes, lambda key: key.component).get("", {})
    found = fits.candidates(denoiser, dialect)
    stated, foreign = known or find_header_family(metadata), "" if known else base_model.find_unknown_base(metadata)
    fitting = _filter_family(found, stated, "")
    family, remarks = stated, [] if known else [base_model.describe_disagreement(metadata)]
    if stated is None or (known is None and found and not fitting):
        family = find_family({"": found[0].architecture}) if found and not find_ambiguous(found) else None
    if known is None and stated is not None and found and not fitting:
        remarks.append(f"its header says {stated.name}, which has no such layers; the layers decide")
    if foreign:
        like = f"; its layers are like those of {family.name}" if family is not None else ""
        family = None
        remarks.append(f"its header says {foreign}, which is no known family{like}")
    own = base_model.narrow_by_header(fitting or found, metadata)
    if own:
        remarks.append(_describe_misfit(own[0], len(denoiser)))
    best = own[0] if own else None
    layers = _group_by_component(parted, shapes, make_component_lookup(family))
    others = {each: fits.candidates(those, dialect) for each, those in layers.items() if each}
    return _DialectReading(
        dialect=dialect,
        layers=layers,
        tensors=_group_by_layer(parted, shapes),
        candidates=own,
        others=others,
        family=family,
        remark="; ".join(filter(None, remarks)),
        strange=[name for name, key in keys.items() if key is None],
        decided=[name for name, key in parted.items() if not key.component],
        standing=rate_dialect(
            dialect,
            keys.values(),
            metadata,
            named=(best.named if best else 0) + sum(each[0].named for each in others.values() if each),
            naming=best.naming if best else DIFFUSERS_NAMING,
            architecture=best.architecture if best else None,
            likely=_rate_likelihood(best) if best else (0.0, -len(ARCHITECTURES)),
        ),
        foreign=bool(foreign),
    )


def _group_by_layer(
    keys: Mapping[str, Key], shapes: Mapping[str, TensorShape]
) -> dict[tuple[str, str], dict[str, TensorShape]]:
    found: dict[tuple[str, str], dict[str, TensorShape]] = {}
    for name, key in keys.items():
        found.setdefault((key.prefix, key.layer), {})[key.suffix] = shapes[name]
    return found


def _describe_misfit(best: Fit, layers: int) -> str:
    """What of some layers the model that they fit best does not have; "" where it has all of them."""
    found = []
    if best.named < layers:
        found.append(f"{layers - best.named} of its {layers} layers are none of {best.outline}'s")
    if best.shaped < best.named:
        found.append(f"{best.named - best.shaped} have other sizes than {best.outline}'s")
    return ", ".join(found)


def _filter_family(found: Iterable[Fit], family: Family | None, component: str) -> list[Fit]:
    """Those that are of a family's component."""
    wanted = None if family is None else family.components.get(component)
    return [each for each in found if each.architecture.name == wanted]


def _list_fits(reading: _DialectReading, component: str) -> list[Fit]:
    if component == "":
        return reading.candidates
    found = reading.others[component]
    return _filter_family(found, reading.family, component) or found


def _group_by_component(
    keys: Mapping[str, Key], shapes: Mapping[str, TensorShape], whose: Callable[[Key], str]
) -> dict[str, dict[str, LayerSize]]:
    tensors: dict[str, dict[str, dict[str, TensorShape]]] = {}
    for name, key in keys.items():
        component = whose(key)
        tensors.setdefault(component, {}).setdefault(key.layer, {})[key.suffix] = shapes[name]
    return {of: {layer: infer_layer_size(own) for layer, own in layers.items()} for of, layers in tensors.items()}


MIN_SHARE = 0.9
"""Share of a model's blocks from which on they tell that a file is for it: fewer may be some of any model's."""


def _rank_candidate(each: Fit, dialect: Dialect) -> tuple[float, bool, int, float, float]:
    """Smaller is likelier, of candidates that have all the layers.

    Of models of which a file has few blocks or equally many, the families in their order (the ones that most files are
    for come first), and of a family the model of which a file has most.
    """
    usual = each.naming == dialect.choose_naming(each.architecture)
    share, order = _rate_likelihood(each)
    return -share, not usual, -order, -each.share, -each.whole


def _rate_likelihood(each: Fit) -> tuple[float, int]:
    """The larger the likelier: the share if a file has most of a model, and the family's place in their order."""
    return each.share if each.share >= MIN_SHARE else 0.0, -list(ARCHITECTURES).index(each.architecture.name)


def _judge_confidence(reading: _DialectReading) -> Confidence:
    if reading.strange or reading.foreign or not reading.candidates or find_ambiguous(reading.candidates):
        return "unsure"
    best = reading.candidates[0]
    if not best.named == best.shaped == len(reading.layers.get("", {})):
        return "unsure"
    only = all(each.architecture is best.architecture for each in reading.candidates)
    return "certain" if only else "likely"


def find_ambiguous(found: Sequence[Fit]) -> list[Fit]:
    """Return fits of other architectures that a file matches as well as the first.

    `found` are models that have all layers of the file, the likeliest first. Empty when the file has adapters for all
    blocks of the first model, unless others share that too.
    """
    return [
        each
        for each in found
        if each.architecture is not found[0].architecture and (found[0].share < 1 or each.share == found[0].share)
    ]
