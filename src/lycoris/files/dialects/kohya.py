"""kohya's format, read by WebUI and ComfyUI: `lora_unet_` for any denoiser, `lora_te*_` for text encoders."""

from lycoris.files.dialect import Dialect

KOHYA = Dialect(
    name="kohya",
    prefixes={
        "lora_unet": "",
        "lora_te1": "text_encoder",
        "lora_te2": "text_encoder_2",
        "lora_te3": "text_encoder_3",
        "lora_te": "text_encoder",
    },
    default="lora_unet",
)
