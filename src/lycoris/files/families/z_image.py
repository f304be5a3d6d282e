"""Z-Image. The original code has the names of diffusers; ComfyUI has those of Lumina, from which it descends."""

from __future__ import annotations

from lycoris.files.families.language_models import LANGUAGE_MODEL
from lycoris.files.family import Architecture, Family
from lycoris.files.naming import Rename, Table, inside

TRANSFORMER = Architecture(
    name="z-image",
    classes=("ZImageTransformer2DModel",),
    outlines=("z-image",),
    namings={
        "comfyui": Table(
            (
                *inside(
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
    targets=("ZImageTransformerBlock",),
    excludes=(r".*(_modulation|_refiner).*",),
)

FAMILY = Family(
    name="z-image",
    components={"": TRANSFORMER.name, "text_encoder": LANGUAGE_MODEL.name},
    pipelines=("ZImagePipeline", "ZImageImg2ImgPipeline", "ZImageInpaintPipeline", "ZImageOmniPipeline"),
    kohya={"lora_unet": ""},
    comfyui={"qwen3_4b": "text_encoder"},
    versions=("z-image", "z_image"),
)
ARCHITECTURES = (TRANSFORMER,)
