"""Language models in the manner of Llama."""

from __future__ import annotations

from lycoris.models.families.family import Architecture, Family
from lycoris.models.families.naming import Rename, Table

_MAKES = ("Llama", "Mistral", "Qwen2", "Qwen3", "Gemma2")

LANGUAGE_MODEL = Architecture(
    name="language-model",
    classes=tuple(f"{make}{kind}" for make in _MAKES for kind in ("ForCausalLM", "Model")),
    models={
        "llama-3.1-8b": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "llama-3.2-1b": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": 128256,
            "hidden_size": 2048,
            "intermediate_size": 8192,
            "num_hidden_layers": 16,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 64,
            "tie_word_embeddings": True,
        },
        "qwen2.5-7b": {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": 152064,
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
        },
        "qwen3-8b": {
            "architectures": ["Qwen3ForCausalLM"],
            "model_type": "qwen3",
            "vocab_size": 151936,
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
        },
        "mistral-7b-v0.3": {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "vocab_size": 32768,
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
        },
        "gemma2-2b": {
            "architectures": ["Gemma2ForCausalLM"],
            "model_type": "gemma2",
            "vocab_size": 256000,
            "hidden_size": 2304,
            "intermediate_size": 9216,
            "num_hidden_layers": 26,
            "num_attention_heads": 8,
            "num_key_value_heads": 4,
            "head_dim": 256,
            "tie_word_embeddings": True,
        },
    },
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
    blocks=tuple(f"{make}DecoderLayer" for make in _MAKES),
    attention=tuple(f"{make}Attention" for make in _MAKES),
    feed_forward=tuple(f"{make}MLP" for make in _MAKES),
)

FAMILY = Family(
    name="language-model",
    components={"": LANGUAGE_MODEL.name},
)
ARCHITECTURES = (LANGUAGE_MODEL,)
