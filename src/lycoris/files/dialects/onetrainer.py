"""OneTrainer's five formats."""

from lycoris.algorithms.tensors import MAGNITUDE
from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.comfyui import COMFYUI
from lycoris.files.dialects.diffusers import COMPONENTS, FACTORS, Diffusers
from lycoris.files.dialects.kohya import ENCODERS, TEXT_ENCODERS, UNETS
from lycoris.files.dialects.suffixes import MAGNITUDE_VECTOR

MARKS = ("ot_branch", "ot_revision", "ot_config")

ONETRAINER_DIFFUSERS = Diffusers(
    name="onetrainer-diffusers",
    style="dotted",
    prefixes=COMPONENTS,
    namings={"clip": "text_model"},
    spelling=FACTORS,
    lengths={"out": MAGNITUDE_VECTOR, "in": MAGNITUDE},
    scale="in up",
    marks=MARKS,
)
ONETRAINER_KOHYA = Dialect(
    name="onetrainer-kohya",
    style="flat",
    prefixes={"lora_unet_": "", **TEXT_ENCODERS},
    naming="original",
    namings={**UNETS, **ENCODERS},
    marks=MARKS,
)
ONETRAINER_COMFY = Dialect(
    name="onetrainer-comfy",
    style="dotted",
    prefixes=COMFYUI.prefixes,
    naming=COMFYUI.naming,
    namings=COMFYUI.namings,
    spelling=FACTORS,
    marks=MARKS,
)
ONETRAINER_LEGACY = Dialect(
    name="onetrainer-legacy",
    style="flat",
    prefixes={"lora_transformer_": "", "lora_unet_": "", **TEXT_ENCODERS},
    namings=ENCODERS,
    marks=MARKS,
)
ONETRAINER_ORIGINAL = Dialect(
    name="onetrainer-original",
    style="dotted",
    prefixes={"": ""},
    naming="original",
    namings={"sd1.5-unet": "sgm", "sd2-unet": "sgm", "sdxl-unet": "sgm"},
    spelling=FACTORS,
    marks=MARKS,
)
