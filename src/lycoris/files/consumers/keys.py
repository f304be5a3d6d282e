"""Which dialects a program knows the keys of, and for which architectures; an empty list means all."""

from __future__ import annotations

from collections.abc import Mapping

Keys = Mapping[str, tuple[str, ...]]

UNETS = ("sd1.5-unet", "sd2-unet", "sdxl-unet")

COMFYUI: Mapping[str, tuple[str, ...]] = {
    "comfyui": (),
    "kohya": (),
    "kohya-diffusers": UNETS,
    "lycoris": (*UNETS, "sd3", "flux1", "qwen-image", "z-image", "lumina2"),
    "diffusers": (*UNETS, "sd3", "flux1", "qwen-image", "z-image", "lumina2"),
    "musubi": (),
    "musubi-other": (),
    "onetrainer-comfy": (),
    "onetrainer-kohya": (),
    "onetrainer-diffusers": (*UNETS, "sd3", "flux1", "qwen-image", "z-image", "lumina2"),
    "ai-toolkit": (),
}
"""It keeps a table from every accepted name to its own; for DiTs `lora_unet_` means the original names."""
FORGE: Mapping[str, tuple[str, ...]] = {
    "kohya": (),
    "kohya-diffusers": UNETS,
    "comfyui": (),
    "diffusers": (*UNETS, "flux1"),
}
WEBUI: Mapping[str, tuple[str, ...]] = {
    "kohya": (*UNETS, "sd3"),
    "kohya-diffusers": UNETS,
    "onetrainer-kohya": (*UNETS, "sd3"),
    "onetrainer-legacy": UNETS,
}
INVOKEAI: Mapping[str, tuple[str, ...]] = {
    "kohya": (*UNETS, "flux1", "flux2", "qwen-image"),
    "kohya-diffusers": UNETS,
    "diffusers": ("flux1", "flux2", "z-image", "qwen-image"),
    "onetrainer-kohya": (*UNETS, "flux1"),
    "onetrainer-diffusers": ("flux1",),
}
DIFFUSERS: Mapping[str, tuple[str, ...]] = {
    "diffusers": (),
    "kohya": (*UNETS, "flux1", "wan", "qwen-image", "z-image"),
    "kohya-diffusers": UNETS,
    "musubi": ("wan", "qwen-image", "z-image"),
    "onetrainer-diffusers": (),
    "ai-toolkit": (),
}
PEFT: Mapping[str, tuple[str, ...]] = {"peft": ()}
SIMPLETUNER: Mapping[str, tuple[str, ...]] = {"lycoris": ()}
MUSUBI: Mapping[str, tuple[str, ...]] = {"musubi": (), "kohya": ()}
