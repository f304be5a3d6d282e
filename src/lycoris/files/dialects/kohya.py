"""kohya's format, read by WebUI, Forge and ComfyUI: `lora_unet_` for any denoiser, `lora_te*_` for text encoders.

Layers are called as in the code that a model was published with: sgm's for SDXL, but diffusers' for SD 1 and 2.
"""

from collections.abc import Mapping

from lycoris.files.dialects.base import Dialect

TEXT_ENCODER_PREFIXES: Mapping[str, str] = {
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te3_": "text_encoder_3",
    "lora_te_": "text_encoder",
}

ENCODER_NAMINGS: Mapping[str, str] = {"clip": "text_model", "language-model": "headless"}
"""CLIP as transformers had it before version 5; language models as the classes without a head call their layers."""
UNET_NAMINGS: Mapping[str, str] = {"sd1.5-unet": "diffusers", "sd2-unet": "diffusers", "sdxl-unet": "sgm"}

KOHYA_DIALECT = Dialect(
    name="kohya",
    style="flat",
    # VideoX-Fun writes two underscores.
    prefixes={
        "lora_unet_": "",
        "lora_unet__": "",
        "oft_unet_": "",
        **TEXT_ENCODER_PREFIXES,
        "oft_te1_": "text_encoder",
        "oft_te2_": "text_encoder_2",
        "oft_te_": "text_encoder",
    },
    naming="original",
    namings={**UNET_NAMINGS, **ENCODER_NAMINGS},
)

KOHYA_DIFFUSERS_DIALECT = Dialect(
    name="kohya-diffusers", style="flat", prefixes=KOHYA_DIALECT.prefixes, namings=ENCODER_NAMINGS
)
"""The same with diffusers' names, as programs that train diffusers' classes write it."""
