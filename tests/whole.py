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
from lycoris.algorithm import Algorithm
from lycoris.bundle import Bundle, Entry
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import Layout

HEADS: Mapping[str, Any] = {"attention_head_dim": 16, "num_attention_heads": 2}
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
}
EQUAL, SMALL = LoRA(rank=4, alpha=4.0), LoRA(rank=4, alpha=1.0)


@lru_cache(maxsize=8)
def model_of(family: str) -> tuple[nn.Module, Layout]:
    torch.manual_seed(7)
    kind, options = MODELS[family]
    model = kind(**options).eval().requires_grad_(False)
    return model, Layout.of(model)


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
                {slot: torch.rand(spec.shape, generator=generator) * 0.3 + 0.1 for slot, spec in each.slots(g).items()},
            )
            for each in algorithms
        )
    return Bundle(entries)


DIALECTS_ASKED = [name for name in DIALECTS if name not in ("peft", "processors")]
