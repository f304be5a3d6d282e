"""Convert old and foreign forms of a layer's tensors to those that the algorithms define.

A layer's tensors may stand for a stack: for example a LoRA with a change of the bias, or a sparse change of the weight,
next to it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lycoris.algorithms import OFT, Full, LoRA, Norm, Replace
from lycoris.algorithms.tensors import ALPHA, RANK_TENSORS, number
from lycoris.errors import FileError
from lycoris.files.dialects.suffixes import MAX_OFT_PARTS
from lycoris.layers.geometry import Geometry
from lycoris.ops.rotation import limit_norm
from lycoris.ops.rounding import widen

TensorGroup = dict[str, Tensor]
"""Tensors of a layer by suffix, in LyCORIS' spelling."""

REFUSED: Mapping[str, str] = {
    "reshape_weight": "changes the shape of a layer, which no adapter can",
    "lokr_t1": "is a Tucker core of LoKr's first factor, which nothing is known to write or read",
    "bm.weight": "is an experimental part of GLoRA that 4.1.3 never trains",
    "ia3_l": "scales inputs or outputs, as in PEFT; load it as a PEFT folder, with its config",
    "oft_R.weight": "rotates inputs, as in PEFT and OneTrainer; load it as a PEFT folder, with its config",
}
"""Tensors that are known, and for which there is no place; each with the reason."""

UP, DOWN = LoRA.tensor_names["up"], LoRA.tensor_names["down"]
DIFF, DIFF_B = Full.tensor_names["diff"], Full.tensor_names["diff_b"]
SCALE_OF_NORM, SHIFT_OF_NORM = Norm.tensor_names["w"], Norm.tensor_names["b"]
WEIGHT, BIAS = Replace.tensor_names["w"], Replace.tensor_names["b"]
OFT_BLOCKS = OFT.tensor_names["blocks"]


def normalize_tensors(group: Mapping[str, Tensor], g: Geometry, where: str) -> list[TensorGroup]:
    """Return a layer's tensors as a stack of groups that algorithms know, lowest first.

    Args:
        group: Tensors by suffix in LyCORIS' spelling.
        g: The layer.
        where: Its name, for messages.

    Raises:
        FileError: A tensor is known but not supported (`FOREIGN_SUFFIXES`, `REFUSED`), or does not fit the layer.
    """
    if "reshape_weight" in group and group["reshape_weight"].flatten().tolist() == [*g.shape[:2]]:
        # It says what the layer's shape is to be, and it is that.
        group = {suffix: tensor for suffix, tensor in group.items() if suffix != "reshape_weight"}
    for suffix, why in REFUSED.items():
        if suffix in group:
            raise FileError(f"{where}.{suffix} {why}")
    own, beside = dict(group), []
    for reads in (
        _read_magnitude_vector,
        _read_replacements,
        _read_norm,
        _read_rotation,
        _read_rotation_parts,
        _read_old_glora,
        _apply_scale_number,
        _flatten_factors,
    ):
        reads(own, g, where)
    below = {key: own.pop(key) for key in (WEIGHT, BIAS) if key in own and own.keys() - {WEIGHT, BIAS, ALPHA}}
    for takes in (_take_up_bias, _take_bias, _take_sparse):
        found = takes(own, g, where)
        if found:
            beside.append(found)
    # Another bias commutes with a change of the weight, and readers look for that first.
    groups = (below, own, *beside) if WEIGHT in below else (own, below, *beside)
    return [group for group in groups if group.keys() - {ALPHA}] or [own]


def _read_magnitude_vector(own: TensorGroup, g: Geometry, where: str) -> None:
    """PEFT's name of DoRA's magnitude: one value per output, for convolutions in a shape that broadcasts over them."""
    if "lora_magnitude_vector" in own:
        magnitude = own.pop("lora_magnitude_vector")
        own["dora_scale"] = magnitude.reshape(-1, *(1,) * (len(g.shape) - 1))


def _read_replacements(own: TensorGroup, g: Geometry, where: str) -> None:
    """A weight or a bias under the name that it has in the model: it replaces that. IA³ too has a `weight`."""
    shape = tuple(own["weight"].shape) if "weight" in own and "on_input" not in own else ()
    if shape and (shape == g.stacked_shape(g.stored_shape) or g.kind == "norm"):
        own[WEIGHT] = own.pop("weight")
    # Norms of Flux.1's own code call it scale.
    if g.kind == "norm" and "scale" in own and own["scale"].dim() and not own.keys() & {DIFF, SCALE_OF_NORM}:
        own[WEIGHT] = own.pop("scale")
    if "bias" in own:
        own[BIAS] = own.pop("bias")


