"""musubi-tuner (2026), as it merges: weight by weight, by the first algorithm that it detects in a file."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lycoris.files.programs import keys
from lycoris.files.programs.adapter_conditions import (
    changes_bias,
    has_algorithm,
    has_core,
    has_dora,
    has_extra_entries,
    has_no_alpha,
    has_other_algorithm,
    has_split_w1,
    is_not_2d,
)
from lycoris.files.programs.conditions import all_of, any_of, is_for
from lycoris.files.programs.program import Case, Program, Row
from lycoris.files.programs.routes import RoutedKeys, SentFile

ALGORITHM_MARKS = (("lora_down", "lora"), ("lora_A", "lora"), ("hada_w1_a", "loha"), ("lokr_w1", "lokr"))
"""Part of a tensor's name → algorithm. FramePack's lora_A is lora_down by then; no other model knows such a file."""


is_merged_by_network = is_for(*keys.MUSUBI_NETWORKS)
"""Into models of these it merges through modules of its LoRA, one for each layer in a block."""
is_merged_by_hooks = is_for("ideogram4")
"""Of those, it wants every tensor of the file to be of such a module."""


def detect_algorithm(names: Iterable[str], architecture: str | None) -> str:
    """Return the algorithm that musubi-tuner takes an entire file for (`detect_network_type`).

    The first tensor whose name tells one decides. "" for architectures where each layer has its own.
    """
    if architecture in keys.MUSUBI_NETWORKS:
        return ""
    return next((algorithm for name in names for part, algorithm in ALGORITHM_MARKS if part in name), "lora")


# convert_hunyuan_to_framepack
_OF_HUNYUANVIDEO = re.compile(
    r"double_blocks\.\d+\.(img|txt)_(attn[._](qkv|proj)|mlp[._]fc[12]|mod[._]linear)"
    r"|single_blocks\.\d+\.(linear[12]|modulation[._]linear)"
)
_OF_FRAMEPACK = re.compile(
    r"((single_)?transformer_blocks|context_embedder|x_embedder|clean_x_embedder|image_projection|time_text_embed|norm_out|proj_out)\b.*"
)


def route_musubi(sent: SentFile) -> RoutedKeys | None:
    """Return what `convert_lora_for_framepack` makes of the keys of a file.

    It renames dotted keys, and of these keeps LoRA's factors only. None for other models and names.
    """
    dotted = not sent.names[0].startswith("lora_unet_") and any("lora_A" in name for name in sent.names)
    if sent.architecture != "framepack" or not dotted:
        return None
    paths = {key: key.partition(".")[2] for key in sent.layers if key.startswith(("diffusion_model.", "transformer."))}
    pairs = {key for key, names in sent.layers.items() if "lora_A.weight" in names}
    older = any("double_blocks" in path or "single_blocks" in path for path in paths.values())
    named = _OF_HUNYUANVIDEO if older else _OF_FRAMEPACK
    kept = {key for key in pairs & paths.keys() if named.fullmatch(paths[key])}
    return RoutedKeys(lost=frozenset(sent.layers.keys() - kept), without_scale=frozenset(kept))


def _is_conv(case: Case) -> bool:
    return case.dimensions > 0


def _has_split_w2(case: Case) -> bool:
    return "w2_a" in case.entry.tensors


MUSUBI_PROGRAM = Program(
    "musubi",
    "musubi-tuner",
    keys.MUSUBI_KEYS,
    (
        Row(
            all_of(is_merged_by_hooks, any_of(has_other_algorithm("lora"), has_extra_entries, has_dora, has_core)),
            "not at all",
            "takes LoRA and nothing else for this model, and stops",
            "lora",
            stops=True,
        ),
        Row(has_algorithm("norm"), "not at all", "has no adapters for norms"),
        Row(
            all_of(is_merged_by_network, has_other_algorithm("lora")),
            "not at all",
            "merges LoRA only into this model",
            "lora",
        ),
        Row(
            all_of(is_merged_by_network, has_no_alpha),
            "not at all",
            "wants alpha next to every LoRA for this model, and stops",
            "format",
            stops=True,
        ),
        Row(changes_bias, "not at all", "has no adapters that change a bias"),
        Row(
            all_of(has_other_algorithm("lora", "loha", "lokr"), is_not_2d),
            "not at all",
            "knows LoRA, LoHa and LoKr only, and of those LoKr alone on a convolution over one or three dimensions",
        ),
        Row(has_other_algorithm("lora", "loha", "lokr"), "not at all", "knows LoRA, LoHa and LoKr only", "lora"),
        Row(has_split_w1, "not at all", "knows LoKr with an unsplit w1 only", "unsplit w1"),
        Row(
            all_of(is_not_2d, has_algorithm("lora", "loha")),
            "not at all",
            "cannot merge it into a convolution over one or three dimensions, and stops",
            stops=True,
        ),
        Row(
            all_of(is_not_2d, _has_split_w2),
            "not at all",
            "cannot merge a LoKr with a split w2 into a convolution, and stops",
            stops=True,
        ),
        Row(
            all_of(_is_conv, has_algorithm("loha")),
            "not at all",
            "cannot merge LoHa into a convolution, and stops",
            "lora",
            stops=True,
        ),
        Row(
            all_of(_is_conv, _has_split_w2),
            "not at all",
            "cannot merge a LoKr with a split w2 into a convolution, and stops",
            "lora",
            stops=True,
        ),
        Row(has_core, "differently", "leaves the core out", "no core"),
        Row(
            all_of(has_dora, is_not_2d),
            "differently",
            "merges what is below DoRA's magnitude, and leaves that out with a warning; how far off that is depends on "
            "the base weight",
        ),
        Row(
            has_dora,
            "differently",
            "merges what is below DoRA's magnitude, and leaves that out with a warning; how far off that is depends on "
            "the base weight",
            "lora",
        ),
        Row(has_extra_entries, "differently", "ignores the change of the bias next to it"),
        Row(
            has_algorithm("lokr"),
            "as trained",
            "computes what was trained when it merges; to train on, it needs the factor as an argument",
        ),
    ),
    kinds=("linear", "conv", "norm"),
    detect_algorithm=detect_algorithm,
    route=route_musubi,
)
