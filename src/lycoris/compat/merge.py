"""`merge`: a file's tensors folded into a denoiser and its text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from lycoris.compat.kohya import create_network_from_weights
from lycoris.compat.kohya_network import LycorisNetworkKohya


def merge(
    tes: Sequence[nn.Module] | None,
    unet: nn.Module | None,
    lyco_state_dict: Mapping[str, Tensor],
    scale: float = 1.0,
    device: Any = None,
) -> LycorisNetworkKohya:
    """Fold tensors named as in kohya's files into the models, at a strength; `restore()` of the result undoes it.

    Raises `FileError`, and changes nothing, when a tensor has no place. Computed where the layers are, whatever
    `device` says; the tensors given are not changed.
    """
    network, _ = create_network_from_weights(scale, None, None, one_or_many(tes), unet, weights_sd=lyco_state_dict)
    network.merge_to()
    return network


def one_or_many(tes: Sequence[nn.Module | None] | None) -> Any:
    """Text encoders as `components` takes them: one by itself has no number in its name."""
    encoders = list(tes or ())
    return encoders if len(encoders) > 1 else next(iter(encoders), None)
