"""What the tensors of one layer are in the library's terms, by `peft_type`."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from lycoris.adapters import attach, merging
from lycoris.algorithms import Full, Norm
from lycoris.algorithms.base import Entry
from lycoris.algorithms.tensors import read_tensors
from lycoris.errors import FileError, prefix_errors
from lycoris.files.peft.config import Config
from lycoris.files.peft.rotations import boft_rotation, oft_rotation
from lycoris.layers.geometry import Affine, Geometry
from lycoris.layers.sites import Site
from lycoris.ops.rounding import widen

Named = Mapping[str, Tensor]


def entries_of(config: Config, place: Site, tensors: Named, bias: Tensor | None) -> tuple[Entry, ...]:
    """The stack of one layer. `bias` is the layer's whole bias, where PEFT trained it.

    Raises `FileError` when the tensors do not fit, or when PEFT does something there that no weight does.
    """
    g, path = place.geometry, place.path
    entries: tuple[Entry, ...] = ()
    if tensors:
        why = unlike(config.type, g)
        if why:
            raise FileError(f"{path}: {why}; merge the adapter into the model with PEFT instead")
        entries = _READERS[config.type](config, place, tensors)
    if bias is None:
        return entries
    own = base_of(place).bias
    assert own is not None, "only biases that the model has are taken for biases"
    change = _same(bias, (own.numel(),), f"{path}.bias") - own.flatten()
    if g.kind == "norm":
        return (Entry(Norm(), g, {"w": torch.zeros(g.shape, dtype=change.dtype), "b": change.reshape(g.shape)}),)
    return (*entries, _bias(g, change))


def unlike(type_: str, g: Geometry) -> str:
    """Why PEFT does not do on such a layer what its weight would; empty where it does."""
    kinds = {
        "LORA": ("linear", "conv", "embedding"),
        "LOHA": ("linear", "conv"),
        "LOKR": ("linear", "conv"),
        "IA3": ("linear", "conv"),
        "OFT": ("linear", "conv", "embedding"),
        "BOFT": ("linear", "conv"),
    }[type_]
    dimensions = {"LORA": (1, 2, 3), "LOHA": (1, 2), "LOKR": (1, 2), "IA3": (2, 3), "OFT": (2,), "BOFT": (2,)}[type_]
    turned = g.kind == "linear" and g.transposed and type_ not in ("LORA", "IA3")
    if g.kind not in kinds or turned or (g.kind == "conv" and len(g.kernel) not in dimensions):
        return f"PEFT has no {type_} for this {g}"
    if g.kind != "conv":
        return ""
    if type_ not in ("IA3", "OFT") and g.padding_mode != "zeros":
        return f"PEFT pads with zeros beside a convolution that pads with {g.padding_mode}"
    if type_ in ("LORA", "OFT", "BOFT") and any(step != 1 for step in g.dilation):
        return f"PEFT leaves the dilation of a convolution out in its {type_}"
    if type_ in ("OFT", "BOFT") and (g.groups > 1 or len(set(g.kernel)) > 1):
        return f"PEFT turns all channels of a convolution in square windows, and this one is {g} of {g.groups} groups"
    uneven = len(set(g.stride)) > 1 or isinstance(g.padding, str) or len(set(g.padding)) > 1
    return "PEFT's BOFT takes one stride and one padding for both directions" if type_ == "BOFT" and uneven else ""


def _lora(config: Config, place: Site, tensors: Named) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    a, b = ("lora_embedding_A", "lora_embedding_B") if g.kind == "embedding" else ("lora_A", "lora_B")
    names = {a: "lora_down.weight", b: "lora_up.weight", "lora_magnitude_vector": "dora_scale", f"{b}.bias": ""}
    named = _rename_tensors(names, tensors, path)
    shift = named.pop("", None)
    _check_rank(config, path, named.get("lora_down.weight"))
    if config.flag("use_dora") != ("dora_scale" in named):
        raise FileError(f"{path}: use_dora is {config.flag('use_dora')}, and lora_magnitude_vector says otherwise")
    if "dora_scale" in named:
        named["dora_scale"] = _same(named["dora_scale"], (g.out_features,), path).reshape(-1, *[1] * (len(g.shape) - 1))
    if g.groups > 1:
        named |= _split_groups(named["lora_down.weight"], named["lora_up.weight"], g, path)
    alpha = config.scale(path) * named["lora_down.weight"].shape[0]
    named["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    entry = _read(named, g, path)
    if shift is None:
        return (entry,)
    if not g.has_bias and not shift.any():
        return (entry,)
    if not g.has_bias:
        raise FileError(f"{path}: lora_bias adds a bias to a layer that has none, which adapters here cannot")
    return entry, _bias(g, shift * config.scale(path))


def _split_groups(down: Tensor, up: Tensor, g: Geometry, path: str) -> dict[str, Tensor]:
    """PEFT's `lora_A` of a grouped convolution sees all channels, and each group has ranks of its own.

    That is a change of the layer's weight only where each group's ranks see no more than its channels.
    """
    each = len(down) // g.groups
    shape = (g.groups, each, g.groups, g.in_features, *g.kernel)
    if down.numel() != math.prod(shape) or up.shape[:2] != (g.out_features, each):
        raise FileError(f"{path}: {tuple(down.shape)} and {tuple(up.shape)} are no factors of a {g}")
    blocks = down.reshape(shape)
    own = torch.stack([block[:, at] for at, block in enumerate(blocks)])
    if torch.count_nonzero(blocks) > torch.count_nonzero(own):
        raise FileError(
            f"{path}: PEFT's LoRA mixes all channels of a convolution of {g.groups} groups, which its weight cannot; "
            "merge the adapter into the model with PEFT instead"
        )
    if all(torch.equal(block, own[0]) for block in own):
        return {"lora_down.weight": own[0], "lora_up.weight": up}
    wide = up.new_zeros(g.groups, g.out_features // g.groups, g.groups, each)
    for at, rows in enumerate(up.reshape(g.groups, -1, each)):
        wide[at, :, at] = rows
    return {"lora_down.weight": own.flatten(0, 1), "lora_up.weight": wide.reshape(g.out_features, -1)}


def _loha(config: Config, place: Site, tensors: Named) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    named = {name: _wide(tensor) for name, tensor in tensors.items()}
    _check_rank(config, path, named.get("hada_w1_b"))
    named["alpha"] = torch.tensor(config.alpha(path), dtype=torch.float64)
    return (_read(named, g, path),)


def _lokr(config: Config, place: Site, tensors: Named) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    named = {name: _wide(tensor) for name, tensor in tensors.items()}
    split = [name for name in ("lokr_w2_b", "lokr_w1_b") if name in named]
    for name in split:
        _check_rank(config, path, named[name])
    w1, w2 = named.get("lokr_w1"), named.get("lokr_w2")
    if g.kind == "conv" and len(g.kernel) == 1 and w2 is not None:
        # PEFT multiplies a whole w2 of a Conv1d along other axes, and reshapes: a weight, though none of LoKr's.
        first = named["lokr_w1_a"] @ named["lokr_w1_b"] if w1 is None else w1
        weight = torch.kron(first, w2) * config.scale(path)
        if weight.numel() != g.size:
            raise FileError(f"{path}: {tuple(first.shape)} and {tuple(w2.shape)} make no weight of a {g}")
        return (_dense(g, weight.reshape(g.shape)),)
    if not split and w1 is not None:
        named["lokr_w1"] = w1 * config.scale(path)
    else:
        named["alpha"] = torch.tensor(config.alpha(path), dtype=torch.float64)
    return (_read(named, g, path),)


def _ia3(config: Config, place: Site, tensors: Named) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    on_input = config.on_input(path)
    w = _wide(tensors["ia3_l"]).flatten() - 1
    entry = _read({"weight": w, "on_input": torch.tensor(int(on_input))}, g, path)
    if on_input or not g.has_bias:
        return (entry,)
    # PEFT scales the output, and its bias with it.
    bias = base_of(place).bias
    assert bias is not None
    return entry, _bias(g, bias * w)


def _oft(config: Config, place: Site, tensors: Named) -> tuple[Entry, ...]:
    g = place.geometry
    embedded = g.kind == "embedding"
    named = _rename_tensors({"oft_embedding_R" if embedded else "oft_R": "R"}, tensors, place.path)
    weight = base_of(place).weight
    turn = _turn(oft_rotation, place, named["R"].double(), g.out_features if embedded else g.fan_in, config)
    wide = weight.double()
    turned = turn.T @ wide if embedded else (wide.flatten(1) @ turn.T).reshape(g.shape)
    return (_dense(g, (turned - wide).to(weight.dtype)),)


def _boft(config: Config, place: Site, tensors: Named) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    named = _rename_tensors({"boft_R": "R", "boft_s": "s"}, tensors, path)
    weight = base_of(place).weight
    turn = _turn(boft_rotation, place, named["R"].double())
    if len(turn) != g.fan_in:
        raise FileError(f"{path}: boft_R of shape {tuple(named['R'].shape)} does not turn {g.fan_in} features")
    length = _same(named["s"], (g.out_features,), f"{path}.boft_s").double()
    wide = weight.double()
    turned = ((wide.flatten(1) @ turn.T) * length.unsqueeze(1)).reshape(g.shape)
    return (_dense(g, (turned - wide).to(weight.dtype)),)


_READERS: Mapping[str, Callable[[Config, Site, Named], tuple[Entry, ...]]] = {
    "LORA": _lora,
    "LOHA": _loha,
    "LOKR": _lokr,
    "IA3": _ia3,
    "OFT": _oft,
    "BOFT": _boft,
}


def _rename_tensors(names: Mapping[str, str], tensors: Named, path: str) -> dict[str, Tensor]:
    """Tensors under other names. Raises `FileError` for one that this kind of layer has no place for."""
    strange = sorted(tensors.keys() - names.keys())
    missing = [name for name in list(names)[:2] if name not in tensors and not name.endswith("bias")]
    if strange or missing:
        what = f"has no place for {', '.join(strange)}" if strange else f"needs {', '.join(missing)}"
        raise FileError(f"{path}: this layer {what}; given are {', '.join(sorted(tensors))}")
    return {names[name]: _wide(tensor) for name, tensor in tensors.items()}


def _read(named: Named, g: Geometry, path: str) -> Entry:
    algorithm, tensors = read_tensors(named, g, path)
    return Entry(algorithm, g, tensors)


def _check_rank(config: Config, path: str, ranks: Tensor | None) -> None:
    if ranks is not None and ranks.shape[0] != config.rank(path):
        raise FileError(f"{path}: the config says rank {config.rank(path)}, its tensors have {ranks.shape[0]}")


def _same(tensor: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    if tensor.numel() != shape[0]:
        raise FileError(f"{where} has shape {tuple(tensor.shape)}; {shape} is needed")
    return _wide(tensor).reshape(shape)


def base_of(place: Site) -> Affine:
    """The layer's own weight and bias, in float32 or better."""
    if any(tensor.is_meta for tensor in place.module.parameters(recurse=False)):
        raise FileError(f"{place.path}: its base weight is needed to read this, and the model is on the meta device")
    if merging.is_merged(place.module):
        raise FileError(f"{place.path}: its base weight is needed to read this, and adapters are merged into it")
    affine = attach.bottom(place).affine()
    return Affine(_wide(affine.weight.detach()), None if affine.bias is None else _wide(affine.bias.detach()))


def _bias(g: Geometry, change: Tensor) -> Entry:
    return Entry(Full(weight=False), g, {"diff_b": change})


def _dense(g: Geometry, change: Tensor) -> Entry:
    return Entry(Full(bias=False), g, {"diff": g.transpose_stored(change).contiguous()})


def _turn(make: Callable[..., Tensor], place: Site, *args: Any) -> Tensor:
    with prefix_errors(place.path):
        return make(*args)


def _wide(tensor: Tensor) -> Tensor:
    """In float32 or better, on the CPU."""
    return widen(tensor.detach().cpu())
