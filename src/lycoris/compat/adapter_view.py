"""An adapter on its layer by the names that scripts know: what it is, what it changes, and its tensors."""

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
from lycoris.compat.assignable import Fact, Fixed
from lycoris.compat.layers import FUNCTIONS, arguments, type_name
from lycoris.compat.max_norm import shrink
from lycoris.compat.parametrize import Parametrised
from lycoris.compat.quantized import is_substitute
from lycoris.compat.tensor_aliases import by_old_name, check_assignable, file_names, write, write_by_old_name
from lycoris.errors import AttachError, ConfigError, FileError
from lycoris.layers import base_weights
from lycoris.layers.geometry import Affine, Geometry
from lycoris.layers.sites import Site


class AdapterView(nn.Module):
    """`org_module[0]` is the layer, `org_weight` its weight."""

    not_supported = False
    peft_wrapper: None = None

    lora_name: str
    adapter: Adapter
    _place: Site
    _bypass: bool | None
    _parameter: Parametrised | None
    """What it parametrises; None on a layer."""

    # -- what it is --------------------------------------------------------------------------------------------------

    @Fact
    def algorithm(self) -> Algorithm:
        return self.adapter.algorithm

    @Fact
    def inner(self) -> Algorithm:
        """The algorithm, without the lengths of DoRA."""
        return unwrap_dora(self.algorithm)

    @Fact
    def geometry(self) -> Geometry:
        return self.adapter.geometry

    @Fact
    def shape(self) -> tuple[int, ...]:
        return self.geometry.shape

    @Fact
    def dim(self) -> int:
        """Output features of the layer."""
        return self.geometry.out_features

    @Fact
    def lora_dim(self) -> int:
        return int(getattr(self.inner, "rank", 0) or getattr(self.inner, "block_size", 0))

    @Fact
    def scale(self) -> float:
        return self.algorithm.scale(self.geometry)

    @Fact
    def wd(self) -> bool:
        return isinstance(self.algorithm, DoRA)

    @Fact
    def wd_on_out(self) -> bool:
        """Whether DoRA's norms, if there are any, are those of rows."""
        return not isinstance(self.algorithm, DoRA) or self.algorithm.axis == "out"

    @Fact
    def drop(self) -> nn.Module:
        """The dropout as a layer."""
        return nn.Dropout(self.dropout) if self.dropout else nn.Identity()

    @Fact
    def rank_drop(self) -> nn.Module:
        """The dropout of ranks as a layer."""
        return nn.Dropout(self.rank_dropout) if self.rank_dropout else nn.Identity()

    @Fact
    def full_matrix(self) -> bool:
        return bool(getattr(self.inner, "full_matrix", False))

    @Fact
    def is_quant(self) -> bool:
        return self._low_bit or (self.bypass_mode and is_substitute(self.org_module[0]))

    @property
    def bypass_mode(self) -> bool:
        """Whether the layer runs by itself and the adapter beside it: on quantised layers always. Nothing depends on
        it, since every path is exact; it is here to be read."""
        if self._low_bit:
            return True
        return is_substitute(self.org_module[0]) if self._bypass is None else bool(self._bypass)

    @bypass_mode.setter
    def bypass_mode(self, value: bool | None) -> None:
        self._bypass = value

    @Fact
    def org_module(self) -> list[nn.Module]:
        """The layer, in a list so that it is no child."""
        return Fixed([self._place.module])

    @Fact
    def module(self) -> type[nn.Module]:
        """The class of the layer."""
        return type(self._place.module)

    @Fact
    def module_type(self) -> str:
        """What kind of layer it is."""
        return type_name(self._place.module, self.geometry)

    @Fact
    def op(self) -> Callable[..., Tensor]:
        """The function of torch that such a layer is. Raises `AttributeError` for a bare parameter."""
        if self.module_type not in FUNCTIONS:
            raise AttributeError(f"{self.lora_name} is for a parameter, which no function of torch takes")
        return FUNCTIONS[self.module_type]

    @Fact
    def kw_dict(self) -> dict[str, Any]:
        """The arguments of `op` beside input, weight and bias."""
        return arguments(self._place.module, self.module_type)

    @Fact
    def dtype(self) -> torch.dtype:
        """Of the adapter's tensors."""
        return next(iter(self.adapter.tensors().values())).dtype

    @Fact
    def device(self) -> torch.device:
        """Of the adapter's tensors."""
        return next(iter(self.adapter.tensors().values())).device

    @Fact
    def org_forward(self) -> Callable[..., Tensor]:
        """The layer without this adapter."""
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
        write("org_weight", self.org_weight, value)

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
        if adapter is None or not write_by_old_name(adapter, name, value):
            if adapter is not None:
                check_assignable(type(self), name)
                if name == "lora_name" and getattr(self, "_member", None) is not None:
                    raise ConfigError(
                        f"{self.lora_name} is what its network calls it; assigning another would do nothing"
                    )
            super().__setattr__(name, value)

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Under the names that they have in files; `scalar` for a trained scalar."""
        names = file_names(self.algorithm)
        for slot, tensor in self.adapter.named_parameters():
            yield f"{prefix}{'.' if prefix else ''}{names[slot]}", tensor

    # -- what it changes ---------------------------------------------------------------------------------------------

    def _below(self) -> LayerBelow:
        if self._parameter is not None:
            return BareWeight(self.geometry, self._parameter.below(self))
        return attach.bottom(self._place)

    def _find_unmerged(self) -> LayerBelow:
        """The same, for what depends on the weight from before a merge."""
        if self.adapter.merged and self._parameter is None:
            raise AttachError(f"{self.lora_name} is merged into the weight that this depends on; restore it first")
        return self._below()

    def _widen(self, affine: Affine) -> Affine:
        """In float32 at least, as merges are computed."""
        return affine.widen(torch.promote_types(next(iter(self.adapter.tensors().values())).dtype, torch.float32))

    def get_merged_weight(
        self, multiplier: float = 1.0, shape: Any = None, device: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """Weight, as the layer stores it, and bias with this adapter at a strength; without dropout and masks.

        In at least float32. Raises `AttachError` while it is merged.
        """
        weight, bias = self.adapter.adapt_affine(self._widen(self._find_unmerged().affine()), Call(multiplier))
        weight = self.geometry.transpose_stored(weight)
        return (weight if shape is None else weight.reshape(shape)).to(device), bias

    def get_diff_weight(
        self, multiplier: float = 1.0, shape: Any = None, device: Any = None
    ) -> tuple[Tensor, Tensor | None]:
        """ΔW, as the layer stores its weight, and Δb at a strength; Δb None where the bias stays.

        Raises `AttachError` while it is merged, if it depends on the weight from before.
        """
        entry = Entry(self.algorithm, self.geometry, self.adapter.tensors())
        base = self._find_unmerged().affine() if conversion.needs_base(entry) else None
        tensors = conversion.dense(entry, base).tensors
        weight, bias = (tensors.get(full, tensors.get(norm)) for full, norm in (("diff", "w"), ("diff_b", "b")))
        weight = torch.zeros_like(self.org_weight) if weight is None else weight * multiplier
        bias = None if bias is None else bias * multiplier
        return (weight if shape is None else weight.reshape(shape)).to(device), bias

    def _change(self) -> Tensor:
        """ΔW of an algorithm with factors, with its scalar and without its scale, as the layer stores its weight."""
        assert isinstance(self.inner, Additive)
        own = {name: tensor for name, tensor in self.adapter.tensors().items() if name != "magnitude"}
        return self.geometry.transpose_stored(self.inner.delta(own, self.geometry).weight * self.inner.read_scalar(own))

    def bypass_forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """What the layer gives with this adapter at a strength."""
        call = Call(scale, self.adapter.call.rank_mask)
        return self.algorithm.forward(self.adapter.tensors(), self._find_unmerged(), x, call)

    def bypass_forward_diff(self, x: Tensor, scale: float = 1.0) -> Tensor:
        """What this adapter adds to the layer's output."""
        if isinstance(self.algorithm, Additive):
            nothing, call = torch.zeros_like(self._below()(x)), Call(scale, self.adapter.call.rank_mask)
            return self.algorithm.add(nothing, self.adapter.tensors(), self.geometry, x, call)
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
        own = write_tensors(self.algorithm, self.adapter.whole(), self.geometry)
        missing += [prefix + key for key in sorted(own.keys() - given.keys())]
        unexpected += [prefix + key for key in sorted(given.keys() - own.keys())]
        try:
            self._take({key: given.get(key, tensor) for key, tensor in own.items()})
        except FileError as error:
            errors.append(str(error))

    def _take(self, tensors: Mapping[str, Tensor]) -> None:
        algorithm, values = read_tensors(tensors, self.geometry, self.lora_name)
        put([(self.adapter, self.fit(Entry(algorithm, self.geometry, values)))])

    def fit(self, entry: Entry) -> dict[str, Tensor]:
        """The tensors of a file for this adapter. Raises `FileError` when they mean something else."""
        if self._parameter is None:
            return fit_tensors(self.adapter, entry, self._place)
        return match_tensors(self.adapter, entry.algorithm, entry.tensors, self._parameter.name)
