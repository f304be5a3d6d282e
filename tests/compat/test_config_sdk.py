"""`lycoris.config` and `lycoris.config_sdk`, as user interfaces use them."""

from __future__ import annotations

from typing import Any

import pytest

from lycoris.config import PRESET, list_builtin_presets
from lycoris.config_sdk import (
    AlgoOverride,
    PresetConfig,
    PresetValidationError,
    describe_algo,
    list_algorithms,
)

ELEVEN = ["boft", "diag-oft", "dylora", "full", "glora", "ia3", "locon", "loha", "lokr", "lora", "tlora"]


def test_algorithms_have_specs() -> None:
    specs = {spec.name: spec for spec in list_algorithms()}
    assert sorted(specs) == ELEVEN
    for spec in specs.values():
        assert spec.description
        assert isinstance(spec.required_args, tuple)
        assert spec.notes is None or spec.notes.endswith(".")
        assert spec.supports("module_dropout")
    assert {"dim", "alpha", "use_tucker", "weight_decompose"} <= set(specs["lora"].supported_args)
    assert {"factor", "full_matrix", "unbalanced_factorization"} <= set(specs["lokr"].supported_args)
    assert {"dim", "constraint", "rescaled"} <= set(specs["diag-oft"].supported_args)
    assert not specs["ia3"].supports("dim")
    assert describe_algo("LoHa") == specs["loha"]
    with pytest.raises(PresetValidationError, match="did you mean 'lokr'"):
        describe_algo("lokrr")


def test_built_in_presets() -> None:
    presets = list_builtin_presets()
    assert (
        set(presets)
        == set(PRESET)
        == {
            *("full", "full-lin", "attn-mlp", "attn-only", "unet-only"),
            *("unet-transformer-only", "unet-convblock-only", "ia3"),
        }
    )
    for name, preset in presets.items():
        assert PresetConfig.from_dict(preset.to_dict(), strict=True) == preset
        assert preset.to_dict() == PRESET[name]
    presets["full"].unet_target_module.clear()
    assert list_builtin_presets()["full"].unet_target_module


PAYLOAD: dict[str, Any] = {
    "enable_conv": False,
    "target_module": ["Attention"],
    "module_algo_map": {"Attention": {"algo": "lokr", "factor": 16, "dim": 4}, "FeedForward": {"factor": 8}},
    "name_algo_map": {"blocks.*": {"algo": "lora"}},
    "use_fnmatch": True,
    "exclude_name": ["ref_*"],
}


def test_a_preset_goes_both_ways() -> None:
    preset = PresetConfig.from_dict(PAYLOAD, strict=True)
    assert preset.to_dict() == PAYLOAD
    assert list(preset.list_algorithms()) == ["lokr", "lora"]
    assert preset.module_algo_map["FeedForward"] == AlgoOverride(None, {"factor": 8})
    preset.target_module.append("More")
    assert PAYLOAD["target_module"] == ["Attention"]
    assert PresetConfig.from_dict({"target_name": None}).to_dict() == {}


@pytest.mark.parametrize(
    ("payload", "words"),
    [
        ({"target_modul": []}, "did you mean 'target_module'"),
        ({"target_module": "Attention"}, "list of names"),
        ({"target_name": ["["]}, "not a regular expression"),
        ({"module_algo_map": {"A": {"algo": "nope"}}}, "unknown algorithm 'nope'"),
        ({"module_algo_map": {"A": {"algo": "lora", "factor": 3}}}, "option of lora 'factor'"),
        ({"module_algo_map": {"A": {"algo": "lokr", "factor": "x"}}}, "factor must be a whole number"),
        ({"module_algo_map": {"A": {"facter": 3}}}, "did you mean 'factor'"),
    ],
)
def test_wrong_presets_are_refused(payload: dict[str, Any], words: str) -> None:
    with pytest.raises(PresetValidationError, match=words) as caught:
        PresetConfig.from_dict(payload, strict=True)
    assert isinstance(caught.value, ValueError)


def test_settings_of_maps_are_checked_only_when_strict() -> None:
    payload = {"module_algo_map": {"A": {"algo": "lora", "factor": 3}}}
    assert PresetConfig.from_dict(payload).to_dict() == payload


@pytest.mark.parametrize(("name", "value"), [("dim", "x"), ("linear_dim", 0), ("alpha", "much"), ("conv_alpha", [1])])
@pytest.mark.parametrize("algo", [{}, {"algo": "lora"}])
def test_sizes_are_checked(algo: dict[str, str], name: str, value: Any) -> None:
    with pytest.raises(PresetValidationError, match=name):
        PresetConfig.from_dict({"module_algo_map": {"Attention": {**algo, name: value}}}, strict=True)
