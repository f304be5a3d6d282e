"""Small functions of the old interface: what a string says, what bytes tensors are, what a layer is."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

import torch
from safetensors.torch import save
from torch import Tensor, nn

from lycoris.adapters.attach import base_class
from lycoris.layers import base_weights
from lycoris.targeting.options import algorithm_class

T = TypeVar("T")
Number = TypeVar("Number", int, float)


def str_bool(val: Any) -> bool:
    """False for "false", in whichever letters, and for False; True for everything else, None and 0 included."""
    return str(val).lower() != "false"


def default(val: T | None, d: T) -> T:
    """`val`, or `d` where it is None."""
    return d if val is None else val


def product(xs: Iterable[Number]) -> Number | int:
    """The product of numbers; 1 of none."""
    found: Number | int = 1
    for x in xs:
        found = found * x
    return found


def load_bytes_in_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """The bytes of a safetensors file of these tensors, behind its header."""
    whole = save(dict(tensors))
    return whole[int.from_bytes(whole[:8], "little") + 8 :]


def precalculate_safetensors_hashes(state_dict: Mapping[str, Tensor]) -> str:
    """0x and the SHA-256 of the tensors' bytes in their order. Readers hash the file: see `compat.model_hashes`."""
    found = hashlib.sha256()
    for tensor in state_dict.values():
        found.update(load_bytes_in_safetensors({"tensor": tensor}))
    return f"0x{found.hexdigest()}"


def make_sparse(t: Tensor, sparsity: float = 0.95) -> Tensor:
    """A tensor with zeros for what is, by size, below the quantile of `sparsity`, from 0 to 1."""
    sizes = t.detach().abs()
    ordered = sizes.flatten().double().sort().values
    at = sparsity * (len(ordered) - 1)
    low, part = ordered[int(at)], at - int(at)
    quantile = low + (ordered[min(int(at) + 1, len(ordered) - 1)] - low) * part
    return t.masked_fill(sizes < quantile, 0)


def is_weight_only_fp8_linear(module: nn.Module) -> bool:
    """Whether a layer is a linear one that stores its weight in eight bits beside a `weight_scale`."""
    has = ("in_features", "out_features", "weight", "weight_scale")
    return base_class(module).__name__ == "Fp8Linear" and all(hasattr(module, name) for name in has)


def is_linear_like_module(module: nn.Module) -> bool:
    """Whether a layer is torch's linear one, or stands in for it with a weight of eight bits."""
    return isinstance(module, nn.Linear) or is_weight_only_fp8_linear(module)


def is_supported_linear_module(module: nn.Module, algo_name: str, *, weight_decompose: bool = False) -> bool:
    """Whether a layer is a linear one that an algorithm of configs can be on; `full` cannot be on quantised weights.

    `weight_decompose` makes no difference: DoRA can be wherever LoRA can. Raises `ConfigError` for an unknown name.
    """
    algorithm_class(algo_name)
    return is_linear_like_module(module) and not (algo_name == "full" and base_weights.storage(module).low_bit)


def dequantize_weight_only_fp8(module: nn.Module) -> Tensor:
    """The weight of such a layer in float32: that of eight bits times its scale, which may be one for each row."""
    weight, scale = (torch.as_tensor(getattr(module, name)).float() for name in ("weight", "weight_scale"))
    return weight * scale.to(weight.device).reshape(scale.shape if scale.dim() != 1 else (-1, 1))
