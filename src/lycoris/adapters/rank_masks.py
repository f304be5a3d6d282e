"""Which ranks act in a pass: masks for algorithms that follow the timestep (T-LoRA), set by hand or by a schedule."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lycoris.adapters.adapter import Adapter
from lycoris.adapters.loading import Stacks
from lycoris.errors import ConfigError, unknown
from lycoris.layers import batch_layout
from lycoris.layers.batch_layout import BatchLayout
from lycoris.targeting.rank_schedule import WITHOUT_SCHEDULE, RankSchedule, one_if_equal, read_timestep


class RankMasks:
    """The rank masks of an `AdapterSet`, for those of its adapters that follow the timestep.

    Args:
        model: The model whose calls `follow` reads the timestep from.
        stacks: The adapters by layer path.
        changed: Called after every change, so that the adapters get the new mask.
    """

    def __init__(self, model: nn.Module, stacks: Stacks, changed: Callable[[], None]) -> None:
        self.model, self.stacks, self._changed = model, stacks, changed
        self.schedule: RankSchedule | None = None
        """How many ranks act at which timestep; None: not known, all of them."""
        self.mask: Tensor | None = None
        """In force now, (1, r) or (B, r); None: all ranks act."""
        self._layouts: Mapping[str, BatchLayout] = {}
        self._hooks: list[Any] = []
        self._by_hand = False

    @property
    def are_used(self) -> bool:
        """Whether any of the adapters follows the timestep.

        Without one, masks and timesteps may be set and have no effect.
        """
        return any(adapter.algorithm.uses_rank_mask for stack in self.stacks.values() for adapter in stack)

    def set_mask(self, mask: Tensor | None) -> None:
        """Set the mask of the ranks that act: (1, r) for all samples, (B, r) for one each, None for all ranks.

        (r) is taken as (1, r), and (B, r) with equal rows becomes (1, r). Each adapter cuts it to its own rank; ranks
        beyond a shorter mask act. It stays in force until the next call.
        """
        self.mask = None if mask is None else one_if_equal(mask)
        self._changed()

    def set_timesteps(self, timesteps: Tensor | None) -> None:
        """Set the mask that the schedule has for timesteps on 0..T: one for all samples, (B) for one each, None: all.

        Raises:
            ConfigError: Some of the adapters follow the timestep, and `schedule` is not set.
        """
        if timesteps is not None and self.schedule is None and self.are_used:
            raise ConfigError(f"timesteps were given and `schedule` is not set: {WITHOUT_SCHEDULE}")
        self.set_mask(None if timesteps is None or self.schedule is None else self.schedule.mask(timesteps))

    def mask_for(self, adapter: Adapter) -> Tensor | None:
        """Return the mask in force for one adapter, fitted to its rank; None where all of its ranks act.

        None too for an adapter that does not follow the timestep.
        """
        if self.mask is None or not adapter.algorithm.uses_rank_mask:
            return None
        return adapter.algorithm.fit_rank_mask(self.mask)

    @property
    def batch_layout(self) -> Mapping[str, BatchLayout]:
        """Where the samples of a batch are in the layers' inputs, by layer path or glob of paths; {} by default.

        Masks that differ from sample to sample need to know it. By default they take the first axis of an input where
        it has one entry for each sample, and raise `ConfigError` otherwise. Set it to one layout for all layers, or to
        a dict, of which the first key that matches a layer counts.
        """
        return self._layouts

    @batch_layout.setter
    def batch_layout(self, layout: BatchLayout | Mapping[str, BatchLayout] | None) -> None:
        layouts = layout if isinstance(layout, Mapping) else {} if layout is None else {"*": layout}
        for glob, each in layouts.items():
            batch_layout.check_layout(each)
            if not any(fnmatch.fnmatchcase(path, glob) for path in self.stacks):
                raise ConfigError(unknown("layer with adapters", glob, self.stacks))
        self._layouts = dict(layouts)
        self._changed()

    def layout_at(self, path: str) -> BatchLayout | None:
        """Return the batch layout of a layer, by the first key that matches its path.

        None where none does: the samples are then looked for on the first axis.
        """
        return next((each for glob, each in self._layouts.items() if fnmatch.fnmatchcase(path, glob)), None)

    @property
    def is_following(self) -> bool:
        """Whether the timestep is read from the model's calls.

        True also without a `schedule`; the calls are then not looked at.
        """
        return bool(self._hooks)

    def follow(self) -> None:
        """Read the timestep from every call of the model, in any pipeline, and mask ranks by `schedule`.

        A mask that was set by hand stays in force. Does nothing for adapters that do not follow the timestep.
        """
        if not self._hooks and self.are_used:
            before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
            after = self.model.register_forward_hook(self._after, always_call=True)
            self._hooks = [before, after]

    def unfollow(self) -> None:
        """Stop reading timesteps; does nothing while none are read.

        A mask that was set by hand stays in force.
        """
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._by_hand = self.mask is not None
        if not self._by_hand and self.schedule is not None:
            self.set_timesteps(read_timestep(model, args, kwargs, self.schedule.steps))

    def _after(self, *_: Any) -> None:
        if not self._by_hand:
            self.set_mask(None)
