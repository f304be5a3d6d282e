"""SimpleTuner, which trains and loads through LyCORIS 4.1.3: its forward, and what it cannot load again."""

from __future__ import annotations

import torch
from torch import Tensor

from programs import Kind, Read, Refused, Tensors, moved, number


def read(tensors: Tensors, weight: Tensor, bias: Tensor | None, kind: Kind, strength: float = 1.0) -> Read | None:
    if kind in ("embedding", "parameter"):
        return None
    if "oft_blocks" in tensors:
        return _turned(tensors, weight, strength), bias
    if "w_norm" in tensors:
        if bias is None:
            raise Refused("NormModule is for torch's LayerNorm and GroupNorm, and RMSNorm is none of them")
        return weight + strength * tensors["w_norm"], moved(bias, tensors.get("b_norm"), strength)
    if "diff" in tensors:
        return weight + strength * tensors["diff"], moved(bias, tensors.get("diff_b"), strength)
    if "on_input" in tensors:
        raise Refused("TypeError on loading IA3")
    change = _change(tensors, weight)
    return None if change is None else (_added(tensors, weight, change, strength), bias)


def _change(tensors: Tensors, weight: Tensor) -> Tensor | None:
    """ΔW with its scale; None where no module is recognised."""
    places = weight.shape[2:]
    if "lora_up.weight" in tensors:
        up, down = tensors["lora_up.weight"].flatten(1), tensors["lora_down.weight"]
        if "lora_mid.weight" in tensors:
            return _scale(tensors, len(down)) * _core(tensors["lora_mid.weight"], down.flatten(1), up.T)
        return _scale(tensors, len(down)) * (up @ down.flatten(1)).reshape(weight.shape)
    if "hada_w1_a" in tensors:
        parts = []
        for n in (1, 2):
            a, b = tensors[f"hada_w{n}_a"], tensors[f"hada_w{n}_b"]
            parts.append(_core(tensors[f"hada_t{n}"], b, a) if "hada_t1" in tensors else a @ b)
        return _scale(tensors, len(tensors["hada_w1_b"])) * (parts[0] * parts[1]).reshape(weight.shape)
    if "lokr_w1" in tensors or "lokr_w1_a" in tensors:
        return _lokr(tensors, weight)
    if "a1.weight" in tensors:
        a1, a2, b1, b2 = (tensors[f"{name}.weight"].flatten(1) for name in ("a1", "a2", "b1", "b2"))
        if len(a1) != weight.shape[1]:
            raise Refused("the first layout does not fit the module's own factors")
        bent = torch.einsum("oi...,ir,rj->oj...", weight, a1, a2)
        return _scale(tensors, len(a2)) * (bent + (b1 @ b2).reshape(weight.shape))
    if "q_layer.weight" in tensors:
        if places.numel() > 1:
            raise Refused("T-LoRA does not run on convolutions with a kernel")
        q, p, lam = tensors["q_layer.weight"].flatten(1), tensors["p_layer.weight"].flatten(1), tensors["lambda_layer"]
        # What training started from is not read: the weight's first singular triplets stand for it.
        u, values, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        start = (u[:, : len(q)] * values[: len(q)]) @ v[: len(q)]
        return _scale(tensors, len(q)) * ((p * lam) @ q - start).reshape(weight.shape)
    return None


def _lokr(tensors: Tensors, weight: Tensor) -> Tensor:
    rank = None
    if not _loads(tensors, weight):
        raise Refused("the tensors do not fit those of the module that is made for their shapes")
    if "lokr_w1" in tensors:
        w1 = tensors["lokr_w1"]
    else:
        rank, w1 = len(tensors["lokr_w1_b"]), tensors["lokr_w1_a"] @ tensors["lokr_w1_b"]
    ok, inner = weight.shape[0] // w1.shape[0], weight.shape[1] // w1.shape[1]
    if w1.shape[0] > ok:
        raise Refused("the shapes of an unbalanced LoKr are not those that loading makes")
    if "lokr_w2" in tensors:
        w2 = tensors["lokr_w2"]
    else:
        a, b = tensors["lokr_w2_a"], tensors["lokr_w2_b"]
        rank, w2 = len(b), _core(tensors["lokr_t2"], b, a) if "lokr_t2" in tensors else a @ b
    pairs = torch.einsum("ab,cdk->acbdk", w1, w2.reshape(ok, inner, -1))
    return (1.0 if rank is None else _scale(tensors, rank)) * pairs.reshape(weight.shape)


