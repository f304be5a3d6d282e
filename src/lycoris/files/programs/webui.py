"""The WebUI of AUTOMATIC1111 (1.10). A layer that it cannot read costs the whole file."""

from __future__ import annotations

from collections.abc import Collection

from lycoris.adapters.load_report import some
from lycoris.files.programs import keys
from lycoris.files.programs.common import IA3_ON_CONVOLUTIONS, LENGTHS_OF_COLUMNS, WITHOUT_BIAS, cores
from lycoris.files.programs.conditions import (
    all_of,
    any_bias,
    any_of,
    dora_in,
    embedding,
    first_layout,
    flat_lengths,
    half_norm,
    has_no_scale,
    is_a,
    is_modelled_as,
    is_named,
    linear,
    lone_bias,
    not_,
    of_both_layouts,
    off_pictures,
    pointwise,
    scaled_by_itself,
    square,
    w2_on_wrong_axes,
)
from lycoris.files.programs.errors import bias_share
from lycoris.files.programs.program import ASKED, NAMES, Case, Program, Row
from lycoris.files.programs.replacements import changes_weight, replaces
from lycoris.files.programs.taking import by_webui

_QKV = r".*_self_attn_[qkv]_proj"
_QKV_OF_TE = rf"lora_te_{_QKV}"
BUNDLED = "bundle_emb"
KNOWN_EMBEDDINGS = frozenset({"clip_g", "clip_l"})


def _misfits(case: Case) -> bool:
    """Lengths as a vector where they do not broadcast over the columns."""
    return flat_lengths(case) and not (linear(case) and (dora_in(case) or square(case)))


def why_rejected(names: Collection[str], architecture: str | None) -> str:
    """Why it rejects a file by the names of its tensors; "" where it does not."""
    if architecture == "sd3" and (short := sorted(name for name in names if name.count(".") < 2)):
        return f"takes the last two dots of a name of SD 3's for its tensor, and rejects the file for {some(short)}"
    embeddings: dict[str, set[str]] = {}
    for name in names:
        first, _, rest = name.partition(".")
        if first == BUNDLED:
            word, dot, vector = rest.partition(".")
            if not dot:
                return f"knows embeddings of a word by two names, and rejects the file for {name}"
            embeddings.setdefault(word, set()).add(vector.partition(".")[0])
    for word, vectors in embeddings.items():
        if not (len(vectors) == 1 or "string_to_param" in vectors or vectors >= KNOWN_EMBEDDINGS):
            return f"knows no embedding of {some(sorted(vectors))}, and rejects the file for {word}"
    return ""


WEBUI = Program(
    "webui",
    "WebUI",
    keys.WEBUI,
    (
        Row(
            all_of(replaces, embedding),
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
            all_of(embedding, is_a("lora", "diag-oft", "boft", "tlora")),
            "not at all",
            "cannot make such an adapter of an embedding, and rejects the file",
            stops=True,
        ),
        Row(embedding, "not at all", "has no adapters for embeddings, and passes them over"),
        Row(is_a("tlora"), "not at all", "knows no T-LoRA, and rejects the file", "plain", stops=True),
        Row(
            all_of(of_both_layouts, pointwise),
            "differently",
            "takes a GLoRA of as many ranks as inputs and outputs for one of its first layout, and leaves its scale "
            "out; how far off that is depends on the base weight",
            "plain",
        ),
        Row(
            all_of(first_layout, linear, any_of(has_no_scale, scaled_by_itself)),
            "as trained",
            "computes what was trained",
        ),
        Row(
            all_of(first_layout, linear),
            "differently",
            "leaves the scale of a GLoRA of the first layout out; how far off that is depends on the base weight",
            "plain",
        ),
        Row(is_a("glora"), "not at all", "reads GLoRA's tensors in another layout, and leaves the layer out", "plain"),
        Row(lone_bias, "not at all", "knows no diff_b without diff, and rejects the file", "both diffs", stops=True),
        Row(
            half_norm,
            "not at all",
            "knows no w_norm without b_norm, nor the other way round, and rejects the file",
            "both norms",
            stops=True,
        ),
        *IA3_ON_CONVOLUTIONS,
        Row(
            all_of(is_a("lora"), off_pictures),
            "not at all",
            "takes LoRA on linear layers and convolutions over two dimensions only, and rejects the file",
            "dense",
            stops=True,
        ),
        *cores("takes cores on convolutions over two dimensions only, and leaves the layer out"),
        Row(
            w2_on_wrong_axes,
            "not at all",
            "cannot give a whole w2 the shape of a convolution over one or three dimensions, and leaves the layer out",
            "flat w2",
        ),
        Row(
            _misfits,
            "not at all",
            "cannot divide lengths of DoRA that are a vector there, and leaves the layer out",
            "anew",
        ),
        LENGTHS_OF_COLUMNS,
        Row(
            all_of(
                any_of(is_named(rf"lora_te2_{_QKV}"), all_of(is_named(_QKV_OF_TE), is_modelled_as("openclip-h"))),
                any_bias,
            ),
            "differently",
            "leaves out changes of the bias of queries, keys and values in this text encoder",
            None,
            bias_share,
        ),
        Row(
            all_of(is_named(_QKV_OF_TE), not_(is_modelled_as("clip-l")), any_bias),
            "not known",
            "leaves out changes of the bias of queries, keys and values in SD 2's text encoder, and not in SD 1's",
        ),
        WITHOUT_BIAS,
    ),
    kinds=("linear", "conv", "norm", "embedding"),
    asked=ASKED | {"replace"},
    names=NAMES | {"scale", "set_weight", "bias.set_weight"},
    replaces=True,
    takes=by_webui,
    refuses=why_rejected,
)
