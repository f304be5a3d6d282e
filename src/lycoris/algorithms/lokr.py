"""LoKr: ΔW is a Kronecker product of two factors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.additive import Additive
from lycoris.algorithms.base import Algorithm, uniform_like_linear
from lycoris.algorithms.call import Call
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.ranked import Ranked
from lycoris.algorithms.row_selection import RowBlock, covers
from lycoris.algorithms.serialization import TensorShapes, axis_size, column_count
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.factorization import factorize, nearest_divisor
from lycoris.ops.kronecker import add_linear, add_linear_split, first_small, kron, kron_gram, look_up
from lycoris.ops.tucker import tucker


class FactorSizes(NamedTuple):
    """Sizes of the two factors of one layer: w1 is (ol, im), w2 is (ok, in, *K), with O = ol·ok and I = im·in.

    ok and in are not stored, since they follow from the layer.
    """

    ol: int
    im: int
    w1_split: bool = False
    """Whether w1 is stored as w1_a · w1_b of rank r."""
    w2_split: bool = True
    """Whether w2 is stored as w2_a · w2_b of rank r."""
    alpha: float | None = None
    """Alpha of a file whose factors are not split: it has no effect, and is written again as it was."""


@dataclass(frozen=True, kw_only=True)
class LoKr(Ranked, Additive):
    """ΔW is the Kronecker product of two factors (KronA, arXiv:2212.10650; LoKr, arXiv:2309.14859 section 3).

        ΔW = w1 ⊗ w2, that is ΔW[a·ok + c, b·in + d, k] = w1[a, b] · w2[c, d, k]

    Tensors: `w1` (ol, im) and `w2` (ok, in, *K) with O = ol·ok and I = im·in, or of either its factors `wN_a`, `wN_b`
    of rank r, or of w2 a Tucker kernel with core `t2`. `w2`, or `w2_b`, starts at zero.

    When neither factor is split into low-rank ones, the scale is 1 whatever alpha is: files and trainers agree on that.
    """

    factor: int = -1
    """Size of w1 in each dimension, or the nearest below that divides it; -1: the divisor nearest to the square
    root."""
    decompose_both: bool = False
    """Also split w1 into low-rank factors, where the rank is below half of its larger side."""
    full_matrix: bool = False
    """Split neither factor. A rank of at least half of w2's larger side has the same effect on w2."""
    unbalanced: bool = False
    """Give w1 the larger of the two factors of O instead of the smaller."""
    tucker: bool = False
    """On convolutions with a kernel larger than 1, split w2 with a Tucker core `t2` (r, r, *K)."""
    stable_init: bool = False
    """Start with entries of variance 1/(I·ΠK) in the product, however the factors are split and at any rank. False:
    each tensor as PyTorch initializes a linear layer."""
    layout: FactorSizes | None = None
    """Sizes as a file has them, which override the settings above; None: from those settings."""

    name: ClassVar[str] = "lokr"
    tensor_names: ClassVar = {
        "w1": "lokr_w1",
        "w1_a": "lokr_w1_a",
        "w1_b": "lokr_w1_b",
        "w2": "lokr_w2",
        "w2_a": "lokr_w2_a",
        "w2_b": "lokr_w2_b",
        "t2": "lokr_t2",
    }
    rank_tensors: ClassVar = ("w2_b", "w1_b")
    SCALAR_FOLDS_INTO: ClassVar = ("w1", "w1_a")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.factor, bool) or not isinstance(self.factor, int) or self.factor == 0 or self.factor < -1:
            raise ConfigError(f"factor of lokr must be -1 (automatic) or a positive whole number, not {self.factor!r}")
        if self.full_matrix and self.decompose_both:
            raise ConfigError("lokr cannot have both full_matrix and decompose_both: choose one")

    def layout_for(self, g: Geometry) -> FactorSizes:
        """Return the sizes of a layer's factors, and which of them are split.

        They are `layout` where it is set. Otherwise `factorize` splits O and I, and a factor is made of two matrices
        only if the settings allow it and the rank is below half of its larger side.
        """
        if self.layout is not None:
            return self.layout
        im, inner = factorize(g.in_features, self.factor)
        ol, ok = factorize(g.out_features, self.factor)
        if self.unbalanced:
            ol, ok = ok, ol
        w1_split = self.decompose_both and self.rank < max(ol, im) / 2
        w2_split = not self.full_matrix and self.rank < max(ok, inner) / 2
        return FactorSizes(ol, im, w1_split, w2_split)

    def slots(self, g: Geometry) -> dict[str, Slot]:
        r, (ol, im, w1_split, w2_split, _) = self.rank, self.layout_for(g)
        ok, inner = g.out_features // ol, g.in_features // im
        slots: dict[str, Slot] = {}
        if w1_split:
            slots |= {"w1_a": Slot((ol, r), "out"), "w1_b": Slot((r, im), "in")}
        else:
            slots |= {"w1": Slot((ol, im), "core")}
        if not w2_split:
            slots |= {"w2": Slot((ok, inner, *g.kernel), "out")}
        elif self.tucker and not g.pointwise:
            slots |= {
                "w2_a": Slot((r, ok), "out"),
                "w2_b": Slot((r, inner), "in"),
                "t2": Slot((r, r, *g.kernel), "core"),
            }
        else:
            slots |= {"w2_a": Slot((ok, r), "out"), "w2_b": Slot((r, inner * g.fan_in // g.in_features), "in")}
        return slots | self._scalar_slot()

    def initialize(self, p: Params, below: LayerBelow) -> None:
        im = self.layout_for(below.geometry).im
        for name, tensor in p.items():
            if self.stable_init and name != "scalar":
                columns = im if name.startswith("w1") else below.geometry.fan_in // im
                # A split factor is a sum over r (with a core over r²) products of two (three) numbers.
                parts = 1 if name in ("w1", "w2") else 3 if "t2" in p and name not in ("w1_a", "w1_b") else 2
                terms = self.rank ** (parts - 1)
                torch.nn.init.normal_(tensor, std=(1 / columns / terms) ** (1 / (2 * parts)))
            elif name != "scalar":
                uniform_like_linear(tensor, tensor[0].numel())
        self._start_at_zero(p, "w2" if "w2" in p else "w2_b")

    def scale(self, g: Geometry) -> float:
        layout = self.layout_for(g)
        return super().scale(g) if layout.w1_split or layout.w2_split else 1.0

    def export_alpha(self, g: Geometry) -> float | None:
        layout = self.layout_for(g)
        if layout.w1_split or layout.w2_split:
            return super().export_alpha(g)
        # Readers ignore it there; the rank is what makes those that do not arrive at 1.
        return float(self.rank) if layout.alpha is None else layout.alpha

    def _factors(self, p: Params, g: Geometry) -> tuple[Tensor, Tensor]:
        """Return w1 (ol, im) and w2 (ok, in, *K), multiplied out where they are split."""
        w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
        if "w2" in p:
            return w1, p["w2"]
        if "t2" in p:
            return w1, tucker(p["t2"], p["w2_a"].T, p["w2_b"])
        return w1, (p["w2_a"] @ p["w2_b"]).reshape(g.out_features // w1.shape[0], -1, *g.kernel)

    def delta(self, p: Params, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        return Affine(kron(*self._factors(p, g)), None)

    def row_block_size(self, g: Geometry) -> int:
        return g.out_features // self.layout_for(g).ol

    def restrict_to_rows(self, g: Geometry, run: RowRange) -> Self:
        return replace(self, layout=self.layout_for(g)._replace(ol=run.rows // self.row_block_size(g)))

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        w1 = "w1_a" if "w1_a" in p else "w1"
        return dict(p) | {w1: run.blocks(self.row_block_size(g)).of(p[w1])}

    @classmethod
    def concat_rows(cls, parts: Sequence[RowBlock], g: Geometry) -> tuple[Algorithm, dict[str, Tensor]] | None:
        # The second factor is the same for all rows of a layer, so it has to be so already.
        first = parts[0].entry
        second = [name for name in first.tensors if name not in ("w1", "w1_a", "w1_b")]
        alike = all(
            part.entry.tensors.keys() == first.tensors.keys()
            and all(torch.equal(part.entry.tensors[name], first.tensors[name]) for name in second)
            for part in parts
        )
        if not alike or "w1" not in first.tensors or not covers(parts, g) or cls.common_scale(parts) is None:
            return None
        w1 = torch.cat([part.entry.tensors["w1"] for part in parts])
        assert isinstance(first.algorithm, cls)
        layout = first.algorithm.layout_for(first.geometry)._replace(ol=len(w1))
        return replace(first.algorithm, layout=layout), first.tensors | {"w1": w1}

    def low_rank_factors(self, p: Params, g: Geometry) -> tuple[Tensor, Tensor]:
        # (U·V) ⊗ (A·B) = (U ⊗ A)·(V ⊗ B), with the thinnest split of each factor.
        w1, w2 = self._factors(p, g)
        u, v = _thinnest(w1, (p["w1_a"], p["w1_b"]) if "w1_a" in p else None)
        own = None
        if "w2_a" in p:
            a = p["w2_a"].T if "t2" in p else p["w2_a"]
            own = (a, tucker(p["t2"], None, p["w2_b"]).flatten(1) if "t2" in p else p["w2_b"])
        a, b = _thinnest(w2.flatten(1), own)
        return kron(u, a), kron(v, b.reshape(-1, *w2.shape[1:]))

    def gram_terms(self, p: Params, weight: Tensor, g: Geometry, axis: int) -> tuple[Tensor, Tensor]:
        return kron_gram(weight, *self._factors(p, g), axis)

    def product_macs(self, g: Geometry) -> int | None:
        if g.groups > 1:
            return None
        ol, im = self.layout_for(g)[:2]
        if g.kind == "embedding":
            return g.out_features
        ok, inner, kernel = g.out_features // ol, g.in_features // im, g.fan_in // g.in_features
        if self._applied_split(g):
            return self.rank * (g.in_features + ol * im + g.out_features)
        if first_small((ol, im), (ok, inner)):
            return ol * im * inner + ol * inner * ok * kernel
        return im * inner * ok * kernel + ol * im * ok

    def saved_elements(self, g: Geometry) -> int:
        ol, im = self.layout_for(g)[:2]
        ok, inner = g.out_features // ol, g.in_features // im
        if g.kind == "embedding":
            return ol + ok
        if self._applied_split(g):
            return self.rank * (im + ol)
        # Mixing the groups of a convolution's input copies it into another order.
        first = ol * inner + (g.channels_in if g.kind == "conv" else 0)
        return first if first_small((ol, im), (ok, inner)) else im * ok

    def max_rank(self, g: Geometry) -> int:
        ol, im, w1_split, w2_split, _ = self.layout_for(g)
        w1, w2 = min(ol, im), min(g.out_features // ol, g.fan_in // im)
        return (min(w1, self.rank) if w1_split else w1) * (min(w2, self.rank) if w2_split else w2)

    def _applied_split(self, g: Geometry) -> bool:
        """Tell whether a split w2 is applied as two factors; otherwise it is multiplied out first."""
        ol, im, _, w2_split, _ = self.layout_for(g)
        return w2_split and g.kind == "linear" and 2 * self.rank < min(g.out_features // ol, g.in_features // im)

    def add_product(self, y: Tensor, p: Params, g: Geometry, x: Tensor, gain: Tensor | float, call: Call) -> Tensor:
        if self._applied_split(g):
            w1 = p["w1"] if "w1" in p else p["w1_a"] @ p["w1_b"]
            return add_linear_split(y, x, w1 * gain, p["w2_a"], p["w2_b"])
        w1, w2 = self._factors(p, g)
        w1 = w1 * gain
        if g.kind == "embedding":
            return y + look_up(x, w1, w2)
        return add_linear(y, x, w1, w2) if g.kind == "linear" else y + _convolve_kronecker(x, w1, w2, g)

    def find_excess(self, g: Geometry) -> str | None:
        if self.layout is not None:
            return None
        for n in (g.in_features, g.out_features):
            if self.factor > 0 and n % self.factor:
                near = nearest_divisor(n, self.factor)
                taken = factorize(n, self.factor)[0]
                return f"factor {self.factor} does not divide {n}, so it means {taken}; the nearest that does is {near}"
        layout = self.layout_for(g)
        if self.rank_dropout and not (layout.w1_split or layout.w2_split):
            return "rank_dropout has no rank to drop where both factors are whole; leave it out, or use dropout"
        return None

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        def size(names: Sequence[str], axis: int) -> int:
            return max(axis_size(shapes, cls.tensor_names[name], axis) for name in names)

        ol, im = size(("w1", "w1_a"), 0), size(("w1", "w1_b"), 1)
        if core := shapes.get(cls.tensor_names["t2"]):
            return ol * size(["w2_a"], 1), im * size(["w2_b"], 1) * math.prod(core[2:])
        ok, inner = (
            size(("w2", "w2_a"), 0),
            max(column_count(shapes, cls.tensor_names[name]) for name in ("w2", "w2_b")),
        )
        return ol * ok, im * inner

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        w1_split, w2_split = "w1_a" in p, "w2_a" in p
        ol, im = (p["w1_a"].shape[0], p["w1_b"].shape[1]) if w1_split else p["w1"].shape
        if g.out_features % ol or g.in_features % im:
            raise ConfigError(
                f"a first factor of {ol}x{im} does not divide a layer of {g.out_features}x{g.in_features}"
            )
        rank = p["w2_b"].shape[0] if w2_split else p["w1_b"].shape[0] if w1_split else 1
        used = cls.uses_alpha(p)
        # Half precision makes infinity of a high rank.
        unused = None if used or alpha is None or not math.isfinite(alpha) else alpha
        layout = FactorSizes(ol, im, w1_split, w2_split, unused)
        return cls(rank=rank, alpha=alpha if used else None, tucker="t2" in p, layout=layout)

    @classmethod
    def uses_alpha(cls, p: Params) -> bool:
        return "w1_a" in p or "w2_a" in p


def _thinnest(w: Tensor, split: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Return a matrix as two factors of the lowest rank: its own, or itself and an identity."""
    rows, columns = w.shape
    if split is not None and split[0].shape[1] <= min(rows, columns):
        return split
    eye = torch.eye(min(rows, columns), dtype=w.dtype, device=w.device)
    return (eye, w) if rows <= columns else (w, eye)


def _convolve_kronecker(x: Tensor, w1: Tensor, w2: Tensor, g: Geometry) -> Tensor:
    """Convolve x (B, im·in, *S) with w1 ⊗ w2: w2 on each group of channels, w1 across the groups."""
    batched = x.dim() == len(g.kernel) + 2
    x = x if batched else x.unsqueeze(0)
    im, inner = w1.shape[1], w2.shape[1]
    x = x.reshape(x.shape[0], im, inner, *x.shape[2:])
    first = first_small(w1.shape, w2.shape)
    if first:
        x = torch.einsum("ab,nb...->na...", w1, x)
    y = g.op(x.flatten(0, 1), w2)
    y = y.reshape(*x.shape[:2], *y.shape[1:])
    if not first:
        y = torch.einsum("ab,nb...->na...", w1, y)
    y = y.flatten(1, 2)
    return y if batched else y.squeeze(0)
