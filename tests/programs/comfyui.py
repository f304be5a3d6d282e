"""ComfyUI: per layer LoRA, LoHa, LoKr, GLoRA, OFT, BOFT in this order; norms; whole differences; whole weights.

A difference of the bias is taken beside any of them. Its products are of two matrices, not of stacks of them.
`quiet=False` is for programs that took its code and pass exceptions on.
"""

from __future__ import annotations

import torch
from torch import Tensor

from programs import Kind, Read, Refused, Tensors, moved, number


def read(
    tensors: Tensors,
    weight: Tensor,
    bias: Tensor | None,
    kind: Kind,
    strength: float = 1.0,
    *,
    quiet: bool = True,
    rotations: bool = True,
) -> Read | None:
    if "set_weight" in tensors or "bias.set_weight" in tensors:
        # These stand last, and at any strength: what else there is for the same tensor is forgotten.
        others = {name: tensor for name, tensor in tensors.items() if not name.endswith("set_weight")}
        found = read(others, weight, bias, kind, strength, quiet=quiet, rotations=rotations) or (weight, bias)
        whole = tensors.get("set_weight")
        stored = whole.T if whole is not None and kind == "embedding" else whole
        return found[0] if stored is None else stored, found[1] if bias is None else tensors.get(
            "bias.set_weight", found[1]
        )
    if kind == "embedding":
        # Its table is (entries, outputs); the bias is nobody's.
        found = _read(tensors, weight.T, None, strength, quiet=quiet, rotations=rotations)
        return None if found is None or torch.equal(found[0], weight.T) else (found[0].T, bias)
    return _read(tensors, weight, bias, strength, quiet=quiet, rotations=rotations)


def _read(
    tensors: Tensors, weight: Tensor, bias: Tensor | None, strength: float, *, quiet: bool, rotations: bool
) -> Read | None:
    known = {"lora_up.weight": _lora, "hada_w1_a": _loha, "lokr_w1": _lokr, "lokr_w1_a": _lokr, "a1.weight": _glora}
    if rotations:
        known["oft_blocks"] = _boft if "oft_blocks" in tensors and tensors["oft_blocks"].dim() == 4 else _oft
    try:
        for name, evaluate in known.items():
            if name in tensors:
                return evaluate(tensors, weight, strength), _shifted(bias, tensors.get("diff_b"), strength)
    except (RuntimeError, TypeError) as error:
        if quiet:
            return None
        raise Refused(str(error)) from error
    if "diff" in tensors and tensors["diff"].shape != weight.shape:
        return None
    if "w_norm" in tensors:
        return weight + strength * tensors["w_norm"], _shifted(bias, tensors.get("b_norm"), strength)
    if "diff" in tensors or "diff_b" in tensors:
        whole = weight + strength * tensors["diff"] if "diff" in tensors else weight
        return whole, _shifted(bias, tensors.get("diff_b"), strength)
    return None


def _shifted(bias: Tensor | None, change: Tensor | None, strength: float) -> Tensor | None:
    """What is meant for a bias that the model does not have is left out."""
    return None if bias is None else moved(bias, change, strength)


def _added(tensors: Tensors, weight: Tensor, change: Tensor, scale: float, strength: float) -> Tensor:
    if "dora_scale" not in tensors:
        return weight + strength * scale * change
    lengths, whole = tensors["dora_scale"], weight + scale * change
    if lengths.shape[0] == weight.shape[0]:
        # The lengths of the weight below, not of the adapted one.
        norm = weight.flatten(1).norm(dim=1).reshape(-1, *(1,) * (weight.dim() - 1))
    else:
        norm = whole.transpose(0, 1).flatten(1).norm(dim=1).reshape(1, -1, *(1,) * (weight.dim() - 2))
    whole = whole * (lengths / norm)
    return weight + strength * (whole - weight)


def _scale(tensors: Tensors, rank: int | None) -> float:
    alpha = number(tensors, "alpha")
    return 1.0 if alpha is None or rank is None else alpha / rank


def _core(core: Tensor, into: Tensor, out: Tensor) -> Tensor:
    if core.dim() != 4:
        raise Refused("a core of two kernel dimensions was expected")
    return torch.einsum("ijkl,jr,ip->prkl", core, into, out)


