"""Ideogram 4."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table, rename_inside

TRANSFORMER = Architecture(
    name="ideogram4",
    classes=("Ideogram4Transformer2DModel", "Ideogram4Transformer"),
    models={"ideogram-4": {}},
    namings={
        "original": Table(
            rename_inside(
                "layers.*.attention",
                "layers.*.attention",
                Rename("qkv", ("to_q", "to_k", "to_v")),
                Rename("o", "to_out.0"),
            )
        ),
    },
    blocks=("Ideogram4TransformerBlock",),
    attention=("Ideogram4Attention",),
    feed_forward=("Ideogram4MLP", "FeedForward"),
    timestep="reversed",
)

FAMILY = Family(name="ideogram4", components={"": TRANSFORMER.name}, versions=("ideogram-4", "ideogram4", "ideogram_4"))
ARCHITECTURES = (TRANSFORMER,)
