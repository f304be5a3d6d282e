"""Which blocks of a pipeline sd-scripts' `networks.loha` and `networks.lokr` mean, by the classes of its denoiser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lycoris.compat.patterns import Expressions
from lycoris.errors import ConfigError


class Architecture(NamedTuple):
    """What is trained of a pipeline."""

    targets: tuple[str, ...]
    """Classes of the denoiser in which layers are meant."""
    text: tuple[str, ...]
    """The same of text encoders."""
    numbered: bool = True
    """Whether text encoders have numbers in their names: `lora_te1`, or `lora_te`."""
    convolved: tuple[str, ...] = ()
    """Classes that are meant when `conv_dim` is given."""
    adapter: tuple[str, ...] = ()
    """Classes that are meant with `train_llm_adapter`."""
    excludes: Expressions = ()
    """Paths that are left out unless `include_patterns` has them."""


SDXL = Architecture(
    ("Transformer2DModel",),
    ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"),
    convolved=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
)
ANIMA = Architecture(
    ("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"),
    ("Qwen3Attention", "Qwen3MLP", "Qwen3SdpaAttention", "Qwen3FlashAttention2"),
    numbered=False,
    adapter=("LLMAdapterTransformerBlock",),
    excludes=(re.compile(r".*(_modulation|_norm|_embedder|final_layer).*"),),
)

WHOLE: Mapping[str, Architecture] = {"SdxlUNet2DConditionModel": SDXL, "InferSdxlUNet2DConditionModel": SDXL}
"""By the class of the denoiser, or one that it derives from."""
INSIDE: Mapping[str, Architecture] = {"Block": ANIMA}
"""By a class of modules in it."""


def detect_architecture(unet: nn.Module | None) -> Architecture:
    """What is trained. Raises `ConfigError` for another denoiser, naming its classes."""
    above: Sequence[type] = type(unet).__mro__
    found = next((WHOLE[each.__name__] for each in above if each.__name__ in WHOLE), None)
    have = {type(module).__name__ for module in unet.modules()} if unet is not None else set()
    found = found or next((INSIDE[name] for name in INSIDE if name in have), None)
    if found is None:
        raise ConfigError(
            f"this module is for {' and '.join((*WHOLE, 'Anima'))}, and not for {type(unet).__name__}, which has "
            f"{', '.join(sorted(have)) or 'no layers'}. lycoris.kohya takes targets from a preset"
        )
    return found
