"""Write a bundle as a PEFT adapter."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lycoris.adapters.bundle import Bundle
from lycoris.adapters.load_report import some
from lycoris.algorithms import IA3, DoRA, DyLoRA, Full, LoHa, LoKr, LoRA
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.dora import unwrap_dora
from lycoris.errors import FileError
from lycoris.files import placing
from lycoris.files.container.target import check_target
from lycoris.files.peft.factors import LokrFactors, choose_lokr_settings, is_representable
from lycoris.files.peft.folder import write_folder
from lycoris.files.peft.layers import explain_unsupported, read_base
from lycoris.files.peft.reading import PEFT_PREFIX
from lycoris.layers import paths
from lycoris.layers.geometry import Geometry
from lycoris.layers.sites import ModelSites, Site


@dataclass
class _PeftLayer:
    """What one layer becomes."""

    geometry: Geometry
    tensors: dict[str, Tensor]
    rank: int = 0
    alpha: float = 0.0
    extra: dict[str, Any] = field(default_factory=dict)


def encode_peft(bundle: Bundle, model: nn.Module | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors of a bundle by PEFT's names, and the settings of `adapter_config.json`.

    Names are `<path>.<tensor>`, without PEFT's `base_model.model.`. `model`, if given, is asked for biases and for the
    names of other modules; see `write_peft`.

    Raises:
        FileError: Layers have something that PEFT has no counterpart for, or adapters of different types.
    """
    if not bundle.entries:
        raise FileError("there are no adapters to write")
    bundle = _separate_layers(bundle)
    sites = None if model is None else ModelSites.of(model)
    types = {path: _choose_type(path, stack, sites) for path, stack in bundle.entries.items()}
    _check_types(types, bundle)
    (type_,) = {name for name, _ in types.values()}
    encoder = _ENCODERS[type_]
    layers = {path: encoder(path, stack) for path, stack in bundle.entries.items()}
    config = {"peft_type": type_, "target_modules": _list_target_modules(bundle, model), **_SETTINGS[type_](layers)}
    tensors = {f"{path}.{name}": tensor for path, layer in layers.items() for name, tensor in layer.tensors.items()}
    return tensors, config


def _separate_layers(bundle: Bundle) -> Bundle:
    """With an adapter of its own for each layer, which is what PEFT has."""
    places = placing.separate_stacks(bundle.entries, dense=False)
    if places.refused:
        raise FileError(f"{len(places.refused)} layers cannot be written: {some(places.refused.values())}")
    return replace(bundle, entries=places.entries)


def _list_target_modules(bundle: Bundle, model: nn.Module | None) -> list[str] | str:
    """The paths. In a list each stands for every module that it is the end of: if there may be others, a pattern."""
    own = set(bundle.entries)
    there = dict(paths.named_modules(model)) if model is not None else bundle.base.layers if bundle.base else {}
    ends = {other[at + 1 :] for other in there.keys() - own for at, letter in enumerate(other) if letter == "."}
    # A path of one step may be the end of modules that are no layers.
    if own & ends or any("." not in path for path in own):
        return "|".join(map(re.escape, sorted(own)))
    return sorted(own)


def write_peft(
    bundle: Bundle,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    dtype: torch.dtype | None = None,
    model: nn.Module | None = None,
    overwrite: bool = True,
) -> None:
    """Write a folder that PEFT loads, completely or not at all.

    LoRA, LoCon (a Tucker core is multiplied in), DyLoRA, DoRA over them with output magnitude, LoHa, LoKr and IA3 have
    counterparts, provided that all layers are of one type.

    Args:
        base_model: The name of the base model to store in the config.
        dtype: Of the stored tensors; None: unchanged.
        model: The model, needed for IA3 on outputs of layers with a bias: PEFT scales the bias too, and whether a stack
            does so (as `read_peft` makes it) depends on the bias.
        overwrite: Whether to replace an existing adapter in the folder.

    Raises:
        FileError: Something has no counterpart in PEFT (the message names the layers and what to do), or the folder has
            an adapter and `overwrite` is False.
    """
    check_target(folder, overwrite=overwrite)
    tensors, config = encode_peft(bundle, model)
    if dtype is not None:
        tensors = {key: tensor.to(dtype) if tensor.is_floating_point() else tensor for key, tensor in tensors.items()}
    bad = next((key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()), None)
    if bad is not None:
        raise FileError(f"{bad} is not finite{'' if dtype is None else f' as {dtype}'}; nothing was written")
    head = {"base_model_name_or_path": base_model, "inference_mode": True, "task_type": None}
    text = json.dumps(head | config, indent=2, sort_keys=True) + "\n"
    write_folder(Path(folder), {PEFT_PREFIX + key: tensor for key, tensor in tensors.items()}, text)


