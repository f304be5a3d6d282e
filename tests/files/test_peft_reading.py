"""PEFT's folders as PEFT writes them: what it trained is read to the last digits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import torch
from peft_net import ALL_LORA, Net, at, inputs, net, outputs, trained, worst
from torch import Tensor, nn

from cases import One, relative
from lycoris import AdapterSet
from lycoris.errors import FileError
from lycoris.files.peft import read_peft
from lycoris.layers.sites import ModelSites

pytestmark = pytest.mark.filterwarnings("ignore:::peft", "ignore:::transformers", "ignore::UserWarning")
LYCORIS = at("linear", "bare", "conv1d", "conv2d", "pointwise", "grouped")
PATTERNS = {"rank_pattern": {"bare|conv1d": 2, "lin.*": 5, "linear": 3}, "alpha_pattern": {"^inner.bare": 7, "2d": 5}}
IMPORTS: dict[str, Callable[[], peft.PeftConfig]] = {
    "lora": lambda: peft.LoraConfig(r=3, lora_alpha=5, target_modules=ALL_LORA),
    "lora-rs": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_rslora=True, target_modules=ALL_LORA),
    "lora-patterns": lambda: peft.LoraConfig(r=4, lora_alpha=6, target_modules=ALL_LORA, **PATTERNS),
    "lora-bias": lambda: peft.LoraConfig(
        r=3, lora_alpha=5, lora_bias=True, target_modules=at("linear", "conv1d", "conv2d", "conv3d", "turned")
    ),
    "lora-fan-in": lambda: peft.LoraConfig(r=3, fan_in_fan_out=True, target_modules=at("turned")),
    "lora-all-biases": lambda: peft.LoraConfig(r=3, bias="all", target_modules=at("linear", "bare", "conv2d")),
    "lora-only-biases": lambda: peft.LoraConfig(r=3, bias="lora_only", target_modules=at("linear", "bare")),
    "dora": lambda: peft.LoraConfig(r=3, lora_alpha=5, use_dora=True, target_modules=ALL_LORA),
    "loha": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=LYCORIS),
    "loha-effective": lambda: peft.LoHaConfig(r=4, alpha=6, use_effective_conv2d=True, target_modules=LYCORIS),
    "loha-patterns": lambda: peft.LoHaConfig(r=4, alpha=6, target_modules=LYCORIS, **PATTERNS),
    "lokr": lambda: peft.LoKrConfig(r=1, alpha=5, target_modules=LYCORIS),
    "lokr-whole": lambda: peft.LoKrConfig(r=100, alpha=30, target_modules=LYCORIS),
    "lokr-both": lambda: peft.LoKrConfig(r=1, alpha=3, decompose_both=True, target_modules=LYCORIS),
    "lokr-effective": lambda: peft.LoKrConfig(
        r=1, alpha=3, use_effective_conv2d=True, decompose_factor=2, target_modules=at("linear", "conv2d", "grouped")
    ),
    "lokr-effective-1d": lambda: peft.LoKrConfig(
        r=2, alpha=3, use_effective_conv2d=True, target_modules=at("linear", "wide1d")
    ),
    "lokr-1d": lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=at("linear", "wide1d")),
    "lokr-factor": lambda: peft.LoKrConfig(r=2, alpha=3, decompose_factor=2, target_modules=LYCORIS),
    "lokr-unswapped": lambda: peft.LoKrConfig(r=2, alpha=3, decompose_factor=6, target_modules=at("linear", "bare")),
    "lokr-patterns": lambda: peft.LoKrConfig(r=1, alpha=6, target_modules=LYCORIS, **PATTERNS),
    "ia3": lambda: peft.IA3Config(
        target_modules=at("linear", "bare", "conv2d", "grouped", "conv3d", "turned"),
        feedforward_modules=at("bare", "grouped"),
    ),
    "ia3-pattern": lambda: peft.IA3Config(target_modules=at("linear", "bare"), feedforward_modules=r".*\.lin.*"),
    "oft": lambda: peft.OFTConfig(oft_block_size=4, target_modules=at("linear", "pointwise", "embedding")),
    "oft-terms": lambda: peft.OFTConfig(oft_block_size=6, num_cayley_neumann_terms=8, target_modules=at("linear")),
    "oft-two-terms": lambda: peft.OFTConfig(oft_block_size=6, num_cayley_neumann_terms=2, target_modules=at("linear")),
    "oft-exact": lambda: peft.OFTConfig(r=3, oft_block_size=0, use_cayley_neumann=False, target_modules=at("linear")),
    "oft-shared": lambda: peft.OFTConfig(oft_block_size=4, block_share=True, target_modules=at("linear", "embedding")),
    "coft": lambda: peft.OFTConfig(oft_block_size=4, coft=True, eps=0.1, target_modules=at("linear", "embedding")),
    "oft-biases": lambda: peft.OFTConfig(oft_block_size=4, bias="oft_only", target_modules=at("linear")),
    "boft": lambda: peft.BOFTConfig(boft_block_size=2, target_modules=at("linear", "bare", "conv2d", "pointwise")),
    "boft-number": lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=3, target_modules=at("linear")),
}
LOOSE = {"dora": 1e-6, "loha-patterns": 1e-7, "coft": 1e-7}
"""DoRA here adds a small number to each norm, for the sake of rows of zeros; PEFT rounds 6 / 5 and √3 to float32."""


@pytest.mark.parametrize("name", IMPORTS)
def test_what_peft_trained_is_read_exactly(name: str, tmp_path: Path) -> None:
    wrapped = trained(IMPORTS[name]())
    wanted = outputs(wrapped)
    wrapped.save_pretrained(tmp_path)
    model = net()
    plain = outputs(model)
    adapters = AdapterSet.load(model, read_peft(tmp_path, model)).attach()
    assert worst(outputs(model), wanted) < LOOSE.get(name, 1e-10)
    assert worst(plain, wanted) > 1e-2
    adapters.merge()
    assert worst(outputs(model), wanted) < LOOSE.get(name, 1e-10)


def test_a_convolution_of_oft_has_the_weight_that_peft_merges(tmp_path: Path) -> None:
    """Unmerged, PEFT's own forward gives something else than its merge."""
    wrapped = trained(peft.OFTConfig(oft_block_size=6, target_modules=at("conv2d", "pointwise")))
    wrapped.save_pretrained(tmp_path)
    model = net()
    bundle = read_peft(tmp_path, model)
    AdapterSet.load(model, bundle).attach()
    assert worst(outputs(model), outputs(wrapped.merge_and_unload())) < 1e-10
    assert "1 convolutions" in " ".join(bundle.remarks)
    assert "inner.conv2d" in " ".join(bundle.remarks)


