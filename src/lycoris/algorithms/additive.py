"""Algorithms that add a change to the weight which does not depend on the weight.

Legend: see `lycoris.algorithms.base`; r' is the rank of ΔW as a low-rank matrix, T the number of tokens (positions).
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from lycoris.algorithms.base import Algorithm, in_dtype_of
from lycoris.algorithms.call import Call, apply_dropout, require_one_mask
from lycoris.algorithms.cost import Cost
from lycoris.algorithms.layer_below import LayerBelow
from lycoris.algorithms.rebuilt_weight import Build, apply_rebuilt
from lycoris.algorithms.slots import Params
from lycoris.errors import ConfigError
from lycoris.layers.geometry import Affine, Geometry
from lycoris.ops.low_rank import add_product

TOKENS = 1024
"""Number of tokens assumed where it is not known: in plans, and in compiled graphs, which must not depend on it."""


class Path(NamedTuple):
    """How a layer's adapter is computed, and why.

    What `Additive.path` decides for a number of tokens.
    """

    name: str
    """"factored": ΔW is applied as a product of factors and never built. "dense": ΔW is built."""
    reason: str
    """The multiplications of both, or why there is no choice."""


@dataclass(frozen=True, kw_only=True)
class Additive(Algorithm):
    """V = W + scale · ΔW and b' = b + scale · Δb, with ΔW and Δb from the adapter's own tensors alone.

    A subclass gives `delta`, the definition, and as much of this as it can:

    - `low_rank_factors` or `add_product`, with `product_macs`: forward without building ΔW.
    - `gram_terms`: the norms that DoRA needs without building V.
    - `scale_rows`: DoRA's scaling of rows inside the factors.

    Where ΔW has to be built, it is built again in backward and not kept.
    """

    dropout: float = 0.0
    """Probability in [0, 1) that an element of the adapter's input, not of the layer's, is zeroed in training; the
    others are divided by 1 - p."""

    always: ClassVar[str] = ""
    """Why the factored product is used wherever there is one; "" to let the number of multiplications decide."""

    @abstractmethod
    def delta(self, p: Params, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        """Return ΔW (O, I, *K) and Δb (O) or None, without the scale.

        `p` has its ranks masked already; `rank_mask` (r) is for algorithms that override `mask_ranks`.
        """

    def low_rank_factors(self, p: Params, g: Geometry) -> tuple[Tensor, Tensor] | None:
        """Return factors (O, r') and (r', I, *K) whose product is ΔW without the scale; None where there are none.

        r' may be more than the rank: T-LoRA has 2·rank. Override it, and the default `add_product` uses them.
        """
        return None

    def gram_terms(self, p: Params, weight: Tensor, g: Geometry, axis: int) -> tuple[Tensor, Tensor] | None:
        """Return ⟨W, ΔW⟩ and ‖ΔW‖² over all axes but `axis`, flat and without the scale.

        None where they cannot be had without building ΔW.
        """
        return None

    def scale_rows(self, p: Params, length: Tensor) -> Params | None:
        """Return tensors whose ΔW is this ΔW with its rows multiplied by `length`: (O), or a 0-d tensor for all rows.

        None where no tensors of this algorithm can express that.
        """
        return None

    def product_macs(self, g: Geometry) -> int | None:
        """Return the multiplications per token of the factored product; None where this layer has none.

        With None, the default, ΔW is built in every pass.
        """
        return None

    def saved_elements(self, g: Geometry) -> int:
        """Return the elements per token that the factored product saves for backward in addition to x.

        The default is 0. It enters `cost`, and nothing that is computed.
        """
        return 0

    def check(self, g: Geometry) -> None:
        super().check(g)
        if g.kind in ("parameter", "embedding") and self.dropout:
            raise ConfigError(
                f"dropout is for the input of a layer, and a{'n' * (g.kind == 'embedding')} {g.kind} has none to drop; "
                "use module_dropout or rank_dropout"
            )

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        alone = alone or self.dropout > 0
        name, why = self.path(g, tokens, alone=alone)
        kept, flags = (g.channels_in, g.channels_in) if self.dropout else (0, 0)
        if name == "factored":
            work = self.product_macs(g) or 0
            return Cost(name, why, work, 3 * work, kept + self.saved_elements(g), flags, not flags)
        forward = _product(g) * alone + self.delta_macs(g) / tokens
        return Cost(name, why, forward, self._dense_training(g, tokens, alone) / tokens, kept, flags, not flags)

    @property
    def has_dropout(self) -> bool:
        return super().has_dropout or self.dropout > 0

    def transform(self, p: Params, base: Affine, g: Geometry, rank_mask: Tensor | None = None) -> Affine:
        p = self.mask_ranks(p, g, rank_mask)
        change, scale = self.delta(p, g, rank_mask), self.read_scalar(p) * self.scale(g)
        bias = base.bias
        if change.bias is not None:
            bias = change.bias * scale if bias is None else bias + change.bias * scale
        return Affine(base.weight + (change.weight * scale).to(base.weight.dtype), bias)

    def forward(self, p: Params, below: LayerBelow, x: Tensor, call: Call) -> Tensor:
        g = below.geometry
        drops = self.dropout and call.dropout_scale is not None
        if not drops and self._is_factored(g, _tokens(g, x)):
            return self._add_change(below(x), p, g, x, call)
        plain = None if drops else below.plain(x)
        if plain is None or plain.weight.dtype not in (torch.float32, torch.float64):
            return self.add(below(x), p, g, x, call)
        y = apply_rebuilt(self._builder(p, g, call), g, x, *plain, list(p.values()))
        return self._add_bias(y, p, g, call)

    def add(self, y: Tensor, p: Params, g: Geometry, x: Tensor, call: Call) -> Tensor:
        """Return y + μ · scale · ΔW(x), with the change of the bias if there is one, and dropout on x in training.

        Args:
            y: the output of the layer below for x. It is not changed.
            p: tensors by slot name.
            x: the layer's input.
        """
        if self.dropout and call.dropout_scale is not None:
            x = apply_dropout(x, call.dropout_scale * self.dropout)
        if self._is_factored(g, _tokens(g, x), alone=True):
            return self._add_change(y, p, g, x, call)
        if torch.is_autocast_enabled(x.device.type) and x.is_floating_point():
            x = x.to(torch.get_autocast_dtype(x.device.type))
        change = apply_rebuilt(self._builder(p, g, call), g, x, None, None, list(p.values()))
        return self._add_bias(y + change.to(y.dtype), p, g, call)

    def _add_change(self, y: Tensor, p: Params, g: Geometry, x: Tensor, call: Call) -> Tensor:
        p = in_dtype_of(y, p)
        if call.rank_mask is not None:
            p = self.mask_ranks(p, g, call.rank_mask)
        return self._add_bias(self.add_product(y, p, g, x, self._gain(p, g, call), call), p, g, call)

    def add_product(self, y: Tensor, p: Params, g: Geometry, x: Tensor, gain: Tensor | float, call: Call) -> Tensor:
        """Return y + gain · ΔW(x) by the factors. Called only where `product_macs` is not None, with ranks masked
        already.

        The default applies `low_rank_factors`.
        """
        pair = self.low_rank_factors(p, g)
        assert pair is not None, (
            f"{self.name} has product_macs and no low_rank_factors: give both, or override add_product"
        )
        out, into = pair
        return add_mixed(y, g, amplify(g.op(x, into), gain), out)

    def path(self, g: Geometry, tokens: int | None = None, *, alone: bool = False) -> Path:
        """Return the path that takes fewer multiplications in forward and backward together.

        The dense path replaces the layer's product by one with W + ΔW, and its backward takes one product more.

        Args:
            tokens: number of tokens (positions); None: `TOKENS`.
            alone: the layer has to run by itself, because it is quantized, of low precision, or has adapters below.
                The dense path then takes two products more.
        """
        tokens = TOKENS if tokens is None else tokens
        work, name = self.product_macs(g), "factored" if self._is_factored(g, tokens, alone) else "dense"
        if work is None:
            return Path(name, "this layer has no factored form that costs less than building ΔW")
        if self.always:
            return Path(name, self.always)
        if g.kind == "embedding":
            return Path(name, "looking rows up costs less than building all of ΔW")
        factored, dense = 3 * work * tokens / 1e6, self._dense_training(g, tokens, alone) / 1e6
        return Path(name, f"{factored:.3g} M multiplications against {dense:.3g} M for building ΔW, at {tokens} tokens")

    def _is_factored(self, g: Geometry, tokens: int, alone: bool = False) -> bool:
        work = self.product_macs(g)
        if work is None or self.always or g.kind == "embedding":
            return work is not None
        return 3 * work * tokens <= self._dense_training(g, tokens, alone)

    def _dense_training(self, g: Geometry, tokens: int, alone: bool) -> int:
        """Return the multiplications of a training step that builds ΔW."""
        return (3 if alone else 1) * _product(g) * tokens + 4 * self.delta_macs(g)

    def mask_ranks(self, p: Params, g: Geometry, rank_mask: Tensor | None) -> Params:
        """Return the tensors with each rank multiplied by its entry of a mask (r) or (1, r); None: as they are.

        The default returns them as they are, for algorithms without ranks, or that mask activations instead.
        """
        return p

    def delta_bias(self, p: Params) -> Tensor | None:
        """Return Δb (O) without the scale; None where there is none.

        It must be the bias of `delta`, without building ΔW. The default is None.
        """
        return None

    def read_scalar(self, p: Params) -> Tensor | float:
        """Return the trained scalar that multiplies ΔW; 1.0 where there is none.

        The default reads the slot `scalar`.
        """
        return p.get("scalar", 1.0)

    def _gain(self, p: Params, g: Geometry, call: Call) -> Tensor | float:
        return call.strength * (self.read_scalar(p) * self.scale(g))

    def _add_bias(self, y: Tensor, p: Params, g: Geometry, call: Call) -> Tensor:
        bias = self.delta_bias(p)
        return y if bias is None else y + g.channels((bias * self._gain(p, g, call)).to(y.dtype))

    def _builder(self, p: Params, g: Geometry, call: Call) -> Build:
        names = list(p)

        def build(*tensors: Tensor) -> Tensor:
            own = self.mask_ranks(dict(zip(names, tensors, strict=True)), g, call.rank_mask)
            rank_mask = None if call.rank_mask is None else require_one_mask(call.rank_mask)
            gain = self._gain(own, g, call)
            # In float64: a number alone would become float32, and round the factors of a float64 layer.
            exact = gain if isinstance(gain, Tensor) else torch.tensor(gain, dtype=torch.float64)
            small = self.scale_rows(own, exact)
            return (
                self.delta(own, g, rank_mask).weight * gain if small is None else self.delta(small, g, rank_mask).weight
            )

        return build


def amplify(h: Tensor, gain: Tensor | float) -> Tensor:
    """Return gain · h in the dtype of h, and h itself where gain is 1.

    A gain that is a tensor is always multiplied, so that it gets a gradient.
    """
    if isinstance(gain, Tensor):
        return h * gain.to(h.dtype)
    return h if gain == 1.0 else h * gain


def add_mixed(y: Tensor, g: Geometry, h: Tensor, out: Tensor) -> Tensor:
    """Return y + out(h), with `out` (O, r) applied to the channels of h.

    Shapes: y with O channels and h with r channels, both on `g.channel_axis`. y is not changed.
    """
    return add_product(y, h, out) if g.channels_last else y + g.mix(h, out)


def _product(g: Geometry) -> int:
    """Return the multiplications per token of applying a weight; 0 for an embedding, which looks rows up."""
    return 0 if g.kind == "embedding" else g.size


def _tokens(g: Geometry, x: Tensor) -> int:
    if torch.compiler.is_compiling():
        return TOKENS
    if g.kind == "embedding":
        return x.numel()
    return x.numel() // max(1, x.shape[-1] if g.channels_last else g.in_features * g.groups)


def low_rank_work(g: Geometry, rank: int) -> int | None:
    """Return the multiplications per token of a product with factors of a rank.

    None on grouped convolutions, where building ΔW is always cheaper: their rows have few columns.
    """
    looked_up = g.kind == "embedding"
    return None if g.groups > 1 else rank * (g.out_features + g.fan_in * (not looked_up))
