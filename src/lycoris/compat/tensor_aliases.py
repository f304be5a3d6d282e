"""An adapter's tensors by the names that scripts know."""

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
from lycoris.compat.assignable import Constant
from lycoris.errors import ConfigError
from lycoris.layers import sharding

SETTINGS: Mapping[str, tuple[str, Any]] = {
    **{name: (name, 0.0) for name in ("dropout", "rank_dropout", "module_dropout")},
    **{name: (name, False) for name in ("rank_dropout_scale", "rs_lora", "tucker")},
    **{name: (name, None) for name in ("block_size", "constraint")},
    "use_tucker": ("tucker", False),
    "rescaled": ("rescale", None),
    "train_input": ("on_input", None),
    "sig_type": ("vectors", None),
    "use_data_init": ("data_init", None),
}
"""What scripts read off a module → the algorithm's field, and what is read where it has none; None: no such name."""

OF_ALGORITHM = (
    *SETTINGS,
    *("alpha", "scale", "lora_dim", "wd", "wd_on_out", "full_matrix", "use_w1", "use_w2", "decompose_both"),
    *("drop", "rank_drop", "algorithm", "inner", "block_num", "boft_b", "boft_m", "mask_group_id"),
)
OF_LAYER = (
    *("org_module", "org_forward", "module", "module_type", "shape", "dim", "op", "kw_dict", "geometry", "is_quant"),
    *("not_supported", "peft_wrapper", "dtype", "device", "dtype_tensor"),
)
"""Attributes of a module that say what it is, so that assigning to them would do nothing."""


class Factor:
    """What a factor is to scripts: a layer of which `weight` is the tensor. Assigning to that writes to the tensor."""

    __slots__ = ("_name", "_tensor")

    def __init__(self, name: str, tensor: Tensor) -> None:
        self._name, self._tensor = name, tensor

    @property
    def weight(self) -> Tensor:
        return self._tensor

    @weight.setter
    def weight(self, value: Tensor) -> None:
        write(f"{self._name}.weight", self._tensor, value)


@torch.no_grad()
def write(name: str, own: Tensor, value: Tensor) -> None:
    """Copy a tensor into the one that a module has. Raises `ConfigError` for another shape, which would be spread."""
    if own.shape != value.shape:
        raise ConfigError(f"{name} has shape {tuple(own.shape)}, and one of {tuple(value.shape)} was assigned")
    sharding.assign(own, value)


def file_names(algorithm: Algorithm) -> dict[str, str]:
    """Slot → name as in files, for what a file has no name for too."""
    return {**unwrap_dora(algorithm).tensor_names, **DoRA.tensor_names, "scalar": "scalar"}


def by_old_name(adapter: Adapter, name: str) -> Any:
    """A tensor by its name in files; None for other names. Of `lora_up.weight` the first part is asked for."""
    algorithm = unwrap_dora(adapter.algorithm)
    if name == "alpha":
        alpha = algorithm.export_alpha(adapter.geometry)
        return None if alpha is None else Constant.of(name, alpha)
    tensors = adapter.tensors()
    if name == "scalar":
        return tensors["scalar"] if "scalar" in tensors else Constant.of(name, 1.0)
    for slot, key in file_names(adapter.algorithm).items():
        if slot in tensors and key == name:
            return tensors[slot]
        if slot in tensors and key == f"{name}.weight":
            return Factor(name, tensors[slot])
    if isinstance(algorithm, Full) and name in ("weight", "bias"):
        return tensors.get("diff" if name == "weight" else "diff_b")
    if name == "constraint" and isinstance(algorithm, OFT):
        return algorithm.constraint * adapter.geometry.out_features
    field, usual = SETTINGS.get(name, ("", None))
    return getattr(algorithm, field, usual)


def write_by_old_name(adapter: Adapter, name: str, value: Any) -> bool:
    """Write to a tensor by its name in files; False for names that are none.

    Raises `ConfigError` for what is no tensor of this adapter, so that an assignment to it would do nothing.
    """
    own = by_old_name(adapter, name)
    if isinstance(own, Factor):
        weight = getattr(value, "weight", None)
        if not isinstance(weight, Tensor):
            raise ConfigError(f"{name} stands for the tensor {name}.weight; assign to that, or a layer with a weight")
        own.weight = weight
        return True
    if isinstance(own, Tensor) and any(own is tensor for tensor in adapter.tensors().values()):
        if not isinstance(value, Tensor):
            raise ConfigError(f"{name} is a tensor of shape {tuple(own.shape)}, and {value!r:.80} was assigned")
        write(name, own, value)
        return True
    known = {key.removesuffix(".weight") for key in file_names(adapter.algorithm).values()}
    known |= {"weight", "bias"} if isinstance(unwrap_dora(adapter.algorithm), Full) else set()
    if name in OF_ALGORITHM:
        raise ConfigError(f"{name} belongs to {adapter.algorithm}, which does not change; make a new module with it")
    if name in known:
        raise ConfigError(f"{adapter.algorithm} has no tensor {name} here; make a new module with the options for it")
    return False


def check_assignable(module: type, name: str) -> None:
    """Raise `ConfigError` for an attribute that says what a module is, and that nothing would read again."""
    own = inspect.getattr_static(module, name, None)
    if name in OF_LAYER or (isinstance(own, property) and own.fset is None):
        raise ConfigError(
            f"assigning to {name} of a {module.__name__} would do nothing: it is read off the layer that the module "
            "was made for; make a new module for another"
        )
