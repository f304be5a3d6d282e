"""Read and write one layer's tensors under the names that files use, whatever the algorithm."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from lycoris.algorithms import ALGORITHMS, DoRA
from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm
from lycoris.algorithms.dora import unwrap_dora
from lycoris.algorithms.serialization import TensorShapes
from lycoris.algorithms.slices import Slice
from lycoris.errors import ConfigError, FileError
from lycoris.layers.geometry import Geometry

MAGNITUDE = DoRA.tensor_names["magnitude"]
ALPHA = "alpha"
RANK_TENSORS = tuple(
    dict.fromkeys(each.tensor_names[slot] for each in ALGORITHMS.values() for slot in each.rank_tensors)
)
"""Names in files of the factors whose first axis is the rank."""
EMPTY = ("b", "diff_b")
"""Slots that have no effect where they are zero."""


def write_tensors(algorithm: Algorithm, p: Mapping[str, Tensor], g: Geometry) -> dict[str, Tensor]:
    """Return a layer's tensors under the names that files use, with `alpha`.

    Trained scalars are multiplied into a factor. Tensors of a stacked parameter keep their first axis.

    Args:
        p: tensors by slot name.

    Raises:
        FileError: `algorithm` is a slice, whose tensors belong to a layer with more rows.
    """
    if isinstance(algorithm, Slice):
        raise FileError(f"a slice of the {algorithm.name} of a fused layer has no names in files: write all of it")
    if g.stack:
        one = replace(g, stack=0)
        each = [write_tensors(algorithm, {name: t[at] for name, t in p.items()}, one) for at in range(g.stack)]
        shared = {ALPHA, *(algorithm.tensor_names[mark] for mark in algorithm.stored_settings)}
        return {key: t if key in shared else torch.stack([of[key] for of in each]) for key, t in each[0].items()}
    inner = unwrap_dora(algorithm)
    stored = inner.export_tensors({name: tensor for name, tensor in p.items() if name != "magnitude"}, g)
    tensors = {inner.tensor_names[name]: tensor for name, tensor in stored.items()}
    alpha = inner.export_alpha(g)
    if alpha is not None:
        tensors[ALPHA] = torch.tensor(alpha, dtype=torch.float32)
    if isinstance(algorithm, DoRA):
        tensors[MAGNITUDE] = p["magnitude"]
    return tensors


def read_tensors(tensors: Mapping[str, Tensor], g: Geometry, where: str) -> tuple[Algorithm, dict[str, Tensor]]:
    """Return the algorithm of a layer's tensors, and the tensors by slot name.

    Shapes are checked against the layer. Axes of size 1 are adjusted to it, so that the adapter of a 1x1 convolution
    fits a linear layer of the same size.

    Args:
        tensors: by their names in files.
        where: the layer's name, for errors.

    Raises:
        FileError: no algorithm has these tensors, or they do not fit the layer.
    """
    if g.stack:
        return _read_stack(tensors, g, where)
    rest = dict(tensors)
    alpha, magnitude = rest.pop(ALPHA, None), rest.pop(MAGNITUDE, None)
    kind = _recognize(rest, g, where)
    slot_of = {suffix: slot for slot, suffix in kind.tensor_names.items()}
    p = {slot_of[suffix]: tensor for suffix, tensor in rest.items()}
    scale = None if alpha is None else number(alpha, f"{where}.alpha", infinite=not kind.uses_alpha(p))
    try:
        algorithm: Algorithm = kind.infer(p, g, scale)
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in sorted(rest.items()))
        raise FileError(f"{where}: these tensors do not fit {kind.name} on a {g}: {shapes} ({error})") from error
    if magnitude is not None:
        if not isinstance(algorithm, Additive):
            raise FileError(f"{where}: {MAGNITUDE} next to {kind.name}, which DoRA does not support")
        p["magnitude"] = magnitude
        algorithm = DoRA.read(algorithm, p, g)
    return algorithm, _fit_shapes(
        algorithm, {name: t for name, t in p.items() if name not in kind.stored_settings}, g, where
    )


def _read_stack(tensors: Mapping[str, Tensor], g: Geometry, where: str) -> tuple[Algorithm, dict[str, Tensor]]:
    """Read tensors with one more axis in front, for the matrices of a stacked parameter."""
    parts = {key: tensor for key, tensor in tensors.items() if tensor.dim()}
    wrong = next((key for key, tensor in parts.items() if len(tensor) != g.stack), None)
    if wrong is not None:
        raise FileError(f"{where}.{wrong} has {len(parts[wrong])} entries on its first axis; {g} needs {g.stack}")
    one = replace(g, stack=0)
    each = [
        read_tensors({key: tensor[at] if key in parts else tensor for key, tensor in tensors.items()}, one, where)
        for at in range(g.stack)
    ]
    return each[0][0], {name: torch.stack([p[name] for _, p in each]) for name in each[0][1]}


def match_algorithms(shapes: TensorShapes) -> list[type[Algorithm]]:
    """Return the algorithms that have all of a layer's tensors by name and claim them by shape.

    They come in the order of `ALGORITHMS`; none fit a layer without tensors.

    Args:
        shapes: by name in files, without `alpha` and DoRA's magnitude.
    """
    fitting = [kind for kind in ALGORITHMS.values() if shapes and shapes.keys() <= set(kind.tensor_names.values())]
    return [kind for kind in fitting if kind.claims(shapes)]


def find_layer_size(shapes: TensorShapes) -> tuple[int, int]:
    """Return (O, I·ΠK) of the layer that an adapter's tensors belong to, from their shapes in a file; 0 for unknown.

    Tensors that no algorithm has are ignored. Of several answers the most complete counts.
    """
    having = [kind for kind in ALGORITHMS.values() if shapes.keys() & set(kind.tensor_names.values())]
    sizes = [kind.layer_size(shapes) for kind in having if kind.claims(_own_shapes(kind, shapes))]
    return max(sizes, key=lambda size: (all(size), any(size)), default=(0, 0))


def _own_shapes(kind: type[Algorithm], shapes: TensorShapes) -> TensorShapes:
    return {name: shape for name, shape in shapes.items() if name in kind.tensor_names.values()}


def _recognize(tensors: Mapping[str, Tensor], g: Geometry, where: str) -> type[Algorithm]:
    suffixes = set(tensors)
    fitting = match_algorithms({name: tuple(tensor.shape) for name, tensor in tensors.items()})
    fitting.sort(key=lambda kind: g.kind not in kind.kinds)
    if fitting and g.kind in fitting[0].kinds:
        return fitting[0]
    if fitting:
        raise FileError(f"{where}: the file has {fitting[0].name} for a {g.kind}, which it does not serve")
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    having = [kind for kind in ALGORITHMS.values() if suffixes & set(kind.tensor_names.values())]
    partly = [kind.name for kind in having if kind.claims(_own_shapes(kind, shapes))]
    why = f"they mix {' and '.join(partly)}" if len(partly) > 1 else "no algorithm known here has just these"
    found = ", ".join(f"{name} {tuple(tensors[name].shape)}" for name in sorted(suffixes)) or "(none)"
    raise FileError(f"{where}: cannot read the tensors {found} of a {g}: {why}")


def _fit_shapes(algorithm: Algorithm, p: dict[str, Tensor], g: Geometry, where: str) -> dict[str, Tensor]:
    inner = unwrap_dora(algorithm)
    names = dict(inner.tensor_names) | DoRA.tensor_names
    try:
        slots = algorithm.slots(g)
    except ConfigError as error:
        raise FileError(f"{where}: its {inner.name} does not fit a {g}: {error}") from error
    # Frozen tensors may be left out, since the base weight determines them; some without the others say nothing.
    some = any(name in p for name, slot in slots.items() if not slot.trainable)
    fitted = {}
    for name, slot in slots.items():
        if name not in p:
            if slot.trainable or some:
                raise FileError(f"{where}: {inner.name} needs {names[name]}, which the file does not have")
            continue
        given = tuple(p[name].shape)
        if [size for size in given if size != 1] != [size for size in slot.shape if size != 1]:
            raise FileError(f"{where}.{names[name]} has shape {given}; a {g} needs {slot.shape}")
        fitted[name] = p[name].reshape(slot.shape)
    # Some programs want a change of the bias in the file even where the layer has none.
    said = {name for name, tensor in p.items() if name not in EMPTY or tensor.any()}
    extra = sorted(names[name] for name in said - slots.keys())
    if extra:
        raise FileError(f"{where}: {inner.name} on a {g} has no place for {', '.join(extra)}")
    return fitted


def number(tensor: Tensor, where: str, *, infinite: bool = False) -> float:
    """Return the number in a tensor of one element.

    Raises:
        FileError: it has more or fewer elements, is complex, or is not finite, unless `infinite` allows that.
    """
    one = tensor.numel() == 1 and not tensor.is_complex()
    if not one or not (infinite or torch.isfinite(tensor.float()).all()):
        raise FileError(f"{where} must be one finite number, not {tensor.tolist()!r:.80}")
    return float(tensor)
