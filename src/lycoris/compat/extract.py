"""`extract_diff`: the difference between a fine-tuned model and its base, as tensors of an adapter file."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn

from lycoris import files
from lycoris.adapters import attach
from lycoris.adapters.bundle import Bundle
from lycoris.adapters.load_report import some
from lycoris.algorithms import Full, LoRA, Norm, conversion
from lycoris.algorithms.base import Entry
from lycoris.algorithms.tensors import ALPHA
from lycoris.compat.extract_layer import Mode, select_rank
from lycoris.compat.kohya import Component, list_components
from lycoris.compat.merge import unwrap_single
from lycoris.errors import ConfigError, FileError, unknown
from lycoris.files.dialects.base import flatten
from lycoris.layers import base_weights, paths
from lycoris.layers.geometry import IS_ADAPTER, Affine, Geometry
from lycoris.layers.sites import ModelSites, Site

logger = logging.getLogger("LyCORIS")


def extract_diff(
    base_tes: Sequence[nn.Module | None] | None,
    db_tes: Sequence[nn.Module | None] | None,
    base_unet: nn.Module | None,
    db_unet: nn.Module | None,
    mode: Mode = "fixed",
    linear_mode_param: float = 0,
    conv_mode_param: float = 0,
    extract_device: Any = "cpu",
    use_bias: bool = False,
    sparsity: float = 0.98,
    small_conv: bool = True,
) -> dict[str, Tensor]:
    """Return tensors, named as in kohya's files, that turn the base models into the fine-tuned `db_` models.

    The change of each linear layer and convolution is approximated by a LoRA of its largest singular values. If that
    needs a rank of at least half the output features, the whole change is stored. Changes of biases and norms are
    always included. The tensors are in float16, except alpha, and those that float16 cannot hold, in float32. Weights
    are compared as they act: quantized ones dequantized, adapters on them included.

    Args:
        mode: How many singular values are kept, at least one: "fixed" is that number; "threshold" those above it;
            "ratio" those above that fraction of the largest; "quantile" or "percentile" the fewest whose sum is that
            fraction of the total; "full" stores the whole change.
        linear_mode_param: The number for `mode` on linear layers; `conv_mode_param` on convolutions with a larger
            kernel.
        use_bias: Whether to add the largest entries of the residual that a LoRA leaves, all but the fraction
            `sparsity`.
        small_conv: Has no effect: a Tucker core of the same rank would lose more.

    Changes that such a file cannot hold (bare parameters, buffers, embeddings unless "full") are logged as a warning.

    Raises `ConfigError` for an unknown mode, numbers that have no meaning in it, or a model without its counterpart,
    and `FileError` when two models do not have the same layers.
    """
    _check_arguments(mode, linear_mode_param=linear_mode_param, conv_mode_param=conv_mode_param, sparsity=sparsity)
    befores, afters = [*(base_tes or ()), base_unet], [*(db_tes or ()), db_unet]
    if [model is None for model in befores] != [model is None for model in afters]:
        base, tuned = (", ".join("none" if m is None else type(m).__name__ for m in each) for each in (befores, afters))
        raise ConfigError(
            f"each base model needs a fine-tuned counterpart; the base models are {base}, the fine-tuned ones {tuned}"
        )
    wanted = _Selection(mode, linear_mode_param, conv_mode_param, sparsity if use_bias else None)
    found: dict[str, Tensor] = {}
    models = zip(list_components(unwrap_single(base_tes), base_unet), [m for m in afters if m is not None], strict=True)
    for component, after in models:
        found |= _extract_model(component, after, wanted, extract_device)
    converted = {key: tensor if key.endswith(f".{ALPHA}") else _to_half(tensor) for key, tensor in found.items()}
    return {key: tensor.cpu().contiguous() for key, tensor in converted.items()}


def _extract_model(component: Component, tuned: nn.Module, wanted: _Selection, device: Any) -> dict[str, Tensor]:
    """Return the tensors for one model; what changed and cannot be stored is logged."""
    found: dict[str, Tensor] = {}
    entries: dict[str, tuple[Entry, ...]] = {}
    lost = list(_find_other_changes(component.model, tuned))
    for place, other in _pair_layers(component.model, tuned):
        weight, bias = _compute_change(place, other, device)
        if place.geometry.kind == "embedding" and wanted.mode != "full":
            lost += [] if weight is None else [f"{place.path}, an embedding (mode='full' stores it)"]
        elif stack := _build_entries(place.geometry, weight, bias, wanted):
            entries[place.path] = stack
            found |= _largest_residuals(f"{component.prefix}_{flatten(place.path)}", stack[0], weight, wanted.sparsity)
    if lost:
        logger.warning("%s: changed but not stored: %s", component.prefix, some(lost))
    return found | files.encode(Bundle(entries), prefix=component.prefix)


def _check_arguments(mode: str, **numbers: float) -> None:
    if mode not in get_args(Mode):
        raise ConfigError(unknown("mode", mode, get_args(Mode)))
    for name, number in numbers.items():
        most = 1.0 if name == "sparsity" or mode in ("ratio", "quantile", "percentile") else math.inf
        if not (0 <= number <= most and math.isfinite(number)):
            what = "a finite number of at least 0" if most > 1 else "a fraction from 0 to 1"
            raise ConfigError(f"{name} must be {what}, not {number!r}; mode is {mode!r}")


class _Selection(NamedTuple):
    """How much of a change is stored."""

    mode: Mode
    linear: float
    conv: float
    sparsity: float | None
    """None: no residuals are stored."""

    def rank(self, g: Geometry, s: Tensor) -> int:
        """Return how many of the singular values of a layer's change are kept."""
        much = self.linear if g.pointwise else self.conv
        return select_rank(self.mode, much, s)


