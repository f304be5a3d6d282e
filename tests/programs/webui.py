"""The WebUI of AUTOMATIC1111, 1.10: LoRA, LoHa, IA³, LoKr, whole differences, norms, GLoRA, rotations; the first of
these that finds all of its keys. A layer that nothing fits rejects the whole file.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from programs import Kind, Read, Refused, Tensors, moved, number


def read(tensors: Tensors, weight: Tensor, bias: Tensor | None, kind: Kind, strength: float = 1.0) -> Read | None:
    if kind in ("embedding", "parameter"):
        return None
    change = next((change for keys, change in _TYPES if all(key in tensors for key in keys)), None)
    if change is None:
        raise Refused("could not find a module type")
    try:
        updown, own = change(tensors, weight, kind)
        if updown.numel() != weight.numel():
            raise Refused(f"shapes {tuple(updown.shape)} and {tuple(weight.shape)} differ")
        whole = _finished(tensors, updown.reshape(weight.shape), weight, own)
    except (RuntimeError, IndexError) as error:
        raise Refused(str(error)) from error
    other = tensors["b_norm"] if change is _norm else tensors.get("diff_b") if change is _full else None
    return weight + strength * whole, moved(bias, other, strength)


def _finished(tensors: Tensors, updown: Tensor, weight: Tensor, scale: float | None) -> Tensor:
    """`scale` None: the type knows no rank, so that only a tensor of that name could say one."""
    said = number(tensors, "scale")
    updown = updown * (said if said is not None else 1.0 if scale is None else scale)
    if "dora_scale" not in tensors:
        return updown
    whole = weight + updown
    # Over all axes but the second, whatever the shape of the lengths.
    norm = whole.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1,) * (weight.dim() - 2))
    return whole * (tensors["dora_scale"] / norm) - weight


Change = tuple[Tensor, float | None]


def _ratio(tensors: Tensors, rank: int | None) -> float | None:
    alpha = number(tensors, "alpha")
    return None if alpha is None or rank is None else alpha / rank


def _core(core: Tensor, into: Tensor, out: Tensor) -> Tensor:
    if core.dim() != 4:
        raise Refused("a core of two kernel dimensions was expected")
    return torch.einsum("ijkl,jr,ip->prkl", core, into, out)


def _lora(tensors: Tensors, weight: Tensor, kind: Kind) -> Change:
    if kind == "conv" and weight.dim() != 4:
        raise Refused("AssertionError: matched a layer with unsupported type")
    up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"]
    rank = down.shape[0]
    if "lora_mid.weight" in tensors:
        updown = torch.einsum("nmkl,in,mj->ijkl", tensors["lora_mid.weight"], up, down.flatten(1))
    else:
        updown = up @ down.flatten(1)
    return updown, _ratio(tensors, rank)


def _loha(tensors: Tensors, weight: Tensor, kind: Kind) -> Change:
    parts = []
    for n in (1, 2):
        a, b = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]
        parts.append(_core(tensors[f"hada_t{n}"], b, a) if "hada_t1" in tensors else a.flatten(1) @ b.flatten(1))
    return parts[0] * parts[1], _ratio(tensors, tensors["hada_w1_b"].shape[0])


def _ia3(tensors: Tensors, weight: Tensor, kind: Kind) -> Change:
    w = tensors["weight"] if bool(tensors["on_input"]) else tensors["weight"].reshape(-1, 1)
    return weight * w, None


def _lokr(tensors: Tensors, weight: Tensor, kind: Kind) -> Change:
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
    shape = weight.shape if weight.dim() == 4 else (w1.shape[0] * w2.shape[0], w1.shape[1] * w2.shape[1])
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    return torch.kron(w1, w2.contiguous()).reshape(shape), _ratio(tensors, rank)


def _full(tensors: Tensors, weight: Tensor, kind: Kind) -> Change:
    return tensors["diff"], None


def _norm(tensors: Tensors, weight: Tensor, kind: Kind) -> Change:
    return tensors["w_norm"], None


def _glora(tensors: Tensors, weight: Tensor, kind: Kind) -> Change:
    # Only the old layout, in which the second factors come first; and no rank, so no scale.
    a1, a2, b1, b2 = (tensors[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    return b2 @ b1 + (weight @ a2) @ a1, None


def _rotation(tensors: Tensors, weight: Tensor, kind: Kind) -> Change:
    blocks, limit = tensors["oft_blocks"], (number(tensors, "alpha") or 0.0) * weight.shape[0]
    q, eye = blocks - blocks.transpose(-1, -2), torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    if limit:
        norm = q.norm()
        q = q * ((norm.clamp(max=limit) + 1e-8) / (norm + 1e-8))
    turns, size = (eye + q) @ (eye - q).inverse(), blocks.shape[-1]
    if blocks.dim() == 3:
        rows = torch.einsum("knm,kn...->km...", turns, weight.unflatten(0, (-1, size))).flatten(0, 1)
    else:
        rows = weight
        for i, turn in enumerate(turns):
            apart = 2**i * size // 2
            rows = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            rows = torch.einsum("bij,bj...->bi...", turn, rows).flatten(0, 1)
            rows = rows.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return (tensors["rescale"] * rows if "rescale" in tensors else rows) - weight, None


_TYPES: tuple[tuple[tuple[str, ...], Callable[[Tensors, Tensor, Kind], Change]], ...] = (
    (("lora_up.weight", "lora_down.weight"), _lora),
    (("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"), _loha),
    (("weight", "on_input"), _ia3),
    (("lokr_w1",), _lokr),
    (("lokr_w1_a", "lokr_w1_b"), _lokr),
    (("diff",), _full),
    (("w_norm", "b_norm"), _norm),
    (("a1.weight", "a2.weight", "b1.weight", "b2.weight"), _glora),
    (("oft_blocks",), _rotation),
)
