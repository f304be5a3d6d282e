"""What the tensors of a layer tell from their names and shapes: its size and its algorithm."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache

from lycoris.algorithms import OFT, Replace
from lycoris.algorithms.serialization import TensorShapes
from lycoris.algorithms.tensors import ALPHA, MAGNITUDE, find_layer_size, match_algorithms
from lycoris.files.dialects.suffixes import MAGNITUDE_VECTOR
from lycoris.files.recognition import LayerSize

MAGNITUDE_SUFFIXES = frozenset({MAGNITUDE, MAGNITUDE_VECTOR})
BIAS_SUFFIXES = frozenset({"diff_b", "bias", "lora_up.bias", Replace.tensor_names["b"]})
REPLACEMENT_SUFFIXES = frozenset({"weight", "bias", "scale", *Replace.tensor_names.values()})
"""Tensors that replace a layer's own, when there are no others; IA³ has one more."""


def infer_layer_size(tensors: TensorShapes) -> LayerSize:
    """Return the size (O, I·ΠK) of the layer that an adapter's tensors are for.

    `tensors` are the shapes by suffix in LyCORIS' spelling. 0 stands for a size that they do not determine.
    """
    return _infer_layer_size(tuple(tensors.items()))


@lru_cache(maxsize=2**12)  # many layers of a file have the same shapes, and every dialect asks for all of them
def _infer_layer_size(tensors: tuple[tuple[str, tuple[int, ...]], ...]) -> LayerSize:
    return find_layer_size(_rename_old_rotations(dict(tensors)))


def count_algorithms(layers: Iterable[TensorShapes]) -> dict[str, int]:
    """Count layers by algorithm, such as "lokr" or "dora over lora".

    `layers` are the shapes of each one's tensors by suffix; a layer that matches no algorithm counts as "other".
    """
    counts: Counter[str] = Counter()
    for own in layers:
        plain = {suffix: shape for suffix, shape in own.items() if suffix not in {ALPHA, *MAGNITUDE_SUFFIXES}}
        kind = _find_algorithm(_rename_old_rotations(plain))
        counts[f"dora over {kind}" if own.keys() & MAGNITUDE_SUFFIXES else kind] += 1
    return dict(counts)


def _rename_old_rotations(shapes: TensorShapes) -> TensorShapes:
    """Old rotations have the shape of the blocks that generate them today."""
    return {OFT.tensor_names["blocks"] if suffix == "oft_diag" else suffix: shape for suffix, shape in shapes.items()}


def _find_algorithm(tensors: TensorShapes) -> str:
    """The algorithm of a layer's tensors; a change or replacement of the bias next to it counts as part of it."""
    plain = {suffix: shape for suffix, shape in tensors.items() if suffix not in BIAS_SUFFIXES} or tensors
    if plain.keys() <= REPLACEMENT_SUFFIXES:
        return Replace.name if plain else "other"
    return next((each.name for each in match_algorithms(plain)), "other")
