"""T-LoRA as trainers and pipelines drive it: masks set for the whole process, and `_tlora_config` on a pipeline.

The contract of `set_timestep_mask` is process-wide, so this file keeps the process's one list of networks it reaches.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor, nn

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.errors import ConfigError, unknown
from lycoris.targeting.rank_schedule import RankSchedule, takes_timestep

logger = logging.getLogger("LyCORIS")

CONFIG_KEYS = ("max_rank", "min_rank", "alpha")
"""Of a pipeline's `_tlora_config`."""


class Masked(Protocol):
    """What a mask reaches: a set of adapters, or a module by itself."""

    def set_rank_mask(self, keep: Tensor | None) -> None: ...


_masks: dict[int, Tensor] = {}
_tracked: WeakSet[Masked] = WeakSet()


def compute_timestep_mask(
    timestep: float, max_timestep: int, max_rank: int, min_rank: int = 1, alpha: float = 1.0
) -> Tensor:
    """(1, max_rank): ones for the ranks that count at a timestep. See `lycoris.RankSchedule`."""
    return RankSchedule(max_rank=max_rank, min_rank=min_rank, alpha=alpha, steps=max_timestep).mask(timestep)


def set_timestep_mask(mask: Tensor, group_id: int = 0) -> None:
    """Put a mask, (1, r) or (B, r), in force on applied T-LoRA networks and on single modules until it is cleared."""
    _check_group(group_id)
    _masks[group_id] = mask
    _push()


def get_timestep_mask(group_id: int = 0) -> Tensor | None:
    """The mask in force, or None."""
    _check_group(group_id)
    return _masks.get(group_id)


def clear_timestep_mask(group_id: int = 0) -> None:
    """All ranks count again. A backward pass still to come recomputes with the mask its forward had."""
    _check_group(group_id)
    _masks.pop(group_id, None)
    _push()


def track(adapters: AdapterSet) -> None:
    """Let masks and pipelines reach these adapters."""
    if adapters in _tracked or not adapters.rank_masks.are_used:
        return
    adapters.set_rank_mask(get_timestep_mask())
    own = adapters.schedule
    if not takes_timestep(adapters.model):
        if own is not None:
            logger.warning(
                "%s takes no `timestep`: every rank counts unless masks are set with set_timestep_mask",
                type(adapters.model).__name__,
            )
        _tracked.add(adapters)
        return
    adapters.model.register_forward_pre_hook(_Follow(adapters, own))
    _tracked.add(adapters)
    adapters.rank_masks.follow()


def follow(module: Masked) -> None:
    """Let masks reach a module by itself, applied or not."""
    module.set_rank_mask(get_timestep_mask())
    _tracked.add(module)


def untrack(adapters: AdapterSet) -> None:
    """Undo `track`."""
    if adapters not in _tracked:
        return
    _tracked.discard(adapters)
    hooks = adapters.model._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(hook, _Follow) and hook.adapters is adapters:
            adapters.schedule = hook.own
            del hooks[key]
    adapters.rank_masks.unfollow()
    adapters.set_rank_mask(None)


class _Follow:
    """The hook that lets a pipeline's schedule reach its denoiser; a copy of the model is tracked like the model."""

    def __init__(self, adapters: AdapterSet, own: RankSchedule | None) -> None:
        self.adapters, self.own = adapters, own

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        _follow_pipeline(self.adapters, self.own)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        _tracked.add(self.adapters)


def _check_group(group_id: int) -> None:
    if group_id != 0:
        raise ConfigError(f"mask groups are not built yet: group_id must be 0, not {group_id!r}")


def _push() -> None:
    for masked in list(_tracked):
        masked.set_rank_mask(get_timestep_mask())


def _follow_pipeline(adapters: AdapterSet, own: RankSchedule | None) -> None:
    """Take the schedule of the pipeline that is calling the denoiser, if it has one."""
    pipeline = _calling_pipeline()
    if pipeline is None:
        adapters.schedule = own
        return
    wanted = pipeline_schedule(pipeline, adapters)
    if wanted != adapters.schedule:
        ranks = _ranks(adapters)
        if max(ranks) != wanted.max_rank:
            logger.warning("_tlora_config has max_rank %d; the adapters have rank %s", wanted.max_rank, sorted(ranks))
        adapters.schedule = wanted


def pipeline_schedule(pipeline: Any, adapters: AdapterSet) -> RankSchedule:
    """What a pipeline's `_tlora_config` says, completed by the adapters' rank and the scheduler's steps."""
    config: Mapping[str, Any] = pipeline._tlora_config
    strange = next((key for key in config if key not in CONFIG_KEYS), None)
    if strange is not None:
        raise ConfigError(unknown("key of _tlora_config", str(strange), CONFIG_KEYS))
    steps = int(getattr(getattr(pipeline, "scheduler", None), "config", {}).get("num_train_timesteps", 1000))
    return RankSchedule(
        max_rank=int(config.get("max_rank", max(_ranks(adapters)))),
        min_rank=int(config.get("min_rank", 1)),
        alpha=float(config.get("alpha", 1.0)),
        steps=steps,
    )


def _ranks(adapters: AdapterSet) -> set[int]:
    masked = [a.algorithm for stack in adapters.stacks.values() for a in stack if a.algorithm.uses_rank_mask]
    return {algorithm.rank for algorithm in masked}  # type: ignore[attr-defined]  # what is masked has ranks


def _calling_pipeline() -> Any:
    """The object whose method is calling the denoiser right now and that has a `_tlora_config`.

    Stock pipelines do not tell their denoiser that the attribute was set, so the caller is looked for on the stack.
    """
    frame = sys._getframe()
    while (frame := frame.f_back) is not None:  # type: ignore[assignment]  # the name is a frame's outside the loop
        caller = frame.f_locals.get("self")
        if caller is not None and not isinstance(caller, nn.Module) and getattr(caller, "_tlora_config", None):
            return caller
    return None
