"""An adapter on its layer, with the attributes that scripts read: settings, effect, and tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lycoris.adapters import attach
from lycoris.adapters.adapter import Adapter
from lycoris.adapters.loading import fit_tensors, match_tensors, put
from lycoris.algorithms import DoRA, conversion
from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.call import Call
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.layer_below import BareWeight, LayerBelow
from lycoris.algorithms.tensors import read_tensors, write_tensors
from lycoris.compat.assignable import AdapterProperty, ReadOnlyList
from lycoris.compat.layers import LAYER_FUNCTIONS, name_layer_type, read_arguments
from lycoris.compat.max_norm import shrink_to_norm
from lycoris.compat.parametrize import ParametrizedTensor
from lycoris.compat.quantized import is_substitute
from lycoris.compat.tensor_aliases import (
    check_assignable,
    get_by_old_name,
    list_attribute_names,
    write_by_old_name,
    write_tensor,
)
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.layers import base_weights
from lycoris.layers.geometry import Affine, Geometry
from lycoris.layers.sites import Site


class AdapterView(nn.Module):
    """Read-only view of an adapter on its layer: `org_module[0]` is the layer, `org_weight` its weight.

    Tensors are attributes by their names in files, such as `lora_down.weight`; assigning to one copies into it.
    """

    not_supported = False
    peft_wrapper: None = None

    lora_name: str
    adapter: Adapter
    _place: Site
    _bypass: bool | None
    _parameter: ParametrizedTensor | None
    """The parameter that it parametrizes; None on a layer."""

    # -- what it is --------------------------------------------------------------------------------------------------

    @AdapterProperty
    def algorithm(self) -> Algorithm:
        return self.adapter.algorithm

    @AdapterProperty
    def inner(self) -> Algorithm:
        """The algorithm without DoRA's magnitude around it."""
        return unwrap_dora(self.algorithm)

    @AdapterProperty
    def geometry(self) -> Geometry:
        return self.adapter.geometry

    @AdapterProperty
    def shape(self) -> tuple[int, ...]:
        return self.geometry.shape

    @AdapterProperty
    def dim(self) -> int:
        """Number of output features of the layer."""
        return self.geometry.out_features

    @AdapterProperty
    def lora_dim(self) -> int:
        return int(getattr(self.inner, "rank", 0) or getattr(self.inner, "block_size", 0))

    @AdapterProperty
    def scale(self) -> float:
        return self.algorithm.scale(self.geometry)

    @AdapterProperty
    def wd(self) -> bool:
        return isinstance(self.algorithm, DoRA)

    @AdapterProperty
    def wd_on_out(self) -> bool:
        """Whether DoRA's norms are those of rows, one per output.

        True without DoRA.
        """
        return not isinstance(self.algorithm, DoRA) or self.algorithm.axis == "out"

    @AdapterProperty
    def drop(self) -> nn.Module:
        """The dropout as a layer; `nn.Identity` without dropout."""
        return nn.Dropout(self.dropout) if self.dropout else nn.Identity()

    @AdapterProperty
    def rank_drop(self) -> nn.Module:
        """The rank dropout as a layer; `nn.Identity` without it."""
        return nn.Dropout(self.rank_dropout) if self.rank_dropout else nn.Identity()

    @AdapterProperty
    def full_matrix(self) -> bool:
        return bool(getattr(self.inner, "full_matrix", False))

    @AdapterProperty
    def is_quant(self) -> bool:
        return self._low_bit or (self.bypass_mode and is_substitute(self.org_module[0]))

    @property
    def bypass_mode(self) -> bool:
        """Whether the layer runs unchanged and the adapter's output is added to it; always so on quantized layers.

        Only informative: every path computes the same result.
        """
        if self._low_bit:
            return True
        return is_substitute(self.org_module[0]) if self._bypass is None else bool(self._bypass)

    @bypass_mode.setter
    def bypass_mode(self, value: bool | None) -> None:
        self._bypass = value

    @AdapterProperty
    def org_module(self) -> list[nn.Module]:
        """The layer, in a list so that it is not registered as a child.

        The list is read-only: changing it raises `ConfigError`.
        """
        return ReadOnlyList([self._place.module])

    @AdapterProperty
    def module(self) -> type[nn.Module]:
        """The class of the layer."""
        return type(self._place.module)

    @AdapterProperty
    def module_type(self) -> str:
        """The kind of layer, such as "linear" or "conv2d"."""
        return name_layer_type(self._place.module, self.geometry)

    @AdapterProperty
    def op(self) -> Callable[..., Tensor]:
        """The function of `torch.nn.functional` for this kind of layer.

        Raises `AttributeError` for a bare parameter.
        """
        if self.module_type not in LAYER_FUNCTIONS:
            raise AttributeError(
                f"{self.lora_name} adapts a bare parameter, which has no function in torch.nn.functional"
            )
        return LAYER_FUNCTIONS[self.module_type]

    @AdapterProperty
    def kw_dict(self) -> dict[str, Any]:
        """The arguments of `op` other than input, weight and bias."""
        return read_arguments(self._place.module, self.module_type)

    @AdapterProperty
    def dtype(self) -> torch.dtype:
        """Precision of the adapter's tensors."""
        return next(iter(self.adapter.tensors().values())).dtype

    @AdapterProperty
    def device(self) -> torch.device:
        """Device of the adapter's tensors."""
        return next(iter(self.adapter.tensors().values())).device

    @AdapterProperty
    def org_forward(self) -> Callable[..., Tensor]:
        """The layer without this adapter, as a callable.

        Raises `AttachError` while the adapter is merged.
        """
        return self._find_unmerged()

    @property
    def _low_bit(self) -> bool:
        return self._parameter is None and self.geometry.kind != "norm" and base_weights.storage(self._holder).low_bit

    @property
    def _holder(self) -> nn.Module:
        """What has the weight as `weight`: the layer, or a stand-in for a bare parameter."""
        return base_weights.holder(self.org_module[0], self.adapter.attribute)

    @property
    def org_weight(self) -> Tensor:
        if self._parameter is not None:
            return self._parameter.original
        weight: Tensor = getattr(self.org_module[0], self.adapter.attribute or "weight")
        return weight

    @org_weight.setter
    def org_weight(self, value: Tensor) -> None:
        write_tensor("org_weight", self.org_weight, value)

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            adapter = self.__dict__.get("_modules", {}).get("adapter")
            found = None if adapter is None else get_by_old_name(adapter, name)
            if found is None:
                raise
            return found

    def __setattr__(self, name: str, value: Any) -> None:
        # A tensor that replaced the adapter's would have no effect, so it is copied into it.
        adapter = self.__dict__.get("_modules", {}).get("adapter")
        if adapter is None or not write_by_old_name(adapter, name, value):
            if adapter is not None:
                check_assignable(type(self), name)
                if name == "lora_name" and getattr(self, "_member", None) is not None:
                    raise ConfigError(
                        f"lora_name {self.lora_name} is set by the network; assigning another name would have no effect"
                    )
            super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters by the names that they have in files; `scalar` is a trained scalar."""
        names = list_attribute_names(self.algorithm)
        for slot, tensor in self.adapter.named_parameters():
            yield f"{prefix}{'.' if prefix else ''}{names[slot]}", tensor

    # -- what it changes ---------------------------------------------------------------------------------------------

    def _below(self) -> LayerBelow:
        if self._parameter is not None:
            return BareWeight(self.geometry, self._parameter.below(self))
        return attach.bottom(self._place)

    def _find_unmerged(self) -> LayerBelow:
        """Return what lies below the adapter. Raises `AttachError` when the weight from before a merge is needed."""
        if self.adapter.merged and self._parameter is None:
            raise AttachError(
                f"{self.lora_name} is merged, and this needs the weight from before; call restore() first"
            )
        return self._below()

    def _widen(self, affine: Affine) -> Affine:
        """Convert to at least float32, in which merges are computed."""
        return affine.widen(torch.promote_types(next(iter(self.adapter.tensors().values())).dtype, torch.float32))

    def get_merged_weight(
        self, multiplier: float = 1.0, shape: Any = None, device: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (weight, bias) with this adapter at strength `multiplier`, without dropout and masks.

        In at least float32, and in the layout in which the layer stores its weight; `shape` reshapes it. The bias is
        None where the layer has none. Raises `AttachError` while the adapter is merged.
        """
        weight, bias = self.adapter.adapt_affine(self._widen(self._find_unmerged().affine()), Call(multiplier))
        weight = self.geometry.transpose_stored(weight)
        return (weight if shape is None else weight.reshape(shape)).to(device), bias

    def get_diff_weight(
        self, multiplier: float = 1.0, shape: Any = None, device: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Return (ΔW, Δb) at strength `multiplier`; Δb is None where the bias does not change.

        ΔW has the layout in which the layer stores its weight; `shape` reshapes it. Raises `AttachError` while the
        adapter is merged, if the change depends on the original weight.
        """
        entry = Entry(self.algorithm, self.geometry, self.adapter.tensors())
        base = self._find_unmerged().affine() if conversion.needs_base(entry) else None
        tensors = conversion.dense(entry, base).tensors
        weight, bias = (tensors.get(full, tensors.get(norm)) for full, norm in (("diff", "w"), ("diff_b", "b")))
        weight = torch.zeros_like(self.org_weight) if weight is None else weight * multiplier
        bias = None if bias is None else bias * multiplier
        return (weight if shape is None else weight.reshape(shape)).to(device), bias

    def _compute_unscaled_delta(self) -> Tensor:
        """Return ΔW of an algorithm with factors, with its scalar, without its scale, in the layout of the layer."""
        assert isinstance(self.inner, Additive)
        own = {name: tensor for name, tensor in self.adapter.tensors().items() if name != "magnitude"}
        return self.geometry.transpose_stored(self.inner.delta(own, self.geometry).weight * self.inner.read_scalar(own))

    def bypass_forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return the layer's output with this adapter at strength `scale`, without dropout.

        The mask in force is applied. Raises `AttachError` while the adapter is merged.
        """
        call = Call(scale, self.adapter.call.rank_mask)
        return self.algorithm.forward(self.adapter.tensors(), self._find_unmerged(), x, call)

    def bypass_forward_diff(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """Return what this adapter adds to the layer's output at strength `scale`, without dropout.

        The mask in force is applied. Raises `AttachError` while the adapter is merged, if the change depends on the
        weight.
        """
        if isinstance(self.algorithm, Additive):
            nothing, call = torch.zeros_like(self._below()(x)), Call(scale, self.adapter.call.rank_mask)
            return self.algorithm.add(nothing, self.adapter.tensors(), self.geometry, x, call)
        return self.bypass_forward(x, scale) - self._below()(x)

    def apply_max_norm(self, max_norm: float, device: Any = None) -> tuple[bool | None, float | None]:
        """Scale the adapter's change down to a norm of at most `max_norm`.

        Returns whether the norm was above, and the norm afterwards; (None, None) for an algorithm without such a norm.
        It is the Frobenius norm of the scaled ΔW; of OFT and BOFT, that of their `oft_blocks`. `device` has no effect.
        """
        return shrink_to_norm(self.adapter, max_norm)

    # -- tensors -----------------------------------------------------------------------------------------------------

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """Return the tensors by the names that they have in a file."""
        found = {} if destination is None else destination
        named = write_tensors(self.algorithm, self.adapter.whole(), self.geometry)
        found.update({prefix + key: tensor for key, tensor in named.items()})
        return found

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local: Any, strict: bool, missing: Any, unexpected: Any, errors: Any
    ) -> None:
        given = {key[len(prefix) :]: tensor for key, tensor in state_dict.items() if key.startswith(prefix)}
        own = write_tensors(self.algorithm, self.adapter.whole(), self.geometry)
        missing += [prefix + key for key in sorted(own.keys() - given.keys())]
        unexpected += [prefix + key for key in sorted(given.keys() - own.keys())]
        try:
            self._load_tensors({key: given.get(key, tensor) for key, tensor in own.items()})
        except FileError as error:
            errors.append(str(error))

    def _load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        algorithm, values = read_tensors(tensors, self.geometry, self.lora_name)
        put([(self.adapter, self.fit(Entry(algorithm, self.geometry, values)))])

    def fit(self, entry: Entry) -> dict[str, Tensor]:
        """Return the tensors of a file in the form that this adapter has.

        Raises `FileError` for another algorithm or other settings, which would give the tensors another meaning.
        """
        if self._parameter is None:
            return fit_tensors(self.adapter, entry, self._place)
        return match_tensors(self.adapter, entry.algorithm, entry.tensors, self._parameter.name)
