"""ComfyUI's own format: dotted names of the code that a model was published with, behind `diffusion_model.`."""

from lycoris.files.dialect import Dialect

COMFYUI = Dialect(
    name="comfyui",
    style="dotted",
    prefixes={
        "diffusion_model.": "",
        "model.diffusion_model.": "",
        "text_encoders.clip_l.transformer.": "text_encoder",
        "text_encoders.clip_g.transformer.": "text_encoder_2",
        "text_encoders.t5xxl.transformer.": "text_encoder_3",
        "text_encoders.clip_h.transformer.": "text_encoder",
    },
    naming="comfyui",
    namings={"sd1.5-unet": "sgm", "sd2-unet": "sgm", "sdxl-unet": "sgm", "clip": "text_model"},
)
