"""The built-in presets of the kohya interface."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from lycoris.compat import block_classes
from lycoris.compat.config_sdk import AlgoOverride, PresetConfig

IA3_INPUT_PATTERNS = (r"(.*\.)?mlp\.fc2$", r"(.*\.)?ff\.net\.2$")
"""Second layers of feed-forward blocks, whose inputs (IA)³ scales."""


FULL_UNET_MODULES: tuple[str, ...] = (*block_classes.CONVOLVED, *block_classes.TRANSFORMERS)
"""Classes of blocks that the preset "full" targets in denoisers."""
FULL_UNET_NAMES: tuple[str, ...] = (*block_classes.UNET_CONVOLUTIONS, *block_classes.UNET_LINEARS)
FULL_TEXT_ENCODER_MODULES: tuple[str, ...] = block_classes.TEXT


def _build_preset(
    unet: Sequence[str] = (), unet_names: Sequence[str] = (), text: Sequence[str] = (), *, conv: bool = False
) -> PresetConfig:
    return PresetConfig(
        enable_conv=conv,
        unet_target_module=list(unet),
        unet_target_name=list(unet_names),
        text_encoder_target_module=list(text),
        text_encoder_target_name=[],
    )


def list_builtin_presets() -> dict[str, PresetConfig]:
    """Return the built-in presets by name.

    Every call builds them again, so that modifying a result has no effect on others.
    """
    every, names = FULL_UNET_MODULES, FULL_UNET_NAMES
    return {
        "full": _build_preset(every, names, block_classes.TEXT, conv=True),
        "full-lin": _build_preset(
            (*block_classes.TRANSFORMERS, "ResnetBlock2D"), block_classes.UNET_LINEARS, block_classes.TEXT
        ),
        "attn-mlp": _build_preset(block_classes.TRANSFORMERS, text=block_classes.TEXT),
        "attn-only": _build_preset(block_classes.DENOISER_ATTENTION, text=block_classes.TEXT_ATTENTION_ONLY),
        "unet-only": _build_preset(every, names, conv=True),
        "unet-transformer-only": _build_preset(block_classes.TRANSFORMERS),
        "unet-convblock-only": _build_preset(block_classes.CONVOLVED, block_classes.UNET_CONVOLUTIONS, conv=True),
        "ia3": _build_ia3_preset(),
    }


def _build_ia3_preset() -> PresetConfig:
    made = _build_preset(unet_names=(r"(.*\.)?to_k$", r"(.*\.)?to_v$", IA3_INPUT_PATTERNS[1]))
    made.text_encoder_target_name = [r"(.*\.)?k_proj$", r"(.*\.)?v_proj$", IA3_INPUT_PATTERNS[0]]
    made.name_algo_map = {name: AlgoOverride(options={"train_on_input": True}) for name in IA3_INPUT_PATTERNS}
    return made


PRESET: Mapping[str, dict[str, Any]] = MappingProxyType(
    {name: preset.to_dict() for name, preset in list_builtin_presets().items()}
)
"""The built-in presets as JSON objects, by name."""


class _BuiltinPresets(Mapping[str, PresetConfig]):
    """The built-in presets by name, built when they are read."""

    def __getitem__(self, name: str) -> PresetConfig:
        return list_builtin_presets()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(PRESET)

    def __len__(self) -> int:
        return len(PRESET)


BUILTIN_PRESET_CONFIGS: Mapping[str, PresetConfig] = _BuiltinPresets()
"""The built-in presets as `PresetConfig`, by name."""
