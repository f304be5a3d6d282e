"""The scale of a LoRA, wherever a program keeps it: honoured, and told where it is missing or contradicted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from lycoris import read
from lycoris.adapters.bundle import Bundle

RANK = 4
DOTTED = ("lora_A.weight", "lora_B.weight")
FLAT = ("lora_down.weight", "lora_up.weight")


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.ModuleDict({"to_q": nn.Linear(8, 8), "to_k": nn.Linear(8, 8)})


def tensors(prefix: str, spelled: tuple[str, str], alpha: float | None = None) -> dict[str, Tensor]:
    found = {}
    for layer in ("to_q", "to_k"):
        name = f"attn_{layer}" if spelled is FLAT else f"attn.{layer}"
        found |= {
            f"{prefix}{name}.{spelled[0]}": torch.ones(RANK, 8),
            f"{prefix}{name}.{spelled[1]}": torch.ones(8, RANK),
        }
        if alpha is not None:
            found[f"{prefix}{name}.alpha"] = torch.tensor(alpha)
    return found


def scales(bundle: Bundle) -> dict[str, float]:
    return {path.rpartition(".")[2]: s[0].algorithm.scale(s[0].geometry) for path, s in bundle.entries.items()}


SETTINGS: dict[str, tuple[dict[str, Any], tuple[float, float]]] = {
    "alpha": ({"r": RANK, "lora_alpha": 1}, (0.25, 0.25)),
    "alpha_pattern": ({"r": RANK, "lora_alpha": 4, "alpha_pattern": {"to_q": 2}}, (0.5, 1.0)),
    "a regular expression": ({"r": RANK, "lora_alpha": 4, "alpha_pattern": {r".*to_[qv]": 2}}, (0.5, 1.0)),
    "rank_pattern": ({"r": 8, "lora_alpha": 4, "rank_pattern": {"to_q|to_k": RANK}}, (1.0, 1.0)),
    "rslora": ({"r": RANK, "lora_alpha": 4, "use_rslora": True}, (2.0, 2.0)),
}


@pytest.mark.parametrize("how", ["flat", "flat, of a UNet", "nested", "without a component"])
@pytest.mark.parametrize("name", SETTINGS)
def test_settings_in_the_header(name: str, how: str, tmp_path: Path) -> None:
    own, (query, key) = SETTINGS[name]
    begin = "unet" if "UNet" in how else "transformer"
    told = {
        "nested": {begin: own},
        "without a component": own,
    }.get(how, {f"{begin}.{key}": value for key, value in own.items()})
    header = {"lora_adapter_metadata": json.dumps(told)}
    save_file(tensors(f"{begin}.", DOTTED), tmp_path / "a.safetensors", header)
    found = read(tmp_path / "a.safetensors", Block())
    assert scales(found) == pytest.approx({"to_q": query, "to_k": key})
    assert found.report.remarks == ()


@pytest.mark.parametrize("name", SETTINGS)
def test_a_config_next_to_the_file(name: str, tmp_path: Path) -> None:
    own, (query, key) = SETTINGS[name]
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **own}))
    save_file(tensors("base_model.model.", DOTTED), tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors", Block())
    assert scales(found) == pytest.approx({"to_q": query, "to_k": key})
    assert found.report.remarks == (
        "the scale of 2 layers without an alpha tensor is from the adapter_config.json next to it",
    )


def test_a_config_of_another_rank_is_of_another_file(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 1}))
    save_file(tensors("transformer.", DOTTED), tmp_path / "a.safetensors")
    assert scales(read(tmp_path / "a.safetensors", Block())) == {"to_q": 1, "to_k": 1}


@pytest.mark.parametrize("where", ["ss_network_alpha", "lycoris_config.json"])
def test_one_alpha_for_all_layers(where: str, tmp_path: Path) -> None:
    header = {"ss_network_dim": str(RANK), "ss_network_alpha": "2.0"} if where.startswith("ss") else {}
    if not header:
        (tmp_path / where).write_text(json.dumps({"linear_dim": RANK, "linear_alpha": 2}))
    save_file(tensors("lycoris_", FLAT), tmp_path / "a.safetensors", header)
    found = read(tmp_path / "a.safetensors", Block())
    assert scales(found) == {"to_q": 0.5, "to_k": 0.5}
    assert where in str(found.report.remarks)


def test_what_is_in_the_factors_is_not_counted_twice(tmp_path: Path) -> None:
    """Musubi Tuner's converter folds the scale into the factors, and keeps the header."""
    header = {"ss_network_dim": str(RANK), "ss_network_alpha": "2.0", "ss_fp8_base": "x"}
    save_file(tensors("diffusion_model.", DOTTED), tmp_path / "a.safetensors", header)
    found = read(tmp_path / "a.safetensors", Block(), dialect="musubi-other")
    assert scales(found) == {"to_q": 1, "to_k": 1}


def test_sources_that_disagree(tmp_path: Path) -> None:
    header = {"ss_network_dim": str(RANK), "ss_network_alpha": "1"}
    save_file(tensors("lycoris_", FLAT, alpha=4.0), tmp_path / "a.safetensors", header)
    found = read(tmp_path / "a.safetensors", Block())
    assert scales(found) == {"to_q": 1, "to_k": 1}
    assert found.report.remarks == (
        "the header's ss_network_alpha says alpha 1 for attn.to_k, its alpha tensors 4; the latter counted",
    )
    save_file(tensors("lycoris_", FLAT, alpha=1.0), tmp_path / "a.safetensors", header)
    assert read(tmp_path / "a.safetensors", Block()).report.remarks == ()


@pytest.mark.parametrize(("prefix", "spelled"), [("transformer.", DOTTED), ("lycoris_", FLAT)])
def test_a_scale_that_nothing_tells(prefix: str, spelled: tuple[str, str], tmp_path: Path) -> None:
    save_file(tensors(prefix, spelled), tmp_path / "a.safetensors")
    found = read(tmp_path / "a.safetensors", Block())
    assert scales(found) == {"to_q": 1, "to_k": 1}
    assert found.report.remarks == ("the scale of 2 layers is not stored; 1 was used",)
