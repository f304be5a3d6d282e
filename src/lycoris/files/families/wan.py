"""Wan 2.1 and 2.2. The A14B models of 2.2 are two of one kind: `transformer_2` takes over when little noise is left."""

from __future__ import annotations

from lycoris.files.families.text_encoders import T5
from lycoris.files.family import Architecture, Family
from lycoris.files.naming import Rename, Table, inside

_ATTENTION = (
    Rename("q", "to_q"),
    Rename("k", "to_k"),
    Rename("v", "to_v"),
    Rename("o", "to_out.0"),
    Rename("k_img", "add_k_proj"),
    Rename("v_img", "add_v_proj"),
    Rename("norm_k_img", "norm_added_k"),
)

TRANSFORMER = Architecture(
    name="wan",
    classes=("WanTransformer3DModel", "WanModel"),
    outlines=("wan2.1-t2v-14b", "wan2.1-t2v-1.3b", "wan2.1-i2v-14b", "wan2.2-i2v-a14b", "wan2.2-ti2v-5b"),
    namings={
        "original": Table(
            (
                *inside("blocks.*.self_attn", "blocks.*.attn1", *_ATTENTION),
                *inside("blocks.*.cross_attn", "blocks.*.attn2", *_ATTENTION),
                *inside(
                    "blocks.*",
                    "blocks.*",
                    Rename("self_attn", "attn1"),
                    Rename("cross_attn", "attn2"),
                    Rename("ffn.0", "ffn.net.0.proj"),
                    Rename("ffn.2", "ffn.net.2"),
                    # Numbered in the order of use here, by kind there.
                    Rename("norm3", "norm2"),
                    Rename("norm2", "norm3"),
                    Rename("modulation", "scale_shift_table"),
                ),
                *inside(
                    "img_emb.proj",
                    "condition_embedder.image_embedder",
                    Rename("0", "norm1"),
                    Rename("1", "ff.net.0.proj"),
                    Rename("3", "ff.net.2"),
                    Rename("4", "norm2"),
                ),
                Rename("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
                Rename("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
                Rename("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
                Rename("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
                Rename("time_projection.1", "condition_embedder.time_proj"),
                Rename("head.modulation", "scale_shift_table"),
                Rename("head.head", "proj_out"),
            )
        )
    },
    targets=("WanTransformerBlock", "WanAttentionBlock"),
    excludes=(r".*(patch_embedding|text_embedding|time_embedding|time_projection|norm|head).*",),
)

FAMILY = Family(
    name="wan",
    components={"": TRANSFORMER.name, "transformer_2": TRANSFORMER.name, "text_encoder": T5.name},
    pipelines=("WanPipeline", "WanImageToVideoPipeline", "WanVideoToVideoPipeline"),
    kohya={"lora_unet": ""},
    comfyui={"umt5xxl": "text_encoder"},
    versions=("wan",),
)
ARCHITECTURES = (TRANSFORMER,)
