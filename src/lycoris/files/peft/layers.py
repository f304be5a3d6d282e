"""Read the tensors of one PEFT layer as adapters of this library, by `peft_type`."""

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
from lycoris.files.peft.config import PeftConfig
from lycoris.files.peft.rotations import make_boft_rotation, make_oft_rotation
from lycoris.layers.geometry import Affine, Geometry
from lycoris.layers.sites import Site
from lycoris.ops.rounding import widen

NamedTensors = Mapping[str, Tensor]


def read_entries(config: PeftConfig, place: Site, tensors: NamedTensors, bias: Tensor | None) -> tuple[Entry, ...]:
    """Return the stack of one layer.

    Args:
        tensors: By PEFT's names; may be empty if only the bias was trained.
        bias: The layer's new bias, if PEFT trained it; None otherwise.

    Raises:
        FileError: The tensors do not fit, or PEFT computes something with them that is not a change of the weight.
    """
    g, path = place.geometry, place.path
    entries: tuple[Entry, ...] = ()
    if tensors:
        why = explain_unsupported(config.type, g)
        if why:
            raise FileError(f"{path}: {why}; merge the adapter into the model with PEFT instead")
        entries = _READERS[config.type](config, place, tensors)
    if bias is None:
        return entries
    own = read_base(place).bias
    assert own is not None, "only biases that the model has are taken for biases"
    change = _reshape_checked(bias, (own.numel(),), f"{path}.bias") - own.flatten()
    if g.kind == "norm":
        return (Entry(Norm(), g, {"w": torch.zeros(g.shape, dtype=change.dtype), "b": change.reshape(g.shape)}),)
    return (*entries, _make_bias_entry(g, change))


def explain_unsupported(type_: str, g: Geometry) -> str:
    """Return why PEFT does not compute on a layer what a changed weight would; "" if it does.

    `type_` is a `peft_type`. Covers kinds of layers PEFT does not support and convolutions that it runs with other
    padding, dilation or groups.
    """
    kinds = {
        "LORA": ("linear", "conv", "embedding"),
        "LOHA": ("linear", "conv"),
        "LOKR": ("linear", "conv"),
        "IA3": ("linear", "conv"),
        "OFT": ("linear", "conv", "embedding"),
        "BOFT": ("linear", "conv"),
    }[type_]
    dimensions = {"LORA": (1, 2, 3), "LOHA": (1, 2), "LOKR": (1, 2), "IA3": (2, 3), "OFT": (2,), "BOFT": (2,)}[type_]
    transposed = g.kind == "linear" and g.transposed and type_ not in ("LORA", "IA3")
    if g.kind not in kinds or transposed or (g.kind == "conv" and len(g.kernel) not in dimensions):
        return f"PEFT has no {type_} for this {g}"
    if g.kind != "conv":
        return ""
    if type_ not in ("IA3", "OFT") and g.padding_mode != "zeros":
        return f"PEFT pads with zeros next to a convolution that pads with {g.padding_mode}"
    if type_ in ("LORA", "OFT", "BOFT") and any(step != 1 for step in g.dilation):
        return f"PEFT leaves the dilation of a convolution out in its {type_}"
    if type_ in ("OFT", "BOFT") and (g.groups > 1 or len(set(g.kernel)) > 1):
        return f"PEFT rotates all channels of a convolution in square windows, and this one is {g} of {g.groups} groups"
    uneven = len(set(g.stride)) > 1 or isinstance(g.padding, str) or len(set(g.padding)) > 1
    return "PEFT's BOFT takes one stride and one padding for both directions" if type_ == "BOFT" and uneven else ""