def encode_lora_metadata(bundles: Mapping[str, Bundle]) -> str:
    """Return what diffusers reads from the header key `lora_adapter_metadata`: the settings of each component's LoRA,
    as
    JSON.

    `bundles` are by component as the pipeline calls it: `unet`, `transformer`, `text_encoder`, ... Raises `FileError`
    for a bundle of anything but LoRA and DoRA.
    """
    metadata: dict[str, Any] = {}
    for component, bundle in bundles.items():
        config = encode_peft(bundle)[1]
        if config.pop("peft_type") != "LORA":
            raise FileError(f"{component}: diffusers' pipelines read LoRA alone, and this is {bundle}")
        metadata |= {f"{component}.{name}": value for name, value in config.items()}
    return json.dumps(metadata, sort_keys=True)


def explain_refusal(stack: tuple[Entry, ...]) -> str:
    """Return what in a layer's adapters PEFT has no counterpart for; "" if it has one.

    The layer is judged alone: that others must be of the same type is not considered.
    """
    name, why = _choose_type("", stack, None)
    if name == "LOKR" and not is_representable(_describe_factors(stack[0])):
        return "lokr: no decompose_factor makes its shapes"
    return why


def _choose_type(path: str, stack: tuple[Entry, ...], sites: ModelSites | None) -> tuple[str, str]:
    """The peft_type of a layer, or "" and why there is none."""
    first, *rest = stack
    algorithm, g = first.algorithm, first.geometry
    shifted = len(rest) == 1 and isinstance(rest[0].algorithm, Full) and set(rest[0].tensors) == {"diff_b"}
    scaled = shifted and sites is not None and _scales_bias(stack, sites.find(path))
    if rest and not scaled and not (shifted and type(algorithm) in (LoRA, DyLoRA) and g.kind != "embedding"):
        return "", f"a stack of {' and '.join(entry.algorithm.name for entry in stack)}"
    name = _find_peft_type(algorithm)
    if not name:
        inner = f" over {algorithm.inner.name}, axis {algorithm.axis!r}" if isinstance(algorithm, DoRA) else ""
        return "", f"{algorithm.name}{inner}"
    why = explain_unsupported(name, g)
    if isinstance(algorithm, DoRA) and g.groups > 1:
        why = "PEFT has no DoRA for convolutions of several groups"
    if name == "IA3" and g.has_bias and not scaled and not (isinstance(algorithm, IA3) and algorithm.on_input):
        why = "PEFT's IA3 scales a layer's output and with it the bias, which stays as it is here"
    if name == "LOKR" and g.kind == "conv" and len(g.kernel) == 1 and "w2" in first.tensors:
        why = "PEFT multiplies an unsplit w2 of a Conv1d along other axes"
    if name == "LOKR" and len(g.kernel) == 1 and "t2" in first.tensors and first.tensors["t2"].shape[0] == 1:
        why = "PEFT fails to run a Tucker core of rank 1 on a Conv1d"
    return ("", f"{algorithm.name}: {why}") if why else (name, "")


def _scales_bias(stack: tuple[Entry, ...], place: Site) -> bool:
    """Whether IA3 on a layer's output has the change of the bias above it that goes with it."""
    algorithm, _, p = stack[0]
    if not isinstance(algorithm, IA3) or algorithm.on_input:
        return False
    bias = read_base(place).bias
    change = stack[1].tensors["diff_b"]
    return bias is not None and torch.allclose(bias.to(change) * p["w"].flatten(), change, rtol=1e-4, atol=1e-7)


def _find_peft_type(algorithm: Algorithm) -> str:
    kinds = ((LoRA, "LORA"), (DyLoRA, "LORA"), (LoHa, "LOHA"), (LoKr, "LOKR"), (IA3, "IA3"))
    if isinstance(algorithm, DoRA) and algorithm.axis == "out" and type(algorithm.inner) in (LoRA, DyLoRA):
        return "LORA"
    return next((name for kind, name in kinds if type(algorithm) is kind), "")


