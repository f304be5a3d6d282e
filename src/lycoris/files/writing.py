"""Turn a bundle into named tensors, and write it as a file."""

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
from lycoris.files.container.storage import make_storable, save_tensors, trim_metadata
from lycoris.files.container.target import check_target
from lycoris.files.dialects import DIALECTS, history
from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.components import FAMILY_KEY, find_family, find_prefix
from lycoris.files.dialects.suffixes import MAGNITUDE_VECTOR
from lycoris.files.layout import NamedLayout
from lycoris.files.peft.config import LORA_METADATA
from lycoris.files.peft.writing import encode_lora_metadata
from lycoris.models import fingerprint
from lycoris.models.families import FAMILIES
from lycoris.models.families.family import Family
from lycoris.ops.finite import is_finite
from lycoris.ops.rounding import widen

HASH_KEYS = ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256")
"""Header keys that are hashes of a file's tensors."""
STALE_KEYS = (LORA_METADATA, history.SCALES_KEY, described.DESCRIPTION_KEY, *HASH_KEYS)
"""Header keys that describe the tensors of the file that was read."""


class EncodedFile(NamedTuple):
    """The content of a file: tensors and header, with notes on adapters that had to change.

    Nothing is on disk before `save_tensors` gets it.
    """

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
    model: nn.Module | NamedLayout | Mapping[str, nn.Module | NamedLayout] | None = None,
    family: str | None = None,
) -> EncodedFile:
    """Encode a bundle, or one for each component of a pipeline, in a dialect.

    Args:
        bundle: One bundle for `component`, or component → bundle.
        dialect: A name in `DIALECTS` other than "peft", which is a folder: see `write_peft`.
        component: Which part of a pipeline a single bundle is for.
        prefix: Replaces the dialect's prefix; layers are then named as in the bundle. For several bundles: component →
            prefix, with "" for the denoiser.
        model: What the bundle is for, which decides the names of layers; None: recognized by its layers.
        family: Matters where components are numbered differently: Flux.1's second text encoder is kohya's third.

    Raises:
        FileError: Two tensors get the same name, a layer has adapters that a file cannot store together, or the dialect
            cannot store an algorithm, alone or on a fused layer.
    """
    if dialect not in DIALECTS:
        raise FileError(unknown("dialect", dialect, DIALECTS))
    if family is not None and family not in FAMILIES:
        raise FileError(unknown("family", family, FAMILIES))
    if DIALECTS[dialect].is_folder:
        raise FileError(f"{dialect} adapters are folders, not files: use lycoris.files.write_peft")
    kind, bundles = DIALECTS[dialect], bundle if isinstance(bundle, Mapping) else {component: bundle}
    models = model if isinstance(model, Mapping) else {component: model}
    found, owner = EncodedFile({}, {}, {}), dict[str, str]()
    own = dict.fromkeys(bundles, prefix) if isinstance(prefix, str) else prefix or {}
    # With a custom prefix, layers keep the names they have here.
    layouts = {name: _find_layout(each, kind, models.get(name)) for name, each in bundles.items() if not own}
    whose = FAMILIES[family] if family else find_family({name: each.architecture for name, each in layouts.items()})
    by_prefix: dict[str, Bundle] = {}
    for name, each in bundles.items():
        stacks = _name_stacks(each, kind, None if own else layouts[name], found.notes)
        begin = f"{own[name]}_" if own else _choose_prefix(kind, name, whose, layouts[name])
        _add_stacks(stacks, kind, begin, found.tensors, owner)
        by_prefix[begin] = Bundle(dict(stacks))
    sure = family is not None or any(each.base is not None for each in bundles.values())
    found.header.update(_make_header(by_prefix, kind, whose if sure else None, bundles.get("")))
    if kind.scale == "header" and not own:
        found.header[LORA_METADATA] = encode_lora_metadata({name.rstrip("."): one for name, one in by_prefix.items()})
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
    model: nn.Module | NamedLayout | Mapping[str, nn.Module | NamedLayout] | None = None,
    family: str | None = None,
    describe: Callable[[Mapping[str, Tensor], Mapping[str, str]], Mapping[str, str]] | None = None,
    overwrite: bool = True,
) -> EncodedFile:
    """Write an adapter file, completely or not at all. See `compose` for arguments not listed.

    Args:
        path: A `.safetensors` file. It is written under a temporary name and then moved.
        dtype: Of the stored tensors; None: unchanged. `alpha` stays float32, since half precision would round or
            overflow it.
        metadata: Added to the header, over the bundle's own.
        describe: Called with the tensors as stored and the header so far; returns more of the header.
        overwrite: Whether to replace an existing file, as trainers expect. If False, that is a `FileError`.

    Returns:
        What the file contains.
    """
    check_target(path, overwrite=overwrite)
    encoded = compose(bundle, dialect, component=component, prefix=prefix, model=model, family=family)
    own = {} if isinstance(bundle, Mapping) else keep_header(bundle.metadata)
    made = store_tensors(encoded, dtype, {**own, **encoded.header, **(metadata or {})})
    made = made._replace(header=_trim_header(made, path))
    if describe is not None:
        made.header.update(describe(make_storable(made.tensors), made.header))
    save_tensors(made.tensors, path, made.header)
    return made


