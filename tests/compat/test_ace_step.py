"""ACE-Step 1.5 and the programs around it: LoKr and LoHa on a decoder that keeps its network as an attribute."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cases import perturb, relative
from lycoris import LycorisNetwork, create_lycoris

TARGETS = ["q_proj", "v_proj"]


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.v_proj, self.mlp = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(self.q_proj(x) * self.v_proj(x))


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.layers = nn.ModuleList([Attention(), Attention()])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def inject(decoder: Decoder, algo: str, **options: Any) -> LycorisNetwork:
    """Names are given under both keys, and the first of two networks is dropped when DoRA is asked for."""
    decoder.requires_grad_(False)
    LycorisNetwork.apply_preset({"unet_target_name": TARGETS, "target_name": TARGETS})
    given = {"linear_dim": 4, "linear_alpha": 2, "algo": algo, "bypass_mode": False, "rs_lora": False}
    network = create_lycoris(decoder, 1.0, **given, use_tucker=False, use_scalar=False)
    if options.get("dora_wd"):
        network = create_lycoris(decoder, 1.0, **given, **options)
    network.apply_to()
    decoder._lycoris_net = network
    for lora in network.loras:
        for parameter in lora.parameters():
            parameter.requires_grad = any(f"_{name}" in lora.lora_name for name in TARGETS)
    return network


@pytest.mark.parametrize(("algo", "options"), [("lokr", {}), ("lokr", {"dora_wd": True}), ("loha", {})])
def test_a_network_that_the_decoder_keeps(algo: str, options: dict[str, Any], tmp_path: Path) -> None:
    x, path = torch.randn(2, 3, 8), tmp_path / "lokr_weights.safetensors"
    decoder = Decoder().eval()
    state, base = copy.deepcopy(decoder.state_dict()), decoder(x)
    network = inject(decoder, algo, **options)
    assert relative(decoder(x), base) < 1e-5
    decoder(x).square().mean().backward()
    trained = {name for name, p in network.named_parameters() if p.grad is not None}
    assert trained == {name for name, p in network.named_parameters() if p.requires_grad} != set()
    assert not any(p.requires_grad for name, p in decoder.named_parameters() if name in state)
    perturb(network.adapters)
    live = decoder(x)
    assert relative(live, base) > 1e-3
    network.save_weights(str(path), dtype=None, metadata={"algo": algo, "format": "lycoris"})
    assert relative(copy.deepcopy(decoder)(x), live) < 1e-6

    decoder._lycoris_net.restore()
    decoder._lycoris_net = None
    assert not decoder.load_state_dict(state, strict=False).missing_keys
    assert torch.equal(decoder(x), base)
    again = inject(decoder, algo, **options)
    assert again.load_weights(str(path)) == {}
    assert relative(decoder(x), live) < 1e-6


def test_a_network_is_made_over_one_that_was_restored_and_kept() -> None:
    decoder = Decoder()
    names = [lora.lora_name for lora in inject(decoder, "lokr").loras]
    decoder._lycoris_net.restore()
    assert [lora.lora_name for lora in inject(decoder, "lokr").loras] == names
