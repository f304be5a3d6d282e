"""What an adapter costs: multiplications and saved activations, for `explain` and for choosing a path."""

from __future__ import annotations

from typing import NamedTuple

from lycoris.layers.geometry import Geometry


class Cost(NamedTuple):
    """What an adapter adds to one layer's pass.

    Everything is per token. Work that does not grow with the number of tokens, such as building ΔW, is divided by it.
    """

    path: str
    """How it is computed: factored, dense (ΔW is built), rotated, scaled, or another word for what it does."""
    reason: str
    """Why this path, in one phrase."""
    forward_macs: float
    """Multiplications of the forward pass."""
    training_macs: float
    """Multiplications of forward and backward together."""
    saved_elements: int = 0
    """Elements saved for backward in addition to the layer's input. Parameters are not counted."""
    mask_bytes: int = 0
    """Bytes saved for backward for dropout masks."""
    needs_input: bool = True
    """Whether backward needs the layer's input, which a frozen linear layer does not save and a convolution does."""


class CostHooks:
    """How much an algorithm computes and saves.

    The defaults are right for `dense_forward`. Override them where `forward` does less.
    """

    def max_rank(self, g: Geometry) -> int | None:
        """Return the highest rank of ΔW as a matrix (O, I·ΠK), for any values of the tensors.

        None where the weight is no matrix, as in a norm.
        """
        return min(g.out_features, g.fan_in)

    def delta_macs(self, g: Geometry) -> int:
        """Return the multiplications that building ΔW takes, once per pass whatever the number of tokens.

        The default is one per element of the weight.
        """
        return g.size

    def cost(self, g: Geometry, tokens: int, *, alone: bool = False) -> Cost:
        """Return the cost of one layer at a number of tokens.

        Args:
            alone: the layer below runs by itself, because it is quantized, of low precision, or has other adapters.
        """
        build = self.delta_macs(g) / tokens
        return Cost("dense", "ΔW is built and applied next to the layer", g.size + build, 3 * g.size + 4 * build)

    def find_excess(self, g: Geometry) -> str | None:
        """Explain which settings ask for more than a layer can use, and name the nearest that it can.

        None where all of them can be used.
        """
        return None
