"""ComfyUI's own format: dotted names of the code that a model was published with, behind `diffusion_model.`."""

from collections.abc import Mapping

from lycoris.files.dialects.base import Dialect
from lycoris.models.families import FAMILIES

# Of several families that mean different components by one name, the first counts, unless the header names another.
_TEXT_ENCODERS: Mapping[str, str] = {
    f"text_encoders.{name}.transformer.": component
    for family in reversed([*FAMILIES.values()])
    for name, component in family.comfyui.items()
}

COMFYUI_DIALECT = Dialect(
    name="comfyui",
    style="dotted",
    prefixes={
        "diffusion_model.": "",
        "model.diffusion_model.": "",
        **_TEXT_ENCODERS,
    },
    naming="comfyui",
    namings={"sd1.5-unet": "sgm", "sd2-unet": "sgm", "sdxl-unet": "sgm", "clip": "text_model"},
)
