"""ai-toolkit's formats: diffusers' names or the original ones, and a scale of 1 without a word."""

from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.diffusers import PEFT_SPELLING

AI_TOOLKIT_DIALECT = Dialect(
    name="ai-toolkit",
    style="dotted",
    prefixes={"transformer.": "", "diffusion_model.": ""},
    spelling=PEFT_SPELLING,
    scale="in up",
    algorithms=frozenset({"lora", "lokr", "full", "dylora"}),
    header_marks=("software",),
)