def _lora(tensors: Tensors, weight: Tensor, strength: float) -> Tensor:
    up, down = tensors["lora_up.weight"], tensors["lora_down.weight"]
    rank = down.shape[0]
    if "lora_mid.weight" in tensors:
        mid = tensors["lora_mid.weight"]
        if mid.dim() != 4:
            raise Refused("a core of two kernel dimensions was expected")
        shape = (down.shape[1], rank, *mid.shape[2:])
        down = (down.transpose(0, 1).flatten(1) @ mid.transpose(0, 1).flatten(1)).reshape(shape).transpose(0, 1)
    change = up.flatten(1).mm(down.flatten(1)).reshape(weight.shape)
    return _added(tensors, weight, change, _scale(tensors, rank), strength)


def _loha(tensors: Tensors, weight: Tensor, strength: float) -> Tensor:
    parts = []
    for n in (1, 2):
        a, b = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]
        parts.append(_core(tensors[f"hada_t{n}"], b, a) if "hada_t1" in tensors else a.mm(b))
    change = (parts[0] * parts[1]).reshape(weight.shape)
    return _added(tensors, weight, change, _scale(tensors, tensors["hada_w1_b"].shape[0]), strength)


def _lokr(tensors: Tensors, weight: Tensor, strength: float) -> Tensor:
    rank = None
    if "lokr_w1" in tensors:
        w1 = tensors["lokr_w1"]
    else:
        rank, w1 = tensors["lokr_w1_b"].shape[0], tensors["lokr_w1_a"].mm(tensors["lokr_w1_b"])
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"]
    else:
        a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        rank, w2 = b.shape[0], _core(tensors["lokr_t2"], b, a) if "lokr_t2" in tensors else a.mm(b)
    if w2.dim() == 4:
        w1 = w1[:, :, None, None]
    # With a w2 of 3 or 5 dimensions this pairs the wrong axes, and reshape hides it.
    change = torch.kron(w1, w2).reshape(weight.shape)
    return _added(tensors, weight, change, _scale(tensors, rank), strength)


def _glora(tensors: Tensors, weight: Tensor, strength: float) -> Tensor:
    a1, a2, b1, b2 = (tensors[f"{name}.weight"] for name in ("a1", "a2", "b1", "b2"))
    old = b2.shape[1] == b1.shape[0] == a1.shape[0] == a2.shape[1]
    rank = a1.shape[0]
    square = weight.shape[0] == weight.shape[1] == a2.shape[0]
    if b2.shape[0] == b1.shape[1] == a1.shape[1] == a2.shape[0] and not (old and square):
        old, rank = False, a2.shape[0]
    a1, a2, b1, b2 = a1.flatten(1), a2.flatten(1), b1.flatten(1), b2.flatten(1)
    if old:
        change = b2.mm(b1) + weight.flatten(1).mm(a2).mm(a1)
    else:
        change = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2) + b1.mm(b2).reshape(weight.shape)
    return _added(tensors, weight, change.reshape(weight.shape), _scale(tensors, rank), strength)


def _rotations(tensors: Tensors) -> tuple[Tensor, Tensor]:
    blocks, limit = tensors["oft_blocks"], number(tensors, "alpha")
    if limit is None:
        if blocks.dim() == 4:
            raise TypeError("'>' not supported between None and 0")
        limit = 0.0
    q, eye = blocks - blocks.transpose(-1, -2), torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    norm = q.norm() + 1e-8
    if limit > 0 and norm > limit:
        q = q * limit / norm
    return (eye + q) @ (eye - q).inverse(), eye


def _oft(tensors: Tensors, weight: Tensor, strength: float) -> Tensor:
    turn, eye = _rotations(tensors)
    rows = weight.reshape(*turn.shape[:2], *weight.shape[1:])
    change = torch.einsum("knm,kn...->km...", turn * strength - eye * strength, rows).reshape(weight.shape)
    return _added(tensors, weight, change, 1.0, strength)


def _boft(tensors: Tensors, weight: Tensor, strength: float) -> Tensor:
    turns, eye = _rotations(tensors)
    size, rows = turns.shape[-1], weight
    for i, turn in enumerate(turns):
        mixed, apart = turn * strength + (1 - strength) * eye, 2**i * size // 2
        rows = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
        rows = torch.einsum("bij,bj...->bi...", mixed, rows)
        rows = rows.flatten(0, 1).unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    if "rescale" in tensors:
        rows = rows * tensors["rescale"]
    return _added(tensors, weight, rows - weight, 1.0, strength)
