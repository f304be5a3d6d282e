"""InvokeAI: the layer's type by the first of some keys that is there; what has none of them stops the loading."""

from __future__ import annotations

import torch
from torch import Tensor

from programs import Kind, Read, Refused, Tensors, moved, number


def read(tensors: Tensors, weight: Tensor, bias: Tensor | None, kind: Kind, strength: float = 1.0) -> Read | None:
    if kind in ("embedding", "parameter"):
        return None
    other = None
    try:
        if "dora_scale" in tensors:
            change = _dora(tensors, weight)
        elif "lora_up.weight" in tensors:
            change = _scaled(tensors, _lora(tensors), tensors["lora_down.weight"].shape[0])
        elif "hada_w1_b" in tensors or "hada_t1" in tensors:
            change = _scaled(tensors, _loha(tensors), tensors["hada_w1_b"].shape[0])
        elif "lokr_w1" in tensors or "lokr_w1_a" in tensors:
            change = _scaled(tensors, *_lokr(tensors))
        elif "diff" in tensors:
            change, other = tensors["diff"], tensors.get("diff_b")
        elif "on_input" in tensors:
            change = weight * (tensors["weight"] if bool(tensors["on_input"]) else tensors["weight"].reshape(-1, 1))
        elif "w_norm" in tensors:
            change, other = tensors["w_norm"], tensors.get("b_norm")
        else:
            raise Refused(f"unsupported lora format: {sorted(tensors)}")
        change = change.reshape(weight.shape)
    except (RuntimeError, KeyError) as error:
        raise Refused(f"{type(error).__name__}: {error}") from error
    return weight + strength * change, moved(bias, other, strength)


def _scaled(tensors: Tensors, change: Tensor, rank: int | None) -> Tensor:
    alpha = number(tensors, "alpha")
    return change if alpha is None or rank is None else change * (alpha / rank)


def _dora(tensors: Tensors, weight: Tensor) -> Tensor:
    # Over all axes but the second, whatever the shape of the lengths; and over LoRA only.
    up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
    change = (up.flatten(1) @ down.flatten(1)).reshape(weight.shape)
    whole = weight + _scaled(tensors, change, down.shape[0])
    norm = whole.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1,) * (weight.dim() - 2))
    return whole * (tensors["dora_scale"] / norm) - weight


def _core(core: Tensor, into: Tensor, out: Tensor) -> Tensor:
    if core.dim() != 4:
        raise Refused("a core of two kernel dimensions was expected")
    return torch.einsum("ijkl,jr,ip->prkl", core, into, out)


def _lora(tensors: Tensors) -> Tensor:
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"].flatten(1)
    if "lora_mid.weight" in tensors:
        return _core(tensors["lora_mid.weight"], down, up.T)
    return up @ down


def _loha(tensors: Tensors) -> Tensor:
    parts = []
    for n in (1, 2):
        a, b = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]
        parts.append(_core(tensors[f"hada_t{n}"], b, a) if "hada_t1" in tensors else a @ b)
    return parts[0] * parts[1]


def _lokr(tensors: Tensors) -> tuple[Tensor, int | None]:
    rank = None
    if "lokr_w1" in tensors:
        w1 = tensors["lokr_w1"]
    else:
        rank, w1 = tensors["lokr_w1_b"].shape[0], tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"]
    else:
        a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        rank, w2 = b.shape[0], _core(tensors["lokr_t2"], b, a) if "lokr_t2" in tensors else a @ b
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return torch.kron(w1, w2.contiguous()), rank
