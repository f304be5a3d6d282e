"""`LycorisBaseModule`: one adapter on one layer, under the names that scripts know.

In a network it is a view of one of the network's adapters. Made by itself it has a set of its own, and goes on and off,
in and out of the weight by itself.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch import Tensor, nn
from typing_extensions import Self

from lycoris.adapters import attach
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.adapters.loading import complete_tensors
from lycoris.adapters.recomputation import replayed_random
from lycoris.adapters.strengths import finite
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.layer_below import BareWeight
from lycoris.algorithms.tensors import read_tensors
from lycoris.compat import timestep_masks
from lycoris.compat.adapter_view import AdapterView
from lycoris.compat.assignable import warn_of_both
from lycoris.compat.legacy_options import rename_options, tell
from lycoris.compat.parametrize import Parametrised
from lycoris.compat.quantized import RefusedError, check_mergeable, check_trainable
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.layers import base_weights
from lycoris.layers.geometry import Affine, Geometry, describe
from lycoris.layers.sites import Site
from lycoris.targeting.options import TOP, UNUSED_SIZES, parse_optional
from lycoris.targeting.rank_schedule import one_if_equal
from lycoris.targeting.recipe import Recipe

logger = logging.getLogger("LyCORIS")

HEAD = ("multiplier", "lora_dim", "alpha", "dropout", "rank_dropout", "module_dropout")
"""What all classes but that of norms take after the layer, in this order."""


class LycorisBaseModule(AdapterView):
    """An adapter and its layer, on and off, in and out of the weight."""

    algo: ClassVar[str] = "lora"
    """Name of the algorithm in configs."""
    weight_list: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors in files, in the order of `make_module_from_state_dict`."""
    weight_list_det: ClassVar[tuple[str, ...]] = ()
    """Names that tell it from others."""
    positional: ClassVar[tuple[str, ...]] = (
        *("use_tucker", "use_scalar", "rank_dropout_scale", "weight_decompose", "wd_on_out", "bypass_mode", "rs_lora"),
    )
    """What it takes after `HEAD`, in this order."""

    _member: tuple[AdapterSet, str] | None = None
    """The set of its network, if it has one, and its path there."""
    _told_twice: bool = False
    """Whether a merge has said that its strength and the multiplier multiply."""

    def __init__(
        self,
        lora_name: str,
        org_module: nn.Module,
        multiplier: float = 1.0,
        lora_dim: int = 4,
        alpha: float | None = 1,
        dropout: float = 0.0,
        rank_dropout: float = 0.0,
        module_dropout: float = 0.0,
        *rest: Any,
        **options: Any,
    ) -> None:
        """A new adapter for one layer, not applied. `rest` is `positional`; options are those of configs, and ones
        that say nothing to this algorithm are reported on the logger "LyCORIS".

        Raises `ConfigError` for a layer that it cannot serve, and for an option that no algorithm has. alpha 0 or None
        is `lora_dim`: no scaling.
        """
        geometry = describe(org_module)
        if geometry is None:
            raise ConfigError(f"{type(org_module).__name__} is not a layer that {type(self).__name__} can serve")
        given = {"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout}
        given |= self._name_values(rest, self.positional) | options
        algorithm = self._algorithm(geometry, lora_dim, alpha, given)
        algorithm.check(geometry)
        check_trainable({lora_name: org_module}, {lora_name: (algorithm,)})
        adapter = Adapter(algorithm, geometry, **base_weights.home(org_module))
        place = Site("", org_module, "", geometry)
        adapter.initialize(attach.top(place))
        bypass: bool | None = parse_optional(given.get("bypass_mode"), "bypass_mode", bool)
        self._become(lora_name, adapter, place, bypass, single=True)
        self.multiplier = multiplier

    @classmethod
    def _name_values(cls, values: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
        if len(values) > len(names):
            raise ConfigError(f"{cls.__name__} takes {', '.join(names)} in this order; {len(values)} values were given")
        return dict(zip(names, values, strict=False))

    @classmethod
    def _algorithm(cls, g: Geometry, dim: int, alpha: float | None, options: Mapping[str, Any]) -> Algorithm:
        recipe = Recipe.parse(settings(cls.algo, dim, alpha, options))
        tell(recipe.remarks)
        return recipe.algorithm(g, {})

    @classmethod
    def of(cls, lora_name: str, adapter: Adapter, place: Site, bypass_mode: bool | None = None) -> Self:
        """A view of an adapter that is there already."""
        made = cls.__new__(cls)
        made._become(lora_name, adapter, place, bypass_mode)
        return made

    def _become(
        self, lora_name: str, adapter: Adapter, place: Site, bypass_mode: bool | None, *, single: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.lora_name, self.adapter, self._place, self._bypass = lora_name, adapter, place, bypass_mode
        self._single = single
        self._alone: AdapterSet | None = None
        self._parameter: Parametrised | None = None
        self._follow_masks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own has no types
        self._follow_masks()

    def _follow_masks(self) -> None:
        # Of a network's modules the network itself is told of masks.
        if self.algorithm.uses_rank_mask and (self._single or self._alone is not None):
            timestep_masks.follow(self)

    # -- on and off --------------------------------------------------------------------------------------------------

    @property
    def multiplier(self) -> float:
        if self._alone is not None and self._on_its_own:
            return self._alone.strengths.at(self.adapter.attribute)
        if self._member is None:
            return float(self.adapter.call.strength)
        adapters, path = self._member
        return adapters.strengths.at(path)

    @multiplier.setter
    def multiplier(self, multiplier: float) -> None:
        self._check_unmerged()
        if self._alone is not None and self._on_its_own:
            self._alone.set_strength(multiplier)
        if self._member is not None:
            self._member[0].set_strength(multiplier, at=self._member[1])
        elif not self._on_its_own:
            self.adapter.set_call(finite(multiplier), self.adapter.call.rank_mask)

    def _check_unmerged(self) -> None:
        if self.adapter.merged:
            raise AttachError(f"{self.lora_name or 'this module'} is merged; restore it to change its multiplier")

    def set_rank_mask(self, keep: Tensor | None) -> None:
        """Which ranks count, for algorithms that follow the timestep; see `AdapterSet.set_rank_mask`."""
        if self._alone is not None and self._on_its_own:
            self._alone.set_rank_mask(keep)
        elif not self._by_network:
            fit = None if keep is None else self.algorithm.fit_rank_mask(one_if_equal(keep))
            self.adapter.set_call(self.multiplier, fit)

    def apply_to(self, **_: Any) -> None:
        """Put it on its layer. A second call does nothing."""
        if self._parameter is not None:
            if not self._parameter.merged:
                self._parameter.put(self)
        elif self._on_its_own or not self._applied():
            self._own().attach(freeze=False)

    def restore(self) -> None:
        """Take it off, and undo a merge; the layer is as it was."""
        if self._parameter is not None:
            self._parameter.unmerge(self, self.adapter, put=False)
            self._parameter.take(self)
        elif self._by_network:
            raise ConfigError(f"{self.lora_name} was applied by its network; call restore() of that")
        elif self._alone is not None:
            self._alone.detach()
            self._hand_back()

    def merge_to(self, multiplier: float = 1.0, *, precise: bool = False) -> None:
        """Fold it into the weight at `multiplier` times its own, without dropout; computed in float32 and rounded
        once, whether `precise` or not. `restore` undoes it exactly. Raises a `RuntimeError` for weights of few bits,
        and `AttachError` for a second merge."""
        self._told_twice = warn_of_both(multiplier, self.multiplier, told=self._told_twice)
        if self._parameter is not None:
            if self.algorithm.uses_rank_mask:
                warnings.warn(
                    "merging adapters that were trained with a timestep schedule into a parameter: all ranks count "
                    "from here on, whatever the timestep",
                    stacklevel=2,
                )
            self._parameter.merge(self, self.adapter, multiplier * self.multiplier)
        else:
            check_mergeable({self.lora_name: self._holder})
            self._own().merge(multiplier * self.multiplier)

    def onfly_merge(self, multiplier: float = 1.0) -> None:
        """Fold it in for a while."""
        self.merge_to(multiplier)

    def onfly_restore(self) -> None:
        """Undo `onfly_merge`; an applied module acts again."""
        if self._parameter is not None:
            self._parameter.unmerge(self, self.adapter, put=True)
        elif self._by_network and self.adapter.merged:
            raise ConfigError(f"{self.lora_name} was merged by its network; call onfly_restore() of that")
        elif self._alone is not None and self._on_its_own:
            self._alone.unmerge()
            self._hand_back()

    def _hand_back(self) -> None:
        """Let what its network has set count again, unless it is still applied by itself."""
        if self._member is not None:
            self._member[0].refresh([self._member[1]])

    def _check_restorable(self) -> None:
        """Raise `AttachError` where `restore` would, for a module that was applied or merged by itself."""
        if self._alone is not None:
            self._alone.check_detachable()

    def _applied(self) -> bool:
        return attach.is_on(self.org_module[0], self.adapter)

    @property
    def _on_its_own(self) -> bool:
        """Whether it was applied or merged by itself."""
        return self._alone is not None and (self._alone.attached or self._alone.merged)

    @property
    def _by_network(self) -> bool:
        """Whether its network applied or merged it."""
        return not self._on_its_own and (self._applied() or self.adapter.merged)

    def _own(self) -> AdapterSet:
        """The set of this module alone, with what is in force."""
        if self._by_network:
            raise ConfigError(f"{self.lora_name} is applied by its network; merge and restore that")
        strength, keep = self.multiplier, self.adapter.call.rank_mask
        if self._alone is None:
            self._alone = AdapterSet(self.org_module[0], {self.adapter.attribute: (self.adapter,)}, name=None)
        if not self._on_its_own:
            self._follow_masks()
            mask = timestep_masks.get_timestep_mask()
            self._alone.set_strength(strength)
            self._alone.set_rank_mask(keep if mask is None else mask)
        return self._alone

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives with this adapter on it. Of a parametrisation: the adapted weight."""
        state = self.adapter.state_of_pass(x)
        with replayed_random(state.random, x.device):
            if self._parameter is None:
                return self.adapter(self._below(), x, state)
            call = self.adapter.draw_call(state, x)
            return self.adapter.adapt_affine(self._widen(Affine(x, None)), call).weight.to(x.dtype)

    @classmethod
    def parametrize(cls, org_module: nn.Module, attr: str, *args: Any, **kwargs: Any) -> Self:
        """Make a parameter of any module what an adapter makes of it, by `torch.nn.utils.parametrize`.

        The arguments after `attr` are those of the class after `org_module`. Raises a `RuntimeError` for `full` and for
        weights of few bits.
        """
        if cls.algo == "full":
            raise RefusedError("full stores a whole weight: train the parameter itself instead of parametrising it")
        parameter = Parametrised(org_module, attr)
        own = cls._name_values(args, (*HEAD, *cls.positional)) | kwargs
        multiplier, dim, alpha = (own.pop(n, d) for n, d in (("multiplier", 1.0), ("lora_dim", 4), ("alpha", 1)))
        geometry = parameter.geometry
        algorithm = cls._algorithm(geometry, dim, alpha, own)
        algorithm.check(geometry)
        adapter = Adapter(algorithm, geometry, **parameter.home)
        adapter.initialize(BareWeight(geometry, getattr(org_module, attr).detach()))
        made = cls.__new__(cls)
        made._become("", adapter, Site("", org_module, "", geometry), False, single=True)
        made.multiplier, made._parameter = multiplier, parameter
        parameter.put(made)
        return made

    @classmethod
    def algo_check(cls, state_dict: Mapping[str, Tensor], lora_name: str) -> bool:
        """Whether tensors of that layer are of this class."""
        return any(f"{lora_name}.{name}" in state_dict for name in cls.weight_list_det)

    @classmethod
    def extract_state_dict(cls, state_dict: Mapping[str, Tensor], lora_name: str) -> list[Tensor | None]:
        """The tensors of a layer in the order of `weight_list`, None for those it has not."""
        return [state_dict.get(f"{lora_name}.{name}") for name in cls.weight_list]

    @classmethod
    def make_module_from_state_dict(cls, lora_name: str, orig_module: nn.Module, *weights: Tensor | None) -> Self:
        """A module with the tensors of a file, in the order of `weight_list`."""
        if len(weights) != len(cls.weight_list):
            raise FileError(
                f"{lora_name}: {cls.__name__} is made of {len(cls.weight_list)} tensors, None for those that the file "
                f"has not ({', '.join(cls.weight_list) or 'none'}); {len(weights)} were given"
            )
        place = Site.of(orig_module)
        tensors = {n: t for n, t in zip(cls.weight_list, weights, strict=True) if t is not None}
        algorithm, values = read_tensors(tensors, place.geometry, lora_name)
        adapter = Adapter(algorithm, place.geometry, **base_weights.home(orig_module))
        adapter.fill(complete_tensors(Entry(algorithm, place.geometry, values), place))
        made = cls.__new__(cls)
        made._become(lora_name, adapter, place, None, single=True)
        return made


def settings(algo: str, dim: int | None, alpha: float | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """A config for one module of an algorithm, from what its class was given.

    What configs have and a single module does not is told and left out. Raises `ConfigError` for another `algo`.
    """
    given = rename_options(options)
    if given.get("algo", algo) != algo:
        raise ConfigError(f"this is a module of {algo}, and algo={given['algo']!r} was given; use that one's class")
    for name in TOP:
        if given.pop(name, None) is not None and name != "algo":
            logger.info("%s has no effect on a single module, whose sizes are lora_dim and alpha", name)
    # The defaults of the class say nothing of what was asked for.
    sizes, unused = {"linear_dim": (dim, 4), "linear_alpha": (alpha, 1)}, UNUSED_SIZES.get(algo, ())
    given |= {name: value for name, (value, usual) in sizes.items() if name not in unused or value != usual}
    return given | {"algo": algo}
