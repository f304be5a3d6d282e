"""ComfyUI (trees of 2025 and 2026). What it cannot place or compute is a line in its log."""

from __future__ import annotations

from lycoris.files.programs import comfyui_keys
from lycoris.files.programs.adapter_conditions import (
    changes_any_bias,
    changes_only_bias,
    fits_both_glora_layouts,
    has_algorithm,
    has_dora,
    has_effective_limit,
    has_extra_entries,
    has_first_glora_layout,
    has_input_magnitude_of_one_row,
    has_kernel,
    has_old_rotation,
    has_other_algorithm,
    has_output_magnitude,
    has_row_magnitude,
    has_split_factors,
    has_strided_core,
    has_unread_core,
    has_unsplit_factors,
    has_up_bias,
    is_embedding,
    is_parameter,
    is_stack_of_one,
    is_stacked,
)
from lycoris.files.programs.common import CORES_ON_IMAGES, LONE_SHIFT_ROW, W2_AXES_ROW, make_core_rows
from lycoris.files.programs.conditions import (
    all_of,
    any_of,
    has_no_key,
    is_exchanged,
    is_for,
    is_in_rows,
    is_named,
    is_not_behind,
    is_not_written_as,
    is_renamed,
)
from lycoris.files.programs.errors import bias_share
from lycoris.files.programs.program import EXAMINED_TENSORS, Program, Row
from lycoris.files.programs.replacements import (
    changes_replaced,
    has_only_biases,
    replaces,
    replaces_bias,
    replaces_only_bias,
    replaces_weight,
)

KRON_FAILS = "contracts the core into a w2 that PyTorch's kron cannot use (seen with 2.13)"
EMBEDDING_ROWS = (
    Row(
        all_of(
            is_embedding,
            any_of(has_algorithm("glora", "diag-oft", "boft"), all_of(has_dora, has_other_algorithm("full"))),
        ),
        "not at all",
        "takes an embedding for a layer with as many outputs as entries, which the tensors do not fit",
        "dense",
    ),
    Row(
        all_of(is_embedding, has_other_algorithm("full", "replace")),
        "differently",
        "takes an embedding for a layer with as many outputs as entries, and lays the change out the other way round",
        "dense",
    ),
)
HELD_ROWS = (
    Row(
        all_of(is_in_rows, changes_only_bias),
        "not at all",
        "passes over a change of the bias of a layer that its model holds as rows of a larger one, or exchanged",
        "format",
    ),
    Row(
        has_up_bias,
        "differently",
        "looks for no bias of a LoRA's second factor; written as diff_b it does",
        "rewritten",
    ),
    Row(
        all_of(is_in_rows, changes_any_bias),
        "differently",
        "leaves out the change of the bias of a layer that its model holds as rows of a larger one, or exchanged",
        "format",
        bias_share,
    ),
    Row(
        all_of(is_exchanged, has_algorithm("glora", "diag-oft", "boft")),
        "differently",
        "takes the weight with its two halves exchanged for the one that was trained; how far off that is depends on "
        "the base weight",
        "format",
    ),
)
"""Layers that are not one layer of its model. Last of all: what an algorithm is taken for comes first."""
CORELESS_ROWS = (
    Row(
        all_of(has_unread_core, has_kernel),
        "not at all",
        "looks for no core next to factors of these names, and leaves the layer out",
        "no core",
    ),
    Row(has_unread_core, "differently", "looks for no core next to factors of these names", "no core"),
)
STOPPING_CORE_ROWS = tuple(row._replace(stops=True) for row in make_core_rows(f"{CORES_ON_IMAGES}, and stops"))
PARAMETER_ROW = Row(
    any_of(
        all_of(is_parameter, is_not_behind("diffusion_model.")),
        all_of(is_parameter, has_no_key, is_not_written_as("comfyui", "onetrainer-comfy", "musubi-other")),
    ),
    "not at all",
    "knows bare parameters by their own names behind diffusion_model. only",
    "format",
)
GLORA_KERNEL_ROW = Row(
    all_of(any_of(fits_both_glora_layouts, has_first_glora_layout), has_kernel),
    "not at all",
    "multiplies the weight of a GLoRA of the first layout, or of as many ranks as inputs and outputs, as a matrix, and "
    "fails on the kernel",
    "smaller",
)
_FORGOTTEN = "a bias in place of the layer's own, which it knows by its own names behind diffusion_model. only"
_NO_BIASES = any_of(is_renamed, is_not_behind("diffusion_model."))
REPLACEMENT_ROWS = (
    Row(
        all_of(replaces, changes_replaced),
        "differently",
        "puts a full weight or bias in place of what else there is for it",
        "joined",
    ),
    Row(
        all_of(replaces_weight, is_exchanged),
        "differently",
        "puts a full weight as it is where its model holds the two halves exchanged",
        "format",
    ),
    Row(
        all_of(replaces_bias, any_of(all_of(is_in_rows, has_only_biases), all_of(_NO_BIASES, replaces_only_bias))),
        "not at all",
        f"passes over {_FORGOTTEN}",
        "format",
    ),
    Row(all_of(replaces_bias, _NO_BIASES), "differently", f"leaves out {_FORGOTTEN}", "format"),
    Row(
        all_of(has_algorithm("replace"), is_in_rows, has_extra_entries),
        "differently",
        "leaves out the change of the bias of a layer that its model holds as rows of a larger one, or exchanged",
        "format",
    ),
    PARAMETER_ROW,
    Row(
        has_algorithm("replace"),
        "as trained",
        "puts full weights and biases in place of the own ones, at strengths other than 1 too",
    ),
)
"""Full weights and biases. One next to another algorithm is judged by the rows of that."""
STACK_ROW = Row(
    all_of(is_stacked, has_algorithm("lora", "loha", "lokr", "glora")),
    "not at all",
    "multiplies two matrices and no stacks of them, and fails on the layer",
    "dense",
)
IS_MODULATION = all_of(is_for("krea2"), is_named(r"diffusion_model\.blocks\.\d+\.mod\.lin"))
"""A bare parameter that its model keeps as one line of numbers, and adapters as rows."""
MODULATION_ROWS = (
    Row(
        all_of(IS_MODULATION, replaces_weight),
        "not at all",
        "keeps this parameter in another shape than a full weight has, and stops",
        "lora",
        stops=True,
    ),
    Row(
        all_of(IS_MODULATION, any_of(has_dora, has_algorithm("full", "glora", "diag-oft", "boft"))),
        "not at all",
        "keeps this parameter in another shape, and leaves the layer out",
        "lora",
    ),
)
IS_UNSPLIT_LOKR_STACK = all_of(is_stacked, is_stack_of_one, has_algorithm("lokr"), has_unsplit_factors)
"""Kronecker products of whole factors, each a stack of one matrix."""
STACK_ROWS = (
    Row(
        all_of(is_stacked, any_of(has_algorithm("loha", "glora"), all_of(has_algorithm("lokr"), has_split_factors))),
        "not at all",
        "multiplies two matrices and no stacks of them, and stops",
        "dense",
        stops=True,
    ),
    Row(
        all_of(IS_UNSPLIT_LOKR_STACK, has_dora),
        "differently",
        "takes DoRA's magnitude for that of a stack of one; how far off that is depends on the base weight",
        "dense",
    ),
    Row(IS_UNSPLIT_LOKR_STACK, "as trained", "computes what was trained"),
    Row(
        all_of(is_stacked, has_algorithm("diag-oft", "boft")),
        "not at all",
        "rotates matrices and no stacks of them, and leaves the layer out",
        "dense",
    ),
)
SHARED_ROWS = (
    PARAMETER_ROW,
    Row(has_algorithm("tlora"), "not at all", "knows no T-LoRA, and passes its keys over", "smaller"),
    Row(has_algorithm("ia3"), "not at all", "knows no IA3, and passes its keys over", "smaller"),
    STACK_ROW,
    GLORA_KERNEL_ROW,
    Row(
        fits_both_glora_layouts,
        "differently",
        "takes a GLoRA of as many ranks as inputs and outputs for one of its first layout; how far off that is depends "
        "on the base weight",
        "smaller",
    ),
    *EMBEDDING_ROWS,
    *CORELESS_ROWS,
    Row(
        all_of(has_dora, has_algorithm("full")),
        "differently",
        "applies the difference and ignores DoRA's magnitude",
        "smaller",
    ),
    Row(
        has_output_magnitude,
        "differently",
        "divides DoRA's magnitude by the norms of the base weight instead of the adapted one; how far off "
        "that is depends on the base weight",
        "smaller",
    ),
    Row(
        has_input_magnitude_of_one_row,
        "differently",
        "takes DoRA's magnitude of the columns for that of the one row; how far off that is depends on the base weight",
        "smaller",
    ),
    W2_AXES_ROW,
    LONE_SHIFT_ROW,
    *HELD_ROWS,
)
"""What Forge took over."""
FAILING_ROWS = (STACK_ROW, GLORA_KERNEL_ROW, EMBEDDING_ROWS[0], CORELESS_ROWS[0])
"""Of these, what it cannot compute: a line in ComfyUI's log, an error in Forge."""

