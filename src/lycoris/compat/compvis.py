"""Names in kohya's files for layers of Stable Diffusion's UNet: from diffusers' names to the original ones."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

RESIDUAL_LAYERS: Mapping[str, str] = {
    "norm1": "in_layers_0",
    "conv1": "in_layers_2",
    "time_emb_proj": "emb_layers_1",
    "norm2": "out_layers_0",
    "conv2": "out_layers_3",
    "conv_shortcut": "skip_connection",
}
"""Layers of a residual block: diffusers' name → original name."""

NameRule = tuple[str, Callable[[re.Match[str]], str]]

_RULES: tuple[NameRule, ...] = (
    (r"conv_in(.*)", lambda m: f"input_blocks_0_0{m[1]}"),
    (r"conv_out(.*)", lambda m: f"out_2{m[1]}"),
    (r"time_embedding_linear_(\d+)(.*)", lambda m: f"time_embed_{2 * int(m[1]) - 2}{m[2]}"),
    (
        r"down_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: f"input_blocks_{1 + 3 * int(m[1]) + int(m[3])}_{_name_inside_level(m[2], m[4])}",
    ),
    (r"mid_block_attentions_\d+_(.+)", lambda m: f"middle_block_1_{m[1]}"),
    (r"mid_block_resnets_(\d+)_(.+)", lambda m: f"middle_block_{2 * int(m[1])}_{RESIDUAL_LAYERS.get(m[2], m[2])}"),
    (
        r"up_blocks_(\d+)_(attentions|resnets)_(\d+)_(.+)",
        lambda m: f"output_blocks_{3 * int(m[1]) + int(m[3])}_{_name_inside_level(m[2], m[4])}",
    ),
    (r"down_blocks_(\d+)_downsamplers_0_conv", lambda m: f"input_blocks_{3 + 3 * int(m[1])}_0_op"),
    (r"up_blocks_(\d+)_upsamplers_0_conv", lambda m: f"output_blocks_{2 + 3 * int(m[1])}_2_conv"),
)


def convert_diffusers_name_to_compvis(key: str) -> str:
    """Return the name of a layer in files for the original UNet; other names are returned unchanged.

    Levels are assumed to have two residual blocks and one down- or upsampler, as in Stable Diffusion 1, 2 and XL.
    """
    prefix = "lora_unet_"
    if not key.startswith(prefix):
        return key
    for pattern, made in _RULES:
        if found := re.match(pattern, key.removeprefix(prefix)):
            return prefix + made(found)
    return key


def _name_inside_level(kind: str, rest: str) -> str:
    return f"1_{rest}" if kind == "attentions" else f"0_{RESIDUAL_LAYERS.get(rest, rest)}"
