"""Names without any prefix: as a model's own code calls its layers, or as PEFT saves them."""

from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.diffusers import FACTORS

PEFT = Dialect(
    name="peft",
    style="dotted",
    prefixes={"base_model.model.": ""},
    spelling=FACTORS,
    folder=True,
)

BARE = Dialect(name="bare", style="dotted", prefixes={"": ""}, naming="original")
