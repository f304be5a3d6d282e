"""ComfyUI (trees of 2025 and 2026). What it cannot place or compute is a line in its log."""

from __future__ import annotations

from lycoris.files.consumers import comfyui_keys
from lycoris.files.consumers.consumer import Consumer, Row
from lycoris.files.consumers.shared import CORES, LONE_SHIFT, W2_ON_WRONG_AXES, cores
from lycoris.files.consumers.traits import (
    all_of,
    any_bias,
    any_of,
    bias_only,
    bias_share,
    core_without_contiguous,
    dora,
    dora_of_one_row,
    dora_out,
    embedding,
    exchanged,
    in_rows,
    is_a,
    kernel,
    lengths,
    limited_without_outputs,
    no_other_than,
    not_written_as,
    of_both_layouts,
    old_rotation,
    parameter,
    replaces,
    stacked,
    up_bias,
    without_mid,
)

KRON = "contracts the core into a w2 that PyTorch's kron cannot use (seen with 2.13)"
EMBEDDINGS = (
    Row(
        all_of(embedding, any_of(is_a("glora", "diag-oft", "boft"), all_of(dora, no_other_than("full")))),
        "not at all",
        "takes an embedding for a layer with as many outputs as entries, which the tensors do not fit",
        "dense",
    ),
    Row(
        all_of(embedding, no_other_than("full")),
        "differently",
        "takes an embedding for a layer with as many outputs as entries, and lays the change out the other way round",
        "dense",
    ),
)
PLACES = (
    Row(
        all_of(in_rows, bias_only),
        "not at all",
        "passes over a change of the bias of a layer that its model holds as rows of a larger one, or exchanged",
        "format",
    ),
    Row(
        up_bias,
        "differently",
        "looks for no bias of a LoRA's second factor; written as diff_b it does",
        "anew",
    ),
    Row(
        all_of(in_rows, any_bias),
        "differently",
        "leaves out the change of the bias of a layer that its model holds as rows of a larger one, or exchanged",
        "format",
        bias_share,
    ),
    Row(
        all_of(exchanged, is_a("glora", "diag-oft", "boft")),
        "differently",
        "takes the weight with its two halves exchanged for the one that was trained; how far off that is depends on "
        "the base weight",
        "format",
    ),
)
"""Layers that are not one layer of its model. Last of all: what an algorithm is taken for comes first."""
WITHOUT_MID = (
    Row(
        all_of(without_mid, kernel),
        "not at all",
        "looks for no core beside factors of these names, and leaves the layer out",
        "no core",
    ),
    Row(without_mid, "differently", "looks for no core beside factors of these names", "no core"),
)
STOPPED = tuple(row._replace(stops=True) for row in cores(f"{CORES}, and stops"))
OWN_NAMES = Row(
    all_of(parameter, not_written_as("comfyui", "onetrainer-comfy", "musubi-other")),
    "not at all",
    "knows bare parameters by their own names behind diffusion_model. only",
    "format",
)
FIRST_LAYOUT_ON_KERNELS = Row(
    all_of(of_both_layouts, kernel),
    "not at all",
    "takes a GLoRA of as many ranks as inputs and outputs for one of its first layout, and fails on the kernel",
    "plain",
)
REPLACED = Row(replaces, "not known", "reads a set_weight, and what it makes of one was not looked at")
STACKS = Row(
    all_of(stacked, is_a("lora", "loha", "lokr", "glora")),
    "not at all",
    "multiplies two matrices and no stacks of them, and fails on the layer",
    "dense",
)
SHARED = (
    OWN_NAMES,
    Row(
        all_of(parameter, is_a("diag-oft", "boft")),
        "not known",
        "keeps some bare parameters in a shape of its own, of which rotations may not fit the rows",
    ),
    Row(is_a("tlora"), "not at all", "knows no T-LoRA, and passes its keys over", "plain"),
    Row(is_a("ia3"), "not at all", "knows no IA3, and passes its keys over", "plain"),
    STACKS,
    FIRST_LAYOUT_ON_KERNELS,
    Row(
        of_both_layouts,
        "differently",
        "takes a GLoRA of as many ranks as inputs and outputs for one of its first layout; how far off that is depends "
        "on the base weight",
        "plain",
    ),
    *EMBEDDINGS,
    *WITHOUT_MID,
    Row(all_of(dora, is_a("full")), "differently", "takes the difference and leaves DoRA's lengths out", "plain"),
    Row(
        dora_out,
        "differently",
        "divides DoRA's lengths by those of the weight below instead of the adapted one; how far off that is depends "
        "on the base weight",
        "plain",
    ),
    Row(
        dora_of_one_row,
        "differently",
        "takes DoRA's magnitude of the columns for that of the one row; how far off that is depends on the base weight",
        "plain",
    ),
    W2_ON_WRONG_AXES,
    LONE_SHIFT,
    *PLACES,
)
"""What Forge took over."""
FAILING = (STACKS, FIRST_LAYOUT_ON_KERNELS, EMBEDDINGS[0], WITHOUT_MID[0])
"""Of these, what it cannot compute: a line in ComfyUI's log, an error in Forge."""

COMFYUI = Consumer(
    "comfyui",
    "ComfyUI",
    comfyui_keys.KEYS,
    (
        REPLACED,
        *STOPPED,
        Row(core_without_contiguous, "not at all", f"{KRON}, and leaves the layer out", "flat w2"),
        *SHARED,
        Row(old_rotation, "not at all", "knows no oft_diag, and passes it over", "anew"),
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
    kinds=("linear", "conv", "norm", "embedding", "parameter"),
    by_naming=comfyui_keys.known,
    lacks=comfyui_keys.LACKS,
    replaces=True,
    own="comfyui",
)
