"""What is in force at the passes of an adapter set: strength, masks of ranks, and the timesteps that masks follow."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lycoris.adapters.adapter import Adapter
from lycoris.adapters.loading import Stacks
from lycoris.adapters.strengths import Strengths, finite
from lycoris.errors import AttachError, ConfigError, unknown
from lycoris.layers import batch_layout
from lycoris.layers.batch_layout import BatchLayout
from lycoris.targeting.rank_schedule import WITHOUT_SCHEDULE, RankSchedule, one_if_equal, read_timestep


class Steering:
    """The part of an `AdapterSet` that says how much its adapters count."""

    model: nn.Module
    stacks: Stacks
    schedule: RankSchedule | None
    _merged_at: Strengths

    def __init__(self) -> None:
        self.schedule = None
        self._strengths, self._merged_at = Strengths(), Strengths()
        self._keep: Tensor | None = None
        self._layouts: Mapping[str, BatchLayout] = {}
        self._hooks: list[Any] = []
        self._by_hand = False

    @property
    def strength(self) -> float:
        """In force; of a merged set, the one it was merged at."""
        return (self._merged_at if self.merged else self._strengths).whole

    @property
    def blocks(self) -> Mapping[str, float]:
        """Factors by path of a block; see `set_strength`."""
        return self._strengths.blocks

    def set_strength(self, strength: float, blocks: Mapping[str, float] | None = None) -> None:
        """How much of the adapters counts: 0 is the base model, 1 the trained strength; see `lycoris.algorithms.base`.

        `blocks` multiplies it in parts of the model: path of a block → factor; of several that hold a layer the
        longest counts. None: the same everywhere. Raises `ConfigError` for a block without adapters.
        """
        self._check_unmerged()
        self._strengths = Strengths.of(strength, blocks or {}, self.stacks)
        self.refresh()

    def set_strength_at(self, path: str, strength: float) -> None:
        """Another strength at one layer than at the rest, until `set_strength`; `blocks` then has all of every layer's.

        Raises `ConfigError` for a layer without adapters.
        """
        self._check_unmerged()
        if path not in self.stacks:
            raise ConfigError(unknown("layer with adapters", path, self.stacks))
        self._strengths = self._strengths.with_one(path, finite(strength), self.stacks.keys())
        self.refresh([path])

    def strength_at(self, path: str) -> float:
        """What is set at a layer, whatever the adapters are merged at."""
        return self._strengths.at(path)

    def _check_unmerged(self) -> None:
        if self.merged:
            raise AttachError(f"the adapters are merged at strength {self._merged_at.whole}; unmerge them to change it")

    def factor(self, path: str) -> float:
        """What the strength is multiplied by at a layer."""
        return self._strengths.factor(path)

    def set_rank_mask(self, keep: Tensor | None) -> None:
        """Mask of the ranks that count, (1, r) or (B, r), for algorithms that follow the timestep; None: all."""
        self._keep = None if keep is None else one_if_equal(keep)
        self.refresh()

    def set_timesteps(self, timesteps: Tensor | None) -> None:
        """Timesteps on 0..T, one for all or one per sample, for algorithms that follow them; None: all ranks.

        Raises `ConfigError` when algorithms here follow them and `schedule` is not set.
        """
        if timesteps is not None and self.schedule is None and self.uses_rank_mask:
            raise ConfigError(f"timesteps were given and `schedule` is not set: {WITHOUT_SCHEDULE}")
        self.set_rank_mask(None if timesteps is None or self.schedule is None else self.schedule.mask(timesteps))

    @property
    def batch_layout(self) -> Mapping[str, BatchLayout]:
        """By layer path, or glob of paths, where the samples of a batch are in the layers' inputs; {} by default.

        Masks that differ from sample to sample need to know it. By default they take the first axis of an input where
        it has one entry for each sample, and raise `ConfigError` otherwise. Set it to one layout for all layers, or to
        a dict, of which the first fitting key counts.
        """
        return self._layouts

    @batch_layout.setter
    def batch_layout(self, layout: BatchLayout | Mapping[str, BatchLayout] | None) -> None:
        layouts = layout if isinstance(layout, Mapping) else {} if layout is None else {"*": layout}
        for glob, each in layouts.items():
            batch_layout.check(each)
            if not any(fnmatch.fnmatchcase(path, glob) for path in self.stacks):
                raise ConfigError(unknown("layer with adapters", glob, self.stacks))
        self._layouts = dict(layouts)
        self.refresh()

    def _layout_at(self, path: str) -> BatchLayout | None:
        return next((each for glob, each in self._layouts.items() if fnmatch.fnmatchcase(path, glob)), None)

    @contextmanager
    def at(self, *, strength: float | None = None, timestep: Tensor | float | None = None) -> Iterator[Self]:
        """Strength and timestep for the forward passes inside; what was in force before is put back."""
        before = self._strengths, self._keep
        try:
            if strength is not None:
                self.set_strength(strength, self.blocks)
            if timestep is not None:
                self.set_timesteps(torch.as_tensor(timestep))
            yield self
        finally:
            self._strengths, self._keep = before
            self.refresh()

    def follow_timesteps(self) -> None:
        """Read the timestep off every call of the model, in any pipeline, and mask ranks by `schedule`.

        A mask that was set by hand stays in force.
        """
        if not self._hooks and self.uses_rank_mask:
            before = self.model.register_forward_pre_hook(self._before, with_kwargs=True)
            after = self.model.register_forward_hook(self._after, always_call=True)
            self._hooks = [before, after]

    def unfollow(self) -> None:
        """Stop reading timesteps."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _before(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._by_hand = self._keep is not None
        if not self._by_hand and self.schedule is not None:
            self.set_timesteps(read_timestep(model, args, kwargs, self.schedule.steps))

    def _after(self, *_: Any) -> None:
        if not self._by_hand:
            self.set_rank_mask(None)

    def refresh(self, paths: Iterable[str] | None = None) -> None:
        """Give the adapters what is set here, those that another set has in use left alone.

        On a merged model, the part that should be off is taken away again.
        """
        for path, _, adapter in self._each(paths):
            if self._is_elsewhere(path, adapter):
                continue
            keep = None
            if self._keep is not None and adapter.algorithm.uses_rank_mask:
                keep = adapter.algorithm.fit_rank_mask(self._keep)
                keep = 1 - keep if self.merged else keep
            adapter.merged = self.merged
            taken = self.merged and keep is not None
            strength = -self._merged_at.at(path) if taken else self.strength_at(path)
            adapter.set_call(strength, keep, self._layout_at(path))

    def _each(self, paths: Iterable[str] | None = None) -> Iterator[tuple[str, int, Adapter]]:
        those = self.stacks if paths is None else paths
        return ((path, at, adapter) for path in those for at, adapter in enumerate(self.stacks[path]))

    @property
    def merged(self) -> bool:
        """Whether the adapters are part of the layers' weights."""
        raise NotImplementedError  # AdapterSet has it

    @property
    def uses_rank_mask(self) -> bool:
        """Whether any algorithm here follows the timestep."""
        return any(adapter.algorithm.uses_rank_mask for _, _, adapter in self._each())

    def _is_elsewhere(self, path: str, adapter: Adapter) -> bool:
        """Whether another set has put an adapter on or merged it."""
        raise NotImplementedError  # AdapterSet has it
