"""Whole files for small models of known families: what the runs of the programs were recorded over."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any

import diffusers
import torch
from torch import nn

from cases import ALGORITHMS
from lycoris import Full, LoRA, Norm
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms import Replace
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.errors import ConfigError
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import NamedLayout
from lycoris.layers.geometry import Geometry
from lycoris.models import outline

HEADS: Mapping[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
HUNYUANVIDEO: Mapping[str, Any] = {
    **HEADS,
    "in_channels": 4,
    "out_channels": 4,
    "num_layers": 1,
    "num_single_layers": 1,
    "num_refiner_layers": 1,
    "patch_size": 1,
    "patch_size_t": 1,
    "text_embed_dim": 24,
    "pooled_projection_dim": 20,
    "rope_axes_dim": (4, 6, 6),
}
MODELS: Mapping[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "flux1": (
        diffusers.FluxTransformer2DModel,
        HEADS
        | {"patch_size": 1, "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24}
        | {"pooled_projection_dim": 20, "guidance_embeds": True, "axes_dims_rope": (4, 6, 6)},
    ),
    "flux2": (
        diffusers.Flux2Transformer2DModel,
        HEADS
        | {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 24}
        | {"timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4)},
    ),
    "z-image": (
        diffusers.ZImageTransformer2DModel,
        {"dim": 64, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 32}
        | {"axes_dims": [8, 12, 12]},
    ),
    "qwen-image": (
        diffusers.QwenImageTransformer2DModel,
        HEADS
        | {"patch_size": 2, "in_channels": 16, "out_channels": 4, "num_layers": 1, "joint_attention_dim": 24}
        | {"axes_dims_rope": (4, 6, 6)},
    ),
    "wan": (
        diffusers.WanTransformer3DModel,
        HEADS
        | {"patch_size": (1, 2, 2), "in_channels": 4, "out_channels": 4, "text_dim": 24, "freq_dim": 16}
        | {"ffn_dim": 48, "num_layers": 1, "rope_max_seq_len": 32},
    ),
    "hunyuanvideo": (
        diffusers.HunyuanVideoTransformer3DModel,
        HUNYUANVIDEO | {"guidance_embeds": True},
    ),
    "framepack": (
        diffusers.HunyuanVideoFramepackTransformer3DModel,
        HUNYUANVIDEO
        | {"guidance_embeds": True, "has_image_proj": True, "image_proj_dim": 12}
        | {"has_clean_x_embedder": True},
    ),
    "hunyuanvideo-1.5": (
        diffusers.HunyuanVideo15Transformer3DModel,
        HEADS
        | {"in_channels": 65, "out_channels": 4, "num_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 24}
        | {"text_embed_2_dim": 20, "image_embed_dim": 12, "rope_axes_dim": (4, 6, 6)},
    ),
    "krea2": (
        diffusers.Krea2Transformer2DModel,
        HEADS
        | {"in_channels": 16, "num_layers": 1, "num_key_value_heads": 1, "intermediate_size": 48}
        | {"timestep_embed_dim": 16, "text_hidden_dim": 32, "num_text_layers": 2, "text_num_attention_heads": 2}
        | {"text_num_key_value_heads": 2, "text_intermediate_size": 40, "num_layerwise_text_blocks": 1}
        | {"num_refiner_text_blocks": 1, "axes_dims_rope": (4, 6, 6)},
    ),
    "kandinsky5": (
        diffusers.Kandinsky5Transformer3DModel,
        {"in_text_dim": 24, "in_text_dim2": 20, "time_dim": 16, "model_dim": 32, "ff_dim": 48}
        | {"num_text_blocks": 1, "num_visual_blocks": 1, "axes_dims": (4, 6, 6), "visual_cond": True},
    ),
    "ideogram4": (
        diffusers.Ideogram4Transformer2DModel,
        HEADS
        | {"in_channels": 16, "num_layers": 1, "intermediate_size": 48, "adaln_dim": 12, "llm_features_dim": 24}
        | {"mrope_section": (4, 2, 2)},
    ),
    "cosmos-predict2": (
        diffusers.CosmosTransformer3DModel,
        HEADS
        | {"in_channels": 4, "out_channels": 4, "num_layers": 1, "text_embed_dim": 24, "adaln_lora_dim": 8}
        | {"extra_pos_embed_type": None, "max_size": (8, 16, 16)},
    ),
    "sd1.5-unet": (
        diffusers.UNet2DConditionModel,
        {"sample_size": 8, "in_channels": 4, "out_channels": 4, "norm_num_groups": 8, "attention_head_dim": 8}
        | {"cross_attention_dim": 24, "layers_per_block": 1, "block_out_channels": (16, 32)}
        | {"down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D")}
        | {"up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")},
    ),
}
EQUAL, SMALL = LoRA(rank=4, alpha=4.0), LoRA(rank=4, alpha=1.0)


KNOWN = "known "
SMALLER = 32
"""By how much the layers of a known model are made smaller."""
SIZES = (
    "in_features",
    "out_features",
    "in_channels",
    "out_channels",
    "num_channels",
    "num_embeddings",
    "embedding_dim",
)


def small(size: int) -> int:
    return size // SMALLER if size % SMALLER == 0 and size > 64 else size


def shrunk(told: outline.Outline) -> dict[str, Any]:
    """An outline with smaller layers, and the first of blocks that are alike."""
    made: dict[str, Any] = {"class": told["class"]}
    if "layer" in told:
        base, own = told["layer"]
        sizes = {name: small(value) if name in SIZES else value for name, value in own.items()}
        if "normalized_shape" in own:
            sizes["normalized_shape"] = [small(size) for size in own["normalized_shape"]]
        if own.get("groups", 1) > 1:
            sizes["groups"] = small(own["groups"])
        if "num_groups" in own:
            sizes["num_groups"] = 1
        made["layer"] = [base, sizes]
    if "parameters" in told:
        made["parameters"] = {name: [*map(small, shape)] for name, shape in told["parameters"].items()}
    if "children" in told:
        made["children"] = {name.partition("..")[0]: shrunk(child) for name, child in told["children"].items()}
    return made


@lru_cache(maxsize=8)
def model_of(family: str) -> tuple[nn.Module, NamedLayout]:
    """A small model of a family, or an empty one made of a known model's outline, by the name of that, behind `KNOWN`
    where a family is called the same."""
    if family not in MODELS:
        empty = outline.build_model(shrunk(outline.load_outline(family.removeprefix(KNOWN))))
        return empty, NamedLayout.from_model(empty)
    torch.manual_seed(7)
    kind, options = MODELS[family]
    model = kind(**options).eval().requires_grad_(False)
    return model, NamedLayout.from_model(model)


def picks(family: str) -> Iterator[tuple[str, dict[str, tuple[Algorithm, ...]]]]:
    """What a file is like, and its layers with their algorithms."""
    _, layout = model_of(family)
    linear = [path for path, g in layout.layers.items() if g.kind == "linear"]
    inside = [path for path in linear if re.search(r"\.\d+\.", path)]
    for name in (
        "lora",
        "loha",
        "lokr",
        "lokr-both",
        "dora-lora",
        "dora-lora-in",
        "full",
        "oft",
        "glora",
        "ia3",
        "tlora",
    ):
        yield f"{name} in the blocks", dict.fromkeys(inside, (ALGORITHMS[name],))
    yield "alpha = rank in the blocks", dict.fromkeys(inside, (EQUAL,))
    yield "alpha = rank everywhere", dict.fromkeys(linear, (EQUAL,))
    yield "alpha = rank / 4 in the blocks", dict.fromkeys(inside, (SMALL,))
    yield "outside of the blocks", {path: (EQUAL,) for path in linear if path not in inside}
    yield "without keys", {path: (EQUAL,) for path in inside if not path.endswith(("to_k", "k_proj"))}
    for path in linear:
        if path not in inside:
            yield f"blocks and {path}", dict.fromkeys((*inside, path), (EQUAL,))
    trio = [ALGORITHMS[name] for name in ("lora", "loha", "lokr")]
    yield "three algorithms", {path: (trio[n % 3],) for n, path in enumerate(inside)}
    own = (EQUAL, Full(weight=False))
    yield "biases", {path: own if layout.layers[path].has_bias else own[:1] for path in inside}
    norms = {path: (Norm(),) for path, g in layout.layers.items() if g.kind == "norm"}
    yield "norms", norms
    yield "blocks and norms", dict.fromkeys(inside, (EQUAL,)) | norms


EVERYWHERE = (
    *("lora", "lora-tucker", "loha", "lokr", "lokr-full-matrix", "dora-lora", "dora-lora-in", "full", "full-bias"),
    *("glora", "oft", "boft", "ia3", "tlora", "norm", "replace", "replace-bias"),
)


def picks_everywhere(family: str) -> Iterator[tuple[str, dict[str, tuple[Algorithm, ...]]]]:
    """The same for programs that read each layer by itself: an algorithm on all layers that it fits."""
    _, layout = model_of(family)

    def where(*algorithms: Algorithm) -> dict[str, tuple[Algorithm, ...]]:
        return {path: algorithms for path, g in layout.layers.items() if all(_fits(each, g) for each in algorithms)}

    for name in EVERYWHERE:
        yield name, where(ALGORITHMS[name])
    yield "lora and diff_b", where(EQUAL, Full(weight=False))
    yield "lora and a whole bias", where(EQUAL, Replace(weight=False))
    yield "whole weight and diff_b", where(Replace(bias=False), Full(weight=False))
    yield "scale of 1/4", where(SMALL)
    yield (
        "three algorithms",
        {path: (ALGORITHMS[("lora", "loha", "lokr-full-matrix")[n % 3]],) for n, path in enumerate(where(SMALL))},
    )


def _fits(algorithm: Algorithm, g: Geometry) -> bool:
    try:
        algorithm.check(g)
        return bool(algorithm.slots(g))
    except ConfigError:
        return False


def bundle_of(family: str, chosen: Mapping[str, tuple[Algorithm, ...]]) -> Bundle:
    """Adapters with seeded numbers."""
    _, layout = model_of(family)
    generator = torch.Generator().manual_seed(0)
    entries: dict[str, tuple[Entry, ...]] = {}
    for path, algorithms in chosen.items():
        g = layout.layers[path]
        entries[path] = tuple(
            Entry(
                each,
                g,
                {
                    slot: torch.rand(g.stacked_shape(spec.shape), generator=generator) * 0.3 + 0.1
                    for slot, spec in each.slots(g).items()
                },
            )
            for each in algorithms
        )
    return Bundle(entries)


DIALECTS_ASKED = [name for name in DIALECTS if name not in ("peft", "processors")]