def _pair_layers(base: nn.Module, tuned: nn.Module) -> Iterator[tuple[Site, Site]]:
    """Yield the layers of two models in pairs. Raises `FileError` unless both have the same."""
    before, after = (_layers(model) for model in (base, tuned))
    for path in (*before, *(path for path in after if path not in before)):
        one, other = before.get(path), after.get(path)
        if one is None or other is None or _describe_place(one) != _describe_place(other):
            raise FileError(
                f"{path} is {_describe_place(one)} in the base model and {_describe_place(other)} in the fine-tuned one"
            )
        yield one, other


def _layers(model: nn.Module) -> dict[str, Site]:
    return {path: site for path, site in ModelSites(model).items() if not site.attribute}


def _describe_place(place: Site | None) -> str:
    return "nothing" if place is None else f"{place.geometry} with{'' if place.geometry.has_bias else 'out'} bias"


@torch.no_grad()
def _find_other_changes(base: nn.Module, tuned: nn.Module) -> Iterator[str]:
    """Yield parameters and buffers that differ and are not a layer's weight or bias."""
    before, after = (dict(_iterate_other_tensors(model)) for model in (base, tuned))
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if one is None or other is None or one.shape != other.shape or not torch.equal(one, other.to(one)):
            yield name


def _iterate_other_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    layers = {path: site.module for path, site in _layers(model).items()}
    for path, module in paths.named_modules(model):
        if getattr(module, IS_ADAPTER, False) or (path in layers and base_weights.storage(module).low_bit):
            continue
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and not (path in layers and name in ("weight", "bias")):
                yield f"{path}.{name}" if path else name, tensor


@torch.no_grad()
def _compute_change(base: Site, tuned: Site, device: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the changes of weight, (O, I, ...), and bias, in at least float32; None where nothing changed."""
    before, after = (_to_float32(attach.top(place).affine(), device) for place in (base, tuned))
    weight = after.weight - before.weight
    bias = None if after.bias is None or before.bias is None else after.bias - before.bias
    return weight if weight.any() else None, bias if bias is not None and bias.any() else None


def _to_float32(affine: Affine, device: Any) -> Affine:
    bias = None if affine.bias is None else affine.bias.to(device)
    return Affine(affine.weight.to(device), bias).widen(torch.float32)


@torch.no_grad()
def _build_entries(g: Geometry, weight: Tensor | None, bias: Tensor | None, wanted: _Selection) -> tuple[Entry, ...]:
    """Return the entries for a layer's change; none where nothing changed."""
    if g.kind == "norm":
        changed = {name: tensor for name, tensor in (("w", weight), ("b", bias)) if tensor is not None}
        still = torch.zeros_like(next(iter(changed.values()))) if changed else None
        both = {name: changed.get(name, still) for name in Norm().slots(g)}
        return (Entry(Norm(), g, {name: t for name, t in both.items() if t is not None}),) if changed else ()
    shift = {} if bias is None else {"diff_b": bias}
    shift_entry = (Entry(Full(weight=False), g, shift),) if shift else ()
    if weight is None:
        return shift_entry
    if wanted.mode != "full":
        u, s, v = torch.linalg.svd(weight.flatten(1), full_matrices=False)
        rank = wanted.rank(g, s)
        if rank < g.out_features / 2:
            up, down = _to_half(u[:, :rank] * s[:rank]), _to_half(v[:rank])
            tensors = {"up": up.reshape(-1, rank, *(1,) * len(g.kernel)), "down": down.reshape(rank, *g.shape[1:])}
            return (Entry(LoRA(rank=rank), g, tensors), *shift_entry)
    return (Entry(Full(bias=bool(shift)), g, {"diff": g.transpose_stored(weight), **shift}),)


def _largest_residuals(name: str, entry: Entry, weight: Tensor | None, sparsity: float | None) -> dict[str, Tensor]:
    """Return the largest entries of the residual that a LoRA leaves, in the format of early files."""
    if sparsity is None or weight is None or not isinstance(entry.algorithm, LoRA):
        return {}
    rest = weight.flatten(1) - conversion.dense(entry).tensors["diff"].flatten(1)
    places = rest.flatten().abs().topk(max(1, round(rest.numel() * (1 - sparsity)))).indices
    own = {
        "bias_indices": torch.stack([places // rest.shape[1], places % rest.shape[1]]).to(torch.int32),
        "bias_values": rest.flatten()[places],
        "bias_size": torch.tensor(rest.shape, dtype=torch.int32),
    }
    return {f"{name}.{suffix}": tensor for suffix, tensor in own.items()}


def _to_half(tensor: Tensor) -> Tensor:
    """Convert to float16, or to float32 what would overflow or vanish there."""
    half = tensor.half() if tensor.is_floating_point() else tensor
    holds = half.isfinite().all() and (half.any() or not tensor.any())
    return half if holds else tensor.float()
