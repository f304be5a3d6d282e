"""Small functions of the 4.1.3 interface."""

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

ValueT = TypeVar("ValueT")
Number = TypeVar("Number", int, float)


def str_bool(val: Any) -> bool:
    """Return False for False and for "false" in upper or lower case, and True for everything else.

    None and 0 are therefore True, as in lycoris-lora 4.1.3.
    """
    return str(val).lower() != "false"


def default(val: ValueT | None, d: ValueT) -> ValueT:
    """Return `val`, or `d` if it is None."""
    return d if val is None else val


def product(xs: Iterable[Number]) -> Number | int:
    """Return the product of numbers.

    1 for an empty iterable.
    """
    found: Number | int = 1
    for x in xs:
        found = found * x
    return found


def load_bytes_in_safetensors(tensors: Mapping[str, Tensor]) -> bytes:
    """Return the bytes that follow the header in a safetensors file of these tensors."""
    content = save(dict(tensors))
    return content[int.from_bytes(content[:8], "little") + 8 :]


def precalculate_safetensors_hashes(state_dict: Mapping[str, Tensor]) -> str:
    """Return "0x" and the SHA-256 of the tensors' bytes, in their order.

    Programs that read the hash of a file compute it differently: see `lycoris.compat.model_hashes`.
    """
    found = hashlib.sha256()
    for tensor in state_dict.values():
        found.update(load_bytes_in_safetensors({"tensor": tensor}))
    return f"0x{found.hexdigest()}"


def make_sparse(t: Tensor, sparsity: float = 0.95) -> Tensor:
    """Return a copy in which the entries of smallest magnitude are 0.

    `sparsity` is the quantile, from 0 to 1, of the absolute values below which entries become 0.
    """
    sizes = t.detach().abs()
    ordered = sizes.flatten().double().sort().values
    at = sparsity * (len(ordered) - 1)
    low, part = ordered[int(at)], at - int(at)
    quantile = low + (ordered[min(int(at) + 1, len(ordered) - 1)] - low) * part
    return t.masked_fill(sizes < quantile, 0)


def is_weight_only_fp8_linear(module: nn.Module) -> bool:
    """Return whether a layer is linear and stores its weight in 8 bits with a separate scale.

    Its class is named `Fp8Linear` and has `weight` and `weight_scale`.
    """
    has = ("in_features", "out_features", "weight", "weight_scale")
    return base_class(module).__name__ == "Fp8Linear" and all(hasattr(module, name) for name in has)


def is_linear_like_module(module: nn.Module) -> bool:
    """Return whether a layer is linear as lycoris-lora means it.

    True for `nn.Linear` and its subclasses, and for weight-only FP8 layers.
    """
    return isinstance(module, nn.Linear) or is_weight_only_fp8_linear(module)


def is_supported_linear_module(module: nn.Module, algo_name: str, *, weight_decompose: bool = False) -> bool:
    """Return whether a layer is linear and an algorithm can adapt it; `full` cannot adapt quantized weights.

    `weight_decompose` has no effect: DoRA works wherever LoRA does. Raises `ConfigError` for an unknown algorithm.
    """
    algorithm_class(algo_name)
    return is_linear_like_module(module) and not (algo_name == "full" and base_weights.storage(module).low_bit)


def dequantize_weight_only_fp8(module: nn.Module) -> Tensor:
    """Return the weight of a weight-only FP8 layer in float32: the 8-bit weight times its scale.

    The scale may have one value, or one per row.
    """
    weight, scale = (torch.as_tensor(getattr(module, name)).float() for name in ("weight", "weight_scale"))
    return weight * scale.to(weight.device).reshape(scale.shape if scale.dim() != 1 else (-1, 1))