def _read_lora(config: PeftConfig, place: Site, tensors: NamedTensors) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    a, b = ("lora_embedding_A", "lora_embedding_B") if g.kind == "embedding" else ("lora_A", "lora_B")
    names = {a: "lora_down.weight", b: "lora_up.weight", "lora_magnitude_vector": "dora_scale", f"{b}.bias": ""}
    named = _rename_layer_tensors(names, tensors, path)
    shift = named.pop("", None)
    _check_rank(config, path, named.get("lora_down.weight"))
    if config.get_flag("use_dora") != ("dora_scale" in named):
        raise FileError(f"{path}: use_dora is {config.get_flag('use_dora')}, and lora_magnitude_vector says otherwise")
    if "dora_scale" in named:
        named["dora_scale"] = _reshape_checked(named["dora_scale"], (g.out_features,), path).reshape(
            -1, *[1] * (len(g.shape) - 1)
        )
    if g.groups > 1:
        named |= _split_groups(named["lora_down.weight"], named["lora_up.weight"], g, path)
    alpha = config.get_scale(path) * named["lora_down.weight"].shape[0]
    named["alpha"] = torch.tensor(alpha, dtype=torch.float64)
    entry = _make_entry(named, g, path)
    if shift is None:
        return (entry,)
    if not g.has_bias and not shift.any():
        return (entry,)
    if not g.has_bias:
        raise FileError(f"{path}: lora_bias adds a bias to a layer that has none, which adapters here cannot")
    return entry, _make_bias_entry(g, shift * config.get_scale(path))


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


def _read_loha(config: PeftConfig, place: Site, tensors: NamedTensors) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    named = {name: _widen_on_cpu(tensor) for name, tensor in tensors.items()}
    _check_rank(config, path, named.get("hada_w1_b"))
    named["alpha"] = torch.tensor(config.get_alpha(path), dtype=torch.float64)
    return (_make_entry(named, g, path),)


def _read_lokr(config: PeftConfig, place: Site, tensors: NamedTensors) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    named = {name: _widen_on_cpu(tensor) for name, tensor in tensors.items()}
    split = [name for name in ("lokr_w2_b", "lokr_w1_b") if name in named]
    for name in split:
        _check_rank(config, path, named[name])
    w1, w2 = named.get("lokr_w1"), named.get("lokr_w2")
    if g.kind == "conv" and len(g.kernel) == 1 and w2 is not None:
        # PEFT multiplies an unsplit w2 of a Conv1d along other axes, and reshapes: a weight, though none of LoKr's.
        first = named["lokr_w1_a"] @ named["lokr_w1_b"] if w1 is None else w1
        weight = torch.kron(first, w2) * config.get_scale(path)
        if weight.numel() != g.size:
            raise FileError(f"{path}: {tuple(first.shape)} and {tuple(w2.shape)} make no weight of a {g}")
        return (_make_dense_entry(g, weight.reshape(g.shape)),)
    if not split and w1 is not None:
        named["lokr_w1"] = w1 * config.get_scale(path)
    else:
        named["alpha"] = torch.tensor(config.get_alpha(path), dtype=torch.float64)
    return (_make_entry(named, g, path),)


def _read_ia3(config: PeftConfig, place: Site, tensors: NamedTensors) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    on_input = config.is_on_input(path)
    w = _widen_on_cpu(tensors["ia3_l"]).flatten() - 1
    entry = _make_entry({"weight": w, "on_input": torch.tensor(int(on_input))}, g, path)
    if on_input or not g.has_bias:
        return (entry,)
    # PEFT scales the output, and its bias with it.
    bias = read_base(place).bias
    assert bias is not None
    return entry, _make_bias_entry(g, bias * w)


def _read_oft(config: PeftConfig, place: Site, tensors: NamedTensors) -> tuple[Entry, ...]:
    g = place.geometry
    embedded = g.kind == "embedding"
    named = _rename_layer_tensors({"oft_embedding_R" if embedded else "oft_R": "R"}, tensors, place.path)
    weight = read_base(place).weight
    rotation = _make_rotation(
        make_oft_rotation, place, named["R"].double(), g.out_features if embedded else g.fan_in, config
    )
    wide = weight.double()
    rotated = rotation.T @ wide if embedded else (wide.flatten(1) @ rotation.T).reshape(g.shape)
    return (_make_dense_entry(g, (rotated - wide).to(weight.dtype)),)


