"""The WebUI of AUTOMATIC1111 (1.10). A layer that it cannot read makes it reject the file."""

from __future__ import annotations

from collections.abc import Collection

from lycoris.adapters.load_report import some
from lycoris.files.programs import keys
from lycoris.files.programs.adapter_conditions import (
    changes_any_bias,
    fits_both_glora_layouts,
    has_algorithm,
    has_first_glora_layout,
    has_flat_magnitude,
    has_half_norm,
    has_input_magnitude,
    has_lone_bias,
    has_misplaced_w2,
    has_no_scale,
    has_scale_tensor,
    is_embedding,
    is_linear,
    is_not_2d,
    is_pointwise,
    is_square,
)
from lycoris.files.programs.common import COLUMN_MAGNITUDE_ROW, EXTRA_BIAS_ROW, IA3_CONVOLUTION_ROWS, make_core_rows
from lycoris.files.programs.conditions import all_of, any_of, is_modeled_as, is_named, not_
from lycoris.files.programs.errors import bias_share
from lycoris.files.programs.program import EXAMINED_ALGORITHMS, EXAMINED_TENSORS, Case, Program, Row
from lycoris.files.programs.replacements import changes_weight, replaces
from lycoris.files.programs.taking import take_by_webui

_QKV = r".*_self_attn_[qkv]_proj"
_QKV_OF_TE = rf"lora_te_{_QKV}"
BUNDLED_PREFIX = "bundle_emb"
KNOWN_EMBEDDINGS = frozenset({"clip_g", "clip_l"})


def _has_webui_unusable_magnitude(case: Case) -> bool:
    """Lengths as a vector where they do not broadcast over the columns."""
    return has_flat_magnitude(case) and not (is_linear(case) and (has_input_magnitude(case) or is_square(case)))


def explain_rejection(names: Collection[str], architecture: str | None) -> str:
    """Return why WebUI rejects a file by the names of its tensors, as the end of a sentence; "" if it does not.

    `architecture` is the denoiser's; None: not known.
    """
    if architecture == "sd3" and (short := sorted(name for name in names if name.count(".") < 2)):
        return f"takes the last two dots of a name of SD 3's for its tensor, and rejects the file for {some(short)}"
    embeddings: dict[str, set[str]] = {}
    for name in names:
        first, _, rest = name.partition(".")
        if first == BUNDLED_PREFIX:
            word, dot, vector = rest.partition(".")
            if not dot:
                return f"knows embeddings of a word by two names, and rejects the file for {name}"
            embeddings.setdefault(word, set()).add(vector.partition(".")[0])
    for word, vectors in embeddings.items():
        if not (len(vectors) == 1 or "string_to_param" in vectors or vectors >= KNOWN_EMBEDDINGS):
            return f"knows no embedding of {some(sorted(vectors))}, and rejects the file for {word}"
    return ""


WEBUI_PROGRAM = Program(
    "webui",
    "WebUI",
    keys.WEBUI_KEYS,
    (
        Row(
            all_of(replaces, is_embedding),
            "not at all",
            "knows no weight in place of a layer's own, nor embeddings, and rejects the file",
            stops=True,
        ),
        Row(
            all_of(replaces, not_(changes_weight)),
            "not at all",
            "knows no weight or bias in place of a layer's own, and rejects the file",
            "joined",
            stops=True,
        ),
        Row(replaces, "differently", "leaves out a weight or bias in place of the layer's own", "joined"),
        Row(
            all_of(is_embedding, has_algorithm("lora", "diag-oft", "boft", "tlora")),
            "not at all",
            "cannot make such an adapter of an embedding, and rejects the file",
            stops=True,
        ),
        Row(is_embedding, "not at all", "has no adapters for embeddings, and passes them over"),
        Row(has_algorithm("tlora"), "not at all", "knows no T-LoRA, and rejects the file", "smaller", stops=True),
        Row(
            all_of(fits_both_glora_layouts, is_pointwise),
            "differently",
            "takes a GLoRA of as many ranks as inputs and outputs for one of its first layout, and leaves its scale "
            "out; how far off that is depends on the base weight",
            "smaller",
        ),
        Row(
            all_of(has_first_glora_layout, is_linear, any_of(has_no_scale, has_scale_tensor)),
            "as trained",
            "computes what was trained",
        ),
        Row(
            all_of(has_first_glora_layout, is_linear),
            "differently",
            "leaves the scale of a GLoRA of the first layout out; how far off that is depends on the base weight",
            "smaller",
        ),
        Row(
            has_algorithm("glora"),
            "not at all",
            "reads GLoRA's tensors in another layout, and leaves the layer out",
            "smaller",
        ),
        Row(
            has_lone_bias, "not at all", "knows no diff_b without diff, and rejects the file", "both diffs", stops=True
        ),
        Row(
            has_half_norm,
            "not at all",
            "knows no w_norm without b_norm, nor the other way round, and rejects the file",
            "both norms",
            stops=True,
        ),
        *IA3_CONVOLUTION_ROWS,
        Row(
            all_of(has_algorithm("lora"), is_not_2d),
            "not at all",
            "takes LoRA on linear layers and convolutions over two dimensions only, and rejects the file",
            "dense",
            stops=True,
        ),
        *make_core_rows("takes cores on convolutions over two dimensions only, and leaves the layer out"),
        Row(
            has_misplaced_w2,
            "not at all",
            "cannot give an unsplit w2 the shape of a one- or three-dimensional convolution, and leaves the layer out",
            "flat w2",
        ),
        Row(
            _has_webui_unusable_magnitude,
            "not at all",
            "cannot divide a DoRA magnitude that is a vector there, and leaves the layer out",
            "rewritten",
        ),
        COLUMN_MAGNITUDE_ROW,
        Row(
            all_of(
                any_of(is_named(rf"lora_te2_{_QKV}"), all_of(is_named(_QKV_OF_TE), is_modeled_as("openclip-h"))),
                changes_any_bias,
            ),
            "differently",
            "leaves out changes of the bias of queries, keys and values in this text encoder",
            None,
            bias_share,
        ),
        Row(
            all_of(is_named(_QKV_OF_TE), not_(is_modeled_as("clip-l")), changes_any_bias),
            "not known",
            "leaves out changes of the bias of queries, keys and values in SD 2's text encoder, and not in SD 1's",
        ),
        EXTRA_BIAS_ROW,
    ),
    kinds=("linear", "conv", "norm", "embedding"),
    examined_algorithms=EXAMINED_ALGORITHMS | {"replace"},
    examined_tensors=EXAMINED_TENSORS | {"scale", "set_weight", "bias.set_weight"},
    supports_replacement=True,
    take_tensors=take_by_webui,
    explain_rejection=explain_rejection,
)
