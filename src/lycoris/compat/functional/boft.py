"""BOFT as functions of tensors: (oft_blocks, rescale), rescale None where rows keep their lengths."""

from __future__ import annotations

from torch import Tensor

from lycoris.algorithms import BOFT
from lycoris.algorithms.base import interpolate
from lycoris.compat.functional.layer import compute_rotated, geometry, name_tensors, require, start_tensors
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine
from lycoris.ops.factorization import butterfly_sizes


def weight_gen(
    org_weight: Tensor, max_block_size: int, boft_m: int = -1, rescale: bool = False
) -> tuple[Tensor, Tensor | None]:
    """New tensors for a layer's weight, with all the stages that it can have."""
    out = org_weight.shape[0]
    limit = out if max_block_size == -1 else max_block_size
    size = max((s for s in butterfly_sizes(out) if s <= limit), default=max(limit, 2))
    p = start_tensors(BOFT(block_size=size, rescale=rescale), org_weight)
    if boft_m not in (-1, len(p["blocks"])):
        raise ConfigError(f"boft_m is -1 or {len(p['blocks'])}, the number of stages that join all rows, not {boft_m}")
    return p["blocks"], p.get("rescale")


def diff_weight(
    org_weight: Tensor,
    *weights: Tensor | None,
    constraint: float | None = None,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """scale·(V - W). `constraint` limits the norm of all blocks together; None or 0: no limit."""
    algorithm, p = _read(weights, constraint)
    base = Affine(org_weight.to(p["blocks"].dtype), None)
    whole = algorithm.transform(p, base, geometry(org_weight.shape))
    return interpolate(base, whole, scale).weight - base.weight


def bypass_forward_diff(
    org_out: Tensor,
    *weights: Tensor | None,
    constraint: float | None = None,
    need_transpose: bool = False,
    scale: float = 1.0,
    backend: str | None = None,
) -> Tensor:
    """The same on the layer's output. `need_transpose`: channels are on axis 1, as after a convolution."""
    return compute_rotated(*_read(weights, constraint), org_out, need_transpose, scale)


def _read(weights: tuple[Tensor | None, ...], constraint: float | None) -> tuple[BOFT, dict[str, Tensor]]:
    p = name_tensors(weights, ("blocks", "rescale"))
    require(p, "blocks")
    size, rows = p["blocks"].shape[-1], p["blocks"].shape[-3] * p["blocks"].shape[-2]
    return BOFT(block_size=size, constraint=float(constraint or 0) / rows, rescale="rescale" in p), p
