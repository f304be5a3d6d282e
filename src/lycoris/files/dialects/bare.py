"""Names without any prefix: as a model's own code calls its layers, or as PEFT saves them."""

from lycoris.files.dialects.base import Dialect
from lycoris.files.dialects.diffusers import PEFT_SPELLING

PEFT_DIALECT = Dialect(
    name="peft",
    style="dotted",
    prefixes={"base_model.model.": ""},
    spelling=PEFT_SPELLING,
    is_folder=True,
)

BARE_DIALECT = Dialect(name="bare", style="dotted", prefixes={"": ""}, naming="original")
