"""`extract_diff`: what a fine-tuned model has changed, as the tensors of an adapter file."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lycoris.algorithms import ALPHA, Full, LoRA, Norm
from lycoris.errors import ConfigError, FileError, unknown
from lycoris.files.dialect import flatten
from lycoris.geometry import Site, sites

logger = logging.getLogger("LyCORIS")

Mode = Literal["fixed", "threshold", "ratio", "quantile", "percentile", "full"]
MODES = ("fixed", "threshold", "ratio", "quantile", "percentile", "full")


def extract_diff(
    base_tes: Sequence[nn.Module],
    db_tes: Sequence[nn.Module],
    base_unet: nn.Module | None,
    db_unet: nn.Module | None,
    mode: Mode = "fixed",
    linear_mode_param: float = 0,
    conv_mode_param: float = 0,
    extract_device: Any = "cpu",
    use_bias: bool = False,
    sparsity: float = 0.98,
    small_conv: bool = True,
) -> dict[str, Tensor]:
    """Tensors named as in kohya's files that make the `db_` models of the base ones, in half precision.

    The change of each linear layer and convolution becomes a LoRA of its largest singular values: as many as
    `linear_mode_param` (for kernels `conv_mode_param`) says. "fixed": that number; "threshold": those above it;
    "ratio": those above that part of the largest; "quantile" or "percentile": until their sum is that part of the
    whole. At least one; from half of the layer's outputs on, and with "full", the whole change is kept. Changes of
    biases and norms are kept too. `use_bias` adds the largest places of what a LoRA leaves, all but a part of
    `sparsity`. `small_conv` has no effect: a Tucker core of the same rank would lose more.

    Raises `ConfigError` for an unknown mode and `FileError` when the models do not have the same layers.
    """
    if mode not in MODES:
        raise ConfigError(unknown("mode", mode, MODES))
    pairs = [("lora_unet", base_unet, db_unet)] if base_unet is not None and db_unet is not None else []
    many = len(base_tes) > 1
    for at, (base, tuned) in enumerate(zip(base_tes, db_tes, strict=True)):
        pairs.append((f"lora_te{at + 1}" if many else "lora_te", base, tuned))
    found: dict[str, Tensor] = {}
    for prefix, base, tuned in pairs:
        there = {place.path: place for place in sites(tuned)}
        for place in sites(base):
            other = there.get(place.path)
            if other is None or other.geometry != place.geometry:
                raise FileError(
                    f"{place.path} is {place.geometry} in the base and {other and other.geometry} beside it"
                )
            if place.attribute:
                continue
            kernel = any(size > 1 for size in place.geometry.kernel)
            wanted = conv_mode_param if kernel else linear_mode_param
            own = _changed(place, other, mode, wanted, extract_device, sparsity if use_bias else None)
            found |= {f"{prefix}_{flatten(place.path)}.{suffix}": t.cpu().contiguous() for suffix, t in own.items()}
    return found


@torch.no_grad()
def _changed(
    base: Site, tuned: Site, mode: Mode, wanted: float, device: Any, sparsity: float | None
) -> dict[str, Tensor]:
    """The tensors of one layer; none where nothing changed."""
    g, before, after = base.geometry, base.module._parameters, tuned.module._parameters
    differences = {
        name: tuned_to.to(device).float() - tensor.to(device).float()
        for name, tensor in before.items()
        if tensor is not None and (tuned_to := after[name]) is not None
    }
    changed = {name: change for name, change in differences.items() if change.any()}
    if g.kind == "norm":
        names = {"weight": Norm.keys["w"], "bias": Norm.keys["b"]}
        whole = differences if changed else {}
        return {names[name]: change.half() for name, change in whole.items()}
    tensors = {Full.keys["diff_b"]: changed["bias"].half()} if "bias" in changed else {}
    if "weight" not in changed:
        return tensors
    weight = changed["weight"]
    if g.kind == "embedding" and mode != "full":
        logger.warning("%s is an embedding and has changed; only mode='full' keeps that", base.path)
        return tensors
    matrix = g.turned(weight).flatten(1)
    u, s, v = torch.linalg.svd(matrix, full_matrices=False) if mode != "full" else (matrix, matrix, matrix)
    rank = 0 if mode == "full" else max(1, min(len(s), _count(s, mode, wanted)))
    if mode == "full" or rank >= g.out_features / 2:
        return {Full.keys["diff"]: weight.half()} | tensors
    up, down = (u[:, :rank] * s[:rank]).half(), v[:rank].half()
    lora = {
        LoRA.keys["up"]: up.reshape(-1, rank, *(1,) * len(g.kernel)),
        LoRA.keys["down"]: down.reshape(rank, *g.shape[1:]),
        ALPHA: torch.tensor([float(rank)]).half(),
    }
    rest = _sparse(matrix - up.float() @ down.float(), sparsity) if sparsity is not None else {}
    return lora | rest | tensors


def _count(s: Tensor, mode: Mode, wanted: float) -> int:
    """How many singular values are kept."""
    if mode == "fixed":
        return int(wanted)
    if mode == "threshold":
        return int((s > wanted).sum())
    if mode == "ratio":
        return int((s > wanted * s.max()).sum())
    return int((s.cumsum(0) < wanted * s.sum()).sum())


def _sparse(rest: Tensor, sparsity: float) -> dict[str, Tensor]:
    """The largest places of a matrix, as early files keep them."""
    kept = max(1, round(rest.numel() * (1 - sparsity)))
    places = rest.flatten().abs().topk(kept).indices
    rows, columns = places // rest.shape[1], places % rest.shape[1]
    return {
        "bias_indices": torch.stack([rows, columns]).to(torch.int32),
        "bias_values": rest.flatten()[places].half(),
        "bias_size": torch.tensor(rest.shape, dtype=torch.int32),
    }
