"""Pipelines of the real diffusers and transformers classes with random weights, small enough to denoise in a blink."""

from __future__ import annotations

import string
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLWan,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
    WanPipeline,
    WanTransformer3DModel,
)
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5TokenizerFast,
    UMT5Config,
    UMT5EncoderModel,
)

PROMPT = "a pokemon that looks like a pizza"
START, END = "<|startoftext|>", "<|endoftext|>"


def clip_tokenizer() -> CLIPTokenizer:
    """One token for each letter."""
    pieces = [*string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase), START, END]
    vocab = {piece: at for at, piece in enumerate(pieces)}
    return CLIPTokenizer(vocab=vocab, merges=[], model_max_length=48)


def t5_tokenizer() -> T5TokenizerFast:
    """One token for each letter."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *string.ascii_lowercase]
    return T5TokenizerFast(vocab=[(piece, -1.0) for piece in pieces], extra_ids=0, model_max_length=48)


def clip_config(**options: Any) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=54,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=48,
        projection_dim=16,
        bos_token_id=52,
        eos_token_id=53,
        pad_token_id=53,
        **options,
    )


def t5_encoder() -> T5EncoderModel:
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    return T5EncoderModel(config)


def vae(**options: Any) -> AutoencoderKL:
    return AutoencoderKL(
        block_out_channels=(8, 8),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
        norm_num_groups=4,
        layers_per_block=1,
        sample_size=16,
        **options,
    )


def flux_transformer() -> FluxTransformer2DModel:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 6, 6),
    )


def sdxl_unet() -> UNet2DConditionModel:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        transformer_layers_per_block=(1, 1),
        attention_head_dim=(1, 2),
        cross_attention_dim=32,
        norm_num_groups=4,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=6 * 8 + 16,
    )


def denoiser(pipe: Any) -> nn.Module:
    return pipe.transformer if hasattr(pipe, "transformer") else pipe.unet


def flux_parts() -> dict[str, Any]:
    """What the published script loads from the hub, by the names it gives to `FluxPipeline`."""
    torch.manual_seed(0)
    return {
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": t5_encoder(),
        "tokenizer_2": t5_tokenizer(),
        "vae": vae(shift_factor=0.1),
        "transformer": flux_transformer(),
    }


def sdxl_parts() -> dict[str, Any]:
    """The same for `StableDiffusionXLPipeline`."""
    torch.manual_seed(0)
    return {
        "scheduler": EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1),
        "text_encoder": CLIPTextModel(clip_config()),
        "tokenizer": clip_tokenizer(),
        "text_encoder_2": CLIPTextModelWithProjection(clip_config()),
        "tokenizer_2": clip_tokenizer(),
        "vae": vae(),
        "unet": sdxl_unet(),
    }


PARTS = {"flux": (FluxPipeline, flux_parts, "transformer"), "sdxl": (StableDiffusionXLPipeline, sdxl_parts, "unet")}
"""Family → pipeline class, what makes its parts, and which part is the denoiser."""


def sd_pipeline() -> StableDiffusionPipeline:
    """Of the layout of Stable Diffusion 1.5."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        attention_head_dim=2,
        cross_attention_dim=16,
        norm_num_groups=4,
    )
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=CLIPTextModel(clip_config()),
        tokenizer=clip_tokenizer(),
        unet=unet,
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def flux_pipeline() -> FluxPipeline:
    return FluxPipeline(**flux_parts())


def wan_transformer() -> WanTransformer3DModel:
    return WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=16,
        out_channels=16,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def wan_pipeline() -> WanPipeline:
    """Of the layout of Wan 2.2, with an expert for noisy steps and one for the others."""
    torch.manual_seed(0)
    config = UMT5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, pad_token_id=0)
    return WanPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=UMT5EncoderModel(config),
        vae=AutoencoderKLWan(base_dim=3, z_dim=16, dim_mult=[1, 1, 1, 1], num_res_blocks=1),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
        transformer=wan_transformer(),
        transformer_2=wan_transformer(),
        boundary_ratio=0.8,
    )
