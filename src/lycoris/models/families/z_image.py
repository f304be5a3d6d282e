"""Z-Image: its code has the names of diffusers, ComfyUI those of Lumina's code, from which it descends."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family, MusubiTargets
from lycoris.models.families.language_models import LANGUAGE_MODEL
from lycoris.models.families.naming import Rename, Table, rename_inside

TRANSFORMER = Architecture(
    name="z-image",
    classes=("ZImageTransformer2DModel",),
    models={
        "z-image": {},
    },
    namings={
        "comfyui": Table(
            (
                *rename_inside(
                    "*.*.attention",
                    "*.*.attention",
                    Rename("qkv", ("to_q", "to_k", "to_v")),
                    Rename("out", "to_out.0"),
                    Rename("q_norm", "norm_q"),
                    Rename("k_norm", "norm_k"),
                ),
                Rename("x_embedder", "all_x_embedder.2-1"),
                Rename("final_layer", "all_final_layer.2-1"),
            )
        )
    },
    blocks=("ZImageTransformerBlock",),
    attention=("Attention", "ZImageAttention"),
    feed_forward=("FeedForward",),
    musubi_targets=MusubiTargets(("ZImageTransformerBlock",), (r".*(_modulation|_refiner).*",)),
    timestep="reversed",
)

FAMILY = Family(
    name="z-image",
    components={"": TRANSFORMER.name, "text_encoder": LANGUAGE_MODEL.name},
    kohya={"lora_unet": ""},
    comfyui={"qwen3_4b": "text_encoder"},
    versions=("z-image", "z_image"),
)
ARCHITECTURES = (TRANSFORMER,)
