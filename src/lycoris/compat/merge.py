"""`merge`: a file's tensors merged into a denoiser and its text encoders."""

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
    """Merge tensors, named as in kohya's files, into the models at strength `scale`.

    `restore()` of the returned network undoes it. The merge is computed on the layers' own device, whatever `device`
    is; the tensors are not modified. Raises `FileError`, and changes nothing, for tensors without a layer.
    """
    network, _ = create_network_from_weights(scale, None, None, unwrap_single(tes), unet, weights_sd=lyco_state_dict)
    network.merge_to()
    return network


def unwrap_single(tes: Sequence[nn.Module | None] | None) -> Any:
    """Return text encoders as `list_components` takes them.

    A single one is returned without a list, so that its prefix has no number. None for no text encoder.
    """
    encoders = list(tes or ())
    return encoders if len(encoders) > 1 else next(iter(encoders), None)
