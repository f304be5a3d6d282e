"""A tiny Stable Diffusion pipeline of the real classes, a folder of images, and settings that train on them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw

from lycoris.training.base_model import suppress_library_output

COLORS = ("red", "green", "blue", "yellow", "black", "orange")
LYCORIS: dict[str, Any] = {
    "algo": "lora",
    "multiplier": 1.0,
    "linear_dim": 4,
    "linear_alpha": 4,
    "apply_preset": {"target_module": ["Attention", "ResnetBlock2D"]},
}


def save_base(folder: Path) -> Path:
    """A random pipeline for 32-pixel images, as `save_pretrained` writes it."""
    with suppress_library_output():
        from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
        from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

        torch.manual_seed(0)
        letters = [chr(code) for code in range(97, 123)]
        words = ["<|startoftext|>", "<|endoftext|>", *letters, *(letter + "</w>" for letter in letters)]
        tokenizer = CLIPTokenizer(vocab={word: i for i, word in enumerate(words)}, merges=[], model_max_length=16)
        text = CLIPTextConfig(
            vocab_size=len(words),
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=16,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=1,
        )
        unet = UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            layers_per_block=1,
            cross_attention_dim=16,
            attention_head_dim=2,
            norm_num_groups=8,
        )
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 3,
            up_block_types=("UpDecoderBlock2D",) * 3,
            block_out_channels=(8, 8, 8),
            norm_num_groups=4,
            mid_block_add_attention=False,
            sample_size=32,
        )
        StableDiffusionPipeline(
            vae=vae,
            text_encoder=CLIPTextModel(text),
            tokenizer=tokenizer,
            unet=unet,
            scheduler=DDIMScheduler(prediction_type="v_prediction", clip_sample=False, steps_offset=1),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        ).save_pretrained(folder)
    return folder


def save_images(folder: Path) -> Path:
    """Six 40-pixel images with captions."""
    folder.mkdir()
    for i, color in enumerate(COLORS):
        image = Image.new("RGB", (40, 40), "white")
        ImageDraw.Draw(image).ellipse((4, 4, 30 + i, 36 - i), color)
        image.save(folder / f"{color}.png")
        (folder / f"{color}.txt").write_text(f"{color} ball\n")
    return folder


def small_run(base: Path, folder: Path, lycoris: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """Write images and lycoris_config.json, and return the contents of a config.json beside them."""
    if not (folder / "images").exists():
        save_images(folder / "images")
    (folder / "lycoris_config.json").write_text(json.dumps({**LYCORIS, **(lycoris or {})}))
    return {
        "model_type": "lora",
        "lora_type": "lycoris",
        "lycoris_config": "lycoris_config.json",
        "pretrained_model_name_or_path": str(base),
        "instance_data_dir": "images",
        "output_dir": "out",
        "resolution": 32,
        "num_eval_images": 1,
        "learning_rate": 0.01,
        "max_train_steps": 3,
        "train_batch_size": 2,
        "checkpointing_steps": 0,
        "report_to": "none",
        "validation_prompts": ["red ball"],
        "validation_prompts_outside": ["blue ball"],
        "validation_num_inference_steps": 2,
        **changes,
    }
