"""ai-toolkit's formats: diffusers' names or the original ones, and a scale of 1 without a word."""

from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.diffusers import FACTORS

AI_TOOLKIT = Dialect(
    name="ai-toolkit",
    style="dotted",
    prefixes={"transformer.": "", "diffusion_model.": ""},
    spelling=FACTORS,
    scale="in up",
    algorithms=frozenset({"lora", "lokr", "full", "dylora"}),
    marks=("software",),
)
