"""Variants of known models that differ in what their first layer takes in: control images, masks, a first frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from lycoris.files.layout import Layout


class Input(NamedTuple):
    """The layer of an architecture that takes the latents in."""

    layer: str
    """In diffusers."""
    variants: Mapping[int, str]
    """Inputs → whose they are."""


_UNET = Input("conv_in", MappingProxyType({4: "text to image", 8: "InstructPix2Pix", 9: "inpainting", 5: "depth"}))
INPUTS: Mapping[str, Input] = MappingProxyType(
    {
        "flux1": Input(
            "x_embedder",
            MappingProxyType({64: "dev, schnell or Kontext", 128: "Control (Canny, Depth)", 384: "Fill"}),
        ),
        "sd1.5-unet": _UNET,
        "sd2-unet": _UNET,
        "sdxl-unet": _UNET,
        "wan": Input(
            "patch_embedding",
            MappingProxyType({16: "text to video", 36: "image to video", 32: "Fun Control", 48: "TI2V or Fun Control"}),
        ),
    }
)
"""By architecture."""


def describe_variant(layout: Layout, naming: str, name: str, inputs: int) -> str:
    """What to say of an adapter for a layer's input of another width; "" where that is no sign of a variant."""
    own = _input(layout, naming, name)
    if own is None or not inputs or inputs == layout.middle[own.layer].in_features:
        return ""
    whose = own.variants.get(inputs)
    return (
        f"{name} takes {inputs} inputs in this file{f', as {whose} has them' if whose else ''}, and "
        f"{layout.middle[own.layer].in_features} in {layout.owner}: it is for another variant of the model"
    )


def _input(layout: Layout, naming: str, name: str) -> Input | None:
    """What is known of a layer that takes the latents in, by its name in a naming."""
    own = None if layout.architecture is None else INPUTS.get(layout.architecture.name)
    span = layout.spans(naming).get(name)
    return (
        own
        if own is not None and span is not None and span.parts == (own.layer,) and own.layer in layout.middle
        else None
    )


def widen_model(layout: Layout, naming: str, name: str, inputs: int) -> Layout:
    """A model as the variant of it whose first layer takes so many inputs; itself where that is no variant."""
    own = _input(layout, naming, name)
    if own is None or not inputs or inputs == layout.middle[own.layer].in_features:
        return layout
    g = layout.middle[own.layer]
    middle = {**layout.middle, own.layer: replace(g, shape=(g.shape[0], inputs, *g.shape[2:]))}
    return replace(layout, layers=middle, middle=middle, _spans={})
