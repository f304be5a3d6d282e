"""ComfyUI (trees of 2025 and 2026). What it cannot place or compute is a line in its log."""

from __future__ import annotations

from lycoris.files.programs import comfyui_keys
from lycoris.files.programs.common import CORES, LONE_SHIFT, W2_ON_WRONG_AXES, cores
from lycoris.files.programs.conditions import (
    all_of,
    any_bias,
    any_of,
    beside,
    bias_only,
    core_without_contiguous,
    dora,
    dora_of_one_row,
    dora_out,
    embedding,
    first_layout,
    in_rows,
    is_a,
    is_exchanged,
    is_named,
    is_renamed,
    is_stacked,
    kernel,
    lengths,
    limited_without_outputs,
    nameless,
    no_other_than,
    not_behind,
    not_written_as,
    of_both_layouts,
    old_rotation,
    on,
    one_of_a_stack,
    parameter,
    split_factors,
    up_bias,
    whole_factors,
    without_mid,
)
from lycoris.files.programs.errors import bias_share
from lycoris.files.programs.program import NAMES, Program, Row
from lycoris.files.programs.replacements import (
    biases_only,
    changes_replaced,
    nothing_else,
    replaces,
    replaces_bias,
    replaces_weight,
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
        all_of(embedding, no_other_than("full", "replace")),
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
        all_of(is_exchanged, is_a("glora", "diag-oft", "boft")),
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
    any_of(
        all_of(parameter, not_behind("diffusion_model.")),
        all_of(parameter, nameless, not_written_as("comfyui", "onetrainer-comfy", "musubi-other")),
    ),
    "not at all",
    "knows bare parameters by their own names behind diffusion_model. only",
    "format",
)
FIRST_LAYOUT_ON_KERNELS = Row(
    all_of(any_of(of_both_layouts, first_layout), kernel),
    "not at all",
    "multiplies the weight of a GLoRA of the first layout, or of as many ranks as inputs and outputs, as a matrix, and "
    "fails on the kernel",
    "plain",
)
REPLACED = Row(replaces, "not known", "reads a set_weight, and what it makes of one was not looked at")
_FORGOTTEN = "a bias in place of the layer's own, which it knows by its own names behind diffusion_model. only"
_NO_BIASES = any_of(is_renamed, not_behind("diffusion_model."))
REPLACEMENTS = (
    Row(
        all_of(replaces, changes_replaced),
        "differently",
        "puts a whole weight or bias in place of what else there is for it",
        "joined",
    ),
    Row(
        all_of(replaces_weight, is_exchanged),
        "differently",
        "puts a whole weight as it is where its model holds the two halves exchanged",
        "format",
    ),
    Row(
        all_of(replaces_bias, any_of(all_of(in_rows, biases_only), all_of(_NO_BIASES, nothing_else))),
        "not at all",
        f"passes over {_FORGOTTEN}",
        "format",
    ),
    Row(all_of(replaces_bias, _NO_BIASES), "differently", f"leaves out {_FORGOTTEN}", "format"),
    Row(
        all_of(is_a("replace"), in_rows, beside),
        "differently",
        "leaves out the change of the bias of a layer that its model holds as rows of a larger one, or exchanged",
        "format",
    ),
    OWN_NAMES,
    Row(
        is_a("replace"),
        "as trained",
        "puts whole weights and biases in place of the own ones, at another strength than 1 too",
    ),
)
"""Whole weights and biases. One beside another algorithm is judged by the rows of that."""
STACKS = Row(
    all_of(is_stacked, is_a("lora", "loha", "lokr", "glora")),
    "not at all",
    "multiplies two matrices and no stacks of them, and fails on the layer",
    "dense",
)
LINE = all_of(on("krea2"), is_named(r"diffusion_model\.blocks\.\d+\.mod\.lin"))
"""A bare parameter that its model keeps as one line of numbers, and adapters as rows."""
LINES = (
    Row(
        all_of(LINE, replaces_weight),
        "not at all",
        "keeps this parameter in another shape than a whole weight has, and stops",
        "lora",
        stops=True,
    ),
    Row(
        all_of(LINE, any_of(dora, is_a("full", "glora", "diag-oft", "boft"))),
        "not at all",
        "keeps this parameter in another shape, and leaves the layer out",
        "lora",
    ),
)
ONE_WHOLE = all_of(is_stacked, one_of_a_stack, is_a("lokr"), whole_factors)
"""Kronecker products of whole factors, each a stack of one matrix."""
STACKED = (
    Row(
        all_of(is_stacked, any_of(is_a("loha", "glora"), all_of(is_a("lokr"), split_factors))),
        "not at all",
        "multiplies two matrices and no stacks of them, and stops",
        "dense",
        stops=True,
    ),
    Row(
        all_of(ONE_WHOLE, dora),
        "differently",
        "takes DoRA's lengths for those of a stack of one; how far off that is depends on the base weight",
        "dense",
    ),
    Row(ONE_WHOLE, "as trained", "computes what was trained"),
    Row(
        all_of(is_stacked, is_a("diag-oft", "boft")),
        "not at all",
        "turns matrices and no stacks of them, and leaves the layer out",
        "dense",
    ),
)
SHARED = (
    OWN_NAMES,
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

COMFYUI = Program(
    "comfyui",
    "ComfyUI",
    comfyui_keys.KEYS,
    (
        *LINES,
        *REPLACEMENTS,
        *STACKED,
        *WITHOUT_MID,
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
    names=NAMES | {"set_weight", "bias.set_weight"},
    by_naming=comfyui_keys.find_known,
    takes=comfyui_keys.takes,
    lacks=comfyui_keys.LACKS,
    replaces=True,
    own="comfyui",
)
