"""What adapters cost, layer by layer, known from shapes alone: parameters, file, rank, work, memory for backward."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch

from lycoris.adapters.adapter import SharedTensors
from lycoris.adapters.adapter_set import AdapterSet
from lycoris.algorithms.additive import TOKENS
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.slices import fused_entry
from lycoris.algorithms.tensors import ALPHA, write_tensors
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Geometry
from lycoris.targeting.planning import Placement, Plan

PRECISE_DTYPES = (torch.float32, torch.float64)


@dataclass(frozen=True, kw_only=True)
class LayerCost:
    """One adapter on one layer. Work and memory are per token, in a pass over as many as the explanation says.

    Of a stack, each adapter has one of its own under the same path; of slices that share their tensors, only the first
    has parameters and file size.
    """

    path: str
    """Of the layer."""
    geometry: Geometry
    algorithm: Algorithm
    shapes: tuple[tuple[int, ...], ...]
    """Of the trained tensors."""
    parameters: int
    """Trained parameters: elements of its trained tensors."""
    frozen: int
    """Elements of tensors that are stored and not trained, such as the fixed factor of a T-LoRA."""
    file_bytes: int
    """Of the layer's tensors in a file, `alpha` included, the header not."""
    rank: int | None
    """The highest that ΔW can have; None on norms, whose weight is no matrix."""
    flops: float
    """Forward, in addition to the layer's own; a multiplication and the addition that goes with it count as two."""
    training_flops: float
    """Forward and backward, in addition to what a frozen layer takes."""
    base_flops: int
    """Forward of the layer itself: 2·O·fan-in of a linear layer or convolution, nothing of a look-up or a norm."""
    kept: int
    """Bytes of activations saved for backward, in addition to the layer's input; parameters do not count."""
    input: int
    """Bytes of the layer's input, where the adapter makes autograd keep it: a frozen linear layer does not, a
    convolution does by itself. Layers with one input keep it once."""
    way: str
    """How it is computed: factored, dense (ΔW is built), turned, scaled, added."""
    why: str

    @property
    def ratio(self) -> float | None:
        """Share of `flops` in the layer's own forward: 0.05 is 5% more.

        None where the layer itself takes none, as a look-up or a norm.
        """
        return self.flops / self.base_flops if self.base_flops else None

    @property
    def shape(self) -> str:
        """Kind and shape of the weight."""
        return f"{self.geometry.kind} {_format_shape(self.geometry)}"

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it: numbers as they are, the algorithm as text, and kind and shape of the weight.

        `why` and `way` are among it, the shapes of the trained tensors are not.
        """
        g, names = self.geometry, ("parameters", "frozen", "file_bytes", "rank", "flops", "training_flops")
        values = {name: getattr(self, name) for name in (*names, "base_flops", "ratio", "kept", "input", "way", "why")}
        return {"path": self.path, "kind": g.kind, "shape": [*g.shape], "algorithm": str(self.algorithm)} | values


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What adapters cost. A value: print it, sum it, compare two.

    `layers` are in the order of the plan or the set.
    """

    layers: tuple[LayerCost, ...]
    tokens: int
    """Tokens, or positions, that each layer is taken to see in a pass."""
    dtype: torch.dtype
    """Of the activations and of the layers' weights."""
    skipped: tuple[str, ...] = ()
    """Paths of linear layers and convolutions without an adapter."""
    remarks: tuple[str, ...] = ()

    @property
    def parameters(self) -> int:
        return sum(layer.parameters for layer in self.layers)

    @property
    def file_bytes(self) -> int:
        return sum(layer.file_bytes for layer in self.layers)

    @property
    def flops(self) -> float:
        """Forward work per token in addition to that of the layers, over all of them.

        A multiplication and the addition that goes with it count as two.
        """
        return sum(layer.flops for layer in self.layers)

    @property
    def training_flops(self) -> float:
        """Forward and backward work per token, over all layers, in addition to what frozen ones take.

        Counted as in `flops`; recomputation by gradient checkpointing comes on top.
        """
        return sum(layer.training_flops for layer in self.layers)

    @property
    def base_flops(self) -> int:
        """Per token, forward, of the layers that have adapters, each once."""
        return sum({layer.path: layer.base_flops for layer in self.layers}.values())

    @property
    def saved_bytes(self) -> int:
        """Bytes per token kept for backward inside adapters, over all layers.

        Times `tokens`, it is what a pass keeps; `inputs` come on top.
        """
        return sum(layer.kept for layer in self.layers)

    @property
    def inputs(self) -> int:
        """Bytes per token of the inputs that adapters make autograd keep, at most: layers may share them."""
        return sum({layer.path: layer.input for layer in self.layers if layer.input}.values())

    def groups(self) -> list[tuple[int, LayerCost]]:
        """Group layers that are alike, as (how many, the first of them); most parameters together first.

        Alike are those with the same algorithm, shape, work, memory and way.
        """
        found: dict[tuple[Any, ...], list[LayerCost]] = {}
        for layer in self.layers:
            # Not by geometry: what a layer costs does not depend on its stride, nor always on having a bias.
            key = (layer.algorithm, layer.shape, layer.shapes, layer.flops, layer.kept, layer.way)
            found.setdefault(key, []).append(layer)
        sizes = [(len(alike), alike[0]) for alike in found.values()]
        return sorted(sizes, key=lambda each: -each[0] * each[1].parameters)

    def table(self) -> list[tuple[str, ...]]:
        """Return rows of words: a heading, then a row for each group of layers.

        Parameters and bytes in a file are of the whole group; FLOPs and kept bytes are of one layer, per token.
        """
        heading = (
            "layers",
            "shape",
            "algorithm",
            "parameters",
            "file",
            "max rank",
            "FLOPs/token",
            "kept/token",
            "path",
        )
        rows = (
            (
                str(count),
                each.shape,
                str(each.algorithm),
                f"{each.parameters * count:,}",
                size_text(each.file_bytes * count),
                "-" if each.rank is None else f"{each.rank} of {min(each.geometry.out_features, each.geometry.fan_in)}",
                number_text(each.flops) + ("" if each.ratio is None else f" (+{each.ratio:.2%})"),
                size_text(each.kept),
                each.way,
            )
            for count, each in self.groups()
        )
        return [heading, *rows]

    def totals(self) -> list[str]:
        """Return sums over all layers in three lines of text: size, then work and memory, then tokens and precision.

        Work is per token, and given as a share of what the layers take where they take anything.
        """
        part = f" (+{self.flops / self.base_flops:.2%} of theirs)" if self.base_flops else ""
        return [
            f"{len({layer.path for layer in self.layers})} layers get adapters, {len(self.skipped)} do not; "
            f"{self.parameters:,} parameters, {size_text(self.file_bytes)} in a file",
            f"a token passing all of these layers: {number_text(self.flops)} FLOPs more forward{part}, "
            f"{number_text(self.training_flops)} more in training, {size_text(self.saved_bytes)} kept for backward "
            f"in addition to the layers' inputs, which take {size_text(self.inputs)} at most",
            f"at {self.tokens} tokens in {str(self.dtype).removeprefix('torch.')}",
        ]

    def reasons(self) -> list[str]:
        """Why each way was chosen: one example for each way and algorithm."""
        found: dict[tuple[str, str], str] = {}
        for _, each in self.groups():
            found.setdefault((each.way, each.algorithm.name), f"{each.way}, e.g. {each.shape}: {each.why}")
        return list(found.values())

    def __str__(self) -> str:
        rows = self.table()
        widths = [max(len(row[at]) for row in rows) for at in range(len(rows[0]))]
        numbers = {0, 3, 4, 5, 6, 7}
        lines = [
            "  ".join(
                cell.rjust(w) if at in numbers else cell.ljust(w)
                for at, (cell, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        return "\n".join([*lines, *self.totals(), *self.reasons(), *(f"note: {remark}" for remark in self.remarks)])

    def as_dict(self) -> dict[str, Any]:
        """Return it as JSON has it: settings, totals, and every layer.

        Work and memory are per token, sizes are bytes.
        """
        totals = ("parameters", "file_bytes", "flops", "training_flops", "base_flops", "saved_bytes", "inputs")
        return {
            "tokens": self.tokens,
            "dtype": str(self.dtype).removeprefix("torch."),
            **{name: getattr(self, name) for name in totals},
            "layers": [layer.as_dict() for layer in self.layers],
            "skipped": [*self.skipped],
            "remarks": [*self.remarks],
        }


def explain(
    what: Plan | Placement | AdapterSet | Iterable[Placement],
    *,
    tokens: int = TOKENS,
    dtype: torch.dtype = torch.float32,
    file_dtype: torch.dtype | None = None,
) -> Explanation:
    """What adapters cost on each layer, from shapes alone; nothing is computed and no weight is read.

    `tokens` is how many (of a convolution: positions of its output) every layer sees in a pass, `dtype` that of its
    activations and weight, `file_dtype` that of the tensors in a file (None: float32, as adapters are trained).
    Raises `ConfigError` for no tokens or a dtype that has no fractions.
    """
    if isinstance(tokens, bool) or not isinstance(tokens, int) or tokens < 1:
        raise ConfigError(f"tokens must be a whole number of at least 1, not {tokens!r}")
    for name, given in (("dtype", dtype), ("file_dtype", file_dtype or torch.float32)):
        if not given.is_floating_point:
            raise ConfigError(f"{name} must be a floating-point precision such as torch.bfloat16, not {given}")
    layers = tuple(
        _estimate_layer(
            path, geometry, algorithm, at > 0 or dtype not in PRECISE_DTYPES, tokens, dtype, file_dtype or torch.float32
        )
        for path, geometry, algorithms in _each_stack(what)
        for at, algorithm in enumerate(algorithms)
    )
    if isinstance(what, AdapterSet):
        layers = tuple(_without_shared(layers, what))
    skipped, remarks = (what.skipped, what.remarks) if isinstance(what, Plan) else ((), ())
    return Explanation(layers=layers, tokens=tokens, dtype=dtype, skipped=skipped, remarks=remarks)


def _each_stack(
    what: Plan | Placement | AdapterSet | Iterable[Placement],
) -> Iterator[tuple[str, Geometry, tuple[Algorithm, ...]]]:
    if isinstance(what, AdapterSet):
        for path, stack in what.stacks.items():
            yield path, stack[0].geometry, tuple(adapter.algorithm for adapter in stack)
        return
    placements = what.placements if isinstance(what, Plan) else [what] if isinstance(what, Placement) else what
    for placement in placements:
        yield placement.path, placement.geometry, placement.algorithms


def _without_shared(layers: Sequence[LayerCost], adapters: AdapterSet) -> Iterator[LayerCost]:
    """Tensors that slices of one adapter share are those of the first."""
    owners: dict[SharedTensors, str] = {}
    each = (adapter for stack in adapters.stacks.values() for adapter in stack)
    for layer, adapter in zip(layers, each, strict=True):
        first = layer.path if adapter.group is None else owners.setdefault(adapter.group, layer.path)
        if first == layer.path:
            yield layer
        else:
            why = f"{layer.why}; its tensors are those of {first}"
            yield replace(layer, shapes=(), parameters=0, frozen=0, file_bytes=0, why=why)


def _estimate_layer(
    path: str, g: Geometry, algorithm: Algorithm, alone: bool, tokens: int, dtype: torch.dtype, file_dtype: torch.dtype
) -> LayerCost:
    # transformers' Conv1D runs by itself: it is not of torch, whose layers' own product may be replaced.
    alone = alone or (g.kind == "linear" and g.transposed)
    sizes, cost = _count_sizes(algorithm, g, file_dtype), _cost(algorithm, g, alone, tokens)
    matrix = g.kind in ("linear", "conv", "parameter")
    return LayerCost(
        path=path,
        geometry=g,
        algorithm=algorithm,
        rank=algorithm.max_rank(g),
        flops=2 * cost.forward_macs,
        training_flops=2 * cost.training_macs,
        base_flops=2 * g.size if matrix else 0,
        kept=cost.saved_elements * dtype.itemsize + cost.mask_bytes,
        input=g.channels_in * dtype.itemsize if cost.needs_input and g.kind == "linear" else 0,
        way=cost.path,
        why=cost.reason,
        **sizes,
    )


@cache
def _count_sizes(algorithm: Algorithm, g: Geometry, dtype: torch.dtype) -> dict[str, Any]:
    """What of `LayerCost` a model's activations have no part in."""
    slots = algorithm.slots(g)
    meta = {name: torch.empty(g.stacked_shape(slot.shape), device="meta") for name, slot in slots.items()}
    over, fused, _ = fused_entry(Entry(algorithm, g, meta))
    stored = write_tensors(over, meta, fused)
    whole = {key for key, tensor in stored.items() if key == ALPHA or not tensor.is_floating_point()}
    numbers = {name: tensor.numel() for name, tensor in meta.items()}
    trained = [name for name, slot in slots.items() if slot.trainable]
    return {
        "shapes": tuple(tuple(meta[name].shape) for name in trained),
        "parameters": sum(numbers[name] for name in trained),
        "frozen": sum(numbers.values()) - sum(numbers[name] for name in trained),
        "file_bytes": sum(
            t.numel() * (t if key in whole else torch.empty(0, dtype=dtype)).element_size() for key, t in stored.items()
        ),
    }


@cache
def _cost(algorithm: Algorithm, g: Geometry, alone: bool, tokens: int) -> Cost:
    if g.kind != "parameter":
        return algorithm.cost(g, tokens, alone=alone)
    build = max(1, g.stack) * (algorithm.delta_macs(g) + g.size) / tokens
    return Cost("dense", "a parameter has no input of its own: its weight is built in each pass", build, 3 * build)


def size_text(count: float) -> str:
    """Return bytes in words: 1.5 MB is 1,500,000.

    Three digits at most; units from B to TB, in steps of 1000.
    """
    if count < 1000:
        return f"{count:.0f} B"
    at = min(4, int(math.log10(count) // 3))
    return f"{count / 1000**at:.3g} {('kB', 'MB', 'GB', 'TB')[at - 1]}"


def number_text(count: float) -> str:
    """Return a number in words: 1.5 M is 1,500,000.

    Three digits at most; units k, M, G and T, in steps of 1000.
    """
    if count < 1000:
        return f"{count:.3g}"
    at = min(4, int(math.log10(count) // 3))
    return f"{count / 1000**at:.3g} {' kMGT'[at]}"


def _format_shape(g: Geometry) -> str:
    return f"{g.stack} x " * bool(g.stack) + "x".join(map(str, g.shape))
