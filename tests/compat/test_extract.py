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
from lycoris.modules import LoConModule
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
    values = torch.linalg.svdvals(tuned.a.weight - base.a.weight)
    for part in (0.2, 0.5, 0.8):
        kept = rank("quantile", part)
        assert kept == rank("percentile", part)
        assert values[: kept - 1].sum() < part * values.sum() <= values[:kept].sum()
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
    assert "lora_te2: changed but not stored: words, an embedding (mode='full' stores it)" in caplog.text
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
    nan = float("nan")
    for mode, wrong in (
        ("fixed", {"linear_mode_param": nan}),
        ("threshold", {"conv_mode_param": -1}),
        ("ratio", {"linear_mode_param": 1.5}),
        ("full", {"sparsity": -1}),
        ("full", {"sparsity": 1.5}),
    ):
        with pytest.raises(ConfigError, match=f"{next(iter(wrong))} must be"):
            extract_diff([], [], base, tuned, mode, **wrong)  # type: ignore[arg-type]  # wrong on purpose
    tuned.a = nn.Linear(12, 17)
    with pytest.raises(FileError, match=r"a is linear \(16, 12\) with bias in the base model and linear \(17, 12\)"):
        extract_diff([], [], base, tuned)


def test_alpha_is_exact_and_what_half_precision_cannot_hold_is_not_lost() -> None:
    base, tuned = nn.Linear(8, 5000, bias=False), nn.Linear(8, 5000, bias=False)
    tensors = extract_diff([], [], nn.ModuleList([base]), nn.ModuleList([tuned]), "fixed", 7)
    alpha = tensors["lora_unet_0.alpha"]
    assert (alpha.dtype, float(alpha)) == (torch.float32, 7.0)
    assert tensors["lora_unet_0.lora_up.weight"].dtype == torch.float16
    with torch.no_grad():
        tuned.weight += 1e6
    whole = extract_diff([], [], nn.ModuleList([base]), nn.ModuleList([tuned]), "full")["lora_unet_0.diff"]
    assert whole.dtype == torch.float32
    assert relative(base.weight + whole, tuned.weight) < 1e-6


@pytest.mark.parametrize("size", [1e6, 1e-9])
def test_small_and_large_changes_survive_as_a_lora(size: float) -> None:
    base, tuned = (nn.ModuleList([nn.Linear(12, 16)]) for _ in range(2))
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.zero_()
        tuned[0].weight.copy_(size * torch.outer(torch.randn(16), torch.randn(12)))
        tuned[0].bias.copy_(size * torch.randn(16))
    tensors = extract_diff([], [], base, tuned, "fixed", 1)
    assert "lora_unet_0.lora_up.weight" in tensors
    merge([], base, tensors)
    same(base, tuned)


def test_what_has_changed_beside_layers_is_told(caplog: pytest.LogCaptureFixture) -> None:
    class Odd(Net):
        def __init__(self) -> None:
            super().__init__()
            self.table, self.vector = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4))
            self.register_buffer("mean", torch.zeros(4))
            self.register_buffer("same", torch.zeros(4))

    base = Odd()
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        for tensor in (tuned.table, tuned.vector, tuned.mean):
            tensor += 1.0
    with caplog.at_level(logging.WARNING, logger="LyCORIS"):
        assert extract_diff([], [], base, tuned, "full") == {}
    assert "lora_unet: changed but not stored: mean, table, vector" in caplog.text


def test_layers_and_models_of_one_side_are_errors() -> None:
    for missing in (0, 1):
        models = pair()
        del models[missing].b
        with pytest.raises(FileError, match=r"b is .*nothing"):
            extract_diff([], [], *models)
    base, tuned = pair()
    tuned.a = nn.Linear(12, 16, bias=False)
    with pytest.raises(FileError, match=r"with bias in the base model and .* without bias"):
        extract_diff([], [], base, tuned)
    for given in (([base], [], None, None), ([], [], base, None), ([None], [tuned], base, tuned)):
        with pytest.raises(ConfigError, match="each base model needs a fine-tuned counterpart"):
            extract_diff(*given)


def test_weights_are_read_as_they_act() -> None:
    """Adapters on the fine-tuned model are part of it, and a weight in float8 is what it stands for."""
    base, tuned = pair()
    before = {key: tensor.clone() for key, tensor in tuned.state_dict().items()}
    lora = LoConModule("a", tuned.a, 1.0, 2, 2.0)
    nn.init.ones_(lora.lora_up.weight)
    lora.apply_to()
    tensors = extract_diff([], [], base, tuned, "full")
    lora.restore()
    assert all(torch.equal(tensor, before[key]) for key, tensor in tuned.state_dict().items())
    lora.merge_to()
    assert relative(tensors["lora_unet_a.diff"], tuned.a.weight - base.a.weight) < 1e-3
    small = copy.deepcopy(base)
    small.a.weight = nn.Parameter(small.a.weight.to(torch.float8_e4m3fn), requires_grad=False)
    rounded = extract_diff([], [], base, small, "full")
    assert rounded.keys() == {"lora_unet_a.diff"}
    assert relative(rounded["lora_unet_a.diff"], small.a.weight.float() - base.a.weight) < 1e-3


def test_text_encoders_are_called_as_networks_call_them() -> None:
    base, tuned = (type("T5EncoderModel", (Net,), {})() for _ in range(2))
    one, other = pair()
    tensors = extract_diff([one, base], [other, tuned], None, None, "full")
    assert {key.split("_")[1] for key in tensors} == {"te1", "te3"}
