"""AdapterSet: the adapters that belong together on one model, and the handle a user keeps."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lycoris import attach, bases, filling, fingerprint, merging, saving, sharding
from lycoris.adapter import Adapter
from lycoris.bundle import Base, Bundle
from lycoris.errors import AttachError, ConfigError, unknown
from lycoris.geometry import class_name, site, sites
from lycoris.merging import Merge, MergeReport
from lycoris.planning import Plan
from lycoris.recipe import schedule_of
from lycoris.schedule import WITHOUT_SCHEDULE, RankSchedule, read_timestep
from lycoris.strengths import Strengths, finite

logger = logging.getLogger("LyCORIS")


class AdapterSet:
    """Adapters by layer path, made but not yet attached.

    States: detached → `attach()` → attached → `merge()` → merged → `unmerge()` → attached; `detach()` from any.
    Sets that are attached at the same time need different names; with None a set takes a free one when attached.
    Of sets that have the same adapters one at a time is attached or merged; what is set on the others waits.
    """

    def __init__(
        self, model: nn.Module, stacks: Mapping[str, tuple[Adapter, ...]], name: str | None = "default"
    ) -> None:
        sharding.check_unwrapped(model)
        # Later the model may be sharded, or the weights merged.
        self.model, self.name, self._signs = model, name, fingerprint.of_weights(model)
        self._attached_as = ""
        self.stacks = dict(stacks)
        self.schedule: RankSchedule | None = None
        self.metadata: dict[str, str] = {}
        self._layers = {path: site(model, path).module for path in self.stacks}
        self._merges: dict[str, Merge] = {}
        self._strengths, self._merged_at = Strengths(), Strengths()
        self._keep: Tensor | None = None
        self._attached = self._attached_by_merge = self._by_hand = False
        self._hooks: list[Any] = []

    # -- making ------------------------------------------------------------------------------------------------------

    @classmethod
    def build(
        cls,
        model: nn.Module,
        plan: Plan,
        name: str | None = "default",
        dtype: torch.dtype | None = None,
        *,
        stochastic_rounding: bool = False,
    ) -> AdapterSet:
        """New adapters for a plan, initialised with torch's global random numbers; nothing is attached yet.

        Parameters are float32 (float64 on such layers) unless told otherwise: in bfloat16 small updates round away,
        which is warned about unless `stochastic_rounding` says that the optimizer rounds up and down by chance.
        """
        if not stochastic_rounding:
            filling.warn_of_rounding(dtype, stacklevel=2)
        return cls(model, filling.built(model, plan, dtype), name)

    @classmethod
    def load(cls, model: nn.Module, bundle: Bundle, name: str | None = "default") -> AdapterSet:
        """Adapters with the tensors of a bundle and the schedule of its header; nothing is attached yet.

        Raises `FileError` for layers that the model does not have, or has in another shape.
        """
        made = cls(model, filling.loaded(model, bundle), name)
        made.metadata, made.schedule = dict(bundle.metadata), schedule_of(bundle.metadata)
        return made

    # -- on and off --------------------------------------------------------------------------------------------------

    def attach(self) -> AdapterSet:
        """Put every adapter on its layer, on top of what is there. All or nothing; a second call does nothing.

        Raises `AttachError` while another set has some of them attached or merged.

        While merged, the adapters are there and wait: what they do is in the weights. On low-bit layers the logger
        "LyCORIS" says what works on them, which `capabilities` has as a value.
        """
        if self._attached:
            self._attached_by_merge = False
            return self
        self._check_layers()
        self._attached_as = f"adapter_{attach.free_name(self._layers.values()) if self.name is None else self.name}"
        with ExitStack() as undo:
            for path, at, adapter in self._each():
                self._put_on(path, at, adapter)
                undo.callback(attach.detach, self._layers[path], self._child(path, at))
            self._attached = True
            undo.pop_all()
        saving.watch(self.model)
        self.refresh()
        if (able := self.capabilities()).low_bit:
            logger.info("the layers under these adapters:\n%s", able)
        return self

    def capabilities(self) -> bases.Capabilities:
        """What works on the layers under these adapters, by how they store their weight; prints as a table."""
        return bases.capabilities(self._holders())

    def _put_on(self, path: str, at: int, adapter: Adapter) -> None:
        try:
            attach.attach(self._layers[path], self._child(path, at), adapter)
        except AttachError as error:
            raise AttachError(f"{path}: {error}") from error
        attach.keep_off_fast_path(self.model.get_submodule(path.rpartition(".")[0]), adapter)

    def detach(self) -> None:
        """Take every adapter off and undo a merge; the model is as it was before. All or nothing."""
        self.check_detachable()
        if self._merges:
            self.unmerge()
        self.unfollow()
        if self._attached:
            for path, at, _ in self._each():
                attach.detach(self._layers[path], self._child(path, at))
        self._attached = False
        saving.unwatch(self.model)

    def check_detachable(self) -> None:
        """Raise `AttachError` where `detach` would, and change nothing."""
        self.check_unmergeable()
        for layer in self._layers.values() if self._attached else ():
            attach.check_detachable(layer)

    @property
    def attached(self) -> bool:
        return self._attached

    @property
    def merged(self) -> bool:
        return bool(self._merges)

    @property
    def rank_masked(self) -> bool:
        """Whether any algorithm here follows the timestep."""
        return any(adapter.algorithm.rank_masked for _, _, adapter in self._each())

    def _check_layers(self) -> None:
        for path, layer in self._layers.items():
            if site(self.model, path).module is not layer:
                raise AttachError(
                    f"{path} was replaced by another module since these adapters were made; make them anew"
                )
            if any(self._is_elsewhere(path, adapter) for adapter in self.stacks[path]):
                raise AttachError(f"another set has the adapter of {path} attached or merged; take it off there first")

    def _is_elsewhere(self, path: str, adapter: Adapter) -> bool:
        """Whether another set has put an adapter on or merged it."""
        return not (self._attached or self.merged) and (adapter.merged or attach.is_on(self._layers[path], adapter))

    # -- in force ----------------------------------------------------------------------------------------------------

    @property
    def strength(self) -> float:
        """In force; of a merged set, the one it was merged at."""
        return (self._merged_at if self.merged else self._strengths).whole

    @property
    def blocks(self) -> Mapping[str, float]:
        """Factors by path of a block; see `set_strength`."""
        return self._strengths.blocks

    def set_strength(self, strength: float, blocks: Mapping[str, float] | None = None) -> None:
        """How much of the adapters counts: 0 is the base model, 1 the trained strength; see `lycoris.algorithm`.

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

    def set_keep(self, keep: Tensor | None) -> None:
        """Mask of the ranks that count, (1, r) or (B, r), for algorithms that follow the timestep; None: all."""
        self._keep = None if keep is None else keep.reshape(-1, keep.shape[-1])
        self.refresh()

    def set_timesteps(self, timesteps: Tensor | None) -> None:
        """Timesteps on 0..T, one for all or one per sample, for algorithms that follow them; None: all ranks.

        Raises `ConfigError` when algorithms here follow them and `schedule` is not set.
        """
        if timesteps is not None and self.schedule is None and self.rank_masked:
            raise ConfigError(f"timesteps were given and `schedule` is not set: {WITHOUT_SCHEDULE}")
        self.set_keep(None if timesteps is None or self.schedule is None else self.schedule.mask(timesteps))

    @contextmanager
    def at(self, *, strength: float | None = None, timestep: Tensor | float | None = None) -> Iterator[AdapterSet]:
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
        if not self._hooks and self.rank_masked:
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
            self.set_keep(None)

    def refresh(self, paths: Iterable[str] | None = None) -> None:
        """Give the adapters what is set here, those that another set has in use left alone.

        On a merged model, the part that should be off is taken away again.
        """
        for path, _, adapter in self._each(paths):
            if self._is_elsewhere(path, adapter):
                continue
            keep = None
            if self._keep is not None and adapter.algorithm.rank_masked:
                keep = adapter.algorithm.fit_keep(self._keep)
                keep = 1 - keep if self.merged else keep
            adapter.merged = self.merged
            taken = self.merged and keep is not None
            adapter.set_call(-self._merged_at.at(path) if taken else self.strength_at(path), keep)

    # -- merging -----------------------------------------------------------------------------------------------------

    def merge(
        self, strength: float | None = None, *, into_low_bit: bool = False, stochastic_seed: int | None = None
    ) -> MergeReport:
        """Fold the adapters into the layers' weights, at the strength in force or the one given.

        Computed in float32 (float64 for such weights) and rounded once; the report says how much of each update that
        took. `stochastic_seed` rounds up or down by chance, so that small updates survive in the mean. The layers' old
        parameters are kept aside and `unmerge` puts the very same objects back. Layers that share a parameter no
        longer do so while merged.

        Raises `AttachError`, and changes nothing, for low-bit weights unless `into_low_bit` asks for it.
        """
        self.check_mergeable(into_low_bit=into_low_bit, stochastic=stochastic_seed is not None)
        at = self._strengths if strength is None else Strengths(finite(strength), self.blocks)
        holders = self._holders()
        merges = {
            path: merging.fold(path, holder, self.stacks[path], at.at(path), stochastic_seed)
            for path, holder in holders.items()
        }
        report = merging.report(holders, merges, at.whole)
        report.warn(stacklevel=2)
        if self.rank_masked and self.schedule is None:
            what = "merging adapters that were trained with a timestep schedule, without one"
            warnings.warn(f"{what}: {WITHOUT_SCHEDULE}", stacklevel=2)
        with ExitStack() as undo:
            undo.callback(self._take_out, merges)
            if self.rank_masked and not self._attached:
                self.attach()
                self._attached_by_merge = True
            for path, merge in merges.items():
                bases.install(self._layers[path], merge.new, merge.attribute)
            self._merges, self._merged_at = merges, at
            self.refresh()
            undo.pop_all()
        return report

    def check_mergeable(self, *, into_low_bit: bool = False, stochastic: bool = False) -> None:
        """Raise `AttachError` where `merge` would, and change nothing."""
        if self.merged:
            raise AttachError("these adapters are merged already")
        self._check_layers()
        for path, holder in self._holders().items():
            merging.check(path, self._layers[path], holder, self.stacks[path], into_low_bit, stochastic)

    def _holders(self) -> dict[str, nn.Module]:
        """What has a weight, by path: the layers, and stand-ins for bare parameters."""
        return {path: bases.holder(layer, self.stacks[path][0].attribute) for path, layer in self._layers.items()}

    def unmerge(self) -> None:
        """Put the layers' own parameters back, exactly; attached adapters act again.

        Raises `AttachError`, and changes nothing, when something else was merged, loaded or trained on top.
        """
        self.check_unmergeable()
        self._take_out(self._merges)

    def check_unmergeable(self) -> None:
        """Raise `AttachError` where `unmerge` would, and change nothing."""
        for path, merge in self._merges.items():
            merging.check_untouched(path, self._layers[path], merge)

    def _take_out(self, merges: Mapping[str, Merge]) -> None:
        """Give layers their own parameters again, whether or not they have got those of the merge yet."""
        for path, merge in merges.items():
            merging.restore(self._layers[path], merge)
        for _, _, adapter in self._each(merges):
            adapter.merged = False
        self._merges = {}
        self.refresh()
        if self._attached_by_merge:
            self._attached_by_merge = False
            self.detach()

    # -- contents ----------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters, the same objects in the same order until FSDP2 shards the model: then its DTensors."""
        for _, _, adapter in self._each():
            yield from (tensor for tensor in adapter.kept().values() if isinstance(tensor, nn.Parameter))

    def parameter_count(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor under `path/index/slot`, detached and whole: for checkpoints of this library.

        On a sharded model collective: every process calls it, and gets the same.
        """
        return filling.state(self.stacks)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` gave. Raises `FileError` unless that fits, `AttachError` while merged.

        On a sharded model collective, and the first process's values go to all.
        """
        filling.load_state(self.stacks, state)

    def fill(self, bundle: Bundle) -> None:
        """Copy in tensors for layers that these adapters have. Raises as `load_state_dict` does.

        On a sharded model collective, and the first process's values go to all.
        """
        filling.fill(self.model, self.stacks, bundle)

    def bundle(self) -> Bundle:
        """The adapters as a value, to be written to a file.

        On a sharded model collective: every process calls it and gets the same, and one of them writes.
        """
        base = Base(class_name(self.model), {place.path: place.geometry for place in sites(self.model)}, self._signs)
        return Bundle(filling.entries(self.stacks), dict(self.metadata), base)

    def _each(self, paths: Iterable[str] | None = None) -> Iterator[tuple[str, int, Adapter]]:
        those = self.stacks if paths is None else paths
        return ((path, at, adapter) for path in those for at, adapter in enumerate(self.stacks[path]))

    def _child(self, path: str, at: int) -> str:
        attribute = self.stacks[path][at].attribute
        return "_".join([self._attached_as, *([attribute] if attribute else []), *([str(at)] if at else [])])
