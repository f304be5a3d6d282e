"""A bundle as tensors by name, and as a file."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lycoris.adapters.bundle import Bundle
from lycoris.adapters.load_report import some
from lycoris.algorithms import DoRA, Full, LoRA, Replace, TLoRA
from lycoris.algorithms.base import Entry
from lycoris.algorithms.tensors import ALPHA, MAGNITUDE, write_tensors
from lycoris.errors import FileError, unknown
from lycoris.files import described, placing
from lycoris.files.container import format_version
from lycoris.files.container.storage import fitting, plain, save_tensors
from lycoris.files.container.target import check_target
from lycoris.files.dialects import DIALECTS, history
from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.components import FAMILY, family_of, prefix_of
from lycoris.files.dialects.suffixes import MAGNITUDE_VECTOR
from lycoris.files.layout import Layout
from lycoris.files.peft.config import LORA_METADATA
from lycoris.files.peft.writing import lora_adapter_metadata
from lycoris.models import fingerprint
from lycoris.models.families import FAMILIES
from lycoris.models.families.family import Family
from lycoris.ops.finite import is_finite
from lycoris.ops.rounding import widen

HASHES = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Header keys that are hashes of a file's tensors."""
STALE = (LORA_METADATA, history.SCALES, described.KEY, *HASHES)
"""Header keys that describe the tensors of the file that was read."""


class Encoded(NamedTuple):
    """What a file holds."""

    tensors: dict[str, Tensor]
    header: dict[str, str]
    notes: dict[str, str]
    """Layer → what its algorithm had to become."""


def compose(
    bundle: Bundle | Mapping[str, Bundle],
    dialect: str = "lycoris",
    *,
    component: str = "",
    prefix: str | Mapping[str, str] | None = None,
    model: nn.Module | Layout | Mapping[str, nn.Module | Layout] | None = None,
    family: str | None = None,
) -> Encoded:
    """The tensors of a bundle, or of one for each component of a pipeline, as a dialect names them.

    `prefix` stands in for the dialect's own, and then layers are called as in the bundle; of several bundles each has
    its own, by the same names, and "" is the denoiser's. Else they are called as the dialect does for the family of
    models: `model` is what the bundle is for, None: recognised by its layers; `family` matters where components are
    counted differently ("flux1": its second text encoder is the third of kohya's).

    Raises `FileError` when two tensors get one name, when a layer has algorithms that a file cannot hold together, or
    when the dialect or a fused layer cannot hold an algorithm.
    """
    if dialect not in DIALECTS:
        raise FileError(unknown("dialect", dialect, DIALECTS))
    if family is not None and family not in FAMILIES:
        raise FileError(unknown("family", family, FAMILIES))
    if DIALECTS[dialect].folder:
        raise FileError(f"{dialect} adapters are folders, not files: use lycoris.files.write_peft")
    kind, bundles = DIALECTS[dialect], bundle if isinstance(bundle, Mapping) else {component: bundle}
    models = model if isinstance(model, Mapping) else {component: model}
    found, owner = Encoded({}, {}, {}), dict[str, str]()
    own = dict.fromkeys(bundles, prefix) if isinstance(prefix, str) else prefix or {}
    # A prefix of one's own is for layers as they are called here.
    layouts = {name: _layout(each, kind, models.get(name)) for name, each in bundles.items() if not own}
    whose = FAMILIES[family] if family else family_of({name: each.architecture for name, each in layouts.items()})
    by_prefix: dict[str, Bundle] = {}
    for name, each in bundles.items():
        stacks = _name_stacks(each, kind, None if own else layouts[name], found.notes)
        begin = f"{own[name]}_" if own else _prefix(kind, name, whose, layouts[name])
        _put(stacks, kind, begin, found.tensors, owner)
        by_prefix[begin] = Bundle(dict(stacks))
    sure = family is not None or any(each.base is not None for each in bundles.values())
    found.header.update(_header(by_prefix, kind, whose if sure else None, bundles.get("")))
    if kind.scale == "header" and not own:
        found.header[LORA_METADATA] = lora_adapter_metadata({name.rstrip("."): one for name, one in by_prefix.items()})
    return found