def _read_norm(own: TensorGroup, g: Geometry, where: str) -> None:
    """ComfyUI's names for the changes of a norm; either may be alone."""
    if g.kind != "norm":
        return
    for there, here in ((DIFF, SCALE_OF_NORM), (DIFF_B, SHIFT_OF_NORM)):
        if there in own:
            own[here] = own.pop(there)
    names = (SCALE_OF_NORM, SHIFT_OF_NORM) if g.has_bias else (SCALE_OF_NORM,)
    given = next((own[name] for name in names if name in own), None)
    if given is not None:
        own |= {name: torch.zeros_like(given) for name in names if name not in own}


def _apply_scale_number(own: TensorGroup, g: Geometry, where: str) -> None:
    """A number that stands for alpha / rank, and scales what has no ranks."""
    if "scale" not in own:
        return
    scale = number(own.pop("scale"), f"{where}.scale")
    ranked = next((own[key] for key in RANK_TENSORS if key in own and own[key].dim()), None)
    unsplit = next((key for key in (DIFF, "lokr_w1") if key in own), None)
    if ranked is not None:
        own[ALPHA] = torch.tensor(scale * ranked.shape[0], dtype=torch.float64)
    elif unsplit is not None:
        own[unsplit] = widen(own[unsplit]) * scale
    else:
        raise FileError(f"{where}.scale is next to {', '.join(sorted(own)) or 'nothing'}, which has no scale")


def _read_rotation(own: TensorGroup, g: Geometry, where: str) -> None:
    """Rotations themselves, where later files have what generates them: Q = (R - I)(R + I)⁻¹, B = Q/2."""
    if "oft_diag" in own:
        rotation = own.pop("oft_diag")
        wide = widen(rotation)
        if wide.dim() != 3 or wide.shape[1] != wide.shape[2]:
            raise FileError(f"{where}.oft_diag has shape {tuple(rotation.shape)}; square blocks (n, s, s) are expected")
        eye = torch.eye(wide.shape[-1], dtype=wide.dtype)
        try:
            own["oft_blocks"] = torch.linalg.solve(wide.mT + eye, (wide - eye).mT).mT / 2
        except RuntimeError as error:
            raise FileError(
                f"{where}.oft_diag contains a rotation by 180 degrees, which no oft_blocks generate"
            ) from error
        own.setdefault(ALPHA, torch.tensor(0.0))


def _read_rotation_parts(own: TensorGroup, g: Geometry, where: str) -> None:
    """Rotations of several parts of the rows, as sd-scripts' networks/oft_flux.py has them: block_size is that of each
    part, and the limit alpha·rows of it. A larger block holds smaller ones on its diagonal.
    """
    parts = [own.pop(f"{OFT_BLOCKS}.{n}") for n in range(MAX_OFT_PARTS) if f"{OFT_BLOCKS}.{n}" in own]
    if not parts:
        return
    shapes, what = (
        [tuple(part.shape) for part in parts],
        f"{where}.{OFT_BLOCKS}.N, as sd-scripts' networks.oft_flux has them,",
    )
    if any(len(shape) != 3 or shape[1] != shape[2] or not shape[1] for shape in shapes):
        raise FileError(f"{what} are square blocks (n, s, s), not {shapes}")
    rows = [shape[0] * shape[1] for shape in shapes]
    if sum(rows) != g.out_features:
        raise FileError(f"{what} rotate {' + '.join(map(str, rows))} rows, and a {g} has {g.out_features}")
    if len(parts) == 1:
        own[OFT_BLOCKS] = parts[0]
        return
    limit = number(own.pop(ALPHA), f"{where}.{ALPHA}") if ALPHA in own else 0.0
    wide = [limit_norm(widen(part), limit * count) for part, count in zip(parts, rows, strict=True)]
    size = max(shape[1] for shape in shapes)
    starts = [sum(rows[:n]) for n in range(len(rows))]
    if any(
        size % shape[1] or start % size or count % size
        for shape, start, count in zip(shapes, starts, rows, strict=True)
    ):
        raise FileError(
            f"{what} have blocks of {[shape[1] for shape in shapes]} rows, which make no blocks of one size"
        )
    own[OFT_BLOCKS] = torch.cat([_merge_rotation_blocks(part, size) for part in wide])
    own[ALPHA] = torch.tensor(0.0)


