"""T-LoRA: a LoRA in orthogonal form, of which only the first ranks are used at noisy timesteps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from typing_extensions import Self

from lycoris.algorithms.additive import Additive, low_rank_work
from lycoris.algorithms.call import Call, require_one_mask
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.ranked import Ranked
from lycoris.algorithms.serialization import TensorShapes, axis_size, column_count
from lycoris.algorithms.slots import Params, Slot
from lycoris.errors import ConfigError, FileError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.blocks import RowRange
from lycoris.ops.rounding import widen

Vectors = Literal["principal", "middle", "last"]

EXTRA, ROUNDS = 8, 6
"""Of the subspace iteration: vectors beyond the rank, and rounds."""

TINY = 1e-6
"""Singular value for ranks beyond what the layer has: nothing at the start, yet with a gradient."""


@dataclass(frozen=True, kw_only=True)
class TLoRA(Ranked, Additive):
    """A LoRA in orthogonal form, with fewer ranks at noisier timesteps (arXiv:2507.05964 sections 3.2 and 3.3).

        ΔW = p · diag(λ ⊙ m) · q - p0 · diag(λ0 ⊙ m) · q0, with the rank mask m of the timestep

    Tensors: `q` (r, I, *K), `p` (O, r), `lam` (1, r), and frozen copies `q0`, `p0`, `lam0` of their start. They start
    as singular vectors and values of the layer's own weight, so that ΔW starts at exactly zero under any mask.
    `rank_mask` comes from a schedule over diffusion timesteps (`lycoris.targeting.rank_schedule`). The frozen copies
    are saved with the rest: a file does not depend on which base it meets.
    """

    vectors: Vectors = "principal"
    """Which singular triplets to start from: "principal" (largest), "middle" or "last" (smallest)."""
    data_init: bool = True
    """Decompose the layer's own weight. False: decompose a random matrix of standard deviation 1/r."""

    name: ClassVar[str] = "tlora"
    always: ClassVar[str] = "masks may differ from sample to sample, and a weight cannot"
    tensor_names: ClassVar = {
        "q": "q_layer.weight",
        "p": "p_layer.weight",
        "lam": "lambda_layer",
        "q0": "base_q.weight",
        "p0": "base_p.weight",
        "lam0": "base_lambda",
    }
    rank_tensors: ClassVar = ("q",)
    SCALAR_FOLDS_INTO: ClassVar = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.vectors not in ("principal", "middle", "last"):
            raise ConfigError(f"vectors of tlora must be principal, middle or last, not {self.vectors!r}")
        if self.use_scalar:
            raise ConfigError("tlora has no scalar: it starts at zero effect and trains its singular values")

    def slots(self, g: Geometry) -> dict[str, Slot]:
        r, ones = self.rank, (1,) * len(g.kernel)
        q, p, lam = (r, *g.shape[1:]), (g.out_features, r, *ones), (1, r)
        trained = {"q": Slot(q, "in"), "p": Slot(p, "out"), "lam": Slot(lam, "scale")}
        return trained | {"q0": Slot(q, "frozen"), "p0": Slot(p, "frozen"), "lam0": Slot(lam, "frozen")}

    @property
    def uses_rank_mask(self) -> bool:
        return True

    def initialize(self, p: Params, below: LayerBelow) -> None:
        g = below.geometry
        weight = _matrix(below) if self.data_init else None
        if weight is None:
            weight = torch.randn(g.out_features, g.fan_in, device=p["q"].device) / self.rank
        few = self.vectors == "principal" and 4 * (self.rank + EXTRA) < min(weight.shape)
        for name, start in self._start(weight, g, few=few).items():
            p[name].copy_(start)
            p[f"{name}0"].copy_(start)

    def fill_missing(self, p: Params, below: LayerBelow) -> dict[str, Tensor]:
        """Return the tensors together with the frozen copies, which files of other programs leave out.

        They are made of the base weight's singular triplets, in the dtype and on the device of the trained tensors.

        Raises:
            FileError: they are missing, and `data_init` is False: random starts are in the file or nowhere.
        """
        tensors = dict(p)
        if "q0" not in tensors:
            if not self.data_init:
                raise FileError(
                    "the file leaves out what its tlora started from: random vectors, which nothing but the file could "
                    "tell"
                )
            start = self._start(_matrix(below), below.geometry)
            tensors |= {f"{name}0": value.to(p[name]) for name, value in start.items()}
        return tensors

    def _start(self, weight: Tensor, g: Geometry, *, few: bool = False) -> dict[str, Tensor]:
        """q, p and λ for a weight (O, I·ΠK), padded with nothing where the layer has fewer triplets than ranks.

        `few` finds the largest triplets by subspace iteration (Halko et al., arXiv:0909.4061, algorithm 4.4),
        which takes a small part of the time of a whole decomposition; what is found is what a file keeps.
        """
        if few:
            u, values, vectors = torch.svd_lowrank(weight, self.rank + EXTRA, niter=ROUNDS)
            v = vectors.mT
        else:
            u, values, v = torch.linalg.svd(weight, full_matrices=False)
        r, n = min(self.rank, len(values)), len(values)
        # Of the few, those beyond the rank are only there to make the others accurate.
        first = {"principal": 0, "middle": (n - r) // 2, "last": n - r}[self.vectors]
        at, missing = slice(first, first + r), self.rank - r
        q = torch.cat([v[at], v.new_zeros(missing, v.shape[1])])
        p = torch.cat([u[:, at], u.new_zeros(u.shape[0], missing)], dim=1)
        lam = torch.cat([values[at], values.new_full((missing,), TINY)])
        shapes = {name: slot.shape for name, slot in self.slots(g).items()}
        return {name: value.reshape(shapes[name]) for name, value in (("q", q), ("p", p), ("lam", lam))}

    def delta(self, p: Params, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        kept = 1.0 if rank_mask is None else self.fit_rank_mask(require_one_mask(rank_mask)).to(p["lam"])
        trained = (p["p"].flatten(1) * (p["lam"] * kept)) @ p["q"].flatten(1)
        start = (p["p0"].flatten(1) * (p["lam0"] * kept)) @ p["q0"].flatten(1)
        return Affine((trained - start).reshape(g.shape), None)

    def low_rank_factors(self, p: Params, g: Geometry) -> tuple[Tensor, Tensor]:
        out = torch.cat([p["p"].flatten(1) * p["lam"], p["p0"].flatten(1) * -p["lam0"]], dim=1)
        return out, torch.cat([p["q"], p["q0"]])

    def row_block_size(self, g: Geometry) -> int:
        return 1

    def select_rows(self, p: Params, g: Geometry, run: RowRange) -> dict[str, Tensor]:
        return dict(p) | {name: run.of(p[name]) for name in ("p", "p0") if name in p}

    def mask_ranks(self, p: Params, g: Geometry, rank_mask: Tensor | None) -> Params:
        # Masks may differ from sample to sample: they meet the activations.
        return p

    def product_macs(self, g: Geometry) -> int | None:
        return low_rank_work(g, 2 * self.rank)

    def delta_macs(self, g: Geometry) -> int:
        return 2 * self.rank * g.size

    def saved_elements(self, g: Geometry) -> int:
        return (3 if g.kind == "conv" else 2) * self.rank

    def max_rank(self, g: Geometry) -> int:
        return min(2 * self.rank, g.out_features, g.fan_in)

    def add_product(self, y: Tensor, p: Params, g: Geometry, x: Tensor, gain: Tensor | float, call: Call) -> Tensor:
        mask: Tensor | None = None if call.rank_mask is None else self.fit_rank_mask(call.rank_mask).to(p["lam"])
        # On strided input matmul picks its kernel, and with it the last bit, by whether the weight is trained.
        x = x.contiguous() if g.kind == "linear" else x

        def chain(q: Tensor, lam: Tensor, out: Tensor) -> Tensor:
            h = g.op(x, q)
            h = h * g.channels(lam * gain) if mask is None else h * (g.spread(mask * lam, h, call.layout) * gain)
            return g.mix(h, out.flatten(1))

        # Two chains with the same operations in the same order: equal tensors cancel to the last bit. The sign goes
        # where the tensors are small.
        return y + (chain(p["q"], p["lam"], p["p"]) + chain(p["q0"], -p["lam0"], p["p0"]))

    def fit_rank_mask(self, rank_mask: Tensor) -> Tensor:
        """Return the mask (..., r) over exactly the ranks of this algorithm.

        Longer ones are cut; ranks beyond a shorter one count fully.
        """
        rank_mask = rank_mask[..., : self.rank]
        missing = self.rank - rank_mask.shape[-1]
        return (
            torch.cat([rank_mask, rank_mask.new_ones(*rank_mask.shape[:-1], missing)], dim=-1) if missing else rank_mask
        )

    @classmethod
    def layer_size(cls, shapes: TensorShapes) -> tuple[int, int]:
        return axis_size(shapes, cls.tensor_names["p"], 0), column_count(shapes, cls.tensor_names["q"])

    @classmethod
    def infer(cls, p: Params, g: Geometry, alpha: float | None) -> Self:
        return cls(rank=p["q"].shape[0], alpha=alpha)


def _matrix(below: LayerBelow) -> Tensor:
    """The weight below as (O, I·ΠK), in at least float32: singular values of half precision would be noise."""
    return widen(below.affine().weight.detach()).flatten(1)
