"""What the network modules of sd-scripts and of Musubi Tuner have in common, for one algorithm."""

from __future__ import annotations

from collections.abc import Mapping, MutableSet
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor

from lycoris.compat.inside import AlgorithmFactory
from lycoris.compat.merge_weight import merge_into_weight


@dataclass(frozen=True)
class NetworkInterface:
    """The functions that a trainer calls on a network module, for one algorithm.

    The module has the methods of an instance as its functions.
    """

    name: str
    """Name of the algorithm."""
    marks: tuple[str, ...]
    """Tensor names in files, of which any one shows that a layer has an adapter of this algorithm."""
    make: AlgorithmFactory
    options: tuple[str, ...] = ()
    """`--network_args` that the algorithm has in addition to the common ones."""

    def merge_weights_to_tensor(
        self,
        model_weight: Tensor,
        lora_name: str,
        lora_sd: Mapping[str, Tensor],
        lora_weight_keys: MutableSet[str],
        multiplier: float,
        calc_device: Any,
    ) -> Tensor:
        """Return a weight with the update of a file added to it.

        See `lycoris.compat.merge_weight.merge_into_weight`: the layer's keys are removed from `lora_weight_keys`, and a
        layer without an adapter of this algorithm keeps its weight. Raises `FileError` for tensors that do not fit.
        """
        return merge_into_weight(
            self.marks, model_weight, lora_name, lora_sd, lora_weight_keys, multiplier, calc_device
        )

    def _bind_options(self, options: Mapping[str, Any]) -> AlgorithmFactory:
        """Return `make` with `--network_args` filled in."""
        return partial(self.make, options=options)
