"""Chroma: Flux.1 whose modulations come from one small network, so that its blocks have none."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.flux1 import FLUX1_DOUBLE, FLUX1_SINGLE
from lycoris.models.families.naming import Rename, Table, rename_inside
from lycoris.models.families.text_encoders import T5_ENCODER

_MODULATIONS = ("norm1.linear", "norm1_context.linear", "norm.linear")

TRANSFORMER = Architecture(
    name="chroma",
    classes=("ChromaTransformer2DModel", "Chroma"),
    models={"chroma1-hd": {}},
    namings={
        "original": Table(
            (
                *rename_inside(
                    "double_blocks.*", "transformer_blocks.*", *(e for e in FLUX1_DOUBLE if e.here not in _MODULATIONS)
                ),
                *rename_inside(
                    "single_blocks.*",
                    "single_transformer_blocks.*",
                    *(e for e in FLUX1_SINGLE if e.here not in _MODULATIONS),
                ),
                Rename("distilled_guidance_layer.layers.*.in_layer", "distilled_guidance_layer.layers.*.linear_1"),
                Rename("distilled_guidance_layer.layers.*.out_layer", "distilled_guidance_layer.layers.*.linear_2"),
                Rename("img_in", "x_embedder"),
                Rename("txt_in", "context_embedder"),
                Rename("final_layer.linear", "proj_out"),
            )
        )
    },
    blocks=("ChromaTransformerBlock", "ChromaSingleTransformerBlock", "DoubleStreamBlock", "SingleStreamBlock"),
    attention=("FluxAttention", "SelfAttention", "SingleStreamBlock.linear1"),
    feed_forward=(
        "FeedForward",
        *("ChromaSingleTransformerBlock.proj_mlp", "ChromaSingleTransformerBlock.proj_out"),
        *("DoubleStreamBlock.img_mlp", "DoubleStreamBlock.txt_mlp"),
        *("SingleStreamBlock.linear1", "SingleStreamBlock.linear2"),
    ),
    timestep="fraction",
)

FAMILY = Family(
    name="chroma",
    components={"": TRANSFORMER.name, "text_encoder": T5_ENCODER.name},
    kohya={"lora_unet": "", "lora_te3": "text_encoder"},
    comfyui={"t5xxl": "text_encoder"},
    versions=("chroma",),
)
ARCHITECTURES = (TRANSFORMER,)
