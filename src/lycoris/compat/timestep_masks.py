"""T-LoRA as trainers and pipelines drive it: masks set for the whole process, and `_tlora_config` on a pipeline.

The contract of `set_timestep_mask` is process-wide, so this module holds the one list of networks that it reaches.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Mapping
from types import FrameType
from typing import Any, Protocol
from weakref import ReferenceType, WeakSet, ref

from torch import Tensor, nn

from lycoris.adapters.adapter_set import AdapterSet
from lycoris.errors import ConfigError, unknown
from lycoris.targeting.rank_schedule import WITHOUT_SCHEDULE, RankSchedule, takes_timestep

logger = logging.getLogger("LyCORIS")

CONFIG_KEYS = ("max_rank", "min_rank", "alpha")
"""Keys that a pipeline's `_tlora_config` may have."""


class RankMasked(Protocol):
    """Anything that a rank mask can be set on.

    Implemented by `AdapterSet` and by single modules.
    """

    def set_rank_mask(self, keep: Tensor | None) -> None:
        """Put a mask, (1, r) or (B, r), in force. None: every rank counts."""


_masks: dict[int, Tensor] = {}
_tracked: WeakSet[RankMasked] = WeakSet()


def compute_timestep_mask(
    timestep: float, max_timestep: int, max_rank: int, min_rank: int = 1, alpha: float = 1.0
) -> Tensor:
    """Return the mask of the ranks that count at a timestep: ones, then zeros, of shape (1, max_rank).

    The number of ones is r(t) = floor(((T - t)/T)^alpha · (max_rank - min_rank)) + min_rank, with T = `max_timestep`;
    see `lycoris.RankSchedule`. Raises `ConfigError` for values that make no schedule, such as min_rank > max_rank.
    """
    return RankSchedule(max_rank=max_rank, min_rank=min_rank, alpha=alpha, steps=max_timestep).mask(timestep)


def set_timestep_mask(mask: Tensor, group_id: int = 0) -> None:
    """Set the rank mask of every applied T-LoRA network and single T-LoRA module in this process.

    It stays in force until `clear_timestep_mask`, and takes precedence over schedules.

    Args:
        mask: (1, r) for all samples, or (B, r), one row per sample. Longer masks are cut to an adapter's rank, shorter
            ones are padded with ones.
        group_id: Must be 0; mask groups are not implemented. Raises `ConfigError` otherwise.
    """
    _check_group(group_id)
    _masks[group_id] = mask
    _push_mask()


def get_timestep_mask(group_id: int = 0) -> Tensor | None:
    """Return the mask set by `set_timestep_mask`, or None.

    Raises `ConfigError` for a `group_id` other than 0.
    """
    _check_group(group_id)
    return _masks.get(group_id)


def clear_timestep_mask(group_id: int = 0) -> None:
    """Remove the mask, so that every rank counts again.

    A backward pass still to come recomputes activations with the mask that its forward pass had.
    """
    _check_group(group_id)
    _masks.pop(group_id, None)
    _push_mask()


def track_adapters(adapters: AdapterSet) -> None:
    """Let masks and pipelines reach these adapters, and let them follow the timestep of each call of their model.

    Does nothing for adapters without rank masks, or on a second call. Logs a warning when the adapters have a schedule
    and their model is not called with a `timestep`.
    """
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
    adapters.model.register_forward_pre_hook(_ScheduleHook(adapters, own))
    _tracked.add(adapters)
    adapters.rank_masks.follow()


def warn_of_missing_schedule(adapters: AdapterSet) -> None:
    """Log a warning when adapters with rank masks are about to be applied without a schedule or a mask.

    Does nothing for adapters that are attached already.
    """
    unguided = adapters.schedule is None and get_timestep_mask() is None
    if adapters.rank_masks.are_used and unguided and not adapters.attached:
        logger.warning(
            "applying adapters without the timestep schedule that they were trained with: %s", WITHOUT_SCHEDULE
        )


def track_module(module: RankMasked) -> None:
    """Let masks reach a single module, applied or not.

    The reference is weak: the module is forgotten when nothing else holds it.
    """
    module.set_rank_mask(get_timestep_mask())
    _tracked.add(module)


def untrack_adapters(adapters: AdapterSet) -> None:
    """Undo `track_adapters`.

    The adapters' own schedule is back in effect, and every rank counts. Does nothing for adapters that are not tracked.
    """
    if adapters not in _tracked:
        return
    _tracked.discard(adapters)
    hooks = adapters.model._forward_pre_hooks
    for key, hook in list(hooks.items()):
        if isinstance(hook, _ScheduleHook) and hook.adapters is adapters:
            adapters.schedule = hook.own
            del hooks[key]
    adapters.rank_masks.unfollow()
    adapters.set_rank_mask(None)


