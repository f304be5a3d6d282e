"""Variants of known models whose first layer takes other inputs: control images, masks, a first frame."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import NamedTuple

from lycoris.files.layout import NamedLayout


class InputLayer(NamedTuple):
    """The layer of an architecture that takes the latents in, and the variants known by its width.

    Widths are inputs of one position: channels, or features of a patch.
    """

    layer: str
    """In diffusers."""
    variants: Mapping[int, str]
    """Inputs → whose they are."""


_UNET_INPUT = InputLayer(
    "conv_in", MappingProxyType({4: "text to image", 8: "InstructPix2Pix", 9: "inpainting", 5: "depth"})
)
INPUT_LAYERS: Mapping[str, InputLayer] = MappingProxyType(
    {
        "flux1": InputLayer(
            "x_embedder",
            MappingProxyType({64: "dev, schnell or Kontext", 128: "Control (Canny, Depth)", 384: "Fill"}),
        ),
        "sd1.5-unet": _UNET_INPUT,
        "sd2-unet": _UNET_INPUT,
        "sdxl-unet": _UNET_INPUT,
        "wan": InputLayer(
            "patch_embedding",
            MappingProxyType({16: "text to video", 36: "image to video", 32: "Fun Control", 48: "TI2V or Fun Control"}),
        ),
    }
)
"""By architecture."""


def describe_variant(layout: NamedLayout, naming: str, name: str, inputs: int) -> str:
    """Return what to say about an adapter whose input width is that of another variant.

    Args:
        name: The layer, in `naming`.
        inputs: The width of the adapter's input in the file; 0 for unknown.

    Returns:
        One sentence for a message, or "" if the layer is not the first or the width is the model's.
    """
    own = _find_input_layer(layout, naming, name)
    if own is None or not inputs or inputs == layout.diffusers_layers[own.layer].in_features:
        return ""
    whose = own.variants.get(inputs)
    theirs, note = layout.diffusers_layers[own.layer].in_features, f", as in {whose}" if whose else ""
    return (
        f"{name} takes {inputs} inputs in this file{note}, and {theirs} in {layout.model_name}: it is for another "
        "variant of the model"
    )


def _find_input_layer(layout: NamedLayout, naming: str, name: str) -> InputLayer | None:
    """What is known of a layer that takes the latents in, by its name in a naming."""
    own = None if layout.architecture is None else INPUT_LAYERS.get(layout.architecture.name)
    span = layout.find_spans(naming).get(name)
    return (
        own
        if own is not None and span is not None and span.parts == (own.layer,) and own.layer in layout.diffusers_layers
        else None
    )


def widen_model(layout: NamedLayout, naming: str, name: str, inputs: int) -> NamedLayout:
    """Return a model as the variant whose first layer takes `inputs` inputs.

    Returns `layout` itself where the layer is not the first one or has that width already.
    """
    own = _find_input_layer(layout, naming, name)
    if own is None or not inputs or inputs == layout.diffusers_layers[own.layer].in_features:
        return layout
    g = layout.diffusers_layers[own.layer]
    middle = {**layout.diffusers_layers, own.layer: replace(g, shape=(g.shape[0], inputs, *g.shape[2:]))}
    return replace(layout, layers=middle, diffusers_layers=middle, _spans={})