def write(
    bundle: Bundle | Mapping[str, Bundle],
    path: str | os.PathLike[str],
    dialect: str = "lycoris",
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
    component: str = "",
    prefix: str | Mapping[str, str] | None = None,
    model: nn.Module | Layout | Mapping[str, nn.Module | Layout] | None = None,
    family: str | None = None,
    describe: Callable[[Mapping[str, Tensor], Mapping[str, str]], Mapping[str, str]] | None = None,
    overwrite: bool = True,
) -> Encoded:
    """Write an adapter file, whole or not at all; returns what it holds. See `compose`.

    `dtype` is that of the stored tensors (None: as they are); `alpha` stays float32, since half precision would round
    or overflow it. `metadata` goes into the header beside the bundle's own, and so does what `describe` makes of the
    tensors as they are stored and of the rest of the header. A file that exists is replaced, as trainers count on, or
    with `overwrite=False` a `FileError`.
    """
    check_target(path, overwrite=overwrite)
    encoded = compose(bundle, dialect, component=component, prefix=prefix, model=model, family=family)
    own = {} if isinstance(bundle, Mapping) else keep_header(bundle.metadata)
    made = store_tensors(encoded, dtype, {**own, **encoded.header, **(metadata or {})})
    made = made._replace(header=_with_room(made, path))
    if describe is not None:
        made.header.update(describe(plain(made.tensors), made.header))
    save_tensors(made.tensors, path, made.header)
    return made


def _with_room(made: Encoded, path: str | os.PathLike[str]) -> dict[str, str]:
    """What of a header there is room for; anything else than text is left for `save_tensors` to refuse."""
    plain_text = all(isinstance(key, str) and isinstance(value, str) for key, value in made.header.items())
    return fitting(made.header, made.tensors, path) if plain_text else made.header


def store_tensors(encoded: Encoded, dtype: torch.dtype | None, header: Mapping[str, str]) -> Encoded:
    """The same with its tensors as `write` stores them. Raises `FileError` where a dtype does not hold them."""
    tensors = encoded.tensors
    if dtype is not None:
        tensors = _cast(tensors, dtype)
    bad = next((key for key, tensor in tensors.items() if not is_finite(tensor)), None)
    if bad is not None:
        raise FileError(f"{bad} is not finite{'' if dtype is None else f' as {dtype}'}; nothing was written")
    return Encoded(tensors, dict(header), encoded.notes)


