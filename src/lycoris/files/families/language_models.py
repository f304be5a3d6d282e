"""Language models in the manner of Llama."""

from __future__ import annotations

from lycoris.files.family import Architecture, Family
from lycoris.files.naming import Rename, Table

_MAKES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2")

LANGUAGE_MODEL = Architecture(
    name="language-model",
    classes=tuple(f"{make}{kind}" for make in _MAKES for kind in ("ForCausalLM", "Model")),
    outlines=("llama-3.1-8b", "llama-3.2-1b", "qwen2.5-7b", "qwen3-8b", "mistral-7b-v0.3", "gemma2-2b"),
    namings={
        # The classes called Model, which pipelines of diffusers hold as text encoders.
        "headless": Table(
            (
                Rename("embed_tokens", "model.embed_tokens"),
                Rename("layers", "model.layers"),
                Rename("norm", "model.norm"),
            )
        )
    },
    targets=tuple(f"{make}DecoderLayer" for make in _MAKES),
)

FAMILY = Family(
    name="language-model",
    components={"": LANGUAGE_MODEL.name},
    objective="tokens",
)
ARCHITECTURES = (LANGUAGE_MODEL,)
