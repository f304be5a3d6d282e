"""A small model and networks for it, as trainers configure them."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from cases import perturb
from lycoris import (
    LycorisNetwork,
    create_lycoris,
)

CONFIGS: dict[str, dict[str, Any]] = {
    "lora": {"algo": "lora"},
    "locon": {"algo": "locon", "use_tucker": True},
    "lora-scalar": {"algo": "lora", "use_scalar": True},
    "lora-rs": {"algo": "lora", "rs_lora": True},
    "lora-dora": {"algo": "lora", "dora_wd": True},
    "lora-dora-in": {"algo": "lora", "dora_wd": True, "wd_on_output": False},
    "loha": {"algo": "loha"},
    "loha-scalar": {"algo": "loha", "use_scalar": True},
    "loha-tucker": {"algo": "loha", "use_tucker": True},
    "lokr": {"algo": "lokr", "factor": 2},
    "lokr-whole": {"algo": "lokr", "linear_dim": 10000, "linear_alpha": 1, "full_matrix": True},
    "lokr-both": {"algo": "lokr", "linear_dim": 1, "decompose_both": True},
    "lokr-scalar": {"algo": "lokr", "use_scalar": True},
    "tlora": {"algo": "tlora"},
    "tlora-last": {"algo": "tlora", "sig_type": "last"},
    "full": {"algo": "full"},
    "dylora": {"algo": "dylora"},
    "glora": {"algo": "glora"},
    "ia3": {"algo": "ia3"},
    "ia3-in": {"algo": "ia3", "train_on_input": True},
    "diag-oft": {"algo": "diag-oft", "rescaled": True},
    "boft": {"algo": "boft", "linear_dim": 6, "constraint": 0.1},
}


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_out = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.to_out(self.to_q(x).tanh())


class FeedForward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8, bias=False))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.net(x)


class MyModel(nn.Module):
    """A convolution, a 1x1 convolution, two blocks and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv_in, self.skip = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
        self.blocks = nn.ModuleList([Attention(), FeedForward()])
        self.head = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.skip(self.conv_in(x).sigmoid()).flatten(2).transpose(1, 2)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def trained(model: nn.Module, multiplier: float = 1.0, **config: Any) -> LycorisNetwork:
    """An applied network with random tensors, in the model's precision."""
    network = create_lycoris(model, multiplier, **config).to(next(model.parameters()).dtype)
    perturb(network.adapters, 0.2)
    network.apply_to()
    return network


def names(network: LycorisNetwork) -> set[str]:
    return {key.split(".")[0] for key in network.state_dict()}
