"""The WebUI of AUTOMATIC1111 (1.10). A layer that it cannot read costs the whole file."""

from __future__ import annotations

from lycoris.files.consumers import keys
from lycoris.files.consumers.consumer import Consumer, Row
from lycoris.files.consumers.shared import IA3_ON_CONVOLUTIONS, LENGTHS_OF_COLUMNS, WITHOUT_BIAS, cores
from lycoris.files.consumers.traits import (
    all_of,
    any_bias,
    bias_share,
    called,
    embedding,
    first_layout,
    half_norm,
    is_a,
    linear,
    lone_bias,
    of_both_layouts,
    off_pictures,
    pointwise,
    unscaled,
    w2_on_wrong_axes,
)

WEBUI = Consumer(
    "webui",
    "WebUI",
    keys.WEBUI,
    (
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
        Row(all_of(first_layout, linear, unscaled), "as trained", "computes what was trained"),
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
        LENGTHS_OF_COLUMNS,
        Row(
            all_of(called(r"lora_te2_.*_self_attn_[qkv]_proj"), any_bias),
            "differently",
            "leaves out changes of the bias of queries, keys and values in this text encoder",
            None,
            bias_share,
        ),
        Row(
            all_of(called(r"lora_te_.*_self_attn_[qkv]_proj"), any_bias),
            "not known",
            "leaves out changes of the bias of queries, keys and values in SD 2's text encoder, and not in SD 1's",
        ),
        WITHOUT_BIAS,
    ),
    kinds=("linear", "conv", "norm", "embedding"),
)
