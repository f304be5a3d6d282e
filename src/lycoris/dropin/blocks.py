"""Classes and paths that the built-in presets of the kohya interface mean: of the original code, and of diffusers."""

from __future__ import annotations

CONVOLVED = ("ResnetBlock2D", "Downsample2D", "Upsample2D")
"""Blocks of convolutions in UNets."""

ORIGINAL = (
    "HunYuanDiTBlock",
    *("DoubleStreamBlock", "SingleStreamBlock"),  # Flux, Flux.2
    "SingleDiTBlock",  # Stable Diffusion 3
    *("MMDoubleStreamBlock", "MMSingleStreamBlock"),  # HunyuanVideo
    "WanAttentionBlock",
    "JointTransformerBlock",  # Lumina 2; in diffusers Stable Diffusion 3
    "FinalLayer",
    "LensTransformerBlock",
    "Ideogram4TransformerBlock",
    "ZImageTransformerBlock",
    *("AceStepEncoderLayer", "AceStepDiTLayer"),
    "TextFusionBlock",  # Krea 2
    *("Block", "PatchEmbed", "TimestepEmbedding"),  # Anima
)
"""Blocks of transformers as the code calls them that models were published with."""

DIFFUSERS = (
    "Transformer2DModel",
    *("FluxTransformerBlock", "FluxSingleTransformerBlock"),
    *("Flux2TransformerBlock", "Flux2SingleTransformerBlock"),
    "SD3SingleTransformerBlock",
    *("WanTransformerBlock", "WanVACETransformerBlock"),
    *("HunyuanVideoTransformerBlock", "HunyuanVideoSingleTransformerBlock"),
    *("HunyuanVideoTokenReplaceTransformerBlock", "HunyuanVideoTokenReplaceSingleTransformerBlock"),
    *("HunyuanVideoIndividualTokenRefinerBlock", "HunyuanVideo15IndividualTokenRefinerBlock"),
    "HunyuanVideo15TransformerBlock",
    *("HunyuanImageTransformerBlock", "HunyuanImageSingleTransformerBlock"),
    "Lumina2TransformerBlock",
    "QwenImageTransformerBlock",
    *("ChromaTransformerBlock", "ChromaSingleTransformerBlock"),
    *("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
    *("HiDreamImageTransformerBlock", "HiDreamImageSingleTransformerBlock"),
    *("CogVideoXBlock", "CogView4TransformerBlock"),
    *("LTXVideoTransformerBlock", "LTX2VideoTransformerBlock"),
    *("SanaTransformerBlock", "SanaVideoTransformerBlock"),
    *("CosmosTransformerBlock", "MochiTransformerBlock"),
    *("Kandinsky5TransformerEncoderBlock", "Kandinsky5TransformerDecoderBlock"),
    *("LongCatImageTransformerBlock", "LongCatImageSingleTransformerBlock"),
    *("BriaTransformerBlock", "BriaSingleTransformerBlock"),
    "ErnieImageSharedAdaLNBlock",
    *("AceStepTransformerBlock", "Krea2TransformerBlock", "Krea2TextFusionBlock"),
    "BasicTransformerBlock",  # PixArt, Stable Cascade and others; inside Transformer2DModel elsewhere
)
"""Blocks of transformers as diffusers calls them."""

LANGUAGE_ADAPTER = "LLMAdapterTransformerBlock"
"""Of Anima; trained only with `train_llm_adapter`."""

TRANSFORMERS = (*DIFFUSERS, *ORIGINAL, LANGUAGE_ADAPTER)

ATTENTION = (
    *("CrossAttention", "SelfAttention", "Attention"),
    *("FluxAttention", "Flux2Attention", "Flux2ParallelSelfAttention"),
    *("WanAttention", "WanSelfAttention", "WanT2VCrossAttention", "WanI2VCrossAttention"),
    *("JointAttention", "ZImageAttention", "HiDreamAttention", "LTXAttention", "LTX2Attention", "CosmosAttention"),
    *("Kandinsky5Attention", "LongCatImageAttention", "BriaAttention", "Ideogram4Attention", "AceStepAttention"),
    *("Krea2Attention", "ErnieImageAttention", "SanaMultiscaleLinearAttention"),
)
"""Attention layers of denoisers."""

UNET_CONVOLUTIONS = ("conv_in", "conv_out")
UNET_LINEARS = ("time_embedding.linear_1", "time_embedding.linear_2")

TEXT_ATTENTION = (
    *("CLIPAttention", "CLIPSdpaAttention"),
    *("Gemma2Attention", "Gemma2FlashAttention2", "Gemma2SdpaAttention"),
    *("Qwen3Attention", "Qwen3FlashAttention2", "Qwen3SdpaAttention"),
)
TEXT = (*TEXT_ATTENTION, "CLIPMLP", "MT5Block", "BertLayer", "Gemma2MLP", "Qwen3MLP")
TEXT_ATTENTION_ONLY = (*TEXT_ATTENTION, "BertAttention", "MT5LayerSelfAttention")

T5 = ("T5Attention", "T5DenseActDense", "T5DenseGatedActDense")
"""Trained only with `train_t5xxl`."""
