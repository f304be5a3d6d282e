"""Classes and paths that the built-in presets of the kohya interface mean: of the original code, and of diffusers."""

from __future__ import annotations

from lycoris.models.families import DENOISERS

CONVOLVED = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
"""Blocks of convolutions in UNets."""

LANGUAGE_ADAPTER = "LLMAdapterTransformerBlock"
"""Of Anima; trained only with `train_llm_adapter`."""

TRANSFORMERS: tuple[str, ...] = (
    *dict.fromkeys(name for each in DENOISERS for name in each.blocks),
    LANGUAGE_ADAPTER,
)
"""Blocks of transformers."""

ATTENTION: tuple[str, ...] = tuple(
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
"""Of the text encoders that the presets of lycoris-lora 4.1.3 train, which are not all that are known."""
TEXT = (*TEXT_ATTENTION, "CLIPMLP", "MT5Block", "BertLayer", "Gemma2MLP", "Qwen3MLP")
TEXT_ATTENTION_ONLY = (*TEXT_ATTENTION, "BertAttention", "MT5LayerSelfAttention")

T5 = ("T5Attention", "T5DenseActDense", "T5DenseGatedActDense")
"""Trained only with `train_t5xxl`."""
