"""Which class of diffusers reads the adapters of a model."""

from __future__ import annotations

PIPELINES = {
    "flux1": "FluxPipeline",
    "flux2": "Flux2Pipeline",
    "framepack": "HunyuanVideoFramepackPipeline",
    "hunyuanvideo": "HunyuanVideoPipeline",
    "hunyuanvideo-1.5": "HunyuanVideo15Pipeline",
    "lumina2": "Lumina2Pipeline",
    "qwen-image": "QwenImagePipeline",
    "sd1.5-unet": "StableDiffusionPipeline",
    "sd2-unet": "StableDiffusionPipeline",
    "sd3": "StableDiffusion3Pipeline",
    "sdxl-unet": "StableDiffusionXLPipeline",
    "wan": "WanPipeline",
    "z-image": "ZImagePipeline",
    "chroma": "ChromaPipeline",
    "flux3": "Flux3ModularPipeline",
    "qwen-image-2.1": "QwenImage21Pipeline",
    "auraflow": "AuraFlowPipeline",
    "pixart": "PixArtSigmaPipeline",
    "sana": "SanaPipeline",
    "hidream-i1": "HiDreamImagePipeline",
    "hunyuanimage": "HunyuanImagePipeline",
    "ideogram4": "Ideogram4Pipeline",
    "krea2": "Krea2Pipeline",
    "ernie-image": "ErnieImagePipeline",
    "cosmos-predict2": "Cosmos2TextToImagePipeline",
    "ltx-video": "LTXPipeline",
    "ltx-2": "LTX2Pipeline",
    "mochi": "MochiPipeline",
    "kandinsky5": "Kandinsky5T2VPipeline",
    "minimax-h3": "MiniMaxH3ModularPipeline",
}
"""Architecture → a pipeline that reads files of its adapters."""
