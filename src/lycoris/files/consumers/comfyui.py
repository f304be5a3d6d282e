"""ComfyUI (trees of 2025 and 2026). What it cannot place or compute is a line in its log."""

from __future__ import annotations

from lycoris.files.consumers import keys
from lycoris.files.consumers.consumer import Consumer, Row
from lycoris.files.consumers.traits import (
    all_of,
    core_without_contiguous,
    cored,
    dora,
    dora_out,
    is_a,
    lengths,
    limited_without_outputs,
    misplaced_alone,
    off_pictures,
    w2_on_wrong_axes,
)

KRON = "contracts the core into a w2 that PyTorch's kron cannot use (seen with 2.13)"
SHARED = (
    Row(is_a("tlora"), "not at all", "knows no T-LoRA, and passes its keys over", "plain"),
    Row(is_a("ia3"), "not at all", "knows no IA3, and passes its keys over", "plain"),
    Row(
        all_of(cored, off_pictures, is_a("lokr")),
        "not at all",
        "takes cores on convolutions over two dimensions only",
        "flat w2",
    ),
    Row(
        all_of(cored, off_pictures, is_a("lora")),
        "not at all",
        "takes cores on convolutions over two dimensions only",
        "no core",
    ),
    Row(all_of(cored, off_pictures), "not at all", "takes cores on convolutions over two dimensions only", "plain"),
    Row(all_of(dora, is_a("full")), "differently", "takes the difference and leaves DoRA's lengths out", "plain"),
    Row(
        dora_out,
        "differently",
        "divides DoRA's lengths by those of the weight below instead of the adapted one; how far off that is depends "
        "on the base weight",
        "plain",
    ),
    Row(
        w2_on_wrong_axes,
        "differently",
        "pairs the wrong axes of a whole w2 on a convolution over one or three dimensions",
        "flat w2",
        misplaced_alone,
    ),
)
"""What Forge took over."""

COMFYUI = Consumer(
    "comfyui",
    "ComfyUI",
    keys.COMFYUI,
    (
        Row(core_without_contiguous, "not at all", f"{KRON}, and leaves the layer out", "flat w2"),
        *SHARED,
        Row(all_of(is_a("diag-oft"), lengths), "differently", "leaves the lengths of OFT's rows out", "plain"),
        Row(
            limited_without_outputs,
            "differently",
            "takes the constraint of a rotation without multiplying it by the number of outputs; how far off that is "
            "depends on the base weight",
            "unlimited",
        ),
        Row(
            is_a("diag-oft", "boft"),
            "as trained",
            "turns the rows as trained; at another strength than 1 the strength counts twice",
        ),
    ),
)
