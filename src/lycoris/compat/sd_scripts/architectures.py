"""Which blocks of a pipeline sd-scripts' `networks.loha` and `networks.lokr` train, by the class of its denoiser."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import nn

from lycoris.compat.patterns import Expressions
from lycoris.errors import ConfigError


class SdScriptsTargets(NamedTuple):
    """What is trained of a pipeline."""

    targets: tuple[str, ...]
    """Classes of denoiser blocks whose layers are trained."""
    text: tuple[str, ...]
    """Classes of text encoder blocks whose layers are trained."""
    numbered: bool = True
    """Whether text encoders are numbered: `lora_te1`, or else `lora_te`."""
    convolved: tuple[str, ...] = ()
    """Classes added when `conv_dim` is given."""
    adapter: tuple[str, ...] = ()
    """Classes added with `train_llm_adapter`."""
    excludes: Expressions = ()
    """Paths that are left out unless `include_patterns` matches them."""


SDXL = SdScriptsTargets(
    ("Transformer2DModel",),
    ("CLIPAttention", "CLIPSdpaAttention", "CLIPMLP"),
    convolved=("ResnetBlock2D", "Downsample2D", "Upsample2D"),
)
ANIMA = SdScriptsTargets(
    ("Block", "PatchEmbed", "TimestepEmbedding", "FinalLayer"),
    ("Qwen3Attention", "Qwen3MLP", "Qwen3SdpaAttention", "Qwen3FlashAttention2"),
    numbered=False,
    adapter=("LLMAdapterTransformerBlock",),
    excludes=(re.compile(r".*(_modulation|_norm|_embedder|final_layer).*"),),
)

TARGETS_BY_DENOISER: Mapping[str, SdScriptsTargets] = {
    "SdxlUNet2DConditionModel": SDXL,
    "InferSdxlUNet2DConditionModel": SDXL,
}
"""Targets by the class of the denoiser, or a base class of it."""
TARGETS_BY_BLOCK: Mapping[str, SdScriptsTargets] = {"Block": ANIMA}
"""Targets by a class of modules in the denoiser."""


def detect_sd_scripts_targets(unet: nn.Module | None) -> SdScriptsTargets:
    """Return what sd-scripts trains of a pipeline with this denoiser.

    Raises `ConfigError` for a denoiser other than those of SDXL and Anima, with its classes.
    """
    above: Sequence[type] = type(unet).__mro__
    found = next((TARGETS_BY_DENOISER[each.__name__] for each in above if each.__name__ in TARGETS_BY_DENOISER), None)
    have = {type(module).__name__ for module in unet.modules()} if unet is not None else set()
    found = found or next((TARGETS_BY_BLOCK[name] for name in TARGETS_BY_BLOCK if name in have), None)
    if found is None:
        raise ConfigError(
            f"this module is for {' and '.join((*TARGETS_BY_DENOISER, 'Anima'))}, not for {type(unet).__name__}, which "
            f"has {', '.join(sorted(have)) or 'no layers'}. For other models use lycoris.kohya with a preset"
        )
    return found
