"""musubi-tuner (2026), as it merges: weight by weight, by the first algorithm that it finds in a file."""

from __future__ import annotations

import re
from collections.abc import Iterable

from lycoris.files.programs import keys
from lycoris.files.programs.conditions import (
    all_of,
    any_of,
    beside,
    changes_bias,
    dora,
    has_core,
    is_a,
    no_other_than,
    off_pictures,
    on,
    w1_split,
    without_alpha,
)
from lycoris.files.programs.program import Case, Program, Row
from lycoris.files.programs.routes import Routed, Sent

FIRST = (("lora_down", "lora"), ("lora_A", "lora"), ("hada_w1_a", "loha"), ("lokr_w1", "lokr"))
"""Part of a tensor's name → algorithm. FramePack's lora_A is lora_down by then; no other model knows such a file."""


by_network = on(*keys.MUSUBI_NETWORKS)
"""Into models of these it merges through modules of its LoRA, one for each layer in a block."""
by_hooks = on("ideogram4")
"""Of those, it wants every tensor of the file to be of such a module."""


def detect_algorithm(names: Iterable[str], architecture: str | None) -> str:
    """detect_network_type: the algorithm of the first tensor that tells one; "" where each layer has its own."""
    if architecture in keys.MUSUBI_NETWORKS:
        return ""
    return next((algorithm for name in names for part, algorithm in FIRST if part in name), "lora")


# convert_hunyuan_to_framepack
_OF_HUNYUANVIDEO = re.compile(
    r"double_blocks\.\d+\.(img|txt)_(attn[._](qkv|proj)|mlp[._]fc[12]|mod[._]linear)"
    r"|single_blocks\.\d+\.(linear[12]|modulation[._]linear)"
)
_OF_FRAMEPACK = re.compile(
    r"((single_)?transformer_blocks|context_embedder|x_embedder|clean_x_embedder|image_projection|time_text_embed|norm_out|proj_out)\b.*"
)


def route(sent: Sent) -> Routed | None:
    """convert_lora_for_framepack: it renames dotted keys, of which it keeps LoRA's factors and nothing else."""
    dotted = not sent.names[0].startswith("lora_unet_") and any("lora_A" in name for name in sent.names)
    if sent.architecture != "framepack" or not dotted:
        return None
    paths = {key: key.partition(".")[2] for key in sent.layers if key.startswith(("diffusion_model.", "transformer."))}
    pairs = {key for key, names in sent.layers.items() if "lora_A.weight" in names}
    older = any("double_blocks" in path or "single_blocks" in path for path in paths.values())
    named = _OF_HUNYUANVIDEO if older else _OF_FRAMEPACK
    kept = {key for key in pairs & paths.keys() if named.fullmatch(paths[key])}
    return Routed(lost=frozenset(sent.layers.keys() - kept), without_scale=frozenset(kept))


def _conv(case: Case) -> bool:
    return case.dimensions > 0


def _w2_split(case: Case) -> bool:
    return "w2_a" in case.entry.tensors


MUSUBI = Program(
    "musubi",
    "musubi-tuner",
    keys.MUSUBI,
    (
        Row(
            all_of(by_hooks, any_of(no_other_than("lora"), beside, dora, has_core)),
            "not at all",
            "takes LoRA and nothing else for this model, and stops",
            "lora",
            stops=True,
        ),
        Row(is_a("norm"), "not at all", "has no adapters for norms"),
        Row(all_of(by_network, no_other_than("lora")), "not at all", "merges LoRA only into this model", "lora"),
        Row(
            all_of(by_network, without_alpha),
            "not at all",
            "wants alpha beside every LoRA for this model, and stops",
            "format",
            stops=True,
        ),
        Row(changes_bias, "not at all", "has no adapters that change a bias"),
        Row(
            all_of(no_other_than("lora", "loha", "lokr"), off_pictures),
            "not at all",
            "knows LoRA, LoHa and LoKr only, and of those LoKr alone on a convolution over one or three dimensions",
        ),
        Row(no_other_than("lora", "loha", "lokr"), "not at all", "knows LoRA, LoHa and LoKr only", "lora"),
        Row(w1_split, "not at all", "knows LoKr with a whole w1 only", "whole w1"),
        Row(
            all_of(off_pictures, is_a("lora", "loha")),
            "not at all",
            "cannot merge it into a convolution over one or three dimensions, and stops",
            stops=True,
        ),
        Row(
            all_of(off_pictures, _w2_split),
            "not at all",
            "cannot merge a LoKr with a split w2 into a convolution, and stops",
            stops=True,
        ),
        Row(
            all_of(_conv, is_a("loha")),
            "not at all",
            "cannot merge LoHa into a convolution, and stops",
            "lora",
            stops=True,
        ),
        Row(
            all_of(_conv, _w2_split),
            "not at all",
            "cannot merge a LoKr with a split w2 into a convolution, and stops",
            "lora",
            stops=True,
        ),
        Row(has_core, "differently", "leaves the core out", "no core"),
        Row(
            all_of(dora, off_pictures),
            "differently",
            "merges what is below DoRA's magnitude, and leaves that out with a warning; how far off that is depends on "
            "the base weight",
        ),
        Row(
            dora,
            "differently",
            "merges what is below DoRA's magnitude, and leaves that out with a warning; how far off that is depends on "
            "the base weight",
            "lora",
        ),
        Row(beside, "differently", "leaves out the change of the bias that is beside it"),
        Row(
            is_a("lokr"),
            "as trained",
            "computes what was trained when it merges; to train on, it has to be told the factor",
        ),
    ),
    kinds=("linear", "conv", "norm"),
    taken_for=detect_algorithm,
    route=route,
)
