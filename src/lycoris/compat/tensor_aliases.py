"""An adapter's tensors and settings by the names that scripts use."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from lycoris.adapters.adapter import Adapter
from lycoris.algorithms import OFT, DoRA, Full
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.dora import unwrap_dora
from lycoris.compat.assignable import ConstantTensor
from lycoris.errors import ConfigError
from lycoris.layers import sharding

ALGORITHM_FIELDS: Mapping[str, tuple[str, Any]] = {
    **{name: (name, 0.0) for name in ("dropout", "rank_dropout", "module_dropout")},
    **{name: (name, False) for name in ("rank_dropout_scale", "rs_lora", "tucker")},
    **{name: (name, None) for name in ("block_size", "constraint")},
    "use_tucker": ("tucker", False),
    "rescaled": ("rescale", None),
    "train_input": ("on_input", None),
    "sig_type": ("vectors", None),
    "use_data_init": ("data_init", None),
}
"""Attribute of a module → the algorithm's field, and the value without such a field; None: no such attribute."""

ALGORITHM_ATTRIBUTES = (
    *ALGORITHM_FIELDS,
    *("alpha", "scale", "lora_dim", "wd", "wd_on_out", "full_matrix", "use_w1", "use_w2", "decompose_both"),
    *("drop", "rank_drop", "algorithm", "inner", "block_num", "boft_b", "boft_m", "mask_group_id"),
)
LAYER_ATTRIBUTES = (
    *("org_module", "org_forward", "module", "module_type", "shape", "dim", "op", "kw_dict", "geometry", "is_quant"),
    *("not_supported", "peft_wrapper", "dtype", "device", "dtype_tensor"),
)
"""Attributes that describe a module, so that assigning to them would have no effect."""


class FactorView:
    """A factor as scripts see it: a layer whose `weight` is the tensor.

    Assigning to `weight` copies into the tensor, and raises `ConfigError` for another shape.
    """

    __slots__ = ("_name", "_tensor")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self._name, self._tensor = name, tensor

    @property
    def weight(self) -> Tensor:
        return self._tensor

    @weight.setter
    def weight(self, value: Tensor) -> None:
        write_tensor(f"{self._name}.weight", self._tensor, value)


@torch.no_grad()
def write_tensor(name: str, own: Tensor, value: Tensor) -> None:
    """Copy `value` into a tensor of a module; `name` is for the error.

    Raises `ConfigError` for another shape, which would otherwise be broadcast.
    """
    if own.shape != value.shape:
        raise ConfigError(
            f"{name} has shape {tuple(own.shape)}; a tensor of shape {tuple(value.shape)} cannot be assigned to it"
        )
    sharding.assign(own, value)


def list_attribute_names(algorithm: Algorithm) -> dict[str, str]:
    """Return slot → name of the tensor, as in files.

    Slots that files have no name for are included: a trained scalar is `scalar`.
    """
    return {**unwrap_dora(algorithm).tensor_names, **DoRA.tensor_names, "scalar": "scalar"}


def get_by_old_name(adapter: Adapter, name: str) -> Any:
    """Return a tensor or a setting by lycoris-lora's name, or None for other names.

    Of `lora_up.weight` the first part is asked for, and gives a `FactorView`.
    """
    algorithm = unwrap_dora(adapter.algorithm)
    if name == "alpha":
        alpha = algorithm.export_alpha(adapter.geometry)
        return None if alpha is None else ConstantTensor.from_value(name, alpha)
    tensors = adapter.tensors()
    if name == "scalar":
        return tensors["scalar"] if "scalar" in tensors else ConstantTensor.from_value(name, 1.0)
    for slot, key in list_attribute_names(adapter.algorithm).items():
        if slot in tensors and key == name:
            return tensors[slot]
        if slot in tensors and key == f"{name}.weight":
            return FactorView(name, tensors[slot])
    if isinstance(algorithm, Full) and name in ("weight", "bias"):
        return tensors.get("diff" if name == "weight" else "diff_b")
    if name == "constraint" and isinstance(algorithm, OFT):
        return algorithm.constraint * adapter.geometry.out_features
    field, usual = ALGORITHM_FIELDS.get(name, ("", None))
    return getattr(algorithm, field, usual)


def write_by_old_name(adapter: Adapter, name: str, value: Any) -> bool:
    """Copy a tensor into the adapter by its name in files; return False for names that are not an adapter's.

    Raises `ConfigError` when an assignment would have no effect: for settings, for tensors that this adapter does not
    have, and for values of another type or shape.
    """
    own = get_by_old_name(adapter, name)
    if isinstance(own, FactorView):
        weight = getattr(value, "weight", None)
        if not isinstance(weight, Tensor):
            raise ConfigError(
                f"{name} stands for the tensor {name}.weight; assign to that, or assign a layer with a weight"
            )
        own.weight = weight
        return True
    if isinstance(own, Tensor) and any(own is tensor for tensor in adapter.tensors().values()):
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name} is a tensor of shape {tuple(own.shape)}; {value!r:.80} cannot be assigned to it")
        write_tensor(name, own, value)
        return True
    known = {key.removesuffix(".weight") for key in list_attribute_names(adapter.algorithm).values()}
    known |= {"weight", "bias"} if isinstance(unwrap_dora(adapter.algorithm), Full) else set()
    if name in ALGORITHM_ATTRIBUTES:
        raise ConfigError(
            f"{name} is a setting of {adapter.algorithm}, which is fixed; build a new module with this value"
        )
    if name in known:
        raise ConfigError(f"{adapter.algorithm} has no tensor {name} here; build a new module with the options for it")
    return False


def check_assignable(module: type, name: str) -> None:
    """Check an attribute that is about to be assigned on a module.

    Raises `ConfigError` for one that describes the layer, to which an assignment would have no effect.
    """
    own = inspect.getattr_static(module, name, None)
    if name in LAYER_ATTRIBUTES or (isinstance(own, property) and own.fset is None):
        raise ConfigError(
            f"assigning to {name} of a {module.__name__} would have no effect: it describes the layer of the "
            "module; build a new module for another layer"
        )
