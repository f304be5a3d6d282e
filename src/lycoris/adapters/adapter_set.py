"""AdapterSet: the adapters that belong together on one model, and the handle a user keeps."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from typing_extensions import Self

from lycoris.adapters import attach, loading, merging, saving, watching
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.bundle import Base, Bundle
from lycoris.adapters.merging import Merge, MergeReport
from lycoris.adapters.rank_masks import RankMasks
from lycoris.adapters.strengths import Strengths, finite
from lycoris.errors import AttachError, ConfigError, prefix_errors, unknown
from lycoris.layers import base_weights, freezing, paths, sharding
from lycoris.layers.sites import ModelSites, Site, class_name
from lycoris.models import fingerprint
from lycoris.targeting import rank_schedule
from lycoris.targeting.planning import Plan
from lycoris.targeting.rank_schedule import WITHOUT_SCHEDULE, RankSchedule
from lycoris.targeting.recipe import schedule_of

logger = logging.getLogger("LyCORIS")


class AdapterSet:
    """The adapters that belong together on one model, by layer path; built or loaded, and not attached at first.

    States: detached → `attach()` → attached → `merge()` → merged → `unmerge()` → attached; `detach()` from any.
    Sets that are attached at the same time need different names; with None a set takes a free one when attached.
    Of sets that have the same adapters one at a time is attached or merged; what is set on the others waits.
    """

    def __init__(
        self, model: nn.Module | ModelSites, stacks: Mapping[str, tuple[Adapter, ...]], name: str | None = "default"
    ) -> None:
        found = ModelSites.of(model)
        sharding.check_unwrapped(found.model)
        self.model, self.name = found.model, name
        self._attached_as = ""
        self.stacks = loading.in_model_order(self.model, stacks)
        self.sites: Mapping[str, Site] = {path: found.find(path) for path in self.stacks}
        """Where the adapters are, or go: each layer with its path and geometry."""
        # Read now: later the model may be sharded, or the weights merged.
        self.base = Base(class_name(self.model), found.geometries, fingerprint.sample_signs(found))
        """What a file says about the model."""
        self.metadata: dict[str, str] = {}
        """Of the header of the file that they were loaded from, and of the next one."""
        self.rank_masks = RankMasks(self.model, self.stacks, self.refresh)
        """Which ranks act, for adapters that follow the timestep: schedule, batch layout, following a pipeline."""
        self._strengths, self._merged_at = Strengths(), Strengths()
        self._merges: dict[str, Merge] = {}
        self._attached, self._attached_by_merge = False, False
        self._frozen: list[freezing.OwnedParameter] = []

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
        """Build new adapters for a plan; the model does not change until `attach`.

        Their tensors are drawn from torch's global random number generator, and leave the model's output as it is.

        Args:
            model: The model that the plan was made for, or one with the same layers.
            plan: See `lycoris.plan`.
            name: Tells sets apart that are attached to one model at the same time; None takes a free name.
            dtype: Of the parameters. None: float32, or float64 on float64 layers. Half precision rounds small updates
                away, which is warned about unless the optimizer has `stochastic_rounding`.

        Raises:
            PlanError: The plan is for other layers than this model has.
        """
        if not stochastic_rounding:
            loading.warn_of_rounding(dtype, stacklevel=2)
        sites = plan.sites_in(model)
        return cls(sites, loading.build_adapters(sites, plan, dtype), name)

    @classmethod
    def load(cls, model: nn.Module | ModelSites, bundle: Bundle, name: str | None = "default") -> AdapterSet:
        """Build adapters with the tensors of a bundle, such as `lycoris.read` returns; nothing is attached yet.

        The schedule of the file's header, if it has one, becomes `schedule`.

        Raises:
            FileError: The model lacks a layer of the bundle, or has it in another shape.
        """
        sites = ModelSites.of(model)
        made = cls(sites, loading.load_adapters(sites, bundle), name)
        made.metadata, made.schedule = dict(bundle.metadata), schedule_of(bundle.metadata)
        return made

    # -- on and off --------------------------------------------------------------------------------------------------

    def attach(self, *, freeze: bool = True) -> AdapterSet:
        """Put every adapter on its layer, on top of what is there. All or nothing; a second call does nothing.

        The model's own parameters are frozen, so that only adapters train, until `detach`; `freeze=False` leaves them
        as they are. While merged, attached adapters do nothing, as their effect is in the weights. For low-bit layers
        the logger "LyCORIS" has a table of what works on them; see `capabilities`.

        Raises:
            AttachError: Another set has some of these adapters attached or merged, or a layer was replaced.
        """
        if not self._attached:
            self._check_layers()
            self._put_all_on()
            self.refresh()
            if (able := self.capabilities()).low_bit:
                logger.info("the layers under these adapters:\n%s", able)
        self._attached_by_merge = False
        if freeze and not self._frozen:
            self._frozen = freezing.freeze(self.model)
        return self

    def _put_all_on(self) -> None:
        name = attach.free_name(site.module for site in self.sites.values()) if self.name is None else self.name
        # No module's name may have a dot, and names such as v1.5 are common.
        self._attached_as = f"adapter_{name.replace('.', '_')}"
        with ExitStack() as undo:
            for path, at, adapter in self._each():
                module, child = self.sites[path].module, self._child(path, at)
                with prefix_errors(path or None):
                    attach.attach(module, child, adapter)
                undo.callback(attach.detach, module, child)
                attach.keep_off_fast_path(paths.submodule(self.model, path.rpartition(".")[0]), adapter)
            self._attached = True
            undo.pop_all()
        self._watch = watching.Watch(self.model, self.stacks)
        saving.watch_saving(self.model)

    def capabilities(self) -> base_weights.Capabilities:
        """Return what works on the layers under these adapters, by how they store their weight; prints as a table."""
        holders = {path: merging.weight_holder(site) for path, site in self.sites.items()}
        return base_weights.capabilities(holders, watching.without_derivative(self.stacks))

    def detach(self) -> None:
        """Take every adapter off and undo a merge; the model is as it was before. All or nothing."""
        self.check_detachable()
        if self._merges:
            self.unmerge()
        self.rank_masks.unfollow()
        if self._attached:
            self._watch.stop()
            for path, at, _ in self._each():
                attach.detach(self.sites[path].module, self._child(path, at))
        self._attached = False
        freezing.release(self._frozen)
        self._frozen = []
        saving.unwatch_saving(self.model)

    def check_detachable(self) -> None:
        """Raise `AttachError` where `detach` would, and change nothing."""
        self.check_unmergeable()
        for site in self.sites.values() if self._attached else ():
            attach.check_detachable(site.module)

    @property
    def attached(self) -> bool:
        return self._attached

    @property
    def merged(self) -> bool:
        return bool(self._merges)

    def _check_layers(self) -> None:
        for path, site in self.sites.items():
            if not site.is_in(self.model):
                raise AttachError(
                    f"{path} was replaced by another module since these adapters were made; build them again"
                )
            if any(self._is_elsewhere(path, adapter) for adapter in self.stacks[path]):
                raise AttachError(f"another set has the adapter of {path} attached or merged; take it off there first")

    def _is_elsewhere(self, path: str, adapter: Adapter) -> bool:
        """Whether another set has put an adapter on or merged it."""
        used = adapter.merged or attach.is_on(self.sites[path].module, adapter)
        return used and not (self._attached or self.merged)

    # -- how much they count -----------------------------------------------------------------------------------------

    @property
    def strength(self) -> float:
        """In force for all of the model; of a merged set, the one it was merged at."""
        return (self._merged_at if self.merged else self._strengths).overall

    @property
    def strengths(self) -> Strengths:
        """What is set, layer by layer: `strengths.at(path)`. A merge does not change it."""
        return self._strengths

    def set_strength(
        self, strength: float, blocks: Mapping[str, float] | None = None, *, at: str | None = None
    ) -> None:
        """Set how much of the adapters counts: 0 is the base model, 1 the trained strength; between, W + s·(V - W).

        Args:
            strength: For the layers, any finite number.
            blocks: Factors by path of a module, for the layers inside; of several that hold a layer the longest path
                counts. None: the same strength everywhere.
            at: The path of one layer, to change that one alone and leave the others as they are.

        Raises:
            ConfigError: A block or a layer has no adapters, or the strength is not finite.
            AttachError: The adapters are merged.
        """
        if self.merged:
            raise AttachError(f"the adapters are merged at strength {self._merged_at.overall}; unmerge to change it")
        if at is None:
            self._strengths = Strengths.of(strength, blocks or {}, self.stacks)
        elif at in self.stacks:
            self._strengths = self._strengths.with_one(at, finite(strength), self.stacks.keys())
        else:
            raise ConfigError(unknown("layer with adapters", at, self.stacks))
        self.refresh(None if at is None else [at])

    @property
    def schedule(self) -> RankSchedule | None:
        """How many ranks act at which timestep; None: not known, all of them."""
        return self.rank_masks.schedule

    @schedule.setter
    def schedule(self, schedule: RankSchedule | None) -> None:
        self.rank_masks.schedule = schedule

    def set_timesteps(self, timesteps: Tensor | None) -> None:
        """Set the timesteps of the passes from now on; see `RankMasks.set_timesteps`."""
        self.rank_masks.set_timesteps(timesteps)

    def set_rank_mask(self, mask: Tensor | None) -> None:
        """Set the mask of the ranks that act; see `RankMasks.set_mask`."""
        self.rank_masks.set_mask(mask)

    @contextmanager
    def at(self, *, strength: float | None = None, timestep: Tensor | float | None = None) -> Iterator[Self]:
        """Set strength and timestep for the passes inside a `with` block; what was in force before is put back."""
        before = self._strengths, self.rank_masks.mask
        try:
            if strength is not None:
                self.set_strength(strength, self._strengths.blocks)
            if timestep is not None:
                self.set_timesteps(torch.as_tensor(timestep))
            yield self
        finally:
            self._strengths, self.rank_masks.mask = before
            self.refresh()

    def refresh(self, paths: Iterable[str] | None = None) -> None:
        """Give the adapters, or those of some layers, what is set here. Those that another set uses are left alone.

        On a merged model, the ranks that should be off are subtracted again.
        """
        for path, _, adapter in self._each(paths):
            if self._is_elsewhere(path, adapter):
                continue
            mask = self.rank_masks.mask_for(adapter)
            adapter.merged = self.merged
            strength = self._strengths.at(path)
            if self.merged and mask is not None:
                strength, mask = -self._merged_at.at(path), 1 - mask
            adapter.set_call(strength, mask, self.rank_masks.layout_at(path))

    def _each(self, paths: Iterable[str] | None = None) -> Iterator[tuple[str, int, Adapter]]:
        those = self.stacks if paths is None else paths
        return ((path, at, adapter) for path in those for at, adapter in enumerate(self.stacks[path]))

    # -- merging -----------------------------------------------------------------------------------------------------

    def merge(
        self,
        strength: float | None = None,
        *,
        into_low_bit: bool = False,
        stochastic_seed: int | None = None,
        untie: bool = False,
    ) -> MergeReport:
        """Fold the adapters into the layers' weights, at the strength in force or the one given.

        Computed in float32 (float64 for such weights) and rounded once, with a `stochastic_seed` up or down at random;
        the report says how much of each update that lost. `unmerge` puts the very same old parameters back.

        Raises `AttachError`, and changes nothing, for low-bit weights unless `into_low_bit` asks for it, and for
        layers that share a parameter with other modules unless `untie` does: they no longer do so while merged.
        """
        self.check_mergeable(into_low_bit=into_low_bit, stochastic=stochastic_seed is not None, untie=untie)
        at = self._strengths if strength is None else Strengths(finite(strength), self._strengths.blocks)
        merges = merging.fold_all(self.sites, self.stacks, at.at, stochastic_seed)
        report = merging.report(self.model, self.sites, merges, at.overall, self.stacks if self._attached else {})
        report.warn(stacklevel=2)
        if self.rank_masks.are_used and self.schedule is None:
            what = "merging adapters that were trained with a timestep schedule, without one"
            warnings.warn(f"{what}: {WITHOUT_SCHEDULE}", stacklevel=2)
        with ExitStack() as undo:
            undo.callback(self._take_out, merges)
            if self.rank_masks.are_used and not self._attached:
                self.attach(freeze=False)
                self._attached_by_merge = True
            for path, merge in merges.items():
                base_weights.install(self.sites[path].module, merge.new, merge.attribute)
            self._merges, self._merged_at = merges, at
            self.refresh()
            undo.pop_all()
        return report

    def check_mergeable(self, *, into_low_bit: bool = False, stochastic: bool = False, untie: bool = False) -> None:
        """Raise `AttachError` where `merge` would, and change nothing."""
        if self.merged:
            raise AttachError("these adapters are merged already")
        self._check_layers()
        merging.check_foldable(self.model, self.sites, self.stacks, into_low_bit, stochastic, untie)

    def unmerge(self) -> None:
        """Put the layers' own parameters back, exactly; attached adapters act again.

        Raises `AttachError`, and changes nothing, when something else was merged, loaded or trained on top.
        """
        self.check_unmergeable()
        self._take_out(self._merges)

    def check_unmergeable(self) -> None:
        """Raise `AttachError` where `unmerge` would, and change nothing."""
        for path, merge in self._merges.items():
            merging.check_untouched(path, self.sites[path].module, merge)

    def _take_out(self, merges: Mapping[str, Merge]) -> None:
        """Give layers their own parameters again, whether or not they have got those of the merge yet."""
        for path, merge in merges.items():
            merging.restore_parameters(self.sites[path].module, merge)
        for _, _, adapter in self._each(merges):
            adapter.merged = False
        self._merges = {}
        self.refresh()
        if self._attached_by_merge:
            self._attached_by_merge = False
            self.detach()

    # -- contents ----------------------------------------------------------------------------------------------------

    def parameters(self) -> Iterator[nn.Parameter]:
        """Trainable parameters, the same objects in the same order until FSDP2 shards the model: then its DTensors.

        Those that slices of one adapter share are given once.
        """
        return (parameter for _, parameter in self.named_parameters())

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """`parameters` with their names in `state_dict`."""
        for path, at, adapter in loading.each_once(self.stacks):
            for slot, tensor in adapter.trained_tensors().items():
                if isinstance(tensor, nn.Parameter):
                    yield f"{path}/{at}/{slot}", tensor

    def state_dict(self) -> dict[str, Tensor]:
        """Every tensor under `path/index/slot`, detached and whole: for checkpoints of this library.

        On a sharded model collective: every process calls it, and gets the same.
        """
        return loading.state(self.stacks)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in what `state_dict` gave. Raises `FileError` unless that fits, `AttachError` while merged.

        On a sharded model collective, and the first process's values go to all.
        """
        loading.load_state(self.stacks, state)

    def fill(self, bundle: Bundle) -> None:
        """Copy in tensors for layers that these adapters have. Raises as `load_state_dict` does.

        On a sharded model collective, and the first process's values go to all.
        """
        loading.fill(self.sites, self.stacks, bundle)

    def bundle(self) -> Bundle:
        """The adapters as a value, to be written to a file.

        On a sharded model collective: every process calls it and gets the same, and one of them writes.
        """
        metadata = {key: value for key, value in self.metadata.items() if key != rank_schedule.SCHEDULE_KEY}
        if self.schedule is not None and self.rank_masks.are_used:
            metadata[rank_schedule.SCHEDULE_KEY] = str(self.schedule)
        return Bundle(loading.entries(self.stacks), metadata, self.base)

    def _child(self, path: str, at: int) -> str:
        attribute = self.stacks[path][at].attribute
        return "_".join([self._attached_as, *([attribute] if attribute else []), *([str(at)] if at else [])])
