"""Musubi Tuner's two formats: kohya's, and the one that its converter calls "other"."""

from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.diffusers import PEFT_SPELLING

MUSUBI_DIALECT = Dialect(
    name="musubi",
    style="flat",
    prefixes={"lora_unet_": ""},
    naming="original",
    algorithms=frozenset({"lora", "loha", "lokr", "dylora"}),
    kinds=frozenset({"linear"}),
    header_marks=("ss_fp8_base", "ss_weighting_scheme"),
)

MUSUBI_OTHER_DIALECT = Dialect(
    name="musubi-other",
    style="dotted",
    prefixes={"diffusion_model.": ""},
    naming="original",
    spelling=PEFT_SPELLING,
    scale="in both",
    algorithms=frozenset({"lora", "loha", "lokr", "dylora"}),
    kinds=frozenset({"linear"}),
)
