"""FramePack. The original code has diffusers' names; ComfyUI has those of HunyuanVideo, from which it descends."""

from __future__ import annotations

from lycoris.files.families.hunyuanvideo import COMFYUI
from lycoris.files.families.language_models import LANGUAGE_MODEL
from lycoris.files.families.text_encoders import CLIP
from lycoris.files.family import Architecture, Family

TRANSFORMER = Architecture(
    name="framepack",
    classes=("HunyuanVideoFramepackTransformer3DModel", "HunyuanVideoTransformer3DModelPacked"),
    outlines=("framepack-i2v",),
    namings={"comfyui": COMFYUI},
    targets=("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
    excludes=(r".*(norm).*",),
)

FAMILY = Family(
    name="framepack",
    components={"": TRANSFORMER.name, "text_encoder": LANGUAGE_MODEL.name, "text_encoder_2": CLIP.name},
    pipelines=("HunyuanVideoFramepackPipeline",),
    kohya={"lora_unet": ""},
    comfyui={"llama": "text_encoder", "clip_l": "text_encoder_2"},
    versions=("framepack",),
)
ARCHITECTURES = (TRANSFORMER,)