@pytest.mark.parametrize("factor", [1, 2, 3])
def test_butterflies_of_boft(factor: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of several stages, which PEFT makes only where its CUDA kernel compiles: here the same in plain torch."""

    class BlockDiagonal:
        @staticmethod
        def apply(stages: Tensor) -> Tensor:
            return torch.stack([torch.block_diag(*stage) for stage in stages])

    monkeypatch.setattr("peft.tuners.boft.layer.get_fbd_cuda", lambda: True)
    monkeypatch.setattr("peft.tuners.boft.layer.FastBlockDiag", BlockDiagonal)
    config = peft.BOFTConfig(boft_block_size=2, boft_n_butterfly_factor=factor, target_modules=["layer"])
    wrapped = trained(config, One(nn.Linear(24, 10).double()))
    x = torch.randn(3, 24).double()
    wanted = wrapped(x).detach()
    wrapped.save_pretrained(tmp_path)
    model = wrapped.unload()
    AdapterSet.load(model, read_peft(tmp_path, model)).attach()
    assert relative(model(x), wanted) < 1e-10


def test_a_whole_tensor_that_differs_is_told() -> None:
    wrapped = trained(peft.LoraConfig(r=3, target_modules=at("linear")))
    state = wrapped.state_dict()
    state["base_model.model.inner.bare.weight"] = state["base_model.model.inner.bare.weight"] + 1
    remarks = read_peft(state, net(), wrapped.peft_config["default"].to_dict()).remarks
    assert any("1 tensors replace the model's own" in remark and "inner.bare.weight" in remark for remark in remarks)


def test_a_dump_of_a_state_dict_is_read() -> None:
    wrapped = trained(peft.LoraConfig(r=3, target_modules=ALL_LORA))
    model = net()
    bundle = read_peft(wrapped.state_dict(), model, wrapped.peft_config["default"].to_dict())
    assert any("are the model's own" in remark for remark in bundle.remarks)
    AdapterSet.load(model, bundle).attach()
    assert worst(outputs(model), outputs(wrapped)) < 1e-10


def test_whole_modules_are_a_remark(tmp_path: Path) -> None:
    trained(peft.LoraConfig(r=3, target_modules=at("linear"), modules_to_save=["bare"])).save_pretrained(tmp_path)
    bundle = read_peft(tmp_path, net())
    assert list(bundle.entries) == at("linear")
    assert bundle.remarks == ("full copies of bare (modules_to_save) are no adapters; left out",)


def test_the_meta_device_serves_what_needs_no_weight(tmp_path: Path) -> None:
    with torch.device("meta"):
        hollow = Net()
    for config in (peft.LoraConfig(target_modules=at("linear")), peft.IA3Config(target_modules=at("linear"))):
        config.feedforward_modules = at("linear")
        trained(config).save_pretrained(tmp_path)
        assert list(read_peft(tmp_path, hollow).entries) == at("linear")
    trained(peft.OFTConfig(oft_block_size=4, target_modules=at("linear"))).save_pretrained(tmp_path)
    with pytest.raises(FileError, match=r"inner\.linear: its base weight is needed"):
        read_peft(tmp_path, hollow)


def test_lora_that_mixes_groups_is_refused(tmp_path: Path) -> None:
    trained(peft.LoraConfig(r=8, target_modules=at("grouped"))).save_pretrained(tmp_path)
    with pytest.raises(FileError, match="mixes all channels of a convolution of 4 groups"):
        read_peft(tmp_path, net())


def test_ranks_of_each_group_alone_are_read() -> None:
    wrapped = trained(peft.LoraConfig(r=8, lora_alpha=3, target_modules=at("grouped")))
    state = {key: tensor for key, tensor in wrapped.state_dict().items() if "lora_" in key}
    down = next(tensor for key, tensor in state.items() if "lora_A" in key)
    keep = torch.eye(4).repeat_interleave(2, 0).repeat_interleave(2, 1)
    down.mul_(keep[:, :, None, None])
    model = net()
    AdapterSet.load(model, read_peft(state, model, wrapped.peft_config["default"].to_dict())).attach()
    assert worst(outputs(model), outputs(wrapped)) < 1e-10


def test_every_site_of_the_net_is_a_place_for_adapters() -> None:
    assert {site.path for site in ModelSites(net()).values()} == {f"inner.{name}" for name in inputs()}
