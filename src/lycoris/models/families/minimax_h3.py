"""MiniMax H3. The first layers of its feed-forwards have gate and value the other way round.

Its queries, keys and values are one after the other, as in every known LoRA but those of DiffSynth-Studio, which train
the rows as the published shards have them: head by head.
"""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside

_MINIMAX_BLOCK = (
    Rename("attn.qkv_proj", ("attn.to_q", "attn.to_k", "attn.to_v")),
    Rename("attn.out_proj", "attn.to_out.0"),
    Rename("attn.q_norm", "attn.norm_q"),
    Rename("attn.k_norm", "attn.norm_k"),
    Rename("mlp.fc1", "ff.net.0.proj", gated=True),
    Rename("mlp.fc2", "ff.net.2"),
)

TRANSFORMER = Architecture(
    name="minimax-h3",
    classes=("MiniMaxH3Transformer3DModel", "MiniMaxH3"),
    models={"minimax-h3": {}},
    namings={
        "original": Table(
            (
                *rename_inside("blocks.*", "transformer_blocks.*", *_MINIMAX_BLOCK),
                Rename("blocks.*", "transformer_blocks.*"),
                *rename_inside("token_refiner.blocks.*", "token_refiner.refiner_blocks.*", *_MINIMAX_BLOCK),
                Rename("token_refiner.blocks.*", "token_refiner.refiner_blocks.*"),
                Rename("video_patch_proj", "proj_in"),
                Rename("audio_patch_proj", "audio_proj_in"),
                Rename("condition_proj", "context_embedder"),
                Rename("time_embedder.proj_in", "time_embedder.linear_1"),
                Rename("time_embedder.proj_out", "time_embedder.linear_2"),
                Rename("final_layer.norm", "norm_out.norm"),
                Rename("final_layer.adaln_proj.linear", "norm_out.linear"),
                Rename("final_layer.video_out", "proj_out"),
                Rename("final_layer.audio_out", "audio_proj_out"),
            )
        ),
    },
    blocks=("MiniMaxH3TransformerBlock", "MiniMaxH3TokenRefinerBlock"),
    attention=("MiniMaxH3Attention",),
    feed_forward=("FeedForward",),
)

FAMILY = Family(
    name="minimax-h3", components={"": TRANSFORMER.name}, versions=("minimax-h3", "minimax_h3", "minimaxh3")
)
ARCHITECTURES = (TRANSFORMER,)