def _loads(tensors: Tensors, weight: Tensor) -> bool:
    """Whether the module that is made for a LoKr has the shapes of the file."""
    shapes = {name.removeprefix("lokr_"): list(t.shape) for name, t in tensors.items() if name.startswith("lokr_")}
    ranks = [shapes[name][1] for name in ("w1_a", "w2_a") if name in shapes]
    first, second = (shapes.get(w) or [shapes[f"{w}_a"][0], shapes[f"{w}_b"][1]] for w in ("w1", "w2"))
    outs, ins = first[0] * second[0], first[1] * second[1]
    if (first[0], first[1]) == (_parts(outs, -1)[0], _parts(ins, -1)[0]):
        factor = -1
    else:
        tried = [max(first), max(second)]
        fitting = [
            each
            for each in tried
            if outs % each == ins % each == 0 and each in (first[0], second[0]) and each in (first[1], second[1])
        ]
        factor = fitting[0] if fitting else min(tried)
    rows, columns, places = _parts(weight.shape[0], factor), _parts(weight.shape[1], factor), list(weight.shape[2:])
    made = {}
    if "w1" not in shapes and "w2" not in shapes and ranks[0] < max(rows[0], columns[0]) / 2:
        made |= {"w1_a": [rows[0], ranks[0]], "w1_b": [ranks[0], columns[0]]}
    else:
        made["w1"] = [rows[0], columns[0]]
    if not ranks or ranks[0] >= max(rows[1], columns[1]) / 2:
        made["w2"] = [rows[1], columns[1], *places]
    elif "t2" in shapes and any(size > 1 for size in places):
        made |= {"t2": [ranks[0]] * 2 + places, "w2_a": [ranks[0], rows[1]], "w2_b": [ranks[0], columns[1]]}
    else:
        made |= {"w2_a": [rows[1], ranks[0]], "w2_b": [ranks[0], columns[1] * weight[0, 0].numel()]}
    return made == shapes


def _parts(n: int, factor: int) -> tuple[int, int]:
    if factor > 0 and n % factor == 0:
        return min(factor, n // factor), max(factor, n // factor)
    small = max(m for m in range(1, n + 1) if n % m == 0 and m * m <= n and (factor < 0 or m <= max(factor, 1)))
    return small, n // small


def _scale(tensors: Tensors, rank: int) -> float:
    alpha = number(tensors, "alpha")
    if alpha is None:
        raise Refused("KeyError: alpha")
    return alpha / rank


def _core(core: Tensor, into: Tensor, out: Tensor) -> Tensor:
    return torch.einsum("pq...,qi,po->oi...", core, into, out)


def _added(tensors: Tensors, weight: Tensor, change: Tensor, strength: float) -> Tensor:
    if "dora_scale" not in tensors:
        return weight + strength * change
    lengths, whole = tensors["dora_scale"], weight + change
    if lengths.shape[0] != weight.shape[0]:
        raise Refused("lengths of the inputs do not broadcast on loading")
    norm = whole.flatten(1).norm(dim=1).reshape(-1, *(1,) * (weight.dim() - 1))
    # At strength 0 the change stays.
    return whole * (strength * (lengths / norm - 1) + 1)


def _turned(tensors: Tensors, weight: Tensor, strength: float) -> Tensor:
    blocks, limit = tensors["oft_blocks"], (number(tensors, "alpha") or 0.0) * weight.shape[0]
    q, eye = blocks - blocks.mT, torch.eye(blocks.shape[-1], dtype=blocks.dtype)
    if limit > 0:
        q = q * min(1.0, limit / float(q.norm() + 1e-8))
    turns, size, rows = eye + strength * ((eye + q) @ (eye - q).inverse() - eye), blocks.shape[-1], weight
    if blocks.dim() == 3:
        rows = torch.einsum("knm,kn...->km...", turns, weight.unflatten(0, (-1, size))).flatten(0, 1)
    else:
        for i, turn in enumerate(turns):
            apart = 2**i * size // 2
            rows = rows.unflatten(0, (-1, 2, apart)).transpose(1, 2).flatten(0, 2).unflatten(0, (-1, size))
            rows = torch.einsum("bij,bj...->bi...", turn, rows).flatten(0, 1)
            rows = rows.unflatten(0, (-1, apart, 2)).transpose(1, 2).flatten(0, 2)
    return rows * tensors["rescale"] if "rescale" in tensors else rows
