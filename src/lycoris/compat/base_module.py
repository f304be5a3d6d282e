"""`LycorisBaseModule`: one adapter on one layer, with the attributes that scripts expect.

In a network it is a view of one of the network's adapters. Built by itself it has an adapter set of its own, and is
applied, merged and restored by itself.
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
from lycoris.compat.assignable import warn_of_both_strengths
from lycoris.compat.legacy_options import log_remarks, rename_options
from lycoris.compat.parametrize import ParametrizedTensor
from lycoris.compat.quantized import RefusedError, check_mergeable, check_trainable
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.layers import base_weights
from lycoris.layers.geometry import Affine, Geometry, describe
from lycoris.layers.sites import Site
from lycoris.targeting.options import TOP, UNUSED_SIZES, parse_optional
from lycoris.targeting.rank_schedule import one_if_equal
from lycoris.targeting.recipe import Recipe

logger = logging.getLogger("LyCORIS")

COMMON_POSITIONAL = ("multiplier", "lora_dim", "alpha", "dropout", "rank_dropout", "module_dropout")
"""Positional arguments after the layer, of all classes except that of norms."""


class LycorisBaseModule(AdapterView):
    """An adapter with its layer; it can be applied to the layer, merged into its weight, and restored.

    Subclasses name the algorithm. Modules of a network share the network's adapters: changes to one are seen by the
    other.
    """

    algo: ClassVar[str] = "lora"
    """Name of the algorithm in configs."""
    weight_list: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors in files, in the order of `make_module_from_state_dict`."""
    weight_list_det: ClassVar[tuple[str, ...]] = ()
    """Tensor names, of which any one identifies this class."""
    positional: ClassVar[tuple[str, ...]] = (
        *("use_tucker", "use_scalar", "rank_dropout_scale", "weight_decompose", "wd_on_out", "bypass_mode", "rs_lora"),
    )
    """Positional arguments after `COMMON_POSITIONAL`."""

    _member: tuple[AdapterSet, str] | None = None
    """The adapter set of its network and its path there; None for a single module."""
    _warned_of_strengths: bool = False
    """Whether the warning about strength and multiplier of a merge was logged."""

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
        """Build a new adapter for one layer; it is not yet applied.

        `rest` are the values of `positional`, in that order; options are those of configs, and ones without effect on
        this algorithm are logged on "LyCORIS". `alpha` 0 or None means `lora_dim`, so that the scale is 1.

        Raises `ConfigError` for a layer that the algorithm cannot adapt, and for an unknown option.
        """
        geometry = describe(org_module)
        if geometry is None:
            raise ConfigError(f"{type(org_module).__name__} is not a layer that {type(self).__name__} can adapt")
        given = {"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout}
        given |= self._name_values(rest, self.positional) | options
        algorithm = self._algorithm(geometry, lora_dim, alpha, given)
        algorithm.check(geometry)
        check_trainable({lora_name: org_module}, {lora_name: (algorithm,)})
        adapter = Adapter(algorithm, geometry, **base_weights.home(org_module))
        place = Site("", org_module, "", geometry)
        adapter.initialize(attach.top(place))
        bypass: bool | None = parse_optional(given.get("bypass_mode"), "bypass_mode", bool)
        self._set_up(lora_name, adapter, place, bypass, single=True)
        self.multiplier = multiplier

    @classmethod
    def _name_values(cls, values: Sequence[Any], names: Sequence[str]) -> dict[str, Any]:
        if len(values) > len(names):
            raise ConfigError(
                f"{cls.__name__} takes at most {len(names)} positional values here ({', '.join(names)}); "
                f"{len(values)} were given"
            )
        return dict(zip(names, values, strict=False))

    @classmethod
    def _algorithm(cls, g: Geometry, dim: int, alpha: float | None, options: Mapping[str, Any]) -> Algorithm:
        recipe = Recipe.parse(build_module_config(cls.algo, dim, alpha, options))
        log_remarks(recipe.remarks)
        return recipe.algorithm(g, {})

    @classmethod
    def from_adapter(cls, lora_name: str, adapter: Adapter, place: Site, bypass_mode: bool | None = None) -> Self:
        """Return a view of an existing adapter on the layer `place`."""
        made = cls.__new__(cls)
        made._set_up(lora_name, adapter, place, bypass_mode)
        return made

    def _set_up(
        self, lora_name: str, adapter: Adapter, place: Site, bypass_mode: bool | None, *, single: bool = False
    ) -> None:
        nn.Module.__init__(self)
        self.lora_name, self.adapter, self._place, self._bypass = lora_name, adapter, place, bypass_mode
        self._single = single
        self._alone: AdapterSet | None = None
        self._parameter: ParametrizedTensor | None = None
        self._follow_masks()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]  # torch's own has no types
        self._follow_masks()

    def _follow_masks(self) -> None:
        # Masks reach a network's modules through the network.
        if self.algorithm.uses_rank_mask and (self._single or self._alone is not None):
            timestep_masks.track_module(self)

    # -- on and off --------------------------------------------------------------------------------------------------

    @property
    def multiplier(self) -> float:
        """Strength of this adapter. Assigning to it raises `AttachError` while the adapter is merged.

        A module of a network changes the strength of this one layer, until the network's `set_multiplier`.
        """
        if self._alone is not None and self._acts_alone:
            return self._alone.strengths.at(self.adapter.attribute)
        if self._member is None:
            return float(self.adapter.call.strength)
        adapters, path = self._member
        return adapters.strengths.at(path)

    @multiplier.setter
    def multiplier(self, multiplier: float) -> None:
        self._check_unmerged()
        if self._alone is not None and self._acts_alone:
            self._alone.set_strength(multiplier)
        if self._member is not None:
            self._member[0].set_strength(multiplier, at=self._member[1])
        elif not self._acts_alone:
            self.adapter.set_call(finite(multiplier), self.adapter.call.rank_mask)

    def _check_unmerged(self) -> None:
        if self.adapter.merged:
            raise AttachError(
                f"{self.lora_name or 'this module'} is merged; call restore() before changing its multiplier"
            )

    def set_rank_mask(self, keep: Tensor | None) -> None:
        """Set a mask of the ranks that count, (1, r) or (B, r); None: all. See `AdapterSet.set_rank_mask`.

        Has no effect on a module that its network has applied or merged: masks reach it through the network.
        """
        if self._alone is not None and self._acts_alone:
            self._alone.set_rank_mask(keep)
        elif not self._is_in_network:
            fit = None if keep is None else self.algorithm.fit_rank_mask(one_if_equal(keep))
            self.adapter.set_call(self.multiplier, fit)

    def apply_to(self, **_: Any) -> None:
        """Attach the adapter to its layer, without freezing the layer. A second call does nothing.

        Raises `ConfigError` while its network has it merged.
        """
        if self._parameter is not None:
            if not self._parameter.merged:
                self._parameter.put(self)
        elif self._acts_alone or not self._is_applied():
            self._get_own_set().attach(freeze=False)

    def restore(self) -> None:
        """Detach the adapter and undo a merge. The layer is exactly as before.

        Raises `ConfigError` when its network applied it, which then has to restore it.
        """
        if self._parameter is not None:
            self._parameter.unmerge(self, self.adapter, put=False)
            self._parameter.take(self)
        elif self._is_in_network:
            raise ConfigError(f"{self.lora_name} was applied by its network; call restore() on the network")
        elif self._alone is not None:
            self._alone.detach()
            self._hand_back()

    def merge_to(self, multiplier: float = 1.0, *, precise: bool = False) -> None:
        """Merge the adapter into the layer's weight at `multiplier` times its own, without dropout.

        The merge is computed in float32 and rounded once, with or without `precise`, and `restore` undoes it exactly.
        Raises `RefusedError`, a `RuntimeError`, for weights stored in few bits, `AttachError` for a second merge, and
        `ConfigError` when its network has applied or merged it.
        """
        self._warned_of_strengths = warn_of_both_strengths(
            multiplier, self.multiplier, warned=self._warned_of_strengths
        )
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
            self._get_own_set().merge(multiplier * self.multiplier)

    def onfly_merge(self, multiplier: float = 1.0) -> None:
        """Merge the adapter temporarily; `onfly_restore` undoes it exactly.

        Raises as `merge_to` does.
        """
        self.merge_to(multiplier)

    def onfly_restore(self) -> None:
        """Undo `onfly_merge`; an applied module acts on activations again.

        Raises `ConfigError` when its network merged it, which then has to undo the merge.
        """
        if self._parameter is not None:
            self._parameter.unmerge(self, self.adapter, put=True)
        elif self._is_in_network and self.adapter.merged:
            raise ConfigError(f"{self.lora_name} was merged by its network; call onfly_restore() on the network")
        elif self._alone is not None and self._acts_alone:
            self._alone.unmerge()
            self._hand_back()

    def _hand_back(self) -> None:
        """Return control to its network's settings, unless it is still applied by itself."""
        if self._member is not None:
            self._member[0].refresh([self._member[1]])

    def _check_restorable(self) -> None:
        """Raise `AttachError` where `restore` would, for a module applied or merged by itself."""
        if self._alone is not None:
            self._alone.check_detachable()

    def _is_applied(self) -> bool:
        return attach.is_on(self.org_module[0], self.adapter)

    @property
    def _acts_alone(self) -> bool:
        """Whether it was applied or merged by itself."""
        return self._alone is not None and (self._alone.attached or self._alone.merged)

    @property
    def _is_in_network(self) -> bool:
        """Whether its network applied or merged it."""
        return not self._acts_alone and (self._is_applied() or self.adapter.merged)

    def _get_own_set(self) -> AdapterSet:
        """Return the set of this module alone, with the current strength and mask."""
        if self._is_in_network:
            raise ConfigError(
                f"{self.lora_name} is applied or merged by its network; merge and restore the network instead"
            )
        strength, keep = self.multiplier, self.adapter.call.rank_mask
        if self._alone is None:
            self._alone = AdapterSet(self.org_module[0], {self.adapter.attribute: (self.adapter,)}, name=None)
        if not self._acts_alone:
            self._follow_masks()
            mask = timestep_masks.get_timestep_mask()
            self._alone.set_strength(strength)
            self._alone.set_rank_mask(keep if mask is None else mask)
        return self._alone

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return the layer's output with this adapter, whether it is applied or not.

        Of a parametrization: the adapted weight, in the dtype of `x`.
        """
        state = self.adapter.state_of_pass(x)
        with replayed_random(state.random, x.device):
            if self._parameter is None:
                return self.adapter(self._below(), x, state)
            call = self.adapter.draw_call(state, x)
            return self.adapter.adapt_affine(self._widen(Affine(x, None)), call).weight.to(x.dtype)

    @classmethod
    def parametrize(cls, org_module: nn.Module, attr: str, *args: Any, **kwargs: Any) -> Self:
        """Parametrize a parameter of any module with an adapter, by `torch.nn.utils.parametrize`.

        Args:
            attr: Name of the parameter, a matrix or a convolution kernel.
            args: Positional arguments of the class that follow `org_module`; `kwargs` likewise.

        Raises `RefusedError`, a `RuntimeError`, for `full` and for weights stored in few bits, and `ConfigError` for a
        parameter that does not exist or has fewer than two dimensions.
        """
        if cls.algo == "full":
            raise RefusedError("full stores a complete weight; train the parameter itself instead of parametrizing it")
        parameter = ParametrizedTensor(org_module, attr)
        own = cls._name_values(args, (*COMMON_POSITIONAL, *cls.positional)) | kwargs
        multiplier, dim, alpha = (own.pop(n, d) for n, d in (("multiplier", 1.0), ("lora_dim", 4), ("alpha", 1)))
        geometry = parameter.geometry
        algorithm = cls._algorithm(geometry, dim, alpha, own)
        algorithm.check(geometry)
        adapter = Adapter(algorithm, geometry, **parameter.home)
        adapter.initialize(BareWeight(geometry, getattr(org_module, attr).detach()))
        made = cls.__new__(cls)
        made._set_up("", adapter, Site("", org_module, "", geometry), False, single=True)
        made.multiplier, made._parameter = multiplier, parameter
        parameter.put(made)
        return made

    @classmethod
    def algo_check(cls, state_dict: Mapping[str, Tensor], lora_name: str) -> bool:
        """Return whether a file's tensors for that layer belong to this class.

        One of the names in `weight_list_det` is enough.
        """
        return any(f"{lora_name}.{name}" in state_dict for name in cls.weight_list_det)

    @classmethod
    def extract_state_dict(cls, state_dict: Mapping[str, Tensor], lora_name: str) -> list[Tensor | None]:
        """Return the tensors of a layer in the order of `weight_list`, with None for those that the file lacks."""
        return [state_dict.get(f"{lora_name}.{name}") for name in cls.weight_list]

    @classmethod
    def make_module_from_state_dict(cls, lora_name: str, orig_module: nn.Module, *weights: Tensor | None) -> Self:
        """Build a module from the tensors of a file, in the order of `weight_list`; None for those that the file lacks.

        Raises `FileError` for another number of tensors, or when they do not match the layer.
        """
        if len(weights) != len(cls.weight_list):
            raise FileError(
                f"{lora_name}: {cls.__name__} takes {len(cls.weight_list)} tensors, with None for those that the file "
                f"lacks ({', '.join(cls.weight_list) or 'none'}); {len(weights)} were given"
            )
        place = Site.of(orig_module)
        tensors = {n: t for n, t in zip(cls.weight_list, weights, strict=True) if t is not None}
        algorithm, values = read_tensors(tensors, place.geometry, lora_name)
        adapter = Adapter(algorithm, place.geometry, **base_weights.home(orig_module))
        adapter.fill(complete_tensors(Entry(algorithm, place.geometry, values), place))
        made = cls.__new__(cls)
        made._set_up(lora_name, adapter, place, None, single=True)
        return made


def build_module_config(algo: str, dim: int | None, alpha: float | None, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config of a single module from the arguments of its class.

    Options that only configs of networks have are logged and left out. Raises `ConfigError` for another `algo`.
    """
    given = rename_options(options)
    if given.get("algo", algo) != algo:
        raise ConfigError(
            f"this is a module class for {algo}, but algo={given['algo']!r} was given; use the class for that"
        )
    for name in TOP:
        if given.pop(name, None) is not None and name != "algo":
            logger.info("%s has no effect on a single module; use lora_dim and alpha", name)
    # A size equal to the class's default may not have been given at all.
    sizes, unused = {"linear_dim": (dim, 4), "linear_alpha": (alpha, 1)}, UNUSED_SIZES.get(algo, ())
    given |= {name: value for name, (value, usual) in sizes.items() if name not in unused or value != usual}
    return given | {"algo": algo}
