"""Networks of which only classes and timesteps are known: they have no outline, so their files are not recognized."""

from __future__ import annotations

from lycoris.models.families.family import Architecture

OTHERS = (
    Architecture(
        name="unet-blocks",
        classes=(),
        blocks=("BasicTransformerBlock",),  # Stable Cascade and others; inside Transformer2DModel elsewhere
        attention=("Attention", "CrossAttention"),
        feed_forward=("FeedForward",),
    ),
    Architecture(
        name="ace-step",
        classes=("AceStepTransformer1DModel",),
        blocks=("AceStepTransformerBlock", "AceStepEncoderLayer", "AceStepDiTLayer"),
        attention=("AceStepAttention",),
        feed_forward=("AceStepMLP",),
        timestep="fraction",
    ),
    Architecture(
        name="bria",
        classes=("BriaTransformer2DModel",),
        blocks=("BriaTransformerBlock", "BriaSingleTransformerBlock"),
        attention=("BriaAttention",),
        feed_forward=(
            "FeedForward",
            *("BriaSingleTransformerBlock.proj_mlp", "BriaSingleTransformerBlock.proj_out"),
        ),
    ),
    Architecture(
        name="bria-fibo-2",
        classes=("BriaFibo2Transformer2DModel",),
        blocks=("BriaFibo2TransformerBlock",),
        attention=("BriaFibo2Attention",),
        feed_forward=("FeedForward",),
        timestep="fraction",
    ),
    Architecture(
        name="hunyuan-dit",
        classes=("HunyuanDiT2DModel", "HunYuanDiT"),
        blocks=("HunyuanDiTBlock", "HunYuanDiTBlock"),
        attention=("Attention",),
        feed_forward=("FeedForward",),
    ),
    Architecture(name="lens", classes=(), blocks=("LensTransformerBlock",)),
    Architecture(
        name="longcat-audio",
        classes=("LongCatAudioDiTTransformer",),
        blocks=("AudioDiTBlock",),
        attention=("AudioDiTAttention",),
        feed_forward=("AudioDiTFeedForward",),
        timestep="reversed",  # its scheduler has `invert_sigmas`: its timesteps run from 0 (noise) to T (clean)
    ),
    Architecture(
        name="lumina-next",
        classes=("LuminaNextDiT2DModel",),
        blocks=("LuminaNextDiTBlock",),
        attention=("Attention",),
        feed_forward=("LuminaFeedForward",),
        timestep="reversed",
    ),
    Architecture(
        name="nucleus-moe-image",
        classes=("NucleusMoEImageTransformer2DModel",),
        blocks=("NucleusMoEImageTransformerBlock",),
        attention=("Attention",),
        feed_forward=("FeedForward", "NucleusMoELayer"),
        timestep="fraction",
    ),
    Architecture(
        name="prx",
        classes=("PRXTransformer2DModel",),
        blocks=("PRXBlock",),
        attention=("PRXAttention",),
        feed_forward=("PRXBlock.gate_proj", "PRXBlock.up_proj", "PRXBlock.down_proj"),
        timestep="fraction",
    ),
    Architecture(
        name="cogvideox",
        classes=("CogVideoXTransformer3DModel",),
        blocks=("CogVideoXBlock",),
        attention=("Attention",),
        timestep="steps",
    ),
    Architecture(
        name="cogview4",
        classes=("CogView4Transformer2DModel",),
        blocks=("CogView4TransformerBlock",),
        attention=("Attention",),
        timestep="steps",
    ),
    Architecture(
        name="longcat-image",
        classes=("LongCatImageTransformer2DModel",),
        blocks=(
            "LongCatImageTransformerBlock",
            "LongCatImageSingleTransformerBlock",
        ),
        attention=("LongCatImageAttention",),
        timestep="fraction",
    ),
    Architecture(
        name="ovis-image",
        classes=("OvisImageTransformer2DModel",),
        blocks=(
            "OvisImageTransformerBlock",
            "OvisImageSingleTransformerBlock",
        ),
        attention=("OvisImageAttention",),
        timestep="fraction",
    ),
)
