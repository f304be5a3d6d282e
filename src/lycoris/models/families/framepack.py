"""FramePack, a descendant of HunyuanVideo: its code has the names of diffusers, ComfyUI those of HunyuanVideo."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family, MusubiTargets
from lycoris.models.families.hunyuanvideo import HUNYUANVIDEO_BLOCKS, HUNYUANVIDEO_COMFYUI, HUNYUANVIDEO_FEED_FORWARD
from lycoris.models.families.language_models import LANGUAGE_MODEL
from lycoris.models.families.text_encoders import CLIP

TRANSFORMER = Architecture(
    name="framepack",
    classes=("HunyuanVideoFramepackTransformer3DModel", "HunyuanVideoTransformer3DModelPacked"),
    models={
        "framepack-i2v": {"has_image_proj": True, "image_proj_dim": 1152, "has_clean_x_embedder": True},
    },
    namings={"comfyui": HUNYUANVIDEO_COMFYUI},
    blocks=HUNYUANVIDEO_BLOCKS,
    attention=("Attention",),
    feed_forward=HUNYUANVIDEO_FEED_FORWARD,
    musubi_targets=MusubiTargets(
        ("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"), (r".*(norm).*",)
    ),
)

FAMILY = Family(
    name="framepack",
    components={"": TRANSFORMER.name, "text_encoder": LANGUAGE_MODEL.name, "text_encoder_2": CLIP.name},
    kohya={"lora_unet": ""},
    comfyui={"llama": "text_encoder", "clip_l": "text_encoder_2"},
    versions=("framepack",),
)
ARCHITECTURES = (TRANSFORMER,)
