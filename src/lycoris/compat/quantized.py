"""What the 4.1.3 interface guarantees about layers with quantized weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib import import_module

from torch import nn

from lycoris.adapters.attach import base_class
from lycoris.algorithms import Full
from lycoris.algorithms.base import Algorithm
from lycoris.errors import AttachError, ConfigError
from lycoris.layers import base_weights
from lycoris.layers.geometry import describe


class RefusedError(AttachError, RuntimeError):
    """An operation that is not possible on this weight.

    Also a `RuntimeError`, which callers of lycoris-lora catch.
    """


QUANTIZED_CLASSES: Mapping[str, tuple[str, ...]] = {
    "bitsandbytes.nn": ("Linear8bitLt", "LinearFP4", "LinearNF4"),
    "quanto.nn": ("QLinear", "QConv2d", "QLayerNorm"),
    "optimum.quanto.nn": ("QLinear", "QConv2d", "QLayerNorm"),
}
"""Module → its classes of quantized layers."""


@cache
def quant_linears() -> tuple[type[nn.Module], ...]:
    """Return the classes of quantized layers in the packages that are installed, which are imported for it.

    The result is cached for the process.
    """
    found: list[type[nn.Module]] = []
    for name, classes in QUANTIZED_CLASSES.items():
        with suppress(ImportError):
            found += [getattr(import_module(name), each) for each in classes]
    return tuple(found)


def is_substitute(layer: nn.Module) -> bool:
    """Return whether a layer replaces `nn.Linear`, as quantized layers do.

    False for `nn.Linear` itself, for GPT-2's `Conv1D`, and for layers that are not linear.
    """
    geometry = describe(layer)
    named = base_class(layer).__name__
    return geometry is not None and geometry.kind == "linear" and named not in ("Linear", "Conv1D")


def is_mergeable(layers: Mapping[str, nn.Module]) -> bool:
    """Return whether adapters can be merged into all of these weights without rounding to few bits."""
    return all(row.merges and not row.low_bit for row in base_weights.capabilities(layers).rows)


def check_mergeable(layers: Mapping[str, nn.Module]) -> None:
    """Check that adapters can be merged into all of these weights; see `is_mergeable`.

    Raises `RefusedError` for the first one that they cannot.
    """
    for path, layer in layers.items():
        able = base_weights.capabilities({path: layer}).rows[0]
        if not able.merges and not able.low_bit:
            raise RefusedError(
                f"adapters cannot be merged into the weight of {path}: {able.remark}. Leave the adapters applied"
            )
        if able.low_bit:
            what = "a weight-only FP8" if base_class(layer).__name__ == "Fp8Linear" else "such a"
            raise RefusedError(
                f"{path} stores its weight as {base_weights.kind(layer)}, and merging into {what} layer would lose the "
                "update or is not possible. Leave the adapters applied, which is exact, or merge before quantizing; "
                "network.adapters.merge(into_low_bit=True) rounds and reports the loss"
            )


def check_trainable(layers: Mapping[str, nn.Module], uses: Mapping[str, Sequence[Algorithm]]) -> None:
    """Raise `ConfigError` where `full`, which trains the weight itself, is planned for a quantized weight.

    `uses` maps paths to the algorithms planned there; `layers` has the module of each path.
    """
    for path, algorithms in uses.items():
        if any(isinstance(algorithm, Full) for algorithm in algorithms) and base_weights.storage(layers[path]).low_bit:
            raise ConfigError(
                f"full trains the weight itself, and {path} stores its weight as {base_weights.kind(layers[path])}; "
                "leave such layers out with exclude_name, or use lokr or lora, which leave the weight unchanged"
            )