def _trim_header(made: EncodedFile, path: str | os.PathLike[str]) -> dict[str, str]:
    """What of a header there is room for; anything else than text is left for `save_tensors` to refuse."""
    plain_text = all(isinstance(key, str) and isinstance(value, str) for key, value in made.header.items())
    return trim_metadata(made.header, made.tensors, path) if plain_text else made.header


def store_tensors(encoded: EncodedFile, dtype: torch.dtype | None, header: Mapping[str, str]) -> EncodedFile:
    """Return a file's content with its tensors cast to `dtype`, ready to be saved.

    Raises:
        FileError: A tensor is not finite, is not in that dtype, or would become all zeros.
    """
    tensors = encoded.tensors
    if dtype is not None:
        tensors = _cast_to_dtype(tensors, dtype)
    bad = next((key for key, tensor in tensors.items() if not is_finite(tensor)), None)
    if bad is not None:
        raise FileError(f"{bad} is not finite{'' if dtype is None else f' as {dtype}'}; nothing was written")
    return EncodedFile(tensors, dict(header), encoded.notes)


def _cast_to_dtype(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    if not dtype.is_floating_point:
        raise FileError(f"dtype={dtype} cannot hold adapters, whose values are not integers; give float32 or bfloat16")
    found = {}
    for key, tensor in tensors.items():
        unchanged = key.endswith(".alpha") or not tensor.is_floating_point()
        found[key] = tensor if unchanged else tensor.to(dtype)
        if not found[key].any() and tensor.any():
            raise FileError(
                f"all of {key} is too small for {dtype} and would become 0; give float32. Nothing was written"
            )
    return found


def keep_header(header: Mapping[str, str]) -> dict[str, str]:
    """Return the part of a file's header that stays true in another file with the same adapters.

    Hashes and descriptions of the tensors (`STALE_KEYS`) are dropped.
    """
    return {key: value for key, value in header.items() if key not in STALE_KEYS}


def encode(
    bundle: Bundle,
    dialect: str = "lycoris",
    *,
    component: str = "",
    prefix: str | None = None,
    model: nn.Module | NamedLayout | None = None,
) -> dict[str, Tensor]:
    """Return the tensors of a bundle as a dialect names them.

    The tensors of `compose`, for callers that store them themselves.
    """
    return compose(bundle, dialect, component=component, prefix=prefix, model=model).tensors


def _add_stacks(
    stacks: Mapping[str, placing.Stack],
    dialect: Dialect,
    prefix: str,
    tensors: dict[str, Tensor],
    owner: dict[str, str],
) -> None:
    """Add the tensors of layers, by name; `owner` is the layer of each."""
    for layer, stack in stacks.items():
        for suffix, tensor in _encode_layer(stack, layer, dialect).items():
            key = dialect.join(layer, suffix, prefix)
            first = owner.setdefault(key, layer)
            if key in tensors:
                raise FileError(f"{first} and {layer} would both be written as {key}; this format cannot hold both")
            tensors[key] = tensor


def _make_header(
    by_prefix: Mapping[str, Bundle], dialect: Dialect, family: Family | None, main: Bundle | None
) -> dict[str, str]:
    """What a file says of itself: the scale of every layer, and which base it is for."""
    scales = {
        dialect.join(layer, "", prefix).rstrip("."): _find_main(stack).algorithm.scale(stack[0].geometry)
        for prefix, bundle in by_prefix.items()
        for layer, stack in bundle.entries.items()
    }
    content = {
        format_version.FORMAT_KEY: str(format_version.FORMAT_VERSION),
        history.SCALES_KEY: _scale_as_json(scales),
    }
    if family is not None:
        content[FAMILY_KEY] = family.name
    if main is not None and main.base is not None:
        content[fingerprint.FINGERPRINT_KEY] = str(fingerprint.fingerprint_layers(*main.base))
        layers = described.encode_base_layers(main.base)
        content |= {} if layers is None else {described.DESCRIPTION_KEY: layers}
    return content


def _find_layout(bundle: Bundle, dialect: Dialect, model: nn.Module | NamedLayout | None) -> NamedLayout:
    if isinstance(model, NamedLayout):
        return model
    if model is not None:
        return NamedLayout.from_model(model)
    if bundle.base is not None:
        return NamedLayout.from_layers(bundle.base.model, bundle.base.layers)
    layers = {path: stack[0].geometry for path, stack in bundle.entries.items()}
    return (
        NamedLayout("the model", layers, diffusers_layers=layers)
        if dialect.is_universal
        else NamedLayout.from_some_layers(layers)
    )


def _name_stacks(
    bundle: Bundle, dialect: Dialect, layout: NamedLayout | None, notes: dict[str, str]
) -> Mapping[str, placing.Stack]:
    """The stacks under the names that a dialect uses for them; None: under their own."""
    dense = dialect.algorithms is None or Full.name in dialect.algorithms
    if layout is None or layout.architecture is None:
        places = placing.separate_stacks(bundle.entries, dense=dense)
    else:
        to = layout.convert_to_naming(dialect.choose_naming(layout.architecture))
        places = placing.place_stacks(bundle.entries, to, layout.naming, dense=dense)
    if places.refused:
        raise FileError(f"{len(places.refused)} layers cannot be written: {some(places.refused.values())}")
    notes |= places.notes
    return places.entries


def _choose_prefix(dialect: Dialect, component: str, family: Family | None, layout: NamedLayout) -> str:
    unets = [prefix for prefix, of in dialect.prefixes.items() if of == "" and "unet" in prefix]
    if component == "" and layout.is_unet and unets:
        return unets[0]
    begin = find_prefix(dialect, family, component)
    if begin is None:
        known = ", ".join(sorted({name or "the denoiser" for name in dialect.prefixes.values()}))
        raise FileError(f"{dialect.name} files have no {component!r}, only {known}")
    return begin


def _encode_layer(stack: tuple[Entry, ...], layer: str, dialect: Dialect) -> dict[str, Tensor]:
    """A layer's tensors by suffix."""
    places = [_find_position(entry) for entry in stack]
    if any(one >= other for one, other in pairwise(places)):
        names = " and ".join(entry.algorithm.name for entry in stack)
        raise FileError(
            f"{layer} has {names}, and {dialect.name} files hold one algorithm per layer; put each on a set of its "
            "own, and write those one by one"
        )
    first = _find_main(stack)
    _check_held(first, layer, dialect)
    tensors: dict[str, Tensor] = {}
    for entry in stack:
        own = write_tensors(entry.algorithm, entry.tensors, entry.geometry)
        both = tensors.keys() & own.keys()
        if both:
            raise FileError(f"{layer}: two of its algorithms would be written as {', '.join(sorted(both))}")
        tensors |= own
    return _apply_scale(_encode_magnitude(tensors, first, dialect), first, dialect)


def _find_position(entry: Entry) -> int:
    """Where an entry stands in a stack that the tensors of one layer make: see `dialects.forms.normalize_tensors`."""
    match entry.algorithm:
        case Replace(weight=True):
            return 0
        case Replace():
            return 2
        case Full(weight=False):
            return 3
        case _:
            return 1


def _find_main(stack: tuple[Entry, ...]) -> Entry:
    """The entry that the others are next to."""
    return next((entry for entry in stack if _find_position(entry) == 1), stack[0])


def _check_held(entry: Entry, layer: str, dialect: Dialect) -> None:
    """Raise `FileError` for an algorithm, or a kind of layer, that a dialect cannot hold."""
    algorithm, kind = entry.algorithm, entry.geometry.kind
    if dialect.kinds is not None and kind not in dialect.kinds:
        raise FileError(
            f"{layer} is a {kind}; {dialect.name} files hold adapters of {' and '.join(dialect.kinds)} only"
        )
    if not re.fullmatch(dialect.layer_pattern or ".*", layer):
        raise FileError(f"{layer} has no place in {dialect.name} files, which hold attention's projections only")
    kinds, content, lost = {algorithm.name}, algorithm.name, False
    if isinstance(algorithm, DoRA):
        kinds |= {algorithm.inner.name}
        content = f"dora over {algorithm.inner.name} with {algorithm.axis}put magnitude"
        lost = algorithm.axis not in dialect.magnitudes
    if lost or (dialect.algorithms is not None and not kinds <= dialect.algorithms):
        held = ", ".join(sorted(dialect.algorithms or ()))
        magnitude = "" if "in" in dialect.magnitudes else ", with output magnitude"
        raise FileError(
            f"{layer} has {content}; {dialect.name} files hold only {held}{magnitude}; `lycoris convert "
            "--portable` converts others"
        )


def _encode_magnitude(tensors: dict[str, Tensor], entry: Entry, dialect: Dialect) -> dict[str, Tensor]:
    """Tensors with DoRA's magnitude as a dialect stores it: PEFT's broadcasts over outputs, ours over weights."""
    algorithm, g = entry.algorithm, entry.geometry
    # PEFT has no magnitude for stacks.
    if not isinstance(algorithm, DoRA) or dialect.magnitudes[algorithm.axis] != MAGNITUDE_VECTOR or g.stack:
        return tensors
    magnitude, conv = tensors[MAGNITUDE], g.kind == "conv"
    rest = {suffix: tensor for suffix, tensor in tensors.items() if suffix != MAGNITUDE}
    return rest | {MAGNITUDE_VECTOR: magnitude.transpose(0, 1) if conv else magnitude.flatten()}


def _apply_scale(tensors: dict[str, Tensor], entry: Entry, dialect: Dialect) -> dict[str, Tensor]:
    """Tensors with the scale where a dialect has it."""
    up, down = LoRA.tensor_names["up"], LoRA.tensor_names["down"]
    values = [TLoRA.tensor_names["lam"], TLoRA.tensor_names["lam0"]]
    if dialect.scale == "alpha" or not tensors.keys() & {up, *values}:
        return tensors
    scale = entry.algorithm.scale(entry.geometry)
    rest = {suffix: tensor for suffix, tensor in tensors.items() if suffix != ALPHA}
    if up not in rest:
        return rest | {suffix: _multiply_tensor(rest[suffix], scale) for suffix in values if suffix in rest}
    if dialect.scale == "header":
        return rest
    if dialect.scale == "in up":
        return rest | {up: _multiply_tensor(rest[up], scale)}
    # About even, and a power of two, which rounds nothing.
    even = 2.0 ** (math.frexp(scale)[1] // 2)
    return rest | {up: _multiply_tensor(rest[up], scale / even), down: _multiply_tensor(rest[down], even)}


def _multiply_tensor(tensor: Tensor, factor: float) -> Tensor:
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
