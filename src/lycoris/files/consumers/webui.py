"""The WebUI of AUTOMATIC1111 (1.10). A layer that it cannot read costs the whole file."""

from __future__ import annotations

from lycoris.files.consumers import keys
from lycoris.files.consumers.consumer import Consumer, Row
from lycoris.files.consumers.traits import (
    all_of,
    cored,
    dora_out,
    ia3_in_on_groups,
    ia3_out_on_conv,
    ia3_out_on_square_line,
    is_a,
    lone_bias,
    off_pictures,
    w2_on_wrong_axes,
    without_shift,
)

CORES = "takes cores on convolutions over two dimensions only, and rejects the file"
WEBUI = Consumer(
    "webui",
    "WebUI",
    keys.WEBUI,
    (
        Row(is_a("tlora"), "not at all", "knows no T-LoRA, and rejects the file", "plain"),
        Row(is_a("glora"), "not at all", "reads GLoRA's tensors in another layout, and rejects the file", "plain"),
        Row(lone_bias, "not at all", "knows no diff_b without diff, and rejects the file", "both diffs"),
        Row(without_shift, "not at all", "knows no w_norm without b_norm, and rejects the file", "both norms"),
        Row(
            ia3_out_on_square_line,
            "differently",
            "takes the factors of the outputs for those of the inputs; how far off that is depends on the base weight",
            "plain",
        ),
        Row(ia3_out_on_conv, "not at all", "cannot apply IA3 to the outputs of a convolution", "plain"),
        Row(ia3_in_on_groups, "not at all", "cannot apply IA3 to the inputs of a convolution with groups", "plain"),
        Row(
            all_of(is_a("lora"), off_pictures),
            "not at all",
            "takes LoRA on linear layers and convolutions over two dimensions only, and rejects the file",
            "dense",
        ),
        Row(all_of(cored, off_pictures, is_a("lokr")), "not at all", CORES, "flat w2"),
        Row(all_of(cored, off_pictures), "not at all", CORES, "plain"),
        Row(
            w2_on_wrong_axes,
            "not at all",
            "cannot give a whole w2 the shape of a convolution over one or three dimensions, and rejects the file",
            "flat w2",
        ),
        Row(
            dora_out,
            "differently",
            "divides DoRA's lengths by those of the columns, whichever axis they are for; how far off that is depends "
            "on the base weight",
            "plain",
        ),
    ),
)
