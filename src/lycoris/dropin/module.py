"""`LycorisBaseModule`: one adapter on one layer, under the names that scripts know.

In a network it is a view of one of the network's adapters. Made by itself it has a set of its own, and goes on and off,
in and out of the weight by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import Self

from lycoris import attach, bases
from lycoris.adapter import Adapter, Matrix
from lycoris.adapters import AdapterSet
from lycoris.algorithm import Affine, Algorithm, Base, Call
from lycoris.algorithms import DoRA, read_tensors, write_tensors
from lycoris.bundle import Entry
from lycoris.dropin.names import by_old_name, file_names
from lycoris.dropin.norms import shrink
from lycoris.dropin.quantised import RefusedError, check_mergeable, check_trainable, is_substitute
from lycoris.errors import ConfigError, FileError
from lycoris.filling import completed, fitted, matched
from lycoris.geometry import Geometry, Site, describe, site
from lycoris.recipe import Recipe


class LycorisBaseModule(nn.Module):
    """An adapter and its layer. `org_module[0]` is the layer, `org_weight` its weight."""

    algo: ClassVar[str] = "lora"
    """Name of the algorithm in configs."""
    weight_list: ClassVar[tuple[str, ...]] = ()
    """Names of its tensors in files, in the order of `make_module_from_state_dict`."""
    weight_list_det: ClassVar[tuple[str, ...]] = ()
    """Names that tell it from others."""

    lora_name: str
    org_module: list[nn.Module]
    adapter: Adapter

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
        use_tucker: bool = False,
        use_scalar: bool = False,
        **options: Any,
    ) -> None:
        """A new adapter for one layer, not applied. Options that the algorithm does not have are ignored.

        Raises `ConfigError` for a layer that it cannot serve. alpha 0 or None is `lora_dim`: no scaling.
        """
        geometry = describe(org_module)
        if geometry is None:
            raise ConfigError(f"{type(org_module).__name__} is not a layer that {type(self).__name__} can serve")
        given = {"dropout": dropout, "rank_dropout": rank_dropout, "module_dropout": module_dropout}
        given |= {"use_tucker": use_tucker, "use_scalar": use_scalar} | options
        algorithm = self._algorithm(geometry, lora_dim, alpha, given)
        algorithm.check(geometry)
        check_trainable({lora_name: org_module}, {lora_name: (algorithm,)})
        adapter = Adapter(algorithm, geometry, **bases.home(org_module))
        adapter.initialise(attach.top(org_module))
        self._become(lora_name, adapter, site(org_module, ""), options.get("bypass_mode"))
        self.multiplier = multiplier

    @classmethod
    def _algorithm(cls, g: Geometry, dim: int, alpha: float | None, options: Mapping[str, Any]) -> Algorithm:
        given = {"algo": cls.algo, "linear_dim": dim, "linear_alpha": alpha, **options}
        return Recipe.parse(given, strict=False).algorithm(g, {})

    @classmethod
    def of(cls, lora_name: str, adapter: Adapter, place: Site, bypass_mode: bool | None = None) -> Self:
        """A view of an adapter that is there already."""
        made = cls.__new__(cls)
        made._become(lora_name, adapter, place, bypass_mode)
        return made

    def _become(self, lora_name: str, adapter: Adapter, place: Site, bypass_mode: bool | None) -> None:
        nn.Module.__init__(self)
        self.lora_name, self.adapter, self._place, self._bypass = lora_name, adapter, place, bypass_mode
        self.org_module = [place.module]
        self._alone: AdapterSet | None = None
        self._parametrized = ""

    # -- what it is --------------------------------------------------------------------------------------------------

    @property
    def algorithm(self) -> Algorithm:
        return self.adapter.algorithm

    @property
    def inner(self) -> Algorithm:
        """The algorithm, without the lengths of DoRA."""
        return self.algorithm.over if isinstance(self.algorithm, DoRA) else self.algorithm

    @property
    def geometry(self) -> Geometry:
        return self.adapter.geometry

    @property
    def shape(self) -> tuple[int, ...]:
        return self.geometry.shape

    @property
    def dim(self) -> int:
        """Output features of the layer."""
        return self.geometry.out_features

    @property
    def lora_dim(self) -> int:
        return int(getattr(self.inner, "rank", 0) or getattr(self.inner, "block_size", 0))

    @property
    def scale(self) -> float:
        return self.algorithm.scale(self.geometry)

    @property
    def wd(self) -> bool:
        return isinstance(self.algorithm, DoRA)

    @property
    def full_matrix(self) -> bool:
        return bool(getattr(self.inner, "full_matrix", False))

    @property
    def is_quant(self) -> bool:
        return bases.storage(self.org_module[0]).low_bit or (
            bool(self.bypass_mode) and is_substitute(self.org_module[0])
        )

    @property
    def bypass_mode(self) -> bool:
        """Whether the layer runs by itself and the adapter beside it: on quantised layers always. Nothing depends on
        it, since every path is exact; it is here to be read."""
        if self.geometry.kind != "norm" and bases.storage(self.org_module[0]).low_bit:
            return True
        return is_substitute(self.org_module[0]) if self._bypass is None else bool(self._bypass)

    @property
    def org_weight(self) -> Tensor:
        layer: Any = self.org_module[0]
        if self._parametrized and parametrize.is_parametrized(layer, self._parametrized):
            return layer.parametrizations[self._parametrized].original
        return getattr(layer, self._parametrized or self.adapter.attribute or "weight")

    @org_weight.setter
    def org_weight(self, value: Tensor) -> None:
        self.org_weight.data.copy_(value)

    @property
    def multiplier(self) -> float:
        return float(self.adapter.call.strength)

    @multiplier.setter
    def multiplier(self, multiplier: float) -> None:
        self.adapter.set_call(float(multiplier), self.adapter.call.keep)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            adapter = self.__dict__.get("_modules", {}).get("adapter")
            found = None if adapter is None else by_old_name(adapter, name)
            if found is None:
                raise
            return found

    def __setattr__(self, name: str, value: Any) -> None:
        # A tensor that took the place of the adapter's would have no effect; it is copied into it instead.
        adapter = self.__dict__.get("_modules", {}).get("adapter")
        own = by_old_name(adapter, name) if adapter is not None and isinstance(value, Tensor) else None
        if isinstance(own, nn.Parameter):
            own.data.copy_(value)
        else:
            super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the names that they have in files; `scalar` for a trained gate."""
        names = file_names(self.algorithm)
        for slot, tensor in self.adapter.named_parameters():
            yield f"{prefix}{'.' if prefix else ''}{names[slot]}", tensor

    # -- on and off --------------------------------------------------------------------------------------------------

    def apply_to(self, **_: Any) -> None:
        """Put it on its layer. A second call does nothing."""
        if not self._applied():
            self._own().attach()

    def restore(self) -> None:
        """Take it off, and undo a merge; the layer is as it was."""
        layer = self.org_module[0]
        if self._parametrized:
            if parametrize.is_parametrized(layer, self._parametrized):
                parametrize.remove_parametrizations(layer, self._parametrized, leave_parametrized=False)
        elif self._alone is not None:
            self._alone.detach()
        elif self._applied():
            raise ConfigError(f"{self.lora_name} was applied by its network; call restore() of that")

    def merge_to(self, multiplier: float = 1.0, *, precise: bool = False) -> None:
        """Fold it into the weight at `multiplier` times its own; computed in float32 and rounded once, whether
        `precise` or not. `restore` undoes it. Raises a `RuntimeError` for weights of few bits."""
        layer = self.org_module[0]
        check_mergeable({self.lora_name: layer})
        if self._parametrized:
            own = self.multiplier
            self.multiplier = multiplier * own
            parametrize.remove_parametrizations(layer, self._parametrized, leave_parametrized=True)
            self.multiplier = own
        else:
            self._own().merge(multiplier * self.multiplier)

    def onfly_merge(self, multiplier: float = 1.0) -> None:
        """Fold it in for a while."""
        self.merge_to(multiplier)

    def onfly_restore(self) -> None:
        """Undo `onfly_merge`; an applied module acts again."""
        if self._alone is not None:
            self._alone.unmerge()

    def _applied(self) -> bool:
        return any(other is self.adapter for other in attach.adapters_on(self.org_module[0], self.adapter.attribute))

    def _own(self) -> AdapterSet:
        """The set of this module alone."""
        if self._alone is None:
            if self._applied():
                raise ConfigError(f"{self.lora_name} is applied by its network; merge and restore that")
            strength = self.multiplier
            self._alone = AdapterSet(self.org_module[0], {self.adapter.attribute: (self.adapter,)}, name=None)
            self._alone.set_strength(strength)
        return self._alone

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """What the layer gives with this adapter on it. Of a parametrisation: the adapted weight."""
        if self._parametrized:
            call = self.adapter.drawn(self.adapter.in_force(x), x)
            return self.adapter.adapted(Affine(x, None), call).weight.to(x.dtype)
        return self.adapter(self._below(), x)

    @classmethod
    def parametrize(cls, org_module: nn.Module, attr: str, *args: Any, **kwargs: Any) -> Self:
        """Make a parameter of any module what an adapter makes of it, by `torch.nn.utils.parametrize`.

        The arguments after `attr` are those of the class after `org_module`. Raises a `RuntimeError` for `full`.
        """
        weight = getattr(org_module, attr)
        if cls.algo == "full":
            raise RefusedError("full stores a whole weight: train the parameter itself instead of parametrising it")
        if weight.dim() < 2:
            raise ConfigError(f"{attr} is a matrix or a stack of them, not a tensor of shape {tuple(weight.shape)}")
        kind: Any = "linear" if weight.dim() == 2 else "conv"
        geometry = Geometry(kind=kind, shape=tuple(weight.shape), has_bias=False)
        own = dict(zip(("multiplier", "lora_dim", "alpha", *DROPOUTS, *SWITCHES), args, strict=False)) | kwargs
        multiplier, dim, alpha = (own.pop(n, d) for n, d in (("multiplier", 1.0), ("lora_dim", 4), ("alpha", 1)))
        algorithm = cls._algorithm(geometry, dim, alpha, own)
        algorithm.check(geometry)
        adapter = Adapter(algorithm, geometry, **bases.home(bases.holder(org_module, attr)))
        adapter.initialise(Matrix(geometry, weight.detach()))
        made = cls.of("", adapter, Site("", org_module, "", geometry), False)
        made.multiplier, made._parametrized = multiplier, attr
        parametrize.register_parametrization(org_module, attr, made)
        return made

    # -- what it changes ---------------------------------------------------------------------------------------------

    def _below(self) -> Base:
        if self._parametrized:
            return Matrix(self.geometry, self.org_weight)
        return attach.bottom(self.org_module[0], self.adapter.attribute)

    def get_merged_weight(
        self, multiplier: float = 1.0, shape: Any = None, device: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Weight and bias with this adapter at a strength, in at least the adapter's precision."""
        wide = self._below().affine().widened(next(iter(self.adapter.tensors().values())).dtype)
        weight, bias = self.adapter.adapted(wide, Call(multiplier))
        return (weight if shape is None else weight.reshape(shape)).to(device), bias

    def get_diff_weight(
        self, multiplier: float = 1.0, shape: Any = None, device: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """ΔW and Δb at a strength."""
        before = self._below().affine()
        weight, bias = self.get_merged_weight(multiplier)
        weight = weight - before.weight.to(weight)
        changed = bias is not None and self.algorithm.moves_bias
        moved = bias - before.bias.to(bias) if changed and bias is not None and before.bias is not None else None
        return (weight if shape is None else weight.reshape(shape)).to(device), moved

    def bypass_forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """What the layer gives with this adapter at a strength."""
        call = Call(scale, self.adapter.call.keep)
        return self.algorithm.forward(self.adapter.tensors(), self._below(), x, call)

    def bypass_forward_diff(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """What this adapter adds to the layer's output."""
        return self.bypass_forward(x, scale) - self._below()(x)

    def apply_max_norm(self, max_norm: float, device: Any = None) -> tuple[bool | None, float | None]:
        """Shrink what it does to a norm; whether it was above, and what it is now. (None, None): it has no such norm.

        The norm is that of the scaled ΔW; of rotations, that of the tensor that they are made of.
        """
        return shrink(self.adapter, max_norm)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The tensors as they would be in a file."""
        found = {} if destination is None else destination
        named = write_tensors(self.algorithm, self.adapter.whole(), self.geometry)
        found.update({prefix + key: tensor for key, tensor in named.items()})
        return found

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        given = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        own = set(write_tensors(self.algorithm, self.adapter.whole(), self.geometry))
        missing += [prefix + key for key in sorted(own - given.keys())]
        unexpected += [prefix + key for key in sorted(given.keys() - own)]
        if own <= given.keys():
            try:
                self._take({key: given[key] for key in own})
            except FileError as error:
                errors.append(str(error))

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        algorithm, values = read_tensors(tensors, self.geometry, self.lora_name)
        self.adapter.fill(self.fitted(Entry(algorithm, self.geometry, values)))

    def fitted(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of a file for this adapter. Raises `FileError` when they mean something else."""
        if not self._parametrized:
            return fitted(self.adapter, entry, self._place)
        return matched(self.adapter, entry.algorithm, entry.tensors, self.lora_name)

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
        place = site(orig_module, "")
        tensors = {n: t for n, t in zip(cls.weight_list, weights, strict=True) if t is not None}
        algorithm, values = read_tensors(tensors, place.geometry, lora_name)
        adapter = Adapter(algorithm, place.geometry, **bases.home(orig_module))
        adapter.fill(completed(Entry(algorithm, place.geometry, values), place))
        return cls.of(lora_name, adapter, place)


DROPOUTS = ("dropout", "rank_dropout", "module_dropout")
SWITCHES = ("use_tucker", "use_scalar")
