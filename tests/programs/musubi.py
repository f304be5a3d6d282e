"""musubi-tuner's merging: by the first algorithm that a file has; what it has no use for is one warning."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from programs import Kind, Read, Refused, Tensors, number


def detected(names: Iterable[str]) -> str:
    """The algorithm that it takes all of a file for."""
    for name in names:
        for part, algorithm in (("lora_down", "lora"), ("hada_w1_a", "loha"), ("lokr_w1", "lokr")):
            if part in name:
                return algorithm
    return "lora"


def read(
    tensors: Tensors, weight: Tensor, bias: Tensor | None, kind: Kind, strength: float = 1.0, taken_for: str = ""
) -> Read | None:
    change = _change(tensors, weight, taken_for or detected(tensors)) if kind in ("linear", "conv") else None
    if change is None:
        return None
    try:
        after = weight + strength * change
    except RuntimeError as error:
        raise Refused(str(error)) from error
    if after.shape != weight.shape:
        raise Refused(f"a weight of shape {tuple(after.shape)}")
    return after, bias


def _change(tensors: Tensors, weight: Tensor, taken_for: str) -> Tensor | None:
    alpha = number(tensors, "alpha")
    if taken_for == "lora":
        if not {"lora_down.weight", "lora_up.weight"} <= tensors.keys():
            return None
        up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
        return _product(up, down, weight) * (1.0 if alpha is None else alpha / len(down))
    if taken_for == "loha":
        if "hada_w1_a" not in tensors:
            return None
        factors = [tensors[f"hada_w{n}_{side}"] for n in (1, 2) for side in "ab"]
        if factors[0].shape[1] != factors[1].shape[0]:
            raise Refused("factors of a core")
        rank = len(factors[1])
        return (factors[0] @ factors[1]) * (factors[2] @ factors[3]) * (1.0 if alpha is None else alpha / rank)
    if "lokr_w1" not in tensors or not {"lokr_w2", "lokr_w2_a"} & tensors.keys():
        return None
    w1, scale = tensors["lokr_w1"], 1.0
    if "lokr_w2_a" in tensors:
        a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        if a.shape[1] != b.shape[0]:
            raise Refused("factors of a core")
        w2, scale = a @ b, 1.0 if alpha is None else alpha / a.shape[1]
    else:
        w2 = tensors["lokr_w2"]
    return torch.kron(w1.reshape(*w1.shape, *(1,) * (w2.dim() - 2)), w2.contiguous()) * scale


def _product(up: Tensor, down: Tensor, weight: Tensor) -> Tensor:
    if weight.dim() == 2:
        return up @ down
    if weight.dim() != 4:
        raise Refused("its convolutions have two dimensions")
    if down.shape[2:] == (1, 1):
        return (up.flatten(1) @ down.flatten(1))[..., None, None]
    return torch.einsum("or,rikl->oikl", up[..., 0, 0], down)
