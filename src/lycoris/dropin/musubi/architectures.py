"""Which blocks of a model are meant, by the classes that it has in its original code."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from torch import nn

from lycoris.errors import ConfigError


class Architecture(NamedTuple):
    """What is trained of a model."""

    targets: tuple[str, ...]
    """Classes whose linear layers are meant."""
    excludes: tuple[str, ...]
    """Regular expressions that match the whole paths of layers that are left out."""


ARCHITECTURES: Mapping[str, Architecture] = {
    "WanAttentionBlock": Architecture(
        ("WanAttentionBlock",),
        (r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",),
    ),
    "QwenImageTransformerBlock": Architecture(("QwenImageTransformerBlock",), (r".*(_mod_).*",)),
    "ZImageTransformerBlock": Architecture(("ZImageTransformerBlock",), (r".*(_modulation|_refiner).*",)),
    "HunyuanVideoTransformerBlock": Architecture(
        ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"), (r".*(norm).*",)
    ),
    "DoubleStreamBlock": Architecture(
        ("DoubleStreamBlock", "SingleStreamBlock"),
        (r".*(img_mod\.lin|txt_mod\.lin|modulation\.lin).*", r".*(norm).*"),
    ),
    "MMSingleStreamBlock": Architecture(
        ("MMDoubleStreamBlock", "MMSingleStreamBlock"), (r".*(img_mod|txt_mod|modulation).*",)
    ),
    "MMDoubleStreamBlock": Architecture(("MMDoubleStreamBlock",), (r".*(_in).*",)),
}
"""By a class that only such a model has; the first that is present counts."""


def detect(model: nn.Module) -> Architecture:
    """What is trained of a model. Raises `ConfigError` when none of the classes is present, naming those that are."""
    have = {type(module).__name__ for module in model.modules()}
    found = next((architecture for name, architecture in ARCHITECTURES.items() if name in have), None)
    if found is None:
        raise ConfigError(
            f"{type(model).__name__} is of no known architecture: it has none of {', '.join(ARCHITECTURES)}. It has "
            f"{', '.join(sorted(have))}. lycoris.kohya takes targets from a preset"
        )
    return found
