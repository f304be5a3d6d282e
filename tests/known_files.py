"""Whole files of known models, small ones: what Forge's and the WebUI's runs were recorded over.

Layers are called as in diffusers, and written as each format calls them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor

from cases import ALGORITHMS
from lycoris import Full, LoRA, Norm, Replace
from lycoris.adapters.bundle import Bundle
from lycoris.algorithms.base import Algorithm, Entry
from lycoris.errors import ConfigError
from lycoris.files.dialects import DIALECTS
from lycoris.files.layout import NamedLayout
from lycoris.files.writing import EncodedFile, compose
from lycoris.models.families import ARCHITECTURES, FAMILIES

UNET = (
    "conv_in",
    "time_embedding.linear_1",
    "down_blocks.1.resnets.0.norm1",
    "down_blocks.1.resnets.0.time_emb_proj",
    *(f"down_blocks.1.attentions.0.transformer_blocks.0.attn1.{each}" for each in ("to_q", "to_k", "to_v", "to_out.0")),
    "down_blocks.1.attentions.0.transformer_blocks.0.norm1",
    "conv_norm_out",
    "conv_out",
)
FLUX = (
    *("x_embedder", "proj_out"),
    *(f"transformer_blocks.0.attn.{each}" for each in ("to_q", "to_k", "to_v", "norm_q", "add_q_proj")),
    "single_transformer_blocks.0.attn.norm_k",
)
MMDIT = ("context_embedder", *(f"transformer_blocks.0.attn.{each}" for each in ("to_q", "to_k", "to_v", "to_out.0")))
CLIP = tuple(
    f"text_model.encoder.layers.0.{each}"
    for each in (*(f"self_attn.{one}_proj" for one in ("q", "k", "v", "out")), "mlp.fc1", "layer_norm1")
)
FILES: Mapping[str, Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "sd1.5": {"": ("sd-1.5", UNET), "text_encoder": ("clip-l", CLIP)},
    "sd2": {"": ("sd-2.1", UNET), "text_encoder": ("openclip-h", CLIP)},
    "sdxl": {"": ("sdxl", UNET), "text_encoder": ("clip-l", CLIP), "text_encoder_2": ("clip-bigg", CLIP)},
    "sd3": {"": ("sd3-medium", MMDIT), "text_encoder_2": ("clip-bigg", CLIP)},
    "flux1": {
        "": ("flux.1-dev", (*FLUX, "time_text_embed.timestep_embedder.linear_1")),
        "text_encoder": ("clip-l", CLIP),
    },
    "chroma": {"": ("chroma1-hd", (*FLUX, "distilled_guidance_layer.in_proj", "distilled_guidance_layer.norms.0"))},
}
"""Family → component → known model, and some of its layers."""
SINGLE = ("lora", "loha", "lokr", "lokr-both", "dora-lora", "dora-lora-in", "glora", "ia3", "oft", "boft", "tlora")
EQUAL = LoRA(rank=2, alpha=2.0)
Chosen = dict[str, dict[str, tuple[Algorithm, ...]]]


def picks(family: str) -> Iterator[tuple[str, Chosen]]:
    """What a file is like, and its layers with their algorithms."""
    denoiser, encoders = FILES[family][""][1], {of: own[1] for of, own in FILES[family].items() if of}
    small = [name for name in denoiser if "attn" not in name or "norm" in name]
    norms = [name for name in denoiser if "norm" in name]
    matrices = [name for name in denoiser if "norm" not in name]
    for name in SINGLE:
        yield name, {"": dict.fromkeys(matrices, (ALGORITHMS[name],))}
    attention = [name for name in matrices if name.endswith(("to_q", "to_v"))]
    yield "queries and values", {"": dict.fromkeys(attention, (ALGORITHMS["lora"],))}
    yield "norms", {"": dict.fromkeys(norms, (Norm(),)) | dict.fromkeys(attention, (EQUAL,))}
    yield "whole differences", {"": dict.fromkeys(small, (Full(),))}
    yield "biases", {"": dict.fromkeys(denoiser, (Full(weight=False),))}
    yield "biases beside", {"": dict.fromkeys(matrices, (EQUAL, Full(weight=False)))}
    yield "replaced", {"": dict.fromkeys(small, (Replace(),))}
    yield "replaced beside", {"": {name: (Replace(bias=False), EQUAL) for name in small}}
    trio = [ALGORITHMS[name] for name in ("lora", "loha", "lokr")]
    yield "three algorithms", {"": {name: (trio[n % 3],) for n, name in enumerate(matrices)}}
    yield "a rotation among them", {"": dict.fromkeys(matrices, (EQUAL,)) | {matrices[0]: (ALGORITHMS["oft"],)}}
    yield "a T-LoRA among them", {"": dict.fromkeys(matrices, (EQUAL,)) | {matrices[0]: (ALGORITHMS["tlora"],)}}
    for encoder, layers in encoders.items():
        for label, own in (("lora", ALGORITHMS["lora"]), ("whole differences", Full()), ("norms", Norm())):
            wanted = [name for name in layers if ("norm" in name) == (label == "norms")]
            yield f"{encoder}: {label}", {"": {matrices[0]: (EQUAL,)}, encoder: dict.fromkeys(wanted, (own,))}
        part = [name for name in layers if name.endswith(("q_proj", "fc1"))]
        yield f"{encoder}: queries", {"": {matrices[0]: (EQUAL,)}, encoder: dict.fromkeys(part, (EQUAL,))}


def layouts_of(family: str) -> dict[str, NamedLayout]:
    components = FAMILIES[family].components
    return {of: NamedLayout.from_outline(ARCHITECTURES[components[of]], own[0]) for of, own in FILES[family].items()}


def file_of(family: str, dialect: str, chosen: Chosen, layouts: Mapping[str, NamedLayout]) -> EncodedFile:
    """Adapters with seeded numbers, in half precision; raises `FileError` where the format cannot hold them."""
    generator = torch.Generator().manual_seed(0)
    bundles, models = {}, {}
    for component, layers in chosen.items():
        layout = layouts[component]
        assert layout.architecture is not None
        own = layout.convert_to_naming(DIALECTS[dialect].choose_naming(layout.architecture))
        names = {part: name for name, span in own.find_spans(own.naming).items() for part in span.parts}
        entries = {}
        for part, algorithms in layers.items():
            # Versions of transformers have one level more or less.
            name = names.get(part) or names[part.removeprefix("text_model.")]
            made = [_entry(each, name, own, generator) for each in algorithms]
            if None not in made:
                entries[name] = tuple(entry for entry in made if entry is not None)
        if entries:
            bundles[component], models[component] = Bundle(entries), own
    return compose(bundles, dialect, model=models, family=family)


def _entry(algorithm: Algorithm, name: str, layout: NamedLayout, generator: torch.Generator) -> Entry | None:
    g = layout.layers[name]
    try:
        algorithm.check(g)
        slots = algorithm.slots(g)
    except ConfigError:
        return None
    numbers = {slot: torch.rand(spec.shape, generator=generator) * 0.3 + 0.1 for slot, spec in slots.items()}
    return Entry(algorithm, g, numbers)


def _renamed(**ends: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    """Each end of a name, its dots as two underscores → another one."""
    pairs = [(one.replace("__", "."), other) for one, other in ends.items()]

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {}
        for name, tensor in tensors.items():
            end = next(((one, other) for one, other in pairs if name.endswith(f".{one}")), None)
            found[name if end is None else name.removesuffix(end[0]) + end[1]] = tensor
        return found

    return change


def _with_embeddings(count: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return lambda tensors: tensors | {f"bundle_emb.word{n}.clip_l": torch.zeros(1, 8) for n in range(count)}


def _factors(up: str, down: str) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    return _renamed(lora_up__weight=up, lora_down__weight=down, lora_B__weight=up, lora_A__weight=down)


SPELLINGS: Mapping[str, tuple[str, Callable[[dict[str, Tensor]], dict[str, Tensor]]]] = {
    "lora_up": ("lora", _factors("lora_up.weight", "lora_down.weight")),
    "lora_B": ("lora", _factors("lora_B.weight", "lora_A.weight")),
    "lora_B.default": ("lora", _factors("lora_B.default.weight", "lora_A.default.weight")),
    "lora.up": ("lora", _factors("lora.up.weight", "lora.down.weight")),
    "lora_linear_layer": ("lora", _factors("lora_linear_layer.up.weight", "lora_linear_layer.down.weight")),
    "no alpha": ("lora", lambda tensors: {name: each for name, each in tensors.items() if not name.endswith("alpha")}),
    "one embedding": ("lora", _with_embeddings(1)),
    "thirteen embeddings": ("lora", _with_embeddings(13)),
    "magnitude": ("dora-lora-in", _renamed(dora_scale="magnitude")),
    "bias.diff": ("whole differences", _renamed(diff_b="bias.diff")),
    "weight.diff": ("whole differences", _renamed(diff="weight.diff", diff_b="bias.diff")),
    "diff of norms": ("norms", _renamed(w_norm="diff", b_norm="diff_b")),
    "weight.set_weight": ("replaced", _renamed(set_weight="weight.set_weight")),
    "without shifts": ("norms", lambda tensors: {name: each for name, each in tensors.items() if "b_norm" not in name}),
}
"""What a file is like → the one above that it is made from, and how its tensors are called there."""


def cases(family: str) -> Iterator[tuple[str, Chosen, Callable[..., dict[str, Tensor]]]]:
    """All kinds of files, and what changes the tensors' names in each."""
    chosen = dict(picks(family))
    yield from ((label, own, lambda tensors: tensors) for label, own in chosen.items())
    yield from ((f"{label} ({like})", chosen[like], change) for label, (like, change) in SPELLINGS.items())
