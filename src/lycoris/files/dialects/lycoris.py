"""LyCORIS' own wrapper format, which SimpleTuner writes: one model, `lycoris_<path>.<tensor>`."""

from lycoris.files.dialects.base import Dialect

LYCORIS_DIALECT = Dialect(name="lycoris", style="flat", prefixes={"lycoris_": ""})