def _cast(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if not dtype.is_floating_point:
        raise FileError(f"dtype={dtype} cannot hold adapters, whose numbers are fractions; give float32 or bfloat16")
    found = {}
    for key, tensor in tensors.items():
        whole = key.endswith(".alpha") or not tensor.is_floating_point()
        found[key] = tensor if whole else tensor.to(dtype)
        if not found[key].any() and tensor.any():
            raise FileError(
                f"all of {key} is too small for {dtype} and would become 0; give float32. Nothing was written"
            )
    return found


def keep_header(header: Mapping[str, str]) -> dict[str, str]:
    """What of a file's header is true of another file with the same adapters."""
    return {key: value for key, value in header.items() if key not in STALE}


def encode(
    bundle: Bundle,
    dialect: str = "lycoris",
    *,
    component: str = "",
    prefix: str | None = None,
    model: nn.Module | Layout | None = None,
) -> dict[str, Tensor]:
    """The tensors of `compose`."""
    return compose(bundle, dialect, component=component, prefix=prefix, model=model).tensors


def _put(
    stacks: Mapping[str, placing.Stack],
    dialect: Dialect,
    prefix: str,
    tensors: dict[str, Tensor],
    owner: dict[str, str],
) -> None:
    """Add the tensors of layers, by name; `owner` is the layer of each."""
    for layer, stack in stacks.items():
        for suffix, tensor in _layer(stack, layer, dialect).items():
            key = dialect.join(layer, suffix, prefix)
            first = owner.setdefault(key, layer)
            if key in tensors:
                raise FileError(f"{first} and {layer} would both be written as {key}; this format cannot hold both")
            tensors[key] = tensor


def _header(
    by_prefix: Mapping[str, Bundle], dialect: Dialect, family: Family | None, main: Bundle | None
) -> dict[str, str]:
    """What a file says of itself: the scale of every layer, and which base it is for."""
    scales = {
        dialect.join(layer, "", prefix).rstrip("."): _main(stack).algorithm.scale(stack[0].geometry)
        for prefix, bundle in by_prefix.items()
        for layer, stack in bundle.entries.items()
    }
    told = {format_version.KEY: str(format_version.CURRENT), history.SCALES: _scale_as_json(scales)}
    if family is not None:
        told[FAMILY] = family.name
    if main is not None and main.base is not None:
        told[fingerprint.KEY] = str(fingerprint.of_layers(*main.base))
        layers = described.describe(main.base)
        told |= {} if layers is None else {described.KEY: layers}
    return told


def _layout(bundle: Bundle, dialect: Dialect, model: nn.Module | Layout | None) -> Layout:
    if isinstance(model, Layout):
        return model
    if model is not None:
        return Layout.of(model)
    if bundle.base is not None:
        return Layout.all_of(bundle.base.model, bundle.base.layers)
    layers = {path: stack[0].geometry for path, stack in bundle.entries.items()}
    return Layout("the model", layers, middle=layers) if dialect.alike else Layout.around(layers)


def _name_stacks(
    bundle: Bundle, dialect: Dialect, layout: Layout | None, notes: dict[str, str]
) -> Mapping[str, placing.Stack]:
    """The stacks under the names that a dialect uses for them; None: under their own."""
    whole = dialect.algorithms is None or Full.name in dialect.algorithms
    if layout is None or layout.architecture is None:
        places = placing.separate(bundle.entries, dense=whole)
    else:
        to = layout.in_naming(dialect.naming_for(layout.architecture))
        places = placing.place(bundle.entries, to, layout.naming, dense=whole)
    if places.refused:
        raise FileError(f"{len(places.refused)} layers cannot be written: {some(places.refused.values())}")
    notes |= places.notes
    return places.entries


def _prefix(dialect: Dialect, component: str, family: Family | None, layout: Layout) -> str:
    unets = [prefix for prefix, of in dialect.prefixes.items() if of == "" and "unet" in prefix]
    if component == "" and layout.unet and unets:
        return unets[0]
    begin = prefix_of(dialect, family, component)
    if begin is None:
        known = ", ".join(sorted({name or "the denoiser" for name in dialect.prefixes.values()}))
        raise FileError(f"{dialect.name} files have no {component!r}, only {known}")
    return begin


def _layer(stack: tuple[Entry, ...], layer: str, dialect: Dialect) -> dict[str, Tensor]:
    """A layer's tensors by suffix."""
    places = [_place(entry) for entry in stack]
    if any(one >= other for one, other in pairwise(places)):
        names = " and ".join(entry.algorithm.name for entry in stack)
        raise FileError(
            f"{layer} has {names}, and {dialect.name} files hold one algorithm per layer; put each on a set of its "
            "own, and write those one by one"
        )
    first = _main(stack)
    _check_held(first, layer, dialect)
    tensors: dict[str, Tensor] = {}
    for entry in stack:
        own = write_tensors(entry.algorithm, entry.tensors, entry.geometry)
        both = tensors.keys() & own.keys()
        if both:
            raise FileError(f"{layer}: two of its algorithms would be written as {', '.join(sorted(both))}")
        tensors |= own
    return _apply_scale(_magnitude(tensors, first, dialect), first, dialect)


def _place(entry: Entry) -> int:
    """Where an entry stands in a stack that the tensors of one layer make: see `dialects.forms.modern`."""
    match entry.algorithm:
        case Replace(weight=True):
            return 0
        case Replace():
            return 2
        case Full(weight=False):
            return 3
        case _:
            return 1


def _main(stack: tuple[Entry, ...]) -> Entry:
    """The entry that the others are beside."""
    return next((entry for entry in stack if _place(entry) == 1), stack[0])


def _check_held(entry: Entry, layer: str, dialect: Dialect) -> None:
    """Raise `FileError` for an algorithm, or a kind of layer, that a dialect cannot hold."""
    algorithm, kind = entry.algorithm, entry.geometry.kind
    if dialect.kinds is not None and kind not in dialect.kinds:
        raise FileError(
            f"{layer} is a {kind}; {dialect.name} files hold adapters of {' and '.join(dialect.kinds)} only"
        )
    if not re.fullmatch(dialect.layers or ".*", layer):
        raise FileError(f"{layer} has no place in {dialect.name} files, which hold attention's projections only")
    kinds, told, lost = {algorithm.name}, algorithm.name, False
    if isinstance(algorithm, DoRA):
        kinds |= {algorithm.inner.name}
        told = f"dora over {algorithm.inner.name}, lengths on the {algorithm.axis}put"
        lost = algorithm.axis not in dialect.lengths
    if lost or (dialect.algorithms is not None and not kinds <= dialect.algorithms):
        held = ", ".join(sorted(dialect.algorithms or ()))
        lengths = "" if "in" in dialect.lengths else ", with lengths on the output"
        raise FileError(
            f"{layer} has {told}; {dialect.name} files hold only {held}{lengths}; `lycoris convert --portable` turns "
            "others into one of them"
        )


def _magnitude(tensors: dict[str, Tensor], entry: Entry, dialect: Dialect) -> dict[str, Tensor]:
    """DoRA's lengths as a dialect has them: PEFT's broadcast over outputs, ours over weights."""
    algorithm, g = entry.algorithm, entry.geometry
    # PEFT has no word for the lengths of a stack.
    if not isinstance(algorithm, DoRA) or dialect.lengths[algorithm.axis] != MAGNITUDE_VECTOR or g.stack:
        return tensors
    lengths, conv = tensors[MAGNITUDE], g.kind == "conv"
    rest = {suffix: tensor for suffix, tensor in tensors.items() if suffix != MAGNITUDE}
    return rest | {MAGNITUDE_VECTOR: lengths.transpose(0, 1) if conv else lengths.flatten()}


def _apply_scale(tensors: dict[str, Tensor], entry: Entry, dialect: Dialect) -> dict[str, Tensor]:
    """Tensors with the scale where a dialect has it."""
    up, down = LoRA.tensor_names["up"], LoRA.tensor_names["down"]
    values = [TLoRA.tensor_names["lam"], TLoRA.tensor_names["lam0"]]
    if dialect.scale == "alpha" or not tensors.keys() & {up, *values}:
        return tensors
    scale = entry.algorithm.scale(entry.geometry)
    rest = {suffix: tensor for suffix, tensor in tensors.items() if suffix != ALPHA}
    if up not in rest:
        return rest | {suffix: _times(rest[suffix], scale) for suffix in values if suffix in rest}
    if dialect.scale == "header":
        return rest
    if dialect.scale == "in up":
        return rest | {up: _times(rest[up], scale)}
    # About even, and a power of two, which rounds nothing.
    even = 2.0 ** (math.frexp(scale)[1] // 2)
    return rest | {up: _times(rest[up], scale / even), down: _times(rest[down], even)}


def _times(tensor: Tensor, factor: float) -> Tensor:
    """In the tensor's precision where that holds it, else in float32."""
    if factor == 1:
        return tensor
    wide = widen(tensor) * factor
    narrow = wide.to(tensor.dtype)
    return narrow if torch.equal(narrow.to(wide.dtype), wide) else wide


def _scale_as_json(scales: Mapping[str, float]) -> str:
    """The scale of every layer as JSON: one for all that have it most often, the others by name."""
    counts: dict[float, int] = {}
    for scale in scales.values():
        counts[scale] = counts.get(scale, 0) + 1
    usual = max(counts, key=lambda each: counts[each], default=1.0)
    return json.dumps({"*": usual} | {layer: scale for layer, scale in scales.items() if scale != usual})
