"""LoRA as functions of tensors: (down, up, mid), mid None without a Tucker core."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from lycoris.algorithms import LoRA
from lycoris.dropin.functional.layer import Added, geometry, started
from lycoris.errors import ConfigError
from lycoris.geometry import Geometry


def weight_gen(org_weight: Tensor, rank: int, tucker: bool = True) -> tuple[Tensor, Tensor, Tensor | None]:
    """New tensors for a layer's weight."""
    p = started(LoRA(rank=rank, tucker=tucker), org_weight)
    return p["down"], p["up"], p.get("mid")


def _read(
    weights: tuple[Tensor | None, ...], gamma: float, extra: Mapping[str, Any] | None
) -> tuple[LoRA, dict[str, Tensor], Geometry]:
    down, up, mid = (*weights, None)[:3]
    if down is None or up is None:
        raise ConfigError("the first two tensors are down and up; neither may be None")
    kernel = (down if mid is None else mid).shape[2:]
    g = geometry((up.shape[0], down.shape[1], *kernel), extra)
    algorithm = LoRA(rank=down.shape[0], alpha=gamma * down.shape[0], tucker=mid is not None)
    shapes = {name: slot.shape for name, slot in algorithm.slots(g).items()}
    given = {"down": down, "up": up, "mid": mid}
    return algorithm, {name: t.reshape(shapes[name]) for name, t in given.items() if t is not None}, g


_OWN = Added(_read)
diff_weight = _OWN.diff_weight
bypass_forward_diff = _OWN.bypass_forward_diff