def _read_boft(config: PeftConfig, place: Site, tensors: NamedTensors) -> tuple[Entry, ...]:
    g, path = place.geometry, place.path
    named = _rename_layer_tensors({"boft_R": "R", "boft_s": "s"}, tensors, path)
    weight = read_base(place).weight
    rotation = _make_rotation(make_boft_rotation, place, named["R"].double())
    if len(rotation) != g.fan_in:
        raise FileError(f"{path}: boft_R of shape {tuple(named['R'].shape)} does not rotate {g.fan_in} features")
    magnitude = _reshape_checked(named["s"], (g.out_features,), f"{path}.boft_s").double()
    wide = weight.double()
    rotated = ((wide.flatten(1) @ rotation.T) * magnitude.unsqueeze(1)).reshape(g.shape)
    return (_make_dense_entry(g, (rotated - wide).to(weight.dtype)),)


_READERS: Mapping[str, Callable[[PeftConfig, Site, NamedTensors], tuple[Entry, ...]]] = {
    "LORA": _read_lora,
    "LOHA": _read_loha,
    "LOKR": _read_lokr,
    "IA3": _read_ia3,
    "OFT": _read_oft,
    "BOFT": _read_boft,
}


def _rename_layer_tensors(names: Mapping[str, str], tensors: NamedTensors, path: str) -> dict[str, Tensor]:
    """Tensors under other names. Raises `FileError` for one that this kind of layer has no place for."""
    strange = sorted(tensors.keys() - names.keys())
    missing = [name for name in list(names)[:2] if name not in tensors and not name.endswith("bias")]
    if strange or missing:
        what = f"has no place for {', '.join(strange)}" if strange else f"needs {', '.join(missing)}"
        raise FileError(f"{path}: this layer {what}; given are {', '.join(sorted(tensors))}")
    return {names[name]: _widen_on_cpu(tensor) for name, tensor in tensors.items()}


def _make_entry(named: NamedTensors, g: Geometry, path: str) -> Entry:
    algorithm, tensors = read_tensors(named, g, path)
    return Entry(algorithm, g, tensors)


def _check_rank(config: PeftConfig, path: str, ranks: Tensor | None) -> None:
    if ranks is not None and ranks.shape[0] != config.get_rank(path):
        raise FileError(f"{path}: the config says rank {config.get_rank(path)}, its tensors have {ranks.shape[0]}")


def _reshape_checked(tensor: Tensor, shape: tuple[int, ...], where: str) -> Tensor:
    if tensor.numel() != shape[0]:
        raise FileError(f"{where} has shape {tuple(tensor.shape)}; {shape} is needed")
    return _widen_on_cpu(tensor).reshape(shape)


def read_base(place: Site) -> Affine:
    """Return the layer's own weight and bias, in float32 or wider, on the CPU.

    Raises:
        FileError: The model is on the meta device, or has adapters merged into this layer.
    """
    if any(tensor.is_meta for tensor in place.module.parameters(recurse=False)):
        raise FileError(f"{place.path}: its base weight is needed to read this, and the model is on the meta device")
    if merging.is_merged(place.module):
        raise FileError(f"{place.path}: its base weight is needed to read this, and adapters are merged into it")
    affine = attach.bottom(place).affine()
    return Affine(
        _widen_on_cpu(affine.weight.detach()), None if affine.bias is None else _widen_on_cpu(affine.bias.detach())
    )


def _make_bias_entry(g: Geometry, change: Tensor) -> Entry:
    return Entry(Full(weight=False), g, {"diff_b": change})


def _make_dense_entry(g: Geometry, change: Tensor) -> Entry:
    return Entry(Full(bias=False), g, {"diff": g.transpose_stored(change).contiguous()})


def _make_rotation(make: Callable[..., Tensor], place: Site, *args: Any) -> Tensor:
    with prefix_errors(place.path):
        return make(*args)


def _widen_on_cpu(tensor: Tensor) -> Tensor:
    """In float32 or better, on the CPU."""
    return widen(tensor.detach().cpu())