COMFYUI_PROGRAM = Program(
    "comfyui",
    "ComfyUI",
    comfyui_keys.COMFYUI_KEYS,
    (
        *MODULATION_ROWS,
        *REPLACEMENT_ROWS,
        *STACK_ROWS,
        *CORELESS_ROWS,
        *STOPPING_CORE_ROWS,
        Row(has_strided_core, "not at all", f"{KRON_FAILS}, and leaves the layer out", "flat w2"),
        *SHARED_ROWS,
        Row(has_old_rotation, "not at all", "knows no oft_diag, and passes it over", "rewritten"),
        Row(
            all_of(has_algorithm("diag-oft"), has_row_magnitude),
            "differently",
            "ignores the magnitude of OFT's rows",
            "smaller",
        ),
        Row(
            has_effective_limit,
            "differently",
            "takes the constraint of a rotation without multiplying it by the number of outputs; how far off that is "
            "depends on the base weight",
            "unlimited",
        ),
        Row(
            has_algorithm("diag-oft", "boft"),
            "as trained",
            "rotates the rows as trained; at strengths other than 1 the strength counts twice",
        ),
    ),
    kinds=("linear", "conv", "norm", "embedding", "parameter"),
    examined_tensors=EXAMINED_TENSORS | {"set_weight", "bias.set_weight"},
    by_naming=comfyui_keys.find_known,
    take_tensors=comfyui_keys.take_by_comfyui,
    missing_architectures=comfyui_keys.MISSING_MODELS,
    supports_replacement=True,
    native_dialect="comfyui",
)
