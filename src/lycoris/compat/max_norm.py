"""Max-norm regularization: scaling an adapter's change down to a norm."""

from __future__ import annotations

import torch

from lycoris.adapters.adapter import Adapter
from lycoris.algorithms import OFT, TLoRA
from lycoris.algorithms.additive import Additive
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.ranked import Ranked


@torch.no_grad()
def shrink_to_norm(adapter: Adapter, most: float) -> tuple[bool | None, float | None]:
    """Scale an adapter's change down, if its norm is above `most`.

    Returns whether it was above, and the norm afterwards; (None, None) for an algorithm without such a norm. ΔW is
    scaled through the scalar, or else through one factor, and therefore exactly.

    T-LoRA is the difference of two products, one of which is frozen, so no tensor of it scales ΔW. (IA)³, GLoRA and
    `full` have no such norm in existing trainers either.
    """
    algorithm = unwrap_dora(adapter.algorithm)
    tensors = adapter.tensors()
    if isinstance(algorithm, OFT):
        part, norm = tensors["blocks"], tensors["blocks"].norm()
    elif isinstance(algorithm, Additive) and isinstance(algorithm, Ranked) and not isinstance(algorithm, TLoRA):
        own = {name: tensor for name, tensor in tensors.items() if name != "magnitude"}
        scale = algorithm.read_scalar(own) * algorithm.scale(adapter.geometry)
        norm = (algorithm.delta(own, adapter.geometry).weight * scale).norm()
        part = own["scalar"] if "scalar" in own else next(own[n] for n in algorithm.SCALAR_FOLDS_INTO if n in own)
    else:
        return None, None
    if norm <= most:
        return False, float(norm)
    part.mul_(most / norm)
    return True, float(most)
