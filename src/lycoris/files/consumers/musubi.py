"""musubi-tuner (2026), as it merges: weight by weight, by the first algorithm that it finds in a file."""

from __future__ import annotations

from collections.abc import Iterable

from lycoris.files.consumers import keys
from lycoris.files.consumers.consumer import Case, Consumer, Row
from lycoris.files.consumers.traits import (
    all_of,
    beside,
    cored,
    dora,
    is_a,
    moves_bias,
    no_other_than,
    off_pictures,
    on,
    w1_split,
)

FIRST = (("lora_down", "lora"), ("hada_w1_a", "loha"), ("lokr_w1", "lokr"))
"""Part of a tensor's name → algorithm."""


def detected(names: Iterable[str]) -> str:
    """detect_network_type: the algorithm of the first tensor that tells one."""
    return next((algorithm for name in names for part, algorithm in FIRST if part in name), "lora")


def _conv(case: Case) -> bool:
    return case.dimensions > 0


def _w2_split(case: Case) -> bool:
    return "w2_a" in case.entry.tensors


MUSUBI = Consumer(
    "musubi",
    "musubi-tuner",
    keys.MUSUBI,
    (
        Row(
            all_of(on("hunyuanvideo"), no_other_than("lora")), "not at all", "merges LoRA only into this model", "lora"
        ),
        Row(moves_bias, "not at all", "has no adapters that change a bias"),
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
        Row(cored, "differently", "leaves the core out", "no core"),
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
    kinds=("linear", "conv"),
    taken_for=detected,
)