def _check_types(types: Mapping[str, tuple[str, str]], bundle: Bundle) -> None:
    refused: dict[str, list[str]] = {}
    for path, (name, why) in types.items():
        if not name:
            refused.setdefault(why, []).append(path)
    if refused:
        listed = "\n  ".join(f"{why}: {some(sorted(paths))}" for why, paths in refused.items())
        raise FileError(
            f"PEFT has no counterpart for {sum(map(len, refused.values()))} of {len(types)} layers:\n  {listed}"
            "\nWrite a file of this library with lycoris.files.write, or merge them into the model and save that"
        )
    kinds: dict[str, list[str]] = {}
    for path, (name, _) in types.items():
        dora = " with DoRA" if isinstance(bundle.entries[path][0].algorithm, DoRA) else ""
        kinds.setdefault(name + dora, []).append(path)
    if len(kinds) > 1:
        listed = "; ".join(f"{name}: {some(sorted(paths))}" for name, paths in kinds.items())
        raise FileError(f"a PEFT adapter is all of one kind, and this has {listed}. Write one folder for each")


def _encode_lora(path: str, stack: tuple[Entry, ...]) -> _PeftLayer:
    algorithm, g, p = stack[0]
    inner: Any = unwrap_dora(algorithm)
    # The Tucker core goes into `down`; a gate into `up`.
    up, down = inner.low_rank_factors(
        inner.export_tensors({name: t for name, t in p.items() if name != "magnitude"}, g), g
    )
    scale, rank = inner.scale(g), inner.rank
    if g.groups > 1:
        up, down, rank = up, _expand_groups(down, g), rank * g.groups
    ones = (1,) * len(g.kernel)
    a, b = ("lora_embedding_A", "lora_embedding_B") if g.kind == "embedding" else ("lora_A.weight", "lora_B.weight")
    tensors = {a: down, b: up.reshape(*up.shape, *ones)}
    if isinstance(algorithm, DoRA):
        tensors["lora_magnitude_vector"] = p["magnitude"].reshape((1, -1, *ones) if ones else (-1,))
    if len(stack) > 1:
        # PEFT multiplies it by the scale, as all that comes out of lora_B.
        tensors["lora_B.bias"] = stack[1].tensors["diff_b"] / scale
    return _PeftLayer(g, tensors, rank, scale * rank, {"dora": isinstance(algorithm, DoRA), "bias": len(stack) > 1})


MAX_TENSOR_BYTES = 2**30
"""Bytes that one tensor of a file may take unasked."""


def _expand_groups(down: Tensor, g: Geometry) -> Tensor:
    """PEFT's `lora_A` of a grouped convolution sees all channels: ranks of their own for each group, zero elsewhere.

    Raises `FileError` where that takes more than `MAX_TENSOR_BYTES` bytes.
    """
    r = down.shape[0]
    if (size := down.numel() * g.groups**2 * down.itemsize) > MAX_TENSOR_BYTES:
        raise FileError(
            f"a LoRA of rank {r} on a convolution of {g.groups} groups takes {size:,} bytes in PEFT's form, which has "
            f"ranks for every group, and {down.numel() * down.itemsize:,} here; write it in another format"
        )
    expanded = down.new_zeros(g.groups * r, g.groups * g.in_features, *g.kernel)
    for at in range(g.groups):
        expanded[at * r : (at + 1) * r, at * g.in_features : (at + 1) * g.in_features] = down
    return expanded


def _make_lora_settings(layers: dict[str, _PeftLayer]) -> dict[str, Any]:
    config = _make_rank_patterns(layers, "lora_alpha")
    if all(layer.extra["dora"] for layer in layers.values()):
        config["use_dora"] = True
    if any(layer.extra["bias"] for layer in layers.values()):
        # One switch for all layers, so that those without a bias get one of zero.
        config["lora_bias"] = True
        off = [path for path, layer in layers.items() if layer.geometry.kind == "embedding"]
        if off:
            raise FileError(f"PEFT has no lora_bias next to adapters on embeddings: {some(sorted(off))}")
        for layer in layers.values():
            layer.tensors.setdefault(
                "lora_B.bias", layer.tensors["lora_B.weight"].new_zeros(layer.geometry.out_features)
            )
    linear = [layer.geometry.transposed for layer in layers.values() if layer.geometry.kind == "linear"]
    return config | ({"fan_in_fan_out": True} if linear and all(linear) else {})


def _encode_loha(path: str, stack: tuple[Entry, ...]) -> _PeftLayer:
    algorithm, g, p = stack[0]
    assert isinstance(algorithm, LoHa)
    tensors = {f"hada_{name}": tensor for name, tensor in algorithm.export_tensors(p, g).items()}
    return _PeftLayer(g, _flatten_cores(tensors, g), algorithm.rank, algorithm.scale(g) * algorithm.rank)


