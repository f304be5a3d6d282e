"""`extract_diff`: a fine-tuned model and the base with what was extracted are the same."""

from __future__ import annotations

import copy
import logging
from typing import Any

import pytest
import torch
from torch import nn

from cases import relative
from lycoris.errors import ConfigError, FileError
from lycoris.utils import extract_diff, merge

RANK = 2


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(12, 16)
        self.b = nn.Conv2d(4, 16, 3)
        self.norm = nn.LayerNorm(16)
        self.words = nn.Embedding(7, 6)


def pair(rank: int = RANK) -> tuple[Net, Net]:
    """A model, and one whose layers differ from it by a low rank."""
    torch.manual_seed(0)
    base = Net()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for layer in (tuned.a, tuned.b):
            matrix = layer.weight.flatten(1)
            layer.weight += (torch.randn(16, rank) @ torch.randn(rank, matrix.shape[1])).view_as(layer.weight)
            layer.bias += 1.0
        tuned.norm.weight += 0.5
    return base, tuned


def same(base: nn.Module, tuned: nn.Module, tolerance: float = 2e-3) -> None:
    for name, parameter in base.named_parameters():
        assert relative(parameter, tuned.get_parameter(name)) < tolerance, name


@pytest.mark.parametrize("options", [
    {"mode": "fixed", "linear_mode_param": RANK, "conv_mode_param": RANK},
    {"mode": "threshold", "linear_mode_param": 1e-2, "conv_mode_param": 1e-2},
    {"mode": "ratio", "linear_mode_param": 1e-3, "conv_mode_param": 1e-3},
    {"mode": "full"},
])  # fmt: skip
def test_base_and_extract_are_the_tuned_model(options: dict[str, Any]) -> None:
    base, tuned = pair()
    tensors = extract_diff([], [], base, tuned, **options)
    low = options["mode"] != "full"
    assert ("lora_unet_a.lora_up.weight" in tensors) == low
    assert ("lora_unet_b.diff" in tensors) != low
    assert {"lora_unet_norm.w_norm", "lora_unet_norm.b_norm", "lora_unet_a.diff_b"} <= tensors.keys()
    merge([], base, tensors)
    same(base, tuned)


def test_modes_that_count() -> None:
    base, tuned = pair(6)

    def rank(mode: Any, wanted: float) -> int:
        return len(extract_diff([], [], base, tuned, mode, wanted, 1)["lora_unet_a.lora_down.weight"])

    assert rank("fixed", 3) == 3
    assert rank("fixed", 0) == 1
    assert rank("quantile", 0.5) == rank("percentile", 0.5) < rank("quantile", 0.8)
    whole = extract_diff([], [], base, tuned, "fixed", 8, 1)
    assert "lora_unet_a.diff" in whole, "from half of the outputs on"


def test_the_largest_places_of_what_is_left() -> None:
    base, tuned = pair(5)
    plain, sparse = (copy.deepcopy(base) for _ in range(2))
    merge([], plain, extract_diff([], [], base, tuned, "fixed", 2, 2))
    merge([], sparse, extract_diff([], [], base, tuned, "fixed", 2, 2, use_bias=True, sparsity=0.5))
    for name in ("a", "b"):
        left, less = ((getattr(tuned, name).weight - getattr(model, name).weight).norm() for model in (plain, sparse))
        assert less < 0.6 * left


def test_text_encoders_and_embeddings(caplog: pytest.LogCaptureFixture) -> None:
    base, tuned = pair()
    with torch.no_grad():
        tuned.words.weight += 1.0
    with caplog.at_level(logging.WARNING, logger="LyCORIS"):
        two = extract_diff([base, base], [tuned, tuned], None, None, "fixed", 2, 2)
    assert {key.split("_")[1] for key in two} == {"te1", "te2"}
    assert "words is an embedding and has changed" in caplog.text
    one = extract_diff([base], [tuned], None, None, "full")
    assert one["lora_te_words.diff"].shape == (7, 6)


def test_nothing_changed_gives_nothing_and_half_precision_works() -> None:
    base = Net().half()
    assert extract_diff([], [], base, copy.deepcopy(base)) == {}
    tuned = copy.deepcopy(base)
    tuned.a.weight.data += 1.0
    assert "lora_unet_a.lora_up.weight" in extract_diff([], [], base, tuned, "fixed", 1)


def test_mistakes() -> None:
    base, tuned = pair()
    with pytest.raises(ConfigError, match="unknown mode 'fix'; did you mean 'fixed'"):
        extract_diff([], [], base, tuned, "fix")  # type: ignore[arg-type]
    tuned.a = nn.Linear(12, 17)
    with pytest.raises(FileError, match=r"a is linear \(16, 12\) in the base and linear \(17, 12\)"):
        extract_diff([], [], base, tuned)
