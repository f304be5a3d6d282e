"""The files of T-LoRA's authors: attention processors of diffusers' UNet, frozen copies included."""

from lycoris.files.dialect import Dialect

TLORA = Dialect(
    name="t-lora",
    style="dotted",
    prefixes={"unet.": "", "": ""},
    scale="in up",
    algorithms=frozenset({"tlora", "lora"}),
)