class _ScheduleHook:
    """The hook that gives adapters the schedule of the pipeline calling their model, or their own without one.

    A copy of the model is tracked like the model.
    """

    def __init__(self, adapters: AdapterSet, own: RankSchedule | None) -> None:
        self.adapters, self.own = adapters, own
        self._callers: tuple[ReferenceType[Any], ...] = ()

    def __call__(self, model: nn.Module, args: tuple[Any, ...]) -> None:
        pipeline = self._find_pipeline()
        if pipeline is None:
            self.adapters.schedule = self.own
            return
        wanted = read_pipeline_schedule(pipeline, self.adapters)
        if wanted != self.adapters.schedule:
            ranks = _list_ranks(self.adapters)
            if max(ranks) != wanted.max_rank:
                logger.warning(
                    "_tlora_config has max_rank %d; the adapters have rank %s", wanted.max_rank, sorted(ranks)
                )
            self.adapters.schedule = wanted

    def __getstate__(self) -> dict[str, Any]:
        return {"adapters": self.adapters, "own": self.own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)  # type: ignore[misc]  # what is not in the state starts empty
        _tracked.add(self.adapters)

    def _find_pipeline(self) -> Any:
        """Return the object with a `_tlora_config` whose method is calling the denoiser, or None.

        Pipelines do not notify their denoiser when the attribute is set, and several may share one, so who is calling
        can only be read off the stack. The search ends at the nearest object when that is the one that called before:
        in stock pipelines, the pipeline itself. The rest of the stack is searched once for each caller.
        """
        callers = _iterate_callers(sys._getframe(2))  # above this method and `__call__`
        nearest = next(callers, None)
        if nearest is None:
            return None
        if not self._callers or self._callers[0]() is not nearest:
            self._callers = tuple(ref(caller) for caller in (nearest, *callers))
        known = (reference() for reference in self._callers)
        return next((caller for caller in known if getattr(caller, "_tlora_config", None)), None)


def _iterate_callers(frame: FrameType | None) -> Iterator[Any]:
    """Yield the objects whose methods are running, the innermost first; not modules, and nothing of torch."""
    while frame is not None:
        caller = None if _is_torch_frame(frame) else frame.f_locals.get("self")
        # What cannot be referenced weakly cannot be remembered; a pipeline can.
        if caller is not None and not isinstance(caller, nn.Module) and type(caller).__weakrefoffset__:
            yield caller
        frame = frame.f_back


def _is_torch_frame(frame: FrameType) -> bool:
    # A compiled model is called through objects of torch that are the same whoever calls.
    return str(frame.f_globals.get("__name__")).startswith("torch.")


def _check_group(group_id: int) -> None:
    if group_id != 0:
        raise ConfigError(f"mask groups are not implemented: group_id must be 0, not {group_id!r}")


def _push_mask() -> None:
    for masked in list(_tracked):
        masked.set_rank_mask(get_timestep_mask())


def read_pipeline_schedule(pipeline: Any, adapters: AdapterSet) -> RankSchedule:
    """Return the rank schedule that a pipeline's `_tlora_config` describes.

    Without `max_rank` it is the largest rank of the adapters; `min_rank` and `alpha` are 1 by default. The number of
    timesteps is `num_train_timesteps` of the pipeline's scheduler, or 1000. Raises `ConfigError` for unknown keys and
    for values that make no schedule.
    """
    config: Mapping[str, Any] = pipeline._tlora_config
    strange = next((key for key in config if key not in CONFIG_KEYS), None)
    if strange is not None:
        raise ConfigError(unknown("key of _tlora_config", str(strange), CONFIG_KEYS))
    steps = int(getattr(getattr(pipeline, "scheduler", None), "config", {}).get("num_train_timesteps", 1000))
    return RankSchedule(
        max_rank=int(config.get("max_rank", max(_list_ranks(adapters)))),
        min_rank=int(config.get("min_rank", 1)),
        alpha=float(config.get("alpha", 1.0)),
        steps=steps,
    )


def _list_ranks(adapters: AdapterSet) -> set[int]:
    masked = [a.algorithm for stack in adapters.stacks.values() for a in stack if a.algorithm.uses_rank_mask]
    return {algorithm.rank for algorithm in masked}  # type: ignore[attr-defined]  # what is masked has ranks
