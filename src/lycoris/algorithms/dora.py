"""DoRA: a trained magnitude for each row or column of the adapted weight."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from typing_extensions import Self

from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.algorithms.call import Call, require_one_mask
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.row_selection import RowBlock, covers, joined_rows
from lycoris.algorithms.slices import cut_additive, take_additive
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.channel_scale import bend

Axis = Literal["out", "in"]

EPSILON = torch.finfo(torch.float32).eps
"""Added to every norm, at the start too, so that a row of zeros divides; existing files were trained with it."""


@dataclass(frozen=True, kw_only=True)
class DoRA(Algorithm):
    """Trains the magnitude of each row or column of the adapted weight apart from its direction (arXiv:2402.09353).

        V' = m · V / (‖V‖ + ε), with V = W + scale · ΔW of the inner algorithm (equation 5 there)

    Tensors: those of the inner algorithm and `magnitude` m, (O, 1, ...) or (1, I, 1, ...), which starts as ‖W‖ + ε so
    that V' starts as W. The norm runs over all other axes and is differentiated through, unlike in section 4.3 there.
    The bias is not changed. Forward computes ‖V‖² = ‖W‖² + 2⟨W, Δ⟩ + ‖Δ‖² from the factors of Δ and never builds V.
    """

    inner: Additive
    """The algorithm that gives V: any that adds a change which does not depend on the timestep."""
    axis: Axis = "out"
    """One magnitude per output row (the default of LyCORIS and PEFT), or per input column (`wd_on_output: false`)."""

    name: ClassVar[str] = "dora"
    tensor_names: ClassVar = {"magnitude": "dora_scale"}

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Additive):
            raise ConfigError(
                f"DoRA goes over an algorithm that adds a change, such as LoRA(rank=8), not over {self.inner!r}"
            )
        super().__post_init__()
        if self.inner.uses_rank_mask:
            raise ConfigError(f"DoRA cannot go over {self.inner.name}: its magnitudes would change with the timestep")
        if self.inner.changes_bias:
            raise ConfigError(f"DoRA leaves the bias as it is; give it {type(self.inner).__name__}(bias=False)")
        if self.axis not in ("out", "in"):
            raise ConfigError(f"axis of dora must be 'out' or 'in', not {self.axis!r}")

    def slots(self, g: Geometry) -> dict[str, Slot]:
        if self.axis == "in" and g.kind == "embedding":
            raise ConfigError("an embedding has one input per entry: give its DoRA axis='out'")
        ones = (1,) * len(g.kernel)
        shape = (g.out_features, 1, *ones) if self.axis == "out" else (1, g.in_features, *ones)
        return self.inner.slots(g) | {"magnitude": Slot(shape, "magnitude")}

    def initialize(self, p: Params, below: LayerBelow) -> None:
        self.inner.initialize(_without_magnitude(p), below)
        p["magnitude"].copy_(self._norm(p, below.affine().weight, below.geometry).view_as(p["magnitude"]))

    @property
    def has_dropout(self) -> bool:
        return super().has_dropout or self.inner.has_dropout

    def sample_dropout(self, call: Call, x: Tensor) -> Call:
        return self.inner.sample_dropout(super().sample_dropout(call, x), x)

    def check(self, g: Geometry) -> None:
        super().check(g)
        self.inner.check(g)

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        inner = self.inner.cost(g, tokens, alone=True)
        # Without tensors that the magnitude folds into, the output of the inner algorithm is saved as well.
        apart = 1 if type(self.inner).scale_rows is Additive.scale_rows else 0
        # The scaled input is saved by the inner algorithm, and once more by a convolution.
        bent = (not inner.mask_bytes) + (g.kind == "conv")
        kept = g.out_features * (1 + apart) if self.axis == "out" else g.channels_in * bent
        once = (self.inner.delta_macs(g) + g.size) / tokens
        work = inner.forward_macs + once + (g.out_features if self.axis == "out" else 2 * g.channels_in)
        why = f"magnitudes on the {self.axis}put, whose norms are computed in each pass; {inner.reason}"
        training, needs_input = (
            inner.training_macs + 3 * (work - inner.forward_macs),
            inner.needs_input or self.axis == "in",
        )
        return Cost(inner.path, why, work, training, inner.saved_elements + kept, inner.mask_bytes, needs_input)

    def find_excess(self, g: Geometry) -> str | None:
        return self.inner.find_excess(g)

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        # In the magnitude's precision: in half precision the ratio would not be 1 at the start.
        wide = base.weight.to(torch.promote_types(base.weight.dtype, p["magnitude"].dtype))
        below = self.inner.transform(p, Affine(wide, base.bias), g, rank_mask)
        norm = torch.linalg.vector_norm(below.weight, dim=self._others(g), keepdim=True) + EPSILON
        return Affine((below.weight * (p["magnitude"] / norm)).to(base.weight.dtype), below.bias)

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        g = below.geometry
        rank_mask = None if call.rank_mask is None else require_one_mask(call.rank_mask)
        with torch.autocast(x.device.type, enabled=False):
            length = p["magnitude"].flatten() / self._norm(p, below.affine().weight, g, rank_mask)
        own: Params = _without_magnitude(p)
        # Once, before anything else is done to the tensors: a mask may stop gradients.
        own, call = self.inner.mask_ranks(own, g, call.rank_mask), replace(call, rank_mask=None)
        if self.axis == "in":
            change = (length - 1).repeat(g.groups)
            y = below(bend(x, change * call.strength, g.channel_axis))
            return self.inner.add(y, own, g, bend(x, change, g.channel_axis), call)
        # y + μ((s - 1)·(y - b) + s·Δx): exactly y where s is 1 and Δ is 0.
        y = bend(below(x), (length - 1) * call.strength, g.channel_axis, below.bias())
        stretched = self.inner.scale_rows(own, length)
        if stretched is not None:
            return self.inner.add(y, stretched, g, x, call)
        return torch.addcmul(y, self.inner.add(torch.zeros_like(y), own, g, x, call), g.channels(length.to(y.dtype)))

    def _norm(self, p: Params, weight: Tensor, g: Geometry, rank_mask: Tensor | None = None) -> Tensor:
        """Return ‖V‖ + ε by row or column, flat, in at least float32."""
        axis, wide = self._magnitude_axis(), torch.promote_types(weight.dtype, p["magnitude"].dtype)
        scale = self.inner.read_scalar(p) * self.inner.scale(g)
        gram = self.inner.gram_terms(self.inner.mask_ranks(p, g, rank_mask), weight, g, axis)
        if gram is None:
            return self._built_norm(p, weight, g, rank_mask)
        inner, square = gram
        own = torch.linalg.vector_norm(weight, dim=self._others(g), dtype=wide).square()
        total = own + 2 * scale * inner.to(wide) + scale**2 * square.to(wide)
        return total.clamp_min(torch.finfo(wide).tiny).sqrt() + EPSILON

    def _built_norm(self, p: Params, weight: Tensor, g: Geometry, rank_mask: Tensor | None) -> Tensor:
        """Return the same norms by building V, which backward builds again instead of saving it."""
        names = list(p)

        def norm(*tensors: Tensor) -> Tensor:
            own = dict(zip(names, tensors, strict=True))
            wide = weight.to(torch.promote_types(weight.dtype, own["magnitude"].dtype))
            whole = self.inner.transform(own, Affine(wide, None), g, rank_mask).weight
            return torch.linalg.vector_norm(whole, dim=self._others(g)) + EPSILON

        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return norm(*p.values())
        return checkpoint(norm, *p.values(), use_reentrant=False, preserve_rng_state=False)

    def _magnitude_axis(self) -> int:
        return 0 if self.axis == "out" else 1

    def _others(self, g: Geometry) -> list[int]:
        return [axis for axis in range(len(g.shape)) if axis != self._magnitude_axis()]

    def row_block_size(self, g: Geometry) -> int:
        # The norm of a column runs over all rows, and only the base weight says what each contributes.
        return g.out_features if self.axis == "in" else 1

    def restrict_to_rows(self, g: Geometry, run: RowRange) -> Self:
        return replace(self, inner=cut_additive(self.inner, g, run))

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        own = take_additive(self.inner, _without_magnitude(p), g, run)
        return own | {"magnitude": run.of(p["magnitude"]) if self.axis == "out" else p["magnitude"]}

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        inner = []
        for part in parts:
            own, entry = part.entry.algorithm, part.entry
            assert isinstance(own, cls)
            if own.axis == "in" or type(own.inner) is not type(_inner_of(parts[0])) or not covers(parts, g):
                return None
            inner.append(part._replace(entry=Entry(own.inner, entry.geometry, _without_magnitude(entry.tensors))))
        joined = type(_inner_of(parts[0])).concat_rows(inner, g)
        if joined is None or not isinstance(joined[0], Additive):
            return None
        return cls(inner=joined[0]), joined[1] | {"magnitude": joined_rows(parts, g, "magnitude")}

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        raise ConfigError("dora_scale alone is no adapter: it belongs to the tensors of another algorithm")

    @classmethod
    def read(cls, over: Additive, p: Params, g: Geometry) -> Self:
        """Return DoRA over an algorithm that was read from a file; the shape of `magnitude` gives the axis.

        "out" for (O) and (O, 1, ...), else "in".

        Args:
            p: tensors by slot name, with `magnitude` among them.
        """
        sizes = p["magnitude"].shape
        return cls(inner=over, axis="out" if sizes[:1] == (sizes.numel(),) == (g.out_features,) else "in")

    def scale(self, g: Geometry) -> float:
        return self.inner.scale(g)

    def constants(self, g: Geometry) -> tuple[float, ...]:
        return (*self.inner.constants(g), self._magnitude_axis())

    def export_tensors(self, p: Params, g: Geometry) -> dict[str, Tensor]:
        return self.inner.export_tensors(p, g)

    def export_alpha(self, g: Geometry) -> float | None:
        return self.inner.export_alpha(g)


def _without_magnitude(p: Params) -> dict[str, Tensor]:
    """Return the tensors of the inner algorithm."""
    return {name: tensor for name, tensor in p.items() if name != "magnitude"}


def _inner_of(part: RowBlock) -> Additive:
    assert isinstance(part.entry.algorithm, DoRA)
    return part.entry.algorithm.inner


def unwrap_dora(algorithm: Algorithm) -> Algorithm:
    """Return the inner algorithm of DoRA, and any other algorithm as it is."""
    return algorithm.inner if isinstance(algorithm, DoRA) else algorithm
