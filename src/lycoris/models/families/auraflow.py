"""AuraFlow."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside

_FEED_FORWARD = (Rename("c_fc1", "linear_1"), Rename("c_fc2", "linear_2"), Rename("c_proj", "out_projection"))
_FIRST = (
    Rename("attn.w1q", "attn.to_q"),
    Rename("attn.w1k", "attn.to_k"),
    Rename("attn.w1v", "attn.to_v"),
    Rename("attn.w1o", "attn.to_out.0"),
)

TRANSFORMER = Architecture(
    name="auraflow",
    classes=("AuraFlowTransformer2DModel", "MMDiT"),
    models={"auraflow": {}},
    namings={
        "original": Table(
            (
                *rename_inside(
                    "double_layers.*",
                    "joint_transformer_blocks.*",
                    # Here the first weights are of the text.
                    Rename("attn.w1q", "attn.add_q_proj"),
                    Rename("attn.w1k", "attn.add_k_proj"),
                    Rename("attn.w1v", "attn.add_v_proj"),
                    Rename("attn.w1o", "attn.to_add_out"),
                    Rename("attn.w2q", "attn.to_q"),
                    Rename("attn.w2k", "attn.to_k"),
                    Rename("attn.w2v", "attn.to_v"),
                    Rename("attn.w2o", "attn.to_out.0"),
                    *rename_inside("mlpX", "ff", *_FEED_FORWARD),
                    *rename_inside("mlpC", "ff_context", *_FEED_FORWARD),
                    Rename("modX.1", "norm1.linear"),
                    Rename("modC.1", "norm1_context.linear"),
                ),
                *rename_inside(
                    "single_layers.*",
                    "single_transformer_blocks.*",
                    *_FIRST,
                    *rename_inside("mlp", "ff", *_FEED_FORWARD),
                    Rename("modCX.1", "norm1.linear"),
                ),
                Rename("t_embedder.mlp.0", "time_step_proj.linear_1"),
                Rename("t_embedder.mlp.2", "time_step_proj.linear_2"),
                Rename("cond_seq_linear", "context_embedder"),
                Rename("init_x_linear", "pos_embed.proj"),
                Rename("positional_encoding", "pos_embed.pos_embed"),
                Rename("final_linear", "proj_out"),
                Rename("modF.1", "norm_out.linear", swapped=True),
            )
        )
    },
    blocks=("AuraFlowJointTransformerBlock", "AuraFlowSingleTransformerBlock"),
    attention=("Attention",),
    feed_forward=("AuraFlowFeedForward",),
    timestep="fraction",
)

FAMILY = Family(name="auraflow", components={"": TRANSFORMER.name}, versions=("auraflow", "aura-flow", "aura_flow"))
ARCHITECTURES = (TRANSFORMER,)
