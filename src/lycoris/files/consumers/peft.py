"""PEFT (0.21), for a file that was converted to its names and has its configuration beside it."""

from __future__ import annotations

from lycoris.files.consumers import keys
from lycoris.files.consumers.consumer import Consumer, Reads, Row, Test
from lycoris.files.consumers.traits import (
    all_of,
    cored,
    dilated,
    dora,
    dora_in,
    grouped,
    ia3_out_with_bias,
    is_a,
    line,
    lora_goes_wrong,
    moves_bias,
    no_other_than,
    padded_otherwise,
    resized,
    square,
    transposed,
    volume,
    w2_on_wrong_axes,
    without_peft_factor,
)

STRENGTH = "computes what was trained; at another strength than 1 it weakens what is below DoRA's lengths, not these"
PADDING = "pads with zeros beside a layer that does not; how far off that is depends on the input"


def instead(when: Test, reads: Reads, why: str) -> tuple[Row, Row]:
    """What LoRA makes right, on layers where PEFT's LoRA itself is right."""
    beside = Row(all_of(when, lora_goes_wrong), reads, f"{why}; nor does its LoRA fit here")
    return beside, Row(when, reads, why, "lora")


LORA = (
    Row(moves_bias, "not at all", "has no counterpart that changes a bias"),
    Row(all_of(is_a("lora"), grouped), "not at all", "makes a LoRA of other shapes on convolutions with groups"),
    *instead(all_of(dora, no_other_than("lora")), "not at all", "knows DoRA over LoRA only"),
    *instead(
        all_of(dora_in, square),
        "differently",
        "takes DoRA's lengths of inputs for those of outputs, and how far off that is depends on the base weight",
    ),
    *instead(dora_in, "not at all", "knows DoRA's lengths of outputs only"),
    Row(all_of(is_a("lora"), cored, lora_goes_wrong), "not at all", "knows no cores of LoRA, nor does LoRA fit here"),
    Row(all_of(is_a("lora"), cored), "not at all", "knows no cores of LoRA", "no core"),
    Row(all_of(is_a("lora"), resized), "not at all", "leaves the dilation out, and the outputs differ in size"),
    Row(
        all_of(is_a("lora"), dilated),
        "differently",
        "leaves the dilation of the convolution out; how far off that is depends on the input",
    ),
    Row(all_of(is_a("lora"), padded_otherwise), "differently", PADDING),
)
"""What holds wherever PEFT's LoRA runs."""

PEFT = Consumer(
    "peft",
    "PEFT",
    keys.PEFT,
    (
        *LORA,
        *instead(
            no_other_than("lora", "loha", "lokr", "ia3"),
            "not at all",
            "has no counterpart: its methods of that name are others",
        ),
        *instead(all_of(is_a("ia3"), line), "not at all", "knows no IA3 on convolutions over one dimension"),
        *instead(
            ia3_out_with_bias,
            "differently",
            "scales the bias with the outputs, and how far off that is depends on the base weight and bias",
        ),
        *instead(all_of(is_a("loha", "lokr"), volume), "not at all", "knows LoRA only over three dimensions"),
        *instead(all_of(is_a("loha", "lokr"), transposed), "not at all", "knows LoRA only on layers of GPT-2"),
        *instead(
            without_peft_factor,
            "not at all",
            "makes the shapes of a LoKr from one decompose_factor, and none gives these",
        ),
        Row(all_of(is_a("lokr"), cored, line), "not at all", "fails on LoKr's cores over one dimension", "flat w2"),
        *instead(
            w2_on_wrong_axes,
            "differently",
            "pairs the wrong axes of a whole w2 on a convolution over one dimension",
        ),
        Row(all_of(is_a("loha", "lokr"), padded_otherwise), "differently", PADDING),
        Row(dora, "as trained", STRENGTH),
        Row(
            is_a("lokr"),
            "as trained",
            "computes what was trained, if one decompose_factor fits all layers of the file",
        ),
    ),
    kinds=("linear", "conv"),
    transposes=True,
)