def _make_loha_settings(layers: dict[str, _PeftLayer]) -> dict[str, Any]:
    kernels = {path: layer for path, layer in layers.items() if layer.geometry.kernel and not layer.geometry.pointwise}
    tucker = [path for path, layer in kernels.items() if "hada_t1" in layer.tensors]
    if tucker and len(tucker) < len(kernels):
        plain = some(sorted(kernels.keys() - set(tucker)))
        raise FileError(
            f"PEFT has one switch (use_effective_conv2d) for all convolutions: {some(sorted(tucker))} have Tucker "
            f"cores, {plain} have none. Write one folder for each"
        )
    return _make_rank_patterns(layers, "alpha") | {"use_effective_conv2d": bool(tucker)}


def _encode_lokr(path: str, stack: tuple[Entry, ...]) -> _PeftLayer:
    algorithm, g, p = stack[0]
    assert isinstance(algorithm, LoKr)
    tensors = {f"lokr_{name}": tensor for name, tensor in algorithm.export_tensors(p, g).items()}
    return _PeftLayer(
        g, _flatten_cores(tensors, g), extra={"factors": _describe_factors(stack[0]), "scale": algorithm.scale(g)}
    )


def _describe_factors(entry: Entry) -> LokrFactors:
    algorithm, g, p = entry
    assert isinstance(algorithm, LoKr)
    ol, im, w1_split, w2_split, _ = algorithm.layout_for(g)
    return LokrFactors(g, ol, im, algorithm.rank, w1_split, w2_split, "t2" in p)


def _make_lokr_settings(layers: dict[str, _PeftLayer]) -> dict[str, Any]:
    config, ranks = choose_lokr_settings({path: layer.extra["factors"] for path, layer in layers.items()})
    for path, layer in layers.items():
        layer.rank, layer.alpha = ranks[path], layer.extra["scale"] * ranks[path]
    return _make_rank_patterns(layers, "alpha") | config


def _flatten_cores(tensors: dict[str, Tensor], g: Geometry) -> dict[str, Tensor]:
    """PEFT's cores have two kernel dimensions, of a Conv1d too."""
    cores = ("hada_t1", "hada_t2", "lokr_t2")
    return {name: t.unsqueeze(-1) if name in cores and len(g.kernel) == 1 else t for name, t in tensors.items()}


def _encode_ia3(path: str, stack: tuple[Entry, ...]) -> _PeftLayer:
    algorithm, g, p = stack[0]
    assert isinstance(algorithm, IA3)
    factors = 1 + p["w"].flatten()
    shape = (1, -1, *(1,) * len(g.kernel)) if g.kernel or algorithm.on_input else (-1, 1)
    return _PeftLayer(g, {"ia3_l": factors.reshape(shape)}, extra={"on_input": algorithm.on_input})


def _make_ia3_settings(layers: dict[str, _PeftLayer]) -> dict[str, Any]:
    into = sorted(path for path, layer in layers.items() if layer.extra["on_input"])
    # PEFT takes any path that ends with one of these letters; a pattern takes whole paths.
    mixed = any(path.endswith(name) for path in layers.keys() - set(into) for name in into)
    pattern = "|".join(map(re.escape, into))
    return {"feedforward_modules": pattern if mixed else into}


def _make_rank_patterns(layers: dict[str, _PeftLayer], alpha: str) -> dict[str, Any]:
    """The most common rank and alpha, and the layers that have others."""
    (r, _), *_ = Counter(layer.rank for layer in layers.values()).most_common()
    (usual, _), *_ = Counter(layer.alpha for layer in layers.values()).most_common()
    # From the start of the path: a pattern alone would take every path that ends with it.
    return {
        "r": r,
        alpha: _to_number(usual),
        "rank_pattern": {f"^{re.escape(path)}": each.rank for path, each in layers.items() if each.rank != r},
        "alpha_pattern": {
            f"^{re.escape(path)}": _to_number(each.alpha) for path, each in layers.items() if each.alpha != usual
        },
    }


def _to_number(number: float) -> float | int:
    return int(number) if number == int(number) else number


_ENCODERS: Mapping[str, Callable[[str, tuple[Entry, ...]], _PeftLayer]] = {
    "LORA": _encode_lora,
    "LOHA": _encode_loha,
    "LOKR": _encode_lokr,
    "IA3": _encode_ia3,
}
_SETTINGS: Mapping[str, Callable[[dict[str, _PeftLayer]], dict[str, Any]]] = {
    "LORA": _make_lora_settings,
    "LOHA": _make_loha_settings,
    "LOKR": _make_lokr_settings,
    "IA3": _make_ia3_settings,
}
