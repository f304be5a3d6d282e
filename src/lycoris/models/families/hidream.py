"""HiDream-I1. Its code has the names of diffusers. HiDream-O1 is another model."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family

TRANSFORMER = Architecture(
    name="hidream-i1",
    classes=("HiDreamImageTransformer2DModel",),
    models={
        "hidream-i1": {
            "patch_size": 2,
            "in_channels": 16,
            "out_channels": 16,
            "caption_channels": [4096, 4096],
            "axes_dims_rope": [64, 32, 32],
            "llama_layers": [*range(32), *(31,) * 16],
        }
    },
    blocks=("HiDreamImageTransformerBlock", "HiDreamImageSingleTransformerBlock"),
    attention=("HiDreamAttention",),
    feed_forward=("HiDreamImageFeedForwardSwiGLU", "MOEFeedForwardSwiGLU"),
)

FAMILY = Family(
    name="hidream-i1", components={"": TRANSFORMER.name}, versions=("hidream-i1", "hidream_i1", "hidreami1")
)
ARCHITECTURES = (TRANSFORMER,)
