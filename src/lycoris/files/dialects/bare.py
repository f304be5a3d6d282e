"""Names without any prefix: as a model's own code calls its layers, or as PEFT saves them."""

from lycoris.files.dialect import Dialect
from lycoris.files.dialects.diffusers import FACTORS

PEFT = Dialect(
    name="peft",
    style="dotted",
    prefixes={"base_model.model.": ""},
    spelling=FACTORS | {"dora_scale": "lora_magnitude_vector"},
    algorithms=frozenset({"lora", "loha", "lokr", "ia3", "dylora", "dora"}),
)

BARE = Dialect(name="bare", style="dotted", prefixes={"": ""}, naming="original")
