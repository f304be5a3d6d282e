"""Classes and paths that the built-in presets of the kohya interface target, in the original code and in diffusers."""

from __future__ import annotations

from lycoris.models.families import DENOISERS

CONVOLVED = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
"""Convolutional blocks of UNets."""

LANGUAGE_ADAPTER = "LLMAdapterTransformerBlock"
"""Blocks of Anima's language model adapter, trained only with `train_llm_adapter`."""

TRANSFORMERS: tuple[str, ...] = (
    *dict.fromkeys(name for each in DENOISERS for name in each.blocks),
    LANGUAGE_ADAPTER,
)
"""Transformer blocks of denoisers."""

DENOISER_ATTENTION: tuple[str, ...] = tuple(
    dict.fromkeys(name for each in DENOISERS for name in each.attention if "." not in name)
)
"""Attention layers of denoisers."""

UNET_CONVOLUTIONS = ("conv_in", "conv_out")
UNET_LINEARS = ("time_embedding.linear_1", "time_embedding.linear_2")

TEXT_ATTENTION = (
    *("CLIPAttention", "CLIPSdpaAttention"),
    *("Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention"),
    *("Qwen3Attention", "Qwen3FlashAttention2", "Qwen3SdpaAttention"),
)
"""Attention layers of the text encoders that the presets of lycoris-lora 4.1.3 train."""
TEXT = (*TEXT_ATTENTION, "CLIPMLP", "MT5Block", "BertLayer", "Gemma2MLP", "Qwen3MLP")
TEXT_ATTENTION_ONLY = (*TEXT_ATTENTION, "BertAttention", "MT5LayerSelfAttention")

T5_BLOCKS = ("T5Attention", "T5DenseActDense", "T5DenseGatedActDense")
"""Blocks of T5, trained only with `train_t5xxl`."""
