"""ERNIE-Image. Its code has the names of diffusers."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family

TRANSFORMER = Architecture(
    name="ernie-image",
    classes=("ErnieImageTransformer2DModel", "ErnieImageModel"),
    models={
        "ernie-image": {
            "hidden_size": 4096,
            "num_attention_heads": 32,
            "num_layers": 36,
            "ffn_hidden_size": 12288,
            "text_in_dim": 3072,
        }
    },
    blocks=("ErnieImageSharedAdaLNBlock",),
    attention=("ErnieImageAttention",),
    feed_forward=("ErnieImageFeedForward",),
)

FAMILY = Family(
    name="ernie-image", components={"": TRANSFORMER.name}, versions=("ernie-image", "ernie_image", "ernieimage")
)
ARCHITECTURES = (TRANSFORMER,)
