"""What changes with the diffusion timestep: how many ranks of a T-LoRA count (arXiv:2507.05964, eq. 4)."""

from __future__ import annotations

import inspect
import json
import math
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from lycoris.errors import ConfigError, FileError
from lycoris.json_io import json_object
from lycoris.models.families import DENOISERS
from lycoris.models.families.family import TimestepUnit

TIMESTEP_UNITS: Mapping[str, TimestepUnit] = MappingProxyType(
    {name: each.timestep for each in DENOISERS for name in each.classes[:1] if each.timestep != "steps"}
)
"""What diffusers' own pipelines hand to a denoiser as its timestep; classes not listed get steps of 0..T.

fraction: t/T. reversed: 1 - t/T. reversed steps: T - t. Each is a fact of the class's family
(`lycoris.models.families`).
"""

SCHEDULE_KEY = "lycoris_schedule"
"""Header key under which a file has the schedule that its adapters were trained with."""

WITHOUT_SCHEDULE = (
    "every rank will count at every step, which the training never showed the model and which tends to burn images. "
    "Set `schedule` (or, on a pipeline, `_tlora_config`) and the ranks that should be off are left out at each step."
)
"""What to tell the user of adapters that were trained with a timestep schedule and have none."""


@dataclass(frozen=True, kw_only=True)
class RankSchedule:
    """r(t) = floor(((T - t)/T)^alpha · (max_rank - min_rank)) + min_rank.

    t runs from 0 (clean) to T (noise) and is clamped to that range, so min_rank ≤ r ≤ max_rank.
    """

    max_rank: int
    min_rank: int = 1
    """Ranks that count at pure noise."""
    alpha: float = 1.0
    """Exponent: 1 is linear, above 1 keeps more ranks for the late, detailed steps."""
    steps: int = 1000
    """T, the number of training timesteps of the noise scheduler."""

    def __post_init__(self) -> None:
        if not 0 <= self.min_rank <= self.max_rank:
            raise ConfigError(f"min rank must lie between 0 and the rank {self.max_rank}, not {self.min_rank}")
        if not (math.isfinite(self.alpha) and self.alpha > 0):
            raise ConfigError(f"the schedule's exponent must be positive, not {self.alpha}")
        if self.steps < 1:
            raise ConfigError(f"the number of training timesteps must be positive, not {self.steps}")

    def __str__(self) -> str:
        """As it is in a file's header."""
        return json.dumps(asdict(self))

    def rank(self, t: float) -> int:
        """Return the number of ranks that act at timestep t, from `min_rank` at T to `max_rank` at 0.

        A t outside 0..T counts as the nearer end.
        """
        clean = (self.steps - min(max(float(t), 0.0), self.steps)) / self.steps
        return min(self.max_rank, math.floor(clean**self.alpha * (self.max_rank - self.min_rank)) + self.min_rank)

    def mask(self, timesteps: Tensor | float) -> Tensor:
        """Return the rank mask (B, max_rank) for B timesteps on 0..T: 1 for ranks that act, 0 for the others.

        In float32. A number, or a tensor without axes, gives one row.
        """
        values = torch.as_tensor(timesteps).reshape(-1).tolist()
        ranks = torch.tensor([self.rank(t) for t in values]).unsqueeze(1)
        return (torch.arange(self.max_rank) < ranks).float()


def in_header(header: Mapping[str, str]) -> RankSchedule | None:
    """Return the schedule under `SCHEDULE_KEY` of a file's header; None where it has none.

    Raises:
        FileError: What is there is no JSON object, lacks a value, or has one that is out of range.
    """
    if SCHEDULE_KEY not in header:
        return None
    try:
        found = json_object(header[SCHEDULE_KEY])
        return RankSchedule(**{name: found[name] for name in ("max_rank", "min_rank", "alpha", "steps")})
    except (ValueError, KeyError, TypeError) as error:
        raise FileError(
            f"the header's {SCHEDULE_KEY} is no schedule of ranks: {header[SCHEDULE_KEY]:.80}: {error}"
        ) from error


def one_if_equal(keep: Tensor) -> Tensor:
    """Return a mask (B, r) as (1, r) where all samples have the same.

    One row fits an input whatever its batch looks like. (r) becomes (1, r) as well. On a GPU this waits for the values.
    """
    keep = keep.reshape(-1, keep.shape[-1])
    return keep[:1] if len(keep) > 1 and bool((keep == keep[:1]).all()) else keep


def takes_timestep(model: nn.Module) -> bool:
    """Return whether a model is called with a timestep that `read_timestep` finds.

    By an argument `timestep` of its forward, inside the wrappers of `torch.compile` and data parallelism.
    """
    return "timestep" in _forward_arguments(_unwrap_model(model))


def read_timestep(model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], steps: int) -> Tensor:
    """Return the timesteps with which a denoiser is being called, on the scale 0..steps, whatever unit its class takes.

    A float64 tensor, (1) or (B), where the given one is. Warns where the unit of a class is not known and all values
    lie between 0 and 1.

    Args:
        args: Of the call, and `kwargs` with them.
        steps: T, the number of training timesteps.

    Raises:
        ConfigError: The call has no timestep.
    """
    model = _unwrap_model(model)
    name = type(model).__name__
    if "timestep" in kwargs:
        given = kwargs["timestep"]
    else:
        names = _forward_arguments(model)
        at = names.index("timestep") if "timestep" in names else len(args)
        if at >= len(args):
            raise ConfigError(f"{name} was called without a timestep, which T-LoRA's schedule needs")
        given = args[at]
    t = torch.as_tensor(given).detach().reshape(-1).double()
    if name not in TIMESTEP_UNITS:
        _doubt(name, t, steps)
    unit = TIMESTEP_UNITS.get(name, "steps")
    if unit == "steps":
        return t
    if unit == "reversed steps":
        return steps - t
    # A division by T in float32 leaves t a hair off; a hair below a whole step can be a rank less.
    return ((t if unit == "fraction" else 1 - t) * steps).round(decimals=3)


def _doubt(name: str, t: Tensor, steps: int) -> None:
    """A warning, not an error: the last timesteps of some schedulers do lie below 1 on the scale of steps."""
    if t.numel() and bool(((t > 0) & (t < 1)).all()):
        warnings.warn(
            f"{name} was called with timesteps between 0 and 1, which are taken as steps of 0..{steps}, nearly clean. "
            "If they are t/T or 1 - t/T, T-LoRA counts the wrong ranks: the class then belongs into "
            "lycoris.targeting.rank_schedule.TIMESTEP_UNITS; until it is there, set masks by AdapterSet.set_timesteps",
            stacklevel=2,
        )


def _forward_arguments(model: nn.Module) -> list[str]:
    return list(inspect.signature(model.forward).parameters)


def _unwrap_model(model: nn.Module) -> nn.Module:
    """The denoiser itself inside `torch.compile` (`_orig_mod`) and data-parallel wrappers (`module`)."""
    while True:
        inner = getattr(model, "_orig_mod", None)
        if not isinstance(inner, nn.Module) and "timestep" not in _forward_arguments(model):
            inner = getattr(model, "module", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