def _merge_rotation_blocks(blocks: Tensor, size: int) -> Tensor:
    """(n, s, s) as (n·s / size, size, size), with s-blocks on the diagonals."""
    n, s, _ = blocks.shape
    many = size // s
    found = blocks.new_zeros(n // many, many, s, many, s)
    each = torch.arange(many)
    found[:, each, :, each] = blocks.reshape(n // many, many, s, s).transpose(0, 1)
    return found.reshape(n // many, size, size)


def _read_old_glora(own: TensorGroup, g: Geometry, where: str) -> None:
    """The first layout: every pair the other way round and transposed in its roles, W·a2·a1 + b2·b1."""
    names = ("a1.weight", "a2.weight", "b1.weight", "b2.weight")
    if any(name not in own or own[name].dim() < 2 for name in names) or len(g.shape) < 2:
        return
    (a1, a2, b1, b2), (o, i) = (own[name] for name in names), g.shape[:2]
    new = a1.shape[0] == i and a2.shape[1] == i and b1.shape[0] == o
    old = a1.shape[1] == i and a2.shape[0] == i and b2.shape[0] == o
    # On a square layer with as many ranks both fit: then it is the later one, which every writer of today uses.
    if old and not new:
        own.update(zip(names, (a2, a1, b2, b1), strict=True))


def _flatten_factors(own: TensorGroup, g: Geometry, where: str) -> None:
    """Factors that keep the kernel's dimensions where others flatten them."""
    for key in ("hada_w1_b", "hada_w2_b", "lokr_w2_b"):
        if g.kernel and key in own and own[key].dim() > 2:
            own[key] = own[key].flatten(1)


def _take_up_bias(own: TensorGroup, g: Geometry, where: str) -> TensorGroup | None:
    """PEFT's `lora_bias`: a bias behind the second factor, under the same scale."""
    if "lora_up.bias" not in own:
        return None
    bias, down = own.pop("lora_up.bias"), own.get(DOWN)
    rank = len(down) if down is not None and down.dim() else 1
    scale = number(own[ALPHA], f"{where}.alpha") / rank if ALPHA in own else 1.0
    return {DIFF_B: bias if scale == 1 else widen(bias) * scale}


def _take_bias(own: TensorGroup, g: Geometry, where: str) -> TensorGroup | None:
    """A change of the bias next to another algorithm, as ComfyUI and OneTrainer allow."""
    if DIFF_B not in own or own.keys() <= {DIFF, DIFF_B}:
        return None
    return {DIFF_B: own.pop(DIFF_B)}


def _take_sparse(own: TensorGroup, g: Geometry, where: str) -> TensorGroup | None:
    """Single places of the weight, as early LyCORIS extracted them: indices (dimensions, n), values (n), and a size."""
    names = ("bias_indices", "bias_values", "bias_size")
    if not any(name in own for name in names):
        return None
    missing = [name for name in names if name not in own]
    if missing:
        raise FileError(f"{where} has {' and '.join(n for n in names if n in own)}, and no {' and '.join(missing)}")
    at, values, size = (own.pop(name) for name in names)
    if at.is_floating_point() or size.is_floating_point():
        raise FileError(f"{where}: bias_indices and bias_size are {at.dtype} and {size.dtype}; integers are expected")
    at, shape = at.long(), tuple(int(n) for n in size.flatten().tolist())
    fits = min(shape, default=0) > 0 and math.prod(shape) == g.size
    if not fits or at.dim() != 2 or tuple(at.shape) != (len(shape), values.numel()):
        raise FileError(f"{where}: sparse entries of shape {shape} do not fit a {g}")
    if at.numel() and (bool((at < 0).any()) or bool((at >= torch.tensor(shape)[:, None]).any())):
        raise FileError(f"{where}.bias_indices points outside of {shape}")
    dense = torch.zeros(shape, dtype=values.dtype)
    dense[tuple(at)] = values
    return {DIFF: g.transpose_stored(dense.reshape(g.shape))}
