"""OneTrainer's five formats."""

from lycoris.algorithms.tensors import MAGNITUDE
from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.comfyui import COMFYUI_DIALECT
from lycoris.files.dialects.diffusers import COMPONENT_PREFIXES, PEFT_SPELLING, DiffusersDialect
from lycoris.files.dialects.kohya import ENCODER_NAMINGS, TEXT_ENCODER_PREFIXES, UNET_NAMINGS
from lycoris.files.dialects.suffixes import MAGNITUDE_VECTOR

ONETRAINER_MARKS = ("ot_branch", "ot_revision", "ot_config")

ONETRAINER_DIFFUSERS = DiffusersDialect(
    name="onetrainer-diffusers",
    style="dotted",
    prefixes=COMPONENT_PREFIXES,
    namings={"clip": "text_model"},
    spelling=PEFT_SPELLING,
    magnitudes={"out": MAGNITUDE_VECTOR, "in": MAGNITUDE},
    scale="in up",
    header_marks=ONETRAINER_MARKS,
)
ONETRAINER_KOHYA = Dialect(
    name="onetrainer-kohya",
    style="flat",
    prefixes={"lora_unet_": "", **TEXT_ENCODER_PREFIXES},
    naming="original",
    namings={**UNET_NAMINGS, **ENCODER_NAMINGS},
    header_marks=ONETRAINER_MARKS,
)
ONETRAINER_COMFY = Dialect(
    name="onetrainer-comfy",
    style="dotted",
    prefixes=COMFYUI_DIALECT.prefixes,
    naming=COMFYUI_DIALECT.naming,
    namings=COMFYUI_DIALECT.namings,
    spelling=PEFT_SPELLING,
    header_marks=ONETRAINER_MARKS,
)
ONETRAINER_LEGACY = Dialect(
    name="onetrainer-legacy",
    style="flat",
    prefixes={"lora_transformer_": "", "lora_unet_": "", **TEXT_ENCODER_PREFIXES},
    namings=ENCODER_NAMINGS,
    header_marks=ONETRAINER_MARKS,
)
ONETRAINER_ORIGINAL = Dialect(
    name="onetrainer-original",
    style="dotted",
    prefixes={"": ""},
    naming="original",
    namings={"sd1.5-unet": "sgm", "sd2-unet": "sgm", "sdxl-unet": "sgm"},
    spelling=PEFT_SPELLING,
    header_marks=ONETRAINER_MARKS,
)
