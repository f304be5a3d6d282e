"""musubi-tuner: LoRA, LoHa and LoKr on linear layers, without cores, lengths, or a split w1."""

from __future__ import annotations

import torch
from torch import Tensor

from consumers import Kind, Read, Refused, Tensors, number

KNOWN = (
    {"lora_up.weight", "lora_down.weight"},
    {"hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"},
    {"lokr_w1", "lokr_w2"},
    {"lokr_w1", "lokr_w2_a", "lokr_w2_b"},
)


def read(tensors: Tensors, weight: Tensor, bias: Tensor | None, kind: Kind, strength: float = 1.0) -> Read | None:
    names = tensors.keys() - {"alpha"}
    if kind != "linear":
        return None
    if names not in KNOWN:
        raise Refused(f"no network of {sorted(names)}")
    rank = None
    if "lora_up.weight" in tensors:
        rank, change = tensors["lora_down.weight"].shape[0], tensors["lora_up.weight"] @ tensors["lora_down.weight"]
    elif "hada_w1_a" in tensors:
        rank = tensors["hada_w1_b"].shape[0]
        change = (tensors["hada_w1_a"] @ tensors["hada_w1_b"]) * (tensors["hada_w2_a"] @ tensors["hada_w2_b"])
    elif "lokr_w2" in tensors:
        change = torch.kron(tensors["lokr_w1"], tensors["lokr_w2"])
    else:
        rank = tensors["lokr_w2_b"].shape[0]
        change = torch.kron(tensors["lokr_w1"], tensors["lokr_w2_a"] @ tensors["lokr_w2_b"])
    alpha = number(tensors, "alpha")
    scale = 1.0 if alpha is None or rank is None else alpha / rank
    return weight + strength * scale * change.reshape(weight.shape), bias
